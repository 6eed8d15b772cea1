# SPDX-License-Identifier: Apache-2.0
"""The decoder of kernel manifests: it reads and checks the TOML and makes the kernel specifications.

This module is separate from :mod:`~cuda_progcache.service.kernel_spec`, since a library whose decoded manifest is
cached with its compiled templates doesn't import it.
"""

from __future__ import annotations

import functools
import keyword
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, get_type_hints

import msgspec

from cuda_progcache._util.suggest import did_you_mean
from cuda_progcache.errors import ManifestError, ParameterError
from cuda_progcache.keys.options import ProgramOptions
from cuda_progcache.service.kernel_spec import Constraint, KernelSpec, Launch, Parameter
from cuda_progcache.templates import cuda_filters, names

FORMAT = 1
PARAMETER_TYPES = ("int", "float", "bool", "str", "dtype")
HEADER_ROOTS = ("cuda", "cccl")
CODE_TYPES = ("c++", "nvvm")
RESERVED = ("name", "arch", "target_type")
"""The names of ``CompileService.kernel``'s own arguments."""
TEMPLATE_NAMES = frozenset(
    {*names.GLOBALS, *cuda_filters.GLOBALS, "self", "super", "loop", "caller", "varargs", "kwargs"}
    | {"true", "false", "none", "True", "False", "None"}
)
"""The names that have a meaning in every template; a parameter with such a name would hide it or be hidden."""
OPTIONS = frozenset(one.name for one in fields(ProgramOptions)) - {"name", "arch"}


def decode(content: bytes, file: str) -> dict[str, KernelSpec]:
    """Return the kernels of a manifest.

    Parameters
    ----------
    content : bytes
        The manifest's TOML.
    file : str
        The manifest's path, for messages.

    Raises
    ------
    ManifestError
        If the manifest is invalid; the message names file, kernel and field.
    """
    try:
        table = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ManifestError(f"{file} is not valid TOML: {error}") from error
    if table.get("format") != FORMAT:
        got = f", not format = {table['format']!r}" if "format" in table else ""
        raise ManifestError(f"{file}: the manifest needs the line format = {FORMAT}{got}")
    check_fields(table, ("format", "kernels"), file)
    kernels = table.get("kernels", {})
    if not isinstance(kernels, dict) or not kernels:
        raise ManifestError(f"{file}: no [kernels.NAME] table")
    return {name: decode_kernel(name, entry, f"{file}: kernel {name!r}") for name, entry in kernels.items()}


def decode_kernel(name: str, table: object, where: str) -> KernelSpec:
    """Return the kernel of one ``[kernels.NAME]`` table.

    This checks types, values, ranges, defaults and variants. Constraints are checked when parameters are bound.

    Parameters
    ----------
    name : str
        The kernel's name.
    table : object
        The table as the TOML parser returned it.
    where : str
        The manifest's file and the kernel, the start of each message.

    Raises
    ------
    ManifestError
        If the table is invalid; the message names the field and, if it is misspelled, the nearest valid field.
    """
    if not isinstance(table, dict):
        raise ManifestError(f"{where}: must be a table, not {table!r}")
    table = dict(table)
    check_fields(table, {*_fields(KernelSpec), "template"} - {"name"}, where)
    if ("template" in table) == ("templates" in table):
        raise ManifestError(f'{where}: give either template = "file" or templates = ["file", "file"]')
    if "template" in table:
        table["templates"] = [table.pop("template")]
    if not table.get("entry_points") and not table.get("name_expressions"):
        raise ManifestError(f'{where}: give entry_points (extern "C" symbols) or name_expressions (C++ names)')
    _check_choice(table.get("code_type"), CODE_TYPES, f"{where}, code_type")
    headers = table.get("headers")
    for header in headers if isinstance(headers, list) else ():
        _check_choice(header, HEADER_ROOTS, f"{where}, headers")
    for name_of, kind, label in (("constraints", Constraint, "constraint"), ("launch", Launch, "launch")):
        for number, item in enumerate(_items(table, name_of, list, where), 1):
            if isinstance(item, dict):
                check_fields(item, _fields(kind), f"{where}, {label} {number}")
    check_fields(_items(table, "tolerance", dict, where), ("rtol", "atol"), f"{where}, tolerance")
    _check_options(_items(table, "options", dict, where), f"{where}, options")
    parameters = _items(table, "parameters", dict, where)
    table["parameters"] = {
        key: _decode_parameter(key, value, f"{where}, parameter {key!r}") for key, value in parameters.items()
    }
    spec: KernelSpec = _convert({**table, "name": name}, KernelSpec, where)
    if not spec.templates:
        raise ManifestError(f"{where}, templates: the list is empty")
    entries = len(spec.entry_points) + len(spec.name_expressions)
    if len(spec.launch) not in {0, 1, entries}:
        raise ManifestError(f"{where}, launch: give one launch for all entry points, or one for each of the {entries}")
    required = [p.name for p in spec.parameters.values() if p.default is None]
    variants = []
    for number, variant in enumerate(spec.variants, 1):
        try:
            bound = spec.fill(variant)
        except ParameterError as error:
            message = str(error).removeprefix(f"kernel {name!r}").removeprefix(":").strip()
            raise ManifestError(f"{where}, variant {number}: {message}") from error
        variants.append({key: bound[key] for key in variant})
    if required and not variants:
        raise ManifestError(f"{where}: no default for {', '.join(required)}; list a variant that sets them")
    return replace(spec, variants=tuple(variants))


def _decode_parameter(name: str, table: object, where: str) -> Parameter:
    if name in TEMPLATE_NAMES:
        raise ManifestError(f"{where}: {name!r} has a meaning in every template; choose another name, such as {name}_")
    if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
        raise ManifestError(
            f"{where}: the name must be a Python identifier, not a keyword, and not one of {', '.join(RESERVED)}"
        )
    if not isinstance(table, dict):
        raise ManifestError(f"{where}: must be a table with a type, not {table!r}")
    check_fields(table, _fields(Parameter) - {"name"}, where)
    _check_choice(table.get("type"), PARAMETER_TYPES, f"{where}, type")
    raw: Parameter = _convert({**table, "name": name}, Parameter, where)
    limits = [limit for limit in (raw.min, raw.max) if limit is not None]
    if limits and raw.type not in {"int", "float"}:
        raise ManifestError(f"{where}: min and max are for int and float, not {raw.type}")
    if len(limits) == 2 and limits[0] > limits[1]:
        raise ManifestError(f"{where}: min {raw.min} is above max {raw.max}")
    if raw.values is not None and not raw.values:
        raise ManifestError(f"{where}: values is empty, so no value would be allowed")
    try:
        free = replace(raw, values=None)
        values = None if raw.values is None else tuple(free.check(value) for value in raw.values)
        parameter = replace(raw, values=values)
        default = None if raw.default is None else parameter.check(raw.default)
    except ParameterError as error:
        raise ManifestError(f"{where}: {error}") from error
    return replace(parameter, default=default)


def check_fields(table: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    """Check that the format has all fields of a table.

    Raises
    ------
    ManifestError
        If a field is unknown; the message names the nearest valid field.
    """
    valid = set(valid)
    for field in table:
        if field not in valid:
            raise ManifestError(f"{where}: unknown field {field!r}{did_you_mean(field, valid)}")


def _check_options(options: Mapping[str, Any], where: str) -> None:
    for option, value in options.items():
        if option in {"name", "arch"}:
            raise ManifestError(f"{where}: {option!r} is set when the kernel is compiled, not in the manifest")
        if option not in OPTIONS:
            raise ManifestError(f"{where}: there is no option {option!r}{did_you_mean(option, OPTIONS)}")
        takes = [kind for kind in typing.get_args(_hints(ProgramOptions)[option]) if kind is not type(None)]
        plain = [kind for kind in takes if kind in {bool, int, str}]
        several = isinstance(value, list) and all(isinstance(one, (str, int, list)) for one in value)
        if not any(type(value) is kind or (several and kind not in plain) for kind in takes):
            wanted = " or ".join([f"{'an' if kind is int else 'a'} {kind.__name__}" for kind in plain] or ["an array"])
            raise ManifestError(f"{where}: {option!r} must be {wanted}, not {value!r}")


def _check_choice(value: object, choices: tuple[str, ...], where: str) -> None:
    if isinstance(value, str) and value not in choices:
        raise ManifestError(f"{where}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")


def _items(table: Mapping[str, Any], field: str, kind: type, where: str) -> Any:
    value = table.get(field, kind())
    if not isinstance(value, kind):
        raise ManifestError(f"{where}, {field}: must be {'a table' if kind is dict else 'an array'}, not {value!r}")
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls, localns=vars(typing))


@functools.cache
def _schema(cls: Any) -> Any:
    """Return the fields of a class as a :mod:`msgspec` struct; parameters, already decoded, are left unchecked."""
    hints = dict(_hints(cls))
    if cls is KernelSpec:
        constraint: Any = _schema(Constraint)
        launch: Any = _schema(Launch)
        hints |= {
            "parameters": dict[str, Any],
            "constraints": tuple[constraint, ...],
            "launch": tuple[launch, ...],
        }
    declared: list[Any] = []
    for one in fields(cls):
        if one.default_factory is not MISSING:
            declared.append((one.name, hints[one.name], msgspec.field(default_factory=one.default_factory)))
        elif one.default is not MISSING:
            declared.append((one.name, hints[one.name], one.default))
        else:
            declared.append((one.name, hints[one.name]))
    return msgspec.defstruct(cls.__name__, declared, forbid_unknown_fields=True)


def _fields(cls: Any) -> set[str]:
    return {one.name for one in fields(cls)}


def _convert(table: Mapping[str, Any], to: Any, where: str) -> Any:
    try:
        checked = msgspec.structs.asdict(msgspec.convert(table, _schema(to)))
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise ManifestError(f"{where}{', ' + field if field else ''}: {message[:1].lower()}{message[1:]}") from error
    if to is KernelSpec:
        for name, kind in (("constraints", Constraint), ("launch", Launch)):
            checked[name] = tuple(kind(**msgspec.structs.asdict(one)) for one in checked[name])
    return to(**checked)

# SPDX-License-Identifier: Apache-2.0
"""What a manifest says about one kernel, checked: its parameters, names, options and variants."""

from __future__ import annotations

import keyword
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec

from cuda_progcache._util.suggest import did_you_mean, nearest
from cuda_progcache.errors import ManifestError, ParameterError, TemplateError
from cuda_progcache.templates.dtypes import dtype_name
from cuda_progcache.templates.environment import KernelEnvironment, evaluate, expression_names

PARAMETER_TYPES = ("int", "float", "bool", "str", "dtype")
HEADER_ROOTS = ("cuda", "cccl")
CODE_TYPES = ("c++", "nvvm")
RESERVED = ("name", "arch", "target_type")
"""The names that ``CompileService.kernel`` takes itself."""


class Parameter(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One parameter of a kernel.

    Parameters
    ----------
    name : str
        What templates call it.
    type : {"int", "float", "bool", "str", "dtype"}
        A dtype is a NumPy name such as ``"float16"``.
    values : tuple, optional
        All that is allowed.
    default : optional
        Without it the parameter has to be given.
    min, max : int or float, optional
        The range of a number, both ends allowed.
    description : str
        For people.
    """

    name: str
    type: Literal["int", "float", "bool", "str", "dtype"]
    values: tuple[Any, ...] | None = None
    default: Any = None
    min: int | float | None = None
    max: int | float | None = None
    description: str = ""

    def check(self, value: Any) -> Any:
        """Return `value` as the parameter's type; NumPy scalars become Python's, a dtype its name.

        Raises
        ------
        ParameterError
            If the type is wrong or the value isn't allowed; the message names the nearest one that is.
        """
        value = self._typed(value)
        if self.values is not None and value not in self.values:
            allowed = ", ".join(map(str, self.values))
            near = self._nearest(value)
            raise ParameterError(
                f"{self.name} = {value!r} is not one of {allowed}"
                + (f"; nearest: {near!r}" if near is not None else "")
            )
        # Written so that a NaN is outside of every range.
        if self.min is not None and not value >= self.min:
            raise ParameterError(f"{self.name} = {value!r} is below its minimum; nearest: {self.min!r}")
        if self.max is not None and not value <= self.max:
            raise ParameterError(f"{self.name} = {value!r} is above its maximum; nearest: {self.max!r}")
        return value

    def _nearest(self, value: Any) -> Any:
        if self.values is None:
            return None
        if self.type in {"int", "float"}:
            return min(self.values, key=lambda allowed: abs(allowed - value))
        return nearest(value, self.values) if isinstance(value, str) else None

    def _typed(self, value: Any) -> Any:
        if self.type == "dtype":
            try:
                return dtype_name(value)
            except ParameterError as error:
                near = self._nearest(value)
                hint = f"; nearest of this kernel's: {near!r}" if near is not None else ""
                raise ParameterError(f"{self.name}: {error}{hint}") from None
        plain = value
        if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
            plain = value.item()
        if self.type == "float" and isinstance(plain, int) and not isinstance(plain, bool):
            plain = float(plain)
        expected = {"int": int, "float": float, "bool": bool, "str": str}[self.type]
        if not isinstance(plain, expected) or (self.type == "int" and isinstance(plain, bool)):
            article = "an" if self.type == "int" else "a"
            raise ParameterError(f"{self.name} must be {article} {self.type}, not {value!r} ({type(value).__name__})")
        return plain


class Constraint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A condition over the parameters, and what to say where it doesn't hold.

    Parameters
    ----------
    require : str
        A Jinja2 expression.
    message : str
        For people.
    """

    require: str
    message: str


class KernelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A kernel, as its manifest declares it.

    Parameters
    ----------
    name : str
        The kernel's name in the library.
    templates : tuple of str
        Template files; more than one are modules that are compiled to LTO-IR and linked.
    description : str
        For people.
    code_type : {"c++", "nvvm"}
        What the templates make.
    parameters : dict of str to Parameter
        In the manifest's order.
    entry_points : tuple of str
        ``extern "C"`` symbols; templates over the parameters.
    name_expressions : tuple of str
        C++ names to instantiate and look up, such as ``gemm<float>``; templates over the parameters.
    headers : tuple of str
        Include roots: "cuda", "cccl".
    options : dict
        `ProgramOptions` fields.
    constraints : tuple of Constraint
        Over the parameters.
    variants : tuple of dict
        The parameters that each variant to prewarm sets; ``{}`` is the defaults.
    min_arch : int, optional
        The lowest compute capability, 80 for sm_80.
    reference : str
        NumPy expression, or statements that set ``out``, over the named inputs.
    tolerance : dict
        ``rtol`` and ``atol``, for a comparison with the reference.
    """

    name: str
    templates: tuple[str, ...]
    description: str = ""
    code_type: Literal["c++", "nvvm"] = "c++"
    parameters: dict[str, Parameter] = {}
    entry_points: tuple[str, ...] = ()
    name_expressions: tuple[str, ...] = ()
    headers: tuple[Literal["cuda", "cccl"], ...] = ()
    options: dict[str, Any] = {}
    constraints: tuple[Constraint, ...] = ()
    variants: tuple[dict[str, Any], ...] = ()
    min_arch: int | None = None
    reference: str = ""
    tolerance: dict[str, float] = {}

    def bind(
        self, params: Mapping[str, Any] | None = None, environment: KernelEnvironment | None = None
    ) -> dict[str, Any]:
        """Return all parameters with their values, defaults filled in, in the manifest's order.

        Parameters
        ----------
        params : mapping, optional
            The ones that differ from their defaults.
        environment : KernelEnvironment, optional
            What evaluates the constraints: one with a bytecode cache has them compiled.

        Raises
        ------
        ParameterError
            If one is unknown, missing, of the wrong type or not allowed, or a constraint doesn't hold.
        """
        bound = self.fill(params or {})
        for constraint in self.constraints:
            try:
                holds = evaluate(constraint.require, bound, environment)
                names = None if holds else expression_names(constraint.require)
            except TemplateError as error:
                raise ManifestError(f"kernel {self.name!r}, constraint {constraint.require!r}: {error}") from error
            if names is not None:
                values = ", ".join(f"{name} = {bound[name]!r}" for name in bound if name in names)
                raise ParameterError(
                    f"kernel {self.name!r}: {constraint.message} ({constraint.require} is false for {values})"
                )
        return bound

    def fill(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return as `bind`, but leave the constraints unchecked.

        Raises
        ------
        ParameterError
            As `bind`.
        """
        for name in params:
            if name not in self.parameters:
                hint = did_you_mean(name, self.parameters, listing="it has") or "; it has none"
                raise ParameterError(f"kernel {self.name!r} has no parameter {name!r}{hint}")
        bound = {}
        for name, parameter in self.parameters.items():
            if name not in params:
                if parameter.default is None:
                    raise ParameterError(
                        f"kernel {self.name!r}: parameter {name!r} ({parameter.type}) has no default; give it"
                    )
                bound[name] = parameter.default
                continue
            try:
                bound[name] = parameter.check(params[name])
            except ParameterError as error:
                raise ParameterError(f"kernel {self.name!r}: {error}") from None
        return bound


def decode_kernel(name: str, table: object, where: str) -> KernelSpec:
    """Return the kernel of one ``[kernels.NAME]`` table.

    Types, values, ranges, defaults and variants are checked here; constraints, which need Jinja2, when
    parameters are bound.

    Parameters
    ----------
    name : str
        The kernel's.
    table : object
        As TOML gave it.
    where : str
        The manifest's file and the kernel, the start of each message.

    Raises
    ------
    ManifestError
        With the field and, for a misspelled one, the nearest valid.
    """
    if not isinstance(table, dict):
        raise ManifestError(f"{where}: must be a table, is {table!r}")
    table = dict(table)
    check_fields(table, {*KernelSpec.__struct_fields__, "template"} - {"name"}, where)
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
    for number, constraint in enumerate(_items(table, "constraints", list, where), 1):
        if isinstance(constraint, dict):
            check_fields(constraint, Constraint.__struct_fields__, f"{where}, constraint {number}")
    check_fields(_items(table, "tolerance", dict, where), ("rtol", "atol"), f"{where}, tolerance")
    parameters = _items(table, "parameters", dict, where)
    table["parameters"] = {
        key: _decode_parameter(key, value, f"{where}, parameter {key!r}") for key, value in parameters.items()
    }
    spec: KernelSpec = _convert({**table, "name": name}, KernelSpec, where)
    if not spec.templates:
        raise ManifestError(f"{where}, templates: the list is empty")
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
        raise ManifestError(f"{where}: {', '.join(required)} without default: list a variant that sets them")
    return msgspec.structs.replace(spec, variants=tuple(variants))


def _decode_parameter(name: str, table: object, where: str) -> Parameter:
    if not name.isidentifier() or keyword.iskeyword(name) or name in RESERVED:
        raise ManifestError(
            f"{where}: the name must be a Python identifier, no keyword, and none of {', '.join(RESERVED)}"
        )
    if not isinstance(table, dict):
        raise ManifestError(f"{where}: must be a table with a type, is {table!r}")
    check_fields(table, set(Parameter.__struct_fields__) - {"name"}, where)
    _check_choice(table.get("type"), PARAMETER_TYPES, f"{where}, type")
    raw: Parameter = _convert({**table, "name": name}, Parameter, where)
    limits = [limit for limit in (raw.min, raw.max) if limit is not None]
    if limits and raw.type not in {"int", "float"}:
        raise ManifestError(f"{where}: min and max are for int and float, not {raw.type}")
    if len(limits) == 2 and limits[0] > limits[1]:
        raise ManifestError(f"{where}: min {raw.min} is above max {raw.max}")
    if raw.values is not None and not raw.values:
        raise ManifestError(f"{where}: values is empty, nothing would be allowed")
    try:
        free = msgspec.structs.replace(raw, values=None)
        values = None if raw.values is None else tuple(free.check(value) for value in raw.values)
        parameter = msgspec.structs.replace(raw, values=values)
        default = None if raw.default is None else parameter.check(raw.default)
    except ParameterError as error:
        raise ManifestError(f"{where}: {error}") from error
    return msgspec.structs.replace(parameter, default=default)


def check_fields(table: Mapping[str, Any], valid: Iterable[str], where: str) -> None:
    """Refuse a field that the format doesn't have.

    Raises
    ------
    ManifestError
        With the nearest valid name.
    """
    valid = set(valid)
    for field in table:
        if field not in valid:
            raise ManifestError(f"{where}: unknown field {field!r}{did_you_mean(field, valid)}")


def _check_choice(value: object, choices: tuple[str, ...], where: str) -> None:
    if isinstance(value, str) and value not in choices:
        raise ManifestError(f"{where}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}")


def _items(table: Mapping[str, Any], field: str, kind: type, where: str) -> Any:
    value = table.get(field, kind())
    if not isinstance(value, kind):
        raise ManifestError(f"{where}, {field}: must be {'a table' if kind is dict else 'an array'}, is {value!r}")
    return value


def _convert(table: Mapping[str, Any], to: Any, where: str) -> Any:
    try:
        return msgspec.convert(table, to)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        field = path.rstrip("`").lstrip(".")
        raise ManifestError(f"{where}{', ' + field if field else ''}: {message[:1].lower()}{message[1:]}") from error

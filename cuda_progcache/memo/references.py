# SPDX-License-Identifier: Apache-2.0
"""What code says by itself, whatever its names are bound to: what it does, which names it reads, what it imports."""

from __future__ import annotations

import dis
import importlib.util
import sys
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.modules import hash_parts
from cuda_progcache.memo.syntax import canonical, constants_with, tree_of, walk


class Reference(NamedTuple):
    """A name that code reads from outside, and the attributes it reads of it: ``np.linalg.norm``."""

    name: str
    attributes: tuple[str, ...]


class References(NamedTuple):
    """What a code object says once and for all.

    ``identity`` digests what it does by itself. ``names`` are the globals, built-in names and closure variables that it
    reads, ``attributes`` every name in it that isn't local; ``constants`` is None where the source isn't at hand.
    """

    identity: bytes
    names: tuple[Reference, ...]
    imports: tuple[Import, ...]
    constants: Mapping[tuple[str, ...], frozenset[str] | None] | None
    attributes: frozenset[str]


class Import(NamedTuple):
    """A module that code imports when it runs, and what it takes from it: nothing: the module itself."""

    name: str
    wanted: tuple[str, ...]


_known: dict[int, tuple[types.CodeType, References]] = {}
_MOST = 10_000
#: Names by which code reads docstrings and annotations.
_NOTES = frozenset({"__doc__", "__annotations__", "get_type_hints", "get_annotations", "signature", "getdoc"})


def references_of(function: types.FunctionType) -> References:
    """What a function's code refers to; remembered."""
    code = function.__code__
    before = _known.get(id(code))
    if before is not None:
        return before[1]
    tree = tree_of(function)
    attributes = frozenset(name for inner in walk(code) for name in (*inner.co_names, *inner.co_freevars))
    if tree is not None:
        identity = hash_parts("source", canonical(tree, reads_notes=bool(attributes & _NOTES)))
    else:
        identity = bytecode(code)
    names: set[Reference] = set()
    imports: dict[str, set[str] | None] = {}
    for inner in walk(code):
        _scan(inner, frozenset(code.co_freevars), function.__globals__, names, imports)
    if "__class__" in code.co_freevars:
        names.add(Reference("__class__", ()))  # super() reads it without saying so, before Python 3.12
    found = tuple(Import(name, tuple(sorted(wanted or ()))) for name, wanted in sorted(imports.items()))
    constants = None if tree is None else constants_with(tree)
    made = References(identity, tuple(sorted(names)), found, constants, attributes)
    if len(_known) >= _MOST:
        _known.clear()  # functions made in a loop must not be kept for ever
    _known[id(code)] = (code, made)  # with the code: as long as it lives, no other one gets its id
    return made


_COUNTS = ["co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags"]
_NAMES = ["co_names", "co_varnames", "co_freevars", "co_cellvars"]


def bytecode(code: types.CodeType) -> bytes:
    """Digest of compiled code, for this interpreter's bytecode alone; without name, file and line numbers."""
    parts: list[str | bytes] = ["bytecode", sys.implementation.cache_tag or sys.version, code.co_code]
    parts += [str(getattr(code, name)) for name in _COUNTS]
    parts += ["\0".join(getattr(code, name)) for name in _NAMES]
    parts.append(getattr(code, "co_exceptiontable", b""))
    parts += [bytecode(c) if isinstance(c, types.CodeType) else digest(c) for c in code.co_consts]
    return hash_parts(*parts)


_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_FREE = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}


def _scan(
    code: types.CodeType, free: frozenset[str], namespace: Mapping[str, Any], names: set[Reference],
    imports: dict[str, set[str] | None],
) -> None:  # fmt: skip
    """Collect the outer names of one code object, and its imports: of each what is taken, or None for the module."""
    root: str | None = None
    attributes: list[str] = []
    constants: list[Any] = []  # the last two: an import's level and the names it wants

    def finish() -> None:
        nonlocal root
        if root is not None:
            names.add(Reference(root, tuple(attributes)))
        root = None
        attributes.clear()

    for instruction in dis.get_instructions(code):
        operation, argument = instruction.opname, instruction.argval
        if operation in _ATTRIBUTE and root is not None:
            attributes.append(argument)
            continue
        finish()
        if operation in _GLOBAL or (operation in _FREE and argument in free):
            root = argument
        elif (operation.startswith("LOAD_") and "CONST" in operation) or operation == "LOAD_SMALL_INT":
            constants = [*constants[-1:], argument]
        elif operation == "IMPORT_NAME":
            _note_import(imports, argument, constants, namespace)
    finish()


def _note_import(
    imports: dict[str, set[str] | None], name: str, constants: list[Any], namespace: Mapping[str, Any]
) -> None:
    level, wanted = constants if len(constants) == 2 else (0, None)
    if isinstance(level, int) and level > 0:
        package = str(namespace.get("__package__") or "")
        try:
            name = importlib.util.resolve_name("." * level + name, package)
        except ImportError:
            return  # there is no such package: the import will fail
    taken = set(wanted) if isinstance(wanted, tuple) and "*" not in wanted else None
    before = imports.get(name, set())
    imports[name] = None if taken is None or before is None else before | taken

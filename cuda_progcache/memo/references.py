# SPDX-License-Identifier: Apache-2.0
"""Static analysis of code: a digest of what it does, the names that it reads, and the modules that it imports."""

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
    """An outer name that code reads, and the attributes that it reads from the object: ``np.linalg.norm``."""

    name: str
    attributes: tuple[str, ...]


class References(NamedTuple):
    """The facts about a code object that don't depend on what its names are bound to.

    ``identity`` is a digest of the code itself. ``names`` are the globals, built-ins and closure variables that it
    reads; ``attributes`` are all its names that aren't local. ``constants`` are those of
    :func:`~cuda_progcache.memo.syntax.constants_with`, or None if the source isn't available.
    """

    identity: bytes
    names: tuple[Reference, ...]
    imports: tuple[Import, ...]
    constants: Mapping[tuple[str, ...], frozenset[str] | None] | None
    attributes: frozenset[str]


class Import(NamedTuple):
    """A module that code imports when it runs, and the names that it imports from it; empty for the module itself."""

    name: str
    wanted: tuple[str, ...]


_known: dict[int, tuple[types.CodeType, References]] = {}
_MOST = 10_000
#: Names through which code reads docstrings and annotations.
_NOTES = frozenset({"__doc__", "__annotations__", "get_type_hints", "get_annotations", "signature", "getdoc"})


def references_of(function: types.FunctionType) -> References:
    """Return what a function's code refers to; cached per code object."""
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
        names.add(Reference("__class__", ()))  # super() reads it implicitly before Python 3.12
    found = tuple(Import(name, tuple(sorted(wanted or ()))) for name, wanted in sorted(imports.items()))
    constants = None if tree is None else constants_with(tree)
    made = References(identity, tuple(sorted(names)), found, constants, attributes)
    if len(_known) >= _MOST:
        _known.clear()  # functions made in a loop must not be kept forever
    _known[id(code)] = (code, made)  # keeps the code alive, so that its id isn't reused
    return made


_COUNTS = ["co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags"]
_NAMES = ["co_names", "co_varnames", "co_freevars", "co_cellvars"]


def bytecode(code: types.CodeType) -> bytes:
    """Digest compiled code, without name, file and line numbers; the digest is valid for this interpreter only."""
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
    """Collect a code object's outer names and its imports: the names imported from a module, or None for the module."""
    root: str | None = None
    attributes: list[str] = []
    constants: list[Any] = []  # the last two loaded: an import's level and the names that it imports

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
            return  # there is no such package, so the import will fail
    taken = set(wanted) if isinstance(wanted, tuple) and "*" not in wanted else None
    before = imports.get(name, set())
    imports[name] = None if taken is None or before is None else before | taken

# SPDX-License-Identifier: Apache-2.0
"""What code says by itself, whatever its names are bound to: what it does, which names it reads, what it imports."""

from __future__ import annotations

import dis
import importlib.util
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.modules import _hash
from cuda_progcache.memo.syntax import CHANGERS, canonical, changed_names, tree_of, walk


class Reference(NamedTuple):
    """A name that code reads from outside, and the attributes it reads of it: ``np.linalg.norm``."""

    name: str
    attributes: tuple[str, ...]


class References(NamedTuple):
    """What a code object says once and for all.

    Attributes
    ----------
    identity : bytes
        Digest of what it does by itself.
    names : tuple of Reference
        Globals, built-in names and closure variables that it reads and doesn't change itself, sorted.
    imports : tuple of str
        Modules imported inside, absolute, sorted.
    """

    identity: bytes
    names: tuple[Reference, ...]
    imports: tuple[str, ...]


_known: dict[int, tuple[types.CodeType, References]] = {}
_MOST = 10_000


def references_of(function: types.FunctionType) -> References:
    """What a function's code refers to; remembered."""
    code = function.__code__
    before = _known.get(id(code))
    if before is not None:
        return before[1]
    tree = tree_of(function)
    identity = _hash("source", canonical(tree)) if tree is not None else _bytecode(code)
    names: set[Reference] = set()
    changed: set[tuple[str, ...]] = set()
    imports: set[str] = set()
    for inner in walk(code):
        _scan(inner, frozenset(code.co_freevars), function.__globals__, names, changed, imports)
    if tree is not None:
        changed = changed_names(tree)
    if "__class__" in code.co_freevars:
        names.add(Reference("__class__", ()))  # super() reads it without saying so, before Python 3.12
    read = [name for name in names if not any((name.name, *name.attributes)[: len(own)] == own for own in changed)]
    made = References(identity, tuple(sorted(read)), tuple(sorted(imports)))
    if len(_known) >= _MOST:
        _known.clear()  # functions made in a loop must not be kept for ever
    _known[id(code)] = (code, made)  # with the code: as long as it lives, no other one gets its id
    return made


_COUNTS = ["co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_flags"]
_NAMES = ["co_names", "co_varnames", "co_freevars", "co_cellvars"]


def _bytecode(code: types.CodeType) -> bytes:
    """Digest of compiled code, for this interpreter's bytecode alone; without name, file and line numbers."""
    parts: list[str | bytes] = ["bytecode", sys.implementation.cache_tag or sys.version, code.co_code]
    parts += [str(getattr(code, name)) for name in _COUNTS]
    parts += ["\0".join(getattr(code, name)) for name in _NAMES]
    parts.append(getattr(code, "co_exceptiontable", b""))
    parts += [_bytecode(c) if isinstance(c, types.CodeType) else digest(c) for c in code.co_consts]
    return _hash(*parts)


_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_FREE = {"LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}


_BINDING = {"STORE_GLOBAL", "DELETE_GLOBAL", "STORE_DEREF", "DELETE_DEREF"}


def _scan(
    code: types.CodeType, free: frozenset[str], namespace: Mapping[str, Any], names: set[Reference],
    changed: set[tuple[str, ...]], imports: set[str],
) -> None:  # fmt: skip
    """Collect the outer names of one code object, those it changes as far as bytecode shows it, and its imports."""
    root: str | None = None
    attributes: list[str] = []
    constants: list[Any] = []  # the last two: an import's level and the names it wants

    def finish() -> None:
        nonlocal root
        if root is not None:
            names.add(Reference(root, tuple(attributes)))
            if attributes and attributes[-1] in CHANGERS:
                changed.add((root, *attributes[:-1]))
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
        elif operation in _BINDING:
            changed.add((argument,))
        elif (operation.startswith("LOAD_") and "CONST" in operation) or operation == "LOAD_SMALL_INT":
            constants = [*constants[-1:], argument]
        elif operation == "IMPORT_NAME":
            imports.update(_imported(argument, constants, namespace))
    finish()


def _imported(name: str, constants: list[Any], namespace: Mapping[str, Any]) -> Iterable[str]:
    level, wanted = constants if len(constants) == 2 else (0, None)
    if isinstance(level, int) and level > 0:
        package = str(namespace.get("__package__") or "")
        try:
            name = importlib.util.resolve_name("." * level + name, package)
        except ImportError:
            return  # there is no such package: the import will fail
    yield name
    for part in wanted if isinstance(wanted, tuple) else ():
        if f"{name}.{part}" in sys.modules:
            yield f"{name}.{part}"

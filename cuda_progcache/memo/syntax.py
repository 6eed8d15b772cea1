# SPDX-License-Identifier: Apache-2.0
"""The syntax tree of a function, found through its code, and a text of it that is the same in every interpreter.

Bytecode defines exactly what a function does, but differs between interpreters.
Source doesn't differ, but the file on disk may not be the one that was loaded.
So the source counts only if compiling it gives a code object equal to the
function's. Otherwise (code that was typed in, made by ``exec``, edited since, or
rewritten by a tool) there is no tree, and the bytecode counts.
"""

from __future__ import annotations

import ast
import dis
import inspect
import linecache
import types
from collections.abc import Iterator
from typing import Any

from cuda_progcache._util.syntax_tree import parse

_FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda

#: By file name: the source text, its functions by first line, and its code objects by first line.
_modules: dict[str, tuple[str, dict[int, list[_FunctionNode]], dict[int, list[types.CodeType]]]] = {}
#: The most modules whose trees are kept.
_KEPT = 64


def tree_of(function: types.FunctionType, *, exact: bool = True) -> _FunctionNode | None:
    """Return the syntax tree of a function; None if the source isn't available or isn't what was compiled.

    If not ``exact``, the function at the same line of the source is returned without proof that it is the same one;
    that is good enough for hints.
    """
    code = function.__code__
    module = _module(code.co_filename, function.__globals__)
    if module is None:
        return None
    _, nodes, codes = module
    if exact and not any(code == other for other in codes.get(code.co_firstlineno, ())):
        return None
    candidates = [node for node in nodes.get(code.co_firstlineno, ()) if _name(node) == code.co_name]
    return candidates[0] if len(candidates) == 1 else _enclosing(candidates, code)


def _module(
    filename: str, namespace: dict[str, Any]
) -> tuple[str, dict[int, list[_FunctionNode]], dict[int, list[types.CodeType]]] | None:
    lines = linecache.getlines(filename, namespace)
    if not lines:
        return None
    text = "".join(lines)
    known = _modules.get(filename)
    if known is not None and known[0] == text:
        return known
    try:
        tree = parse(text)
        compiled = compile(text, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError):
        return None
    nodes: dict[int, list[_FunctionNode]] = {}
    for node in ast.walk(tree):
        if isinstance(node, _FunctionNode):
            decorators = getattr(node, "decorator_list", None)
            nodes.setdefault(decorators[0].lineno if decorators else node.lineno, []).append(node)
    codes: dict[int, list[types.CodeType]] = {}
    for code in walk(compiled):
        codes.setdefault(code.co_firstlineno, []).append(code)
    if len(_modules) >= _KEPT:
        _modules.clear()
    _modules[filename] = (text, nodes, codes)
    return _modules[filename]


def walk(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yield a code object and all code objects nested in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from walk(constant)


def _name(node: _FunctionNode) -> str:
    return "<lambda>" if isinstance(node, ast.Lambda) else node.name


def _enclosing(candidates: list[_FunctionNode], code: types.CodeType) -> _FunctionNode | None:
    """Return the innermost of several functions on a line that encloses all of the code's positions."""
    spots = [
        (line, column)
        for line, _, column, _ in code.co_positions()
        if line is not None and column is not None and (line, column) != (code.co_firstlineno, 0)
    ]
    if not spots:
        return None  # compiled without columns (-X no_debug_ranges)
    around = []
    for node in candidates:
        body = node.body if isinstance(node, ast.Lambda) else node
        end = (body.end_lineno or 0, body.end_col_offset or 0)
        if all((body.lineno, body.col_offset) <= spot <= end for spot in spots):
            around.append((node, (end[0] - body.lineno, end[1] - body.col_offset)))
    return min(around, key=lambda found: found[1])[0] if around else None


def canonical(function: _FunctionNode, *, reads_notes: bool = False) -> str:
    """Return a function's signature and body as text that is the same in every Python, without comments and layout.

    The name and the decorators are left out, since they aren't what the function does. Docstrings and annotations are
    left out too, unless ``reads_notes`` says that the code reads them.
    """
    parts: list[str] = [type(function).__name__]
    for name, value in ast.iter_fields(function):
        if name not in {"name", "decorator_list", "type_comment", "type_params", "returns"} or (
            reads_notes and name == "returns"
        ):
            parts.append(name)
            _write(_without_docstring(value) if name == "body" and not reads_notes else value, parts, notes=reads_notes)
    return " ".join(parts)


def written(node: ast.AST) -> str:
    """Return any tree as text, in the form of :func:`canonical` without docstrings and annotations."""
    parts: list[str] = []
    _write(node, parts, notes=False)
    return " ".join(parts)


def _without_docstring(body: Any) -> Any:
    if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
        first = body[0].value
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            return body[1:] or [ast.Pass()]
    return body


def constants_with(function: _FunctionNode) -> dict[tuple[str, ...], frozenset[str] | None]:
    """Return the constants that code uses a name with, as in ``environ["A"]``, ``getenv("A")`` and ``"A" in environ``.

    They are keyed by name and attributes (``("os", "environ")``). The value is None for a name that is also used in
    other ways.
    """
    found: dict[tuple[str, ...], frozenset[str] | None] = {}
    for node in ast.walk(function):
        for chain, text in _constant_uses(node):
            before = found.get(chain, frozenset())
            found[chain] = None if text is None or before is None else before | {text}
    return found


def _constant_uses(node: ast.AST) -> Iterator[tuple[tuple[str, ...], str | None]]:
    """Yield the names directly in a node, each with the constant text that it is used with, or None."""
    told: tuple[ast.AST | None, ast.AST | None] = (None, None)
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        told = (node.value, node.slice)
    elif isinstance(node, ast.Call) and node.args:
        told = (node.func, node.args[0])
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.In | ast.NotIn):
        told = (node.comparators[0], node.left)
    owner, key = told
    text = key.value if isinstance(key, ast.Constant) and isinstance(key.value, str) else None
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.Attribute) and _dotted(node):
            continue  # the node above this chain yields the whole chain
        chain = _dotted(child)
        if chain:
            yield chain, text if child is owner else None


def _dotted(node: ast.AST) -> tuple[str, ...]:
    """Return ``("a", "b")`` for ``a.b``; an empty tuple for any other node."""
    path: list[str] = []
    while isinstance(node, ast.Attribute):
        path.append(node.attr)
        node = node.value
    return (node.id, *reversed(path)) if isinstance(node, ast.Name) else ()


#: Fields that don't affect what code does, or that some versions don't have.
_SILENT = {"ctx", "kind", "type_comment", "type_ignores"}


def _write(value: object, parts: list[str], *, notes: bool) -> None:
    if isinstance(value, ast.Constant):
        parts.append(f"({type(value.value).__name__} {_constant(value.value)})")
    elif isinstance(value, ast.AST):
        parts.append(f"({type(value).__name__}")
        inner = isinstance(value, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for name, child in ast.iter_fields(value):
            # Absent and empty are written the same: a field that a later version adds is empty in today's code.
            if name in _SILENT or child is None or child == []:
                continue
            if not notes and (name == "returns" or (name == "annotation" and isinstance(value, ast.arg))):
                continue
            parts.append(name)
            body = name == "body" and not notes and (inner or isinstance(value, ast.Module))
            _write(_without_docstring(child) if body else child, parts, notes=notes)
        parts.append(")")
    elif isinstance(value, list):
        parts.append("[")
        for child in value:
            _write(child, parts, notes=notes)
        parts.append("]")
    else:
        parts.append(repr(value))


def _constant(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)  # repr refuses ints of more than 4,300 digits
    return repr(value)


#: Functions that read the file or directory named by their first argument.
_READERS = frozenset(["listdir", "scandir", "walk", "glob", "iglob", "loadtxt", "genfromtxt", "imread"])


def find_path_specs(function: Any) -> dict[str, list[str]]:
    """Find the paths that a function's source reads: ``os.listdir("data")``, ``open(CONFIG)``, ``pd.read_csv(TABLE)``.

    The result is a hint; a call through another name isn't recognized.

    Parameters
    ----------
    function : callable

    Returns
    -------
    dict
        ``literals``: string constants that are the first argument of such a call; ``symbols``: names that are.
    """
    found: dict[str, list[str]] = {"literals": [], "symbols": []}
    plain = inspect.unwrap(function)
    plain = getattr(plain, "__func__", plain)
    if not isinstance(plain, types.FunctionType):
        return found
    tree = tree_of(plain, exact=False)
    if tree is None:
        found["literals"] = sorted(_constant_paths(plain.__code__))
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and _reads(node):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                found["literals"].append(argument.value)
            elif isinstance(argument, ast.Name):
                found["symbols"].append(argument.id)
    return {kind: sorted(set(names)) for kind, names in found.items()}


def _constant_paths(compiled: types.CodeType) -> set[str]:
    """Return the string constants that code without source passes first to functions that read files or directories."""
    paths: set[str] = set()
    for code in walk(compiled):
        reader = False
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname == "PUSH_NULL":
                continue
            if reader and instruction.opname == "LOAD_CONST" and isinstance(name, str):
                paths.add(name)
            named = instruction.opname.startswith("LOAD_") and instruction.opname != "LOAD_CONST"
            reader = named and isinstance(name, str) and (name in _READERS or name.startswith("read_"))
    return paths


def _reads(call: ast.Call) -> bool:
    target = call.func
    name = target.attr if isinstance(target, ast.Attribute) else target.id if isinstance(target, ast.Name) else ""
    if name == "open":
        mode = call.args[1] if len(call.args) > 1 else next((k.value for k in call.keywords if k.arg == "mode"), None)
        if mode is None:
            return True
        return isinstance(mode, ast.Constant) and isinstance(mode.value, str) and not set(mode.value) & set("wax+")
    return name in _READERS or name.startswith("read_")

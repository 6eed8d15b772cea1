# SPDX-License-Identifier: Apache-2.0
"""Patterns of Python code with placeholders; a pattern is parsed once and filled in each time it is emitted.

A pattern is Python text. ``$name`` is a hole for an expression, for an identifier (given as text), or, on its own line,
for statements; a list fills a hole with any number of these. A quoted ``'$name'`` is a hole for a constant. A hole that
isn't filled loads the name from the runtime's tables; ``$ctx`` is the context of the render.

Patterns are written for async environments; for other environments, ``async`` and ``await`` are dropped.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import cache
from textwrap import dedent
from typing import Any, TypeVar

from cuda_progcache._util.syntax_tree import parse

N = TypeVar("N", bound=ast.AST)
Maker = Callable[[Any, Mapping[str, Any]], Any]
"""A function that makes nodes at the line of a builder; the mapping has the values of holes, by name."""

_HOLE = "hole_"  # replaces $ in the text for Python's parser
_PLAIN: dict[type[ast.AST], type[ast.AST]] = {ast.AsyncFunctionDef: ast.FunctionDef, ast.AsyncFor: ast.For}
_SAME = {"ctx": ast.Load(), "col_offset": 0, "kind": None, "type_comment": None, "format_spec": None}
_quick: dict[type[ast.AST], Any] = {}


def quick(kind: type[N]) -> type[N]:
    """Return a subclass of a node type whose instances are quick to make.

    Calling ``ast.Name(id=..., ctx=..., lineno=...)`` takes twice as long as making the bare object and setting its
    attributes, and a template has thousands of nodes. Fields that have the same value in nearly all nodes of a type are
    attributes of the class, where ``compile()`` and ``ast.unparse`` find them. The class has the same name as the node
    type, because ``ast.NodeVisitor`` uses the name.
    """
    made: type[N] | None = _quick.get(kind)
    if made is None:
        same = {name: value for name, value in _SAME.items() if name in {*kind._fields, *kind._attributes}}
        made = _quick[kind] = type(kind.__name__, (kind,), {"__doc__": f"`ast.{kind.__name__}`.", **same})
    return made


@cache
def statements(text: str) -> Maker:
    """Return the maker of a pattern of statements."""
    return _several(parse(dedent(text).replace("$", _HOLE)).body)


@cache
def expression(text: str) -> Maker:
    """Return the maker of a pattern that is an expression."""
    return _maker(parse(text.replace("$", _HOLE), mode="eval").body)


def _several(nodes: list[Any], *, body: bool = False) -> Maker:
    """Return the maker of a list of nodes; an empty body becomes ``pass``."""
    makers = [_maker(node) for node in nodes]

    def make(builder: Any, parts: Mapping[str, Any]) -> list[Any]:
        made: list[Any] = []
        for maker in makers:
            one = maker(builder, parts)
            if type(one) is list:
                made += one
            else:
                made.append(one)
        return builder.lines("pass") if body and not made else made

    return make


def _maker(node: Any) -> Maker:
    kind = type(node)
    if kind is ast.Expr and _is_hole(node.value, "id"):
        return _statements(node.value.id.removeprefix(_HOLE), _maker(node.value))
    if kind is ast.Name and type(node.ctx) is ast.Load:
        return _name(node.id.removeprefix(_HOLE), "load") if _is_hole(node, "id") else _loaded(node.id)
    if kind is ast.Name and _is_hole(node, "id"):
        return _name(node.id.removeprefix(_HOLE), "store")
    if kind is ast.arg and _is_hole(node, "arg"):
        return _name(node.arg.removeprefix(_HOLE), "argument")
    if kind is ast.Constant and _is_hole(node, "value"):
        return _constant(node.value.removeprefix(_HOLE))
    same: dict[str, Any] = {}
    inner: list[tuple[str, Maker]] = []
    for field in node._fields:
        value: Any = getattr(node, field, None)
        if isinstance(value, list) and any(_is_made(item) for item in value):
            inner.append((field, _several(value, body=field == "body")))
        elif isinstance(value, ast.AST) and _is_made(value):
            inner.append((field, _maker(value)))
        elif _is_hole(node, field):
            inner.append((field, _text(value.removeprefix(_HOLE))))
        elif type(value) is not ast.Load and value != _SAME.get(field, _HOLE):
            same[field] = value
    return _node(kind, same, inner)


def _is_made(node: ast.AST) -> bool:
    """Whether a new node is made on each use; operators are shared."""
    return bool(node._fields or node._attributes)


def _is_hole(node: Any, field: str) -> bool:
    value = getattr(node, field, None)
    return isinstance(value, str) and value.startswith(_HOLE)


def _node(kind: type[ast.AST], same: dict[str, Any], inner: list[tuple[str, Maker]]) -> Maker:
    """Return the maker of a node; `same` has the fixed fields, and `inner` the makers of the other fields."""

    def make(builder: Any, parts: Mapping[str, Any]) -> Any:
        made: Any = new(of_kind)
        fields = made.__dict__
        fields["lineno"] = builder.line
        fields.update(same)
        for field, maker in inner:
            fields[field] = maker(builder, parts)
        return made

    of_kind = quick(kind)
    new = of_kind.__new__
    if kind is ast.Await:
        ((_, value),) = inner
        return lambda builder, parts: (make if builder.asynchronous else value)(builder, parts)
    if kind in _PLAIN:
        plain = _node(_PLAIN[kind], same, inner)
        return lambda builder, parts: (make if builder.asynchronous else plain)(builder, parts)
    return make


def _loaded(name: str) -> Maker:
    return lambda builder, _parts: builder.load(name)


def _text(name: str) -> Maker:
    return lambda _builder, parts: parts[name]


def _constant(name: str) -> Maker:
    return lambda builder, parts: builder.constant(parts[name])


def _statements(name: str, value: Maker) -> Maker:
    def make(builder: Any, parts: Mapping[str, Any]) -> Any:
        part = parts[name]
        if type(part) is list:
            return part
        return builder.statement(value(builder, parts))

    return make


def _name(name: str, how: str) -> Maker:
    """Return the maker of a hole; text in the hole is a name, and the builder's method `how` makes its node."""

    def make(builder: Any, parts: Mapping[str, Any]) -> Any:
        if name not in parts:
            return getattr(builder, how)(builder.context) if name == "ctx" else builder.runtime(name)
        part = parts[name]
        if type(part) is str:
            return getattr(builder, how)(part)
        if type(part) is list:
            return [getattr(builder, how)(item) if type(item) is str else item for item in part]
        return part

    return make

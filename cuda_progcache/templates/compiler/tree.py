# SPDX-License-Identifier: Apache-2.0
"""Python syntax tree nodes, made quickly.

Calling ``ast.Name(id=..., ctx=..., lineno=...)`` costs twice what making the bare object and storing its attributes
does, and a template is thousands of nodes. What is the same for all nodes of a type (the column, a name's context) is
an attribute of the class: ``compile()`` and ``ast.unparse`` read attributes and don't ask where they live. The classes
bear the names of those they derive from, since ``ast.NodeVisitor`` goes by the name.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, TypeVar

from cuda_progcache.templates.runtime import JINJA2_NAMES, NAMES

N = TypeVar("N", bound=ast.AST)

_LOAD, _STORE = ast.Load(), ast.Store()
_NONE: list[Any] = []  # shared by all nodes that have no such children; nobody adds to it

STR = 115
"""The conversion ``!s`` of a formatted value; `PLAIN` is none."""
PLAIN = -1

BINARY: dict[str, ast.operator] = {
    "+": ast.Add(),
    "-": ast.Sub(),
    "*": ast.Mult(),
    "/": ast.Div(),
    "//": ast.FloorDiv(),
    "%": ast.Mod(),
    "**": ast.Pow(),
}
UNARY: dict[str, ast.unaryop] = {"not": ast.Not(), "-": ast.USub(), "+": ast.UAdd()}
COMPARE: dict[str, ast.cmpop] = {
    "eq": ast.Eq(),
    "ne": ast.NotEq(),
    "gt": ast.Gt(),
    "gteq": ast.GtE(),
    "lt": ast.Lt(),
    "lteq": ast.LtE(),
    "in": ast.In(),
    "notin": ast.NotIn(),
}
IS, IS_NOT, EQ, GE, IN = ast.Is(), ast.IsNot(), ast.Eq(), ast.GtE(), ast.In()
AND = ast.And()


def _quick(base: type[N], /, **same: Any) -> type[N]:
    """Return a class of nodes that have some attributes by their class."""
    made: type[N] = type(base.__name__, (base,), {"__doc__": f"`ast.{base.__name__}`.", "col_offset": 0, **same})
    return made


_Name = _quick(ast.Name, ctx=_LOAD)
_Stored = _quick(ast.Name, ctx=_STORE)
_Constant = _quick(ast.Constant, kind=None)
_Attribute = _quick(ast.Attribute, ctx=_LOAD)
_Subscript = _quick(ast.Subscript, ctx=_LOAD)
_Call = _quick(ast.Call)
_Expr = _quick(ast.Expr)
_Assign = _quick(ast.Assign, type_comment=None)
_IfExp = _quick(ast.IfExp)
_Compare = _quick(ast.Compare)
_BoolOp = _quick(ast.BoolOp)
_JoinedStr = _quick(ast.JoinedStr)
_FormattedValue = _quick(ast.FormattedValue, format_spec=None)
_If = _quick(ast.If)

_arguments = ast.arguments


class Builder:
    """Makes nodes at the current template line.

    Attributes
    ----------
    line : int
        What ``lineno`` of the nodes made from now on is.
    uses : set of str
        The runtime's names that were emitted.
    """

    line = 1
    uses: set[str]

    def made(self, kind: type[N], /, **fields: Any) -> N:
        """A node of one of the quick classes."""
        node = kind.__new__(kind)
        fields["lineno"] = self.line
        node.__dict__ = fields
        return node

    def runtime(self, name: str) -> ast.expr:
        """A name of the runtime's tables; what isn't in one can't be emitted."""
        if name not in NAMES and name not in JINJA2_NAMES:
            raise KeyError(f"the runtime has no {name!r}")
        self.uses.add(name)
        return self.load(name)

    def call_runtime(self, name: str, *args: ast.expr) -> ast.expr:
        """A call of a function of the runtime."""
        return self.call(self.runtime(name), list(args))

    def load(self, name: str) -> ast.expr:
        """A name's value."""
        return self.made(_Name, id=name)

    def store(self, name: str) -> ast.Name:
        """A name that is assigned to."""
        return self.made(_Stored, id=name)

    def constant(self, value: Any) -> ast.expr:
        """A constant."""
        return self.made(_Constant, value=value)

    def attribute(self, value: ast.expr, attr: str) -> ast.expr:
        """``value.attr``."""
        return self.made(_Attribute, value=value, attr=attr)

    def dotted(self, name: str, *attrs: str) -> ast.expr:
        """``name.attr.attr``."""
        node = self.load(name)
        for attr in attrs:
            node = self.attribute(node, attr)
        return node

    def subscript(self, value: ast.expr, index: ast.expr) -> ast.expr:
        """``value[index]``."""
        return self.made(_Subscript, value=value, slice=index)

    def subscript_store(self, value: ast.expr, key: str) -> ast.expr:
        """``value["key"]``, assigned to."""
        return ast.Subscript(value, self.constant(key), _STORE, lineno=self.line, col_offset=0)

    def call(self, function: ast.expr, args: list[ast.expr], keywords: list[ast.keyword] | None = None) -> ast.expr:
        """A call."""
        return self.made(_Call, func=function, args=args, keywords=keywords or _NONE)

    def call_name(self, name: str, *args: ast.expr) -> ast.expr:
        """A call of a name with positional arguments."""
        return self.call(self.load(name), list(args))

    def keyword(self, name: str | None, value: ast.expr) -> ast.keyword:
        """A keyword argument; with None ``**value``."""
        return ast.keyword(name, value, lineno=self.line, col_offset=0)

    def starred(self, value: ast.expr) -> ast.expr:
        """``*value``."""
        return ast.Starred(value, _LOAD, lineno=self.line, col_offset=0)

    def statement(self, value: ast.expr) -> ast.stmt:
        """An expression as a statement."""
        return self.made(_Expr, value=value)

    def assign(self, targets: str | ast.expr | list[ast.expr], value: ast.expr) -> ast.stmt:
        """An assignment to a name, a target, or several targets."""
        if isinstance(targets, str):
            targets = self.store(targets)
        return self.made(_Assign, targets=targets if isinstance(targets, list) else [targets], value=value)

    def choose(self, test: ast.expr, body: ast.expr, orelse: ast.expr) -> ast.expr:
        """``body if test else orelse``."""
        return self.made(_IfExp, test=test, body=body, orelse=orelse)

    def compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> ast.expr:
        """``left op right``."""
        return self.made(_Compare, left=left, ops=[op], comparators=[right])

    def both(self, *values: ast.expr) -> ast.expr:
        """``a and b``."""
        return self.made(_BoolOp, op=AND, values=list(values))

    def negate(self, value: ast.expr) -> ast.expr:
        """``not value``."""
        return ast.UnaryOp(UNARY["not"], value, lineno=self.line, col_offset=0)

    def when(self, test: ast.expr, body: list[ast.stmt], orelse: list[ast.stmt] | None = None) -> ast.stmt:
        """An ``if``; an empty body is ``pass``."""
        body = body or [ast.Pass(lineno=self.line, col_offset=0)]
        return self.made(_If, test=test, body=body, orelse=orelse or _NONE)

    def tuple_of(self, items: Sequence[ast.expr], *, stored: bool = False) -> ast.expr:
        """A tuple."""
        return ast.Tuple(list(items), _STORE if stored else _LOAD, lineno=self.line, col_offset=0)

    def dict_of(self, items: Sequence[tuple[str, ast.expr]]) -> ast.expr:
        """A dict with constant keys."""
        keys: list[ast.expr | None] = [self.constant(key) for key, _ in items]
        return ast.Dict(keys, [value for _, value in items], lineno=self.line, col_offset=0)

    def formatted(self, value: ast.expr, conversion: int) -> ast.expr:
        """A part of an f-string."""
        return self.made(_FormattedValue, value=value, conversion=conversion)

    def joined(self, values: list[ast.expr]) -> ast.expr:
        """An f-string."""
        return self.made(_JoinedStr, values=values)

    def returns(self, value: ast.expr) -> ast.stmt:
        """``return value``."""
        return ast.Return(value, lineno=self.line, col_offset=0)

    def raises(self, value: ast.expr) -> ast.stmt:
        """``raise value``."""
        return ast.Raise(value, None, lineno=self.line, col_offset=0)

    def yields(self, value: ast.expr) -> ast.stmt:
        """``yield value``."""
        return self.statement(ast.Yield(value, lineno=self.line, col_offset=0))

    def awaits(self, value: ast.expr) -> ast.expr:
        """``await value``."""
        return ast.Await(value, lineno=self.line, col_offset=0)

    def function_def(
        self,
        name: str,
        parameters: Sequence[str],
        body: list[ast.stmt],
        *,
        defaults: Sequence[ast.expr] = (),
        asynchronous: bool = False,
    ) -> ast.stmt:
        """A function with plain parameters."""
        arguments = _arguments(
            posonlyargs=[],
            args=[ast.arg(parameter, None, lineno=self.line, col_offset=0) for parameter in parameters],
            vararg=None,
            kwonlyargs=[],
            kw_defaults=[],
            kwarg=None,
            defaults=list(defaults),
        )
        made = ast.AsyncFunctionDef if asynchronous else ast.FunctionDef
        node = made(
            name,
            arguments,
            body or [ast.Pass(lineno=self.line, col_offset=0)],
            [],
            None,
            lineno=self.line,
            col_offset=0,
        )
        node.__dict__["type_params"] = []  # required from Python 3.12 on
        return node

    def for_loop(
        self, target: ast.expr, iterable: ast.expr, body: list[ast.stmt], *, asynchronous: bool = False
    ) -> ast.stmt:
        """A ``for``."""
        made = ast.AsyncFor if asynchronous else ast.For
        return made(target, iterable, body, [], lineno=self.line, col_offset=0)

    def guarded(
        self,
        body: list[ast.stmt],
        *,
        ignored: ast.expr | None = None,
        orelse: list[ast.stmt] | None = None,
        final: list[ast.stmt] | None = None,
    ) -> ast.stmt:
        """A ``try`` that ignores an exception, or has something to do in the end."""
        handlers = []
        if ignored is not None:
            nothing: list[ast.stmt] = [ast.Pass(lineno=self.line, col_offset=0)]
            handlers.append(ast.ExceptHandler(ignored, None, nothing, lineno=self.line, col_offset=0))
        return ast.Try(body, handlers, orelse or [], final or [], lineno=self.line, col_offset=0)

# SPDX-License-Identifier: Apache-2.0
"""Python syntax tree nodes, made at the line of the template that they are of."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from cuda_progcache.templates.compiler.patterns import N, expression, quick, statements
from cuda_progcache.templates.runtime import JINJA2_NAMES, NAMES

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
BOOLEAN: dict[str, ast.boolop] = {"and": ast.And(), "or": ast.Or()}
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


_Name = quick(ast.Name)
_Constant = quick(ast.Constant)
_Attribute = quick(ast.Attribute)
_Call = quick(ast.Call)
_Expr = quick(ast.Expr)
_JoinedStr = quick(ast.JoinedStr)
_FormattedValue = quick(ast.FormattedValue)
_STORE = ast.Store()


class Builder:
    """Makes nodes at the current template line.

    Attributes
    ----------
    line : int
        What ``lineno`` of the nodes made from now on is.
    names : dict
        Names and lines to the nodes that load them: one node may stand in many places.
    uses : set of str
        The runtime's names that were emitted.
    context : str
        The name of the render's context.
    asynchronous : bool
        Whether the functions are coroutine functions, and every value may be an awaitable.
    """

    line = 1
    names: dict[tuple[str, int], ast.expr]
    uses: set[str]
    context: str
    asynchronous: bool

    def code(self, text: str, /, **parts: Any) -> ast.expr:
        """Return the expression of a pattern; see `cuda_progcache.templates.compiler.patterns`."""
        made: ast.expr = expression(text)(self, parts)
        return made

    def lines(self, text: str, /, **parts: Any) -> list[ast.stmt]:
        """Return the statements of a pattern."""
        made: list[ast.stmt] = statements(text)(self, parts)
        return made

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
        made = self.names.get((name, self.line))
        if made is None:
            made = self.names[name, self.line] = self.made(_Name, id=name)
        return made

    def argument(self, name: str) -> ast.arg:
        """A parameter of a function."""
        return ast.arg(name, None, lineno=self.line, col_offset=0)

    def store(self, name: str) -> ast.expr:
        """A name that is assigned to."""
        return self.made(_Name, id=name, ctx=_STORE)

    def constant(self, value: Any) -> ast.expr:
        """A constant."""
        return self.made(_Constant, value=value)

    def call(self, function: ast.expr, args: list[ast.expr], keywords: list[ast.keyword] | None = None) -> ast.expr:
        """A call."""
        return self.made(_Call, func=function, args=args, keywords=keywords or _NONE)

    def call_name(self, name: str, *args: ast.expr) -> ast.expr:
        """A call of a name with positional arguments."""
        return self.call(self.load(name), list(args))

    def dotted(self, name: str, attr: str) -> ast.expr:
        """``name.attr``."""
        return self.made(_Attribute, value=self.load(name), attr=attr)

    def statement(self, value: ast.expr) -> ast.stmt:
        """An expression as a statement."""
        return self.made(_Expr, value=value)

    def tuple_of(self, items: Sequence[ast.expr], *, stored: bool = False) -> ast.expr:
        """A tuple."""
        return ast.Tuple(list(items), _STORE if stored else ast.Load(), lineno=self.line, col_offset=0)

    def dict_of(self, items: Sequence[tuple[Any, ast.expr]]) -> ast.expr:
        """A dict; its keys are expressions or constants."""
        keys: list[Any] = [key if isinstance(key, ast.expr) else self.constant(key) for key, _ in items]
        return ast.Dict(keys, [value for _, value in items], lineno=self.line, col_offset=0)

    def formatted(self, value: ast.expr, conversion: int) -> ast.expr:
        """A part of an f-string."""
        return self.made(_FormattedValue, value=value, conversion=conversion)

    def joined(self, values: list[ast.expr]) -> ast.expr:
        """An f-string."""
        return self.made(_JoinedStr, values=values)

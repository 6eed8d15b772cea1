# SPDX-License-Identifier: Apache-2.0
"""A builder of Python syntax nodes that have the line numbers of the template."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any

from cuda_progcache.templates.compiler.patterns import N, expression, quick, statements
from cuda_progcache.templates.runtime import JINJA2_NAMES, NAMES

_NONE: list[Any] = []  # the empty list of keywords, which all calls share; it is never changed

STR = 115
"""The conversion ``!s`` of a formatted value; `PLAIN` means no conversion."""
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
    """A builder of Python nodes at the current line of the template.

    Attributes
    ----------
    line : int
        The ``lineno`` of new nodes.
    names : dict
        The nodes that load a name, by name and line: a node may be used in several places.
    uses : set of str
        The names of the runtime that were emitted.
    context : str
        The variable with the context of the render.
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
        """Return a node of one of the quick classes; see `quick`."""
        node = kind.__new__(kind)
        fields["lineno"] = self.line
        node.__dict__ = fields
        return node

    def runtime(self, name: str) -> ast.expr:
        """Return the node that loads a name of the runtime's tables; other names raise KeyError."""
        if name not in NAMES and name not in JINJA2_NAMES:
            raise KeyError(f"the runtime has no {name!r}")
        self.uses.add(name)
        return self.load(name)

    def call_runtime(self, name: str, *args: ast.expr) -> ast.expr:
        """Return a call of a function of the runtime."""
        return self.call(self.runtime(name), list(args))

    def load(self, name: str) -> ast.expr:
        """Return the node that loads a name."""
        made = self.names.get((name, self.line))
        if made is None:
            made = self.names[name, self.line] = self.made(_Name, id=name)
        return made

    def argument(self, name: str) -> ast.arg:
        """Return a parameter of a function."""
        return ast.arg(name, None, lineno=self.line, col_offset=0)

    def store(self, name: str) -> ast.expr:
        """Return a name as the target of an assignment."""
        return self.made(_Name, id=name, ctx=_STORE)

    def constant(self, value: Any) -> ast.expr:
        """Return a constant."""
        return self.made(_Constant, value=value)

    def call(self, function: ast.expr, args: list[ast.expr], keywords: list[ast.keyword] | None = None) -> ast.expr:
        """Return a call."""
        return self.made(_Call, func=function, args=args, keywords=keywords or _NONE)

    def call_name(self, name: str, *args: ast.expr) -> ast.expr:
        """Return a call of a name with positional arguments."""
        return self.call(self.load(name), list(args))

    def dotted(self, name: str, attr: str) -> ast.expr:
        """Return the attribute ``name.attr``."""
        return self.made(_Attribute, value=self.load(name), attr=attr)

    def statement(self, value: ast.expr) -> ast.stmt:
        """Return an expression as a statement."""
        return self.made(_Expr, value=value)

    def tuple_of(self, items: Sequence[ast.expr], *, stored: bool = False) -> ast.expr:
        """Return a tuple; as the target of an assignment if `stored`."""
        return ast.Tuple(list(items), _STORE if stored else ast.Load(), lineno=self.line, col_offset=0)

    def dict_of(self, items: Sequence[tuple[Any, ast.expr]]) -> ast.expr:
        """Return a dict; its keys are expressions or constants."""
        keys: list[Any] = [key if isinstance(key, ast.expr) else self.constant(key) for key, _ in items]
        return ast.Dict(keys, [value for _, value in items], lineno=self.line, col_offset=0)

    def formatted(self, value: ast.expr, conversion: int) -> ast.expr:
        """Return a replacement field of an f-string."""
        return self.made(_FormattedValue, value=value, conversion=conversion)

    def joined(self, values: list[ast.expr]) -> ast.expr:
        """Return an f-string."""
        return self.made(_JoinedStr, values=values)

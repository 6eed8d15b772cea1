# SPDX-License-Identifier: Apache-2.0
"""Partial evaluation: expressions whose value is known when the template is compiled."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from markupsafe import Markup

from cuda_progcache.templates.compiler.tree import Builder

if TYPE_CHECKING:
    from jinja2 import Environment
    from jinja2.nodes import EvalContext

    from cuda_progcache.templates.compiler.analysis import Analysis

_SIMPLE = frozenset({int, float, complex, str, bool, type(None), type(Ellipsis)})
_CHILDREN = ("node", "arg", "left", "right", "expr", "test", "expr1", "expr2")


def writable(value: Any) -> bool:
    """Whether code can write the value down: plain numbers, strings, and the built-in containers of them."""
    kind = type(value)
    if kind in _SIMPLE or kind is Markup or kind is range:
        return True
    if kind in {tuple, list, set, frozenset}:
        return all(map(writable, value))
    if kind is dict:
        return all(writable(k) and writable(v) for k, v in value.items())
    return False


class Folding(Builder):
    """Values of constant expressions, and the code that makes a value.

    Attributes
    ----------
    precomputed : list
        Values that code can't write down; the code finds number n as the global ``_pc_n``.
    """

    environment: Environment
    analysis: Analysis
    eval_ctx: EvalContext
    static: dict[str, Any]
    precomputed: list[Any]

    def fold(self, node: Any) -> Any:
        """Return the value of an expression that the analysis found constant.

        What has been worked out is put into the tree in its place, so that nothing is evaluated twice.

        Raises
        ------
        jinja2.nodes.Impossible
            If it has to be evaluated in the render: it raises, depends on the escaping of the moment, or is a filter
            that takes the context.
        """
        kind = type(node)
        if kind is nodes.Const:
            return node.value
        if kind is nodes.Name:
            return self.static[node.name]
        if id(node) not in self.analysis.constant and kind is not nodes.TemplateData:
            raise nodes.Impossible
        try:
            for name in _CHILDREN:
                child = getattr(node, name, None)
                if isinstance(child, nodes.Expr) and type(child) is not nodes.Const:
                    setattr(node, name, self._known(child))
            for name in ("items", "args", "nodes", "kwargs", "ops"):
                for index, child in enumerate(getattr(node, name, ())):
                    self._fold_item(getattr(node, name), index, child)
            return node.as_const(self.eval_ctx)
        except nodes.Impossible:
            self.analysis.constant.discard(id(node))
            raise
        except Exception as error:  # it will raise again where the render evaluates it
            self.analysis.constant.discard(id(node))
            raise nodes.Impossible from error

    def _known(self, child: nodes.Expr) -> nodes.Expr:
        if isinstance(child, nodes.Slice):
            for part in ("start", "stop", "step"):
                piece = getattr(child, part)
                if piece is not None:
                    setattr(child, part, self._known(piece))
            return child
        return nodes.Const(self.fold(child), lineno=child.lineno, environment=child.environment)

    def _fold_item(self, items: list[Any], index: int, child: Any) -> None:
        if isinstance(child, nodes.Pair):
            child.key, child.value = self._known(child.key), self._known(child.value)
        elif isinstance(child, nodes.Keyword):
            child.value = self._known(child.value)
        elif isinstance(child, nodes.Operand):
            child.expr = self._known(child.expr)
        elif type(child) is not nodes.Const:
            items[index] = self._known(child)

    def folded(self, node: nodes.Node) -> ast.expr | None:
        """Return the code for a constant expression's value; None if it can't be had before the render."""
        if self.eval_ctx.volatile:
            return None
        try:
            value = self.fold(node)
        except nodes.Impossible:
            return None
        if not writable(value) and not self.static:
            return None
        return self.literal(value)

    def literal(self, value: Any) -> ast.expr:
        """Return an expression for a value."""
        kind = type(value)
        if kind in _SIMPLE:
            return self.constant(value)
        if kind is Markup:
            return self.call_name("Markup", self.constant(str(value)))
        if not writable(value):
            for index, known in enumerate(self.precomputed):
                if known is value:
                    return self.load(f"_pc_{index}")
            self.precomputed.append(value)
            return self.load(f"_pc_{len(self.precomputed) - 1}")
        if kind is range:
            return self.call_name("range", *map(self.constant, (value.start, value.stop, value.step)))
        if kind is dict:
            keys: list[ast.expr | None] = [self.literal(key) for key in value]
            return ast.Dict(keys, [self.literal(v) for v in value.values()], lineno=self.line, col_offset=0)
        items = [self.literal(item) for item in value]
        if kind is tuple:
            return self.tuple_of(items)
        if kind is list or (kind is set and items):
            if kind is list:
                return ast.List(items, ast.Load(), lineno=self.line, col_offset=0)
            return ast.Set(items, lineno=self.line, col_offset=0)
        return self.call_name(kind.__name__, self.tuple_of(items))

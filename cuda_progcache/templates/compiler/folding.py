# SPDX-License-Identifier: Apache-2.0
"""Constant folding: evaluation of expressions whose value is known when the template is compiled.

An expression is folded if its value is immutable: a number, a string, or a tuple of these. A list or dict is folded if
Jinja2 folds it, too, and becomes a display that makes a new object in each render. Other values, such as generators and
undefined values, are computed in the render. Folding reads plain data and calls Jinja2's own filters and ours, but
never calls a user's function or object.
"""

from __future__ import annotations

import ast
from typing import Any

from jinja2 import nodes
from jinja2.compiler import has_safe_repr
from jinja2.utils import _PassArg
from markupsafe import Markup

from cuda_progcache.templates.compile_context import is_known
from cuda_progcache.templates.compiler.settings import JINJA2_UNDEFINED
from cuda_progcache.templates.compiler.unit import Unit

_ATOMS = frozenset({int, float, complex, str, bool, type(None), type(Ellipsis)})
_CHILDREN = ("node", "arg", "left", "right", "expr", "test", "expr1", "expr2", "start", "stop", "step", "key", "value")
_LISTS = ("items", "args", "nodes", "kwargs", "ops")


def is_constant(value: Any) -> bool:
    """Whether a value is immutable and can be written as code."""
    kind = type(value)
    if kind in _ATOMS or kind is Markup or kind is range:
        return True
    return kind in {tuple, frozenset} and all(map(is_constant, value))


def is_plain(value: Any) -> bool:
    """Whether a value is plain data: a constant, an undefined value, or a builtin container of these."""
    kind = type(value)
    if kind in {list, tuple, set, frozenset}:
        return all(map(is_plain, value))
    if kind is dict:
        return all(is_plain(key) and is_plain(item) for key, item in value.items())
    return kind in JINJA2_UNDEFINED or is_constant(value)


class Folding(Unit):
    """The part of the code generator that evaluates constant expressions and writes values as code."""

    def fold(self, node: Any) -> Any:
        """Return the value of an expression; it may be mutable, such as a list or an iterator.

        Each expression is evaluated at most once. The tree gets the value of a constant in place of its expression; any
        other expression is left to the render from then on.

        Raises
        ------
        jinja2.nodes.Impossible
            If the expression has to be evaluated in the render: because it raises, depends on the current escaping, or
            calls a user's code.
        """
        kind = type(node)
        if kind is nodes.Const:
            return node.value
        if kind is nodes.Name and node.name in self.plain_static:
            value = self.static[node.name]
            self.shared = self.shared or not is_constant(value)
            return value
        if id(node) in self.known:
            return self.known[id(node)]
        if id(node) not in self.analysis.constant and kind is not nodes.TemplateData:
            raise nodes.Impossible
        self.analysis.constant.discard(id(node))
        restore: list[_Child] = []
        try:
            self._work_out_children(node, restore)
            if not self._is_askable(node):
                raise nodes.Impossible
            value = node.as_const(self.eval_ctx)
        except nodes.Impossible:
            raise
        except Exception as error:  # the render evaluates it and raises the error
            raise nodes.Impossible from error
        finally:
            for owner, place, child in restore:
                _put(owner, place, child)
        if is_constant(value) or self._is_displayed(value):
            self.known[id(node)] = value
            self.analysis.constant.add(id(node))
        return value

    def _work_out_children(self, node: Any, restore: list[_Child]) -> None:
        """Replace a node's children by their values; record the children that aren't constants in `restore`."""
        for name in _CHILDREN:
            child = getattr(node, name, None)
            if isinstance(child, (nodes.Expr, nodes.Slice)):
                self._work_out(node, name, child, restore)
        for name in _LISTS:
            items = getattr(node, name, None)
            for index, child in enumerate(items) if isinstance(items, list) else ():
                self._work_out(items, index, child, restore)

    def _work_out(self, owner: Any, place: Any, child: Any, restore: list[_Child]) -> None:
        if type(child) is nodes.Const:
            return
        if isinstance(child, (nodes.Slice, nodes.Pair, nodes.Keyword, nodes.Operand)):
            self._work_out_children(child, restore)
            return
        value = self.fold(child)
        if not is_constant(value):
            restore.append((owner, place, child))
            iterated = isinstance(owner, nodes.Filter) and place == "node"
            if not iterated and type(child) is not nodes.Name and not is_plain(value):
                raise nodes.Impossible
        _put(owner, place, nodes.Const(value, lineno=child.lineno, environment=child.environment))

    def _is_askable(self, node: Any) -> bool:
        """Whether evaluating a node, whose children are already values, calls no user's code."""
        if isinstance(node, (nodes.Filter, nodes.Test)):
            known = self.environment.filters if isinstance(node, nodes.Filter) else self.environment.tests
            function: Any = known.get(node.name)
            if function is None or not is_known(function):
                return False
            return self.settings.own_lookup or _PassArg.from_obj(function) is None
        if isinstance(node, nodes.Concat) and self.eval_ctx.autoescape and self.static:
            return False  # Jinja2 joins constants as if none were markup, but values by their type
        return self.settings.own_lookup or not isinstance(node, (nodes.Getattr, nodes.Getitem))

    def folded(self, node: nodes.Node) -> ast.expr | None:
        """Return the code for the value of a constant expression; None if the render has to evaluate it."""
        if self.eval_ctx.volatile or not (self.environment.optimized or self.static):
            return None
        self.shared = False
        try:
            value = self.fold(node)
        except nodes.Impossible:
            return None
        return self.literal(value) if is_constant(value) or self._is_displayed(value) else None

    def _is_displayed(self, value: Any) -> bool:
        """Whether a value just computed may become a display, as in Jinja2."""
        return self.environment.optimized and not self.shared and has_safe_repr(value)

    def static_value(self, name: str) -> ast.expr:
        """Return the code for the value of a name of the static context."""
        value = self.static[name]
        if is_constant(value):
            return self.literal(value)
        if name not in self.precomputed_names:
            self.precomputed_names.append(name)
            self.precomputed.append(value)
        return self.load(f"_pc_{self.precomputed_names.index(name)}")

    def literal(self, value: Any) -> ast.expr:
        """Return the code for a constant, or for plain data that is created anew in each render."""
        kind = type(value)
        if kind in _ATOMS:
            return self.constant(value)
        if kind is Markup:
            return self.call_runtime("Markup", self.constant(str(value)))
        if kind is range:
            return self.call_name("range", *map(self.constant, (value.start, value.stop, value.step)))
        if kind is dict:
            return self.dict_of([(self.literal(key), self.literal(item)) for key, item in value.items()])
        items = [self.literal(item) for item in value]
        if kind is list:
            return ast.List(items, ast.Load(), lineno=self.line, col_offset=0)
        return self.tuple_of(items) if kind is tuple else self.call_name(kind.__name__, self.tuple_of(items))


_Child = tuple[Any, Any, Any]  # the node or list with the child, the child's field or index, and the child


def _put(owner: Any, place: Any, child: Any) -> None:
    if isinstance(owner, list):
        owner[place] = child
    else:
        setattr(owner, place, child)

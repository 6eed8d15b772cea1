# SPDX-License-Identifier: Apache-2.0
"""The analysis of a template before code generation: one walk over its nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.utils import _PassArg

from cuda_progcache.templates.compiler.scopes import COUNTING, SIZING, Function, Loop, Scope
from cuda_progcache.templates.regions import Globals, Region

if TYPE_CHECKING:
    from jinja2 import Environment

_MACRO_NAMES = frozenset({"caller", "kwargs", "varargs"})
_FUNCTION_NAMES = frozenset({"self", "super"})


class Analysis:
    """The scopes, functions, loops, constants and blocks of a template.

    Parameters
    ----------
    environment : jinja2.Environment
        The environment, for the calling conventions of its filters and tests.
    static : collection of str
        The names whose values are known at compile time.
    hoist : bool
        Whether names may be looked up once per function, because the context is ours.
    inline_loops : bool
        Whether loop objects may be replaced by counters.

    Attributes
    ----------
    scopes : dict
        The `Scope` of a node, by ``(id of node, branch)``.
    functions : dict
        The `Function` of a template, block, region, macro or call block, by the id of the node.
    loops : dict
        The `Loop` of a ``For``, and of each attribute or call of ``loop`` that can be inlined, by the id of the node.
    constant : set of int
        The ids of expressions whose values don't depend on a render.
    blocks : dict
        The nodes of blocks and regions, by name, in the template's order.
    setup : jinja2.nodes.Template or None
        The bodies of ``{% globals %}`` and ``{% imports %}``, in order.
    assigned : set of str
        All names that the template sets anywhere.
    set_in_loops : list of (Scope, str, int)
        The names that the bodies of loops set, with their lines.
    import_setup : jinja2.nodes.Template or None
        The imports by a constant name at the template's top level; a block that is rendered alone needs these, too.
    references : dict
        The names of the templates that are included, imported or extended by a constant name, in order.
    kept : set of str
        The names whose values may be stored or compared; if one is undefined, each read needs a new undefined object.
    imports : dict
        The names that extensions import, in order.
    extends : bool
        Whether the template has an ``{% extends %}``.
    modifies_eval_context : bool
        Whether a statement of the template changes the eval context.
    fails : list of (str, int)
        The errors found, as messages and lines.
    """

    def __init__(self, environment: Environment, static: Iterable[str], *, hoist: bool, inline_loops: bool) -> None:
        self.environment = environment
        self.hoist = hoist
        self.inline_loops = inline_loops
        self.static = frozenset(static)
        self.scopes: dict[tuple[int, str], Scope] = {}
        self.functions: dict[int, Function] = {}
        self.loops: dict[int, Loop] = {}
        self.constant: set[int] = set()
        self.blocks: dict[str, Any] = {}
        self.setup: nodes.Template | None = None
        self.import_setup: nodes.Template | None = None
        self.references: dict[str, None] = {}
        self.kept: set[str] = set()
        self.imports: dict[str, None] = {}
        self.fails: list[tuple[str, int]] = []
        self.extends = False
        self.modifies_eval_context = False
        self.assigned: set[str] = set()
        self.set_in_loops: list[tuple[Scope, str, int]] = []
        self._scope: Scope
        self._function: Function
        self._macros: list[Function] = []
        self._loops: list[Loop] = []
        self._depth = 0
        self._branch = 0
        self._waiting: list[Any] = []
        self._setup: list[nodes.Node] = []

    def run(self, template: nodes.Template) -> None:
        """Walk over the template and its blocks."""
        self._root(template, template.body, block=False)
        if self._setup:
            self.setup = nodes.Template(self._setup, lineno=template.lineno)
            self._root(self.setup, self._setup, block=False)
        for block in self._waiting:  # the list may grow in the loop
            self._root(block, block.body, block=True)
        imports = [node for node in template.body if _is_plain_import(node)]
        if imports:
            self.import_setup = nodes.Template(imports, lineno=template.lineno)
            self._root(self.import_setup, imports, block=False)

    def _root(self, node: nodes.Template | nodes.Block, body: Sequence[nodes.Node], *, block: bool) -> None:
        self._function = self.functions[id(node)] = Function()
        self._scope = self.scopes[id(node), ""] = Scope(None, self._function, toplevel=not block, block=block)
        self._scope.hoist = self._scope.hoist_inner = self.hoist
        self._macros, self._loops, self._depth, self._branch = [], [], 0, 0
        for arg in getattr(node, "args", ()):
            self.assigned.add(arg.name)
            self._scope.parameter(arg.name)
        for default in getattr(node, "defaults", ()):
            self.visit(default)
        self.body(body)
        for name in _FUNCTION_NAMES & self._function.special:
            if block or name == "self":
                self._scope.parameter(name)

    # Statements

    def body(self, body: Iterable[nodes.Node]) -> None:
        """Visit statements."""
        for node in body:
            self.visit(node)

    def visit(self, node: nodes.Node) -> bool:
        """Visit a node; return whether it is an expression with a constant value."""
        try:
            method = _METHODS[type(node)]
        except KeyError:
            method = _inherited(type(node))
        return bool(method(self, node))

    def _inside(self, node: nodes.Node, branch: str = "", *, loop: bool = False, hoist: bool = True) -> Scope:
        """Enter a scope of the node; the caller restores ``self._scope``."""
        outer = self._scope
        hoist = hoist and outer.hoist_inner
        self._scope = scope = Scope(outer, self._function, outer.level + 1, loop=loop, hoist=hoist, hoist_inner=hoist)
        self.scopes[id(node), branch] = scope
        return scope

    def _scoped(
        self,
        node: nodes.Node,
        children: Iterable[nodes.Node],
        branch: str = "",
        targets: Iterable[nodes.Node] = (),
        *,
        hoist: bool = True,
    ) -> None:
        """Visit children in a new scope of the node; `targets` are the names that the scope is given."""
        outer, in_branch = self._scope, self._branch
        self._inside(node, branch, hoist=hoist)
        self._branch = 0
        for target in targets:
            self._parameters(target)
        self.body(children)
        self._scope, self._branch = outer, in_branch

    def _set(self, name: str, line: int) -> None:
        self._hide(name)
        self.assigned.add(name)
        self._scope.set(name, branch=self._branch > 0)
        if self._scope.loop:
            self._function.sets_in_loop = True
            self.set_in_loops.append((self._scope, name, line))
        if name == "loop" and self._depth:
            self.fails.append(("Can't assign to special loop variable in for-loop target", line))

    def _parameters(self, target: nodes.Node) -> None:
        for name in _names(target):
            self._hide(name.name)
            self.assigned.add(name.name)
            self._scope.parameter(name.name)
            if name.name == "loop" and name.ctx == "store":
                self.fails.append(("Can't assign to special loop variable in for-loop target", name.lineno))

    def _hide(self, name: str) -> None:
        for function in self._givers(name):
            if name not in function.special:
                function.hidden.add(name)

    def _read(self, name: str) -> None:
        self._scope.read(name)
        for function in self._givers(name):
            if name not in function.hidden:
                function.special.add(name)

    def _givers(self, name: str) -> Sequence[Function]:
        """Return the functions that give a special name its value."""
        if name in _MACRO_NAMES:
            return self._macros
        return (self._function.outermost,) if name in _FUNCTION_NAMES else ()

    def _shows_context(self, *, call: bool = True) -> None:
        self._function.shows_context = True
        if call:
            for loop in self._loops:
                loop.calls = True

    def _needs_loop(self) -> None:
        for loop in self._loops:
            loop.needs_object = True

    def _output(self, node: nodes.Output) -> None:
        for child in node.nodes:
            kind = type(child)
            if kind is nodes.TemplateData:
                continue
            if kind is nodes.Name:
                self._count(child.name, "printed")  # type: ignore[attr-defined]
            self._glance(child)

    def _count(self, name: str, what: str) -> None:
        for loop in reversed(self._loops):
            if name in loop.targets:
                if loop.function is self._function:
                    counts = getattr(loop, what)
                    counts[name] = counts.get(name, 0) + (1 if loop is self._loops[-1] else 2)
                return
        if what == "dotted":
            reads = self._function.reads
            reads[name] = reads.get(name, 0) + (2 if self._loops else 1)

    def _glance(self, node: nodes.Node) -> bool:
        """Visit an expression whose value is read but not stored."""
        if type(node) is not nodes.Name or node.ctx != "load":
            return self.visit(node)
        return self._look_up(node)

    def _glances(self, node: nodes.Node) -> bool:
        """Visit an operator, which reads the values of its operands but doesn't store them."""
        constant = True
        for child in node.iter_child_nodes():
            constant &= self._glance(child)
        if constant:
            self.constant.add(id(node))
        return constant

    def _if(self, node: nodes.If) -> None:
        self._glance(node.test)
        self._branch += 1
        self.body(node.body)
        for other in node.elif_:
            self._glance(other.test)
            self.body(other.body)
        self.body(node.else_)
        self._branch -= 1

    def _for(self, node: nodes.For) -> None:
        self._glance(node.iter)
        outer, in_branch = self._scope, self._branch
        self._branch = 0
        self._depth += 1
        if node.test is not None:  # the test may become a separate function
            self._scoped(node, [node.test], "test", [node.target], hoist=False)
        if node.else_:
            self._scoped(node, node.else_, "else", hoist=not node.recursive)
        loop = Loop(frozenset(n.name for n in _names(node.target)), self._function, self._depth)
        loop.needs_object = node.recursive or not self.inline_loops
        self.loops[id(node)] = loop
        scope = self._inside(node, "body", loop=True, hoist=not node.recursive)  # a recursive loop is a function
        self._parameters(node.target)
        self._loops.append(loop)
        self.body(node.body)
        self._loops.pop()
        if loop.attributes & SIZING and node.test is not None:
            loop.needs_object = True  # the number of items that pass the test is known only at the end
        if loop.needs_object and (node.recursive or loop.attributes):
            scope.parameter("loop")
        self._depth -= 1
        self._scope, self._branch = outer, in_branch

    def _macro(self, node: nodes.Macro) -> None:
        self._set(node.name, node.lineno)
        self._callable(node)

    def _call_block(self, node: nodes.CallBlock) -> None:
        self.visit(node.call)
        self._callable(node)

    def _callable(self, node: nodes.Macro | nodes.CallBlock) -> None:
        outer = (self._scope, self._function, self._branch, self._loops, self._depth)
        self._function = function = self.functions[id(node)] = Function(outer=outer[1])
        scope = self._inside(node)
        scope.hoist = scope.hoist_inner = self.hoist
        self._branch = 0
        for arg in node.args:
            self.assigned.add(arg.name)
            scope.parameter(arg.name)
            if arg.name in _MACRO_NAMES:
                self._hide(arg.name)
        for default in node.defaults:
            self.visit(default)
        self._macros.append(function)
        self.body(node.body)
        self._macros.pop()
        taken = {arg.name for arg in node.args}
        for name in function.special & _MACRO_NAMES:
            if name not in taken:
                scope.parameter(name)
        self._scope, self._function, self._branch, self._loops, self._depth = outer
        defined_in: Scope | None = self._scope
        while defined_in is not None:
            defined_in.captured = True
            defined_in = defined_in.parent
        if function.shows_context:
            self._function.shows_context = True

    def _filter_block(self, node: nodes.FilterBlock) -> None:
        self.visit(node.filter)
        self._scoped(node, [*node.body, node.filter])

    def _with(self, node: nodes.With) -> None:
        for value in node.values:
            self.visit(value)
        self._scoped(node, node.body, targets=node.targets)

    def _block(self, node: nodes.Block) -> None:
        self._named(node)
        if node.scoped:
            self._needs_loop()
            for loop in self._loops:
                loop.attributes.add("")

    def _region(self, node: Any) -> None:
        self._named(node)
        self._set(node.name, node.lineno)

    def _named(self, node: Any) -> None:
        if node.name in self.blocks:
            self.fails.append((f"block {node.name!r} defined twice", node.lineno))
        self.blocks[node.name] = node
        self._waiting.append(node)
        self._shows_context()

    def _globals(self, node: Any) -> None:
        self._setup += node.body

    def _mention_loop(self) -> None:
        """Record that the enclosing loops have a ``loop``, too, as in Jinja2, because an include could see it."""
        for loop in self._loops[:-1]:
            loop.attributes.add("")

    def _extends(self, node: nodes.Extends) -> None:
        self.extends = True
        self._refer(node)

    def _refer(self, node: Any) -> None:
        """Visit a reference to another template; record the name or names if they are constant."""
        template = node.template
        self.visit(template)
        parts = template.items if isinstance(template, (nodes.Tuple, nodes.List)) else [template]
        for part in parts:
            value = part.value if isinstance(part, nodes.Const) else ()
            names = value if isinstance(value, (tuple, list)) else (value,)
            self.references.update(dict.fromkeys(name for name in names if isinstance(name, str)))
        if getattr(node, "with_context", False):
            self._needs_loop()

    def _import(self, node: nodes.Import) -> None:
        self._refer(node)
        self._set(node.target, node.lineno)

    def _from_import(self, node: nodes.FromImport) -> None:
        self._refer(node)
        for name in node.names:
            self._set(name if isinstance(name, str) else name[1], node.lineno)

    def _assign(self, node: nodes.Assign) -> None:
        self.visit(node.node)
        self._targets(node.target)

    def _assign_block(self, node: nodes.AssignBlock) -> None:
        self._targets(node.target)
        self._scoped(node, [*node.body, node.filter] if node.filter is not None else node.body)

    def _targets(self, target: nodes.Node) -> None:
        if isinstance(target, nodes.Name):
            if target.ctx == "param":
                self._scope.parameter(target.name)
            else:
                self._set(target.name, target.lineno)
        elif isinstance(target, nodes.NSRef):
            self._read(target.name)
        else:
            for child in target.iter_child_nodes():
                self._targets(child)

    def _overlay(self, node: nodes.OverlayScope) -> None:
        self.visit(node.context)
        outer, in_branch = self._scope, self._branch
        scope = Scope(None, self._function, outer.level + 1)
        self.scopes[id(node), ""] = self._scope = scope
        self._branch = 0
        self.body(node.body)
        self._scope, self._branch = outer, in_branch

    def _eval_context(self, node: nodes.EvalContextModifier) -> None:
        self.modifies_eval_context = True
        self._all(node)

    # Expressions

    def _all(self, node: nodes.Node) -> bool:
        constant = True
        for child in node.iter_child_nodes():
            constant &= self.visit(child)
        return constant

    def _keep(self, node: nodes.Node) -> bool:
        if self._all(node):
            self.constant.add(id(node))
            return True
        return False

    def _never(self, node: nodes.Node) -> bool:
        self._all(node)
        return False

    def _name(self, node: nodes.Name) -> bool:
        if node.ctx != "load":
            self._targets(node)
            return False
        self.kept.add(node.name)
        return self._look_up(node)

    def _look_up(self, node: nodes.Name) -> bool:
        if node.name == "loop" and self._loops:
            loop = self._loops[-1]
            loop.needs_object = True
            loop.attributes.add("")
            self._mention_loop()
        self._read(node.name)
        return node.name in self.static

    def _getattr(self, node: nodes.Getattr) -> bool:
        loop = self._own_loop(node)
        if loop is not None:
            loop.attributes.add(node.attr)
            if node.attr in COUNTING or node.attr in SIZING:
                self.loops[id(node)] = loop
            else:
                loop.needs_object = True
            self._mention_loop()
            return False
        if type(node.node) is nodes.Name:
            self._count(node.node.name, "dotted")
        return self._glances(node)

    def _own_loop(self, node: nodes.Node) -> Loop | None:
        """Return the innermost loop if a node is an attribute of its ``loop``; otherwise None."""
        if type(node) is not nodes.Getattr or type(node.node) is not nodes.Name or node.node.name != "loop":
            return None
        loop = self._loops[-1] if self._loops else None
        return loop if loop is not None and loop.function is self._function else None

    def _filter(self, node: nodes.Filter) -> bool:
        self._function.outermost.filters[node.name] = None
        return self._applied(node, self.environment.filters)

    def _test(self, node: nodes.Test) -> bool:
        self._function.outermost.tests[node.name] = None
        return self._applied(node, self.environment.tests)

    def _applied(self, node: nodes.Filter | nodes.Test, known: Any) -> bool:
        function = known.get(node.name)
        if function is not None and _PassArg.from_obj(function) is _PassArg.context:
            self._shows_context(call=False)
        if isinstance(node, nodes.Filter) and node.node is None:
            self._all(node)
            return False
        return self._keep(node) if isinstance(node, nodes.Filter) or node.name == "sameas" else self._glances(node)

    def _call(self, node: nodes.Call) -> bool:
        loop = self._own_loop(node.node)
        plain = node.args and not (node.kwargs or node.dyn_args or node.dyn_kwargs)
        if loop is not None and plain and node.node.attr == "cycle":  # type: ignore[attr-defined]
            loop.attributes.add("index0")
            self.loops[id(node)] = loop
            self._mention_loop()
            for arg in node.args:
                self.visit(arg)
            return False
        self._shows_context()
        self._all(node)
        return False

    def _context(self, node: nodes.Node) -> bool:  # noqa: ARG002  (the table's signature)
        self._shows_context()
        self._needs_loop()
        return False

    def _imported(self, node: nodes.ImportedName) -> bool:
        self.imports[node.importname] = None
        return False


def _names(target: nodes.Node) -> list[nodes.Name]:
    return [target] if isinstance(target, nodes.Name) else list(target.find_all(nodes.Name))


def _is_plain_import(node: nodes.Node) -> bool:
    """Whether a statement imports a template by a constant name."""
    if not isinstance(node, (nodes.Import, nodes.FromImport)):
        return False
    return isinstance(node.template, nodes.Const) and isinstance(node.template.value, str)


_METHODS: dict[type[nodes.Node], Callable[[Analysis, Any], object]] = {
    nodes.Output: Analysis._output,
    nodes.If: Analysis._if,
    nodes.For: Analysis._for,
    nodes.Macro: Analysis._macro,
    nodes.CallBlock: Analysis._call_block,
    nodes.FilterBlock: Analysis._filter_block,
    nodes.With: Analysis._with,
    nodes.Block: Analysis._block,
    nodes.Extends: Analysis._extends,
    Region: Analysis._region,
    Globals: Analysis._globals,
    nodes.Include: Analysis._refer,
    nodes.Import: Analysis._import,
    nodes.FromImport: Analysis._from_import,
    nodes.Assign: Analysis._assign,
    nodes.AssignBlock: Analysis._assign_block,
    nodes.Scope: lambda analysis, node: analysis._scoped(node, node.body),
    nodes.OverlayScope: Analysis._overlay,
    nodes.EvalContextModifier: Analysis._eval_context,
    nodes.ScopedEvalContextModifier: Analysis._eval_context,
    nodes.Name: Analysis._name,
    nodes.NSRef: lambda analysis, node: analysis._read(node.name),
    nodes.Filter: Analysis._filter,
    nodes.Test: Analysis._test,
    nodes.Call: Analysis._call,
    nodes.Getattr: Analysis._getattr,
    nodes.ImportedName: Analysis._imported,
    **dict.fromkeys((nodes.Const, nodes.TemplateData), lambda _analysis, _node: True),
    **dict.fromkeys((nodes.Tuple, nodes.List, nodes.Dict, nodes.Getitem), Analysis._keep),
    **dict.fromkeys((nodes.CondExpr, nodes.And, nodes.Or), Analysis._keep),
    **dict.fromkeys((nodes.Pair, nodes.Keyword, nodes.Slice), Analysis._all),
    **dict.fromkeys((nodes.Concat, nodes.Compare, nodes.Operand), Analysis._glances),
    **dict.fromkeys((nodes.BinExpr, nodes.UnaryExpr), Analysis._glances),
    **dict.fromkeys((nodes.ContextReference, nodes.DerivedContextReference), Analysis._context),
}


def _inherited(kind: type[nodes.Node]) -> Callable[[Analysis, Any], object]:
    """Return the method for a node type that isn't in the table: that of a base class, or a walk over its children."""
    found: Callable[[Analysis, Any], object] = Analysis._never
    for base in kind.__mro__:
        if base in _METHODS:
            found = _METHODS[base]
            break
    _METHODS[kind] = found
    return found

# SPDX-License-Identifier: Apache-2.0
"""Statements but loops, macros and inheritance; entering and leaving scopes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import nodes

from cuda_progcache.templates.compiler.output import Output
from cuda_progcache.templates.compiler.scopes import (
    FROM_CONTEXT,
    FROM_OUTER,
    GIVEN,
    MISSING,
    READ,
    Function,
    FunctionState,
    Scope,
)
from cuda_progcache.templates.compiler.tree import IN, IS, IS_NOT

_Arm = tuple[nodes.Node | None, list[nodes.Node], int]
_Made = tuple[ast.expr, list[ast.stmt], int]


class Unreachable(Exception):  # noqa: N818  (ends the compilation of a body, it is no error)
    """What follows in this body can't be reached."""


class Statements(Output):
    """Code for statements; each method takes a node and emits."""

    statement_methods: dict[type[nodes.Node], Callable[[Any], None]]

    def body(self, statements: Iterable[nodes.Node]) -> None:
        """Emit statements, up to one after which nothing is reached."""
        methods = self.statement_methods
        try:
            for node in statements:
                method = methods.get(type(node))
                if method is None:
                    self.fail(f"no code for {type(node).__name__} nodes", node.lineno)
                if node.lineno and type(node) is not nodes.Output:
                    self.line = node.lineno
                method(node)
        except Unreachable:
            pass

    # Functions of the module

    def begin_function(self, function: Function, scope: Scope) -> None:
        """Begin with a function of the module."""
        self.state, self.scope, self.out = FunctionState(function), scope, []
        self.alias_reads(function)

    def entry(self, name: str) -> str:
        """The name of an entry of the module in the form that is being made."""
        form = self.settings.form
        return name if form == "render" else f"{name}_{form}"

    # Scopes

    @contextmanager
    def entered(self, scope: Scope, *, leave: bool = True, first: bool = False) -> Iterator[None]:
        """Be in a scope: give its names their first values, and take them away in the end.

        `first` is a function's first scope: its names are looked up by the prologue.
        """
        outer, soft, branch = self.scope, self.state.soft, self.state.branch
        self.scope, self.state.soft, self.state.branch = scope, False, 0
        self.enter(scope, first=first)
        try:
            yield
        finally:
            self.scope, self.state.soft, self.state.branch = outer, soft, branch
        if leave:
            self.leave(scope)

    def leave(self, scope: Scope) -> None:
        """Take away what a macro, called later, must not find any more."""
        if scope.captured:
            gone: list[ast.expr] = [self.store(local) for local, _, _ in scope.resolve().values() if local[:2] == "l_"]
            if gone:
                self.emit(self.assign(gone, self.runtime("missing")))

    def enter(self, scope: Scope, *, first: bool = False) -> None:
        """Emit the first values of a scope's names."""
        missing: list[ast.expr] = []
        again: list[ast.stmt] = []
        looks_again = self.state.function.shows_context and not first
        for name, (local, source, outer) in scope.resolve().items():
            self.forget(local)
            if source == GIVEN or name in self.static:
                continue
            if source == FROM_OUTER:
                self.use_hoisted(scope.parent, name, outer)
                self.emit(self.assign(local, self.load(outer or "missing")))
                if outer in self.state.defined:
                    self.define(local)
            elif source == MISSING:
                missing.append(self.store(local))
            elif source == FROM_CONTEXT and (looks_again or local[:2] != "c_"):
                value = self.from_context(name, early=scope.notes[name] == READ)
                if local[:2] == "c_":
                    again.append(self.assign(local, value))
                    if local in self.state.dict_aliases:
                        again.append(self.assign(self.state.dict_aliases[local], self.dict_or_empty(local)))
                else:
                    self.emit(self.assign(local, value))
        if missing:
            self.emit(self.assign(missing, self.runtime("missing")))
        if again:
            self.emit(self.when(self.dotted(self.context, "seen"), again))

    def from_context(self, name: str, *, early: bool) -> ast.expr:
        """Code for what the context has under a name."""
        if self.reference != self.context:
            return self.call(self.dotted(self.reference, "resolve"), [self.constant(name)])
        if not self.settings.fast_context:
            return self.call_name("resolve", self.constant(name))
        self.state.function.looks_up = True
        early = early and self.early(name)
        if early and len(self.state.function.hoisted) > _MANY:
            return self.call_name("_find", self.constant(name))
        otherwise = self.undefined(name) if early else self.runtime("missing")
        given = self.in_dict("_given", name, otherwise)
        return self.in_dict("_set", name, given)

    def in_dict(self, local: str, key: str, otherwise: ast.expr) -> ast.expr:
        """``local[key] if key in local else otherwise``."""
        test = self.compare(self.constant(key), IN, self.load(local))
        return self.choose(test, self.subscript(self.load(local), self.constant(key)), otherwise)

    def prologue(self, function: Function, *, outermost: bool) -> list[ast.stmt]:
        """Return what a function has to do before its body; called when the body is made."""
        outer, self.out = self.out, []
        pending, self.pending = self.pending, []
        lookups = [
            (local, self.from_context(name, early=True))
            for name, local in function.hoisted.items()
            if name in function.used
        ]
        if function.looks_up and self.settings.fast_context:
            self.emit(self.assign("_set", self.dotted(self.context, "vars")))
            self.emit(self.assign("_given", self.dotted(self.context, "parent")))
            if len(function.hoisted) > _MANY:
                self.emit(self.assign("_find", self.call_runtime("_finder", self.load(self.context))))
        elif outermost and not self.settings.fast_context:
            self.emit(self.assign("resolve", self.call_runtime("_resolver", self.load(self.context))))
        if outermost:
            for names, kind in ((self.filter_names, "filters"), (self.test_names, "tests")):
                for name in getattr(function, kind):
                    found = self.dotted("environment", kind)
                    fallback = self.call_runtime("_absent", self.constant(kind[:-1]), self.constant(name))
                    test = self.compare(self.constant(name), IN, found)
                    item = self.subscript(self.dotted("environment", kind), self.constant(name))
                    self.emit(self.assign(names[name], self.choose(test, item, fallback)))
        for local, value in lookups:
            self.emit(self.assign(local, value))
            self.alias_dict(local)
        made, self.out, self.pending = self.out, outer, pending
        return made

    def alias_dict(self, local: str) -> None:
        """Emit the local that stands for `local` where that is a plain dict, if attributes of it are read often."""
        alias = self.state.dict_aliases.get(local)
        if alias is not None:
            self.emit(self.assign(alias, self.dict_or_empty(local)))

    def alias_reads(self, function: Function) -> None:
        """Choose the names whose attributes are read often enough to look only once whether they are dicts."""
        if self.settings.fuse and self.settings.fast_getattr and self.settings.fast_context:
            for name, count in function.reads.items():
                if count >= 2:
                    self.state.dict_aliases[f"c_{name}"] = f"d_{name}"

    def dict_or_empty(self, local: str) -> ast.expr:
        """``local if type(local) is dict else _empty``."""
        test = self.compare(self.call_name("type", self.load(local)), IS, self.load("dict"))
        return self.choose(test, self.load(local), self.runtime("_empty"))

    # Assignments

    def target(self, node: nodes.Node, names: list[str]) -> ast.expr:
        """Code for what is assigned to; adds the names set to `names`."""
        if isinstance(node, nodes.Name):
            names.append(node.name)
            return self.store(self.local(node.name))
        if isinstance(node, nodes.NSRef):
            return self.subscript_store(self.load(self.local(node.name)), node.attr)
        if isinstance(node, (nodes.Tuple, nodes.List)):
            return self.tuple_of([self.target(item, names) for item in node.items], stored=True)
        return self.fail(f"can't assign to {type(node).__name__}", node.lineno)

    def assign_node(self, node: nodes.Assign) -> None:
        """``{% set a, b = value %}``."""
        self.check_namespaces(node.target)
        value = self.expr(node.node)
        names: list[str] = []
        self.emit(self.assign(self.target(node.target, names), value))
        self.assigned(names)

    def check_namespaces(self, target: nodes.Node) -> None:
        """Emit the check that what gets an attribute is a namespace."""
        seen = set()
        for ref in [target] if isinstance(target, nodes.NSRef) else target.find_all(nodes.NSRef):
            if ref.name in seen:
                continue
            seen.add(ref.name)
            kind = self.call_name("type", self.load(self.local(ref.name)))
            check = self.statement(self.call_runtime("_namespace_of", self.load(self.local(ref.name))))
            self.emit(self.when(self.compare(kind, IS_NOT, self.runtime("_Namespace")), [check]))

    def assigned(self, names: Sequence[str]) -> None:
        """Emit what makes assigned names known beyond the function: exports, and the context that functions get."""
        for name in names:
            self.define(self.local(name))
            self.state.dict_aliases.pop(self.local(name), None)
            self.state.str_aliases.pop(self.local(name), None)
        scope = self.scope
        if not (names and (scope.toplevel or scope.loop or scope.block)):
            return
        names = sorted(set(names))
        if scope.loop:
            if not self.state.function.shows_context and self.settings.fuse:
                return  # nobody will ask
            where = self.load("_loop_vars")
        elif scope.block:
            if not self.state.function.shows_context and self.settings.fuse:
                return
            where = self.load("_block_vars")
        else:
            where = self.dotted(self.context, "vars")
        self.emit(self.stored(where, names))
        public = [name for name in names if name[:1] != "_"]
        if scope.toplevel and not scope.loop and public:
            self.emit(self.exported("add", "update", public))

    def stored(self, where: ast.expr, names: Sequence[str]) -> ast.stmt:
        """``where[name] = local`` for each name."""
        if len(names) == 1:
            return self.assign(self.subscript_store(where, names[0]), self.load(self.local(names[0])))
        pairs = self.dict_of([(name, self.load(self.local(name))) for name in names])
        return self.statement(self.call(self.attribute(where, "update"), [pairs]))

    def exported(self, one: str, several: str, names: Sequence[str]) -> ast.stmt:
        """A change of the context's exported names."""
        exported = self.dotted(self.context, "exported_vars")
        if len(names) == 1:
            return self.statement(self.call(self.attribute(exported, one), [self.constant(names[0])]))
        listed = self.tuple_of([self.constant(name) for name in names])
        return self.statement(self.call(self.attribute(exported, several), [listed]))

    def assign_block(self, node: nodes.AssignBlock) -> None:
        """``{% set a %}…{% endset %}``."""
        self.check_namespaces(node.target)
        guard, self.state.guard_output = self.state.guard_output, False
        scope = self.analysis.scopes[id(node), ""]
        names: list[str] = []
        with self.entered(scope), self.buffered():
            self.body(node.body)
            self.line = node.lineno or self.line
            value = self.contents(self.buffer)
            if node.filter is not None:
                self.captured = self.captured_text()
                value = self.filter(node.filter)
            if self.pending:
                self.flush()
        self.state.guard_output = guard
        if self.eval_ctx.volatile or self.analysis.modifies_eval_context or not self.settings.direct_macros:
            value = self.marked(value)
        elif self.eval_ctx.autoescape:
            value = self.call_runtime("Markup", value)
        self.emit(self.assign(self.target(node.target, names), value))
        self.assigned(names)

    # Branches

    def if_node(self, node: nodes.If) -> None:
        """``{% if %}``: a test that is known now leaves the branch that is taken."""
        soft, self.state.soft = self.state.soft, True
        self.state.branch += 1
        arms: list[_Arm] = [(node.test, node.body, node.lineno or self.line)]
        arms += [(arm.test, arm.body, arm.lineno or self.line) for arm in node.elif_]
        if node.else_:
            arms.append((None, node.else_, self.line))
        if self.static:
            arms = self.reachable(arms)
        self.arms(arms)
        self.state.branch -= 1
        self.state.soft = soft

    def reachable(self, arms: list[_Arm]) -> list[_Arm]:
        """Leave out the arms whose tests are known to fail, and what follows one that is known to hold."""
        kept: list[_Arm] = []
        for test, body, line in arms:
            known = None if test is None else self.decided(test)
            if known is False:
                continue
            if known is True:
                kept.append((None, body, line))
                break
            kept.append((test, body, line))
        return kept

    def arms(self, arms: list[_Arm]) -> None:
        """Emit a chain of tests; made from its end, so that its length costs no recursion here."""
        if not arms:
            return
        if arms[0][0] is None:
            self.body(arms[0][1])
            return
        made: list[_Made] = []
        orelse: list[ast.stmt] = []
        if self.pending:
            self.flush()
        for test, body, line in arms:
            self.line = line
            condition = None if test is None else self.expr(test)
            with self.block() as statements:
                self.body(body)
            if condition is None:
                orelse = statements
            else:
                made.append((condition, statements, line))
        if len(made) > _DEEPEST:
            self.flat(made, orelse)
            return
        for condition, statements, line in reversed(made):
            self.line = line
            orelse = [self.when(condition, statements, orelse)]
        self.emit(orelse[0])

    def flat(self, made: list[_Made], orelse: list[ast.stmt]) -> None:
        """Emit a chain too long for Python's compiler to nest: each arm tells the next ones that it was taken.

        Groups of arms are nested, and follow each other while none was taken.
        """
        self.buffers += 1
        taken = f"_taken{self.buffers}"
        self.emit(self.assign(taken, self.constant(value=True)))
        groups = [made[start : start + _DEEPEST] for start in range(0, len(made), _DEEPEST)]
        for number, group in enumerate(groups):
            last = [self.assign(taken, self.constant(value=False))]
            for condition, statements, line in reversed(group):
                self.line = line
                last = [self.when(condition, statements, last)]
            if number:
                begin = [self.assign(taken, self.constant(value=True)), *last]
                self.emit(self.when(self.negate(self.load(taken)), begin))
            else:
                self.emit(last[0])
        if orelse:
            self.emit(self.when(self.negate(self.load(taken)), orelse))

    # The rest

    def with_node(self, node: nodes.With) -> None:
        """``{% with a = value %}``; the values are those of the scope around."""
        values = [self.expr(value) for value in node.values]
        with self.entered(self.analysis.scopes[id(node), ""]):
            for target, value in zip(node.targets, values, strict=True):
                self.emit(self.assign(self.target(target, []), value))
            self.body(node.body)

    def expression_statement(self, node: nodes.ExprStmt) -> None:
        """``{% do f() %}``."""
        self.emit(self.statement(self.expr(node.node)))

    def filter_block(self, node: nodes.FilterBlock) -> None:
        """``{% filter upper %}…{% endfilter %}``."""
        scope = self.analysis.scopes[id(node), ""]
        with self.entered(scope):
            with self.buffered():
                self.body(node.body)
                self.line = node.lineno or self.line
                self.captured = self.captured_text()
                value = self.filter(node.filter)
                if self.pending:
                    self.flush()
            self.put(value)  # as it is, even where escaping is on

    def captured_text(self) -> ast.expr:
        """What the filter block around has put out so far."""
        if self.pending:
            self.flush()
        text = self.contents(self.buffer)
        if self.eval_ctx.volatile:
            autoescape = self.dotted(self.context, "eval_ctx", "autoescape")
            return self.choose(autoescape, self.call_runtime("Markup", text), self.contents(self.buffer))
        return self.call_runtime("Markup", text) if self.eval_ctx.autoescape else text

    def scope_node(self, node: nodes.Scope) -> None:
        """A scope made by an extension."""
        with self.entered(self.analysis.scopes[id(node), ""]):
            self.body(node.body)

    def overlay_scope(self, node: nodes.OverlayScope) -> None:
        """A scope made by an extension, whose names come from a dict."""
        self.buffers += 1
        context = f"_ctx{self.buffers}"
        self.emit(self.assign(context, self.derived()))
        variables = ast.Attribute(self.load(context), "vars", ast.Store(), lineno=self.line, col_offset=0)
        self.emit(self.assign(variables, self.expr(node.context)))
        outer, self.reference = self.reference, context
        try:
            with self.entered(self.analysis.scopes[id(node), ""]):
                self.body(node.body)
        finally:
            self.reference = outer

    def modify_eval_context(self, node: nodes.EvalContextModifier) -> None:
        """Change escaping from here on."""
        for keyword in node.options:
            target = self.dotted(self.context, "eval_ctx")
            stored = ast.Attribute(target, keyword.key, ast.Store(), lineno=self.line, col_offset=0)
            self.emit(self.assign(stored, self.expr(keyword.value)))
            try:
                value = keyword.value.as_const(self.eval_ctx)
            except nodes.Impossible:
                self.eval_ctx.volatile = True
            else:
                setattr(self.eval_ctx, keyword.key, value)

    def scoped_eval_context(self, node: nodes.ScopedEvalContextModifier) -> None:
        """Change escaping for a body."""
        self.buffers += 1
        saved_name = f"_saved{self.buffers}"
        saved = self.eval_ctx.save()
        save = self.dotted(self.context, "eval_ctx", "save")
        self.emit(self.assign(saved_name, self.call(save, [])))
        self.modify_eval_context(node)
        self.body(node.body)
        self.eval_ctx.revert(saved)
        revert = self.dotted(self.context, "eval_ctx", "revert")
        self.emit(self.statement(self.call(revert, [self.load(saved_name)])))

    def break_node(self, node: nodes.Break) -> None:  # noqa: ARG002  (the table's signature)
        """``{% break %}``."""
        self.emit(ast.Break(lineno=self.line, col_offset=0))

    def continue_node(self, node: nodes.Continue) -> None:  # noqa: ARG002  (the table's signature)
        """``{% continue %}``."""
        self.emit(ast.Continue(lineno=self.line, col_offset=0))


_DEEPEST = 60

_MANY = 64
"""Names from which on a function looks them up by a call: quicker to compile, and as quick as Jinja2's to run."""

# SPDX-License-Identifier: Apache-2.0
"""Code generation for statements except loops, macros and inheritance, and for entering and leaving scopes."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
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

_Arm = tuple[nodes.Node | None, list[nodes.Node], int]
_Made = tuple[ast.expr, list[ast.stmt], int]


class Unreachable(Exception):  # noqa: N818  (ends the compilation of a body; not an error)
    """The rest of the current body can't be reached."""


class Statements(Output):
    """The code generator for statements; methods for nodes take a node and emit its code."""

    def body(self, statements: Iterable[nodes.Node]) -> None:
        """Emit statements; those after an unreachable point are left out."""
        methods = self.methods
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

    def begin_function(self, node: Any, *, in_block: bool = True) -> Function:
        """Start the function of a template, a block or a region; return its analysis."""
        function = self.analysis.functions[id(node)]
        self.state, self.scope = FunctionState(function), self.analysis.scopes[id(node), ""]
        self.out, self.buffer = [], None
        self.in_block = in_block
        if in_block:
            self.known_extends = False
        self.alias_reads(function)
        return function

    def entry(self, name: str) -> str:
        """Return the name of a function of the module for the current form."""
        form = self.settings.form
        return name if form == "render" else f"{name}_{form}"

    # Scopes

    @contextmanager
    def entered(self, scope: Scope, *, leave: bool = True, first: bool = False) -> Iterator[None]:
        """Enter a scope and emit the first values of its names; leave the scope at the end.

        `first` says that the scope is the first one of a function, whose names are looked up by the prologue.
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
        """Emit the removal of the scope's values, if a macro that is called later could still read them."""
        if scope.captured:
            gone = [local for local, _, _ in scope.resolve().values() if local[:2] == "l_"]
            if gone:
                self.emit("$gone = $missing", gone=gone)

    def enter(self, scope: Scope, *, first: bool = False) -> None:
        """Emit the first values of a scope's names."""
        missing: list[str] = []
        again: list[ast.stmt] = []
        looks_again = self.state.function.shows_context and not first
        for name, (local, source, outer) in scope.resolve().items():
            self.state.defined.discard(local)
            if source == GIVEN or name in self.static:
                continue
            if source == FROM_OUTER:
                self.use_hoisted(scope.parent, name, outer)
                self.emit("$local = $outer", local=local, outer=outer)
                if outer in self.state.defined:
                    self.define(local)
            elif source == MISSING:
                missing.append(local)
            elif source == FROM_CONTEXT and (looks_again or local[:2] != "c_"):
                value = self.from_context(name, early=scope.notes[name] == READ)
                if local[:2] == "c_":
                    again += self.lines("$local = $value", local=local, value=value) + self.alias_dict(local)
                else:
                    self.emit("$local = $value", local=local, value=value)
        if missing:
            self.emit("$names = $missing", names=missing)
        if again:
            self.emit("if $ctx.seen: $again", again=again)

    def from_context(self, name: str, *, early: bool) -> ast.expr:
        """Return the code that looks up a name in the context."""
        if self.reference != self.context:
            return self.code("$reference.resolve('$name')", reference=self.reference, name=name)
        if not self.settings.fast_context:
            return self.code("resolve('$name')", name=name)
        self.state.function.looks_up = True
        early = early and self.early(name)
        if early and len(self.state.function.hoisted) > _MANY:
            return self.code("_find('$name')", name=name)
        otherwise = self.undefined(name) if early else self.runtime("missing")
        pattern = "_set[$key] if $key in _set else _given[$key] if $key in _given else $otherwise"
        return self.code(pattern, key=self.constant(name), otherwise=otherwise)

    def prologue(self, function: Function, *, outermost: bool) -> list[ast.stmt]:
        """Return the statements before the body of a function; call this after the body has been generated."""
        lookups: list[ast.stmt] = []
        for name, local in function.hoisted.items():
            if name in function.used:
                lookups += self.lines("$local = $value", local=local, value=self.from_context(name, early=True))
                lookups += self.alias_dict(local)
        begin: list[ast.stmt] = []
        if function.looks_up and self.settings.fast_context:
            begin += self.lines("_set = $ctx.vars\n_given = $ctx.parent")
            if len(function.hoisted) > _MANY:
                begin += self.lines("_find = $_finder($ctx)")
        elif outermost and not self.settings.fast_context:
            begin += self.lines("resolve = $_resolver($ctx)")
        if outermost:
            pattern = (
                "$local = environment.$table['$name'] if '$name' in environment.$table else $_absent('$kind', '$name')"
            )
            for locals_, table in ((self.filter_names, "filters"), (self.test_names, "tests")):
                for name in getattr(function, table):
                    begin += self.lines(pattern, local=locals_[name], name=name, table=table, kind=table[:-1])
        return begin + lookups

    def alias_dict(self, local: str) -> list[ast.stmt]:
        """Return the statements that set the dict alias of a local; none if the local has no alias."""
        alias = self.state.dict_aliases.get(local)
        return [] if alias is None else self.lines(_DICT_OR_EMPTY, alias=alias, local=local)

    def alias_reads(self, function: Function) -> None:
        """Choose the names that get a dict alias, because their attributes are read at least twice."""
        if self.settings.fuse and self.settings.fast_getattr and self.settings.fast_context:
            for name, count in function.reads.items():
                if count >= 2:
                    self.state.dict_aliases[f"c_{name}"] = f"d_{name}"

    # Assignments

    def target(self, node: nodes.Node, names: list[str]) -> ast.expr:
        """Return the code for the target of an assignment; append the names that it sets to `names`."""
        if isinstance(node, nodes.Name):
            names.append(node.name)
            return self.store(self.local(node.name))
        if isinstance(node, nodes.NSRef):
            name, key = self.load(self.local(node.name)), self.constant(node.attr)
            return ast.Subscript(name, key, ast.Store(), lineno=self.line, col_offset=0)
        if isinstance(node, (nodes.Tuple, nodes.List)):
            return self.tuple_of([self.target(item, names) for item in node.items], stored=True)
        return self.fail(f"can't assign to {type(node).__name__}", node.lineno)

    def assign_node(self, node: nodes.Assign) -> None:
        """Emit ``{% set a, b = value %}``."""
        self.check_namespaces(node.target)
        value = self.expr(node.node)
        names: list[str] = []
        self.emit("$target = $value", target=self.target(node.target, names), value=value)
        self.assigned(names)

    def check_namespaces(self, target: nodes.Node) -> None:
        """Emit a check that each object whose attribute is set is a namespace."""
        seen = set()
        for ref in [target] if isinstance(target, nodes.NSRef) else target.find_all(nodes.NSRef):
            if ref.name in seen:
                continue
            seen.add(ref.name)
            self.emit("if type($local) is not $_Namespace: $_namespace_of($local)", local=self.local(ref.name))

    def assigned(self, names: Sequence[str]) -> None:
        """Emit the code that makes assigned names visible outside the function, in exports and in the context."""
        for name in names:
            self.define(self.local(name))
            self.state.dict_aliases.pop(self.local(name), None)
            self.state.str_aliases.pop(self.local(name), None)
        scope = self.scope
        if not (names and (scope.toplevel or scope.loop or scope.block)):
            return
        names = sorted(set(names))
        if scope.loop or scope.block:
            if not self.state.function.shows_context and self.settings.fuse:
                return  # nothing reads them
            self.store_in(self.load("_loop_vars" if scope.loop else "_block_vars"), names)
        else:
            self.store_in(self.dotted(self.context, "vars"), names)
        if scope.toplevel and not scope.loop:
            self.export(names, "update")

    def store_in(self, where: ast.expr, names: Sequence[str]) -> None:
        """Emit ``where[name] = local`` for each name."""
        if len(names) == 1:
            self.emit("$where['$name'] = $local", where=where, name=names[0], local=self.local(names[0]))
        else:
            pairs = self.dict_of([(name, self.load(self.local(name))) for name in names])
            self.emit("$where.update($pairs)", where=where, pairs=pairs)

    def export(self, names: Sequence[str], method: str) -> None:
        """Emit a change of the context's exported names; names that start with an underscore are never exported."""
        public = [self.constant(name) for name in names if name[:1] != "_"]
        if public:
            self.emit("$ctx.exported_vars.$method(($public,))", method=method, public=public)

    def assign_block(self, node: nodes.AssignBlock) -> None:
        """Emit ``{% set a %}…{% endset %}``."""
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
            self.flush()
        self.state.guard_output = guard
        if self.eval_ctx.volatile or self.analysis.modifies_eval_context or not self.settings.direct_macros:
            value = self.marked(value)
        else:
            value = self.marked_result(value)
        self.emit("$target = $value", target=self.target(node.target, names), value=value)
        self.assigned(names)

    # Branches

    def if_node(self, node: nodes.If) -> None:
        """Emit ``{% if %}``; branches that a test known at compile time excludes are left out."""
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
        """Return the arms that can be reached: without those whose test is known to fail or that follow a true one."""
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
        """Emit a chain of tests; it is built from the end, so that a long chain causes no recursion in this method."""
        if not arms:
            return
        if arms[0][0] is None:
            self.body(arms[0][1])
            return
        made: list[_Made] = []
        orelse: list[ast.stmt] = []
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
            orelse = self.lines(_IF, test=condition, body=statements, orelse=orelse)
        self.out += orelse

    def flat(self, made: list[_Made], orelse: list[ast.stmt]) -> None:
        """Emit a chain that is too long for Python's compiler to nest.

        The arms are nested in groups. A local says whether an arm was taken; the next group is tried only if none was.
        """
        taken = self.numbered("_taken")
        self.emit("$taken = True", taken=taken)
        for start in range(0, len(made), _DEEPEST):
            group = self.lines("$taken = False", taken=taken)
            for condition, statements, line in reversed(made[start : start + _DEEPEST]):
                self.line = line
                group = self.lines(_IF, test=condition, body=statements, orelse=group)
            if start:
                self.emit("if not $taken:\n    $taken = True\n    $group", taken=taken, group=group)
            else:
                self.emit("$group", group=group)
        if orelse:
            self.emit("if not $taken: $orelse", taken=taken, orelse=orelse)

    # The rest

    def with_node(self, node: nodes.With) -> None:
        """Emit ``{% with a = value %}``; the values are evaluated in the enclosing scope."""
        values = [self.expr(value) for value in node.values]
        with self.entered(self.analysis.scopes[id(node), ""]):
            for target, value in zip(node.targets, values, strict=True):
                self.emit("$target = $value", target=self.target(target, []), value=value)
            self.body(node.body)

    def expression_statement(self, node: nodes.ExprStmt) -> None:
        """Emit ``{% do f() %}``."""
        self.emit("$value", value=self.expr(node.node))

    def filter_block(self, node: nodes.FilterBlock) -> None:
        """Emit ``{% filter upper %}…{% endfilter %}``."""
        scope = self.analysis.scopes[id(node), ""]
        with self.entered(scope):
            with self.buffered():
                self.body(node.body)
                self.line = node.lineno or self.line
                self.captured = self.captured_text()
                value = self.filter(node.filter)
                self.flush()
            self.put(value)  # not escaped, even if escaping is on

    def scope_node(self, node: nodes.Scope) -> None:
        """Emit a scope made by an extension."""
        with self.entered(self.analysis.scopes[id(node), ""]):
            self.body(node.body)

    def overlay_scope(self, node: nodes.OverlayScope) -> None:
        """Emit a scope made by an extension whose names come from a dict."""
        context = self.numbered("_ctx")
        self.emit("$context = $derived", context=context, derived=self.derived())
        self.emit("$context.vars = $variables", context=context, variables=self.expr(node.context))
        outer, self.reference = self.reference, context
        try:
            with self.entered(self.analysis.scopes[id(node), ""]):
                self.body(node.body)
        finally:
            self.reference = outer

    def modify_eval_context(self, node: nodes.EvalContextModifier) -> None:
        """Emit a change of the eval context (escaping) from this point on."""
        for keyword in node.options:
            self.emit("$ctx.eval_ctx.$name = $value", name=keyword.key, value=self.expr(keyword.value))
            try:
                value = keyword.value.as_const(self.eval_ctx)
            except nodes.Impossible:
                self.eval_ctx.volatile = True
            else:
                setattr(self.eval_ctx, keyword.key, value)

    def scoped_eval_context(self, node: nodes.ScopedEvalContextModifier) -> None:
        """Emit a change of the eval context (escaping) for a body."""
        name = self.numbered("_saved")
        saved = self.eval_ctx.save()
        self.emit("$name = $ctx.eval_ctx.save()", name=name)
        self.modify_eval_context(node)
        self.body(node.body)
        self.eval_ctx.revert(saved)
        self.emit("$ctx.eval_ctx.revert($name)", name=name)

    def break_node(self, node: nodes.Break) -> None:  # noqa: ARG002  (the table's signature)
        """Emit ``{% break %}``."""
        self.emit("break")

    def continue_node(self, node: nodes.Continue) -> None:  # noqa: ARG002  (the table's signature)
        """Emit ``{% continue %}``."""
        self.emit("continue")


_IF = "if $test: $body\nelse: $orelse"
_DICT_OR_EMPTY = "$alias = $local if type($local) is dict else $_empty"
"""The alias is the value if that is a plain dict, otherwise an empty dict."""

_DEEPEST = 60

_MANY = 64
"""With more names, a function looks them up by calls, which are quicker to compile and as fast as Jinja2's code."""

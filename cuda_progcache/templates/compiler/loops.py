# SPDX-License-Identifier: Apache-2.0
"""``{% for %}``: a plain Python loop where the template doesn't need the loop object itself."""

from __future__ import annotations

import ast
from typing import Any

from jinja2 import nodes

from cuda_progcache.templates.compiler.expressions import Counters
from cuda_progcache.templates.compiler.scopes import SIZING, Loop
from cuda_progcache.templates.compiler.statements import Statements
from cuda_progcache.templates.compiler.tree import GE, IS

_OFTEN = 2
"""Reads from which on a target gets a local with its text, or with the dict that it is."""


class Loops(Statements):
    """Code for loops."""

    def for_node(self, node: nodes.For) -> None:
        """``{% for %}`` with its test, its else, and what it reads of ``loop``."""
        loop = self.analysis.loops[id(node)]
        if node.recursive:
            self.recursive(node, loop)
            return
        iterable = self.expr(node.iter)
        self.around(node, loop, iterable, has_object=loop.needs_object and bool(loop.attributes), recursive=False)

    def recursive(self, node: nodes.For, loop: Loop) -> None:
        """A loop that its body can call with other items: a function."""
        asynchronous = self.settings.asynchronous
        with self.block() as body, self.in_function(self.nested_state()), self.buffered():
            number = self.buffer
            self.around(node, loop, self.load("reciter"), has_object=True, recursive=True)
            self.line = node.lineno or self.line
            text = self.contents(number)
            if self.eval_ctx.volatile:
                autoescape = self.dotted(self.context, "eval_ctx", "autoescape")
                text = self.choose(autoescape, self.call_runtime("Markup", text), self.contents(number))
            elif self.eval_ctx.autoescape:
                text = self.call_runtime("Markup", text)
            self.emit(self.returns(text))
        self.buffers += 1
        name = f"loop{self.buffers}"
        parameters = ["reciter", "loop_render_func", "depth"]
        self.emit(self.function_def(name, parameters, body, defaults=[self.constant(0)], asynchronous=asynchronous))
        items = self.expr(node.iter)
        if asynchronous:
            items = self.call_runtime("auto_aiter", items)
        value = self.call_name(name, items, self.load(name))
        self.put(self.awaits(value) if asynchronous else value)

    def around(self, node: nodes.For, loop: Loop, iterable: ast.expr, *, has_object: bool, recursive: bool) -> None:
        """Emit the loop over `iterable`, with what has to be before and after."""
        scope = self.analysis.scopes[id(node), "body"]
        asynchronous = self.settings.asynchronous
        none_yet = ""
        if node.else_:
            self.buffers += 1
            none_yet = f"_none{self.buffers}"
            self.emit(self.assign(none_yet, self.constant(value=True)))
        test_inside = not has_object and not asynchronous
        if node.test is not None and not test_inside:
            iterable = self.filtered(node, iterable)
        counters = None if loop.needs_object else self.count(loop)
        if has_object:
            target, iterable = self.with_object(node, iterable, recursive=recursive)
        else:
            target, iterable = self.heading(node, loop, counters, iterable)
        with self.block() as body:
            if node.test is not None and test_inside:
                self.skip_failing(node, counters)
            self.inside(node, loop)
            if none_yet:
                self.emit(self.assign(none_yet, self.constant(value=False)))
        self.line = node.lineno or self.line
        statements = body or [ast.Pass(lineno=self.line, col_offset=0)]
        self.emit(self.for_loop(target, iterable, statements, asynchronous=asynchronous))
        if not recursive:
            self.leave(scope)
        if none_yet:
            with self.block() as otherwise, self.entered(self.analysis.scopes[id(node), "else"]):
                self.body(node.else_)
            self.emit(self.when(self.load(none_yet), otherwise))

    def heading(
        self, node: nodes.For, loop: Loop, counters: Counters | None, iterable: ast.expr
    ) -> tuple[ast.expr, ast.expr]:
        """Return target and iterable of a loop that has no loop object."""
        target = self.loop_target(node)
        if self.settings.asynchronous:
            return target, self.call_runtime("auto_aiter", iterable)
        if counters is not None:
            iterable = self.sized(loop, counters, iterable)
        if self.counts(node, loop):
            (name,) = loop.targets
            text = f"s_{self.analysis.scopes[id(node), 'body'].level}_{name}"
            target = self.tuple_of([target, self.store(text)], stored=True)
            iterable = self.call_runtime("_texts", iterable)
        if counters is None:
            return target, iterable
        if node.test is not None:
            self.emit(self.assign(counters.index, self.constant(0)))
            return target, iterable
        target = self.tuple_of([self.store(counters.index), target], stored=True)
        return target, self.call_name("enumerate", iterable, self.constant(1))

    def counts(self, node: nodes.For, loop: Loop) -> bool:
        """Whether the loop goes through ``range(…)`` and puts out the numbers: then they come with their texts."""
        items, target = node.iter, node.target
        return (
            isinstance(items, nodes.Call)
            and isinstance(items.node, nodes.Name)
            and items.node.name == "range"
            and isinstance(target, nodes.Name)
            and loop.printed.get(target.name, 0) > 0
            and not self.analysis.scopes[id(node), "body"].assigned.get(target.name)
            and not loop.needs_object
            and self.settings.fuse
            and self.environment.finalize is None
        )

    def loop_target(self, node: nodes.For) -> ast.expr:
        """Code for what the items are assigned to: names of the body's scope."""
        outer, self.scope = self.scope, self.analysis.scopes[id(node), "body"]
        target = self.target(node.target, [])
        self.scope = outer
        return target

    def inside(self, node: nodes.For, loop: Loop) -> None:
        """The body of the loop."""
        made = self.analysis.scopes[id(node), "body"]
        strings, dicts = dict(self.state.str_aliases), dict(self.state.dict_aliases)
        with self.entered(made, leave=False):
            if self.state.function.sets_in_loop and (self.state.function.shows_context or not self.settings.fuse):
                self.emit(self.assign("_loop_vars", ast.Dict([], [], lineno=self.line, col_offset=0)))
            if self.settings.fuse and not self.settings.asynchronous:
                self.alias_targets(node, loop, made.level)
            self.body(node.body)
        self.state.str_aliases, self.state.dict_aliases = strings, dicts

    def alias_targets(self, node: nodes.For, loop: Loop, level: int) -> None:
        """Emit locals for the text of a whole number and for the dict that a target is, where they are read often."""
        for name in sorted(loop.targets):
            local = f"l_{level}_{name}"
            self.state.str_aliases.pop(local, None)
            self.state.dict_aliases.pop(local, None)
            if self.scope.assigned.get(name):
                continue
            if self.counts(node, loop):
                self.state.str_aliases[local] = f"s_{level}_{name}"
            elif loop.printed.get(name, 0) >= _OFTEN and self.environment.finalize is None:
                alias = f"s_{level}_{name}"
                test = self.compare(self.call_name("type", self.load(local)), IS, self.load("int"))
                text = self.choose(test, self.call_name("str", self.load(local)), self.load(local))
                self.emit(self.assign(alias, text))
                self.state.str_aliases[local] = alias
            if loop.dotted.get(name, 0) >= _OFTEN and self.settings.fast_getattr:
                alias = f"d_{level}_{name}"
                self.emit(self.assign(alias, self.dict_or_empty(local)))
                self.state.dict_aliases[local] = alias

    # The test

    def skip_failing(self, node: nodes.For, counters: Counters | None) -> None:
        """Emit ``if not test: continue``, and the counting of those that pass."""
        test: Any = node.test
        line, self.line = self.line, test.lineno or self.line
        with self.entered(self.analysis.scopes[id(node), "test"], leave=False):
            failed = self.negate(self.expr(test))
            self.emit(self.when(failed, [ast.Continue(lineno=self.line, col_offset=0)]))
        self.line = line
        if counters is not None:
            self.emit(self.assign(counters.index, self.plus_one(self.load(counters.index))))

    def filtered(self, node: nodes.For, iterable: ast.expr) -> ast.expr:
        """Emit a generator of the items that pass the test; return its call."""
        test: Any = node.test
        asynchronous = self.settings.asynchronous
        self.buffers += 1
        name = f"_passing{self.buffers}"
        scope = self.analysis.scopes[id(node), "test"]
        line, self.line = self.line, test.lineno or self.line
        with self.block() as function, self.in_function(self.nested_state()):
            with self.block() as body, self.entered(scope, leave=False):
                passes = self.expr(test)
                self.emit(self.when(passes, [self.yields(self.loaded(node.target, scope.level))]))
            outer_scope, self.scope = self.scope, scope
            target = self.target(node.target, [])
            self.scope = outer_scope
            source: ast.expr = self.load("fiter")
            if asynchronous:
                source = self.call_runtime("auto_aiter", source)
            self.emit(self.for_loop(target, source, body, asynchronous=asynchronous))
        self.emit(self.function_def(name, ["fiter"], function, asynchronous=asynchronous))
        self.line = line
        return self.call_name(name, iterable)

    def loaded(self, target: nodes.Node, level: int) -> ast.expr:
        """The items of a loop's target as a value."""
        if isinstance(target, nodes.Name):
            return self.load(f"l_{level}_{target.name}")
        return self.tuple_of([self.loaded(item, level) for item in target.iter_child_nodes()])

    # What stands for the loop object

    def with_object(self, node: nodes.For, iterable: ast.expr, *, recursive: bool) -> tuple[ast.expr, ast.expr]:
        """Return target and iterable of a loop that has its loop object."""
        local = f"l_{self.analysis.scopes[id(node), 'body'].level}_loop"
        self.emit(self.assign(local, self.runtime("missing")))
        made = "AsyncLoopContext" if self.settings.asynchronous else "LoopContext"
        args = [iterable, self.dotted("environment", "undefined")]
        if recursive:
            args += [self.load("loop_render_func"), self.load("depth")]
        return self.tuple_of([self.loop_target(node), self.store(local)], stored=True), self.call_runtime(made, *args)

    def count(self, loop: Loop) -> Counters | None:
        """Return the locals for what the body reads of ``loop``; None if it reads nothing."""
        if not loop.attributes - {"", "depth", "depth0"}:
            return None
        self.buffers += 1
        number = self.buffers
        made = self.counters[id(loop)] = Counters(f"_i{number}", f"_n{number}", f"_of{number}")
        return made

    def sized(self, loop: Loop, counters: Counters, iterable: ast.expr) -> ast.expr:
        """Emit the number of items, if it is asked for; what has none is looked ahead in, an item at a time."""
        if not loop.attributes & SIZING:
            return iterable
        self.emit(self.assign(counters.items, iterable))
        items = self.load(counters.items)
        sized = "_fixed" if loop.calls else "_sized"
        is_sized = self.compare(self.call_name("type", items), ast.In(), self.runtime(sized))
        size = self.choose(is_sized, self.call_name("len", items), self.constant(-1))
        self.emit(self.assign(counters.size, size))
        known = self.compare(self.load(counters.size), GE, self.constant(0))
        ahead = self.call_runtime("_ahead", items)
        self.emit(self.assign(counters.items, self.choose(known, items, ahead)))
        return items

# SPDX-License-Identifier: Apache-2.0
"""Code generation for ``{% for %}``: a plain Python loop, unless the template needs the loop object itself."""

from __future__ import annotations

import ast
from typing import Any

from jinja2 import nodes

from cuda_progcache.templates.compiler.scopes import SIZING, Loop
from cuda_progcache.templates.compiler.statements import Statements

_OFTEN = 2
"""The minimum number of reads for which a target gets another local, with its text or for a dict."""


class Loops(Statements):
    """The code generator for loops."""

    def for_node(self, node: nodes.For) -> None:
        """Emit ``{% for %}`` with its test, its else, and the attributes of ``loop`` that it reads."""
        loop = self.analysis.loops[id(node)]
        if node.recursive:
            self.recursive(node, loop)
            return
        iterable = self.expr(node.iter)
        self.around(node, loop, iterable, has_object=loop.needs_object and bool(loop.attributes), recursive=False)

    def recursive(self, node: nodes.For, loop: Loop) -> None:
        """Emit a loop that its body can call with other items, as a function and its call."""
        with self.block() as body, self.in_function(self.nested_state()), self.buffered():
            self.around(node, loop, self.load("reciter"), has_object=True, recursive=True)
            self.line = node.lineno or self.line
            self.emit("return $text", text=self.captured_text())
        name = self.numbered("loop")
        self.emit("async def $name(reciter, loop_render_func, depth=0): $body", name=name, body=body)
        items = self.items(self.expr(node.iter))
        self.put(self.code("await $name($items, $name)", name=name, items=items))

    def items(self, iterable: ast.expr) -> ast.expr:
        """Return the code for the iterator of a loop."""
        return self.call_runtime("auto_aiter", iterable) if self.asynchronous else iterable

    def around(self, node: nodes.For, loop: Loop, iterable: ast.expr, *, has_object: bool, recursive: bool) -> None:
        """Emit the loop over `iterable`, with the statements before and after it."""
        scope = self.analysis.scopes[id(node), "body"]
        none_yet = self.numbered("_none") if node.else_ else ""
        if none_yet:
            self.emit("$none = True", none=none_yet)
        test_inside = not has_object and not self.asynchronous
        if node.test is not None and not test_inside:
            iterable = self.filtered(node, iterable)
        if not loop.needs_object and loop.attributes - {"", "depth", "depth0"}:
            self.buffers += 1
            self.counters[id(loop)] = self.buffers
        if has_object:
            target, iterable = self.with_object(node, iterable, recursive=recursive)
        else:
            target, iterable = self.heading(node, loop, iterable)
        with self.block() as body:
            if node.test is not None and test_inside:
                self.skip_failing(node, loop)
            self.inside(node, loop)
            if none_yet:
                self.emit("$none = False", none=none_yet)
        self.line = node.lineno or self.line
        self.emit("async for $target in $items: $body", target=target, items=iterable, body=body)
        if not recursive:
            self.leave(scope)
        if none_yet:
            with self.block() as otherwise, self.entered(self.analysis.scopes[id(node), "else"]):
                self.body(node.else_)
            self.emit("if $none: $otherwise", none=none_yet, otherwise=otherwise)

    def heading(self, node: nodes.For, loop: Loop, iterable: ast.expr) -> tuple[ast.expr, ast.expr]:
        """Return the target and iterable of a loop without a loop object."""
        target = self.loop_target(node)
        if self.asynchronous:
            return target, self.items(iterable)
        counted = id(loop) in self.counters
        if counted and loop.attributes & SIZING:
            iterable = self.sized(loop, iterable)
        if self.counts(node, loop):
            (name,) = loop.targets
            text = f"s_{self.analysis.scopes[id(node), 'body'].level}_{name}"
            target = self.tuple_of([target, self.store(text)], stored=True)
            iterable = self.call_runtime("_texts", iterable)
        if not counted:
            return target, iterable
        index = self.counted(loop)["i"]
        if node.test is not None:
            self.emit("$index = 0", index=index)
            return target, iterable
        target = self.tuple_of([self.store(index), target], stored=True)
        return target, self.code("enumerate($items, 1)", items=iterable)

    def counts(self, node: nodes.For, loop: Loop) -> bool:
        """Return whether a loop over ``range(…)`` puts out the numbers; it then iterates over numbers and texts."""
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
        """Return the target of a loop, whose names are in the scope of the body."""
        outer, self.scope = self.scope, self.analysis.scopes[id(node), "body"]
        target = self.target(node.target, [])
        self.scope = outer
        return target

    def inside(self, node: nodes.For, loop: Loop) -> None:
        """Emit the body of a loop."""
        made = self.analysis.scopes[id(node), "body"]
        strings, dicts = dict(self.state.str_aliases), dict(self.state.dict_aliases)
        with self.entered(made, leave=False):
            if self.state.function.sets_in_loop and (self.state.function.shows_context or not self.settings.fuse):
                self.emit("_loop_vars = {}")
            if self.settings.fuse and not self.asynchronous:
                self.alias_targets(node, loop, made.level)
            self.body(node.body)
        self.state.str_aliases, self.state.dict_aliases = strings, dicts

    def alias_targets(self, node: nodes.For, loop: Loop, level: int) -> None:
        """Emit locals for targets that are read often: one for the text of an integer, another for a dict."""
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
                self.emit("$alias = str($local) if type($local) is int else $local", alias=alias, local=local)
                self.state.str_aliases[local] = alias
            if loop.dotted.get(name, 0) >= _OFTEN and self.settings.fast_getattr:
                self.state.dict_aliases[local] = f"d_{level}_{name}"
                self.emit("$lines", lines=self.alias_dict(local))

    # The test

    def skip_failing(self, node: nodes.For, loop: Loop) -> None:
        """Emit ``if not test: continue``, and the count of the items that pass the test."""
        test: Any = node.test
        line, self.line = self.line, test.lineno or self.line
        with self.entered(self.analysis.scopes[id(node), "test"], leave=False):
            self.emit("if not $test: continue", test=self.expr(test))
        self.line = line
        if id(loop) in self.counters:
            self.emit("$index = $index + 1", index=self.counted(loop)["i"])

    def filtered(self, node: nodes.For, iterable: ast.expr) -> ast.expr:
        """Emit a generator of the items that pass the test; return a call of the generator."""
        test: Any = node.test
        name = self.numbered("_passing")
        scope = self.analysis.scopes[id(node), "test"]
        line, self.line = self.line, test.lineno or self.line
        with self.block() as function, self.in_function(self.nested_state()):
            with self.block() as body, self.entered(scope, leave=False):
                item = self.loaded(node.target, scope.level)
                self.emit("if $test: yield $item", test=self.expr(test), item=item)
            outer_scope, self.scope = self.scope, scope
            target = self.target(node.target, [])
            self.scope = outer_scope
            items = self.items(self.load("fiter"))
            self.emit("async for $target in $items: $body", target=target, items=items, body=body)
        self.emit("async def $name(fiter): $body", name=name, body=function)
        self.line = line
        return self.call_name(name, iterable)

    def loaded(self, target: nodes.Node, level: int) -> ast.expr:
        """Return the code that loads the target of a loop as a value."""
        if isinstance(target, nodes.Name):
            return self.load(f"l_{level}_{target.name}")
        return self.tuple_of([self.loaded(item, level) for item in target.iter_child_nodes()])

    # The loop object and its replacements

    def with_object(self, node: nodes.For, iterable: ast.expr, *, recursive: bool) -> tuple[ast.expr, ast.expr]:
        """Return the target and iterable of a loop with a loop object."""
        local = f"l_{self.analysis.scopes[id(node), 'body'].level}_loop"
        self.emit("$local = $missing", local=local)
        made = "AsyncLoopContext" if self.asynchronous else "LoopContext"
        args = [iterable, self.dotted("environment", "undefined")]
        if recursive:
            args += [self.load("loop_render_func"), self.load("depth")]
        return self.tuple_of([self.loop_target(node), self.store(local)], stored=True), self.call_runtime(made, *args)

    def sized(self, loop: Loop, iterable: ast.expr) -> ast.expr:
        """Emit code for the number of items; an iterable whose length isn't certain is put in a `LookAhead`."""
        self.emit("$of = $items", items=iterable, **self.counted(loop))
        items = self.load(self.counted(loop)["of"])
        types = self.runtime("_fixed" if loop.calls else "_sized")
        self.emit("$n = len($of) if type($of) in $types else -1", types=types, **self.counted(loop))
        self.emit("$of = $of if $n >= 0 else $_ahead($of)", **self.counted(loop))
        return items

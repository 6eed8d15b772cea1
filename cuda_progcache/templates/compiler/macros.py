# SPDX-License-Identifier: Apache-2.0
"""``{% macro %}`` and ``{% call %}``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuda_progcache.templates.compiler.loops import Loops
from cuda_progcache.templates.compiler.tree import IS

if TYPE_CHECKING:
    import ast

    from jinja2 import nodes

    from cuda_progcache.templates.compiler.scopes import Function


class Macros(Loops):
    """Code for macros: a Python function, and the object that templates see."""

    def macro(self, node: nodes.Macro) -> None:
        """``{% macro name(a, b=1) %}``."""
        self.buffers += 1
        name = f"macro{self.buffers}"
        facts = self.analysis.functions[id(node)]
        scope = self.scope
        once = scope.assigned.get(node.name) == 1 and scope.owner(node.name) is scope and not self.branch
        if once and self.settings.direct_macros and not self.analysis.modifies_eval_context and not self.in_block:
            self.direct_macros[id(scope), node.name] = (name, node, facts)
        self.macro_function(name, node, facts)
        local = self.local(node.name)
        targets: list[ast.expr] = [self.store(local)]
        if scope.toplevel:
            if not node.name.startswith("_"):
                self.emit(self.exported("add", "update", [node.name]))
            targets.insert(0, self.subscript_store(self.dotted(self.context, "vars"), node.name))
        self.emit(self.assign(targets, self.macro_object(name, node, node.name, facts)))
        self.define(local)

    in_block: bool

    def macro_object(
        self, function: str, node: nodes.Macro | nodes.CallBlock, name: str | None, facts: Function
    ) -> ast.expr:
        """The call that makes the object."""
        arguments = self.tuple_of([self.constant(arg.name) for arg in node.args])
        taken = {arg.name for arg in node.args}
        catches = [
            self.constant(value=special in facts.special and special not in taken) for special in ("kwargs", "varargs")
        ]
        caller = self.constant(value="caller" in facts.special)
        autoescape = self.dotted(self.context, "eval_ctx", "autoescape")
        return self.call_name(
            "Macro",
            self.load("environment"),
            self.load(function),
            self.constant(name),
            arguments,
            *catches,
            caller,
            autoescape,
        )

    def macro_function(self, name: str, node: nodes.Macro | nodes.CallBlock, facts: Function) -> None:
        """Emit the Python function."""
        scope = self.analysis.scopes[id(node), ""]
        names = [arg.name for arg in node.args]
        if "caller" in facts.special and "caller" in names and names.index("caller") < len(names) - len(node.defaults):
            self.fail(
                'When defining macros or call blocks the special "caller" argument must be omitted or be given a '
                "default.",
                node.lineno,
            )
        parameters = [f"l_{scope.level}_{arg}" for arg in names]
        parameters += [
            f"l_{scope.level}_{special}"
            for special in ("caller", "kwargs", "varargs")
            if special in facts.special and special not in names
        ]
        line = self.line
        outer_function, self.function = self.function, facts
        outer_guard, self.guard_output = self.guard_output, False
        outer_defined, self.defined = self.defined, set()
        outer_trail, self.trail = self.trail, []
        outer_dicts, self.dict_aliases = self.dict_aliases, {}
        outer_strings, self.str_aliases = self.str_aliases, {}
        self.alias_reads(facts)
        with self.block() as body, self.buffered():
            with self.entered(scope, leave=False, first=True):
                self.defaults(node, names, scope.level)
                self.body(node.body)
            self.line = line
            self.return_contents(body, 0)
        prologue = self.prologue(facts, outermost=False)
        self.function = outer_function
        self.guard_output = outer_guard
        self.defined, self.trail = outer_defined, outer_trail
        self.dict_aliases, self.str_aliases = outer_dicts, outer_strings
        self.emit(self.function_def(name, parameters, prologue + body, asynchronous=self.settings.asynchronous))

    def defaults(self, node: nodes.Macro | nodes.CallBlock, names: list[str], level: int) -> None:
        """Emit the values of arguments that are not given; each may use those before it."""
        locals_ = [f"l_{level}_{name}" for name in names]
        outer, self.unbound = self.unbound, {*self.unbound, *locals_}
        first_default = len(names) - len(node.defaults)
        for index, (name, local) in enumerate(zip(names, locals_, strict=True)):
            if index < first_default:
                value = self.undefined(name, f"parameter {name!r} was not provided")
            else:
                value = self.expr(node.defaults[index - first_default])
            test = self.compare(self.load(local), IS, self.load("missing"))
            self.emit(self.when(test, [self.assign(local, value)]))
            self.unbound.discard(local)
        self.unbound = outer

    def call_block(self, node: nodes.CallBlock) -> None:
        """``{% call f(x) %}…{% endcall %}``: the body is a macro that `f` gets as ``caller``."""
        facts = self.analysis.functions[id(node)]
        self.buffers += 1
        name = f"caller{self.buffers}"
        self.macro_function(name, node, facts)
        self.emit(self.assign("caller", self.macro_object(name, node, None, facts)))
        self.put(self.called(node.call, caller=self.load("caller")))

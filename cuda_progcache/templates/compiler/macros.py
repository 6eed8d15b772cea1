# SPDX-License-Identifier: Apache-2.0
"""``{% macro %}`` and ``{% call %}``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuda_progcache.templates.compiler.loops import Loops
from cuda_progcache.templates.compiler.scopes import FunctionState
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
        known = self.analysis.functions[id(node)]
        scope = self.scope
        once = scope.assigned.get(node.name) == 1 and scope.owner(node.name) is scope and not self.state.branch
        if once and self.settings.direct_macros and not self.analysis.modifies_eval_context and not self.in_block:
            self.direct_macros[id(scope), node.name] = (name, node, known)
        self.macro_function(name, node, known)
        local = self.local(node.name)
        targets: list[ast.expr] = [self.store(local)]
        if scope.toplevel:
            if not node.name.startswith("_"):
                self.emit(self.exported("add", "update", [node.name]))
            targets.insert(0, self.subscript_store(self.dotted(self.context, "vars"), node.name))
        self.emit(self.assign(targets, self.macro_object(name, node, node.name, known)))
        self.define(local)

    in_block: bool

    def macro_object(
        self, function: str, node: nodes.Macro | nodes.CallBlock, name: str | None, known: Function
    ) -> ast.expr:
        """The call that makes the object."""
        arguments = self.tuple_of([self.constant(arg.name) for arg in node.args])
        taken = {arg.name for arg in node.args}
        catches = [
            self.constant(value=special in known.special and special not in taken) for special in ("kwargs", "varargs")
        ]
        caller = self.constant(value="caller" in known.special)
        autoescape = self.dotted(self.context, "eval_ctx", "autoescape")
        return self.call_runtime(
            "Macro",
            self.load("environment"),
            self.load(function),
            self.constant(name),
            arguments,
            *catches,
            caller,
            autoescape,
        )

    def macro_function(self, name: str, node: nodes.Macro | nodes.CallBlock, known: Function) -> None:
        """Emit the Python function."""
        scope = self.analysis.scopes[id(node), ""]
        names = [arg.name for arg in node.args]
        if "caller" in known.special and "caller" in names and names.index("caller") < len(names) - len(node.defaults):
            self.fail(
                'When defining macros or call blocks the special "caller" argument must be omitted or be given a '
                "default.",
                node.lineno,
            )
        parameters = [f"l_{scope.level}_{arg}" for arg in names]
        parameters += [
            f"l_{scope.level}_{special}"
            for special in ("caller", "kwargs", "varargs")
            if special in known.special and special not in names
        ]
        line = self.line
        with self.in_function(FunctionState(known)):
            self.alias_reads(known)
            with self.block() as body, self.buffered():
                with self.entered(scope, leave=False, first=True):
                    self.defaults(node, names, scope.level)
                    self.body(node.body)
                self.line = line
                self.return_contents(body, 0)
            prologue = self.prologue(known, outermost=False)
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
            test = self.compare(self.load(local), IS, self.runtime("missing"))
            self.emit(self.when(test, [self.assign(local, value)]))
            self.unbound.discard(local)
        self.unbound = outer

    def call_block(self, node: nodes.CallBlock) -> None:
        """``{% call f(x) %}…{% endcall %}``: the body is a macro that `f` gets as ``caller``."""
        known = self.analysis.functions[id(node)]
        self.buffers += 1
        name = f"caller{self.buffers}"
        self.macro_function(name, node, known)
        self.emit(self.assign("caller", self.macro_object(name, node, None, known)))
        self.put(self.called(node.call, caller=self.load("caller")))

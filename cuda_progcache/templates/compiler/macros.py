# SPDX-License-Identifier: Apache-2.0
"""Code generation for ``{% macro %}`` and ``{% call %}``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cuda_progcache.templates.compiler.scopes import FunctionState
from cuda_progcache.templates.compiler.statements import Statements

if TYPE_CHECKING:
    import ast

    from jinja2 import nodes

    from cuda_progcache.templates.compiler.scopes import Function


class Macros(Statements):
    """The code generator for macros: a macro becomes a Python function and the object that templates see."""

    def macro(self, node: nodes.Macro) -> None:
        """Emit ``{% macro name(a, b=1) %}``."""
        name = self.numbered("macro")
        known = self.analysis.functions[id(node)]
        if self.scope.owner(node.name) is self.scope and not self.state.branch and not self.in_block:
            self.call_directly(name, node, known)
        self.macro_function(name, node, known)
        self.bind(name, node, known)

    def call_directly(self, function: str, node: Any, known: Function) -> None:
        """Record that a macro or region may be called without its object, if its name is set only once."""
        once = self.scope.assigned.get(node.name) == 1
        if once and self.settings.direct_macros and not self.analysis.modifies_eval_context:
            self.direct_macros[id(self.scope), node.name] = (function, node, known)

    def bind(self, function: str, node: Any, known: Function) -> None:
        """Emit the assignment of the object of a macro or region to its name."""
        local = self.local(node.name)
        macro = self.macro_object(function, node, node.name, known)
        if self.scope.toplevel:
            self.export([node.name], "update")
            self.emit("$ctx.vars['$name'] = $local = $macro", name=node.name, local=local, macro=macro)
        else:
            self.emit("$local = $macro", local=local, macro=macro)
        self.define(local)

    def macro_object(
        self, function: str, node: nodes.Macro | nodes.CallBlock, name: str | None, known: Function
    ) -> ast.expr:
        """Return the code that creates the object of a macro."""
        names = [arg.name for arg in node.args]
        kwargs, varargs = (special in known.special and special not in names for special in ("kwargs", "varargs"))
        return self.code(
            "$Macro(environment, $function, '$name', $arguments, '$kwargs', '$varargs', '$caller',"
            " $ctx.eval_ctx.autoescape)",
            function=function,
            name=name,
            arguments=self.tuple_of([self.constant(argument) for argument in names]),
            kwargs=kwargs,
            varargs=varargs,
            caller="caller" in known.special,
        )

    def macro_function(self, name: str, node: nodes.Macro | nodes.CallBlock, known: Function) -> None:
        """Emit the Python function of a macro."""
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
            body = self.prologue(known, outermost=False) + body
        self.emit("async def $name($parameters): $body", name=name, parameters=parameters, body=body)

    def defaults(self, node: nodes.Macro | nodes.CallBlock, names: list[str], level: int) -> None:
        """Emit the values of arguments that are not given; each default may use the arguments before it."""
        locals_ = [f"l_{level}_{name}" for name in names]
        outer, self.unbound = self.unbound, {*self.unbound, *locals_}
        first_default = len(names) - len(node.defaults)
        for index, (name, local) in enumerate(zip(names, locals_, strict=True)):
            if index < first_default:
                value = self.undefined(name, f"parameter {name!r} was not provided")
            else:
                value = self.expr(node.defaults[index - first_default])
            self.emit("if $local is $missing: $local = $value", local=local, value=value)
            self.unbound.discard(local)
        self.unbound = outer

    def call_block(self, node: nodes.CallBlock) -> None:
        """Emit ``{% call f(x) %}…{% endcall %}``: the body is a macro that `f` gets as ``caller``."""
        known = self.analysis.functions[id(node)]
        name = self.numbered("caller")
        self.macro_function(name, node, known)
        self.emit("caller = $macro", macro=self.macro_object(name, node, None, known))
        self.put(self.called(node.call, caller=self.load("caller")))

# SPDX-License-Identifier: Apache-2.0
"""``{% region %}``, a block with parameters, and ``{% globals %}``, what single blocks need set up."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from cuda_progcache.templates.compiler.inheritance import Inheritance
from cuda_progcache.templates.compiler.tree import IN

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler.scopes import Function, Scope


class Regions(Inheritance):
    """Code for what Jinja2 doesn't have.

    A region is a function of the module, ``_region_NAME(ctx, _blocks, …)``, which the template's name calls, and
    ``_block_NAME``, which finds the parameters in the context. ``_globals_setup(ctx)`` is called where a render begins.
    """

    def begin_function(self, function: Function, scope: Scope) -> None:
        """Begin with a function of the module."""
        raise NotImplementedError

    def entry(self, name: str) -> str:
        """The name of an entry of the module in the form that is being made."""
        raise NotImplementedError

    def region_node(self, node: Any) -> None:
        """Bind the name to the region: a macro whose function passes on to the module's."""
        if not self.scope.toplevel or self.state.branch:
            self.fail("a region has to stand at the top level of its template", node.lineno)
        self.buffers += 1
        function = f"region{self.buffers}"
        parameters = [f"a{index}" for index in range(len(node.args))]
        given = [self.load(name) for name in (self.context, "_blocks", *parameters)]
        text = self.call(self.load(f"_region_{node.name}"), given)
        asynchronous = self.settings.asynchronous
        body = [self.returns(self.awaits(text) if asynchronous else text)]
        self.emit(self.function_def(function, parameters, body, asynchronous=asynchronous))
        known = self.analysis.functions[id(node)]
        if (
            self.scope.assigned.get(node.name) == 1
            and self.settings.direct_macros
            and not self.analysis.modifies_eval_context
        ):
            self.direct_macros[id(self.scope), node.name] = (function, node, known)
        self.emit(self.exported("add", "update", [node.name]))
        local = self.local(node.name)
        targets = [self.subscript_store(self.dotted(self.context, "vars"), node.name), self.store(local)]
        self.emit(self.assign(targets, self.macro_object(function, node, node.name, known)))
        self.define(local)

    def globals_node(self, node: Any) -> None:
        """Where they stand, they do nothing: they were set up where the render began."""
        if not self.scope.toplevel or self.state.branch:
            self.fail("globals and imports have to stand at the top level of their template", node.lineno)

    def region_functions(self, name: str, node: Any) -> list[ast.stmt]:
        """Return the module's functions for a region."""
        analysis = self.analysis
        function, scope = analysis.functions[id(node)], analysis.scopes[id(node), ""]
        self.line = node.lineno or 1
        names = [arg.name for arg in node.args]
        parameters = [f"l_0_{name}" for name in names]
        self.begin_function(function, scope)
        with self.buffered():
            if "self" in function.special:
                self.emit(self.assign("l_0_self", self.call_runtime("TemplateReference", self.load(self.context))))
            if scope.assigned:
                self.emit(self.assign("_block_vars", ast.Dict([], [], lineno=self.line, col_offset=0)))
            with self.entered(scope, leave=False, first=True):
                self.defaults(node, names, 0)
                self.body(node.body)
            self.return_contents(self.out, 0)
        body, self.out = self.out, []
        asynchronous = self.settings.asynchronous
        begin = self.prologue(function, outermost=True)
        text = self.function_def(
            f"_region_{name}", [self.context, "_blocks", *parameters], begin + body, asynchronous=asynchronous
        )
        return [text, self._region_as_block(name, names)]

    def _region_as_block(self, name: str, names: list[str]) -> ast.stmt:
        """``_block_NAME``, which takes the parameters from the context."""
        given = []
        for parameter in names:
            test = self.compare(self.constant(parameter), IN, self.load(self.context))
            value = self.subscript(self.load(self.context), self.constant(parameter))
            given.append(self.choose(test, value, self.runtime("missing")))
        text = self.call(self.load(f"_region_{name}"), [self.load(self.context), self.load("_blocks"), *given])
        asynchronous = self.settings.asynchronous
        if asynchronous:
            text = self.awaits(text)
        body = [self.returns(text) if self.settings.form == "render" else self.yields(text)]
        parameters = [self.context, "_blocks"]
        defaults = [self.constant(None)]
        return self.function_def(
            self.entry(f"_block_{name}"), parameters, body, defaults=defaults, asynchronous=asynchronous
        )

    def setup_function(self, name: str, setup: Any) -> list[ast.stmt]:
        """Return ``_globals_setup`` or ``_imports_setup``, if the template has what these set up."""
        if setup is None:
            return []
        function, scope = self.analysis.functions[id(setup)], self.analysis.scopes[id(setup), ""]
        self.line = setup.lineno or 1
        self.begin_function(function, scope)
        with self.buffered(), self.entered(scope, leave=False, first=True):
            self.body(setup.body)
        body, self.out = self.out, []
        self.pending = []
        begin = self.prologue(function, outermost=True)
        asynchronous = self.settings.asynchronous
        return [self.function_def(name, [self.context], begin + body, asynchronous=asynchronous)]

    def call_globals(self) -> list[ast.stmt]:
        """Return the call of ``_globals_setup`` for where a render begins."""
        if self.analysis.setup is None:
            return []
        called = self.call_name("_globals_setup", self.load(self.context))
        return [self.statement(self.awaits(called) if self.settings.asynchronous else called)]

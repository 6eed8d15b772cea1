# SPDX-License-Identifier: Apache-2.0
"""Blocks, regions, ``{% extends %}``, ``{% include %}`` and the imports: what joins templates."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from jinja2 import nodes

from cuda_progcache.templates.compiler.macros import Macros
from cuda_progcache.templates.compiler.statements import Unreachable
from cuda_progcache.templates.compiler.tree import IN, IS, IS_NOT

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler.scopes import Function, Scope


class Inheritance(Macros):
    """Code for what joins templates.

    A render's blocks are in the context: for each name a list, the outermost child's first. ``{% extends %}`` adds
    those of the parent, and when the child's body is done the parent's body is rendered in the same context.

    A region is a function of the module, ``_region_NAME(ctx, _blocks, …)``, which the template's name calls, and
    ``_block_NAME``, which finds the parameters in the context. ``_globals_setup(ctx)`` is called where a render begins.
    """

    extends_seen: int
    parent: str | None
    template_name: str | None

    # Blocks

    def block_node(self, node: nodes.Block) -> None:
        """``{% block %}``: the first of the name's blocks, where this template has no parent."""
        guarded = False
        if self.scope.toplevel:
            if self.known_extends:
                return
            guarded = self.extends_seen > 0
        with self.block() as body:
            self.block_call(node)
        if guarded:
            self.emit(self.when(self.compare(self.load("parent_template"), IS, self.constant(None)), body))
        else:
            for statement in body:
                self.emit(statement)

    def begin_block(self, name: str, function: Function, scope: Scope) -> None:
        """Emit what a block or region has to do before its body: ``super``, and a place for the names that it sets."""
        if "super" in function.special:
            own = self.subscript(self.load("_own"), self.constant(name))
            above = self.call(self.dotted(self.context, "super"), [self.constant(name), own])
            self.emit(self.assign("l_0_super", above))
        if scope.assigned:
            self.emit(self.assign("_block_vars", ast.Dict([], [], lineno=self.line, col_offset=0)))

    def self_reference(self, function: Function) -> list[ast.stmt]:
        """Return the making of ``self``, if the function reads it."""
        if "self" not in function.special:
            return []
        return [self.assign("l_0_self", self.call_runtime("TemplateReference", self.load(self.context)))]

    def block_call(self, node: nodes.Block) -> None:
        """The check of a required block, and the call."""
        stack = self.subscript(self.load("_blocks"), self.constant(node.name))
        if node.required:
            count = self.call_name("len", stack)
            few = self.compare(count, ast.LtE(), self.constant(1))
            error = self.call_runtime("_runtime_error", self.constant(f"Required block {node.name!r} not found"))
            self.emit(self.when(few, [self.raises(error)]))
        first = self.subscript(stack, self.constant(0))
        context: ast.expr = self.load(self.reference)
        if node.scoped:
            context = self.derived()
        self.put_all(first, [context, self.load("_blocks")])

    def put_all(self, source: ast.expr, args: list[ast.expr]) -> None:
        """Put out all that a block or template has, in the form that is being made.

        `source` has a method for each form; ``render`` is what a buffer takes.
        """
        asynchronous = self.settings.asynchronous
        if self.buffer is not None and self.settings.text:
            text = self.call(self.attribute(source, "render"), args)
            text = self.awaits(text) if asynchronous else text
            self.strings.add(id(text))
            self.put(text)
            return
        pieces = self.call(self.attribute(source, self.settings.form), args)
        if self.buffer is None and not asynchronous:
            self.emit(self.statement(ast.YieldFrom(pieces, lineno=self.line, col_offset=0)))
            return
        self.emit(self.assign("_pieces", pieces))
        with self.block() as body:
            self.put(self.load("_piece"))
        loop = self.for_loop(self.store("_piece"), self.load("_pieces"), body, asynchronous=asynchronous)
        close = self.call(self.dotted("_pieces", "aclose" if asynchronous else "close"), [])
        closing = self.statement(self.awaits(close) if asynchronous else close)
        self.emit(self.guarded([loop], final=[closing]))

    # Extends

    def extends_node(self, node: nodes.Extends) -> None:
        """``{% extends %}``: the parent's blocks go behind ours."""
        if not self.scope.toplevel:
            self.fail("cannot use extend from a non top-level scope", node.lineno)
        if self.extends_seen > 0:
            error = self.raises(self.call_runtime("_runtime_error", self.constant("extended multiple times")))
            if self.known_extends:
                self.emit(error)
                raise Unreachable
            self.emit(self.when(self.compare(self.load("parent_template"), IS_NOT, self.constant(None)), [error]))
        parent = self.call(
            self.dotted("environment", "get_template"), [self.expr(node.template), self.constant(self.template_name)]
        )
        self.emit(self.assign("parent_template", parent))
        if not self.state.branch and isinstance(node.template, nodes.Const) and isinstance(node.template.value, str):
            self.parent = node.template.value
        self.emit(self.statement(self.call_runtime("_extend", self.load(self.context), self.load("parent_template"))))
        if not self.state.branch:
            self.known_extends = True
        self.extends_seen += 1

    def parent_body(self) -> None:
        """Put out the parent's body, in this context."""
        with self.block() as body:
            source = self.call_runtime("_parent", self.load("parent_template"))
            self.put_all(source, [self.load(self.context), self.load("_blocks")])
        if self.known_extends:
            for statement in body:
                self.emit(statement)
        else:
            self.emit(self.when(self.compare(self.load("parent_template"), IS_NOT, self.constant(None)), body))

    # Include

    def include(self, node: nodes.Include) -> None:
        """``{% include %}``."""
        name, method = node.template, self.finding_method(node.template)
        environment, names, parent = self.load("environment"), self.expr(name), self.constant(self.template_name)
        if node.ignore_missing:
            found = self.call_runtime("_found", environment, self.constant(method), names, parent)
            self.emit(self.assign("_included", found))
            with self.block() as body:
                self.included(node)
            self.emit(self.when(self.compare(self.load("_included"), IS_NOT, self.constant(None)), body))
        else:
            self.emit(self.assign("_included", self.call(self.attribute(environment, method), [names, parent])))
            self.included(node)

    def finding_method(self, name: nodes.Expr) -> str:
        """Return the environment's method that finds a template, or the first that exists of several."""
        method = "get_or_select_template"
        if isinstance(name, nodes.Const):
            if isinstance(name.value, str):
                method = "get_template"
            elif isinstance(name.value, (tuple, list)):
                method = "select_template"
        elif isinstance(name, (nodes.Tuple, nodes.List)):
            method = "select_template"
        return method

    def included(self, node: nodes.Include) -> None:
        """Put out the template that was found."""
        template = self.load("_included")
        if node.with_context:
            self.put_all(self.call_runtime("_include", template, self.load(self.context), self.locals()), [])
        else:
            self.put_all(self.call_runtime("_include_alone", template), [])

    # Imports

    def imported(self, node: nodes.Import | nodes.FromImport) -> ast.expr:
        """Code for the module of a template."""
        found = self.call(
            self.dotted("environment", "get_template"), [self.expr(node.template), self.constant(self.template_name)]
        )
        args = [found, self.load(self.context)]
        module = self.call_runtime("_imported", *args, *([self.locals()] if node.with_context else []))
        return self.awaits(module) if self.settings.asynchronous else module

    def import_node(self, node: nodes.Import) -> None:
        """``{% import "x" as y %}``."""
        targets: list[ast.expr] = [self.store(self.local(node.target))]
        if self.scope.toplevel:
            targets.append(self.subscript_store(self.dotted(self.context, "vars"), node.target))
        self.emit(self.assign(targets, self.imported(node)))
        self.define(self.local(node.target))
        if self.scope.toplevel and not node.target.startswith("_"):
            self.emit(self.exported("discard", "difference_update", [node.target]))

    def from_import(self, node: nodes.FromImport) -> None:
        """``{% from "x" import a, b as c %}``."""
        self.emit(self.assign("_module", self.imported(node)))
        names = []
        for item in node.names:
            name, alias = item if isinstance(item, tuple) else (item, item)
            local = self.local(alias)
            names.append(alias)
            self.emit(
                self.assign(
                    local, self.call_name("getattr", self.load("_module"), self.constant(name), self.runtime("missing"))
                )
            )
            absent = self.call_runtime(
                "_not_exported",
                self.load("environment"),
                self.load("_module"),
                self.constant(self.position(node)),
                self.constant(name),
            )
            self.emit(
                self.when(self.compare(self.load(local), IS, self.runtime("missing")), [self.assign(local, absent)])
            )
            self.define(local)
        if self.scope.toplevel and names:
            self.emit(self.stored(self.dotted(self.context, "vars"), names))
            public = [name for name in names if not name.startswith("_")]
            if public:
                self.emit(self.exported("discard", "difference_update", public))

    # Regions

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
            self.out += self.self_reference(function)
            self.begin_block(name, function, scope)
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

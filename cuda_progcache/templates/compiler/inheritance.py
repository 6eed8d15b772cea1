# SPDX-License-Identifier: Apache-2.0
"""Code generation for blocks, regions, ``{% extends %}``, ``{% include %}`` and imports."""

from __future__ import annotations

import ast
from typing import TYPE_CHECKING, Any

from jinja2 import nodes

from cuda_progcache.templates.compiler.macros import Macros
from cuda_progcache.templates.compiler.statements import Unreachable

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler.scopes import Function


class Inheritance(Macros):
    """The code generator for statements that combine templates.

    The context has the blocks of the render: for each name a list, starting with the block of the rendered template.
    ``{% extends %}`` appends the parent's blocks. After the child's body, the parent's body is rendered in the same
    context.

    A region becomes two functions of the module: ``_region_NAME(ctx, _blocks, …)``, which the region's name in the
    template calls, and ``_block_NAME``, which takes the parameters from the context. ``_globals_setup(ctx)`` is called
    at the start of a render.
    """

    # Blocks

    def block_node(self, node: nodes.Block) -> None:
        """Emit ``{% block %}``: the first block of that name is rendered, if this template has no parent."""
        guarded = False
        if self.scope.toplevel:
            if self.known_extends:
                return
            guarded = self.extends_seen > 0
        with self.block() as body:
            self.block_call(node)
        self.emit("if parent_template is None: $body" if guarded else "$body", body=body)

    def begin_block(self, name: str, function: Function) -> None:
        """Emit the start of a block or region: ``super``, and a dict for the names that it sets."""
        if "super" in function.special:
            self.emit("l_0_super = $ctx.super('$name', _own['$name'])", name=name)
        if self.scope.assigned:
            self.emit("_block_vars = {}")

    def self_reference(self, function: Function) -> list[ast.stmt]:
        """Return the statement that creates ``self``, if the function reads it."""
        return self.lines("l_0_self = $TemplateReference($ctx)") if "self" in function.special else []

    def block_call(self, node: nodes.Block) -> None:
        """Emit the call of a block, after the check of a required block."""
        if node.required:
            message = f"Required block {node.name!r} not found"
            self.emit(
                "if len(_blocks['$name']) <= 1: raise $_runtime_error('$message')", name=node.name, message=message
            )
        first = self.code("_blocks['$name'][0]", name=node.name)
        context = self.derived() if node.scoped else self.load(self.reference)
        self.put_all(first, [context, self.load("_blocks")])

    def put_all(self, source: ast.expr, args: list[ast.expr]) -> None:
        """Emit the output of a whole block or template.

        `source` is the code for a `TextSource`. A buffer takes the text of its ``render``; otherwise the code iterates
        over the current form.
        """
        if self.buffer is not None and self.settings.text:
            text = self.code("await $source.render($args)", source=source, args=args)
            self.strings.add(id(text))
            self.put(text)
            return
        pieces = self.code("$source.$form($args)", source=source, form=self.settings.form, args=args)
        if self.buffer is None and not self.asynchronous:
            self.emit("yield from $pieces", pieces=pieces)
            return
        with self.block() as body:
            self.put(self.load("_piece"))
        close = "aclose" if self.asynchronous else "close"
        self.emit(
            """
            _pieces = $pieces
            try:
                async for _piece in _pieces: $body
            finally:
                await _pieces.$close()
            """,
            pieces=pieces,
            body=body,
            close=close,
        )

    # Extends

    def extends_node(self, node: nodes.Extends) -> None:
        """Emit ``{% extends %}``: the parent's blocks are appended to ours."""
        if not self.scope.toplevel:
            self.fail("cannot use extend from a non top-level scope", node.lineno)
        if self.extends_seen > 0:
            if self.known_extends:
                self.emit("raise $_runtime_error('extended multiple times')")
                raise Unreachable
            self.emit("if parent_template is not None: raise $_runtime_error('extended multiple times')")
        self.emit("parent_template = $found\n$_extend($ctx, parent_template)", found=self.found_by_name(node.template))
        if not self.state.branch:
            if isinstance(node.template, nodes.Const) and isinstance(node.template.value, str):
                self.parent = node.template.value
            self.known_extends = True
        self.extends_seen += 1

    def found_by_name(self, name: nodes.Expr, method: str = "get_template") -> ast.expr:
        """Return the code that gets a template by name, with one of the environment's methods."""
        parent = self.template_name
        return self.code("environment.$method($name, '$parent')", method=method, name=self.expr(name), parent=parent)

    def parent_body(self) -> None:
        """Emit the output of the parent's body, in the current context."""
        with self.block() as body:
            source = self.call_runtime("_parent", self.load("parent_template"))
            self.put_all(source, [self.load(self.context), self.load("_blocks")])
        self.emit("$body" if self.known_extends else "if parent_template is not None: $body", body=body)

    # Include

    def include(self, node: nodes.Include) -> None:
        """Emit ``{% include %}``."""
        method = self.finding_method(node.template)
        if not node.ignore_missing:
            self.emit("_included = $found", found=self.found_by_name(node.template, method))
            self.included(node)
            return
        name, parent = self.expr(node.template), self.template_name
        self.emit(
            "_included = $_found(environment, '$method', $name, '$parent')", method=method, name=name, parent=parent
        )
        with self.block() as body:
            self.included(node)
        self.emit("if _included is not None: $body", body=body)

    def finding_method(self, name: nodes.Expr) -> str:
        """Return the environment's method for the name of a template, for a list of names, or for either."""
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
        """Emit the output of an included template."""
        if node.with_context:
            self.put_all(self.code("$_include(_included, $ctx, $names)", names=self.locals()), [])
        else:
            self.put_all(self.code("$_include_alone(_included)"), [])

    # Imports

    def imported(self, node: nodes.Import | nodes.FromImport) -> ast.expr:
        """Return the code for the module of a template."""
        names = [self.locals()] if node.with_context else []
        found = self.found_by_name(node.template)
        made: ast.expr = self.code("await $_imported($found, $ctx, $names)", found=found, names=names)
        return made

    def import_node(self, node: nodes.Import) -> None:
        """Emit ``{% import "x" as y %}``."""
        local, module = self.local(node.target), self.imported(node)
        if self.scope.toplevel:
            self.emit("$local = $ctx.vars['$name'] = $module", local=local, name=node.target, module=module)
            self.export([node.target], "difference_update")
        else:
            self.emit("$local = $module", local=local, module=module)
        self.define(local)

    def from_import(self, node: nodes.FromImport) -> None:
        """Emit ``{% from "x" import a, b as c %}``."""
        self.emit("_module = $module", module=self.imported(node))
        names = []
        for item in node.names:
            name, alias = item if isinstance(item, tuple) else (item, item)
            names.append(alias)
            self.emit(
                """
                $local = getattr(_module, '$name', $missing)
                if $local is $missing:
                    $local = $_not_exported(environment, _module, '$position', '$name')
                """,
                local=self.local(alias),
                name=name,
                position=self.position(node),
            )
            self.define(self.local(alias))
        if self.scope.toplevel and names:
            self.store_in(self.dotted(self.context, "vars"), names)
            self.export(names, "difference_update")

    # Regions

    def region_node(self, node: Any) -> None:
        """Emit the binding of a region's name to a macro, whose function calls the module's function."""
        if not self.scope.toplevel or self.state.branch:
            self.fail("a region must be at the top level of its template", node.lineno)
        function, known = self.numbered("region"), self.analysis.functions[id(node)]
        self.emit(
            "async def $function($parameters): return await $region($ctx, _blocks, $parameters)",
            function=function,
            parameters=[f"a{index}" for index in range(len(node.args))],
            region=f"_region_{node.name}",
        )
        self.call_directly(function, node, known)
        self.bind(function, node, known)

    def globals_node(self, node: Any) -> None:
        """Check the place of ``{% globals %}`` or ``{% imports %}``; the body was executed at the render's start."""
        if not self.scope.toplevel or self.state.branch:
            self.fail("globals and imports must be at the top level of their template", node.lineno)

    def region_functions(self, name: str, node: Any) -> list[ast.stmt]:
        """Return the module's functions for a region."""
        self.line = node.lineno or 1
        names = [arg.name for arg in node.args]
        function = self.begin_function(node)
        with self.buffered():
            self.out += self.self_reference(function)
            self.begin_block(name, function)
            with self.entered(self.scope, leave=False, first=True):
                self.defaults(node, names, 0)
                self.body(node.body)
            self.return_contents(self.out, 0)
        found = "$ctx['$name'] if '$name' in $ctx else $missing"
        return self.lines(
            f"""
            async def $region($ctx, _blocks, $parameters): $body
            async def $block($ctx, _blocks=None):
                {"return" if self.settings.form == "render" else "yield"} await $region($ctx, _blocks, $given)
            """,
            region=f"_region_{name}",
            block=self.entry(f"_block_{name}"),
            parameters=[f"l_0_{parameter}" for parameter in names],
            body=self.prologue(function, outermost=True) + self.out,
            given=[self.code(found, name=parameter) for parameter in names],
        )

    def setup_function(self, name: str, setup: Any) -> list[ast.stmt]:
        """Return the function ``_globals_setup`` or ``_imports_setup``; nothing if the template needs no such setup."""
        if setup is None:
            return []
        self.line = setup.lineno or 1
        function = self.begin_function(setup)
        with self.buffered(), self.entered(self.scope, leave=False, first=True):
            self.body(setup.body)
        self.pending = []  # the output is discarded
        body = self.prologue(function, outermost=True) + self.out
        return self.lines("async def $name($ctx): $body", name=name, body=body)

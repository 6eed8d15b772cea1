# SPDX-License-Identifier: Apache-2.0
"""The Jinja2 environment for CUDA source, which compiles templates that aren't cached, and analyzes their syntax trees.

This module imports jinja2 at its top, so it is imported only to compile a template or to explain an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension

from cuda_progcache.templates.cuda_filters import FILTERS, GLOBALS, TESTS
from cuda_progcache.templates.plain_environment import STRING, KeptModule, note
from cuda_progcache.templates.regions import Region
from cuda_progcache.templates.runtime import extra_globals
from cuda_progcache.templates.template import Environment, Template, compiler_for

if TYPE_CHECKING:
    from jinja2.parser import Parser

    from cuda_progcache.templates.files import SearchPath, TemplateFile


class DigestLoader(jinja2.BaseLoader):
    """A loader of templates from a search path."""

    def __init__(self, files: SearchPath) -> None:
        self.files = files
        self.names: dict[str, str] = {}  # template names by file, for tracebacks

    def get_source(
        self,
        environment: jinja2.Environment,  # noqa: ARG002  (required by the loader protocol)
        template: str,
    ) -> tuple[str, str, Callable[[], bool]]:
        """Return a template's text, its file and an up-to-date check (Jinja2's loader protocol)."""
        file = self.files.read(template)
        if file is None:
            raise jinja2.TemplateNotFound(template)
        self.names[file.path] = template
        return file.text, file.path, file.is_current

    def list_templates(self) -> list[str]:
        """Return the names of all files in the search path."""
        return self.files.names()


class KernelJinjaTemplate(Template):
    """A kernel template that needs Jinja2. Its module is created anew if one of its files changes."""

    def _get_default_module(self, ctx: Any = None) -> Any:
        extra = extra_globals(ctx, self.globals)
        if extra:
            return self.make_module(extra)
        return self.__dict__.setdefault("_kept", KeptModule()).get(self.make_module)


class JinjaEnvironment(Environment):
    """A Jinja2 environment with our compiler, and with the settings, filters and tags for CUDA source."""

    template_class = KernelJinjaTemplate

    def __init__(
        self,
        loader: DigestLoader,
        *,
        filters: Mapping[str, Callable[..., Any]],
        tests: Mapping[str, Callable[..., Any]],
        globals: Mapping[str, Any],  # noqa: A002  (Jinja2's name for it)
        extensions: Sequence[str | type[Extension]] = (),
        static_context: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            loader=loader,
            static_context=static_context,
            autoescape=False,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            extensions=[RequireExtension, UnrollExtension, *extensions],
        )
        self.digest_loader = loader
        self.filters.update({**FILTERS, **filters})
        self.tests.update({**TESTS, **tests})
        self.globals.update({**GLOBALS, **self.static_context, **globals})

    def compile_kernel(self, text: str, name: str | None, path: str) -> CodeType:
        """Compile a template to the code that `PlainTemplate` runs.

        Raises
        ------
        jinja2.TemplateSyntaxError
        """
        return compiler_for(self).compile(self._parse(text, name, path), name, path)

    def _load_template(self, name: str, globals: Any) -> jinja2.Template:  # noqa: A002  (Jinja2's name for it)
        template = super()._load_template(name, globals)
        note({name: _file_of(template)})
        return template

    def referred(self, name: str) -> tuple[TemplateFile, tuple[str, ...]] | None:
        """Return a template's file and the names of the templates that it refers to; None if it doesn't exist."""
        try:
            template: Any = self.get_template(name)
        except jinja2.TemplateNotFound:
            return None
        return _file_of(template), template._info.references

    def names_of(self, tree: nodes.Template) -> tuple[set[str], set[str]]:
        """Return the names that a template reads without setting them first, and all names that it sets anywhere."""
        defined = {n.name for n in tree.find_all((nodes.Macro, Region))}  # jinja2.meta doesn't know regions
        assigned = defined | {n.name for n in tree.find_all(nodes.Name) if n.ctx == "store"}
        assigned |= {n.target for n in tree.find_all(nodes.Import)}
        regions = {n.name for n in tree.find_all(Region)}
        return meta.find_undeclared_variables(tree) - regions, assigned

    def tree(self, name: str) -> nodes.Template:
        """Return a template's syntax tree.

        Raises
        ------
        jinja2.TemplateNotFound, jinja2.TemplateSyntaxError
        """
        source, path, _ = self.digest_loader.get_source(self, name)
        return self._parse(source, name, path)


def _file_of(template: Any) -> TemplateFile:
    file: TemplateFile = template._uptodate.__self__
    return file


class RequireExtension(Extension):
    """``{% require condition, "message" %}``: if the condition is false, rendering fails with the line and values."""

    tags = {"require"}  # noqa: RUF012  (Jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Build ``{% if not condition %}{{ fail }}{% endif %}``."""
        line = next(parser.stream).lineno
        condition = parser.parse_expression()
        if not parser.stream.skip_if("comma"):
            parser.fail('require takes a condition and a message: {% require n > 0, "n must be positive" %}', line)
        message = parser.parse_expression()
        names = {n.name for n in (condition, *condition.find_all(nodes.Name)) if isinstance(n, nodes.Name)}
        shown = sorted(names)
        values = nodes.List([nodes.Name(name, "load") for name in shown])
        where = [nodes.Const(parser.name or STRING), nodes.Const(line)]
        failure = _call("refuse", [message, nodes.Const(tuple(shown)), values, *where])
        return nodes.If(nodes.Not(condition), [nodes.ExprStmt(failure)], [], []).set_lineno(line)


class UnrollExtension(Extension):
    """``{% unroll n %}``: ``#pragma unroll n`` on its own line; ``{% unroll %}`` unrolls the loop fully.

    `n` is a positive integer, or a string with a C++ constant expression.
    """

    tags = {"unroll"}  # noqa: RUF012  (Jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Build the output statement of the pragma."""
        line = next(parser.stream).lineno
        if parser.stream.current.type == "block_end":
            return nodes.Output([nodes.Const("#pragma unroll\n")]).set_lineno(line)
        where = [nodes.Const(parser.name or STRING), nodes.Const(line)]
        return nodes.Output([_call("pragma", [parser.parse_expression(), *where])]).set_lineno(line)


def _call(function: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """Build a call of a function in `cuda_statements`; compiled templates import it and don't need the extension."""
    return nodes.Call(nodes.ImportedName(f"{_STATEMENTS}.{function}"), arguments, [], None, None)


_STATEMENTS = "cuda_progcache.templates.cuda_statements"

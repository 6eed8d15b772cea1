# SPDX-License-Identifier: Apache-2.0
"""Jinja2 set up for CUDA source: what compiles a template that the bytecode cache doesn't hold, and answers questions.

One of the modules that import jinja2 at their top; they are reached when there is something to compile or to explain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension

from cuda_progcache.templates.cuda_filters import FILTERS, GLOBALS, TESTS
from cuda_progcache.templates.frames import Compiled
from cuda_progcache.templates.plain_environment import STRING
from cuda_progcache.templates.plain_runtime import with_facts
from cuda_progcache.templates.regions import Globals, Region
from cuda_progcache.templates.template import Environment

if TYPE_CHECKING:
    from jinja2.parser import Parser

    from cuda_progcache.templates.files import SearchPath

_loaded: ContextVar[set[str] | None] = ContextVar("_loaded", default=None)


class DigestLoader(jinja2.BaseLoader):
    """Loads templates from a search path, and keeps the SHA-256 of each file it loaded."""

    def __init__(self, files: SearchPath) -> None:
        self.files = files
        self.digests: dict[str, str] = {}
        self.names: dict[str, str] = {}  # file to template name, for tracebacks

    def get_source(
        self,
        environment: jinja2.Environment,  # noqa: ARG002  (the loader protocol's)
        template: str,
    ) -> tuple[str, str, Callable[[], bool]]:
        """Return text, file and an up-to-date check (Jinja2's loader protocol)."""
        file = self.files.read(template)
        if file is None:
            raise jinja2.TemplateNotFound(template)
        self.digests[template] = file.digest
        self.names[file.path] = template
        return file.text, file.path, file.is_current

    def list_templates(self) -> list[str]:
        """Return the names of all files under the roots."""
        return self.files.names()


class JinjaEnvironment(Environment):
    """Jinja2 over our compiler, with the settings, filters and tags for CUDA source."""

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
        self.globals.update({**GLOBALS, **(static_context or {}), **globals})
        self._references: dict[str, tuple[str, ...]] = {}

    def compile_kernel(self, text: str, name: str | None, path: str) -> Compiled:
        """Compile a template for the plain runtime.

        Raises
        ------
        jinja2.TemplateSyntaxError
        """
        tree = self._parse(text, name, path)
        references = tuple(r for r in meta.find_referenced_templates(tree) if r is not None)
        plain = all(type(node) in _PLAIN_NODES for node in tree.find_all(nodes.Node))
        compiler = self.compiler_class(self, self.static_context)
        code = with_facts(compiler.compile(tree, name, path), references, plain=plain)
        return Compiled(code, precomputed=compiler.precomputed, warnings=map(asdict, compiler.warnings))

    def get_template(self, *args: Any, **kwargs: Any) -> jinja2.Template:
        """As Jinja2's, and note the template for `tracking`."""
        return _note(super().get_template(*args, **kwargs))

    def select_template(self, *args: Any, **kwargs: Any) -> jinja2.Template:
        """As Jinja2's, and note the template for `tracking`."""
        return _note(super().select_template(*args, **kwargs))

    @contextmanager
    def tracking(self) -> Iterator[set[str]]:
        """Collect the names of the templates loaded in this context."""
        names: set[str] = set()
        token = _loaded.set(names)
        try:
            yield names
        finally:
            _loaded.reset(token)

    def closure(self, names: set[str]) -> dict[str, str]:
        """Return ``{template: sha256}`` of `names` and all that they include, import or extend by a constant name.

        A template that is named but doesn't exist isn't listed: ``{% include ... ignore missing %}`` is legal.
        """
        digests: dict[str, str] = {}
        waiting = sorted(names)
        while waiting:
            name = waiting.pop()
            if name in digests:
                continue
            try:
                self.get_template(name)  # reloads it, if it changed
            except jinja2.TemplateNotFound:
                continue
            digests[name] = self.digest_loader.digests[name]
            waiting.extend(self._references[name])
        return dict(sorted(digests.items()))

    def references(self, template: jinja2.Template, source: str) -> tuple[str, ...]:  # noqa: ARG002  (the plain one's)
        """Return the templates that one made from a string names."""
        return tuple(r for r in meta.find_referenced_templates(self.parse(source)) if r is not None)

    def names_of(self, tree: nodes.Template) -> tuple[set[str], set[str]]:
        """Return the names that a template reads without having set them, and all that it sets somewhere."""
        defined = {n.name for n in tree.find_all((nodes.Macro, Region))}  # regions are nothing that `meta` knows
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

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        if name is not None:
            self._references[name] = tuple(r for r in meta.find_referenced_templates(tree) if r is not None)
        return tree


# What the plain runtime can do: all but escaping, i18n, and what extensions bring.
_PLAIN_NODES = {
    *(nodes.Output, nodes.If, nodes.For, nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.With, nodes.Block),
    *(nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport, nodes.ExprStmt, nodes.Assign, nodes.AssignBlock),
    *(nodes.Name, nodes.NSRef, nodes.Const, nodes.TemplateData, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair),
    *(nodes.Keyword, nodes.CondExpr, nodes.Filter, nodes.Test, nodes.Call, nodes.Getitem, nodes.Slice, nodes.Getattr),
    *(nodes.Concat, nodes.Compare, nodes.Operand, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv),
    *(nodes.Mod, nodes.Pow, nodes.And, nodes.Or, nodes.Not, nodes.Neg, nodes.Pos, nodes.ImportedName),
    *(nodes.Break, nodes.Continue, Region, Globals),
}


def _note(template: jinja2.Template) -> jinja2.Template:
    names = _loaded.get()
    if names is not None and template.name is not None:
        names.add(template.name)
    return template


class RequireExtension(Extension):
    """``{% require condition, "message" %}``: a render fails, with line and values, where the condition is false."""

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
    """``{% unroll n %}``: ``#pragma unroll n`` on a line of its own; without `n`, unroll fully.

    `n` is a positive integer or a string that holds a C++ constant expression.
    """

    tags = {"unroll"}  # noqa: RUF012  (Jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Build the output of the pragma."""
        line = next(parser.stream).lineno
        if parser.stream.current.type == "block_end":
            return nodes.Output([nodes.Const("#pragma unroll\n")]).set_lineno(line)
        where = [nodes.Const(parser.name or STRING), nodes.Const(line)]
        return nodes.Output([_call("pragma", [parser.parse_expression(), *where])]).set_lineno(line)


def _call(function: str, arguments: list[nodes.Expr]) -> nodes.Call:
    """Build the call of a function that compiled templates import for themselves, without the extension."""
    return nodes.Call(nodes.ImportedName(f"{_STATEMENTS}.{function}"), arguments, [], None, None)


_STATEMENTS = "cuda_progcache.templates.cuda_statements"

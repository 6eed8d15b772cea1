# SPDX-License-Identifier: Apache-2.0
"""Jinja2 set up for CUDA source: loader with digests, ``{% require %}`` and ``{% unroll %}``.

The one module, with :mod:`cuda_progcache.templates.marking`, that imports jinja2 at its top; both are reached only when
something is rendered.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.loaders import split_template_path

from cuda_progcache.errors import TemplateError
from cuda_progcache.templates.cuda_filters import FILTERS, GLOBALS, TESTS

if TYPE_CHECKING:
    from jinja2.parser import Parser

STRING = "<string>"
"""The name of a template made from a string."""

_loaded: ContextVar[set[str] | None] = ContextVar("_loaded", default=None)


class DigestLoader(jinja2.BaseLoader):
    """Loads templates from folders, first match wins, and keeps the SHA-256 of each file it loaded."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = tuple(roots)
        self.digests: dict[str, str] = {}
        self.names: dict[str, str] = {}  # file to template name, for tracebacks

    def get_source(
        self,
        environment: jinja2.Environment,  # noqa: ARG002  (the loader protocol's)
        template: str,
    ) -> tuple[str, str, Callable[[], bool]]:
        """Return text, file and an up-to-date check (Jinja2's loader protocol)."""
        parts = split_template_path(template)
        for root in self.roots:
            path = os.path.join(root, *parts)
            signature = _signature(path)  # before the read: a write in between shows as stale, never as fresh
            data = _contents(path, template)
            if data is None:
                continue
            try:
                text = data.decode()
            except UnicodeDecodeError as error:
                line = data.count(b"\n", 0, error.start) + 1
                raise TemplateError(f"{template}:{line}: {path} is not UTF-8", template=template, line=line) from error
            self.digests[template] = hashlib.sha256(data).hexdigest()
            self.names[path] = template
            return text, path, partial(_unchanged, path, signature)
        raise jinja2.TemplateNotFound(template)

    def list_templates(self) -> list[str]:
        """Return the names of all files under the roots."""
        return sorted(
            os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/")
            for root in self.roots
            for folder, _, files in os.walk(root)
            for file in files
        )


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _contents(path: str, template: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        raise TemplateError(f"{template}: can't read {path}: {error.strerror}", template=template) from error


def _unchanged(path: str, signature: tuple[int, int, int] | None) -> bool:
    return _signature(path) == signature


class JinjaEnvironment(jinja2.Environment):
    """Stock Jinja2 with the settings, filters and tags for CUDA source."""

    def __init__(
        self,
        loader: DigestLoader,
        *,
        filters: Mapping[str, Callable[..., Any]],
        tests: Mapping[str, Callable[..., Any]],
        globals: Mapping[str, Any],  # noqa: A002  (Jinja2's name for it)
    ) -> None:
        super().__init__(
            loader=loader,
            autoescape=False,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            extensions=[RequireExtension, UnrollExtension],
        )
        self.digest_loader = loader
        self.filters.update({**FILTERS, **filters})
        self.tests.update({**TESTS, **tests})
        self.globals.update({**GLOBALS, **globals})
        self._references: dict[str, tuple[str, ...]] = {}

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
        failure = self.call_method("_fail", [message, nodes.Const(tuple(shown)), values, *where])
        return nodes.If(nodes.Not(condition), [nodes.ExprStmt(failure)], [], []).set_lineno(line)

    def _fail(self, message: object, names: Sequence[str], values: Sequence[object], template: str, line: int) -> None:
        pairs = [
            f"{name} is undefined" if isinstance(value, jinja2.Undefined) else f"{name} = {value!r}"
            for name, value in zip(names, values, strict=True)
            if not callable(value) or isinstance(value, jinja2.Undefined)
        ]
        tail = f" ({', '.join(pairs)})" if pairs else ""
        raise TemplateError(f"{template}:{line}: {message}{tail}", template=template, line=line)


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
        return nodes.Output([self.call_method("_pragma", [parser.parse_expression(), *where])]).set_lineno(line)

    def _pragma(self, factor: object, template: str, line: int) -> str:
        whole = not isinstance(factor, bool) and isinstance(factor, int) and factor >= 1
        if not whole and not (isinstance(factor, str) and factor.strip()):
            message = f"{template}:{line}: unroll takes a positive whole number or a C++ expression, not {factor!r}"
            raise TemplateError(message, template=template, line=line)
        return f"#pragma unroll {factor}\n"

# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: Jinja2 syntax, set for CUDA source, with errors that name the template's line.

Importing this module is cheap; jinja2 is imported with the first template.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from cuda_progcache.templates.files import SearchPath
from cuda_progcache.templates.source_map import SourceMap

if TYPE_CHECKING:
    import jinja2

    from cuda_progcache.templates.jinja_environment import JinjaEnvironment

_STRING = "<string>"


class KernelEnvironment:
    """Templates of CUDA source in one or more folders.

    Jinja2 syntax with ``trim_blocks``, ``lstrip_blocks`` and ``keep_trailing_newline``, no escaping, and undefined
    names as errors. Besides Jinja2's own there are the filters ``ctype``, ``cuda_literal``, ``vector_type`` and
    ``define``, the tests ``power_of_two`` and ``aligned(n)``, the global ``vector_type(base, n)``, and the tags
    ``{% require condition, "message" %}`` and ``{% unroll n %}``. May be used from several threads.

    Parameters
    ----------
    search_path : path or sequence of paths
        Folders with templates; the first that has a name wins.
    filters, tests, globals : mapping, optional
        Further ones; they win over ours.
    """

    def __init__(
        self,
        search_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        filters: Mapping[str, Callable[..., Any]] | None = None,
        tests: Mapping[str, Callable[..., Any]] | None = None,
        globals: Mapping[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
    ) -> None:
        paths = [search_path] if isinstance(search_path, (str, os.PathLike)) else search_path
        self.search_path = tuple(os.fspath(path) for path in paths)
        self._additions = {"filters": dict(filters or {}), "tests": dict(tests or {}), "globals": dict(globals or {})}
        self._environment: JinjaEnvironment | None = None

    def get_template(self, template_name: str) -> KernelTemplate:
        """Return the template of that name.

        Raises
        ------
        TemplateError
            If there is no such file, or its syntax is wrong.
        """
        template = KernelTemplate(self, template_name, None)
        template._load(self.jinja())
        return template

    def from_string(self, source: str) -> KernelTemplate:
        """Return a template made from `source`; it can include and import those of the search path.

        Raises
        ------
        TemplateError
            If its syntax is wrong.
        """
        template = KernelTemplate(self, _STRING, source)
        template._load(self.jinja())
        return template

    def render(self, template_name: str, /, **params: Any) -> str:
        """Return the text of a template for `params`.

        Raises
        ------
        TemplateError
            If the template is missing or wrong, a name is undefined, a ``{% require %}`` fails, or an expression
            raises.
        """
        return KernelTemplate(self, template_name, None).render(**params)

    def source_map(self, template_name: str, /, **params: Any) -> SourceMap:
        """Return where each line of ``render(template_name, **params)`` came from; see `KernelTemplate.source_map`."""
        return KernelTemplate(self, template_name, None).source_map(**params)

    def digests(self, template_name: str, /) -> dict[str, str]:
        """Return the SHA-256 of a template's file and of all that it includes, imports or extends.

        Names that are computed when rendering are not in it; `KernelTemplate.render_traced` has them too.

        Returns
        -------
        dict
            ``{template name: 64 hex digits}``, sorted by name.
        """
        environment = self.jinja()
        try:
            environment.get_template(template_name)
            return environment.closure({template_name})
        except Exception as error:  # each becomes a TemplateError
            raise _template_error(error, environment, template_name, {}) from error

    def undeclared_parameters(self, template_name: str, /) -> frozenset[str]:
        """Return the names that a template and its includes read but neither set nor find among the globals."""
        from jinja2 import meta, nodes

        environment = self.jinja()
        undeclared: set[str] = set()
        assigned: set[str] = set()
        for name in self.digests(template_name):
            tree = environment.tree(name)
            undeclared |= meta.find_undeclared_variables(tree)
            # An included template sees what the including one has set.
            assigned |= {n.name for n in tree.find_all(nodes.Name) if n.ctx == "store"}
            assigned |= {n.name for n in tree.find_all(nodes.Macro)}
            assigned |= {n.target for n in tree.find_all(nodes.Import)}
        return frozenset(undeclared - assigned - set(environment.globals))

    def jinja(self) -> JinjaEnvironment:
        """Return the jinja2 environment beneath, made at the first call."""
        if self._environment is None:
            from cuda_progcache.templates.jinja_environment import DigestLoader, JinjaEnvironment

            self._environment = JinjaEnvironment(DigestLoader(SearchPath(self.search_path)), **self._additions)
        return self._environment

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environment": None}  # compiled templates don't pickle; another process makes its own

    def __repr__(self) -> str:
        return f"KernelEnvironment({list(self.search_path)!r})"


class KernelTemplate:
    """One template; made by `KernelEnvironment.get_template` and `from_string`.

    Attributes
    ----------
    name : str
        Its name in the search path, ``"<string>"`` for one made from a string.
    """

    def __init__(self, environment: KernelEnvironment, name: str, source: str | None) -> None:
        self.name = name
        self._kernel_environment = environment
        self._source = source
        self._compiled: jinja2.Template | None = None

    def render(self, /, **params: Any) -> str:
        """Return the text for `params`.

        Raises
        ------
        TemplateError
            If a name is undefined, a ``{% require %}`` fails, or an expression raises.
        """
        return self._render(self._kernel_environment.jinja(), params)

    def render_traced(self, /, **params: Any) -> tuple[str, dict[str, str]]:
        """Return the text and the digests of the templates that can have gone into it.

        Returns
        -------
        tuple of str and dict
            The dict is ``{template name: sha256 of its file}``: every file that was loaded or is included, imported or
            extended by name, whether or not this render's conditions reached it.
        """
        environment = self._kernel_environment.jinja()
        with environment.tracking() as names:
            text = self._render(environment, params)
            if self._source is not None:
                from jinja2 import meta

                names |= {n for n in meta.find_referenced_templates(environment.parse(self._source)) if n is not None}
            return text, environment.closure(names)

    def undeclared(self) -> frozenset[str]:
        """Return the names that this template itself, without its includes, reads but doesn't set."""
        from jinja2 import meta

        environment = self._kernel_environment.jinja()
        tree = environment.tree(self.name) if self._source is None else environment.parse(self._source)
        return frozenset(meta.find_undeclared_variables(tree) - set(environment.globals))

    def source_map(self, /, **params: Any) -> SourceMap:
        """Return where each line of ``render(**params)`` came from.

        The template is rendered once more with a mark before every piece of text; the map is what the marks say, and
        is empty, with the reason, unless the text without them is exactly that of `render`. Costs a compile of the
        templates: for errors, not for every render.

        Raises
        ------
        TemplateError
            As `render`.
        """
        from cuda_progcache.templates.marking import MarkedEnvironment, unmark

        plain = self.render(**params)
        base = self._kernel_environment.jinja()
        marked = MarkedEnvironment(base.digest_loader, **self._kernel_environment._additions)
        try:
            text = self._load(marked).render(params)
        except Exception as error:  # noqa: BLE001  (the marks upset a computation; the caller gets the reason)
            return SourceMap(plain, reason=f"{self.name} can't be rendered with marks: {error}")
        stripped, lines = unmark(text, marked.locations)
        if stripped != plain:
            return SourceMap(plain, reason=f"{self.name} computes with its own text, which marks change")
        return SourceMap(plain, lines)

    def _render(self, environment: JinjaEnvironment, params: Mapping[str, Any]) -> str:
        template = self._load(environment)
        try:
            return template.render(params)
        except Exception as error:  # a template's expressions can raise anything; it becomes a TemplateError
            raise _template_error(error, environment, self.name, params) from error

    def _load(self, environment: JinjaEnvironment) -> jinja2.Template:
        try:
            if self._source is None:
                return environment.get_template(self.name)  # Jinja2 keeps it, and reloads it when the file changes
            if environment is not self._kernel_environment._environment:
                return environment.from_string(self._source)
            if self._compiled is None:
                self._compiled = environment.from_string(self._source)
            return self._compiled
        except Exception as error:  # syntax, I/O, constant folding; it becomes a TemplateError
            raise _template_error(error, environment, self.name, {}) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __repr__(self) -> str:
        return f"KernelTemplate({self.name!r})"


def _template_error(
    error: Exception, environment: JinjaEnvironment, name: str, params: Mapping[str, Any], *, placed: bool = True
) -> Exception:
    from cuda_progcache.templates.template_errors import template_error

    return template_error(error, environment, name, params, placed=placed)


def evaluate(expression: str, values: Mapping[str, Any]) -> Any:
    """Return the value of a Jinja2 expression, with the CUDA filters and tests, over `values`.

    Raises
    ------
    TemplateError
        If the expression is wrong, names something undefined, or raises.
    """
    return _expression(expression)(values)


def expression_names(expression: str) -> frozenset[str]:
    """Return the names that a Jinja2 expression reads.

    Raises
    ------
    TemplateError
        If its syntax is wrong.
    """
    return _expression(expression).names


class _Expression:
    def __init__(self, source: str) -> None:
        from jinja2 import meta

        self._environment = _bare().jinja()
        try:
            self._compiled = self._environment.compile_expression(source, undefined_to_none=False)
            tree = self._environment.parse("{{ " + source + " }}")
        except Exception as error:  # it becomes a TemplateError
            raise _template_error(error, self._environment, _STRING, {}, placed=False) from error
        self.names = frozenset(meta.find_undeclared_variables(tree) - set(self._environment.globals))

    def __call__(self, values: Mapping[str, Any]) -> Any:
        from jinja2 import Undefined

        try:
            result = self._compiled(values)
            if isinstance(result, Undefined):
                str(result)  # raises: StrictUndefined says what is missing
        except Exception as error:  # it becomes a TemplateError
            raise _template_error(error, self._environment, _STRING, values, placed=False) from error
        return result


@lru_cache(maxsize=1)
def _bare() -> KernelEnvironment:
    return KernelEnvironment(())


_expression = lru_cache(maxsize=1024)(_Expression)

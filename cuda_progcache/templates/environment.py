# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: Jinja2 templates of CUDA source, with errors that name the template's line.

A template whose code is in the bytecode cache is loaded and rendered without Jinja2. Jinja2 is imported only to compile
a template or to explain an error.
"""

from __future__ import annotations

import os

from cuda_progcache.templates.compile_context import context_digest, signatures, snapshot
from cuda_progcache.templates.files import SearchPath
from cuda_progcache.templates.plain_environment import STRING, PlainEnvironment, Tracking, closure
from cuda_progcache.templates.runtime import refuse_static
from cuda_progcache.templates.undefined import is_undefined

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, TypeVar

    from jinja2.ext import Extension

    from cuda_progcache.templates.bytecode_cache import BytecodeCache
    from cuda_progcache.templates.jinja_environment import JinjaEnvironment
    from cuda_progcache.templates.source_map import SourceMap

    T = TypeVar("T")


class KernelEnvironment:
    """An environment for templates of CUDA source in one or more folders.

    The syntax is Jinja2's with ``trim_blocks``, ``lstrip_blocks`` and ``keep_trailing_newline``. Nothing is escaped,
    and undefined names are errors. In addition to Jinja2's own, there are the filters ``ctype``, ``cuda_literal``,
    ``vector_type`` and ``define``, the tests ``power_of_two`` and ``aligned(n)``, the global ``vector_type(base, n)``,
    and the tags ``{% require condition, "message" %}`` and ``{% unroll n %}``. An environment is thread-safe.

    Parameters
    ----------
    search_path : path or sequence of paths
        The folders with templates. If several folders have a template of the same name, the first one wins.
    bytecode_cache : BytecodeCache or path, optional
        The cache that stores compiled templates between processes. The key covers how filters and tests are called, and
        the content of the static context. If that content can't be determined (an object with hidden state), nothing is
        stored.
    static_context : mapping, optional
        Names with the same value in every render. Expressions of these names alone are evaluated when a template is
        compiled.
    filters, tests, globals : mapping, optional
        Additional ones; they override ours.
    extensions : sequence of str or class, optional
        Jinja2 extensions. With extensions, even cached templates need Jinja2 to be rendered.
    generated_from : bool
        Whether the text of each file starts with a comment that has the template's name and SHA-256.
    line_directives : bool
        Whether ``#line`` directives are put into the text of each C++ file, so that the compiler, ``-lineinfo`` and
        profilers name the template's lines. Each render then takes a second render and a compilation of the templates.
    """

    def __init__(
        self,
        search_path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        bytecode_cache: BytecodeCache | str | os.PathLike[str] | None = None,
        static_context: Mapping[str, Any] | None = None,
        filters: Mapping[str, Callable[..., Any]] | None = None,
        tests: Mapping[str, Callable[..., Any]] | None = None,
        globals: Mapping[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
        extensions: Sequence[str | type[Extension]] = (),
        generated_from: bool = False,
        line_directives: bool = False,
    ) -> None:
        if isinstance(bytecode_cache, (str, os.PathLike)):
            from cuda_progcache.templates.bytecode_cache import BytecodeCache

            bytecode_cache = BytecodeCache(bytecode_cache)
        paths = [search_path] if isinstance(search_path, (str, os.PathLike)) else search_path
        self.search_path = tuple(os.fspath(path) for path in paths)
        self.bytecode_cache = bytecode_cache
        self.generated_from = generated_from
        self.line_directives = line_directives
        self._static: dict[str, Any] = snapshot(dict(static_context or {}))
        self._additions = {"filters": dict(filters or {}), "tests": dict(tests or {}), "globals": dict(globals or {})}
        self._extensions = tuple(extensions)
        self._context_hash: str | None = ""  # not computed yet
        self._environment: JinjaEnvironment | None = None
        self._plain: PlainEnvironment | None = None
        self._expressions: dict[str, Callable[[Mapping[str, Any]], Any]] = {}

    @property
    def context_hash(self) -> str | None:
        """The part of the bytecode cache's key that depends on this environment.

        None if the content of the static context or of an extension can't be determined; then nothing is stored.
        """
        called = (signatures(self._additions[table]) for table in ("filters", "tests"))
        return context_digest(*called, self._extensions, self._static)

    def get_template(self, template_name: str) -> KernelTemplate:
        """Return the template of a given name.

        Raises
        ------
        TemplateError
            If there is no such file, or its syntax is wrong.
        """
        template = KernelTemplate(self, template_name, None)
        template._check()
        return template

    def from_string(self, source: str) -> KernelTemplate:
        """Return a template made from `source`; it can include and import templates of the search path.

        Raises
        ------
        TemplateError
            If its syntax is wrong.
        """
        template = KernelTemplate(self, STRING, source)
        template._check()
        return template

    def render(self, template_name: str, /, **params: Any) -> str:
        """Return the text of a template for `params`.

        Raises
        ------
        TemplateError
            If the template is missing or invalid, a name is undefined, a ``{% require %}`` fails, or an expression
            raises.
        """
        return KernelTemplate(self, template_name, None).render(**params)

    def source_map(self, template_name: str, /, **params: Any) -> SourceMap:
        """Return the origin of each line of ``render(template_name, **params)``; see `KernelTemplate.source_map`."""
        return KernelTemplate(self, template_name, None).source_map(**params)

    def digests(self, template_name: str, /) -> dict[str, str]:
        """Return the SHA-256 of a template's file and of all files that the template includes, imports or extends.

        Templates whose names are computed during a render aren't listed; see `KernelTemplate.render_traced` for those.

        Returns
        -------
        dict
            ``{template name: 64 hex digits}``, sorted by name.
        """
        template = self.get_template(template_name)
        return template._guarded(template._digests, {})

    def undeclared_parameters(self, template_name: str, /) -> frozenset[str]:
        """Return the names that a template and its includes read but don't set, without the names of globals."""
        environment = self.jinja()
        read: set[str] = set()
        assigned: set[str] = set()  # an included template sees the variables of the including one
        for name in self.digests(template_name):
            names = environment.names_of(environment.tree(name))
            read |= names[0]
            assigned |= names[1]
        return frozenset(read - assigned - set(environment.globals))

    def evaluate(self, expression: str, values: Mapping[str, Any]) -> Any:
        """Return the value of a Jinja2 expression with variables `values`; it may use the CUDA filters and tests.

        Raises
        ------
        TemplateError
            If the expression is invalid, its value is undefined, or its evaluation raises.
        """
        refuse_static(values, self._static)
        try:
            run = self._expressions.get(expression)
            if run is None:
                if len(self._expressions) >= _MOST_EXPRESSIONS:
                    self._expressions.clear()
                run = self._expressions[expression] = self._expression(expression)
            result = run(values)
            if is_undefined(result):
                str(result)  # raises an error that says which name is undefined
            return result
        except Exception as error:  # it becomes a TemplateError
            raise self._error(error, STRING, values, placed=False) from error

    def _expression(self, expression: str) -> Callable[[Mapping[str, Any]], Any]:
        """Return a function that evaluates an expression, by rendering a template that assigns it to a variable."""
        environment = self._templates()
        source = "{% set _result = (" + expression + ") %}"
        if not isinstance(environment, PlainEnvironment) or not environment.has_string(source):
            self.jinja().compile_expression(expression)  # its errors are about the expression alone
        template: Any = environment.from_string(source)

        def evaluate(values: Mapping[str, Any]) -> Any:
            context = template.new_context(dict(values))
            template._render(context, None)
            return context.vars["_result"]

        return evaluate

    def jinja(self) -> JinjaEnvironment:
        """Return the underlying Jinja2 environment, which is created on the first call."""
        if self._environment is None:
            from cuda_progcache.templates.jinja_environment import DigestLoader, JinjaEnvironment

            self._environment = JinjaEnvironment(
                DigestLoader(SearchPath(self.search_path)),
                **self._additions,
                extensions=self._extensions,
                static_context=self._static,
            )
        return self._environment

    def _templates(self) -> PlainEnvironment | JinjaEnvironment:
        """Return the environment that renders templates; with extensions, the Jinja2 environment."""
        if self._extensions:
            return self.jinja()
        if self._plain is None:
            files = SearchPath(self.search_path)
            self._plain = PlainEnvironment(
                files, self.bytecode_cache, self._key, self.jinja, static=self._static, **self._additions
            )
        return self._plain

    def _key(self) -> str | None:
        """Return `context_hash`, computed once: it doesn't change."""
        if self._context_hash == "":
            self._context_hash = self.context_hash
        return self._context_hash

    def _error(
        self, error: Exception, name: str, params: Mapping[str, Any], *, placed: bool = True, source: str | None = None
    ) -> Exception:
        from cuda_progcache.templates.template_errors import template_error

        return template_error(error, self.jinja(), name, params, placed=placed, source=source)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled templates can't be pickled; the other process makes its own.
        return {**self.__dict__, "_environment": None, "_plain": None, "_expressions": {}}

    def __repr__(self) -> str:
        return f"KernelEnvironment({list(self.search_path)!r})"


class KernelTemplate:
    """A kernel template, as `KernelEnvironment.get_template` and `from_string` return it.

    Attributes
    ----------
    name : str
        The template's name in the search path, or ``"<string>"`` for a template made from a string.
    """

    def __init__(self, environment: KernelEnvironment, name: str, source: str | None) -> None:
        self.name = name
        self._kernel_environment = environment
        self._source = source
        self._compiled: Any = None  # for a string; the environment keeps those of files

    def render(self, /, **params: Any) -> str:
        """Return the text for `params`.

        Raises
        ------
        TemplateError
            If a name is undefined, a ``{% require %}`` fails, or an expression raises.
        """
        if self._has_directives or self._has_head:
            return self.render_traced(**params)[0]
        return self._guarded(lambda: self._rendered(params), params)

    def render_traced(self, /, **params: Any) -> tuple[str, dict[str, str]]:
        """Return the text and the digests of the templates that the text may depend on.

        Returns
        -------
        tuple of str and dict
            The dict is ``{template name: sha256 of its file}``. It lists every file that was loaded and every file that
            these include, import or extend by a constant name, whether or not this render reached the statement.

        Raises
        ------
        TemplateError
            See `render`.
        """
        text, digests = self._guarded(lambda: self._traced(params), params)
        return self._finished(text, digests, params), digests

    @property
    def warnings(self) -> tuple[tuple[str, str, int, str], ...]:
        """The likely mistakes in the template: the code, message, line and suggestion of each."""
        found: tuple[tuple[str, str, int, str], ...] = self._guarded(lambda: self._load().warnings, {})
        return found

    def undeclared(self) -> frozenset[str]:
        """Return the names that this template, without its includes, reads but doesn't set; globals aren't listed."""
        environment = self._kernel_environment.jinja()
        tree = environment.tree(self.name) if self._source is None else environment.parse(self._source)
        return frozenset(environment.names_of(tree)[0] - set(environment.globals))

    def source_map(self, /, **params: Any) -> SourceMap:
        """Return the origin of each line of ``render(**params)``.

        The template is rendered a second time, with a mark before every piece of text, and the map is read from the
        marks. If the marked text without its marks differs from the text of `render`, the map is empty and has the
        reason. The templates are compiled anew, so use this to explain errors, not in every render.

        Raises
        ------
        TemplateError
            See `render`.
        """
        text, digests = self._guarded(lambda: self._traced(params), params)
        return self._mapped(text, digests, params)

    def _finished(self, text: str, digests: Mapping[str, str], params: Mapping[str, Any]) -> str:
        """Return the text with the additions that the environment's settings ask for."""
        if self._has_directives:
            for name, value in params.items():
                if hasattr(type(value), "__next__"):
                    from cuda_progcache.errors import TemplateError

                    raise TemplateError(
                        f"{self.name}: parameter {name!r} is an iterator, but #line "
                        "directives take a second render; pass a list",
                        template=self.name,
                    )
            return self._mapped(text, digests, params).text
        return self._head(digests) + text

    def _mapped(self, text: str, digests: Mapping[str, str], params: Mapping[str, Any]) -> SourceMap:
        found = self._map(text, params)
        if self._has_directives:
            from cuda_progcache.templates.line_directives import with_line_directives

            found = with_line_directives(found)
        head = self._head(digests)
        return found.after(head) if head else found

    def _map(self, plain: str, params: Mapping[str, Any]) -> SourceMap:
        from cuda_progcache.templates.marking import map_of

        def render(marked: Any) -> str:
            template = marked.get_template(self.name) if self._source is None else marked.from_string(self._source)
            text: str = template.render(params)
            return text

        return map_of(self._kernel_environment.jinja(), self.name, plain, render)

    def _head(self, digests: Mapping[str, str]) -> str:
        if not self._has_head:
            return ""
        return f"{';' if self._is_llvm else '//'} GENERATED FROM {self.name} sha256:{digests[self.name]}\n"

    @property
    def _has_head(self) -> bool:
        return self._kernel_environment.generated_from and self._source is None

    @property
    def _has_directives(self) -> bool:
        return self._kernel_environment.line_directives and self._source is None and not self._is_llvm

    @property
    def _is_llvm(self) -> bool:
        return "ll" in self.name.split(".")[1:]

    def _rendered(self, params: Mapping[str, Any]) -> str:
        text: str = self._load().render(params)
        return text

    def _traced(self, params: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        environment = self._kernel_environment._templates()
        with Tracking() as used:
            text = self._rendered(params)
            digests = closure(environment, used)
            if self._source is not None:
                for name in self._load().references:
                    if name not in digests:
                        found = environment.referred(name)
                        digests |= closure(environment, {name: found[0]}) if found else {}
        return text, dict(sorted(digests.items()))

    def _digests(self) -> dict[str, str]:
        with Tracking() as used:
            self._load()
            return closure(self._kernel_environment._templates(), used)

    def _check(self) -> None:
        self._guarded(self._load, {})

    def _guarded(self, work: Callable[[], T], params: Mapping[str, Any]) -> T:
        """Call `work`; turn its errors into TemplateErrors that name the template's line."""
        environment = self._kernel_environment
        refuse_static(params, environment._static)
        try:
            return work()
        except Exception as error:  # a template's expressions can raise any error
            raise environment._error(error, self.name, params, source=self._source) from error

    def _load(self) -> Any:
        environment = self._kernel_environment._templates()
        if self._source is None:
            return environment.get_template(self.name)  # the environment keeps it, and reloads it if its file changes
        if self._compiled is None:
            self._compiled = environment.from_string(self._source)
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": None}

    def __repr__(self) -> str:
        return f"KernelTemplate({self.name!r})"


def evaluate(expression: str, values: Mapping[str, Any], environment: KernelEnvironment | None = None) -> Any:
    """Return the value of a Jinja2 expression; see `KernelEnvironment.evaluate`."""
    return (environment or _bare()).evaluate(expression, values)


def expression_names(expression: str) -> frozenset[str]:
    """Return the names that a Jinja2 expression reads.

    Raises
    ------
    TemplateError
        If its syntax is wrong.
    """
    from jinja2 import meta

    environment = _bare()
    try:
        environment.jinja().compile_expression(expression)
        tree = environment.jinja().parse("{{ " + expression + " }}")
    except Exception as error:  # it becomes a TemplateError
        raise environment._error(error, STRING, {}, placed=False) from error
    return frozenset(meta.find_undeclared_variables(tree) - set(environment.jinja().globals))


_MOST_EXPRESSIONS = 256
_bares: list[KernelEnvironment] = []


def _bare() -> KernelEnvironment:
    """Return an environment without templates, for expressions."""
    if not _bares:
        _bares.append(KernelEnvironment(()))
    return _bares[0]

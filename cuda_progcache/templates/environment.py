# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: Jinja2 syntax, set for CUDA source, with errors that name the template's line.

A template whose code lies in a bytecode cache is loaded and rendered without Jinja2; it is imported when something has
to be compiled, or explained.
"""

from __future__ import annotations

import os

from cuda_progcache.templates.compile_context import context_digest
from cuda_progcache.templates.files import SearchPath
from cuda_progcache.templates.plain_environment import STRING, NeedsJinja2Error, PlainEnvironment

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, TypeVar

    import jinja2
    from jinja2.ext import Extension

    from cuda_progcache.templates.bytecode_cache import BytecodeCache
    from cuda_progcache.templates.jinja_environment import JinjaEnvironment
    from cuda_progcache.templates.plain_runtime import Template
    from cuda_progcache.templates.source_map import SourceMap

    E = TypeVar("E", bound=JinjaEnvironment)
    T = TypeVar("T")


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
    bytecode_cache : BytecodeCache or path, optional
        Where compiled templates are kept between processes. Filters, tests and values of the static context count with
        their code and content; where those can't be told (an object with hidden state), nothing is kept.
    static_context : mapping, optional
        Names with the same value in every render: what depends on them alone is worked out when a template is compiled.
    filters, tests, globals : mapping, optional
        Further ones; they win over ours.
    extensions : sequence of str or class, optional
        Of Jinja2; templates of an environment with extensions need Jinja2 when they are rendered, too.
    generated_from : bool
        Begin the text of each file with a comment that names it and its SHA-256.
    line_directives : bool
        Put ``#line`` into the text of each C++ file, so that the compiler, ``-lineinfo`` and profilers name the
        template's lines. Each render then costs one more, with a compile of the templates.
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
        self._static = dict(static_context or {})
        self._additions = {"filters": dict(filters or {}), "tests": dict(tests or {}), "globals": dict(globals or {})}
        self._extensions = tuple(extensions)
        self._needs_jinja2 = bool(extensions)
        self._environment: JinjaEnvironment | None = None
        self._plain: PlainEnvironment | None = None
        self._expressions: dict[str, Template] = {}

    @property
    def context_hash(self) -> str | None:
        """What the bytecode cache files this environment's templates under, besides their names and sources.

        None where its filters, tests or static context can't be told from others; then nothing is kept.
        """
        return context_digest(self._additions["filters"], self._additions["tests"], self._extensions, self._static)

    def get_template(self, template_name: str) -> KernelTemplate:
        """Return the template of that name.

        Raises
        ------
        TemplateError
            If there is no such file, or its syntax is wrong.
        """
        template = KernelTemplate(self, template_name, None)
        template._check()
        return template

    def from_string(self, source: str) -> KernelTemplate:
        """Return a template made from `source`; it can include and import those of the search path.

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
        template = self.get_template(template_name)
        return template._run(lambda environment: environment.closure({template_name}), {})

    def undeclared_parameters(self, template_name: str, /) -> frozenset[str]:
        """Return the names that a template and its includes read but neither set nor find among the globals."""
        environment = self.jinja()
        read: set[str] = set()
        assigned: set[str] = set()  # an included template sees what the including one has set
        for name in self.digests(template_name):
            names = environment.names_of(environment.tree(name))
            read |= names[0]
            assigned |= names[1]
        return frozenset(read - assigned - set(environment.globals))

    def evaluate(self, expression: str, values: Mapping[str, Any]) -> Any:
        """Return the value of a Jinja2 expression, with the CUDA filters and tests, over `values`.

        Raises
        ------
        TemplateError
            If the expression is wrong, names something undefined, or raises.
        """
        try:
            plain = self._plain_environment()
            if plain is None:
                return self._jinja_expression(expression)(values)
            template = self._expressions.get(expression)
            if template is None:
                template = self._expressions[expression] = self._expression(plain, expression)
            context = template.context({**plain.globals, **values})
            template._render(context, None)
            result = context.vars["_result"]
            if isinstance(result, plain.undefined):
                str(result)  # raises, and says what is missing
            return result
        except NeedsJinja2Error:
            self._needs_jinja2 = True
            return self.evaluate(expression, values)
        except Exception as error:  # it becomes a TemplateError
            raise self._error(error, STRING, values, placed=False) from error

    def _expression(self, plain: PlainEnvironment, expression: str) -> Template:
        source = "{% set _result = (" + expression + ") %}"
        if not plain.has_string(source):
            self._jinja_expression(expression)  # what is wrong with it is told in its own words
        return plain.from_string(source)

    def _jinja_expression(self, expression: str) -> Callable[[Mapping[str, Any]], Any]:
        from jinja2 import Undefined

        compiled = self.jinja().compile_expression(expression, undefined_to_none=False)

        def evaluate(values: Mapping[str, Any]) -> Any:
            result = compiled(values)
            if isinstance(result, Undefined):
                str(result)  # raises, and says what is missing
            return result

        return evaluate

    def jinja(self) -> JinjaEnvironment:
        """Return the Jinja2 environment beneath, made at the first call."""
        if self._environment is None:
            from cuda_progcache.templates.jinja_environment import DigestLoader, JinjaEnvironment

            self._environment = self._made(JinjaEnvironment, DigestLoader(SearchPath(self.search_path)))
        return self._environment

    def _made(self, kind: type[E], loader: Any) -> E:
        return kind(loader, **self._additions, extensions=self._extensions, static_context=self._static)

    def _plain_environment(self) -> PlainEnvironment | None:
        """Return the environment that needs no Jinja2; None where one of the templates does."""
        if self._plain is None and not self._needs_jinja2:
            digest = self.context_hash
            additions = {**self._additions, "globals": {**self._static, **self._additions["globals"]}}
            cache = None if digest is None else self.bytecode_cache
            self._plain = PlainEnvironment(SearchPath(self.search_path), cache, digest or "", self.jinja, **additions)
        return None if self._needs_jinja2 else self._plain

    def _error(
        self, error: Exception, name: str, params: Mapping[str, Any], *, placed: bool = True, source: str | None = None
    ) -> Exception:
        from cuda_progcache.templates.template_errors import template_error

        return template_error(error, self.jinja(), name, params, placed=placed, source=source)

    def __getstate__(self) -> dict[str, Any]:
        # Compiled templates don't pickle; another process makes its own.
        return {**self.__dict__, "_environment": None, "_plain": None, "_expressions": {}}

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
        self._compiled: Template | jinja2.Template | None = None  # of a string; files' are the environment's

    def render(self, /, **params: Any) -> str:
        """Return the text for `params`.

        Raises
        ------
        TemplateError
            If a name is undefined, a ``{% require %}`` fails, or an expression raises.
        """
        if self._has_directives:
            return self.source_map(**params).text
        return self._headed(self._text(params))

    def render_traced(self, /, **params: Any) -> tuple[str, dict[str, str]]:
        """Return the text and the digests of the templates that can have gone into it.

        Returns
        -------
        tuple of str and dict
            The dict is ``{template name: sha256 of its file}``: every file that was loaded or is included, imported or
            extended by name, whether or not this render's conditions reached it.
        """
        text, digests = self._run(lambda environment: self._traced(environment, params), params)
        if self._has_directives:
            return self.source_map(**params).text, digests
        return self._headed(text), digests

    def undeclared(self) -> frozenset[str]:
        """Return the names that this template itself, without its includes, reads but doesn't set."""
        environment = self._kernel_environment.jinja()
        tree = environment.tree(self.name) if self._source is None else environment.parse(self._source)
        return frozenset(environment.names_of(tree)[0] - set(environment.globals))

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
        from cuda_progcache.templates.source_map import SourceMap

        found = self._map(self._text(params), params)
        if self._has_directives:
            from cuda_progcache.templates.line_directives import with_line_directives

            found = with_line_directives(found)
        head = self._headed("")
        return SourceMap(head + found.text, (None,) * bool(head) + found.lines, found.reason) if head else found

    def _map(self, plain: str, params: Mapping[str, Any]) -> SourceMap:
        from cuda_progcache.templates.marking import MarkedEnvironment, unmark
        from cuda_progcache.templates.source_map import SourceMap

        environment = self._kernel_environment
        marked = environment._made(MarkedEnvironment, environment.jinja().digest_loader)
        try:
            template = marked.get_template(self.name) if self._source is None else marked.from_string(self._source)
            text = template.render(params)
        except Exception as error:  # noqa: BLE001  (the marks upset a computation; the caller gets the reason)
            return SourceMap(plain, reason=f"{self.name} can't be rendered with marks: {error}")
        stripped, lines = unmark(text, marked.locations)
        if stripped != plain:
            return SourceMap(plain, reason=f"{self.name} computes with its own text, which marks change")
        return SourceMap(plain, lines)

    def _headed(self, text: str) -> str:
        environment = self._kernel_environment
        if not environment.generated_from or self._source is not None:
            return text
        comment = ";" if self._is_llvm else "//"
        return f"{comment} GENERATED FROM {self.name} sha256:{environment.digests(self.name)[self.name]}\n{text}"

    @property
    def _has_directives(self) -> bool:
        return self._kernel_environment.line_directives and self._source is None and not self._is_llvm

    @property
    def _is_llvm(self) -> bool:
        return "ll" in self.name.split(".")[1:]

    def _text(self, params: Mapping[str, Any]) -> str:
        text: str = self._run(lambda environment: self._load(environment).render(params), params)
        return text

    def _traced(self, environment: PlainEnvironment | JinjaEnvironment, params: Mapping[str, Any]) -> Any:
        with environment.tracking() as names:
            template = self._load(environment)
            text = template.render(params)
            if self._source is not None:
                names |= set(environment.references(template, self._source))
            return text, environment.closure(names)

    def _check(self) -> None:
        self._run(self._load, {})

    def _run(self, work: Callable[[Any], T], params: Mapping[str, Any]) -> T:
        """Do something in the environment that can: the plain one, or where a template needs it Jinja2's."""
        environment = self._kernel_environment
        try:
            plain = environment._plain_environment()
            if plain is not None:
                try:
                    return work(plain)
                except NeedsJinja2Error:
                    environment._needs_jinja2 = True
                    self._compiled = None
            return work(environment.jinja())
        except Exception as error:  # a template's expressions can raise anything; it becomes a TemplateError
            raise environment._error(error, self.name, params, source=self._source) from error

    def _load(self, environment: Any) -> Any:
        if self._source is None:
            return environment.get_template(self.name)  # kept there, and read again when the file changes
        if self._compiled is None or self._compiled.environment is not environment:
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
        environment._jinja_expression(expression)
        tree = environment.jinja().parse("{{ " + expression + " }}")
    except Exception as error:  # it becomes a TemplateError
        raise environment._error(error, STRING, {}, placed=False) from error
    return frozenset(meta.find_undeclared_variables(tree) - set(environment.jinja().globals))


_bares: list[KernelEnvironment] = []


def _bare() -> KernelEnvironment:
    """Return the environment without templates, for expressions."""
    if not _bares:
        _bares.append(KernelEnvironment(()))
    return _bares[0]

# SPDX-License-Identifier: Apache-2.0
"""The environment that compiled kernel templates know.

It finds templates in memory, in the bytecode cache, or by having them compiled.
"""

from __future__ import annotations

from contextvars import ContextVar

from cuda_progcache.templates import builtins, cuda_filters
from cuda_progcache.templates.builtins import Names, StrictUndefined
from cuda_progcache.templates.compile_context import move
from cuda_progcache.templates.plain_objects import Namespace
from cuda_progcache.templates.plain_runtime import EvalContext, Template, TemplateNotFound, facts, names_for

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from typing import Any

    from cuda_progcache.templates.bytecode_cache import BytecodeCache
    from cuda_progcache.templates.files import SearchPath, TemplateFile
    from cuda_progcache.templates.jinja_environment import JinjaEnvironment

STRING = "<string>"
"""The name of a template made from a string."""

_used: ContextVar[set[str] | None] = ContextVar("_used", default=None)


class NeedsJinja2Error(Exception):
    """A template does something that only Jinja2's own runtime can."""


class PlainEnvironment:
    """Kernel templates and what they use; a template's code sees it as ``environment``.

    Whatever else Jinja2's filters and functions ask of an environment is asked of a real one.

    Parameters
    ----------
    files : SearchPath
    bytecode_cache : BytecodeCache or None
    context_hash : str
        Digest of what decides, besides a template's source, what its code is.
    jinja : callable
        Gives the Jinja2 environment.
    filters, tests, globals : mapping
        Further ones; they win over ours.

    Attributes
    ----------
    globals : dict
    names : dict
        The globals of templates' code.
    """

    undefined = StrictUndefined
    finalize = None
    autoescape = False
    is_async = False
    sandboxed = False
    concat = "".join

    def __init__(
        self,
        files: SearchPath,
        bytecode_cache: BytecodeCache | None,
        context_hash: str,
        jinja: Callable[[], JinjaEnvironment],
        *,
        filters: Mapping[str, Callable[..., Any]],
        tests: Mapping[str, Callable[..., Any]],
        globals: Mapping[str, Any],  # noqa: A002  (Jinja2's name for it)
    ) -> None:
        self.files = files
        self.filters = Names("FILTERS", builtins.FILTERS, cuda_filters.FILTERS, filters)
        self.tests = Names("TESTS", builtins.TESTS, cuda_filters.TESTS, tests)
        self.globals: dict[str, Any] = {**_GLOBALS, **cuda_filters.GLOBALS, **globals}
        self.eval_ctx = EvalContext(self)
        self.names = names_for(self)
        self._cache = bytecode_cache
        self._context_hash = context_hash
        self._jinja = jinja
        self._loaded: dict[str, tuple[TemplateFile, Template]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._jinja(), name)

    # Templates

    def get_template(self, name: Any, parent: str | None = None, globals: Any = None) -> Template:  # noqa: A002, ARG002
        """Return a template of the search path; read again if its file has changed.

        Raises
        ------
        TemplateNotFound
            If there is none of that name.
        jinja2.TemplateSyntaxError
            If it is wrong.
        NeedsJinja2Error
            If this environment can't render it.
        """
        if isinstance(name, Template):
            return name
        used = _used.get()
        if used is not None:
            used.add(name)
        return self._find(name)[1]

    def select_template(self, names: Iterable[Any], parent: str | None = None, globals: Any = None) -> Template:  # noqa: A002
        """Return the first template that exists; as `get_template`."""
        tried = []
        for name in names:
            try:
                return self.get_template(name, parent, globals)
            except TemplateNotFound:
                tried.append(str(name))
        raise TemplateNotFound(*tried)

    def get_or_select_template(self, names: Any, parent: str | None = None, globals: Any = None) -> Template:  # noqa: A002
        """Return the template of a name, or the first that exists of several."""
        if isinstance(names, (str, Template)):
            return self.get_template(names, parent, globals)
        return self.select_template(names, parent, globals)

    def from_string(self, source: str) -> Template:
        """Return the template that a text is."""
        from cuda_progcache.templates.bytecode_cache import hash_source

        return self._load(None, source, hash_source(source), STRING)

    def has_string(self, source: str) -> bool:
        """Whether the code of a text lies in the bytecode cache."""
        from cuda_progcache.templates.bytecode_cache import hash_source

        cache = self._cache
        return cache is not None and cache.has(STRING, hash_source(source), context_hash=self._context_hash)

    def _find(self, name: str) -> tuple[TemplateFile, Template]:
        found = self._loaded.get(name)
        if found is None or not found[0].is_current():
            file = self.files.read(name)
            if file is None:
                raise TemplateNotFound(name)
            found = self._loaded[name] = file, self._load(name, file.text, file.digest, file.path)
        return found

    def _load(self, name: str | None, text: str, digest: str, path: str) -> Template:
        cache = self._cache
        key = name or STRING
        compiled = None if cache is None else cache.load(key, digest, context_hash=self._context_hash)
        if compiled is None or facts(compiled.code) is None:
            compiled = self._jinja().compile_kernel(text, name, path)
            if cache is not None:
                cache.save(key, digest, compiled, context_hash=self._context_hash)
        known = facts(compiled.code)
        if known is None or not known[1]:
            raise NeedsJinja2Error(key)
        move(compiled.code, path)
        return Template(self, compiled.code, name, compiled.precomputed or ())

    # Which templates go into a text

    def tracking(self) -> _Tracking:
        """Collect, in a with statement, the names of the templates that are used in it."""
        return _Tracking()

    def closure(self, names: Iterable[str]) -> dict[str, str]:
        """Return ``{template: sha256}`` of `names` and all that they include, import or extend by a constant name.

        A template that is named but doesn't exist isn't listed: ``{% include ... ignore missing %}`` is legal.
        """
        digests: dict[str, str] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in digests:
                continue
            try:
                file, template = self._find(name)
            except TemplateNotFound:
                continue
            digests[name] = file.digest
            waiting.extend(template.references)
        return dict(sorted(digests.items()))

    def references(self, template: Template, source: str) -> tuple[str, ...]:  # noqa: ARG002  (the Jinja2 one's)
        """Return the templates that one made from a string names."""
        return template.references

    # What templates' code asks for

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute, else an item, else an undefined value."""
        found: Any = self.names["_getattr"]
        return found(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item, else an attribute, else an undefined value."""
        try:
            return obj[argument]
        except (AttributeError, TypeError, LookupError):
            if isinstance(argument, str):
                try:
                    return getattr(obj, str(argument))
                except AttributeError:
                    pass
            return self.undefined(obj=obj, name=argument)


class _Tracking:
    def __enter__(self) -> set[str]:
        names: set[str] = set()
        self._token = _used.set(names)
        return names

    def __exit__(self, *exc_info: object) -> None:
        _used.reset(self._token)


def _theirs(name: str) -> Callable[..., Any]:
    """Return a global of Jinja2's that imports Jinja2 when it is called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        from jinja2 import defaults

        function: Any = defaults.DEFAULT_NAMESPACE[name]
        return function(*args, **kwargs)

    return call


_GLOBALS: dict[str, Any] = {
    "range": range,
    "dict": dict,
    "namespace": Namespace,
    **{name: _theirs(name) for name in ("cycler", "joiner", "lipsum")},
}

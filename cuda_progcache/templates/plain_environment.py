# SPDX-License-Identifier: Apache-2.0
"""An environment and templates for kernels that render without Jinja2.

The environment takes a template from memory or the bytecode cache, or has it compiled. A template that needs Jinja2
(because it escapes, for example) comes from the underlying Jinja2 environment. Both kinds can be mixed, because they
use the same objects.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar

from cuda_progcache.templates import cuda_filters, names
from cuda_progcache.templates.compile_context import move
from cuda_progcache.templates.context import Context, TemplateModule
from cuda_progcache.templates.runtime import NAMES, Block, CodeInfo, extra_globals, namespace, new_context
from cuda_progcache.templates.undefined import StrictUndefined, is_undefined, passes_for

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, MutableMapping
    from types import CodeType
    from typing import Any

    from cuda_progcache.templates.bytecode_cache import BytecodeCache
    from cuda_progcache.templates.files import SearchPath, TemplateFile
    from cuda_progcache.templates.jinja_environment import JinjaEnvironment

STRING = "<string>"
"""The name of a template made from a string."""

MARK = "__progcache_template__"
"""The global of a template's functions that has the template's name."""

_used: ContextVar[dict[str, TemplateFile] | None] = ContextVar("_used", default=None)


class Tracking:
    """A context manager that collects the files of the templates used in its body, as they were loaded."""

    def __enter__(self) -> dict[str, TemplateFile]:
        self._around = _used.get()
        self._files: dict[str, TemplateFile] = {}
        self._token = _used.set(self._files)
        return self._files

    def __exit__(self, *exc_info: object) -> None:
        _used.reset(self._token)
        if self._around is not None:
            self._around |= self._files


def note(files: Mapping[str, TemplateFile]) -> None:
    """Record files as used, for the enclosing `Tracking`."""
    used = _used.get()
    if used is not None:
        used |= files


class KeptModule:
    """The default module of a template; it is created anew if one of the files that it was made from changes."""

    __slots__ = ("_files", "_module")

    def __init__(self) -> None:
        self._module: Any = None
        self._files: dict[str, TemplateFile] = {}

    def get(self, make: Callable[[], Any]) -> Any:
        """Return the module; call `make` to create it if necessary."""
        if self._module is None or not all(file.is_current() for file in self._files.values()):
            with Tracking() as files:
                module = make()
            self._module, self._files = module, files
        else:
            note(self._files)
        return self._module


class PlainTemplate:
    """A kernel template that renders without Jinja2; it passes for a `jinja2.Template`.

    Parameters
    ----------
    environment : PlainEnvironment
    code : types.CodeType
        The compiled code.
    name : str or None
    info : CodeInfo
        The info of the code.

    Attributes
    ----------
    blocks : dict of str to Block
    references : tuple of str
        The names of the templates that this one includes, imports or extends by a constant name.
    """

    __class__ = passes_for("jinja2.environment", "Template")

    def __init__(self, environment: PlainEnvironment, code: CodeType, name: str | None, info: CodeInfo) -> None:
        namespace = {**environment.names, MARK: name}
        for number, static in enumerate(info.static):
            namespace[f"_pc_{number}"] = environment.static[static]
        exec(code, namespace)  # noqa: S102  (made by our compiler)
        self.environment = environment
        self.name = name
        self.filename = code.co_filename
        self.globals: MutableMapping[str, Any] = environment.globals
        self._render: Callable[[Any, Any], str] = namespace["render"]
        self.blocks = {key: Block(key, function, self._form) for key, function in namespace["blocks"].items()}
        namespace["_own"] = self.blocks
        self._kept = KeptModule()
        self.references = info.references
        self.warnings = info.warnings

    def _form(self, form: str) -> dict[str, Callable[..., Any]]:
        """Return the functions of a form; in every form, they yield the text in one piece."""
        made: dict[str, Callable[..., Any]] = {f"render_{form}": _in_one_piece(self._render)}
        for name, block in self.blocks.items():
            made[f"_block_{name}_{form}"] = _in_one_piece(block.render)
        return made

    def new_context(
        self,
        vars: dict[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
        shared: bool = False,  # noqa: FBT001, FBT002  (as Jinja2's)
        locals: Mapping[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
    ) -> Context:
        """Return a context for this template; see `jinja2.Template.new_context`."""
        made: Context = new_context(Context, self, vars, shared, locals, self.globals)
        return made

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Return the text for the given variables; the arguments are those of `dict`."""
        return self._render(self.new_context(dict(*args, **kwargs)), None)

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Yield the text, in one piece."""
        yield self.render(*args, **kwargs)

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        """Return the text as a Jinja2 stream."""
        from jinja2.environment import TemplateStream

        return TemplateStream(self.generate(*args, **kwargs))

    def root_render_func(self, context: Any) -> Iterator[str]:
        """Yield the text for a context, in one piece."""
        yield self._render(context, None)

    def make_module(self, *args: Any, **kwargs: Any) -> TemplateModule:
        """Return the module that ``{% import %}`` binds; the arguments are those of `new_context`."""
        context = self.new_context(*args, **kwargs)
        return TemplateModule(self, context, [self._render(context, None)])

    def _get_default_module(self, ctx: Any = None) -> TemplateModule:
        extra = extra_globals(ctx, self.globals)
        if extra:
            return self.make_module(extra)
        module: TemplateModule = self._kept.get(self.make_module)
        return module

    @property
    def module(self) -> TemplateModule:
        """The template as a module, rendered without variables."""
        return self._get_default_module()

    def with_globals(self, more: Mapping[str, Any] | None) -> PlainTemplate:
        """Return the template with additional globals; the template itself if `more` is empty."""
        if not more:
            return self
        made = object.__new__(PlainTemplate)
        made.__dict__.update(self.__dict__, globals={**self.globals, **more}, _kept=KeptModule())
        return made

    def __repr__(self) -> str:
        return f"<Template {f'memory:{id(self):x}' if self.name is None else repr(self.name)}>"


def _in_one_piece(render: Callable[..., str]) -> Callable[..., Iterator[str]]:
    def pieces(ctx: Any, blocks: Any = None) -> Iterator[str]:
        yield render(ctx, blocks)

    return pieces


class PlainEnvironment:
    """An environment of kernel templates; compiled code knows it as ``environment``.

    It passes for a `jinja2.Environment`: other attributes are those of the underlying Jinja2 environment.

    Parameters
    ----------
    files : SearchPath
    bytecode_cache : BytecodeCache or None
    context_hash : callable
        A function that returns `KernelEnvironment.context_hash`; if that is None, nothing is stored.
    jinja : callable
        A function that returns the underlying Jinja2 environment.
    static : mapping
        The static context; its names are globals, too.
    filters, tests, globals : mapping
        Additional ones; they override ours.

    Attributes
    ----------
    globals : dict
    names : dict
        The globals of templates' code.
    """

    __class__ = passes_for("jinja2.environment", "Environment")
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
        context_hash: Callable[[], str | None],
        jinja: Callable[[], JinjaEnvironment],
        *,
        static: Mapping[str, Any],
        filters: Mapping[str, Callable[..., Any]],
        tests: Mapping[str, Callable[..., Any]],
        globals: Mapping[str, Any],  # noqa: A002  (Jinja2's name for it)
    ) -> None:
        self.files = files
        self.static = static
        self.filters = names.NameTable("FILTERS", names.FILTERS, cuda_filters.FILTERS, filters)
        self.tests = names.NameTable("TESTS", names.TESTS, cuda_filters.TESTS, tests)
        self.globals: dict[str, Any] = {**names.GLOBALS, **cuda_filters.GLOBALS, **static, **globals}
        self.names = namespace(NAMES, self)
        self._cache = bytecode_cache
        self._context_hash = context_hash
        self._jinja = jinja
        self._loaded: dict[str, tuple[TemplateFile, PlainTemplate | None]] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(self._jinja(), name)
        if hasattr(value, "__func__"):  # Jinja2's filters fetch such methods for every item
            self.__dict__[name] = value
        return value

    # Templates

    def get_template(self, name: Any, parent: str | None = None, globals: Mapping[str, Any] | None = None) -> Any:  # noqa: A002
        """Return a template of the search path; it is reloaded if its file has changed.

        Raises
        ------
        jinja2.TemplateNotFound
            If there is no template of that name.
        jinja2.TemplateSyntaxError
            If the template's syntax is wrong.
        """
        template = self.find("get_template", name, parent)
        if template is None:
            from jinja2 import TemplateNotFound

            raise TemplateNotFound(name)
        return template.with_globals(globals) if globals else template

    def select_template(self, names: Any, parent: str | None = None, globals: Mapping[str, Any] | None = None) -> Any:  # noqa: A002
        """Return the first template of `names` that exists; see `get_template`."""
        template = self.find("select_template", names, parent)
        if template is None:
            from jinja2 import TemplatesNotFound

            if not names:
                raise TemplatesNotFound(message="Tried to select from an empty list of templates.")
            raise TemplatesNotFound(list(names))
        return template.with_globals(globals) if globals else template

    def get_or_select_template(
        self,
        template_name_or_list: Any,
        parent: str | None = None,
        globals: Mapping[str, Any] | None = None,  # noqa: A002
    ) -> Any:
        """Return the template of a given name, or, for a list of names, the first template that exists."""
        if _is_name(template_name_or_list):
            return self.get_template(template_name_or_list, parent, globals)
        return self.select_template(template_name_or_list, parent, globals)

    def find(self, method: str, names: Any, parent: str | None) -> Any:  # noqa: ARG002  (names aren't relative)
        """Return the template that `method`, one of the methods above, returns; None if there is no such template."""
        if method == "get_template" or (method == "get_or_select_template" and _is_name(names)):
            return names if _is_template(names) else self._find(names)
        if is_undefined(names):
            names._fail_with_undefined_error()
        for name in names or ():
            template = name if _is_template(name) else None if is_undefined(name) else self._find(name)
            if template is not None:
                return template
        return None

    def from_string(self, source: str, globals: dict[str, Any] | None = None) -> Any:  # noqa: A002  (Jinja2's name)
        """Return a template made from `source`."""
        from cuda_progcache.templates.bytecode_cache import hash_source

        made = self._load(None, source, hash_source(source), STRING)
        return self._jinja().from_string(source, globals) if made is None else made.with_globals(globals)

    def has_string(self, source: str) -> bool:
        """Whether the bytecode cache has the code of a template made from `source`."""
        from cuda_progcache.templates.bytecode_cache import hash_source

        cache, context = self._cache, self._context_hash()
        return (
            cache is not None and context is not None and cache.has(STRING, hash_source(source), context_hash=context)
        )

    def _find(self, name: Any) -> Any:
        """Return a template of the search path; None if there is none of that name."""
        if is_undefined(name):
            str(name)  # raises an error that says which name is undefined
        found = self._loaded.get(name)
        if found is None or not found[0].is_current():
            file = self.files.read(name)
            if file is None:
                return None
            found = self._loaded[name] = file, self._load(name, file.text, file.digest, file.path)
        if found[1] is None:
            return self._jinja().get_template(name)
        note({name: found[0]})
        return found[1]

    def _load(self, name: str | None, text: str, digest: str, path: str) -> PlainTemplate | None:
        """Return a template made from `text`; None if the template needs the Jinja2 environment."""
        context = None if self._cache is None else self._context_hash()
        cache = None if context is None else self._cache
        key = name or STRING
        compiled = None if cache is None else cache.load(key, digest, context_hash=context)
        code = None if compiled is None else compiled.code
        info = None if code is None else CodeInfo.of(code)
        if code is None or info is None:
            from cuda_progcache.templates.frames import Compiled

            code = self._jinja().compile_kernel(text, name, path)
            info = CodeInfo.of(code) or CodeInfo()
            if cache is not None:
                cache.save(key, digest, Compiled(code), context_hash=context)
        if not info.plain:
            return None
        move(code, path)
        return PlainTemplate(self, code, name, info)

    # Dependencies

    def referred(self, name: str) -> tuple[TemplateFile, tuple[str, ...]] | None:
        """Return a template's file and the names of the templates that it refers to; None if it doesn't exist."""
        if self._find(name) is None:
            return None
        file, template = self._loaded[name]
        return (file, template.references) if template is not None else self._jinja().referred(name)

    # Lookups by templates' code

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Return an attribute of `obj`; failing that, an item; failing that, an undefined value."""
        found: Any = self.names["_getattr"]
        return found(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item of `obj`; failing that, an attribute; failing that, an undefined value."""
        try:
            return obj[argument]
        except (AttributeError, TypeError, LookupError):
            if isinstance(argument, str):
                try:
                    return getattr(obj, str(argument))
                except AttributeError:
                    pass
            return self.undefined(obj=obj, name=argument)


def closure(environment: Any, used: Mapping[str, TemplateFile]) -> dict[str, str]:
    """Return ``{template: sha256}`` of the files in `used` and of all templates that these refer to by name.

    The digests of files in `used` are those of the content that was loaded. A template that doesn't exist isn't listed,
    because ``{% include ... ignore missing %}`` may name it.
    """
    digests = {name: file.digest for name, file in used.items()}
    waiting = list(used)
    done = set()
    while waiting:
        name = waiting.pop()
        if name in done:
            continue
        done.add(name)
        found = environment.referred(name)
        if found is not None:
            digests.setdefault(name, found[0].digest)
            waiting += found[1]
    return dict(sorted(digests.items()))


def _is_template(value: object) -> bool:
    """Whether a value is a template, ours or Jinja2's."""
    theirs = getattr(sys.modules.get("jinja2.environment"), "Template", PlainTemplate)
    return isinstance(value, (PlainTemplate, theirs))


def _is_name(value: object) -> bool:
    return isinstance(value, str) or is_undefined(value) or _is_template(value)

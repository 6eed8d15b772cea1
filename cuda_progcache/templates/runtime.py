# SPDX-License-Identifier: Apache-2.0
"""The runtime of compiled templates; it doesn't import jinja2.

`Compiler.compile` returns a code object, which is executed in a namespace with::

    NAMES          this module's table; also JINJA2_NAMES, if the environment is a jinja2.Environment
    environment    the environment: filters, tests, undefined, finalize, concat, get_template(name, parent), ...
    _getattr, _getitem
    _pc_0, _pc_1   the values of Compiler.precomputed, if there are any
    __name__, __file__

The compiler takes every name that it emits from these tables. The code defines::

    name           the template's name, or None
    source         the text that was compiled, or None; the other forms are compiled from it
    render(ctx, _blocks=None) -> str
    _block_NAME(ctx, _blocks) -> str       for each block and region
    blocks         {NAME: _block_NAME}
    _globals_setup(ctx)                    if the template has {% globals %} or {% imports %}
    _imports_setup(ctx)                    if it imports by a constant name at its top level
    parent                                 the name of the template that it extends, if the name is constant

In an async environment, ``render`` and the blocks are coroutine functions. With ``form="stream"``, the code instead
defines ``render_stream(ctx, _blocks=None)`` and ``_block_NAME_stream``: generators, or async generators, of runs of
text. With ``form="pieces"``, it defines ``render_pieces`` and ``_block_NAME_pieces``, which yield one item for each
piece of output, as Jinja2's own code does. The forms other than the first are compiled from ``source`` on first use.
After the code is executed, ``_own``, the template's ``{NAME: Block}``, must be added to the namespace.

`ctx` is a `cuda_progcache.templates.context.Context`, or an instance of the environment's ``context_class``.
"""

from __future__ import annotations

import sys

from cuda_progcache.templates.context import STOPPED, BlockReference, Context, TemplateReference, with_names
from cuda_progcache.templates.objects import LookAhead, LoopContext, Macro, Namespace
from cuda_progcache.templates.undefined import Undefined, missing, public_missing

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, MutableMapping
    from types import CodeType
    from typing import Any

EMPTY: dict[str, Any] = {}
"""The replacement for a value that isn't a plain dict, in attribute lookups; it is never changed."""

SIZED = frozenset({list, tuple, range, dict, str, set, frozenset, type({}.items()), type({}.keys()), type({}.values())})
"""Types whose length is known before a loop; `FIXED` has those that the body of a loop can't change."""
FIXED = frozenset({tuple, range, str, frozenset})


# Sources of text: blocks and other templates


class TextSource:
    """A block or template whose text a template puts out, in any form.

    Each subclass has ``render``, which returns the whole text, and ``give``, which yields it in one of the other forms.
    """

    __slots__ = ()
    give: Callable[..., Any]

    def stream(self, *args: Any) -> Any:
        """Return an iterator over runs of text."""
        return self.give("stream", *args)

    def pieces(self, *args: Any) -> Any:
        """Return an iterator over pieces of output."""
        return self.give("pieces", *args)


class Block(TextSource):
    """A block of a template; calling a block returns an iterator over its text, as for Jinja2's blocks.

    Parameters
    ----------
    name : str
        The block's name.
    function : callable
        The function ``_block_NAME`` of the compiled code.
    form : callable
        A function that takes the name of a form, ``"stream"`` or ``"pieces"``, and returns the namespace of that form.
    """

    __slots__ = ("_form", "_name", "render")

    def __init__(self, name: str, function: Callable[..., Any], form: Callable[[str], Mapping[str, Any]]) -> None:
        self._name = name
        self.render = function
        self._form = form

    def give(self, form: str, ctx: Any, blocks: Any = None) -> Any:
        """Return an iterator over the text in a given form."""
        return self._form(form)[f"_block_{self._name}_{form}"](ctx, blocks)

    def __call__(self, ctx: Any) -> Any:
        """Return an iterator over pieces of output; `ctx` may be a context of any class."""
        return self.pieces(adopted(ctx))


class Jinja2Block(TextSource):
    """A block of a template compiled by Jinja2's own compiler, or an object that behaves like such a block."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def give(self, _form: str, ctx: Any, _blocks: Any = None) -> Any:
        """Return an iterator over pieces of output, for every form."""
        return self._function(ctx)

    def render(self, ctx: Any, _blocks: Any = None) -> Any:
        """Return the text; an awaitable of the text in an async environment."""
        return gathered(ctx.environment, self._function(ctx))

    def __call__(self, ctx: Any) -> Any:
        """Return an iterator over pieces of output."""
        return self._function(ctx)


def gathered(environment: Any, pieces: Any) -> Any:
    """Return the pieces joined by the environment's ``concat``; an awaitable of the result in an async environment."""
    if not environment.is_async:
        return environment.concat(pieces)

    async def gather() -> Any:
        return environment.concat([piece async for piece in pieces])

    return gather()


def adopted(ctx: Any) -> Any:
    """Prepare a context of a foreign class for compiled code: assume that other code may have changed it."""
    if not hasattr(ctx, "seen"):
        ctx.seen = True
    return ctx


class OtherTemplate(TextSource):
    """A template whose text becomes part of another's: the other's parent, or a template that it includes.

    Parameters
    ----------
    template : Template
        A template of ours or Jinja2's.
    ctx : Context, optional
        The context to render the template in. Without it, the methods need a context.
    """

    __slots__ = ("_ctx", "_template")

    def __init__(self, template: Any, ctx: Any = None) -> None:
        self._template = template
        self._ctx = ctx

    def render(self, ctx: Any = None, blocks: Any = None) -> Any:
        """Return the text; an awaitable of the text in an async environment."""
        ctx = self._ctx if ctx is None else ctx
        function = getattr(self._template, "_render", None)
        if function is not None:
            return function(ctx, blocks)
        return gathered(ctx.environment, self._template.root_render_func(ctx))

    def give(self, form: str, ctx: Any = None, blocks: Any = None) -> Any:
        """Return an iterator over the text in a given form; one of Jinja2's templates yields pieces."""
        ctx = self._ctx if ctx is None else ctx
        make = getattr(self._template, "_form", None)
        return self._template.root_render_func(ctx) if make is None else make(form)[f"render_{form}"](ctx, blocks)


class IncludedModule(TextSource):
    """``{% include %}`` without context: the text of the template's default module."""

    __slots__ = ("_template",)

    def __init__(self, template: Any) -> None:
        self._template = template

    def render(self) -> Any:
        """Return the text; an awaitable of the text in an async environment."""
        return gathered(self._template.environment, self.pieces())

    def give(self, _form: str) -> Any:
        """Return an iterator over pieces of output, for every form."""
        template = self._template
        if not template.environment.is_async:
            return (piece for piece in template._get_default_module()._body_stream)

        async def generate() -> Any:
            for piece in (await template._get_default_module_async())._body_stream:
                yield piece

        return generate()


def found(environment: Any, method: str, names: Any, parent: str | None) -> Any:
    """Return the template of ``{% include … ignore missing %}``; None if it doesn't exist."""
    quietly = getattr(type(environment), "find", None)
    if quietly is not None:
        return quietly(environment, method, names, parent)
    from jinja2 import TemplateNotFound

    try:
        return getattr(environment, method)(names, parent)
    except TemplateNotFound:
        return None


def included(template: Any, context: Any, locals_: Mapping[str, Any]) -> OtherTemplate:
    """Return the text source of ``{% include %}``."""
    return OtherTemplate(template, template.new_context(context.get_all(), True, with_names({}, locals_)))


def imported(template: Any, context: Any, locals_: Mapping[str, Any] | None = None) -> Any:
    """Return the module of ``{% import %}``; an awaitable of the module in an async environment.

    The template is imported with context if `locals_` is not None.
    """
    is_async = context.environment.is_async
    if locals_ is None:
        return template._get_default_module_async(context) if is_async else template._get_default_module(context)
    make = template.make_module_async if is_async else template.make_module
    return make(context.get_all(), True, with_names({}, locals_))


def derived(context: Any, locals_: Mapping[str, Any]) -> Any:
    """Return a copy of the context with the names of a scope added."""
    return context.derived(with_names({}, locals_))


def extend(ctx: Any, parent: Any) -> None:
    """Append a parent's blocks to those of the context."""
    blocks = ctx.blocks
    for name, block in parent.blocks.items():
        blocks.setdefault(name, []).append(block if type(block) is Block else Jinja2Block(block))


def not_exported(environment: Any, module: Any, position: str, name: str) -> Any:
    """Return the undefined value of a name that a module doesn't export."""
    hint = f"the template {module.__name__!r} (imported on {position}) does not export the requested name {name!r}"
    return environment.undefined(hint, name=name)


def new_context(
    kind: Callable[..., Any],
    template: Any,
    variables: dict[str, Any] | None,
    shared: bool,  # noqa: FBT001  (as Jinja2's)
    locals_: Mapping[str, Any] | None,
    names: Any,
) -> Any:
    """Return a new context of class `kind` for a template.

    The context has the variables alone if they are `shared`, otherwise also the template's globals. `names` are these
    globals, as a mapping that `dict` copies quickly.
    """
    given = {} if variables is None else variables
    parent = given if shared else dict(names, **given)
    return kind(template.environment, with_names(parent, locals_), template.name, template.blocks, template.globals)


def extra_globals(context: Any, own: MutableMapping[str, Any]) -> dict[str, Any]:
    """Return the importing template's globals that the imported one doesn't have."""
    if context is None:
        return {}
    theirs = getattr(context, "_globals", None)
    if theirs is own:
        return {}
    maps, own_maps = getattr(theirs, "maps", None), getattr(own, "maps", None)
    if maps is not None and own_maps is not None and len(maps) == 2 and not maps[0] and own_maps[-1] is maps[1]:
        return {}  # the importing template has no globals of its own, and both share the environment's
    return {key: context.parent[key] for key in context.globals_keys - own.keys()}


# Calls, names, attributes


def seen(ctx: Any) -> Any:
    """Return the context for code outside of templates; names are looked up anew afterwards, as it may change them."""
    ctx.seen = True
    return ctx


def resolver(ctx: Any) -> Callable[[str], Any]:
    """Return a function that looks up a name in a context of a user's class; its result may be ``missing``."""
    resolve = ctx.resolve_or_missing

    def look_up(name: str) -> Any:
        value = resolve(name)
        return missing if value is public_missing() else value

    return look_up


def finder(ctx: Any) -> Callable[[str], Any]:
    """Return a function that does what `Context.resolve` does; code with many lookups calls it to stay short."""
    variables, given, undefined = ctx.vars, ctx.parent, ctx.environment.undefined

    def find(name: str) -> Any:
        if name in variables:
            return variables[name]
        return given[name] if name in given else undefined(name=name)

    return find


def call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a function as a template does; the result is that of ``Context.call``, but plain functions are faster."""
    if function is range and not kwargs:
        return range(*args)
    kind = type(function)
    if kind is Macro:
        return function.called(args, kwargs, context.eval_ctx.autoescape)
    if not _is_direct(kind, function):
        return context.call(function, *args, **kwargs)
    try:
        return function(*args, **kwargs)
    except StopIteration:
        return context.environment.undefined(STOPPED)


def call_in_scope(context: Any, in_loop: Any, in_block: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call a function as `call` does; a ``pass_context`` function also sees the names in `in_loop` and `in_block`."""
    if type(function) is not Macro and not _is_direct(type(function), function):
        return context.call(function, *args, **kwargs, _loop_vars=in_loop, _block_vars=in_block)
    return call(context, function, *args, **kwargs)


def _is_direct(kind: type, function: Any) -> bool:
    """Whether a function certainly wants neither the context nor the eval context or environment."""
    if kind is _BUILTIN:
        return True
    if kind in _FUNCTIONS:
        return not hasattr(function, "jinja_pass_arg")
    return kind is BlockReference or (kind is type and function in _CLASSES)


_BUILTIN = type(len)
_FUNCTIONS = frozenset({type(call), type(Context.super.__get__(0, int))})
_CLASSES = frozenset({range, dict, list, int, str, float, bool, tuple, Namespace})


def absent(kind: str, name: str) -> Callable[..., Any]:
    """Return the replacement for a filter or test that the environment doesn't have: a function that raises."""

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise runtime_error(f"No {kind} named {name!r} found.")

    return fail


def runtime_error(message: str) -> Exception:
    """Return a ``jinja2.TemplateRuntimeError``; Jinja2 is imported for it."""
    from jinja2 import TemplateRuntimeError

    return TemplateRuntimeError(message)


def namespace_of(value: Any) -> Any:
    """Return `value` if it is a namespace, whose attributes a template may set; otherwise raise an error."""
    if isinstance(value, (Namespace, getattr(sys.modules.get("jinja2.utils"), "Namespace", Namespace))):
        return value
    raise runtime_error("cannot assign attribute on non-namespace object")


def identity(value: Any) -> Any:
    """Return `value` unchanged."""
    return value


def str_join(parts: Iterable[Any]) -> str:
    """Return the texts of the parts, joined."""
    return "".join(map(str, parts))


def attribute_getter(environment: Any) -> Callable[[Any, str], Any]:
    """Return the function for ``a.b``: it returns an attribute; failing that, an item, or an undefined value."""

    def get(obj: Any, name: str) -> Any:
        value = getattr(obj, name, missing)
        if value is not missing:
            return value
        try:
            return obj[name]
        except (TypeError, LookupError, AttributeError):
            return environment.undefined(obj=obj, name=name)

    return get


_TEXTS: dict[range, tuple[tuple[int, str], ...]] = {}


def texts(items: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    """Return pairs of each item and its text if it is an integer, otherwise of the item and itself.

    The pairs of short ranges are cached, because kernels loop over the same short ranges again and again.
    """
    if type(items) is range:
        pairs = _TEXTS.get(items)
        if pairs is not None:
            return pairs
        fresh = zip(items, map(str, items), strict=True)
        if len(items) > 256 or len(_TEXTS) >= 1024:
            return fresh
        pairs = _TEXTS[items] = tuple(fresh)
        return pairs
    return ((item, str(item) if type(item) is int else item) for item in items)


def refuse_static(variables: Mapping[str, Any], static: Mapping[str, Any]) -> None:
    """Raise an error if a variable is in the static context: templates would use the static value.

    Raises
    ------
    ParameterError
    """
    for name in variables:
        if name in static:
            from cuda_progcache.errors import ParameterError

            raise ParameterError(
                f"{name!r} can't be passed to a render: it is in the static context, where it is {static[name]!r}"
            )


# The tables

NAMES: dict[str, Any] = {
    "LoopContext": LoopContext,
    "Macro": Macro,
    "TemplateReference": TemplateReference,
    "Undefined": Undefined,
    "_Namespace": Namespace,
    "_absent": absent,
    "_ahead": LookAhead,
    "_call": call,
    "_call_in_scope": call_in_scope,
    "_derived": derived,
    "_empty": EMPTY,
    "_extend": extend,
    "_finder": finder,
    "_fixed": FIXED,
    "_found": found,
    "_imported": imported,
    "_include": included,
    "_include_alone": IncludedModule,
    "_namespace_of": namespace_of,
    "_not_exported": not_exported,
    "_parent": OtherTemplate,
    "_resolver": resolver,
    "_runtime_error": runtime_error,
    "_seen": seen,
    "_sized": SIZED,
    "_texts": texts,
    "identity": identity,
    "missing": missing,
    "str_join": str_join,
}
"""The globals of compiled code that are the same with and without Jinja2."""

JINJA2_NAMES = frozenset({"AsyncLoopContext", "Markup", "_escape", "auto_aiter", "auto_await", "escape", "markup_join"})
"""The globals that need Jinja2, in code that escapes or is async. A template that uses none renders without Jinja2."""

ENVIRONMENT_NAMES = frozenset({"environment", "_getattr", "_getitem", "_own"})
"""The globals that depend on the environment or the template."""


def namespace(table: Mapping[str, Any], environment: Any) -> dict[str, Any]:
    """Return a namespace to execute an environment's templates in: `table` and the names that `bind` adds."""
    names = {**table, "__name__": "cuda_progcache.template"}
    bind(names, environment)
    return names


def bind(names: MutableMapping[str, Any], environment: Any) -> None:
    """Add the names that depend on the environment to a template's namespace."""
    names["environment"] = environment
    names["_getattr"] = attribute_getter(environment)
    names["_getitem"] = environment.getitem


# Information about code without its source


class CodeInfo:
    """Information about a template's code that is needed before the code is executed; it is stored in the code.

    Parameters
    ----------
    references : tuple of str
        The names of the templates that this one includes, imports or extends by a constant name.
    plain : bool
        Whether the code runs without Jinja2.
    static : tuple of str
        The names of the static context whose values the code expects as ``_pc_0``, ``_pc_1``, ….
    warnings : tuple of (str, str, int, str)
        The compiler's warnings: code, message, line, suggestion.
    """

    __slots__ = ("plain", "references", "static", "warnings")

    def __init__(
        self,
        references: tuple[str, ...] = (),
        plain: bool = False,  # noqa: FBT001, FBT002  (the order of the record)
        static: tuple[str, ...] = (),
        warnings: tuple[tuple[str, str, int, str], ...] = (),
    ) -> None:
        self.references = references
        self.plain = plain
        self.static = static
        self.warnings = warnings

    def put_into(self, code: CodeType) -> CodeType:
        """Return a copy of the code with this info as its last constant."""
        record = (_INFO, self.references, self.plain, self.static, self.warnings)
        return code.replace(co_consts=(*code.co_consts, record))

    @classmethod
    def of(cls, code: CodeType) -> CodeInfo | None:
        """Return the info of a template's code; None if it has none."""
        last = code.co_consts[-1] if code.co_consts else None
        return cls(*last[1:]) if isinstance(last, tuple) and len(last) == 5 and last[0] == _INFO else None


_INFO = "cuda_progcache"

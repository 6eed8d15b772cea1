# SPDX-License-Identifier: Apache-2.0
"""What compiled templates run on; imports nothing of jinja2.

The code object that `cuda_progcache.templates.compiler.Compiler.compile` gives is executed in the namespace that
`namespace` of a runtime makes: of this module, or of :mod:`cuda_progcache.templates.jinja_runtime`, which has Jinja2's
classes where this one has its own. It holds::

    NAMES          the runtime's names, each as a global: missing, _call, _getattr, Macro, ...
    environment    the environment: filters, tests, undefined, finalize, concat, get_template(name, parent), ...
    _pc_0, _pc_1   the values of Compiler.precomputed, if there are any
    __name__, __file__

The code defines::

    name           the template's name, or None
    source         the text it was compiled from, or None; what the lazy forms are compiled from
    render(ctx, _blocks=None) -> str
    _block_NAME(ctx, _blocks) -> str       for each block and region
    blocks         {NAME: _block_NAME}
    regions        {NAME: ((parameter, ...), number of defaults)}
    _globals_setup(ctx)                    where the template has {% globals %} or {% imports %}
    parent                                 the name of the template it extends, where that is a constant

In an async environment ``render`` and the blocks are coroutine functions. Compiled for streaming (``form="stream"``)
the code defines ``render_stream(ctx, _blocks=None)`` and ``_block_NAME_stream`` in their place: generators, or async
generators, that put out runs of text; ``form="pieces"`` is the same with one item per piece of output, as Jinja2's own,
in ``render_pieces`` and ``_block_NAME_pieces``. The other forms are compiled from ``source`` when they are asked for.
After the code was executed, ``_own`` has to be put into the namespace: ``{NAME: Block}`` of the template.

`ctx` has ``vars`` (what the template set), ``parent`` (what it was given), ``environment``, ``eval_ctx``, ``name``,
``blocks`` ({name: [Block, ...]}, the child's first), ``exported_vars``, ``escaped`` (whether foreign code has seen it),
and ``call``, ``derived``, ``get_all``, ``resolve_or_missing``.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any

EMPTY: dict[str, Any] = {}
"""Stands for a value that is no plain dict, where attributes are looked up; never changed."""

SIZED = frozenset({list, tuple, range, dict, str, set, frozenset, type({}.items()), type({}.keys()), type({}.values())})
"""Types whose number of items is known before a loop; `FIXED` are those that a loop's body can't change."""
FIXED = frozenset({tuple, range, str, frozenset})

STOPPED = "value was undefined because a callable raised a StopIteration exception"


class Missing:
    """What stands in a local for a name that has no value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "missing"

    def __reduce__(self) -> str:
        return "missing"


missing = Missing()


class Ahead:
    """Goes through items and can tell whether the present one is the last: it looks one item ahead, when asked.

    Asked for their number, it takes all of them out of a generator.
    """

    __slots__ = ("_after", "_index", "_items", "_iterator", "_length")

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self._iterator = iter(items)
        self._after: Any = missing
        self._index = 0
        self._length: int | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._after is missing:
            item = next(self._iterator)
        else:
            item, self._after = self._after, missing
        self._index += 1
        return item

    @property
    def last(self) -> bool:
        """Whether there is no item after the present one."""
        if self._after is missing:
            self._after = next(self._iterator, missing)
        return self._after is missing

    @property
    def length(self) -> int:
        """The number of items."""
        if self._length is None:
            try:
                self._length = len(self._items)  # type: ignore[arg-type]
            except TypeError:
                rest = list(self._iterator)
                self._iterator = iter(rest)
                self._length = len(rest) + self._index + (self._after is not missing)
        return self._length


class Block:
    """A block of a template, in every form.

    Calling it gives an iterator over its text, as Jinja2's blocks do.

    Parameters
    ----------
    name : str
        The block's.
    function : callable
        ``_block_NAME`` of the form that was compiled.
    form : callable
        Takes a form's name, ``"stream"`` or ``"pieces"``, and gives the namespace that was compiled for it.
    """

    __slots__ = ("_form", "_name", "render")

    def __init__(self, name: str, function: Callable[..., Any], form: Callable[[str], Mapping[str, Any]]) -> None:
        self._name = name
        self.render = function
        self._form = form

    def stream(self, ctx: Any, blocks: Any = None) -> Any:
        """Give runs of text."""
        return self._form("stream")[f"_block_{self._name}_stream"](ctx, blocks)

    def pieces(self, ctx: Any, blocks: Any = None) -> Any:
        """Give each piece of output."""
        return self._form("pieces")[f"_block_{self._name}_pieces"](ctx, blocks)

    __call__ = pieces


class ForeignBlock:
    """A block of a template that Jinja2's own compiler made, or something that behaves like one."""

    __slots__ = ("pieces",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.pieces = _without_blocks(function)

    def render(self, ctx: Any, blocks: Any = None) -> Any:
        """Give the text; an awaitable of it in an async environment."""
        return gathered(ctx.environment, self.pieces(ctx, blocks))

    stream: Callable[..., Any] = property(lambda self: self.pieces)  # type: ignore[assignment]

    def __call__(self, ctx: Any) -> Any:
        """Give each piece of output."""
        return self.pieces(ctx)


def _without_blocks(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(ctx: Any, blocks: Any = None) -> Any:  # noqa: ARG001  (the signature of ours)
        return function(ctx)

    return call


def gathered(environment: Any, pieces: Any) -> Any:
    """Return the pieces put together as the environment does it; an awaitable of that in an async environment."""
    if not environment.is_async:
        return environment.concat(pieces)

    async def gather() -> Any:
        return environment.concat([piece async for piece in pieces])

    return gather()


class Source:
    """Where text comes from that isn't the template's own: a parent, or something included.

    Parameters
    ----------
    template : Template
        Ours, or one of Jinja2's.
    ctx : Context, optional
        The context to render it in; where it isn't given here, the methods get it.
    """

    __slots__ = ("_ctx", "_template")

    def __init__(self, template: Any, ctx: Any = None) -> None:
        self._template = template
        self._ctx = ctx

    def render(self, ctx: Any = None, blocks: Any = None) -> Any:
        """Give the text; an awaitable of it in an async environment."""
        if ctx is None:
            ctx = self._ctx
        function = getattr(self._template, "_render", None)
        if function is not None:
            return function(ctx, blocks)
        return gathered(ctx.environment, self._template.root_render_func(ctx))

    def stream(self, ctx: Any = None, blocks: Any = None) -> Any:
        """Give runs of text."""
        return self._form("stream", ctx, blocks)

    def pieces(self, ctx: Any = None, blocks: Any = None) -> Any:
        """Give each piece of output."""
        return self._form("pieces", ctx, blocks)

    def _form(self, form: str, ctx: Any, blocks: Any) -> Any:
        if ctx is None:
            ctx = self._ctx
        make = getattr(self._template, "_form", None)
        if make is None:
            return self._template.root_render_func(ctx)
        return make(form)[f"render_{form}"](ctx, blocks)


_TEXTS: dict[range, tuple[tuple[int, str], ...]] = {}


def texts(items: Iterable[Any]) -> Iterable[tuple[Any, Any]]:
    """Give each item with what stands for its text: that of a whole number, else the item itself.

    Kernels count in short ranges, again and again: what these give is kept.
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


def extend(ctx: Any, parent: Any) -> None:
    """Put a parent's blocks behind those that the context has."""
    blocks = ctx.blocks
    for name, block in parent.blocks.items():
        blocks.setdefault(name, []).append(block if type(block) is Block else ForeignBlock(block))


def foreign(ctx: Any) -> Any:
    """Return the context, and note that code which isn't ours sees it: from now on names are looked up anew."""
    ctx.escaped = True
    return ctx


def attribute_getter(environment: Any) -> Callable[[Any, str], Any]:
    """Return a function that gets an attribute, else an item, else an undefined object (Jinja2's ``a.b``)."""

    def get(obj: Any, name: str) -> Any:
        value = getattr(obj, name, missing)
        if value is not missing:
            return value
        try:
            return obj[name]
        except (TypeError, LookupError, AttributeError):
            return environment.undefined(obj=obj, name=name)

    return get


def not_exported(environment: Any, module: Any, position: str, name: str) -> Any:
    """Return the undefined object of a name that a module doesn't have."""
    hint = f"the template {module.__name__!r} (imported on {position}) does not export the requested name {name!r}"
    return environment.undefined(hint, name=name)


NAMES: dict[str, Any] = {
    "_ahead": Ahead,
    "_empty": EMPTY,
    "_extend": extend,
    "_fixed": FIXED,
    "_foreign": foreign,
    "_not_exported": not_exported,
    "_parent": Source,
    "_sized": SIZED,
    "_texts": texts,
}
"""The globals of compiled code that are the same with Jinja2 and without; each runtime adds its own."""

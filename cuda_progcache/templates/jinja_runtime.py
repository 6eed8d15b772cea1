# SPDX-License-Identifier: Apache-2.0
"""What compiled templates run on in a `jinja2.Environment`: Jinja2's classes, and a context that costs less."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import jinja2
from jinja2 import TemplateNotFound, TemplateRuntimeError, Undefined, runtime
from jinja2.async_utils import auto_aiter, auto_await
from jinja2.nodes import EvalContext
from jinja2.runtime import AsyncLoopContext, BlockReference, LoopContext, Macro, TemplateReference
from jinja2.utils import Namespace, internal_code, missing
from markupsafe import Markup
from markupsafe import escape as markup_escape

from cuda_progcache.templates.runtime import NAMES as SHARED_NAMES
from cuda_progcache.templates.runtime import (
    STOPPED,
    Source,
    attribute_getter,
    extend,
)

try:
    from markupsafe._speedups import _escape_inner as _escape_text
except ImportError:  # without its C part, or before it had this

    def _escape_text(text: str, /) -> str:
        return str(markup_escape(text))


_PLAIN_CALLABLES = frozenset({FunctionType, MethodType})
_PLAIN_CLASSES = frozenset({range, dict, list, int, str, float, bool, tuple, Namespace})
_AS_THEY_ARE = frozenset({int, float, bool})


class Context(runtime.Context):
    """Jinja2's context, whose rarely needed parts are made when they are asked for.

    Attributes
    ----------
    escaped : bool
        Whether code that isn't a template's has been given the context, and may have changed it since.
    """

    escaped = False
    lean = True

    def __init__(
        self,
        environment: jinja2.Environment,
        parent: dict[str, Any],
        name: str | None,
        blocks: dict[str, Any],
        globals: MutableMapping[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
    ) -> None:
        self.parent = parent
        self.vars = {}
        self.environment = environment
        self.exported_vars = set()
        self.name = name
        self._template_blocks = blocks
        self._globals = globals

    def __getattr__(self, name: str) -> Any:
        if name == "eval_ctx":
            value: Any = EvalContext(self.environment, self.name)
        elif name == "blocks":
            value = {key: [block] for key, block in self._template_blocks.items()}
        elif name == "globals_keys":
            value = set() if self._globals is None else set(self._globals)
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """As Jinja2's."""
        self.escaped = True
        return runtime.Context.call(self, function, *args, **kwargs)

    def super(self, name: str, current: Any) -> Any:
        """As Jinja2's."""
        try:
            stack = self.blocks[name]
            index = stack.index(current) + 1
            stack[index]
        except LookupError:
            return self.environment.undefined(f"there is no parent block called {name!r}.", name="super")
        return ParentBlock(name, self, stack, index)

    def derived(self, locals: Mapping[str, Any] | None = None) -> Context:  # noqa: A002  (Jinja2's name for it)
        """As Jinja2's."""
        parent = self.get_all()
        if locals:
            parent = {**parent, **{name: value for name, value in locals.items() if value is not missing}}
        context = type(self)(self.environment, parent, self.name, {})
        context.eval_ctx = self.eval_ctx
        context.escaped = self.escaped
        context.blocks = {name: list(stack) for name, stack in self.blocks.items()}
        return context


class ParentBlock(BlockReference):
    """What ``super`` is; rendered in one go."""

    def __call__(self) -> Any:
        """Give the text; an awaitable of it in an async environment."""
        context = self._context
        environment = context.environment
        render = getattr(self._stack[self._depth], "render", None)
        if render is None or environment.is_async:
            return super().__call__()
        text = render(context, context.blocks)
        return Markup(text) if context.eval_ctx.autoescape else text  # noqa: S704  (a template's own output)

    @property
    def super(self) -> Any:
        """The block above."""
        above = BlockReference.super.fget(self)  # type: ignore[attr-defined]
        if type(above) is BlockReference:
            return ParentBlock(above.name, above._context, above._stack, above._depth)
        return above


def call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call what a template calls: like ``Context.call``, quick about plain functions."""
    if function is range and not kwargs:
        return range(*args)
    kind = type(function)
    if kind is BuiltinFunctionType or (kind in _PLAIN_CALLABLES and not hasattr(function, "jinja_pass_arg")):
        pass
    elif kind is Macro:
        eval_ctx = context.eval_ctx
        if not kwargs and len(args) == function._argument_count and _plain(function):
            return function._invoke(list(args), eval_ctx.autoescape)
        args = (eval_ctx, *args)
    elif not (kind is type and function in _PLAIN_CLASSES):
        context.escaped = True
        return context.call(function, *args, **kwargs)
    try:
        return function(*args, **kwargs)
    except StopIteration:
        return context.environment.undefined(STOPPED)


def _plain(macro: Macro) -> bool:
    return not (macro.caller or macro.catch_kwargs or macro.catch_varargs)


def escape(value: Any) -> str:
    """Return a value as HTML-safe text, as plain `str`."""
    kind = type(value)
    if kind is str:
        return _escape_text(value)
    if kind is Markup:
        return str.__str__(value)
    if kind in _AS_THEY_ARE:
        return str(value)
    return str.__str__(markup_escape(value))


def absent(kind: str, name: str) -> Callable[..., Any]:
    """Return what stands for a filter or test that the environment doesn't have: it raises when it is used."""

    def fail(*args: Any, **kwargs: Any) -> Any:  # noqa: ARG001  (takes what the filter would)
        raise TemplateRuntimeError(f"No {kind} named {name!r} found.")

    internal_code.add(fail.__code__)
    return fail


def identity(value: Any) -> Any:
    """Return the value."""
    return value


def include(template: Any, context: Any, locals_: Mapping[str, Any]) -> Source:
    """Return the text source of ``{% include %}``."""
    return Source(template, template.new_context(context.get_all(), True, locals_))


class Alone:
    """``{% include %}`` without context: the template's default module."""

    __slots__ = ("_template",)

    def __init__(self, template: Any) -> None:
        self._template = template

    def render(self) -> Any:
        """Give the text; an awaitable of it in an async environment."""
        template = self._template
        if not template.environment.is_async:
            return "".join(template._get_default_module()._body_stream)

        async def gather() -> str:
            return "".join((await template._get_default_module_async())._body_stream)

        return gather()

    def pieces(self) -> Any:
        """Give each piece of output."""
        template = self._template
        if not template.environment.is_async:
            return (piece for piece in template._get_default_module()._body_stream)

        async def generate() -> Any:
            for piece in (await template._get_default_module_async())._body_stream:
                yield piece

        return generate()

    stream = pieces


def new_context(
    environment: jinja2.Environment,
    name: str | None,
    blocks: dict[str, Any],
    variables: dict[str, Any] | None,
    *,
    shared: bool,
    template_globals: MutableMapping[str, Any] | None,
    locals_: Mapping[str, Any] | None,
) -> runtime.Context:
    """Return a context: of the environment's class, or ours where that is Jinja2's."""
    kind = environment.context_class
    if kind is not runtime.Context and kind is not Context:
        return runtime.new_context(environment, name, blocks, variables, shared, template_globals, locals_)
    if variables is None:
        variables = {}
    parent = variables if shared else dict(_flat(template_globals), **variables)
    if locals_:
        given = {key: value for key, value in locals_.items() if value is not missing}
        if given:
            parent = {**parent, **given}
    return Context(environment, parent, name, blocks, template_globals)


def _flat(names: Iterable[Any] | None) -> Any:
    """Return a mapping that `dict` copies quickly: a ChainMap goes through each key in Python."""
    if type(names) is ChainMap and len(names.maps) == 2:
        own, shared = names.maps
        return {**shared, **own} if own else shared
    return names or ()


NAMES: dict[str, Any] = SHARED_NAMES | {
    "AsyncLoopContext": AsyncLoopContext,
    "LoopContext": LoopContext,
    "Macro": Macro,
    "Markup": Markup,
    "Namespace": Namespace,
    "TemplateNotFound": TemplateNotFound,
    "TemplateReference": TemplateReference,
    "TemplateRuntimeError": TemplateRuntimeError,
    "Undefined": Undefined,
    "_absent": absent,
    "_call": call,
    "_escape": escape,
    "_include": include,
    "_include_alone": Alone,
    "auto_aiter": auto_aiter,
    "auto_await": auto_await,
    "escape": markup_escape,
    "identity": identity,
    "markup_join": runtime.markup_join,
    "missing": missing,
    "str_join": runtime.str_join,
}
"""The globals of compiled code."""

for _function in (call, extend, include, Context.call):
    internal_code.add(_function.__code__)


def namespace(environment: Any, filename: str, precomputed: Iterable[Any] = ()) -> dict[str, Any]:
    """Return the namespace that a template's code is executed in."""
    names = {**NAMES, "__file__": filename, "__name__": "cuda_progcache.template"}
    names.update((f"_pc_{index}", value) for index, value in enumerate(precomputed))
    bind(names, environment)
    return names


def bind(names: MutableMapping[str, Any], environment: Any) -> None:
    """Put what depends on the environment into a template's namespace."""
    names["environment"] = environment
    names["_getattr"] = attribute_getter(environment)
    names["_getitem"] = environment.getitem

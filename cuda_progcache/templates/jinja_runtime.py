# SPDX-License-Identifier: Apache-2.0
"""The part of the templates' runtime that needs Jinja2: escaping, async, and classes for users to subclass.

`cuda_progcache.templates.runtime` has the common objects and functions. This module has the additions for an
environment that is a `jinja2.Environment`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import jinja2
from jinja2 import runtime as jinja2_runtime
from jinja2.async_utils import auto_aiter, auto_await
from jinja2.utils import _PassArg, internal_code
from markupsafe import Markup
from markupsafe import escape as markup_escape

from cuda_progcache.templates import context, objects, runtime

try:
    from markupsafe._speedups import _escape_inner as _escape_text
except ImportError:  # markupsafe has no C extension, or is older than this function

    def _escape_text(text: str, /) -> str:
        return str(markup_escape(text))


_AS_THEY_ARE = frozenset({int, float, bool})


class Context(context.Context, jinja2_runtime.Context):  # type: ignore[misc]  # typed alike, not the same
    """The context of our templates; an environment's ``context_class`` may derive from it."""


def escape(value: Any) -> str:
    """Return a value as HTML-safe text in a plain `str`."""
    kind = type(value)
    if kind is str:
        return _escape_text(value)
    if kind is Markup:
        return str.__str__(value)
    if kind in _AS_THEY_ARE:
        return str(value)
    return str.__str__(markup_escape(value))


def new_context(
    template: Any,
    variables: dict[str, Any] | None,
    shared: bool,  # noqa: FBT001  (as Jinja2's)
    locals_: Mapping[str, Any] | None,
) -> Any:
    """Return a new context for a template, of the environment's ``context_class``; `Context` replaces Jinja2's own."""
    kind = template.environment.context_class
    if kind is jinja2_runtime.Context or kind is Context:
        return runtime.new_context(Context, template, variables, shared, locals_, _flat(template.globals))
    return jinja2_runtime.new_context(
        template.environment, template.name, template.blocks, variables, shared, template.globals, locals_
    )


def _flat(names: Iterable[Any] | None) -> Any:
    """Return the names as a mapping that `dict` copies quickly; a ChainMap looks up each key in Python."""
    if type(names) is ChainMap and len(names.maps) == 2:
        own, shared = names.maps
        return {**shared, **own} if own else shared
    return names or ()


NAMES: dict[str, Any] = runtime.NAMES | {
    "AsyncLoopContext": jinja2_runtime.AsyncLoopContext,
    "Markup": Markup,
    "Undefined": jinja2.Undefined,  # the value of {{ a if b }} if b is false, in every environment
    "_Namespace": jinja2.utils.Namespace,
    "_escape": escape,
    "auto_aiter": auto_aiter,
    "auto_await": auto_await,
    "escape": markup_escape,
    "markup_join": jinja2_runtime.markup_join,
}
"""The globals of compiled code, by name."""


def namespace(environment: Any, filename: str, precomputed: Iterable[Any] = ()) -> dict[str, Any]:
    """Return a namespace to execute a template's code in."""
    names = runtime.namespace(NAMES, environment)
    names["__file__"] = filename
    names.update((f"_pc_{index}", value) for index, value in enumerate(precomputed))
    return names


def serve_jinja2(names: dict[str, Any]) -> None:
    """Add the names that Jinja2's own environments expect to the globals of a template that was written as Python."""
    whole = "render" in names

    def pieces(function: Callable[..., Any]) -> Callable[[Any], Any]:
        def give(ctx: Any) -> Any:
            runtime.bind(names, ctx.environment)
            text = function(runtime.adopted(ctx), ctx.blocks)
            if not whole:
                return text
            return _awaited(text) if ctx.environment.is_async else iter((text,))

        return give

    names["root"] = pieces(names["render" if whole else "render_pieces"])
    names["blocks"] = {name: runtime.Jinja2Block(pieces(function)) for name, function in names["blocks"].items()}
    names["_own"] = names["blocks"]
    names.setdefault("debug_info", "")


async def _awaited(text: Any) -> AsyncIterator[str]:
    yield await text


# Jinja2's contexts pass an eval context to marked functions, and its tracebacks leave out code marked as internal.
objects.Macro.__call__.jinja_pass_arg = _PassArg.eval_context  # type: ignore[attr-defined]
for _owner in (context.Context, context.BlockReference, objects.Macro, objects.LoopContext):
    for _member in vars(_owner).values():
        if isinstance(_member, FunctionType):
            internal_code.add(_member.__code__)
for _member in runtime.NAMES.values():
    if isinstance(_member, FunctionType):
        internal_code.add(_member.__code__)

# SPDX-License-Identifier: Apache-2.0
"""What compiled templates need of Jinja2: escaping, async, and the classes that its users subclass.

The objects and functions are those of `cuda_progcache.templates.runtime`; here is what is added where the environment
is a `jinja2.Environment`.
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
except ImportError:  # without its C part, or before it had this

    def _escape_text(text: str, /) -> str:
        return str(markup_escape(text))


_AS_THEY_ARE = frozenset({int, float, bool})


class Context(context.Context, jinja2_runtime.Context):  # type: ignore[misc]  # typed alike, not the same
    """The context of every template of ours, as a class that ``context_class`` may derive from."""


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


def new_context(
    template: Any,
    variables: dict[str, Any] | None,
    shared: bool,  # noqa: FBT001  (as Jinja2's)
    locals_: Mapping[str, Any] | None,
) -> Any:
    """Return a template's context: of the environment's class, or ours where that is Jinja2's."""
    kind = template.environment.context_class
    if kind is jinja2_runtime.Context or kind is Context:
        return runtime.new_context(Context, template, variables, shared, locals_, _flat(template.globals))
    return jinja2_runtime.new_context(
        template.environment, template.name, template.blocks, variables, shared, template.globals, locals_
    )


def _flat(names: Iterable[Any] | None) -> Any:
    """Return a mapping that `dict` copies quickly: a ChainMap goes through each key in Python."""
    if type(names) is ChainMap and len(names.maps) == 2:
        own, shared = names.maps
        return {**shared, **own} if own else shared
    return names or ()


NAMES: dict[str, Any] = runtime.NAMES | {
    "AsyncLoopContext": jinja2_runtime.AsyncLoopContext,
    "Markup": Markup,
    "Undefined": jinja2.Undefined,  # what {{ a if b }} gives where b is false, whatever the environment's undefined is
    "_Namespace": jinja2.utils.Namespace,
    "_escape": escape,
    "auto_aiter": auto_aiter,
    "auto_await": auto_await,
    "escape": markup_escape,
    "markup_join": jinja2_runtime.markup_join,
}
"""The globals of compiled code."""


def namespace(environment: Any, filename: str, precomputed: Iterable[Any] = ()) -> dict[str, Any]:
    """Return the namespace that a template's code is executed in."""
    names = runtime.namespace(NAMES, environment)
    names["__file__"] = filename
    names.update((f"_pc_{index}", value) for index, value in enumerate(precomputed))
    return names


def serve_jinja2(names: dict[str, Any]) -> None:
    """Put what Jinja2's own environments ask of a template into the module that it was compiled to."""
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


# Jinja2's contexts pass an eval context to what asks for it, and its tracebacks leave out what is marked as its own.
objects.Macro.__call__.jinja_pass_arg = _PassArg.eval_context  # type: ignore[attr-defined]
for _owner in (context.Context, context.BlockReference, objects.Macro, objects.LoopContext):
    for _member in vars(_owner).values():
        if isinstance(_member, FunctionType):
            internal_code.add(_member.__code__)
for _member in runtime.NAMES.values():
    if isinstance(_member, FunctionType):
        internal_code.add(_member.__code__)

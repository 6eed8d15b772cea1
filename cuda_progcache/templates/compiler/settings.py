# SPDX-License-Identifier: Apache-2.0
"""What of an environment decides which code is right.

Each shortcut is taken only where nobody has changed what it replaces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import runtime
from jinja2.utils import concat

from cuda_progcache.templates.jinja_runtime import Context

if TYPE_CHECKING:
    from jinja2 import Environment

JINJA2_UNDEFINED = frozenset(
    {jinja2.Undefined, jinja2.StrictUndefined, jinja2.ChainableUndefined, jinja2.DebugUndefined}
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to compile for an environment.

    Attributes
    ----------
    form : {"render", "stream", "pieces"}
        Text at once, runs of text as they come, or one item for each piece of output.
    asynchronous : bool
        Whether the functions are coroutine functions, and every value may be an awaitable.
    native : bool
        Whether output isn't text: what is put out stays as it is, and ``environment.concat`` puts it together.
    fuse : bool
        Whether neighbouring output goes into one f-string.
    fast_context, fast_call, fast_getattr, fast_getitem : bool
        Whether the context's and the environment's methods are Jinja2's own, so that ours stand for them.
    own_lookup : bool
        Whether attributes and items are looked up by Jinja2's own methods, if only the sandbox's.
    undefined_early : bool
        Whether an undefined object may be made before it is certain that it is needed.
    inline_loops : bool
        Whether ``loop.index`` may be a counter.
    sandboxed : bool
        Whether the environment checks every call.
    """

    form: str
    asynchronous: bool
    native: bool
    text: bool
    fuse: bool
    fast_context: bool
    fast_call: bool
    fast_getattr: bool
    fast_getitem: bool
    own_lookup: bool
    undefined_early: bool
    inline_loops: bool
    direct_macros: bool
    sandboxed: bool
    intercepted_binops: frozenset[str]
    intercepted_unops: frozenset[str]

    @classmethod
    def of(cls, environment: Environment, form: str, *, raw: bool = False) -> Settings:
        """Return the settings for an environment.

        Parameters
        ----------
        environment : jinja2.Environment
            As set up.
        form : {"render", "stream", "pieces"}
            What is asked for.
        raw : bool
            Whether the code is to be written out as Python text: no f-strings then, and the context is ``context``.
        """
        native = is_native(environment)
        text = environment.concat == concat
        fast_context = environment.context_class in {runtime.Context, Context}
        asynchronous = environment.is_async
        sandboxed = environment.sandboxed
        binops: Any = getattr(environment, "intercepted_binops", ()) if sandboxed else ()
        unops: Any = getattr(environment, "intercepted_unops", ()) if sandboxed else ()
        return cls(
            form=form,
            asynchronous=asynchronous,
            native=native,
            text=text and not native,
            fuse=form != "pieces" and not raw and text and not native,
            fast_context=fast_context,
            fast_call=fast_context and not sandboxed,
            fast_getattr=not asynchronous and _untouched(environment, "getattr"),
            fast_getitem=not asynchronous and _untouched(environment, "getitem"),
            own_lookup=all(_is_jinja2s(environment, name) for name in ("getattr", "getitem")),
            undefined_early=fast_context and environment.undefined in JINJA2_UNDEFINED,
            inline_loops=not asynchronous,
            direct_macros=not asynchronous
            and not sandboxed
            and fast_context
            and not native
            and text
            and isinstance(environment.autoescape, bool),
            sandboxed=sandboxed,
            intercepted_binops=frozenset(binops),
            intercepted_unops=frozenset(unops),
        )


def is_native(environment: Environment) -> bool:
    """Whether an environment renders to Python objects."""
    from jinja2.nativetypes import NativeCodeGenerator

    return issubclass(environment.code_generator_class, NativeCodeGenerator)


def compilable(environment: Environment) -> bool:
    """Whether Jinja2's compiler is the one that the environment was made for, and not one of the user's."""
    from jinja2.compiler import CodeGenerator
    from jinja2.nativetypes import NativeCodeGenerator

    return environment.code_generator_class in {CodeGenerator, NativeCodeGenerator} and all(
        _untouched(environment, name) for name in ("_generate", "_compile")
    )


def _is_jinja2s(environment: Environment, name: str) -> bool:
    method: Any = getattr(type(environment), name)
    return name not in vars(environment) and str(method.__globals__.get("__name__")).startswith("jinja2.")


def _untouched(environment: Environment, name: str) -> bool:
    own: Mapping[str, Any] = environment.__dict__
    return name not in own and getattr(type(environment), name) is getattr(jinja2.Environment, name)

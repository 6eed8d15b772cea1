# SPDX-License-Identifier: Apache-2.0
"""The settings of an environment that determine the generated code.

A shortcut is taken only if the user hasn't overridden the method that it replaces.
"""

from __future__ import annotations

from collections.abc import Mapping
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


class Settings:
    """The settings to compile with for an environment.

    Parameters
    ----------
    environment : jinja2.Environment
        The environment of the template.
    form : {"render", "stream", "pieces"}
        The form of the output: the whole text, runs of text as they are produced, or one item for each piece of output.
    raw : bool
        Whether the code is for Python text: it then has no f-strings, and the context is called ``context``.

    Attributes
    ----------
    text : bool
        Whether output is text, joined to a string.
    asynchronous : bool
        Whether the functions are coroutine functions, and every value may be an awaitable.
    native : bool
        Whether output consists of Python objects, which ``environment.concat`` combines.
    fuse : bool
        Whether adjacent output is put into one f-string.
    fast_context, fast_call, fast_getattr, fast_getitem : bool
        Whether the methods of the context and the environment are Jinja2's own, so that ours may replace them.
    own_lookup : bool
        Whether attributes and items are looked up by Jinja2's own methods, including those of its sandbox.
    undefined_early : bool
        Whether an undefined object may be created before it is certainly needed.
    direct_macros : bool
        Whether the Python function of a macro may be called directly.
    sandboxed : bool
        Whether the environment checks every call.
    intercepted_binops, intercepted_unops : frozenset of str
        The operators that the sandbox intercepts.
    """

    def __init__(self, environment: Environment, form: str, *, raw: bool = False) -> None:
        self.form = form
        self.native = is_native(environment)
        self.text = environment.concat == concat and not self.native
        self.fuse = self.text and form != "pieces" and not raw
        self.asynchronous = environment.is_async
        self.sandboxed = environment.sandboxed
        self.fast_context = environment.context_class in {runtime.Context, Context}
        self.fast_call = self.fast_context and not self.sandboxed
        self.fast_getattr = not self.asynchronous and _untouched(environment, "getattr")
        self.fast_getitem = not self.asynchronous and _untouched(environment, "getitem")
        self.own_lookup = all(_is_jinja2s(environment, name) for name in ("getattr", "getitem"))
        self.undefined_early = self.fast_context and environment.undefined in JINJA2_UNDEFINED
        fixed = isinstance(environment.autoescape, bool)
        self.direct_macros = self.fast_call and self.text and fixed and not self.asynchronous
        binops: Any = getattr(environment, "intercepted_binops", ()) if self.sandboxed else ()
        unops: Any = getattr(environment, "intercepted_unops", ()) if self.sandboxed else ()
        self.intercepted_binops, self.intercepted_unops = frozenset(binops), frozenset(unops)


def is_native(environment: Environment) -> bool:
    """Whether an environment renders to Python objects instead of text."""
    from jinja2.nativetypes import NativeCodeGenerator

    return issubclass(environment.code_generator_class, NativeCodeGenerator)


def compilable(environment: Environment) -> bool:
    """Whether an environment uses Jinja2's own compiler, which ours can replace, and not a user's."""
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

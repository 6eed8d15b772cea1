# SPDX-License-Identifier: Apache-2.0
"""`patch_jinja2`: our compiler and runtime under Jinja2's own classes."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import jinja2
from jinja2 import runtime
from jinja2.utils import internalcode

from cuda_progcache.templates.template import Template, compile_template

_PATCHED = (
    "from_code",
    "_from_namespace",
    "_bind",
    "_pieces",
    "_concatenated",
    "_concatenated_block",
    "_form",
    "new_context",
    "render",
    "render_async",
    "render_stream",
    "render_stream_async",
    "source_map",
    "list_blocks",
    "render_block",
    "render_block_async",
    "_setups",
    "_block_of",
    "make_module",
    "make_module_async",
    "_get_default_module",
    "_get_default_module_async",
    "get_corresponding_lineno",
)
_originals: list[tuple[type, str, Any]] = []
_ABSENT = object()


def patch_jinja2() -> None:
    """Put our compiler and runtime under `jinja2.Environment` and `jinja2.Template` themselves.

    For programs that want the speed without a change. Templates compiled before keep working as they are. What Jinja2
    keeps compiled on disk (`jinja2.BytecodeCache`) is compiled anew. Calling it again changes nothing.
    """
    if _originals:
        return
    for name in _PATCHED:
        _replace(jinja2.Template, name, Template.__dict__[name])
    _replace(jinja2.Environment, "compile", internalcode(compile_template))
    _replace(jinja2.Environment, "_precomputed", WeakKeyDictionary())
    _replace(runtime.Context, "escaped", value=False)
    _replace(jinja2.BytecodeCache, "get_source_checksum", _source_checksum)


def unpatch_jinja2() -> None:
    """Take back what `patch_jinja2` did; templates compiled meanwhile don't render any more."""
    while _originals:
        owner, name, value = _originals.pop()
        if value is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def _replace(owner: type, name: str, value: Any) -> None:
    _originals.append((owner, name, owner.__dict__.get(name, _ABSENT)))
    setattr(owner, name, value)


_base_checksum = jinja2.BytecodeCache.get_source_checksum


def _source_checksum(self: jinja2.BytecodeCache, source: str) -> str:
    return "cuda_progcache-" + _base_checksum(self, source)

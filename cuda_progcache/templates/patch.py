# SPDX-License-Identifier: Apache-2.0
"""`patch_jinja2` and `unpatch_jinja2`: they make Jinja2's own classes use our compiler and runtime."""

from __future__ import annotations

from functools import partial
from typing import Any

import jinja2
from jinja2.utils import internalcode

from cuda_progcache.templates.compile_context import CacheApart
from cuda_progcache.templates.template import Template, compile_template

_originals: list[tuple[type, str, Any]] = []


def patch_jinja2() -> None:
    """Make `jinja2.Environment` itself use our compiler and runtime.

    This speeds up programs without changes to their code. It affects templates that are compiled from now on; templates
    compiled earlier don't change. A `jinja2.BytecodeCache` stores our code apart from Jinja2's, so that templates in
    the cache are compiled once more. A second call changes nothing.
    """
    if _originals:
        return
    for name in ("from_code", "_from_namespace"):
        _replace(jinja2.Template, name, Template.__dict__[name])
    _replace(jinja2.Environment, "compile", internalcode(compile_template))
    get, put = jinja2.BytecodeCache.get_bucket, jinja2.BytecodeCache.set_bucket

    def apart(cache: jinja2.BytecodeCache) -> CacheApart:
        return CacheApart(cache, partial(get, cache), partial(put, cache))

    def get_bucket(self: jinja2.BytecodeCache, *args: Any) -> Any:
        return apart(self).get_bucket(*args)

    def set_bucket(self: jinja2.BytecodeCache, bucket: Any) -> None:
        apart(self).set_bucket(bucket)

    _replace(jinja2.BytecodeCache, "get_bucket", get_bucket)
    _replace(jinja2.BytecodeCache, "set_bucket", set_bucket)


def unpatch_jinja2() -> None:
    """Undo `patch_jinja2`; templates compiled in the meantime don't change."""
    while _originals:
        owner, name, value = _originals.pop()
        setattr(owner, name, value)


def _replace(owner: type, name: str, value: Any) -> None:
    _originals.append((owner, name, owner.__dict__[name]))
    setattr(owner, name, value)

# SPDX-License-Identifier: Apache-2.0
"""The lookup: find the headers that match what is on disk, make the key, load the entry. It loads no compiler."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Hashable, Mapping

from cuda_progcache import events
from cuda_progcache._util.running import running
from cuda_progcache.compile.compiled import CompiledProgram
from cuda_progcache.compile.manifests import headers_alike, headers_here, known_headers, remember_headers
from cuda_progcache.keys.headers import NO_HEADERS, Holds, holds
from cuda_progcache.keys.inputs import CompileInputs
from cuda_progcache.store.base import ProgramCacheResource, entry_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.output import Label
    from cuda_progcache.keys.schema import BaseKey, ProgramKey
    from cuda_progcache.store.base import Entry


def look_up(base: BaseKey, cache: Any, *, again: bool = False, holds: Holds = holds) -> CompiledProgram | None:
    """Look a program up in the cache. None is a miss; it is counted unless ``again`` is set."""
    inputs = base.inputs
    headers = known_headers(base, cache, holds) if inputs.reads_headers else NO_HEADERS
    key = base.with_headers(headers) if headers is not None else None
    if not is_ours(type(cache)):  # type: ignore[arg-type]  # a class is hashable, whatever mypy thinks
        return None if key is None else load(key, inputs, cache)
    if key is not None and (found := load(key, inputs, cache, again=True)) is not None:
        return found
    for other in headers_alike(base, cache):
        if (found := load(base.with_headers(other), inputs, cache, again=True)) is not None:
            if inputs.reads_headers:
                remember_headers(base, other, cache, other.entry)
            return found
    if again:
        return None
    if key is not None:
        return load(key, inputs, cache)  # once more, to count the miss
    cache.load(base.plain)  # no entry has this key: this counts the miss
    return None


def digest_here(base: BaseKey, cache: Any, holds: Holds = holds) -> bytes | None:
    """Return the key of a program; None if this machine doesn't know the headers that it reads."""
    headers = headers_here(base, cache, holds) if base.inputs.reads_headers else NO_HEADERS
    return None if headers is None else base.with_headers(headers).digest


def load(key: ProgramKey, label: Label, cache: Any, *, again: bool = False) -> CompiledProgram | None:
    """Load the entry of a key. None is a miss; it is counted unless ``again`` is set."""
    if not is_ours(type(cache)):  # type: ignore[arg-type]  # a class is hashable, whatever mypy thinks
        data = cache.get(key.digest)
        if data is None:
            return None
        return CompiledProgram(data, label.target_type, label.name, label.arch, hit=True)
    entry = cache.load_again(key.digest) if again else cache.load(key.digest)
    if entry is None:
        return None
    symbols: dict[str | bytes, bytes] = {}
    if label.name_expressions:
        about = entry.about
        for expression in label.name_expressions:
            symbol = about.symbol(expression_text(expression))
            if symbol is None:
                return None  # stored by hand or with a made-up record: the symbol can't be served
            symbols[expression] = symbol.encode("utf-8", "surrogateescape")
    digest = entry_digest(key.digest)
    if (around := running.get()) is not None:
        around.children[digest] = None
    if events.wanted("hit"):
        told = (label.name, label.target_type, label.arch, digest)
        events.emit(events.Event("hit", *told, seconds=entry.about.seconds))
    return CompiledProgram(
        entry.data,
        label.target_type,
        label.name,
        label.arch,
        symbols,
        record=lambda: _as_here(entry, label),
        hit=True,
        digest=digest,
    )


def _as_here(entry: Entry, label: Label) -> Mapping[str, Any]:
    """Return an entry's record, with the paths in its log as the current caller spells them."""
    record = entry.record
    if "log_files" not in record or not isinstance(label, CompileInputs):
        return record
    about = entry.about
    if not (about.log and about.log_files):
        return record
    from cuda_progcache.keys.paths import relocated

    return {**record, "log": relocated(about.log, about.log_files, label.spelled)}


@functools.cache
def is_ours(kind: Hashable) -> bool:
    """Whether a cache class is one of this package's."""
    return issubclass(kind, ProgramCacheResource)  # type: ignore[arg-type]  # cached, since the check of an ABC is slow


def check_cache(cache: object) -> bool:
    """Whether a cache is one of this package's; raises TypeError if it isn't one of cuda.core's either."""
    ours = is_ours(type(cache))  # type: ignore[arg-type]  # a class is hashable, whatever mypy thinks
    if not ours and not is_theirs(cache):
        raise TypeError(
            f"cache must be a ProgramCacheResource of cuda_progcache or cuda.core; got {type(cache).__name__}"
        )
    return ours


def is_theirs(cache: object) -> bool:
    """Whether a cache is a ``ProgramCacheResource`` of cuda.core."""
    theirs = getattr(sys.modules.get("cuda.core.utils"), "ProgramCacheResource", None)
    return theirs is not None and isinstance(cache, theirs)


def leases_dir(cache: Any) -> str | None:
    """Return the directory of a cache's lease files, one per compile in progress; None for a cache in memory."""
    root = getattr(cache, "path", None)
    return None if root is None else os.path.join(root, "leases")


def fleet(cache: Any, flight: str) -> Callable[..., Any] | None:
    """Return a function that coordinates a flight among the hosts that share a tier; None if no tier keeps leases.

    Parameters
    ----------
    cache : ProgramCacheResource
    flight : str
        An identifier that is the same on every host for what is likely the same program.
    """
    leases = getattr(cache, "fleet", None)
    return None if leases is None else functools.partial(leases.lead, flight)


def expression_text(expression: str | bytes) -> str:
    """Return a name expression as text, as records store it."""
    return expression.decode("utf-8", "surrogateescape") if isinstance(expression, bytes) else expression

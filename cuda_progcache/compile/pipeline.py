# SPDX-License-Identifier: Apache-2.0
"""From inputs to a binary, through a cache: look up, else compile and publish.

:func:`obtain` is the one way in, for :class:`~cuda_progcache.compile.program.Program`
and for the service alike:

1. normalize the inputs, key everything but the headers (``keys.schema``);
2. find the header set that holds now in the manifest of that key; with it the key is known;
3. load the entry: a hit needs no compiler library;
4. else (:mod:`~cuda_progcache.compile.miss`) compile, with the include trace on; key what was really read; publish
   bytes and record; remember the header set. The caller gets the bytes in hand.

Trouble with the cache is never trouble for the caller: what can't be keyed is
compiled and not stored, and :attr:`CompiledProgram.reason` says why.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Hashable, Mapping

from cuda_progcache import events
from cuda_progcache._util.fields import dataclass
from cuda_progcache._util.running import running
from cuda_progcache.compile.compiled import CompiledProgram
from cuda_progcache.compile.identity import known_headers
from cuda_progcache.errors import UncacheableError
from cuda_progcache.keys.headers import NO_HEADERS
from cuda_progcache.keys.schema import BaseKey, CompileInputs, ProgramKey, base_key
from cuda_progcache.store.base import ProgramCacheResource, entry_digest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.diagnostics import LineLookup
    from cuda_progcache.compile.precompiled import PrecompiledHeaders


@dataclass(frozen=True)
class MissPolicy:
    """How misses are compiled.

    Attributes
    ----------
    precompiled : PrecompiledHeaders or None
        Of the batch that this process works on.
    keep_failures : float
        Seconds for which a refusal of the compiler is remembered; 0: not at all.
    """

    precompiled: PrecompiledHeaders | None = None
    keep_failures: float = 0.0


PLAIN = MissPolicy()


def obtain(
    inputs: CompileInputs,
    cache: Any = None,
    *,
    kernel: Mapping[str, Any] | None = None,
    lookup: LineLookup | None = None,
    policy: MissPolicy = PLAIN,
) -> CompiledProgram:
    """Get a compile's output: from the cache, or compiled now and published there.

    Parameters
    ----------
    inputs : CompileInputs
        From :func:`cuda_progcache.keys.schema.normalize`.
    cache : ProgramCacheResource, optional
        Ours or ``cuda.core``'s: those hold bytes alone, so a program with name expressions can't go there. None: just
        compile.
    kernel : mapping, optional
        For the record: the library kernel (``name``), its ``parameters`` and ``templates``; with a ``module``, this is
        a part of it that goes into a link.
    lookup : callable, optional
        From a source line to the template's, for diagnostics.
    policy : MissPolicy
        How a miss is compiled.

    Returns
    -------
    CompiledProgram

    Raises
    ------
    CompileError
        If the compiler refuses the program, or is known to.
    UncacheableError
        (a ``ValueError``) with a cache, for options that a hit couldn't honour.
    """
    if inputs.target_type == "ltoir" and inputs.code_type == "nvvm":
        from cuda_progcache.compile.nvvm import warn_of_dropped_kernels

        warn_of_dropped_kernels(inputs)
    if cache is None:
        from cuda_progcache.compile.miss import compiled_only

        return compiled_only(inputs, lookup)
    ours = _is_ours(type(cache))  # type: ignore[arg-type]  # a class is hashable, whatever mypy thinks
    if not ours and not _is_theirs(cache):
        raise TypeError(
            f"cache must be a ProgramCacheResource, cuda_progcache's or cuda.core's; got {type(cache).__name__}"
        )
    base = base_key(inputs)
    if inputs.name_expressions and not ours:
        raise UncacheableError(
            f"{type(cache).__name__} holds bytes alone, so the symbol mapping of name_expressions would be lost on a "
            f"hit; use one of cuda_progcache's stores"
        )
    if (found := _look_up(base, cache)) is not None:
        return found
    from cuda_progcache.compile.miss import compile_and_publish
    from cuda_progcache.compile.single_flight import fly

    return fly(
        base.flight,
        leases_dir(cache),
        lambda: compile_and_publish(base, cache, kernel, lookup, policy),
        lambda: _look_up(base, cache, again=True),
    )


def leases_dir(cache: Any) -> str | None:
    """Where processes that share a cache say what they are compiling; None for one that lies in memory."""
    root = getattr(cache, "path", None)
    return None if root is None else os.path.join(root, "leases")


def look_up(inputs: CompileInputs, cache: Any) -> CompiledProgram | None:
    """What :func:`obtain` would take from the cache, without compiling; None is a miss."""
    return _look_up(base_key(inputs), cache)


def _look_up(base: BaseKey, cache: Any, *, again: bool = False) -> CompiledProgram | None:
    headers = known_headers(base, cache) if base.inputs.reads_headers else NO_HEADERS
    return None if headers is None else load(base.with_headers(headers), base.inputs, cache, again=again)


def load(key: ProgramKey, inputs: CompileInputs, cache: Any, *, again: bool = False) -> CompiledProgram | None:
    """What the cache has under a key; None is a miss, counted unless this looks ``again``."""
    if not _is_ours(type(cache)):  # type: ignore[arg-type]  # a class is hashable, whatever mypy thinks
        data = cache.get(key.digest)
        if data is None:
            return None
        return CompiledProgram(data, inputs.target_type, inputs.name, inputs.arch, hit=True)
    entry = cache.load_again(key.digest) if again else cache.load(key.digest)
    if entry is None:
        return None
    symbols: dict[str | bytes, bytes] = {}
    if inputs.name_expressions:
        mangled = entry.record.get("symbol_mapping") or {}
        for expression in inputs.name_expressions:
            symbol = mangled.get(expression_text(expression))
            if symbol is None:
                return None  # stored by hand, without a program's record: bytes alone can't serve these expressions
            symbols[expression] = symbol.encode()
    digest = entry_digest(key.digest)
    if (around := running.get()) is not None:
        around.children[digest] = None
    if events.wanted("hit"):
        events.emit(events.Event("hit", inputs.name, inputs.target_type, inputs.arch, digest))
    return CompiledProgram(
        entry.data,
        inputs.target_type,
        inputs.name,
        inputs.arch,
        symbols,
        record=lambda: entry.record,
        hit=True,
        digest=digest,
    )


@functools.cache
def _is_ours(kind: Hashable) -> bool:
    return issubclass(kind, ProgramCacheResource)  # type: ignore[arg-type]  # remembered, since an ABC takes its time to say


def _is_theirs(cache: object) -> bool:
    """Whether it is one of cuda.core's stores, or made after them; as cuda.core asks it of ours."""
    theirs = getattr(sys.modules.get("cuda.core.utils"), "ProgramCacheResource", None)
    return theirs is not None and isinstance(cache, theirs)


def expression_text(expression: str | bytes) -> str:
    """A name expression as records have it."""
    return expression.decode("utf-8", "surrogateescape") if isinstance(expression, bytes) else expression

# SPDX-License-Identifier: Apache-2.0
"""From inputs to a binary, through a cache: look up, else compile and publish.

:func:`obtain` is the one way in, for :class:`~cuda_progcache.compile.program.Program`
and for the service alike:

1. normalize the inputs, key everything but the headers (``keys.schema``);
2. find the header set that holds now in the manifest of that key; with it the key is known;
3. load the entry: a hit needs no compiler library;
4. else compile, with the include trace on; key what was really read; publish
   bytes and record; remember the header set. The caller gets the bytes in hand.

Trouble with the cache is never trouble for the caller: what can't be keyed is
compiled and not stored, and :attr:`CompiledProgram.reason` says why.
"""

from __future__ import annotations

import functools
import os
import sys
import time
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from cuda_progcache import events
from cuda_progcache.compile import history
from cuda_progcache.compile.compiled import CompiledProgram
from cuda_progcache.compile.cubin import resource_usage
from cuda_progcache.compile.diagnostics import CompilerRefusal, LineLookup, compile_error
from cuda_progcache.compile.identity import compiler_name, known_headers, read_headers, remember_headers
from cuda_progcache.compile.single_flight import fly
from cuda_progcache.errors import CompileError, InspectError, UncacheableError
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.headers import NO_HEADERS, HeaderSet
from cuda_progcache.keys.schema import BaseKey, CompileInputs, ProgramKey, base_key
from cuda_progcache.store.base import ProgramCacheResource, entry_digest

if TYPE_CHECKING:
    from cuda_progcache.compile.nvrtc import Output
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


def _run(inputs: CompileInputs, seed: str, more_flags: Sequence[str] = ()) -> Output:
    """Run the compiler that these inputs are for; raises CompilerRefusal."""
    name = compiler_name(inputs)
    if inputs.code_type == "c++":
        from cuda_progcache.compile.nvrtc import compile_cpp

        return compile_cpp(
            inputs.code,
            name=name,
            flags=(*inputs.flags, *more_flags),
            target_type=inputs.target_type,
            name_expressions=inputs.name_expressions,
            random_seed=seed,
            trace=inputs.reads_headers,
        )
    if inputs.code_type == "ptx":
        from cuda_progcache.compile.arch import check_arch
        from cuda_progcache.compile.nvjitlink import LinkerInput, link

        check_arch(inputs.arch)  # nvJitLink ends the whole process over one it doesn't know
        return link([LinkerInput(inputs.code, "ptx", name)], flags=inputs.flags, target_type=inputs.target_type)
    from cuda_progcache.compile.nvvm import compile_nvvm

    modules = [(name, inputs.code), *_extra_modules(inputs)]
    return compile_nvvm(modules, flags=inputs.flags, libdevice=bool(inputs.options.use_libdevice))


def _extra_modules(inputs: CompileInputs) -> list[tuple[str, bytes]]:
    extra = inputs.options.extra_sources or ()
    return [(n, s.encode() if isinstance(s, str) else bytes(s)) for n, s in extra]


def _warn_of_dropped_kernels(inputs: CompileInputs) -> None:
    from cuda_progcache.compile.nvvm import kernels_without_use

    if names := kernels_without_use(inputs.code, *(module for _, module in _extra_modules(inputs))):
        warnings.warn(
            f"{inputs.name}: a link of this LTO-IR will drop {', '.join(names)}: nvJitLink keeps kernels of NVVM IR "
            f"only where @llvm.used names them (or compile to ptx, and link that)",
            RuntimeWarning,
            stacklevel=5,
        )


def _error(inputs: CompileInputs, refusal: CompilerRefusal, lookup: LineLookup | None) -> CompileError:
    return compile_error(
        refusal,
        name=compiler_name(inputs),
        code_type=inputs.code_type,
        target_type=inputs.target_type,
        flags=inputs.flags,
        source=inputs.code.decode("utf-8", "replace") if inputs.code_type != "nvvm" else "",
        lookup=lookup,
    )


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
        For the record: the library kernel, its parameters and templates.
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
        _warn_of_dropped_kernels(inputs)
    if cache is None:
        return _compiled_only(inputs, lookup)
    ours = isinstance(cache, ProgramCacheResource)
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
    return fly(
        base.flight,
        leases_dir(cache),
        lambda: _compile_and_publish(base, cache, kernel, lookup, policy),
        lambda: _look_up(base, cache, again=True),
    )


def _compile_and_publish(
    base: BaseKey, cache: Any, kernel: Mapping[str, Any] | None, lookup: LineLookup | None, policy: MissPolicy
) -> CompiledProgram:
    inputs = base.inputs
    if policy.keep_failures:
        _raise_known_failure(base, cache, lookup, policy.keep_failures)
    clock = time.perf_counter()
    started = time.time_ns()
    try:
        output, headers = _compile(base, policy)
    except CompilerRefusal as refusal:
        if policy.keep_failures:
            _keep_failure(base, refusal, started, cache, policy.keep_failures)
        _tell_refused(inputs, refusal.status)
        raise _error(inputs, refusal, lookup) from None  # the refusal is in it, whole
    duration = time.perf_counter() - clock
    reason = (
        inputs.unrepeatable
        or headers.uncacheable
        or base.cwd_trouble()
        or toolchain.trouble(inputs.code_type, base.toolchain)
    )
    key = base.with_headers(headers)
    record = make_record(inputs, key, output, duration, kernel)
    if reason is None and inputs.reads_headers:
        remember_headers(base, headers, cache)
        record["manifest"] = base.manifest_id  # an export takes it along: without it the key can't be found again
    return publish(inputs, key, output, record, cache, reason)


def _seed(base: BaseKey) -> str:
    return base.plain.hex()[:32]


def _compile(base: BaseKey, policy: MissPolicy) -> tuple[Output, HeaderSet]:
    """Compile; returns also what was read."""
    inputs, seed = base.inputs, _seed(base)
    if not inputs.reads_headers:
        return _run(inputs, seed), NO_HEADERS
    if inputs.header_policy.hermetic:
        from cuda_progcache.compile.hermetic import compile_hermetic

        return compile_hermetic(base, seed)
    if policy.precompiled is not None:
        made = policy.precompiled.compile(base, lambda more_flags: _run(inputs, seed, more_flags))
        if made is not None:
            return made
    started = time.time_ns()
    output = _run(inputs, seed)
    return output, read_headers(base, output, started)


def _raise_known_failure(base: BaseKey, cache: Any, lookup: LineLookup | None, seconds: float) -> None:
    from cuda_progcache.compile import failures

    known = failures.recall(base, cache, seconds)
    if known is not None:
        refusal, age = known
        _tell_refused(base.inputs, f"remembered for {age:.0f} s")
        error = _error(base.inputs, refusal, lookup)
        error.add_note(f"remembered: the compiler said so {age:.0f} s ago, and nothing that it read has changed since")
        raise error


def _keep_failure(base: BaseKey, refusal: CompilerRefusal, started: int, cache: Any, seconds: float) -> None:
    from cuda_progcache.compile import failures
    from cuda_progcache.compile.nvrtc import Output

    headers = NO_HEADERS
    if base.inputs.reads_headers:
        headers = read_headers(base, Output(b"", refusal.log, trace=refusal.trace), started)
    failures.remember(base, refusal, headers, cache, seconds)


def _tell_refused(inputs: CompileInputs, why: str) -> None:
    if events.wanted("refused"):
        events.emit(events.Event("refused", inputs.name, inputs.target_type, inputs.arch, None, (why,)))


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


def _compiled_only(inputs: CompileInputs, lookup: LineLookup | None) -> CompiledProgram:
    clock = time.perf_counter()
    try:
        try:
            base = base_key(inputs)  # as with a cache: the bytes must be the same
            output = _compile(base, PLAIN)[0] if inputs.header_policy.hermetic else _run(inputs, _seed(base))
        except UncacheableError:
            output = _run(inputs, sha256(inputs.code, usedforsecurity=False).hexdigest()[:32])
    except CompilerRefusal as refusal:
        raise _error(inputs, refusal, lookup) from None  # the refusal is in it, whole
    record = {"duration": time.perf_counter() - clock, "log": output.log, "pch_status": output.pch_status}
    return CompiledProgram(
        output.data,
        inputs.target_type,
        inputs.name,
        inputs.arch,
        output.symbols,
        output.log,
        record,
    )


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
    record = entry.record
    mangled = record.get("symbol_mapping") or {}
    symbols: dict[str | bytes, bytes] = {}
    for expression in inputs.name_expressions:
        symbol = mangled.get(_text(expression))
        if symbol is None:
            return None  # stored by hand, without a program's record: bytes alone can't serve these expressions
        symbols[expression] = symbol.encode()
    digest = entry_digest(key.digest)
    if events.wanted("hit"):
        events.emit(events.Event("hit", inputs.name, inputs.target_type, inputs.arch, digest))
    return CompiledProgram(
        entry.data,
        inputs.target_type,
        inputs.name,
        inputs.arch,
        symbols,
        record.get("log") or "",
        record,
        hit=True,
        digest=digest,
    )


@functools.cache
def _is_ours(kind: Hashable) -> bool:
    return issubclass(cast("type", kind), ProgramCacheResource)  # remembered, since an ABC takes its time to say


def _is_theirs(cache: object) -> bool:
    """Whether it is one of cuda.core's stores, or made after them; as cuda.core asks it of ours."""
    theirs = getattr(sys.modules.get("cuda.core.utils"), "ProgramCacheResource", None)
    return theirs is not None and isinstance(cache, theirs)


def _text(expression: str | bytes) -> str:
    return expression.decode("utf-8", "surrogateescape") if isinstance(expression, bytes) else expression


def make_record(
    inputs: CompileInputs,
    key: ProgramKey,
    output: Output,
    duration: float,
    kernel: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The provenance of a compile, as JSON: no absolute path but what is a component of the key."""
    from datetime import UTC, datetime

    return {
        "name": inputs.name,
        "code_type": inputs.code_type,
        "target_type": inputs.target_type,
        "arch": inputs.arch,
        "key": key.digest.hex(),
        "components": key.printable(),
        "headers": [{"name": h.name, "digest": h.digest} for h in key.headers.headers],
        "toolchain": [{"name": tool.name, "digest": tool.identity} for tool in key.toolchain],
        "log": output.log,
        "symbol_mapping": {_text(e): symbol.decode() for e, symbol in output.symbols.items()},
        "duration": duration,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "resource_usage": _usage(output.data) if inputs.target_type == "cubin" else None,
        "kernel": dict(kernel) if kernel is not None else None,
    }


def _usage(cubin: bytes) -> dict[str, dict[str, int]] | None:
    try:
        return resource_usage(cubin)
    except InspectError:
        return None  # a cubin of a later format: what it uses isn't known, and it is no worse for that


def publish(
    inputs: CompileInputs,
    key: ProgramKey,
    output: Output,
    record: Mapping[str, Any],
    cache: Any,
    reason: str | None,
) -> CompiledProgram:
    """Store what was compiled, unless there is a ``reason`` not to; the caller gets the bytes in hand either way."""
    ours = isinstance(cache, ProgramCacheResource)
    digest = entry_digest(key.digest)
    why = history.reasons(cache, record, digest) if ours and reason is None and events.wanted("miss") else ()
    if reason is None:
        if ours:
            reason = (
                None if cache.publish(key.digest, output.data, record) else "the cache dropped it (see its warning)"
            )
        else:
            try:
                cache[key.digest] = output.data
            except OSError as error:  # a foreign store in trouble costs the entry, not the compile
                reason = f"the cache couldn't store it: {error}"
    stored = reason is None
    if stored and ours:
        history.note(cache, inputs.name, digest)
    if events.wanted("miss"):
        about = (inputs.name, inputs.target_type, inputs.arch)
        events.emit(events.Event("miss", *about, digest, why))
        events.emit(events.Event("compile", *about, digest, seconds=record["duration"]))
        kept = events.Event("store", *about, digest) if stored else events.Event("drop", *about, None, (reason or "",))
        events.emit(kept)
    return CompiledProgram(
        output.data,
        inputs.target_type,
        inputs.name,
        inputs.arch,
        output.symbols,
        output.log,
        record,
        digest=digest if stored else None,
        reason=reason,
    )

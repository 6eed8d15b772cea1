# SPDX-License-Identifier: Apache-2.0
"""A miss: compile, determine the headers that were read, publish bytes and record.

This is separate from :mod:`~cuda_progcache.compile.pipeline` because a hit needs none of it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from cuda_progcache import events
from cuda_progcache._util import modes
from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import replace
from cuda_progcache._util.running import asked_by, note_child
from cuda_progcache.compile import history, toolchains, unkept
from cuda_progcache.compile.compiled import CompiledProgram
from cuda_progcache.compile.diagnostics import LineLookup, compile_error
from cuda_progcache.compile.lookup import expression_text
from cuda_progcache.compile.manifests import remember_alike, remember_headers
from cuda_progcache.compile.output import CompilerRefusal
from cuda_progcache.compile.policy import PLAIN, MissPolicy
from cuda_progcache.errors import CompileError, InspectError, UncacheableError
from cuda_progcache.inspect import resource_record
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.headers import NO_HEADERS, HeaderSet
from cuda_progcache.keys.includes import folders_of, headers_read
from cuda_progcache.keys.paths import in_log, reaching
from cuda_progcache.keys.schema import BaseKey, ProgramKey, base_key
from cuda_progcache.keys.tool_versions import as_recorded
from cuda_progcache.store.base import ProgramCacheResource, entry_digest
from cuda_progcache.store.compile_record import CompileRecord

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.output import Label, Output
    from cuda_progcache.keys.folders import Folders
    from cuda_progcache.keys.inputs import CompileInputs


def _run(inputs: CompileInputs, seed: str, more_flags: Sequence[str] = ()) -> Output:
    """Run the compiler for these inputs; raises CompilerRefusal."""
    name = inputs.compiler_name
    if inputs.code_type == "c++":
        from cuda_progcache.compile.compilers import compile_cpp

        return compile_cpp(
            inputs.compiler_code,
            name=name,
            flags=(*inputs.flags, *more_flags),
            target_type=inputs.target_type,
            name_expressions=inputs.name_expressions,
            random_seed=seed,
            trace=inputs.reads_headers,
        )
    if inputs.code_type == "ptx":
        from cuda_progcache.compile.arch import knows_arch
        from cuda_progcache.compile.compilers import link
        from cuda_progcache.compile.output import LinkerInput

        if not knows_arch(inputs.arch):  # some versions of nvJitLink end the whole process on an unknown one
            raise CompilerRefusal("UNSUPPORTED_ARCH", "")
        return link([LinkerInput(inputs.code, "ptx", name)], flags=inputs.flags, target_type=inputs.target_type)
    from cuda_progcache.compile.compilers import compile_nvvm
    from cuda_progcache.compile.nvvm_ir import extra_modules

    modules = [(name, inputs.code), *extra_modules(inputs)]
    return compile_nvvm(modules, flags=inputs.flags, libdevice=bool(inputs.options.use_libdevice))


def _error(inputs: CompileInputs, refusal: CompilerRefusal, lookup: LineLookup | None) -> CompileError:
    return compile_error(
        refusal,
        name=inputs.debug_source or inputs.compiler_name,
        code_type=inputs.code_type,
        target_type=inputs.target_type,
        flags=inputs.flags,
        source=inputs.code.decode("utf-8", "replace") if inputs.code_type != "nvvm" else "",
        lookup=lookup,
    )


def compile_and_publish(
    base: BaseKey, cache: Any, kernel: Mapping[str, Any] | None, lookup: LineLookup | None, policy: MissPolicy
) -> CompiledProgram:
    """Compile a program that the cache doesn't have, and store it if possible."""
    inputs = base.inputs
    if policy.keep_failures:
        _raise_known_failure(base, cache, lookup, policy.keep_failures)
    clock = time.perf_counter()
    before = folders_of(base)
    try:
        output, headers = _compile(base, policy, before)
    except CompilerRefusal as refusal:
        if policy.keep_failures:
            _keep_failure(base, refusal, before, cache, policy.keep_failures)
        _tell_refused(inputs, refusal.status)
        raise _error(inputs, refusal, lookup) from None  # the error contains the whole refusal
    duration = time.perf_counter() - clock
    reason = (
        inputs.unrepeatable
        or output.unkept
        or headers.uncacheable
        or base.cwd_trouble()
        or toolchain.trouble(inputs.code_type, base.toolchain)
    )
    key = base.with_headers(headers)
    record = make_record(inputs, key, output, duration, kernel)
    if output.pch_status is not None:
        record["pch_status"] = output.pch_status
    if named := in_log(base, output.trace, output.log):
        record["log_files"] = named
    if reason is None:
        # Exports include the manifests: without them the key can't be found again.
        entry = entry_digest(key.digest)
        if inputs.reads_headers:
            remember_headers(base, headers, cache, entry)
            record["manifest"] = base.manifest_id
        ours = isinstance(cache, ProgramCacheResource)
        if ours and not output.log and remember_alike(base, headers, cache, entry):
            record["plain_manifest"] = base.plain_id
    return publish(inputs, key, output, record, cache, reason)


def _seed(base: BaseKey) -> str:
    return base.plain.hex()[:32]


def _compile(base: BaseKey, policy: MissPolicy, before: Folders) -> tuple[Output, HeaderSet]:
    """Compile; return the output and the headers that were read, including which of their paths are in the output."""
    output, headers = _compile_and_read(base, policy, before)
    reached = reaching(base, headers, output.trace, output.data, base.inputs.target_type)
    return output, replace(headers, paths=reached) if reached else headers


def _compile_and_read(base: BaseKey, policy: MissPolicy, before: Folders) -> tuple[Output, HeaderSet]:
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
        before = folders_of(base)
    output = _run(inputs, seed)
    return output, headers_read(base, output.trace, before)


def _raise_known_failure(base: BaseKey, cache: Any, lookup: LineLookup | None, seconds: float) -> None:
    from cuda_progcache.compile import failures

    known = failures.recall(base, cache, seconds)
    if known is not None:
        refusal, age = known
        _tell_refused(base.inputs, f"remembered for {age:.0f} s")
        error = _error(base.inputs, refusal, lookup)
        error.add_note(f"remembered from a compile {age:.0f} s ago; the files that it read haven't changed since")
        raise error


def _keep_failure(base: BaseKey, refusal: CompilerRefusal, before: Folders, cache: Any, seconds: float) -> None:
    from cuda_progcache.compile import failures

    headers = NO_HEADERS
    if base.inputs.reads_headers:
        headers = headers_read(base, refusal.trace, before)
    failures.remember(base, refusal, headers, cache, seconds)


def _tell_refused(inputs: CompileInputs, why: str) -> None:
    if events.wanted("refused"):
        events.emit(events.Event("refused", inputs.name, inputs.target_type, inputs.arch, None, (why,)))


def tell_compiled(label: Label, seconds: float) -> None:
    """Report a compile without a cache."""
    if events.wanted("compile"):
        events.emit(events.Event("compile", label.name, label.target_type, label.arch, seconds=seconds))


def compile_uncached(inputs: CompileInputs, lookup: LineLookup | None) -> CompiledProgram:
    """Compile without a cache."""
    clock = time.perf_counter()
    try:
        try:
            base = base_key(inputs)  # as with a cache, since the bytes must be the same
            if inputs.header_policy.hermetic:
                output, _ = _compile_and_read(base, PLAIN, folders_of(base))
            else:
                output = _run(inputs, _seed(base))
        except UncacheableError:
            output = _run(inputs, sha256(inputs.code).hexdigest()[:32])
    except CompilerRefusal as refusal:
        _tell_refused(inputs, refusal.status)
        raise _error(inputs, refusal, lookup) from None  # the error contains the whole refusal
    seconds = time.perf_counter() - clock
    record = {"duration": seconds, "log": output.log, "pch_status": output.pch_status}
    tell_compiled(inputs, seconds)
    return CompiledProgram(
        output.data,
        inputs.target_type,
        inputs.name,
        inputs.arch,
        output.symbols,
        output.log,
        record,
    )


def make_record(
    label: Label,
    key: ProgramKey,
    output: Output,
    duration: float,
    kernel: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the record of a compile as JSON types. It has no absolute paths, except components of the key."""
    from datetime import UTC, datetime

    is_part = kernel is not None and "module" in kernel
    record: dict[str, Any] = {
        "name": label.name,
        "code_type": label.code_type,
        "target_type": label.target_type,
        "arch": label.arch,
        "key": key.digest.hex(),
        "components": key.printable(),
        "headers": [{"name": h.name, "digest": h.digest} for h in key.headers.headers],
        "toolchain": as_recorded(key.toolchain),
        "log": output.log,
        "symbol_mapping": {expression_text(e): symbol.decode() for e, symbol in output.symbols.items()},
        "duration": duration,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "resource_usage": _usage(output.data) if label.target_type == "cubin" else None,
        "kernel": dict(kernel) if kernel is not None and not is_part else None,
    }
    if kernel is not None and is_part:
        record["part_of"] = dict(kernel)
    if parents := asked_by():
        record["parents"] = parents
    return record


def _usage(cubin: bytes) -> dict[str, dict[str, int | None]] | None:
    try:
        return resource_record(cubin)
    except InspectError:
        return None  # a cubin in a newer format is usable, but its resource usage is unknown


def _why(cache: Any, about: CompileRecord, digest: str, reason: str | None) -> tuple[str, ...]:
    """Return why a program was a miss."""
    if reason is not None:
        return (f"it is never kept: {reason}",)
    if not isinstance(cache, ProgramCacheResource):
        return ("no entry has its key, and this cache keeps no records to compare it with",)
    return history.reasons(cache, about, digest)


def publish(
    label: Label,
    key: ProgramKey,
    output: Output,
    record: Mapping[str, Any],
    cache: Any,
    reason: str | None,
    seconds: float | None = None,
) -> CompiledProgram:
    """Store the output, unless there is a ``reason`` not to, and return the program in either case.

    ``seconds`` is the time that the compiler ran; by default, all the time that a hit saves.
    """
    ours = isinstance(cache, ProgramCacheResource)
    digest, made = entry_digest(key.digest), CompileRecord(record)
    why = _why(cache, made, digest, reason) if events.wanted("miss") else ()
    if reason is None:
        if ours:
            reason = None if cache.publish(key.digest, output.data, record) else modes.why_dropped(cache)
        else:
            try:
                cache[key.digest] = output.data
            except OSError as error:  # trouble in a foreign store loses the entry, but not the compile
                reason = f"the cache couldn't store it: {error}"
                unkept.note(cache, made, digest, reason)
    else:
        unkept.note(cache, made, digest, reason)
    stored = reason is None
    if stored and ours:
        unkept.forget(cache, digest)
        history.note(cache, made, digest)
        toolchains.note(cache, key.toolchain)
        note_child(digest)
    if events.wanted("miss"):
        about = (label.name, label.target_type, label.arch)
        events.emit(events.Event("miss", *about, digest, why))
        events.emit(events.Event("compile", *about, digest, seconds=made.seconds if seconds is None else seconds))
        kept = events.Event("store", *about, digest) if stored else events.Event("drop", *about, None, (reason or "",))
        events.emit(kept)
    return CompiledProgram(
        output.data,
        label.target_type,
        label.name,
        label.arch,
        output.symbols,
        output.log,
        record,
        digest=digest if stored else None,
        reason=reason,
    )

# SPDX-License-Identifier: Apache-2.0
"""The pipeline from inputs to a binary, through a cache: look the binary up, or compile and publish it.

:func:`obtain` is the single entry point, for :class:`~cuda_progcache.compile.program.Program` and for the service:

1. normalize the inputs, and key everything except the headers (``keys.schema``);
2. find the header set that currently matches in the manifest of that key, which completes the key;
3. load the entry: a hit needs no compiler library;
4. on a miss (:mod:`~cuda_progcache.compile.miss`), compile with the include trace; key the headers that were actually
   read; publish bytes and record; store the header set. The caller gets the compiled bytes.

Trouble with the cache never affects the caller: a program that can't be keyed is compiled and not stored, and
:attr:`CompiledProgram.reason` says why.
"""

from __future__ import annotations

from collections.abc import Mapping

from cuda_progcache._util import modes
from cuda_progcache.compile.lookup import check_cache, fleet, leases_dir, look_up
from cuda_progcache.compile.policy import PLAIN, MissPolicy
from cuda_progcache.errors import ToolchainError, UncacheableError
from cuda_progcache.keys.headers import Holds, holds
from cuda_progcache.keys.schema import base_key
from cuda_progcache.keys.toolchain import NotInstalledError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.compile.diagnostics import LineLookup
    from cuda_progcache.keys.inputs import CompileInputs


def obtain(
    inputs: CompileInputs,
    cache: Any = None,
    *,
    kernel: Mapping[str, Any] | None = None,
    lookup: LineLookup | None = None,
    policy: MissPolicy = PLAIN,
) -> CompiledProgram:
    """Return a compile's output from the cache, or compile and publish it.

    Parameters
    ----------
    inputs : CompileInputs
        From :func:`cuda_progcache.keys.inputs.normalize`.
    cache : ProgramCacheResource, optional
        One of our stores, or ``cuda.core``'s. The latter hold only bytes, so a program with name expressions can't be
        stored there. None: just compile.
    kernel : mapping, optional
        For the record: the library kernel (``name``), its ``parameters`` and ``templates``; with a ``module``, this
        compile is a part of a linked kernel.
    lookup : callable, optional
        Maps a source line to the template's, for diagnostics.
    policy : MissPolicy
        How a miss is compiled.

    Returns
    -------
    CompiledProgram

    Raises
    ------
    CompileError
        If the compiler refuses the program, now or in a kept failure.
    UncacheableError
        (a ``ValueError``) If a cache is given and a hit couldn't honour the options.
    ToolchainError
        If the program isn't in the cache and the compiler isn't installed.
    FrozenMissError
        In mode ``frozen``, if the program isn't in the cache.
    """
    ours = cache is not None and check_cache(cache)
    if (mode := modes.of(cache)) != "rw":
        from cuda_progcache.store.in_mode import in_mode

        cache = in_mode(cache, mode)
        ours = cache is not None
    if inputs.target_type == "ltoir" and inputs.code_type == "nvvm":
        from cuda_progcache.compile.nvvm_ir import warn_of_dropped_kernels

        warn_of_dropped_kernels(inputs)
    if inputs.facts.debug:
        from cuda_progcache.compile.debug_sources import keep_debug_source

        keep_debug_source(inputs)
    if cache is None:
        if mode == "frozen":
            from cuda_progcache.compile.frozen import no_cache

            raise no_cache(inputs)
        from cuda_progcache.compile.miss import compile_uncached

        return compile_uncached(inputs, lookup)
    try:
        base = base_key(inputs)
    except NotInstalledError as missing:
        if (found := find(inputs, cache)) is not None:
            return found
        if mode == "frozen":
            from cuda_progcache.compile.frozen import no_compiler

            raise no_compiler(inputs, cache, kernel, missing) from missing
        raise ToolchainError(
            f"{missing}; {inputs.name} for {inputs.arch} isn't in the cache, so it must be compiled"
        ) from missing
    if inputs.name_expressions and not ours:
        raise UncacheableError(
            f"{type(cache).__name__} stores only bytes, so the symbol mapping of name_expressions would be lost on a "
            f"hit; use one of cuda_progcache's stores"
        )
    if (found := look_up(base, cache)) is not None:
        return found
    if mode == "frozen":
        from cuda_progcache.compile.frozen import missed

        raise missed(base, cache, kernel)
    from cuda_progcache.compile.miss import compile_and_publish
    from cuda_progcache.compile.single_flight import fly

    return fly(
        base.flight,
        leases_dir(cache),
        lambda: compile_and_publish(base, cache, kernel, lookup, policy),
        lambda: look_up(base, cache, again=True),
        fleet=fleet(cache, base.manifest_id),
    )


def find(inputs: CompileInputs, cache: Any, holds: Holds = holds) -> CompiledProgram | None:
    """Look a program up in the cache, without compiling; None is a miss.

    If the compiler isn't installed, the lookup uses the identities of the compilers that made the cache's entries.
    """
    if (mode := modes.of(cache)) != "rw":
        from cuda_progcache.store.in_mode import in_mode

        cache = in_mode(cache, mode)
        if cache is None:
            return None
    try:
        return look_up(base_key(inputs), cache, holds=holds)
    except NotInstalledError:
        from cuda_progcache.compile.toolchains import without_compiler

        return without_compiler(cache, lambda again: look_up(base_key(inputs), cache, again=again, holds=holds))

# SPDX-License-Identifier: Apache-2.0
"""The key of a compile, headers included: known from an earlier compile, or asked of the compiler.

What a compile of the same source, options and compiler read before is kept in
header manifests: in this process's memory, and under ``manifests/`` of a cache
that lies on disk. They are disposable: without them the next lookup is a miss.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import OrderedDict
from collections.abc import Sequence

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import replace
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.compile.arch import with_arch
from cuda_progcache.errors import UncacheableError
from cuda_progcache.keys import options as opt
from cuda_progcache.keys.headers import NO_HEADERS, HeaderManifest, HeaderSet, read_file
from cuda_progcache.keys.schema import BaseKey, CompileInputs, ProgramKey, base_key, normalize

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.nvrtc import Output


def program_key(
    *,
    code: str | bytes,
    code_type: str,
    options: Any,
    target_type: str,
    name_expressions: Sequence[str | bytes] = (),
    extra_digest: bytes | None = None,
) -> ProgramKey:
    """The key of a compile, with all its components.

    Where the source reads headers that no compile in this process has been seen to read, NVRTC's front end runs once
    to learn which (a syntax check: no code is generated).

    Parameters
    ----------
    code, code_type, options, target_type, name_expressions, extra_digest
        As in :func:`make_program_cache_key`.

    Returns
    -------
    ProgramKey

    Raises
    ------
    ValueError, TypeError
        As in :func:`make_program_cache_key`.
    """
    base, headers = _identify(code, code_type, options, target_type, name_expressions, extra_digest)
    return base.with_headers(headers)


def _identify(
    code: str | bytes,
    code_type: str,
    options: Any,
    target_type: str,
    name_expressions: Sequence[str | bytes],
    extra_digest: bytes | None,
) -> tuple[BaseKey, HeaderSet]:
    inputs = normalize(
        code=code,
        code_type=code_type,
        options=options if options.arch is not None else with_arch(options),
        target_type=target_type,
        name_expressions=name_expressions,
        extra_digest=extra_digest,
    )
    if reason := inputs.unrepeatable:
        raise UncacheableError(f"{inputs.name}: {reason}")
    base = base_key(inputs)
    if not inputs.reads_headers:
        return base, NO_HEADERS
    headers = known_headers(base, None)
    if headers is None:
        headers = _trace_headers(base)
        remember_headers(base, headers, None)
    return base, headers


def make_program_cache_key(
    *,
    code: str | bytes,
    code_type: str,
    options: Any,
    target_type: str,
    name_expressions: Sequence[str | bytes] = (),
    extra_digest: bytes | None = None,
) -> bytes:
    """The cache key of a compile.

    Takes what ``cuda.core.utils.make_program_cache_key`` takes, and beyond it every input whose content can be seen:
    headers and include paths, ``pre_include``, libdevice, a ``name`` with a directory.

    Parameters
    ----------
    code : str or bytes
        The source; bytes for ``code_type="nvvm"`` only.
    code_type : {"c++", "ptx", "nvvm"}
        In any case.
    options : ProgramOptions
        Ours or ``cuda.core``'s: both give the same key.
    target_type : {"ptx", "cubin", "ltoir"}
        In any case.
    name_expressions : sequence of str or bytes
        Their order doesn't matter; ``"k"`` and ``b"k"`` differ.
    extra_digest : bytes, optional
        Anything else the output depends on; non-empty.

    Returns
    -------
    bytes
        32 bytes, SHA-256.

    Raises
    ------
    ValueError
        For pairs of types that no compiler makes, for options that write files while compiling (``create_pch``,
        ``time``, ``fdevice_time_trace``), for precompiled headers without ``extra_digest``, for ``__TIME__`` and its
        like in the source or a header, and for a source the compiler refuses.
    TypeError
        For arguments of the wrong type.
    """
    base, headers = _identify(code, code_type, options, target_type, name_expressions, extra_digest)
    return base.digest(headers)


def compiler_name(inputs: CompileInputs) -> str:
    """The file name the compiler gets: the program's, or with debug information a stable one made from the source.

    The default name would make every program's lines look alike to a debugger or profiler.
    """
    options = inputs.options
    if inputs.code_type == "c++" and inputs.name == opt.DEFAULT_NAME and (options.debug or options.lineinfo):
        return f"program_{sha256(inputs.code).hexdigest()[:16]}.cu"
    return inputs.name


def _trace_headers(base: BaseKey) -> HeaderSet:
    from cuda_progcache.compile.diagnostics import CompilerRefusal
    from cuda_progcache.compile.nvrtc import compile_cpp

    inputs = base.inputs
    started = time.time_ns()
    try:
        output = compile_cpp(
            inputs.code,
            name=compiler_name(inputs),
            flags=inputs.flags,
            target_type=inputs.target_type,
            name_expressions=(),
            front_end_only=True,
        )
    except CompilerRefusal as refusal:
        raise UncacheableError(
            f"{inputs.name}: which headers this reads can't be learnt, since the compiler refuses the source "
            f"({refusal.status}):\n{refusal.log}"
        ) from refusal
    headers = read_headers(base, output, started)
    if headers.uncacheable:
        raise UncacheableError(f"{inputs.name}: {headers.uncacheable}")
    return headers


def read_headers(base: BaseKey, output: Output, started_ns: int, contents: dict[str, bytes] | None = None) -> HeaderSet:
    """What a compile that began at ``started_ns`` read; ``uncacheable`` says why where that can't be known.

    Where the compiler didn't tell, the text does, with all that it may have read. ``contents`` takes the bytes by path.
    """
    from cuda_progcache.keys.includes import header_set, scan

    inputs = base.inputs
    search = inputs.search_path(base.cwd)
    if output.trace is None:
        return scan(inputs.code, inputs.pre_includes, search, started_ns)
    return header_set(output.trace, inputs.code, search, started_ns, contents)


_manifests: OrderedDict[tuple[str | None, str], HeaderManifest] = OrderedDict()
_manifests_lock = ForkSafeLock()
_MAX_MANIFESTS = 512
#: Manifests of a shard (one of 256) that are left alone, and how many more are looked at when one is written.
_FEW, _LOOKED_AT = 64, 4


def _manifest_path(cache: object, manifest_id: str) -> str | None:
    root = getattr(cache, "directory", None)
    if root is None:
        root = getattr(cache, "path", None)  # a store that isn't ours
    return _manifest_in(root, manifest_id) if root is not None else None


def _manifest_in(root: str | os.PathLike[str], manifest_id: str) -> str:
    return os.path.join(root, "manifests", manifest_id[:2], manifest_id[2:])


def known_headers(base: BaseKey, cache: object) -> HeaderSet | None:
    """The header set of an earlier compile that holds now."""
    path = _manifest_path(cache, base.manifest_id)
    slot = (path, base.manifest_id)
    search, recheck_after = base.inputs.search_path(base.cwd), base.inputs.header_policy.recheck_after
    with _manifests_lock:
        manifest = _manifests.get(slot)
        if manifest is not None:
            _manifests.move_to_end(slot)
    if manifest is not None and (found := manifest.match(search, recheck_after)) is not None:
        return found
    if path is not None:
        manifest = HeaderManifest.read(path)  # another process may know better
        _keep_manifest(slot, manifest)
        if (found := manifest.match(search)) is not None:
            return found
    for root in getattr(cache, "roots", ()):  # a layer that is only read has manifests, too
        layer = _manifest_in(root, base.manifest_id)
        if layer != path and (found := HeaderManifest.read(layer).match(search)) is not None:
            _keep_manifest(slot, HeaderManifest(path, [found, *(manifest.sets if manifest is not None else ())]))
            return found
    if path is not None:
        _recall_include_source(path)
    return None


def _include_source_path(manifest_path: str) -> str:
    from cuda_progcache.compile import nvrtc

    return os.path.join(os.path.dirname(os.path.dirname(manifest_path)), f"nvrtc-{nvrtc.build()[:32]}")


def _recall_include_source(manifest_path: str) -> None:
    """Take from the cache's directory how this NVRTC tells what it includes: trying it takes as long as a compile."""
    from cuda_progcache.compile import nvrtc
    from cuda_progcache.keys.includes import TEXT, TIME_TRACE, TRACE

    if nvrtc.build() not in nvrtc.include_sources:
        found = (read_file(_include_source_path(manifest_path)) or b"").decode("ascii", "replace")
        if found in {TRACE, TIME_TRACE, TEXT}:
            nvrtc.include_sources[nvrtc.build()] = found


def _keep_include_source(cache: object, manifest_path: str) -> None:
    from cuda_progcache.compile import nvrtc

    path = _include_source_path(manifest_path)
    found = nvrtc.include_sources.get(nvrtc.build())
    if found is not None and not os.path.lexists(path):
        _write(cache, path, found.encode())


def _keep_manifest(slot: tuple[str | None, str], manifest: HeaderManifest) -> None:
    with _manifests_lock:
        _manifests[slot] = manifest
        _manifests.move_to_end(slot)
        while len(_manifests) > _MAX_MANIFESTS:
            _manifests.popitem(last=False)


def remember_headers(base: BaseKey, headers: HeaderSet, cache: object, entry: str = "") -> None:
    """Keep a compile's header set for later lookups of the entry, in this process and in the cache's directory."""
    path = _manifest_path(cache, base.manifest_id)
    manifest = HeaderManifest.read(path) if path is not None else HeaderManifest(None)
    slot = (path, base.manifest_id)
    if path is None:
        with _manifests_lock:
            known = _manifests.get(slot)
        manifest = HeaderManifest(None, list(known.sets) if known else [])
    content = manifest.add(replace(headers, entry=entry))
    _keep_manifest(slot, manifest)
    if path is not None:
        _write(cache, path, content)
        _keep_include_source(cache, path)
        _trim(os.path.dirname(path))


def _trim(shard: str) -> None:
    """Remove manifests that lead to no entry any more, else they would outgrow the cache that evicts those.

    A few are looked at for each one that is written, once there are many: so those of evicted entries stay fewer than
    a third of the others.
    """
    import random

    from cuda_progcache.store.root import LITTER_AGE

    try:
        with os.scandir(shard) as found:
            names = [item.name for item in found]
        if len(names) <= _FEW:
            return
        for name in random.sample(names, _LOOKED_AT):  # no secret: any will do
            path = os.path.join(shard, name)
            young = time.time() - os.lstat(path).st_mtime < LITTER_AGE  # its entry may just be on its way
            if not young and not any(_entry_is_there(shard, known.entry) for known in HeaderManifest.read(path).sets):
                os.unlink(path)
    except OSError:
        return  # another process was faster, or the directory is in trouble: the entry's own write tells of that


def _entry_is_there(shard: str, digest: str) -> bool:
    root = os.path.dirname(os.path.dirname(shard))
    return os.path.lexists(os.path.join(root, "entries", digest[:2], digest[2:])) if digest else False


def _write(cache: object, path: str, content: bytes) -> None:
    """Write a disposable file: without it, the next process compiles once more."""
    from cuda_progcache.store.derived import write_beside

    with contextlib.suppress(OSError):  # the entry's own write warns if the cache is in trouble
        write_beside(cache.path, path, content)  # type: ignore[attr-defined]

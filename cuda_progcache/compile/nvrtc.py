# SPDX-License-Identifier: Apache-2.0
"""NVRTC: CUDA C++ to PTX, cubin or LTO-IR, with the list of headers it opened.

Needs neither a GPU nor a driver. Each call makes its own NVRTC program; the
compile itself runs without the GIL.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from cuda_progcache.compile.output import CompilerRefusal, Output
from cuda_progcache.errors import ToolchainError
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.includes import TEXT, TIME_TRACE, TRACE, UNKNOWN, Trace, parse_time_trace, parse_trace
from cuda_progcache.keys.options import LASTING

_GETTERS = {"ptx": "PTX", "cubin": "CUBIN", "ltoir": "LTOIR"}
_NO_HEADERS: Mapping[str, bytes] = MappingProxyType({})

#: How each build of NVRTC tells what it includes, as far as this process knows.
include_sources: dict[str, str] = {}


def _nvrtc() -> Any:
    toolchain.load("nvrtc")
    from cuda.bindings import nvrtc

    return nvrtc


def supported_archs() -> list[int]:
    """Architectures this NVRTC compiles for, as numbers (90 is ``sm_90``), ascending."""
    nvrtc = _nvrtc()
    status, archs = nvrtc.nvrtcGetSupportedArchs()
    if status:
        raise ToolchainError(f"NVRTC doesn't say which architectures it supports ({status.name})")
    return sorted(int(a) for a in archs)


def build() -> str:
    """Names the build of NVRTC, by the content of its files (64 hex digits)."""
    tools = toolchain.toolchain("c++")
    return sha256("\n".join(tool.identity for tool in tools).encode(), usedforsecurity=False).hexdigest()


def include_source() -> str:
    """How this NVRTC tells which headers it opened: ``"trace"``, ``"time-trace"``, or ``"text"`` for not at all.

    The trace isn't documented, so it is tried once per build, with two small headers.
    """
    known = include_sources.get(build())
    if known is None:
        known = include_sources[build()] = _try_include_sources()
    return known


def _try_include_sources() -> str:
    with tempfile.TemporaryDirectory(prefix="progcache-") as folder:
        outer, inner = (os.path.join(folder, name) for name in ("outer.h", "sub/inner.h"))
        os.mkdir(os.path.dirname(inner))
        for path, content in ((outer, '#include "sub/inner.h"\n'), (inner, "\n")):
            with open(path, "w", encoding="ascii") as file:
                file.write(content)
        for source, depths in ((TRACE, (0, 1)), (TIME_TRACE, (UNKNOWN, UNKNOWN))):
            try:
                flags = [f"--include-path={folder}", "--fdevice-syntax-only"]
                output = _compile_telling(
                    b"#include <outer.h>\n", "probe.cu", flags, source, "ptx", front_end_only=True
                )
            except CompilerRefusal:
                continue
            if output.trace == list(zip(depths, (outer, inner), strict=True)):
                return source
    return TEXT


def compile_cpp(
    code: bytes,
    *,
    name: str,
    flags: Sequence[str],
    target_type: str,
    name_expressions: Sequence[str | bytes] = (),
    random_seed: str | None = None,
    trace: bool = True,
    front_end_only: bool = False,
    headers: Mapping[str, bytes] = _NO_HEADERS,
) -> Output:
    """Compile CUDA C++.

    Parameters
    ----------
    code : bytes
        The source, UTF-8.
    name : str
        File name in diagnostics and debug information.
    flags : sequence of str
        NVRTC's flags, ``-arch=`` among them.
    target_type : {"ptx", "cubin", "ltoir"}
    name_expressions : sequence of str or bytes
        Templates to instantiate; their mangled names come back in ``symbols``.
    random_seed : str, optional
        ``--frandom-seed``, unless ``flags`` has one: names of anonymous namespaces otherwise hold the process id.
    trace : bool
        Whether to have the front end list the headers it opens, if this NVRTC can (:func:`include_source`).
    front_end_only : bool
        Stop after the syntax check: ``data`` is empty.
    headers : mapping of str to bytes
        Headers from memory, by the name that an ``#include`` gives; they come before those on disk.

    Returns
    -------
    Output

    Raises
    ------
    CompilerRefusal
        With NVRTC's status and log.
    ToolchainError
        If NVRTC isn't there.
    """
    source = include_source() if trace else TEXT
    lasting = [flag for flag in flags if flag.startswith(LASTING)]
    if not lasting:
        return compile_here(
            code, name, flags, source, target_type, name_expressions, headers, random_seed, front_end_only
        )
    from cuda_progcache.compile.apart import compile_apart

    return compile_apart(
        lasting,
        {
            "code": code,
            "name": name,
            "flags": list(flags),
            "source": source,
            "target_type": target_type,
            "name_expressions": list(name_expressions),
            "headers": dict(headers),
            "random_seed": random_seed,
            "front_end_only": front_end_only,
        },
    )


def compile_here(
    code: bytes,
    name: str,
    flags: Sequence[str],
    source: str,
    target_type: str,
    name_expressions: Sequence[str | bytes],
    headers: Mapping[str, bytes],
    random_seed: str | None,
    front_end_only: bool,  # noqa: FBT001 - compile_cpp's arguments, handed on
) -> Output:
    """Compile in this process; as :func:`compile_cpp`, which is to be called, with ``source`` to tell of headers."""
    extra: list[str] = []
    if random_seed is not None and not any(flag.startswith("--frandom-seed") for flag in flags):
        extra.append(f"--frandom-seed={random_seed}")
    if front_end_only:
        extra.append("--fdevice-syntax-only")
    given = (target_type, name_expressions, headers)
    try:
        return _compile_telling(code, name, [*flags, *extra], source, *given, front_end_only=front_end_only)
    except CompilerRefusal as refusal:
        if refusal.status != "NVRTC_ERROR_INVALID_OPTION" or not extra or front_end_only:
            raise
        # An NVRTC too old for one of our own flags: the user's decide.
        return _compile_telling(code, name, list(flags), source, *given)


def _compile_telling(
    code: bytes,
    name: str,
    flags: list[str],
    source: str,
    target_type: str,
    name_expressions: Sequence[str | bytes] = (),
    headers: Mapping[str, bytes] = _NO_HEADERS,
    *,
    front_end_only: bool = False,
) -> Output:
    """Compile, with the list of what was opened from ``source``."""
    if source == TEXT:
        return _compile(code, name, flags, target_type, name_expressions, headers, front_end_only=front_end_only)
    with _place_for(source) as path:
        if source == TRACE:
            written, parse = path, parse_trace
            flags = [*flags, "-Xcudafe", "--trace_includes", "-Xcudafe", f"--error_output={path}"]
        else:
            written, parse = f"{path}.json", parse_time_trace
            flags = [*flags, f"--fdevice-time-trace={path}"]
        try:
            output = _compile(code, name, flags, target_type, name_expressions, headers, front_end_only=front_end_only)
            return output._replace(trace=_told(written, parse))
        except CompilerRefusal as refusal:
            refusal.trace = _told(written, parse)
            raise


@contextlib.contextmanager
def _place_for(source: str) -> Iterator[str]:
    """Where NVRTC writes what it tells: no name that somebody could guess, and take or link elsewhere beforehand."""
    if source == TRACE and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        descriptor = os.memfd_create("progcache-trace")  # goes with the process, however that ends
        try:
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)
        return
    with tempfile.TemporaryDirectory(prefix="progcache-") as folder:
        yield os.path.join(folder, "trace")


def _told(path: str, parse: Callable[[str], Trace | None]) -> Trace | None:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return parse(file.read())
    except OSError:
        return None


def _compile(
    code: bytes,
    name: str,
    flags: list[str],
    target_type: str,
    name_expressions: Sequence[str | bytes],
    headers: Mapping[str, bytes],
    *,
    front_end_only: bool,
) -> Output:
    nvrtc = _nvrtc()
    names = [os.fsencode(header) for header in headers] or None
    contents = list(headers.values()) or None
    status, program = nvrtc.nvrtcCreateProgram(code, os.fsencode(name), len(headers), contents, names)
    _check(nvrtc, status)
    try:
        encoded: dict[str | bytes, bytes] = {e: e if isinstance(e, bytes) else e.encode() for e in name_expressions}
        for text in encoded.values():
            _check(nvrtc, *nvrtc.nvrtcAddNameExpression(program, text))
        options = [os.fsencode(flag) for flag in flags]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        pch_status = _pch_status(nvrtc, program) if "--pch" in flags or _has(flags, "--create-pch=") else None
        if pch_status == "heap exhausted" and not status:
            status, pch_status = _retry_with_larger_pch_heap(nvrtc, program, options)
        log = _log(nvrtc, program)
        _check(nvrtc, status, log)
        if front_end_only:
            return Output(b"", log)
        data = _get(nvrtc, program, _GETTERS[target_type])
        symbols: dict[str | bytes, bytes] = {}
        for expression, text in encoded.items():
            status, mangled = nvrtc.nvrtcGetLoweredName(program, text)
            _check(nvrtc, status)
            symbols[expression] = mangled
        return Output(data, log, symbols, None, pch_status)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _has(flags: Sequence[str], prefix: str) -> bool:
    return any(flag.startswith(prefix) for flag in flags)


def _check(nvrtc: Any, status: Any, log: str = "") -> None:
    if status:
        raise CompilerRefusal(nvrtc.nvrtcResult(status).name, log)


def _log(nvrtc: Any, program: Any) -> str:
    status, size = nvrtc.nvrtcGetProgramLogSize(program)
    _check(nvrtc, status)
    # A bytearray: NVRTC writes into it, and b" " * 1 would be the interpreter's own shared object.
    buffer = bytearray(size)
    _check(nvrtc, *nvrtc.nvrtcGetProgramLog(program, buffer))
    return bytes(buffer).rstrip(b"\0").decode("utf-8", "backslashreplace")


def _get(nvrtc: Any, program: Any, what: str) -> bytes:
    status, size = getattr(nvrtc, f"nvrtcGet{what}Size")(program)
    _check(nvrtc, status)
    buffer = bytearray(size)
    _check(nvrtc, *getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return bytes(buffer)


def _pch_status(nvrtc: Any, program: Any) -> str | None:
    query = getattr(nvrtc, "nvrtcGetPCHCreateStatus", None)
    if query is None:  # bindings before CUDA 12.8
        return None
    (status,) = query(program)
    return {
        "NVRTC_SUCCESS": "created",
        "NVRTC_ERROR_NO_PCH_CREATE_ATTEMPTED": "not_attempted",
        "NVRTC_ERROR_PCH_CREATE_HEAP_EXHAUSTED": "heap exhausted",
    }.get(nvrtc.nvrtcResult(status).name, "failed")


def reserve_pch_heap(size: int) -> bool:
    """Have NVRTC set aside so many bytes of address space for precompiled headers; False where it makes none."""
    nvrtc = _nvrtc()
    if getattr(nvrtc, "nvrtcSetPCHHeapSize", None) is None:  # bindings before CUDA 12.8
        return False
    (status,) = nvrtc.nvrtcSetPCHHeapSize(size)
    return not status


def _retry_with_larger_pch_heap(nvrtc: Any, program: Any, options: list[bytes]) -> tuple[Any, str | None]:
    status, size = nvrtc.nvrtcGetPCHHeapSizeRequired(program)
    _check(nvrtc, status)
    _check(nvrtc, *nvrtc.nvrtcSetPCHHeapSize(size))
    (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    outcome = _pch_status(nvrtc, program)
    return status, "failed" if outcome == "heap exhausted" else outcome

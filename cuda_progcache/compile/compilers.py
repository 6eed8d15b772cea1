# SPDX-License-Identifier: Apache-2.0
"""The compilers NVRTC, nvJitLink and libNVVM, each called in a separate process that runs nothing else.

The functions here take a program's inputs and return an :class:`~cuda_progcache.compile.output.Output`. Only
:func:`_run` decides where a compiler runs: in a compiler process (:mod:`~cuda_progcache.compile.own_process`), or in
this process if it is a compiler process itself or none can be started.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from cuda_progcache.compile import own_process
from cuda_progcache.compile.compiler_process import perform
from cuda_progcache.compile.nvjitlink import KINDS
from cuda_progcache.compile.output import CompilerRefusal, LinkerInput, Output
from cuda_progcache.errors import OptionError, ToolchainError
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.flags import facts
from cuda_progcache.keys.includes import NOTHING, TIME_TRACE, TRACE, UNKNOWN, Trace, parse_time_trace, parse_trace
from cuda_progcache.keys.lasting import lasting, tells_of_others

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_NO_HEADERS: Mapping[str, bytes] = MappingProxyType({})

#: How each build of NVRTC reports included headers, as far as this process knows.
include_sources: dict[str, str] = {}
_archs: dict[str, list[int]] = {}
#: Libraries that this process has loaded: the path of each, and the identity of its files at that time.
_loaded: dict[str, tuple[toolchain.ToolFile, ...]] = {}

#: Whether this process is a worker, which is started with the variables in the key and ends with its batch. It
#: runs compiles that leave no state in itself, and so can use the precompiled headers that it makes.
compiles_itself = False


def supported_archs() -> list[int]:
    """Return the architectures that the installed NVRTC compiles for, as ascending numbers (90 is ``sm_90``)."""
    build = toolchain.build("c++")
    known = _archs.get(build)
    if known is None:
        made, _ = _run("archs", "c++", {}, (), "anything")
        known = _archs[build] = list(made)
    return known


def include_source() -> str:
    """Return how the installed NVRTC reports the headers it opens: ``"trace"``, ``"time-trace"`` or ``"nothing"``.

    The trace isn't documented, so it is tried once per build, with two small headers.
    """
    build = toolchain.build("c++")
    known = include_sources.get(build)
    if known is None:
        known = include_sources[build] = _try_include_sources()
    return known


def _try_include_sources() -> str:
    headers = {"outer.h": b'#include "sub/inner.h"\n', "sub/inner.h": b"\n"}
    for source, depths in ((TRACE, (0, 1)), (TIME_TRACE, (UNKNOWN, UNKNOWN))):
        for front_end_only in (True, False):  # NVRTC 12.0 can't stop after the front end
            flags = ["--fdevice-syntax-only"] if front_end_only else []
            given = ("ptx", (), headers, source, front_end_only)
            try:
                output = _compile_cpp(b"#include <outer.h>\n", "probe.cu", flags, *given)
            except CompilerRefusal as refusal:
                if refusal.status == "NVRTC_ERROR_INVALID_OPTION":
                    continue
                break
            if output.trace == list(zip(depths, headers, strict=True)):
                return source
            break
    return NOTHING


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
    """Compile CUDA C++ with NVRTC.

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
        ``--frandom-seed``, unless ``flags`` has one. Without it, names of anonymous namespaces contain the process ID.
    trace : bool
        Whether to make the front end list the headers it opens, if this NVRTC can (:func:`include_source`).
    front_end_only : bool
        Stop after the syntax check: ``data`` is empty.
    headers : mapping of str to bytes
        Headers in memory, by their name in the ``#include``; they take precedence over those on disk.

    Returns
    -------
    Output

    Raises
    ------
    CompilerRefusal
        If NVRTC refuses the program; it has NVRTC's status and log.
    ToolchainError
        If NVRTC isn't installed, can't do this, or crashes.
    """
    source = include_source() if trace else NOTHING
    extra: list[str] = []
    if random_seed is not None and "frandom-seed" not in facts(tuple(flags)).names:
        extra.append(f"--frandom-seed={random_seed}")
    if front_end_only:
        extra.append("--fdevice-syntax-only")
    given = (target_type, name_expressions, headers, source, front_end_only)
    try:
        return _compile_cpp(code, name, [*flags, *extra], *given)
    except CompilerRefusal as refusal:
        if refusal.status != "NVRTC_ERROR_INVALID_OPTION" or not extra or front_end_only:
            raise
        # This NVRTC is too old for one of our own flags: use only the user's.
        return _compile_cpp(code, name, list(flags), *given)


def _compile_cpp(
    code: bytes,
    name: str,
    flags: list[str],
    target_type: str,
    name_expressions: Sequence[str | bytes],
    headers: Mapping[str, bytes],
    source: str,
    front_end_only: bool,  # noqa: FBT001 - compile_cpp's arguments
) -> Output:
    given = {
        "code": code,
        "name": os.fsencode(name),
        "flags": [os.fsencode(flag) for flag in flags],
        "target_type": target_type,
        "name_expressions": [e if isinstance(e, bytes) else e.encode() for e in name_expressions],
        "headers": {os.fsencode(header): content for header, content in headers.items()},
        "tell": None if source == NOTHING else source,
        "front_end_only": front_end_only,
    }

    def trace(told: bytes | None) -> Trace | None:
        if told is None:
            return None
        text = told.decode("utf-8", "surrogateescape")
        return parse_trace(text) if source == TRACE else parse_time_trace(text)

    made, unkept = _run("nvrtc", "c++", given, flags, name, trace)
    symbols = dict(zip(name_expressions, made["symbols"], strict=False))
    return Output(made["data"], made["log"], symbols, trace(made["told"]), made["pch_status"], unkept)


def link(inputs: Sequence[LinkerInput], *, flags: Sequence[str], target_type: str) -> Output:
    """Link with nvJitLink or, if it isn't installed, with the driver's linker, which supports less.

    Parameters
    ----------
    inputs : sequence of LinkerInput
        In link order; ``target_type`` one of ptx, cubin, ltoir, fatbin, object, library.
    flags : sequence of str
        nvJitLink's flags, ``-arch=`` among them.
    target_type : {"cubin", "ptx"}

    Returns
    -------
    Output

    Raises
    ------
    CompilerRefusal
        If the linker refuses the inputs; it has the linker's status and log.
    OptionError
        For an input that the linker doesn't accept.
    ToolchainError
        If nvJitLink isn't installed, can't do this, or crashes.
    """
    unknown = [i.target_type for i in inputs if i.target_type not in KINDS]
    if unknown:
        raise OptionError(f"nvJitLink can't link {unknown[0]!r} input (it accepts {', '.join(KINDS)})")
    if toolchain.linker() == "driver":
        from cuda_progcache.compile.driver_linker import link_by_driver

        return link_by_driver(inputs, flags=flags, target_type=target_type)
    given = {"inputs": [tuple(item) for item in inputs], "flags": list(flags), "target_type": target_type}
    about = inputs[0].name if inputs else "nothing"
    try:
        made, unkept = _run("nvJitLink", "ptx", given, flags, about)
    except CompilerRefusal as refusal:
        refusal.log = _CHATTER.sub("", refusal.log)
        raise
    return Output(made["data"], _CHATTER.sub("", made["log"]), unkept=unkept)


# nvJitLink prints this for every LTO-IR input made by libNVVM; it is of no use.
_CHATTER = re.compile(r"^INFO: \w+ LTOIR Container created \(\d+ bytes\)\n?", re.MULTILINE)


def compile_nvvm(modules: Sequence[tuple[str, bytes]], *, flags: Sequence[str], libdevice: bool = False) -> Output:
    """Compile NVVM IR with libNVVM.

    Parameters
    ----------
    modules : sequence of (name, bytes)
        The program's module first, then extra sources, in link order.
    flags : sequence of str
        libNVVM's flags; ``-gen-lto`` among them gives LTO-IR instead of PTX.
    libdevice : bool
        Whether to add libdevice's math functions; only those used are linked in.

    Returns
    -------
    Output

    Raises
    ------
    CompilerRefusal
        If libNVVM refuses the program; it has libNVVM's status and log.
    ToolchainError
        If libNVVM or libdevice isn't installed, or libNVVM crashes.
    """
    given = {
        "modules": list(modules),
        "flags": list(flags),
        "libdevice": toolchain.libdevice_path() if libdevice else None,
    }
    made, unkept = _run("nvvm", "nvvm", given, flags, modules[0][0])
    return Output(made["data"], made["log"], unkept=unkept)


def _run(
    call: str,
    code_type: str,
    given: dict[str, Any],
    flags: Sequence[str],
    about: str,
    trace: Callable[[bytes | None], Trace | None] = lambda _: None,
) -> tuple[Any, str | None]:
    """Call a compiler in the right process.

    Parameters
    ----------
    call : str
        A call of :func:`~cuda_progcache.compile.compiler_process.perform`.
    code_type : str
        The code type whose compiler is called.
    given : dict
        The call's arguments.
    flags : sequence of str
        The compiler's flags, which are among the arguments.
    about : str
        What is compiled, for messages.
    trace : callable
        Parses a compiler's header trace.

    Returns
    -------
    made : object
        The result of the call.
    unkept : str or None
        Why other options or libraries may have affected the result.
    """
    library = toolchain.LIBRARY_OF[code_type]
    lasts = lasting(library, flags)
    tools = toolchain.toolchain(code_type)
    job = _job(call, tools, given)
    unkept = None
    alone = call == "nvrtc" and tells_of_others([tool.path for tool in tools], given["target_type"])
    if compiles_itself and not alone and not lasts - {"--pch"} and _loaded.setdefault(tools[0].path, tools) == tools:
        answer = perform(job)
    else:
        try:
            answer = own_process.ask(
                job,
                kind=own_process.Kind.of(lasts),
                build=toolchain.build(code_type),
                about=about,
                holds=lambda: toolchain.toolchain(code_type, thorough=True) == tools,
                alone=alone,
            )
        except own_process.NoProcessError as error:
            answer = perform(job)
            unkept = f"it was compiled in this process, because no compiler process can be started ({error})"
    if "refused" in answer:
        status, log, told = answer["refused"]
        raise CompilerRefusal(status, log, trace(told))
    if "trouble" in answer:
        raise ToolchainError(f"{library} can't compile {about}: {answer['trouble']}")
    return answer["made"], unkept


def reserve_pch_heap(size: int) -> bool:
    """Make this process's NVRTC reserve address space for precompiled headers, in bytes; False if it can't."""
    if not compiles_itself:
        return False
    return bool(perform(_job("reserve", toolchain.toolchain("c++"), {"size": size})).get("made"))


def _job(call: str, tools: Sequence[toolchain.ToolFile], given: dict[str, Any]) -> dict[str, Any]:
    library, *beside = (tool.path for tool in tools)
    return {"call": call, "library": library, "beside": beside, "given": given}

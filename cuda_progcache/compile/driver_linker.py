# SPDX-License-Identifier: Apache-2.0
"""The CUDA driver's linker (``cuLink*``), used if nvJitLink isn't installed: PTX and cubins to one cubin.

It needs a driver and a device, and doesn't accept LTO-IR. Its output depends on the driver, so the key of such a link
contains the driver's files (:func:`cuda_progcache.keys.toolchain.toolchain`).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cuda_progcache.compile.output import CompilerRefusal, Output
from cuda_progcache.errors import OptionError, ToolchainError

if TYPE_CHECKING:
    from cuda_progcache.compile.output import LinkerInput

_WANTED = "install nvJitLink for that: `pip install nvidia-nvjitlink`"
_LOG_SIZE = 1 << 16

# Flag of nvJitLink -> option of the driver's linker. Its value is the number after "=", or 1.
_OPTIONS = {
    "-maxrregcount": "CU_JIT_MAX_REGISTERS",
    "-O": "CU_JIT_OPTIMIZATION_LEVEL",
    "-g": "CU_JIT_GENERATE_DEBUG_INFO",
    "-lineinfo": "CU_JIT_GENERATE_LINE_INFO",
    "-verbose": "CU_JIT_LOG_VERBOSE",
}
# These affect code generation from LTO-IR. PTX specifies this itself, and nvJitLink doesn't change it either.
_FOR_LTO = ("-ftz=", "-prec-div=", "-prec-sqrt=", "-fma=")
_FLAG = re.compile(r"(-O(?=\d)|-[\w-]+)=?(.*)")
_ARCH = re.compile(r"-arch=(?:sm|compute)_(\d+)([af]?)")


def link_by_driver(inputs: Sequence[LinkerInput], *, flags: Sequence[str], target_type: str) -> Output:
    """Link; arguments and result are those of :func:`cuda_progcache.compile.compilers.link`.

    Raises
    ------
    CompilerRefusal
        If the driver refuses the inputs; it has the driver's status and log.
    OptionError
        For an input, a target or a flag that only nvJitLink supports.
    ToolchainError
        If the driver has no device.
    """
    if target_type != "cubin":
        raise OptionError(f"the driver's linker makes only cubins, not {target_type}: {_WANTED}")
    kinds = {"ptx": "CU_JIT_INPUT_PTX", "cubin": "CU_JIT_INPUT_CUBIN", "fatbin": "CU_JIT_INPUT_FATBINARY",
             "object": "CU_JIT_INPUT_OBJECT", "library": "CU_JIT_INPUT_LIBRARY"}  # fmt: skip
    for item in inputs:
        if item.target_type not in kinds:
            raise OptionError(f"the driver's linker doesn't accept {item.target_type} ({item.name}): {_WANTED}")
    driver = _bindings()
    names, values = _options(driver, flags)
    logs = {name: bytearray(_LOG_SIZE) for name in ("INFO", "ERROR")}
    for name, buffer in logs.items():
        names += [getattr(driver.CUjit_option, f"CU_JIT_{name}_LOG_BUFFER")]
        names += [getattr(driver.CUjit_option, f"CU_JIT_{name}_LOG_BUFFER_SIZE_BYTES")]
        values += [buffer, len(buffer)]

    def check(status: Any, *results: Any) -> Any:
        if int(status):
            raise CompilerRefusal(driver.CUresult(status).name, _text(logs["ERROR"]))
        return results[0] if len(results) == 1 else results

    with _context(driver):
        state = check(*driver.cuLinkCreate(len(names), names, values))
        try:
            for item in inputs:
                kind = getattr(driver.CUjitInputType, kinds[item.target_type])
                # PTX must end in a NUL (NVRTC's does, a file doesn't).
                data = item.data if item.target_type != "ptx" else item.data.rstrip(b"\0") + b"\0"
                check(*driver.cuLinkAddData(state, kind, data, len(data), item.name.encode(), 0, [], []))
            address, size = check(*driver.cuLinkComplete(state))
            return Output(ctypes.string_at(address, size), _text(logs["INFO"]))  # a copy: it is freed with the state
        finally:
            driver.cuLinkDestroy(state)


def _bindings() -> Any:
    from cuda.bindings import driver

    return driver


def _text(log: bytearray) -> str:
    return bytes(log).split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _options(driver: Any, flags: Sequence[str]) -> tuple[list[Any], list[Any]]:
    names: list[Any] = []
    values: list[Any] = []
    for flag in flags:
        if (arch := _ARCH.fullmatch(flag)) is not None:
            target = getattr(driver.CUjit_target, f"CU_TARGET_COMPUTE_{arch[1]}{arch[2].upper()}", None)
            if target is None:
                raise OptionError(f"the driver's linker knows no target for {flag}: {_WANTED}")
            names.append(driver.CUjit_option.CU_JIT_TARGET)
            values.append(target)
            continue
        if flag == "-no-cache":
            names.append(driver.CUjit_option.CU_JIT_CACHE_MODE)
            values.append(driver.CUjit_cacheMode.CU_JIT_CACHE_OPTION_NONE)
            continue
        if flag.startswith(_FOR_LTO):
            continue
        parts = _FLAG.fullmatch(flag)
        option = _OPTIONS.get(parts[1]) if parts is not None else None
        if parts is None or option is None or not (parts[2] or "1").isdecimal():
            raise OptionError(f"the driver's linker doesn't support {flag}: {_WANTED}")
        names.append(getattr(driver.CUjit_option, option))
        values.append(int(parts[2] or 1))
    return names, values


@contextmanager
def _context(driver: Any) -> Iterator[None]:
    """Have a current context in the block: the caller's or, if there is none, the first device's primary context."""

    def check(status: Any, *results: Any) -> Any:
        if int(status):
            name = driver.CUresult(status).name
            raise ToolchainError(f"there is no CUDA device for the driver's linker ({name}); without one, {_WANTED}")
        return results[0] if results else None

    check(*driver.cuInit(0))
    if int(check(*driver.cuCtxGetCurrent())):
        yield
        return
    device = check(*driver.cuDeviceGet(0))
    context = check(*driver.cuDevicePrimaryCtxRetain(device))
    try:
        check(*driver.cuCtxPushCurrent(context))
        try:
            yield
        finally:
            driver.cuCtxPopCurrent()
    finally:
        driver.cuDevicePrimaryCtxRelease(device)

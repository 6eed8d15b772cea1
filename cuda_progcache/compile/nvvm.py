# SPDX-License-Identifier: Apache-2.0
"""libNVVM: NVVM IR (text or bitcode) to PTX or LTO-IR. No GPU, no driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cuda_progcache.compile.diagnostics import CompilerRefusal
from cuda_progcache.compile.nvrtc import Output
from cuda_progcache.keys import toolchain


def compile_nvvm(modules: Sequence[tuple[str, bytes]], *, flags: Sequence[str], libdevice: bool = False) -> Output:
    """Compile NVVM IR.

    Parameters
    ----------
    modules : sequence of (name, bytes)
        The program's module first, then extra sources, in link order.
    flags : sequence of str
        libNVVM's flags; ``-gen-lto`` among them gives LTO-IR instead of PTX.
    libdevice : bool
        Whether to add libdevice's math functions (only what is used is taken in).

    Returns
    -------
    Output

    Raises
    ------
    CompilerRefusal
        With libNVVM's status and log.
    ToolchainError
        If libNVVM or libdevice isn't there.
    """
    toolchain.load("nvvm")
    from cuda.bindings import nvvm

    program = nvvm.create_program()
    try:
        try:
            for name, source in modules:
                nvvm.add_module_to_program(program, source, len(source), name)
            options = list(flags)
            nvvm.verify_program(program, len(options), options)
            if libdevice:
                with open(toolchain.libdevice_path(), "rb") as file:
                    bitcode = file.read()
                nvvm.lazy_add_module_to_program(program, bitcode, len(bitcode), "libdevice")
            nvvm.compile_program(program, len(options), options)
            buffer = bytearray(nvvm.get_compiled_result_size(program))
            nvvm.get_compiled_result(program, buffer)
        except nvvm.nvvmError as error:
            raise CompilerRefusal(str(error), _log(nvvm, program)) from error
        return Output(bytes(buffer), _log(nvvm, program))
    finally:
        nvvm.destroy_program(program)


def _log(nvvm: Any, program: Any) -> str:
    buffer = bytearray(nvvm.get_program_log_size(program))
    if buffer:
        nvvm.get_program_log(program, buffer)
    return buffer.rstrip(b"\0").decode("utf-8", "backslashreplace")

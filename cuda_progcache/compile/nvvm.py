# SPDX-License-Identifier: Apache-2.0
"""libNVVM: NVVM IR (text or bitcode) to PTX or LTO-IR. No GPU, no driver."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cuda_progcache.compile.output import CompilerRefusal, Output
from cuda_progcache.keys import toolchain

if TYPE_CHECKING:
    from cuda_progcache.keys.schema import CompileInputs

_SYMBOL = r'@("[^"\n]*"|[-\w.$]+)'
_KERNELS = (
    re.compile(rf'!\{{[^{{}}\n]*{_SYMBOL}, *!"kernel", *i32 1'),  # an annotation
    re.compile(rf"^define [^@\n]*\bptx_kernel\b[^@\n]*{_SYMBOL}\(", re.MULTILINE),  # a calling convention
)
_USED = re.compile(r"^@llvm\.(?:compiler\.)?used *=(.*)$", re.MULTILINE)


@functools.lru_cache(maxsize=64)
def kernels_without_use(*modules: bytes) -> tuple[str, ...]:
    """Kernels of textual NVVM IR that a link of its LTO-IR would drop.

    nvJitLink keeps the kernels of C++, but of libNVVM's LTO-IR only what is used: by other code, or by being named in
    ``@llvm.used`` (or ``@llvm.compiler.used``).

    Parameters
    ----------
    *modules : bytes
        All modules of a program. Where one is bitcode, nothing is known.

    Returns
    -------
    tuple of str
        Names, in order.
    """
    if any(map(_is_bitcode, modules)):
        return ()  # the list of what is used may be in it
    text = "\n".join(module.decode("utf-8", "replace") for module in modules)
    used = {name for kept in _USED.findall(text) for name in re.findall(_SYMBOL, kept)}
    kernels = {name: None for pattern in _KERNELS for name in pattern.findall(text)}
    return tuple(name.strip('"') for name in kernels if name not in used)


def extra_modules(inputs: CompileInputs) -> list[tuple[str, bytes]]:
    """Name and source of a program's modules beside its own."""
    extra = inputs.options.extra_sources or ()
    return [(n, s.encode() if isinstance(s, str) else bytes(s)) for n, s in extra]


def warn_of_dropped_kernels(inputs: CompileInputs) -> None:
    """Warn of kernels of a program in NVVM IR that a link of its LTO-IR would drop."""
    if names := kernels_without_use(inputs.code, *(module for _, module in extra_modules(inputs))):
        warnings.warn(
            f"{inputs.name}: a link of this LTO-IR will drop {', '.join(names)}: nvJitLink keeps kernels of NVVM IR "
            f"only where @llvm.used names them (or compile to ptx, and link that)",
            RuntimeWarning,
            stacklevel=5,
        )


def _is_bitcode(module: bytes) -> bool:
    return module[:4] in {b"BC\xc0\xde", b"\xde\xc0\x17\x0b"}


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

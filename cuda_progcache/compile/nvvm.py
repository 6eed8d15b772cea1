# SPDX-License-Identifier: Apache-2.0
"""libNVVM's functions: they compile NVVM IR (text or bitcode) to PTX or LTO-IR. No GPU or driver is needed.

:mod:`~cuda_progcache.compile.compilers` decides in which process they are called.
"""

from __future__ import annotations

import ctypes
import os

from cuda_progcache.compile.library import Library, RefusedError, strings, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

# nvvm.h, nvvmResult
_STATUSES = (
    "SUCCESS",
    "ERROR_OUT_OF_MEMORY",
    "ERROR_PROGRAM_CREATION_FAILURE",
    "ERROR_IR_VERSION_MISMATCH",
    "ERROR_INVALID_INPUT",
    "ERROR_INVALID_PROGRAM",
    "ERROR_INVALID_IR",
    "ERROR_INVALID_OPTION",
    "ERROR_NO_MODULE_IN_PROGRAM",
    "ERROR_COMPILATION",
    "ERROR_CANCELLED",
)


class Nvvm(Library):
    """A library file of libNVVM."""

    def status_name(self, status: int) -> str:  # noqa: D102 - the base's
        return f"{_STATUSES[status] if status < len(_STATUSES) else 'ERROR'} ({status})"

    def compile(
        self, modules: Sequence[tuple[str, bytes]], flags: Sequence[str], libdevice: str | None = None
    ) -> dict[str, Any]:
        """Compile NVVM IR.

        Parameters
        ----------
        modules : sequence of (name, bytes)
            The program's module first, then extra sources, in link order.
        flags : sequence of str
            libNVVM's flags; ``-gen-lto`` among them gives LTO-IR instead of PTX.
        libdevice : str, optional
            Path of libdevice's bitcode; only the used functions are linked in.

        Returns
        -------
        dict
            ``data`` and ``log``.

        Raises
        ------
        RefusedError
            If libNVVM refuses the program; it has the status and log.
        OSError
            If libdevice can't be read.
        """
        program = ctypes.c_void_p()
        self.call("nvvmCreateProgram", ctypes.byref(program))
        options = [os.fsencode(flag) for flag in flags]
        given = (ctypes.c_int(len(options)), strings(options))
        try:
            for name, module in modules:
                self._add("nvvmAddModuleToProgram", program, name, module)
            self.call("nvvmVerifyProgram", program, *given)
            if libdevice is not None:
                with open(libdevice, "rb") as file:
                    self._add("nvvmLazyAddModuleToProgram", program, "libdevice", file.read())
            self.call("nvvmCompileProgram", program, *given)
            data = self.read("nvvmGetCompiledResultSize", "nvvmGetCompiledResult", program)
            return {"data": data, "log": self._log(program)}
        except RefusedError as refusal:
            refusal.log = self._log(program)
            raise
        finally:
            self.function("nvvmDestroyProgram")(ctypes.byref(program))

    def _add(self, function: str, program: Any, name: str, module: bytes) -> None:
        size = ctypes.c_size_t(len(module))
        self.call(function, program, ctypes.c_char_p(module), size, ctypes.c_char_p(os.fsencode(name)))

    def _log(self, program: Any) -> str:
        return text(self.read("nvvmGetProgramLogSize", "nvvmGetProgramLog", program))

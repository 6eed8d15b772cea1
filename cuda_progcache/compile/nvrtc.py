# SPDX-License-Identifier: Apache-2.0
"""NVRTC's functions: they compile CUDA C++ to PTX, cubin or LTO-IR, and report the headers that were opened.

No GPU or driver is needed. Each call creates its own NVRTC program; the compile runs without the GIL.
:mod:`~cuda_progcache.compile.compilers` decides in which process they are called.
"""

from __future__ import annotations

import ctypes
import os
import re

from cuda_progcache.compile.library import Library, RefusedError, strings, text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

#: The ways in which an NVRTC can report the headers that it opens.
TRACE, TIME_TRACE = "trace", "time-trace"

# nvrtc.h, nvrtcResult
_STATUSES = (
    "NVRTC_SUCCESS",
    "NVRTC_ERROR_OUT_OF_MEMORY",
    "NVRTC_ERROR_PROGRAM_CREATION_FAILURE",
    "NVRTC_ERROR_INVALID_INPUT",
    "NVRTC_ERROR_INVALID_PROGRAM",
    "NVRTC_ERROR_INVALID_OPTION",
    "NVRTC_ERROR_COMPILATION",
    "NVRTC_ERROR_BUILTIN_OPERATION_FAILURE",
    "NVRTC_ERROR_NO_NAME_EXPRESSIONS_AFTER_COMPILATION",
    "NVRTC_ERROR_NO_LOWERED_NAMES_BEFORE_COMPILATION",
    "NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID",
    "NVRTC_ERROR_INTERNAL_ERROR",
    "NVRTC_ERROR_TIME_FILE_WRITE_FAILED",
    "NVRTC_ERROR_NO_PCH_CREATE_ATTEMPTED",
    "NVRTC_ERROR_PCH_CREATE_HEAP_EXHAUSTED",
    "NVRTC_ERROR_PCH_CREATE",
    "NVRTC_ERROR_CANCELLED",
    "NVRTC_ERROR_TIME_TRACE_FILE_WRITE_FAILED",
    "NVRTC_ERROR_BUSY",
)
_PCH_STATUSES = {
    "NVRTC_SUCCESS": "created",
    "NVRTC_ERROR_NO_PCH_CREATE_ATTEMPTED": "not_attempted",
    "NVRTC_ERROR_PCH_CREATE_HEAP_EXHAUSTED": "heap exhausted",
}
_PCH_FLAG = re.compile(rb"\s*--?(pch|create-pch=.*)\s*$", re.DOTALL)
_GETTERS = {"ptx": "PTX", "cubin": "CUBIN", "ltoir": "LTOIR"}


class Nvrtc(Library):
    """A library file of NVRTC."""

    def status_name(self, status: int) -> str:  # noqa: D102 - the base's
        return _STATUSES[status] if status < len(_STATUSES) else f"NVRTC_ERROR {status}"

    def version(self) -> tuple[int, int]:
        """Return NVRTC's version number, which several builds may share."""
        numbers = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(numbers[0]), ctypes.byref(numbers[1]))
        return numbers[0].value, numbers[1].value

    def archs(self) -> list[int]:
        """Return the architectures that NVRTC compiles for, as ascending numbers (90 is ``sm_90``)."""
        count = ctypes.c_int()
        self.call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self.call("nvrtcGetSupportedArchs", found)
        return sorted(found)

    def reserve_pch_heap(self, size: int) -> bool:
        """Reserve address space for precompiled headers, in bytes; False if they aren't supported (before 12.8)."""
        reserve = self.find("nvrtcSetPCHHeapSize")
        return reserve is not None and not reserve(ctypes.c_size_t(size))

    def compile(
        self,
        code: bytes,
        name: bytes,
        flags: Sequence[bytes],
        target_type: str,
        *,
        name_expressions: Sequence[bytes] = (),
        headers: Mapping[bytes, bytes] | None = None,
        tell: str | None = None,
        front_end_only: bool = False,
    ) -> dict[str, Any]:
        """Compile CUDA C++.

        Parameters
        ----------
        code : bytes
            The source, UTF-8.
        name : bytes
            File name in diagnostics and debug information.
        flags : sequence of bytes
            NVRTC's flags, ``-arch=`` among them.
        target_type : {"ptx", "cubin", "ltoir"}
        name_expressions : sequence of bytes
            Templates to instantiate.
        headers : mapping of bytes to bytes, optional
            Headers in memory, by their name in the ``#include``; they take precedence over those on disk.
        tell : {"trace", "time-trace"}, optional
            How NVRTC shall report the headers that it opens; None: not at all.
        front_end_only : bool
            Whether the flags stop after the front end, so that there is no output.

        Returns
        -------
        dict
            ``data``; ``log``; ``symbols``, mangled names in the order of ``name_expressions``; ``pch_status``;
            ``told``, the header trace, or None.

        Raises
        ------
        RefusedError
            If NVRTC refuses the program; it has the status, the log and the header trace.
        """
        if tell is None:
            return self._compile(code, name, flags, target_type, name_expressions, headers, front_end_only)
        place = _Place(tell)
        try:
            made = self._compile(
                code, name, [*flags, *place.flags], target_type, name_expressions, headers, front_end_only
            )
            made["told"] = place.content()
            return made
        except RefusedError as refusal:
            refusal.told = place.content()
            raise
        finally:
            place.close()

    def _compile(
        self,
        code: bytes,
        name: bytes,
        flags: Sequence[bytes],
        target_type: str,
        name_expressions: Sequence[bytes],
        headers: Mapping[bytes, bytes] | None,
        front_end_only: bool,  # noqa: FBT001 - compile's arguments
    ) -> dict[str, Any]:
        headers = headers or {}
        program = ctypes.c_void_p()
        self.call(
            "nvrtcCreateProgram",
            ctypes.byref(program),
            ctypes.c_char_p(code),
            ctypes.c_char_p(name),
            ctypes.c_int(len(headers)),
            strings(list(headers.values())),
            strings(list(headers)),
        )
        try:
            for expression in name_expressions:
                self.call("nvrtcAddNameExpression", program, ctypes.c_char_p(expression))
            compile_ = self.function("nvrtcCompileProgram")
            options = (ctypes.c_int(len(flags)), strings(flags))
            status = compile_(program, *options)
            pch_status = None
            if any(_PCH_FLAG.match(flag) for flag in flags):
                pch_status = self._pch_status(program)
                if pch_status == "heap exhausted" and not status:
                    self._enlarge_pch_heap(program)
                    status = compile_(program, *options)
                    pch_status = self._pch_status(program)
                if pch_status == "heap exhausted":
                    pch_status = "failed"
            log = text(self.read("nvrtcGetProgramLogSize", "nvrtcGetProgramLog", program))
            if status:
                raise RefusedError(self.status_name(status), log)
            getter = _GETTERS[target_type]
            return {
                "data": b"" if front_end_only else self.read(f"nvrtcGet{getter}Size", f"nvrtcGet{getter}", program),
                "log": log,
                "symbols": [] if front_end_only else [self._mangled(program, e) for e in name_expressions],
                "pch_status": pch_status,
                "told": None,
            }
        finally:
            self.function("nvrtcDestroyProgram")(ctypes.byref(program))

    def _mangled(self, program: Any, expression: bytes) -> bytes:
        found = ctypes.c_char_p()
        self.call("nvrtcGetLoweredName", program, ctypes.c_char_p(expression), ctypes.byref(found))
        return found.value or b""

    def _pch_status(self, program: Any) -> str | None:
        query = self.find("nvrtcGetPCHCreateStatus")  # since 12.8
        return None if query is None else _PCH_STATUSES.get(self.status_name(query(program)), "failed")

    def _enlarge_pch_heap(self, program: Any) -> None:
        size = ctypes.c_size_t()
        self.call("nvrtcGetPCHHeapSizeRequired", program, ctypes.byref(size))
        self.call("nvrtcSetPCHHeapSize", size)


class _Place:
    """The file to which NVRTC writes its header trace. Its name can't be guessed, so it can't be created beforehand.

    If no such file can be made (the time trace needs a writable directory), NVRTC isn't asked for a trace.
    """

    def __init__(self, tell: str) -> None:
        self.flags: list[bytes] = []
        self._written: str | None = None
        self._descriptor: int | None = None
        self._folder: Any = None
        if tell == TRACE and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
            self._descriptor = os.memfd_create("progcache-trace")  # freed with the process, however it ends
            path = f"/proc/self/fd/{self._descriptor}"
        else:
            import tempfile

            try:
                self._folder = tempfile.TemporaryDirectory(prefix="progcache-")
            except OSError:
                return
            path = os.path.join(self._folder.name, "trace")
        if tell == TRACE:
            self._written = path
            self.flags = [b"-Xcudafe", b"--trace_includes", b"-Xcudafe", b"--error_output=" + os.fsencode(path)]
        else:
            self._written = f"{path}.json"
            self.flags = [b"--fdevice-time-trace=" + os.fsencode(path)]

    def content(self) -> bytes | None:
        if self._written is None:
            return None
        try:
            with open(self._written, "rb") as file:
                return file.read()
        except OSError:
            return None

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        if self._folder is not None:
            self._folder.cleanup()

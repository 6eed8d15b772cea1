# SPDX-License-Identifier: Apache-2.0
"""nvJitLink's functions: they link PTX, LTO-IR and cubins to one cubin (or PTX). No GPU or driver is needed.

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

# nvJitLink.h, nvJitLinkResult
_STATUSES = (
    "SUCCESS",
    "ERROR_UNRECOGNIZED_OPTION",
    "ERROR_MISSING_ARCH",
    "ERROR_INVALID_INPUT",
    "ERROR_PTX_COMPILE",
    "ERROR_NVVM_COMPILE",
    "ERROR_INTERNAL",
    "ERROR_THREADPOOL",
    "ERROR_UNRECOGNIZED_INPUT",
    "ERROR_FINALIZE",
    "ERROR_NULL_INPUT",
    "ERROR_INCOMPATIBLE_OPTIONS",
    "ERROR_INCORRECT_INPUT_TYPE",
    "ERROR_ARCH_MISMATCH",
    "ERROR_OUTDATED_LIBRARY",
    "ERROR_MISSING_FATBIN",
    "ERROR_UNRECOGNIZED_ARCH",
    "ERROR_UNSUPPORTED_ARCH",
    "ERROR_LTO_NOT_ENABLED",
)
#: nvJitLink.h, nvJitLinkInputType.
KINDS = {"cubin": 1, "ptx": 2, "ltoir": 3, "fatbin": 4, "object": 5, "library": 6}


class NvJitLink(Library):
    """A library file of nvJitLink."""

    def status_name(self, status: int) -> str:  # noqa: D102 - the base's
        return f"{_STATUSES[status] if status < len(_STATUSES) else 'ERROR'} ({status})"

    def function(self, *names: str) -> Any:
        """Return a function by its name, or by its name in 12.0 to 12.2, such as ``__nvJitLinkCreate_12_0``."""
        versioned = [f"__{name}_12_{minor}" for name in names for minor in range(10)]
        return super().function(*names, *versioned)

    def link(self, inputs: Sequence[tuple[bytes, str, str]], flags: Sequence[str], target_type: str) -> dict[str, Any]:
        """Link.

        Parameters
        ----------
        inputs : sequence of (data, target_type, name)
            In link order; types are those of :data:`KINDS`.
        flags : sequence of str
            nvJitLink's flags, ``-arch=`` among them.
        target_type : {"cubin", "ptx"}

        Returns
        -------
        dict
            ``data`` and ``log``.

        Raises
        ------
        RefusedError
            If nvJitLink refuses the flags or an input; it has the status and log.
        """
        handle = ctypes.c_void_p()
        options = [os.fsencode(flag) for flag in flags]
        try:
            self.call("nvJitLinkCreate", ctypes.byref(handle), ctypes.c_uint32(len(options)), strings(options))
        except RefusedError as refusal:
            refusal.log = f"nvJitLink refused the options: {' '.join(flags)}"
            raise
        try:
            for data, kind, name in inputs:
                given = (ctypes.c_char_p(data), ctypes.c_size_t(len(data)), ctypes.c_char_p(os.fsencode(name)))
                self.call("nvJitLinkAddData", handle, ctypes.c_int(KINDS[kind]), *given)
            self.call("nvJitLinkComplete", handle)
            what = "Cubin" if target_type == "cubin" else "Ptx"
            data = self.read(f"nvJitLinkGetLinked{what}Size", f"nvJitLinkGetLinked{what}", handle)
            return {"data": data, "log": self._log(handle, "Info")}
        except RefusedError as refusal:
            refusal.log = self._log(handle, "Error")
            raise
        finally:
            self.function("nvJitLinkDestroy")(ctypes.byref(handle))

    def _log(self, handle: Any, kind: str) -> str:
        return text(self.read(f"nvJitLinkGet{kind}LogSize", f"nvJitLinkGet{kind}Log", handle))

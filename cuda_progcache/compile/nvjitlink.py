# SPDX-License-Identifier: Apache-2.0
"""nvJitLink: PTX, LTO-IR and cubins, one or several, to one cubin (or PTX). No GPU, no driver.

Where it isn't installed, the driver's linker does what it can (:mod:`cuda_progcache.compile.driver_linker`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from cuda_progcache.compile.output import CompilerRefusal, LinkerInput, Output
from cuda_progcache.errors import OptionError
from cuda_progcache.keys import toolchain

_KINDS = {
    "ptx": "PTX",
    "cubin": "CUBIN",
    "ltoir": "LTOIR",
    "fatbin": "FATBIN",
    "object": "OBJECT",
    "library": "LIBRARY",
}


def link(inputs: Sequence[LinkerInput], *, flags: Sequence[str], target_type: str) -> Output:
    """Link.

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
        With nvJitLink's status and log.
    OptionError
        For an input that nvJitLink doesn't take.
    ToolchainError
        If nvJitLink isn't there.
    """
    unknown = [i.target_type for i in inputs if i.target_type not in _KINDS]
    if unknown:
        raise OptionError(f"nvJitLink can't link {unknown[0]!r} input (it takes {', '.join(_KINDS)})")
    if toolchain.linker() == "driver":
        from cuda_progcache.compile.driver_linker import link_by_driver

        return link_by_driver(inputs, flags=flags, target_type=target_type)
    toolchain.load("nvJitLink")
    from cuda.bindings import nvjitlink

    try:
        handle = nvjitlink.create(len(flags), list(flags))
    except nvjitlink.nvJitLinkError as error:
        raise CompilerRefusal(str(error), f"nvJitLink refused its options: {' '.join(flags)}") from error
    try:
        try:
            for item in inputs:
                kind = getattr(nvjitlink.InputType, _KINDS[item.target_type])
                nvjitlink.add_data(handle, kind, item.data, len(item.data), item.name)
            nvjitlink.complete(handle)
            if target_type == "cubin":
                buffer = bytearray(nvjitlink.get_linked_cubin_size(handle))
                nvjitlink.get_linked_cubin(handle, buffer)
            else:
                buffer = bytearray(nvjitlink.get_linked_ptx_size(handle))
                nvjitlink.get_linked_ptx(handle, buffer)
        except nvjitlink.nvJitLinkError as error:
            raise CompilerRefusal(str(error), _log(nvjitlink, handle, "error")) from error
        return Output(bytes(buffer), _log(nvjitlink, handle, "info"))
    finally:
        nvjitlink.destroy(handle)


# nvJitLink says this of every LTO-IR input that libNVVM made, and it tells nobody anything.
_CHATTER = re.compile(r"^INFO: \w+ LTOIR Container created \(\d+ bytes\)\n?", re.MULTILINE)


def _log(nvjitlink: Any, handle: Any, kind: str) -> str:
    size = getattr(nvjitlink, f"get_{kind}_log_size")(handle)
    buffer = bytearray(size)
    if size:
        getattr(nvjitlink, f"get_{kind}_log")(handle, buffer)
    return _CHATTER.sub("", buffer.rstrip(b"\0").decode("utf-8", "backslashreplace"))

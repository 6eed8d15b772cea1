# SPDX-License-Identifier: Apache-2.0
"""NVVM IR, text or bitcode: a program's modules, and the kernels that a link of its LTO-IR would drop."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

from cuda_progcache._util.warning import warn

if TYPE_CHECKING:
    from cuda_progcache.keys.inputs import CompileInputs

_SYMBOL = r'@("[^"\n]*"|[-\w.$]+)'
_KERNELS = (
    re.compile(rf'!\{{[^{{}}\n]*{_SYMBOL}, *!"kernel", *i32 1'),  # an annotation
    re.compile(rf"^define [^@\n]*\bptx_kernel\b[^@\n]*{_SYMBOL}\(", re.MULTILINE),  # a calling convention
)
_USED = re.compile(r"^@llvm\.(?:compiler\.)?used *=(.*)$", re.MULTILINE)


@functools.lru_cache(maxsize=64)
def kernels_without_use(*modules: bytes) -> tuple[str, ...]:
    """Return the kernels of textual NVVM IR that a link of its LTO-IR would drop.

    nvJitLink keeps all kernels of C++. In libNVVM's LTO-IR it keeps only kernels that are used by other code, or named
    in ``@llvm.used`` (or ``@llvm.compiler.used``).

    Parameters
    ----------
    *modules : bytes
        All modules of a program. If one is bitcode, the result is empty.

    Returns
    -------
    tuple of str
        Names, in order.
    """
    if any(map(_is_bitcode, modules)):
        return ()  # the bitcode may contain the list of used kernels
    text = "\n".join(module.decode("utf-8", "replace") for module in modules)
    used = {name for kept in _USED.findall(text) for name in re.findall(_SYMBOL, kept)}
    kernels = {name: None for pattern in _KERNELS for name in pattern.findall(text)}
    return tuple(name.strip('"') for name in kernels if name not in used)


def extra_modules(inputs: CompileInputs) -> list[tuple[str, bytes]]:
    """Return the names and sources of a program's extra modules."""
    extra = inputs.options.extra_sources or ()
    return [(n, s.encode() if isinstance(s, str) else bytes(s)) for n, s in extra]


def warn_of_dropped_kernels(inputs: CompileInputs) -> None:
    """Warn about kernels of an NVVM IR program that a link of its LTO-IR would drop."""
    if names := kernels_without_use(inputs.code, *(module for _, module in extra_modules(inputs))):
        warn(
            f"{inputs.name}: a link of this LTO-IR will drop {', '.join(names)}: nvJitLink keeps kernels of NVVM IR "
            f"only if @llvm.used names them; name them there, or compile to ptx and link that",
            RuntimeWarning,
        )


def _is_bitcode(module: bytes) -> bool:
    return module[:4] in {b"BC\xc0\xde", b"\xde\xc0\x17\x0b"}

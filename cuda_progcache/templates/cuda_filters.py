# SPDX-License-Identifier: Apache-2.0
"""Template filters and tests for CUDA C++ source: C++ types, exact literals, vector types and definitions."""

from __future__ import annotations

from cuda_progcache._util.suggest import did_you_mean
from cuda_progcache.errors import ParameterError
from cuda_progcache.templates.dtypes import C_TYPES, TYPE_CODES, dtype_name

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def ctype(dtype: object) -> str:
    """Return the C++ type of a dtype, such as ``__half`` for ``float16`` (a filter).

    Half types need ``cuda_fp16.h`` or ``cuda_bf16.h``, complex types ``cuda/std/complex`` (header root "cccl").

    Parameters
    ----------
    dtype : str, type or numpy.dtype
        See `dtype_name`.

    Returns
    -------
    str

    Raises
    ------
    ParameterError
        If CUDA C++ has no such type.
    """
    return C_TYPES[dtype_name(dtype)]


_VECTOR_BASES = {
    "char": "char", "signed char": "char", "int8": "char", "unsigned char": "uchar", "uint8": "uchar",
    "short": "short", "int16": "short", "unsigned short": "ushort", "uint16": "ushort",
    "int": "int", "int32": "int", "unsigned int": "uint", "unsigned": "uint", "uint32": "uint",
    "long": "long", "unsigned long": "ulong",
    "long long": "longlong", "int64": "longlong", "unsigned long long": "ulonglong", "uint64": "ulonglong",
    "float": "float", "float32": "float", "double": "double", "float64": "double",
    "__half": "__half", "float16": "__half", "__nv_bfloat16": "__nv_bfloat16", "bfloat16": "__nv_bfloat16",
}  # fmt: skip
_VECTOR_BASES |= {base: base for base in ("uchar", "ushort", "uint", "ulong", "longlong", "ulonglong")}
_WIDE = {"double", "long", "ulong", "longlong", "ulonglong"}


def vector_type(base: object, length: int, align: int = 16) -> str:
    """Return the name of a built-in vector type, ``float4`` for ``vector_type("float", 4)`` (a filter and a global).

    Parameters
    ----------
    base : str or dtype
        A C type, CUDA's short name of it (``uint``), or a dtype. ``"float"`` means C's float.
    length : int
        The number of elements: 1 to 4; 2 for the half types.
    align : {16, 32}
        The alignment in bytes of a vector of four 64-bit elements. CUDA 13 has two such types: ``double4_16a`` and
        ``double4_32a``.

    Returns
    -------
    str

    Raises
    ------
    ParameterError
        If CUDA has no such vector type.
    """
    name = " ".join(base.split()) if isinstance(base, str) else dtype_name(base)
    name = TYPE_CODES.get(name.lstrip("<=|"), name)
    short = _VECTOR_BASES.get(name)
    if short is None:
        hint = did_you_mean(name, _VECTOR_BASES, listing="valid")
        raise ParameterError(f"CUDA has no vectors of {name!r}{hint}")
    lengths = (2,) if short.startswith("__") else (1, 2, 3, 4)
    if length not in lengths or isinstance(length, bool):
        valid = ", ".join(map(str, lengths))
        raise ParameterError(f"CUDA has no vector of {length!r} elements of {name!r}; valid: {valid}")
    if short not in _WIDE or length != 4:
        if align != 16:
            raise ParameterError(f"only vectors of four 64-bit elements take align, not {length} of {name!r}")
        return f"{short}{length}"
    if align not in {16, 32}:
        raise ParameterError(f"{short}4 takes align=16 or align=32, not {align!r}")
    return f"{short}4_{align}a"


def cuda_literal(value: Any, dtype: object = None) -> str:
    """Return an exact C++ constant expression (a filter); see `cuda_progcache.templates.literals.cuda_literal`."""
    from cuda_progcache.templates import literals  # its import of fractions takes 8 ms

    return literals.cuda_literal(value, dtype)


def define(value: Any, name: str) -> str:
    """Return a preprocessor definition, ``#define BLOCK 256`` for ``256 | define("BLOCK")`` (a filter).

    Parameters
    ----------
    value : bool, int, float, str or None
        The macro's value. A boolean becomes 1 or 0, and a float an exact double. A string is stripped of surrounding
        whitespace, and its line breaks are escaped. None defines a macro without a value.
    name : str
        The macro's name.

    Returns
    -------
    str
        The definition, without a line break at its end.

    Raises
    ------
    ParameterError
        If the name is not a C identifier or the value is of another type.
    """
    if not (name.isascii() and name.isidentifier()):
        raise ParameterError(f"define: {name!r} is not a C identifier")
    if value is None:
        return f"#define {name}"
    if isinstance(value, str):
        return f"#define {name} " + " \\\n    ".join(value.strip().splitlines())
    if isinstance(value, bool):
        return f"#define {name} {int(value)}"
    return f"#define {name} {cuda_literal(value)}"


def power_of_two(value: Any) -> bool:
    """Test whether `value` is an integer power of two; 1 is one."""
    return _is_int(value) and value > 0 and value & (value - 1) == 0


def aligned(value: Any, unit: int) -> bool:
    """Test whether the integer `value` is a multiple of `unit`.

    Raises
    ------
    ParameterError
        If `unit` is not a positive integer.
    """
    if not _is_int(unit) or unit <= 0:
        raise ParameterError(f"aligned takes a positive integer, not {unit!r}")
    return _is_int(value) and value % unit == 0


def _is_int(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__") and not hasattr(value, "__len__")


FILTERS: dict[str, Callable[..., Any]] = {
    "ctype": ctype,
    "cuda_literal": cuda_literal,
    "vector_type": vector_type,
    "define": define,
}
TESTS: dict[str, Callable[..., Any]] = {"power_of_two": power_of_two, "aligned": aligned}
GLOBALS: dict[str, Any] = {"vector_type": vector_type}

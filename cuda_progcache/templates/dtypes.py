# SPDX-License-Identifier: Apache-2.0
"""The dtypes of kernels: NumPy's names, the type codes, and the C++ types.

NumPy objects are accepted, but this module never imports NumPy.
"""

from __future__ import annotations

import sys

from cuda_progcache._util.suggest import did_you_mean
from cuda_progcache.errors import ParameterError

C_TYPES = {
    "bool": "bool",
    "int8": "signed char",
    "int16": "short",
    "int32": "int",
    "int64": "long long",
    "uint8": "unsigned char",
    "uint16": "unsigned short",
    "uint32": "unsigned int",
    "uint64": "unsigned long long",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
    "complex64": "cuda::std::complex<float>",
    "complex128": "cuda::std::complex<double>",
}
DTYPES = tuple(C_TYPES)
"""The names of the dtypes that kernels may use, in NumPy's spelling."""

TYPE_CODES = {
    "?": "bool",
    "b1": "bool",
    "f2": "float16",
    "f4": "float32",
    "f8": "float64",
    "c8": "complex64",
    "c16": "complex128",
}
TYPE_CODES |= {
    f"{sign}{size}": f"{kind}{size * 8}" for sign, kind in (("i", "int"), ("u", "uint")) for size in (1, 2, 4, 8)
}
TYPE_CODES |= {"half": "float16", "single": "float32", "double": "float64", "bool_": "bool"}
# These names mean different types in NumPy and C, so that a silent choice would be wrong in one of the two.
_AMBIGUOUS = {
    "float": "float32 or float64",
    "int": "int32 or int64",
    "long": "int32 or int64",
    "complex": "complex64 or complex128",
}
_PYTHON_TYPES: dict[object, str] = {bool: "bool", int: "int64", float: "float64", complex: "complex128"}


def dtype_name(dtype: object) -> str:
    """Return the canonical name of a dtype.

    Parameters
    ----------
    dtype : str, type or numpy.dtype
        A NumPy name (``"float32"``), a type code in native or little-endian order (``"f4"``, ``"<f4"``),
        ``"bfloat16"``, a Python type (as in NumPy: ``int`` is int64), or, if NumPy is loaded, anything that
        ``numpy.dtype`` accepts.

    Returns
    -------
    str
        One of `DTYPES`.

    Raises
    ------
    ParameterError
        If CUDA C++ has no such type, the name means different types in C and NumPy, or the byte order is big-endian.
    """
    if isinstance(dtype, str):
        text = dtype.strip()
        if text in C_TYPES:
            return text
        if text in _AMBIGUOUS:
            raise ParameterError(f"dtype {text!r} has different widths in C and NumPy; write {_AMBIGUOUS[text]}")
        code = text[1:] if text[:1] in "<=|" else text
        if code in TYPE_CODES:
            return TYPE_CODES[code]
        if text[:1] == ">" and text[1:] in TYPE_CODES:
            raise ParameterError(
                f"dtype {text!r} is big-endian; CUDA devices are little-endian, so convert the array first"
            )
        raise ParameterError(f"no CUDA C++ type for dtype {dtype!r}{did_you_mean(text, C_TYPES, listing='known')}")
    if isinstance(dtype, type) and dtype in _PYTHON_TYPES:
        return _PYTHON_TYPES[dtype]
    numpy = sys.modules.get("numpy")  # a caller with a NumPy object has imported NumPy
    if numpy is not None:
        try:
            resolved = numpy.dtype(dtype)
        except TypeError:
            pass  # reported below
        else:
            if not resolved.isnative:
                raise ParameterError(
                    f"dtype {resolved.str!r} is big-endian; CUDA devices are little-endian, so convert the array first"
                )
            return dtype_name(str(resolved.name))
    raise ParameterError(f"{dtype!r} is not a dtype; give a NumPy dtype or one of {', '.join(DTYPES)}")

# SPDX-License-Identifier: Apache-2.0
"""Exact C++ literals of Python and NumPy numbers.

A literal is a constant expression that needs only the header that declares its type. NVRTC has no ``<math.h>``, so
``INFINITY`` and ``NAN`` can't be used.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any, NamedTuple

from cuda_progcache.errors import ParameterError
from cuda_progcache.templates.dtypes import C_TYPES, dtype_name


class _FloatFormat(NamedTuple):
    """An IEEE 754 binary format: the bits of precision (with the hidden bit) and the exponents of normal numbers."""

    precision: int
    min_exponent: int
    max_exponent: int

    def round(self, value: Fraction) -> Fraction | None:
        """Return `value` rounded to nearest, ties to even; None if the result is infinite."""
        if not value:
            return value
        magnitude = abs(value)
        exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
        if magnitude < Fraction(2) ** exponent:
            exponent -= 1
        quantum = Fraction(2) ** (max(exponent, self.min_exponent) - (self.precision - 1))
        rounded = round(value / quantum) * quantum
        return None if abs(rounded) >= Fraction(2) ** (self.max_exponent + 1) else rounded


_FLOATS = {
    "float16": _FloatFormat(11, -14, 15),
    "bfloat16": _FloatFormat(8, -126, 127),
    "float32": _FloatFormat(24, -126, 127),
    "float64": _FloatFormat(53, -1022, 1023),
}
_BY_BITS = {
    "float16": "__half(__half_raw{{0x{:04x}u}})",
    "bfloat16": "__nv_bfloat16(__nv_bfloat16_raw{{0x{:04x}u}})",
    "float32": "__builtin_bit_cast(float, 0x{:08x}u)",
    "float64": "__builtin_bit_cast(double, 0x{:016x}ull)",
}


def _by_bits(value: float, name: str) -> str:
    """Return the literal of a value as the bits of its encoding; the format must represent the value exactly."""
    if name == "bfloat16":  # the upper half of a float
        bits = int.from_bytes(struct.pack(">f", value)[:2])
    else:
        bits = int.from_bytes(struct.pack({"float16": ">e", "float32": ">f", "float64": ">d"}[name], value))
    return _BY_BITS[name].format(bits)


def cuda_literal(value: Any, dtype: object = None) -> str:
    """Return an exact C++ constant expression of type ``ctype(dtype)`` (a filter).

    A float is rounded once, to nearest even, and written as the shortest decimal that reads back as the same value.
    Half types, infinities and NaN (always the quiet NaN, whatever the payload) are written as bits. Negative numbers
    are parenthesized.

    Parameters
    ----------
    value : bool, int, float, complex or NumPy scalar
        The number.
    dtype : str, type or numpy.dtype, optional
        The type of the literal. The default is the dtype of a NumPy scalar; for Python numbers it is bool, float64,
        complex128, or the first of int32, int64 and uint64 that can represent the integer.

    Returns
    -------
    str
        ``0.1f``, ``(-2147483647 - 1)``, ``7ull``, ``__half(__half_raw{0x3c00u})``, ``static_cast<short>(5)``, ...

    Raises
    ------
    ParameterError
        If the value isn't a number, doesn't fit the type, isn't an integer although the type is an integer type, or is
        rounded to zero or infinity.
    """
    own: Any = None
    if not isinstance(value, (bool, int, float, complex)) or type(value).__module__ == "numpy":
        own = getattr(value, "dtype", None)
        item = getattr(value, "item", None)
        if own is None or item is None or getattr(value, "shape", ()) != ():
            raise ParameterError(f"cuda_literal needs a number, not {value!r} ({type(value).__name__})")
        own = dtype_name(own)
        value = item()
        if not isinstance(value, (bool, int, float, complex)):
            value = float(value)  # a scalar of ml_dtypes: a double represents every bfloat16
    if dtype is not None:
        name = dtype_name(dtype)
    elif own is not None:
        name = own
    else:
        name = _literal_dtype(value)
    if name == "bool":
        if value not in (0, 1):
            raise ParameterError(f"cuda_literal: {value!r} is not a bool")
        return "true" if value else "false"
    if name in _FLOATS:
        return _float_literal(value, name)
    if name.startswith("complex"):
        part = "float32" if name == "complex64" else "float64"
        number = complex(value)
        return f"{C_TYPES[name]}({_float_literal(number.real, part)}, {_float_literal(number.imag, part)})"
    return _int_literal(value, name)


def _literal_dtype(value: complex) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return "int32"
        return "int64" if value < 2**63 else "uint64"
    return "float64" if isinstance(value, float) else "complex128"


def _int_literal(value: Any, name: str) -> str:
    if isinstance(value, complex) or (isinstance(value, float) and not value.is_integer()):
        raise ParameterError(f"cuda_literal: {value!r} is not an integer, as {name} needs")
    number = int(value)
    unsigned = name.startswith("u")
    width = int(name[4:] if unsigned else name[3:])
    low, high = (0, 2**width - 1) if unsigned else (-(2 ** (width - 1)), 2 ** (width - 1) - 1)
    if not low <= number <= high:
        raise ParameterError(f"cuda_literal: {number} does not fit {name} ({low} to {high})")
    if width < 32:  # C++ has no literals of these types
        return f"static_cast<{C_TYPES[name]}>({number})"
    suffix = {"int32": "", "uint32": "u", "int64": "ll", "uint64": "ull"}[name]
    if number < 0 and number == low:  # in C++, -2147483648 negates 2147483648, which doesn't fit int
        return f"({number + 1}{suffix} - 1)"
    return f"({number}{suffix})" if number < 0 else f"{number}{suffix}"


def _float_literal(value: Any, name: str) -> str:
    if isinstance(value, complex):
        raise ParameterError(f"cuda_literal: complex {value!r} is not a {name}")
    if isinstance(value, float) and not math.isfinite(value):
        return _by_bits(math.nan if math.isnan(value) else value, name)
    form = _FLOATS[name]
    exact = Fraction(value)
    rounded = form.round(exact)
    if rounded is None or (exact and not rounded):
        became = "infinite" if rounded is None else "zero"
        raise ParameterError(f"cuda_literal: {value!r} is {became} as {name}; the value is lost")
    negative = math.copysign(1.0, value) < 0 if isinstance(value, float) else value < 0
    if name in {"float16", "bfloat16"}:
        return _by_bits(math.copysign(float(rounded), -1.0 if negative else 1.0), name)
    # Python's repr is the shortest decimal of a double. A float32 needs fewer digits, nine at most.
    digits = repr(float(abs(rounded))) if name == "float64" else _shortest(abs(rounded), form)
    if digits.isdigit():
        digits += ".0"
    text = digits if name == "float64" else digits + "f"
    return f"(-{text})" if negative else text


def _shortest(value: Fraction, form: _FloatFormat) -> str:
    number = float(value)
    texts = (f"{number:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if form.round(Fraction(text)) == value)

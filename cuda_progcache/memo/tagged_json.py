# SPDX-License-Identifier: Apache-2.0
"""Conversion of values to JSON and back. Tagged objects stand for values of types that JSON doesn't have.

::

    {"$": "tuple", "v": [1, 2]}        also set, frozenset, complex, bytes, datetime, path, array, ...

A value is read back equal and with the same type, or it is refused when it is written. Reading never runs code that
the text chooses.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import fractions
import io
import json
import pathlib
import struct
import sys
import uuid
from collections.abc import Callable
from typing import Any

from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo.digest import Digest

#: Ints of more bits are written in hexadecimal, since Python limits decimal digits.
_LONG_INT = 64


class SaveError(ProgCacheError, ValueError):
    """A value can't be stored: no codec accepts it, or the storage failed. No computed result is lost."""


def encode_json(value: Any) -> bytes:
    """Return a value as tagged JSON; SaveError if the value is of another type."""
    if type(value) is int and -(1 << 53) < value < 1 << 53:
        return b"%d" % value
    try:
        return json.dumps(plain(value), separators=(",", ":"), allow_nan=False).encode("ascii")
    except RecursionError:
        raise SaveError(f"a {kind_of(value)} that contains itself, or is nested too deeply, can't be stored") from None


def decode_json(text: bytes) -> Any:
    """Return the value that tagged JSON stands for."""
    found = json.loads(text)
    return _value(found) if type(found) in {dict, list} else found


def kind_of(value: object) -> str:
    """Return the full name of a value's class, for messages."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _tagged(tag: str, content: Any) -> dict[str, Any]:
    return {"$": tag, "v": content}


def plain(value: Any) -> Any:
    """Return a value in a form that :mod:`json` can write."""
    kind = type(value)
    if kind in {str, int, bool, type(None), float}:
        return _scalar(value)
    if kind is list:
        return [plain(item) for item in value]
    if kind is dict:
        if "$" not in value and all(type(key) is str for key in value):
            return {_scalar_key(key): plain(item) for key, item in value.items()}
        return _tagged("dict", [[plain(key), plain(item)] for key, item in value.items()])
    writer = WRITERS.get(kind)
    if writer is not None:
        return _tagged(*writer(value))
    if isinstance(value, pathlib.PurePath):
        if isinstance(value, pathlib.Path):
            return _tagged("path", str(value))
        raise SaveError(f"a {kind_of(value)} can't be stored")
    if is_plain_array(value):
        return _tagged("npy", base64.b64encode(to_npy(value)).decode("ascii"))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and not value.dtype.hasobject:
        return _tagged("numpy", base64.b64encode(to_npy(numpy.asarray(value))).decode("ascii"))
    raise SaveError(f"the safe codec can't store a {kind_of(value)}; use codec='pickle' if only you can write there")


def _scalar_key(key: str) -> str:
    if not _is_unicode(key):
        raise SaveError("a dict key with lone surrogates can't be stored")
    return key


def _scalar(value: Any) -> Any:
    kind = type(value)
    if kind is int and value.bit_length() > _LONG_INT:
        return _tagged("int", hex(value))
    if kind is float and (value != value or value in {float("inf"), float("-inf")}):  # noqa: PLR0124 - NaN
        return _tagged("float", struct.pack(">d", value).hex())  # keeps all bits of a NaN
    if kind is str and not _is_unicode(value):
        return _tagged("str", value.encode("utf-8", "surrogatepass").hex())
    return value


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _many(tag: str) -> Callable[[Any], tuple[str, Any]]:
    return lambda value: (tag, [plain(item) for item in value])


def _text(tag: str, write: Callable[[Any], str] = str) -> Callable[[Any], tuple[str, Any]]:
    return lambda value: (tag, write(value))


def _aware(value: Any) -> str:
    if (value.tzinfo is not None and type(value.tzinfo) is not dt.timezone) or value.fold:
        raise SaveError("a time with a rule-based time zone, or with a fold, can't be stored")
    return str(value.isoformat())


#: By type, the function that returns an instance's tag and its content in a form that :mod:`json` can write.
WRITERS: dict[type, Callable[[Any], tuple[str, Any]]] = {
    tuple: _many("tuple"),
    set: lambda value: ("set", [plain(item) for item in sorted(value, key=repr)]),
    frozenset: lambda value: ("frozenset", [plain(item) for item in sorted(value, key=repr)]),
    bytes: lambda value: ("bytes", base64.b64encode(value).decode("ascii")),
    bytearray: lambda value: ("bytearray", base64.b64encode(value).decode("ascii")),
    complex: lambda value: ("complex", struct.pack(">dd", value.real, value.imag).hex()),
    range: lambda value: ("range", [value.start, value.stop, value.step]),
    Digest: _text("digest"),
    dt.date: _text("date", lambda value: value.isoformat()),
    dt.datetime: _text("datetime", _aware),
    dt.time: _text("time", _aware),
    dt.timedelta: lambda value: ("timedelta", [value.days, value.seconds, value.microseconds]),
    decimal.Decimal: _text("decimal"),
    fractions.Fraction: _text("fraction"),
    uuid.UUID: _text("uuid"),
}


def pairs(content: Any) -> dict[Any, Any]:
    """Return the dict whose items were written as a list of pairs."""
    return {_value(key): _value(item) for key, item in content}


def each(content: Any) -> list[Any]:
    """Return the values of a list."""
    return [_value(item) for item in content]


#: By tag, the function that rebuilds an instance from its content.
READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "dict": pairs,
    "tuple": lambda content: tuple(each(content)),
    "set": lambda content: set(each(content)),
    "frozenset": lambda content: frozenset(each(content)),
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "complex": lambda text: complex(*struct.unpack(">dd", bytes.fromhex(text))),
    "range": lambda parts: range(*parts),
    "digest": Digest,
    "date": dt.date.fromisoformat,
    "datetime": dt.datetime.fromisoformat,
    "time": dt.time.fromisoformat,
    "timedelta": lambda parts: dt.timedelta(*parts),
    "decimal": decimal.Decimal,
    "fraction": fractions.Fraction,
    "uuid": uuid.UUID,
    "path": pathlib.Path,
    "npy": lambda text: from_npy(base64.b64decode(text)),
    "numpy": lambda text: from_npy(base64.b64decode(text))[()],
}


def _value(found: Any) -> Any:
    if type(found) is list:
        return [_value(item) for item in found]
    if type(found) is not dict:
        return found
    if "$" in found:
        return READERS[found["$"]](found["v"])
    return {key: _value(item) for key, item in found.items()}


def is_plain_array(value: Any) -> bool:
    """Return whether a value is a NumPy array without objects."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and not value.dtype.hasobject


def to_npy(value: Any) -> bytes:
    """Return an array without objects in NumPy's ``.npy`` format."""
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    return buffer.getvalue()


def from_npy(data: bytes) -> Any:
    """Return the array in data of NumPy's ``.npy`` format."""
    import numpy as np

    return np.load(io.BytesIO(data), allow_pickle=False)

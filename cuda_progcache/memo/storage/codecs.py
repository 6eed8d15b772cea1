# SPDX-License-Identifier: Apache-2.0
"""Values as bytes and back.

Three codecs are safe: reading them runs nobody's code. ``bytes`` is the bytes themselves, ``npy`` NumPy's format of
an array without objects, ``json`` everything that JSON can say, with what it can't in tagged objects::

    {"$": "tuple", "v": [1, 2]}        also set, frozenset, complex, bytes, datetime, path, ...

Values come back equal and of the same type, or they aren't taken. ``pickle`` takes any value, and runs what it is told
on reading: only a storage that asked for it reads it, from a directory that nobody else can write or with a signature.
"""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import fractions
import hashlib
import hmac
import io
import json
import pathlib
import pickle
import struct
import sys
import uuid
from collections.abc import Callable
from typing import Any

from cuda_progcache.memo.digest import Digest
from cuda_progcache.memo.storage.base import SaveError
from cuda_progcache.memo.storage.destructuring import DigestedDict, DigestedIterable

#: Codecs whose reading runs nobody's code.
SAFE = frozenset({"bytes", "json", "npy"})
#: Bits from which an int is written in hexadecimal: Python limits decimal digits.
_LONG_INT = 64


def encode(value: Any, codec: str = "safe") -> tuple[str, bytes]:
    """A value as bytes.

    Parameters
    ----------
    codec : {"safe", "pickle"}
        What is allowed; with ``pickle``, values that a safe codec takes are still written by that.

    Returns
    -------
    (str, bytes)
        The codec's name and the bytes.

    Raises
    ------
    SaveError
        None takes it.
    """
    if type(value) is bytes:
        return "bytes", value
    if _is_plain_array(value):
        return "npy", _npy(value)
    try:
        return "json", encode_json(value)
    except SaveError:
        if codec != "pickle":
            raise
    try:
        return "pickle", pickle.dumps(value, protocol=5)
    except Exception as error:
        raise SaveError(f"can't pickle a {_kind(value)}: {error}") from error


def decode(codec: str, payload: bytes) -> Any:
    """The value of these bytes; ValueError or whatever the codec raises where they aren't what it wrote."""
    if codec == "bytes":
        return payload
    if codec == "json":
        return decode_json(payload)
    if codec == "npy":
        import numpy as np

        return np.load(io.BytesIO(payload), allow_pickle=False)
    if codec == "pickle":
        return pickle.loads(payload)  # noqa: S301 - the storage has seen to it that it may
    raise ValueError(f"unknown codec {codec!r}")


def sign(secret: bytes, key: str, codec: str, payload: bytes) -> str:
    """HMAC-SHA256 over key, codec and payload, hexadecimal: a signed payload can't be put under another key."""
    state = hmac.new(secret, f"{len(key)} {key} {len(codec)} {codec} ".encode(), hashlib.sha256)
    state.update(payload)
    return state.hexdigest()


def is_signed(secret: bytes, key: str, codec: str, payload: bytes, signature: object) -> bool:
    """Whether ``signature`` is that of key, codec and payload."""
    return isinstance(signature, str) and hmac.compare_digest(
        sign(secret, key, codec, payload).encode(), signature.encode("utf-8", "replace")
    )


# JSON with tags


def encode_json(value: Any) -> bytes:
    """A value as tagged JSON; SaveError where it is none of the types it has."""
    if type(value) is int and -(1 << 53) < value < 1 << 53:
        return b"%d" % value
    try:
        return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).encode("ascii")
    except RecursionError:
        raise SaveError(f"a {_kind(value)} that contains itself, or is nested too deeply, can't be stored") from None


def decode_json(text: bytes) -> Any:
    """The value of tagged JSON."""
    found = json.loads(text)
    return _value(found) if type(found) in {dict, list} else found


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _tagged(tag: str, content: Any) -> dict[str, Any]:
    return {"$": tag, "v": content}


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in {str, int, bool, type(None), float}:
        return _scalar(value)
    if kind is list:
        return [_plain(item) for item in value]
    if kind is dict:
        if "$" not in value and all(type(key) is str for key in value):
            return {_scalar_key(key): _plain(item) for key, item in value.items()}
        return _tagged("dict", [[_plain(key), _plain(item)] for key, item in value.items()])
    writer = _WRITERS.get(kind)
    if writer is not None:
        return _tagged(*writer(value))
    if isinstance(value, pathlib.PurePath):
        if isinstance(value, pathlib.Path):
            return _tagged("path", str(value))
        raise SaveError(f"a {_kind(value)} can't be stored")
    if _is_plain_array(value):
        return _tagged("npy", base64.b64encode(_npy(value)).decode("ascii"))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic) and not value.dtype.hasobject:
        return _tagged("numpy", base64.b64encode(_npy(numpy.asarray(value))).decode("ascii"))
    raise SaveError(f"no safe codec takes a {_kind(value)}; codec='pickle' would, where only you can write")


def _scalar_key(key: str) -> str:
    if not _is_unicode(key):
        raise SaveError("a dict key with lone surrogates can't be stored")
    return key


def _scalar(value: Any) -> Any:
    kind = type(value)
    if kind is int and value.bit_length() > _LONG_INT:
        return _tagged("int", hex(value))
    if kind is float and (value != value or value in {float("inf"), float("-inf")}):  # noqa: PLR0124 - NaN
        return _tagged("float", struct.pack(">d", value).hex())  # of a NaN all its bits
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
    return lambda value: (tag, [_plain(item) for item in value])


def _text(tag: str, write: Callable[[Any], str] = str) -> Callable[[Any], tuple[str, Any]]:
    return lambda value: (tag, write(value))


def _aware(value: Any) -> str:
    if (value.tzinfo is not None and type(value.tzinfo) is not dt.timezone) or value.fold:
        raise SaveError("a time with a zone of rules, or with a fold, can't be stored")
    return str(value.isoformat())


_WRITERS: dict[type, Callable[[Any], tuple[str, Any]]] = {
    tuple: _many("tuple"),
    set: lambda value: ("set", [_plain(item) for item in sorted(value, key=repr)]),
    frozenset: lambda value: ("frozenset", [_plain(item) for item in sorted(value, key=repr)]),
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
    DigestedIterable: lambda value: ("taken " + type(value.items).__name__, [_plain(item) for item in value.items]),
    DigestedDict: lambda value: ("taken dict", [[_plain(k), _plain(v)] for k, v in value.items.items()]),
}


def _pairs(content: Any) -> dict[Any, Any]:
    return {_value(key): _value(item) for key, item in content}


def _each(content: Any) -> list[Any]:
    return [_value(item) for item in content]


_READERS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "str": lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    "dict": _pairs,
    "tuple": lambda content: tuple(_each(content)),
    "set": lambda content: set(_each(content)),
    "frozenset": lambda content: frozenset(_each(content)),
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
    "npy": lambda text: decode("npy", base64.b64decode(text)),
    "numpy": lambda text: decode("npy", base64.b64decode(text))[()],
    "taken list": lambda content: DigestedIterable(_each(content)),
    "taken tuple": lambda content: DigestedIterable(tuple(_each(content))),
    "taken dict": lambda content: DigestedDict(_pairs(content)),
}


def _value(found: Any) -> Any:
    if type(found) is list:
        return [_value(item) for item in found]
    if type(found) is not dict:
        return found
    if "$" in found:
        return _READERS[found["$"]](found["v"])
    return {key: _value(item) for key, item in found.items()}


def _is_plain_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and type(value) is numpy.ndarray and not value.dtype.hasobject


def _npy(value: Any) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, value, allow_pickle=False)
    return buffer.getvalue()

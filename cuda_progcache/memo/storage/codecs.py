# SPDX-License-Identifier: Apache-2.0
"""Values as bytes and back.

Three codecs are safe: reading them runs nobody's code. ``bytes`` is the bytes themselves, ``npy`` NumPy's format of
an array without objects, ``json`` what :mod:`~cuda_progcache.memo.tagged_json` takes. ``pickle`` takes any value, and
runs what it is told on reading: only a storage that asked for it reads it, from a directory that nobody else can write
or with a signature.
"""

from __future__ import annotations

import hashlib
import hmac
import pickle
from typing import Any

from cuda_progcache.memo.storage.destructuring import DigestedDict, DigestedIterable
from cuda_progcache.memo.tagged_json import (
    READERS,
    WRITERS,
    SaveError,
    decode_json,
    each,
    encode_json,
    from_npy,
    is_plain_array,
    kind_of,
    pairs,
    plain,
    to_npy,
)

#: Codecs whose reading runs nobody's code.
SAFE = frozenset({"bytes", "json", "npy"})

# Containers that were taken apart.
WRITERS[DigestedIterable] = lambda value: (f"taken {type(value.items).__name__}", plain(list(value.items)))
WRITERS[DigestedDict] = lambda value: ("taken dict", plain([list(pair) for pair in value.items.items()]))
READERS["taken list"] = lambda content: DigestedIterable(each(content))
READERS["taken tuple"] = lambda content: DigestedIterable(tuple(each(content)))
READERS["taken dict"] = lambda content: DigestedDict(pairs(content))


def encode(value: Any, codec: str = "safe") -> tuple[str, bytes]:
    """A value as a codec's name and bytes; with ``codec="pickle"`` also what no safe codec takes. Else SaveError."""
    if type(value) is bytes:
        return "bytes", value
    if is_plain_array(value):
        return "npy", to_npy(value)
    try:
        return "json", encode_json(value)
    except SaveError:
        if codec != "pickle":
            raise
    try:
        return "pickle", pickle.dumps(value, protocol=5)
    except Exception as error:
        raise SaveError(f"can't pickle a {kind_of(value)}: {error}") from error


def decode(codec: str, payload: bytes) -> Any:
    """The value of these bytes; ValueError or whatever the codec raises where they aren't what it wrote."""
    if codec == "bytes":
        return payload
    if codec == "json":
        return decode_json(payload)
    if codec == "npy":
        return from_npy(payload)
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

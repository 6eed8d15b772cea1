# SPDX-License-Identifier: Apache-2.0
"""Codecs: conversion of values to bytes and back.

Three codecs are safe, since decoding never runs code from the data. ``bytes`` is the bytes themselves, ``npy`` is
NumPy's format for an array without objects, and ``json`` is :mod:`~cuda_progcache.memo.tagged_json`. ``pickle`` takes
any picklable value, but decoding may run code from the data. Only a storage that asked for it decodes it, and only if
the data is signed or nobody else can write to the directory.
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

#: Codecs whose decoding never runs code from the data.
SAFE = frozenset({"bytes", "json", "npy"})

# Tagged JSON for containers that were taken apart.
WRITERS[DigestedIterable] = lambda value: (f"taken {type(value.items).__name__}", plain(list(value.items)))
WRITERS[DigestedDict] = lambda value: ("taken dict", plain([list(pair) for pair in value.items.items()]))
READERS["taken list"] = lambda content: DigestedIterable(each(content))
READERS["taken tuple"] = lambda content: DigestedIterable(tuple(each(content)))
READERS["taken dict"] = lambda content: DigestedDict(pairs(content))


def encode(value: Any, codec: str = "safe") -> tuple[str, bytes]:
    """Return a codec's name and the encoded value; SaveError if no safe codec, or with "pickle" no codec, takes it."""
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
    """Return the value that bytes encode; ValueError or whatever the codec raises if the codec didn't write them."""
    if codec == "bytes":
        return payload
    if codec == "json":
        return decode_json(payload)
    if codec == "npy":
        return from_npy(payload)
    if codec == "pickle":
        return pickle.loads(payload)  # noqa: S301 - the storage has checked that the data is trusted
    raise ValueError(f"unknown codec {codec!r}")


def sign(secret: bytes, key: str, codec: str, payload: bytes) -> str:
    """Return the HMAC-SHA256 of key, codec and payload in hexadecimal; a payload can't be moved to another key."""
    state = hmac.new(secret, f"{len(key)} {key} {len(codec)} {codec} ".encode(), hashlib.sha256)
    state.update(payload)
    return state.hexdigest()


def is_signed(secret: bytes, key: str, codec: str, payload: bytes, signature: object) -> bool:
    """Return whether ``signature`` is the signature of key, codec and payload."""
    return isinstance(signature, str) and hmac.compare_digest(
        sign(secret, key, codec, payload).encode(), signature.encode("utf-8", "replace")
    )

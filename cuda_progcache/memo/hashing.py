# SPDX-License-Identifier: Apache-2.0
"""The type of a digest, the hash that it is made by, and the error of a value that has none."""

from __future__ import annotations

import hashlib

from cuda_progcache.errors import ProgCacheError

#: Characters of a full digest.
DIGEST_LENGTH = 64


class Indigestible(ProgCacheError, TypeError):  # noqa: N818 - an established name
    """A value has no content that could be hashed; the message says which, and where to teach it."""

    def __init__(self, value: object, why: str = "") -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        super().__init__(why or f"can't digest a {name}: give it a __digest__ method, or register(...) one")
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (None, str(self)))  # the value itself may be what can't be pickled


class Digest(str):
    """A digest, 64 hex digits, or the first ones of it: tells a key from a value that is a string."""

    __slots__ = ()


def hash_tagged(tag: bytes, payload: bytes) -> bytes:
    """SHA-256 over the name of a kind and its content, as 64 hex digits in ASCII."""
    state = hashlib.sha256()
    state.update(tag + payload)
    return state.hexdigest().encode("ascii")

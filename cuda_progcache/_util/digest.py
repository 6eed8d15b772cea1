# SPDX-License-Identifier: Apache-2.0
"""SHA-256 for code that runs before anything else has been imported, and what a digest looks like as a text."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable

#: Bytes from which OpenSSL's, six times as fast, is worth its import.
_LARGE = 1 << 18
_fast: Callable[..., hashlib._Hash] | None = None
_plain: Callable[..., hashlib._Hash] | None = None


def sha256(data: bytes = b"") -> hashlib._Hash:
    """As `hashlib.sha256`: that one if it is loaded, or there is much to digest, else the interpreter's own.

    Importing hashlib loads OpenSSL: 3 ms, for a digest that then takes some microseconds less.
    """
    global _fast  # noqa: PLW0603  (a module that is loaded stays)
    if _fast is None:
        _fast = getattr(sys.modules.get("hashlib"), "sha256", None)  # None, too, while another thread imports it
        if _fast is None and len(data) <= _LARGE:
            return (_plain or _interpreters())(data)
        if _fast is None:
            import hashlib

            _fast = hashlib.sha256
    return _fast(data, usedforsecurity=False)


def _interpreters() -> Callable[..., hashlib._Hash]:
    global _plain  # noqa: PLW0603  (as above)
    try:
        from _sha2 import sha256  # type: ignore[import-not-found, unused-ignore]
    except ImportError:  # Python 3.11, or an interpreter built without
        try:
            from _sha256 import sha256  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            from hashlib import sha256
    _plain = sha256
    return _plain


def is_hex(text: str) -> bool:
    """Whether it has nothing but lower-case hex digits."""
    return not text.strip("0123456789abcdef")


def is_digest(text: str) -> bool:
    """Whether it is a SHA-256 as programs, headers and their entries are named by it: 64 lower-case hex digits."""
    return len(text) == 64 and is_hex(text)


def is_digest_prefix(text: str) -> bool:
    """Whether it may be given for a digest that starts with it: 4 to 64 lower-case hex digits."""
    return 4 <= len(text) <= 64 and is_hex(text)

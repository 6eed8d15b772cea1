# SPDX-License-Identifier: Apache-2.0
"""SHA-256 without importing hashlib, and tests for the textual form of digests."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable

#: The size in bytes above which importing OpenSSL's implementation, six times as fast, pays off.
_LARGE = 1 << 18
_fast: Callable[..., hashlib._Hash] | None = None
_plain: Callable[..., hashlib._Hash] | None = None


def sha256(data: bytes = b"") -> hashlib._Hash:
    """Return a SHA-256 hash object: `hashlib`'s if it is loaded or the data is large, otherwise the interpreter's own.

    Importing hashlib loads OpenSSL, which takes 3 ms and saves some microseconds per digest.
    """
    global _fast  # noqa: PLW0603  (a loaded module stays loaded)
    if _fast is None:
        _fast = getattr(sys.modules.get("hashlib"), "sha256", None)  # also None while another thread imports it
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
    except ImportError:  # Python 3.11, or an interpreter built without the module
        try:
            from _sha256 import sha256  # type: ignore[import-not-found, unused-ignore]
        except ImportError:
            from hashlib import sha256
    _plain = sha256
    return _plain


def is_hex(text: str) -> bool:
    """Return whether a text consists of lower-case hex digits only."""
    return not text.strip("0123456789abcdef")


def is_digest(text: str) -> bool:
    """Return whether a text is a SHA-256 digest of a program, header or entry: 64 lower-case hex digits."""
    return len(text) == 64 and is_hex(text)


def is_digest_prefix(text: str) -> bool:
    """Return whether a text may abbreviate a digest: 4 to 64 lower-case hex digits."""
    return 4 <= len(text) <= 64 and is_hex(text)

# SPDX-License-Identifier: Apache-2.0
"""SHA-256 for code that runs before anything else has been imported."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import hashlib

try:
    from _sha2 import sha256 as _plain  # type: ignore[import-not-found, unused-ignore]
except ImportError:  # Python 3.11, or an interpreter built without
    try:
        from _sha256 import sha256 as _plain  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        from hashlib import sha256 as _plain


def sha256(data: bytes = b"") -> hashlib._Hash:
    """As `hashlib.sha256`: that one if it is loaded, else the interpreter's own.

    Importing hashlib loads OpenSSL: 3 ms, for a digest that then takes some microseconds less.
    """
    loaded = sys.modules.get("hashlib")
    made: hashlib._Hash = _plain(data) if loaded is None else loaded.sha256(data)
    return made

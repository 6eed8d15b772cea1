# SPDX-License-Identifier: Apache-2.0
"""The digest of a value: SHA-256 over what the value is, the same in every process, interpreter run and hash seed.

>>> from cuda_progcache.memo.digest import digest
>>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}), digest(1) == digest(1.0)
(True, False)

See :mod:`~cuda_progcache.memo.values` for how data is hashed, and :mod:`~cuda_progcache.memo.code` for functions.
"""

from __future__ import annotations

from cuda_progcache.memo import code
from cuda_progcache.memo.values import DIGEST_LENGTH, Digest, Indigestible, child_bytes, digest, register

__all__ = ["DIGEST_LENGTH", "Digest", "Indigestible", "child_bytes", "code", "digest", "register"]

# SPDX-License-Identifier: Apache-2.0
"""The architectures that the tests compile kernels for."""

from __future__ import annotations

import os

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


def two_of(number: int) -> tuple[str, ...]:
    """Return every second architecture; `number` picks which. With ``PROGCACHE_EXAMPLES`` set (the long run), all."""
    return ARCHS if "PROGCACHE_EXAMPLES" in os.environ else ARCHS[number % 2 :: 2]


def one_of(number: int) -> tuple[str, ...]:
    """Return one architecture, picked by `number`; in the long run, all of them."""
    return ARCHS if "PROGCACHE_EXAMPLES" in os.environ else (ARCHS[number % len(ARCHS)],)

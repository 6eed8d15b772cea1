# SPDX-License-Identifier: Apache-2.0
"""The architectures that the kernels are compiled for in tests."""

from __future__ import annotations

import os

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")


def two_of(number: int) -> tuple[str, ...]:
    """Two of them, by turns; all where ``PROGCACHE_EXAMPLES`` asks for the long run."""
    return ARCHS if "PROGCACHE_EXAMPLES" in os.environ else ARCHS[number % 2 :: 2]


def one_of(number: int) -> tuple[str, ...]:
    """One of them, by turns; all in the long run."""
    return ARCHS if "PROGCACHE_EXAMPLES" in os.environ else (ARCHS[number % len(ARCHS)],)

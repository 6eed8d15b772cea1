# SPDX-License-Identifier: Apache-2.0
"""What a tier has cost and given in this process."""

from __future__ import annotations

from typing import NamedTuple


class TierStats(NamedTuple):
    """What a tier has cost and given in this process.

    Attributes
    ----------
    name : str
        Its URL without secrets.
    state : {"closed", "open", "half-open"}
        Of its circuit breaker: in use; out of use for a while; about to be tried again.
    hits, misses : int
        Look-ups of programs; those that it was spared are misses.
    corrupt, untrusted : int
        Objects that weren't what was asked for, and those that nobody who is trusted has signed.
    errors, timeouts : int
        Calls that failed, and those of them that ran out of time.
    skipped : int
        Calls that it was spared while it was out of use.
    stored, dropped, waiting : int
        Objects written, given up, and on their way.
    bytes_in, bytes_out : int
        Of objects.
    calls : int
        Calls that it answered.
    seconds : float
        That these took in all.
    error : str
        The latest, without secrets; empty where there was none.
    """

    name: str
    state: str
    hits: int
    misses: int
    corrupt: int
    untrusted: int
    errors: int
    timeouts: int
    skipped: int
    stored: int
    dropped: int
    waiting: int
    bytes_in: int
    bytes_out: int
    calls: int
    seconds: float
    error: str

# SPDX-License-Identifier: Apache-2.0
"""The policy for misses: how they are compiled."""

from __future__ import annotations

from cuda_progcache._util.fields import dataclass

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.compile.precompiled import PrecompiledHeaders


@dataclass(frozen=True)
class MissPolicy:
    """How misses are compiled.

    Attributes
    ----------
    precompiled : PrecompiledHeaders or None
        The precompiled headers of the current process's batch.
    keep_failures : float
        Seconds for which a failed compile is kept; 0: not at all.
    """

    precompiled: PrecompiledHeaders | None = None
    keep_failures: float = 0.0


PLAIN = MissPolicy()

# SPDX-License-Identifier: Apache-2.0
"""Random numbers of this package's own.

Those of :mod:`random` are the program's, which may have seeded them: it gets the same ones whether its kernels are
compiled or in the cache, and whatever threads of ours do meanwhile.
"""

from __future__ import annotations

from random import Random

from cuda_progcache._util import forks

#: Seeded by the system, and anew in a forked child. For what is no secret.
chance = Random()  # noqa: S311

forks.in_child(chance.seed)

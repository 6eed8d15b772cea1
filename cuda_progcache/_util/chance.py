# SPDX-License-Identifier: Apache-2.0
"""A random number generator for this package alone.

The global generator of :mod:`random` belongs to the application, which may have seeded it. It must yield the same
numbers whether kernels are compiled or cached, and whatever this package's threads do.
"""

from __future__ import annotations

from random import Random

from cuda_progcache._util import forks

#: Seeded by the operating system, and reseeded in a forked child. Not for secrets.
chance = Random()  # noqa: S311

forks.in_child(chance.seed)

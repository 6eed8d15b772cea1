# SPDX-License-Identifier: Apache-2.0
"""The two generators of ``ci/memo_keys``, bounded: no wrong hit, no collision, needless misses for known causes."""

from __future__ import annotations

import random
import time

import pytest

pytest.importorskip("pandas")

from ci.memo_keys import pairs, programs


def test_programs_that_are_edited(tmp_path):
    """Some taken by chance, and one with each feature, whose value is edited."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    account = programs.run(tmp_path, 20, seed, every=True)
    assert account.wrong == []
    # All of a module counts where code asks it for a name that can't be seen, or imports it when it runs.
    known = ("function nobody calls", "annotation")
    assert [cause for cause in account.needless if not any(edit in cause for edit in known)] == []
    assert account.programs == 20 + len(programs.FEATURES) and account.calls > 5 * account.programs


def test_pairs_of_values_that_differ():
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    differed, collisions, needless = pairs.differing(random.Random(seed), 25 * len(pairs.MAKERS))
    assert (collisions, needless) == ([], [])
    assert differed > 300

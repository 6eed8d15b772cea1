# SPDX-License-Identifier: Apache-2.0
"""Short runs of ``ci/memo_keys``: no wrong hits, no collisions, and needless misses only for known causes."""

from __future__ import annotations

import random
import time

import pytest

pytest.importorskip("pandas")

from ci.memo_keys import pairs, programs


def test_programs_that_are_edited(tmp_path):
    """Edits to random programs, and to one program for each feature, give no wrong hit."""
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    account = programs.run(tmp_path, 20, seed, every=True)
    assert account.wrong == []
    # A whole module counts if code looks up a name in it that can't be determined, or imports it at run time.
    known = ("function nobody calls", "annotation")
    assert [cause for cause in account.needless if not any(edit in cause for edit in known)] == []
    assert account.programs == 20 + len(programs.FEATURES) and account.calls > 5 * account.programs


def test_pairs_of_values_that_differ():
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    differed, collisions, needless = pairs.differing(random.Random(seed), 25 * len(pairs.MAKERS))
    assert (collisions, needless) == ([], [])
    assert differed > 300

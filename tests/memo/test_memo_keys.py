# SPDX-License-Identifier: Apache-2.0
"""The two generators of ``ci/memo_keys``, bounded: no wrong hit, no collision, needless misses for known causes."""

from __future__ import annotations

import random
import time

import pytest

pytest.importorskip("pandas")

from ci.memo_keys import pairs, programs


def test_programs_that_are_edited(tmp_path):
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    account = programs.run(tmp_path, 40, seed)
    assert account.wrong == []
    # All of a module counts where code asks it for a name that can't be seen, or imports it when it runs.
    known = ("function nobody calls", "annotation")
    assert [cause for cause in account.needless if not any(edit in cause for edit in known)] == []
    assert account.calls > 200


def test_every_feature_is_seen_when_its_value_is_edited(tmp_path, monkeypatch):
    made = iter(sorted(programs.FEATURES))
    monkeypatch.setattr(programs.random.Random, "sample", lambda self, names, count: [next(made)])
    monkeypatch.setattr(programs.random.Random, "choice", lambda self, options: "value" if "value" in options else 1)
    account = programs.run(tmp_path, len(programs.FEATURES), 0)
    assert account.wrong == [] and not account.needless


def test_pairs_of_values_that_differ():
    seed = time.time_ns() % 1_000_000
    print(f"seed {seed}")
    differed, collisions, needless = pairs.differing(random.Random(seed), 40 * len(pairs.MAKERS))
    assert (collisions, needless) == ([], [])
    assert differed > 500

# SPDX-License-Identifier: Apache-2.0
"""What is compiled next, by whom and how."""

from __future__ import annotations

import pytest

from cuda_progcache.service.plan import Load, Plan, Step


def plan(*loads):
    """A plan of numbered jobs; a load is a prefix (heavy), True (heavy, without one) or False (light)."""

    def load_of(number):
        load = loads[number]
        return Load(heavy=True, prefix=load) if isinstance(load, str) else Load(heavy=load)

    return Plan(range(len(loads)), load_of)


def drain(made, workers):
    """Have workers take in turns; returns their steps."""
    held, steps = [None] * workers, [[] for _ in range(workers)]
    busy = True
    while busy:
        busy = False
        for n in range(workers):
            step = made.take(held[n])
            if step is not None:
                busy = True
                held[n] = step.prefix or held[n]
                steps[n].append(step)
    return steps


@pytest.mark.parametrize(
    ("loads", "workers", "processes"),
    [
        ([False] * 9, 2, False),
        ([False, True], 2, False),
        ([True, True], 2, True),
        ([True, True], 1, False),
        (["a", "a"], 2, True),
        (["a", "a"], 1, False),
        (["a", "a", "a"], 1, True),
    ],
)
def test_processes_are_for_heavy_front_ends(loads, workers, processes):
    assert plan(*loads).wants_processes(workers) is processes


def test_light_compiles_with_a_prefix_are_not_grouped():
    made = Plan([1, 2, 3], lambda _: Load(heavy=False, prefix="a"))
    assert not made.precompiles
    assert drain(made, 1) == [[Step(n, precompile=False, prefix=None) for n in (1, 2, 3)]]


def test_the_heavy_come_first():
    (steps,) = drain(plan(False, True, "a", "a", "a"), 1)
    assert [s.job for s in steps] == [2, 3, 4, 1, 0]
    assert [s.precompile for s in steps] == [True, True, True, False, False]


def test_two_are_too_few_to_precompile_for():
    (steps,) = drain(plan("a", "a"), 1)
    assert [s.precompile for s in steps] == [False, False]


def test_workers_keep_to_what_they_have_precompiled():
    left, right = drain(plan(*"abababab"), 2)
    assert {s.prefix for s in left} == {"a"}
    assert {s.prefix for s in right} == {"b"}
    assert all(s.precompile for s in left + right)


def test_one_worker_does_one_group_after_the_other():
    (steps,) = drain(plan(*"aaaaabbbbbbbbb"), 1)
    assert [s.prefix for s in steps] == ["b"] * 9 + ["a"] * 5


def test_a_large_group_is_shared():
    left, right = drain(plan(*("a" * 12)), 2)
    assert len(left) == len(right) == 6
    assert all(s.precompile for s in left + right)


def test_who_comes_late_to_a_small_group_precompiles_nothing():
    left, right = drain(plan(*("a" * 4)), 2)
    assert [s.precompile for s in left] == [True, True]
    assert [s.precompile for s in right] == [False, False]


def test_every_job_is_handed_out_once():
    loads = ["a"] * 7 + ["b"] * 3 + ["c"] + [True, False] * 4
    for workers in (1, 2, 3, 8):
        taken = [s.job for steps in drain(plan(*loads), workers) for s in steps]
        assert sorted(taken) == list(range(len(loads)))


def test_cancelled():
    made = plan("a", "a", "a", True, False)
    made.take()
    made.cancel()
    assert made.take("a") is None
    assert made.take() is None

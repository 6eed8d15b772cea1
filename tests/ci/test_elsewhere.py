# SPDX-License-Identifier: Apache-2.0
"""What was compiled here serves there: another directory, environment, user and Python, in every way of carrying."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from ci.elsewhere.account import Visit, prove
from ci.elsewhere.programs import BOUNDED, PROGRAMS

# What NVRTC writes the place into, so that nobody elsewhere can have the same.
OF_ITS_PLACE = {
    *("plain to LTO-IR", "header to LTO-IR", "line table", "header, line table", "debug"),
    *("assert in the source", "header with assert", "header that folds its path"),
}
SEE_THE_HEADER = {
    *("header by absolute path", "header by relative path", "headers in headers", "pre-included by absolute path"),
    *("header to PTX", "header to LTO-IR", "header, line table", "warning in a header's user"),
}


@pytest.fixture(scope="module")
def account():
    with tempfile.TemporaryDirectory(prefix="elsewhere-") as folder:  # pytest's own is closed to other users
        os.chmod(folder, 0o711)
        return prove(Path(folder), BOUNDED, every_way=False)


def verdicts(visit: Visit) -> dict[str, str]:
    return {judged.name: judged.verdict for judged in visit.judged}


def test_no_hit_is_wrong_and_no_miss_needless(account):
    assert account.good, [
        (visit.where, visit.faults, [judged for judged in visit.judged if judged.verdict != "hit"])
        for visit in account.visits
    ]


def test_everything_hits_where_it_was_compiled(account):
    assert set(verdicts(account.visits[0]).values()) == {"hit"}


def test_everything_hits_elsewhere_but_what_names_its_place(account):
    """In the second place; and what hits there hits on every Python and however the cache was carried there."""
    second = verdicts(account.visits[1])
    assert {name for name, verdict in second.items() if verdict != "hit"} == OF_ITS_PLACE
    assert Counter(second.values()) == {"hit": len(BOUNDED) - len(OF_ITS_PLACE), "other output": len(OF_ITS_PLACE)}
    for visit in account.visits[2:-1]:
        assert set(verdicts(visit)) == set(second) - OF_ITS_PLACE
        assert set(verdicts(visit).values()) == {"hit"}, visit.where


def test_a_miss_says_which_path_it_is(account):
    told = {judged.name: judged.why for judged in account.visits[1].judged if judged.verdict != "hit"}
    assert "working directory differs" in told["line table"]
    assert "path in the program's name differs" in told["assert in the source"]


def test_an_edited_header_misses_for_those_who_saw_it(account):
    after = verdicts(account.visits[-1])
    assert {name for name, verdict in after.items() if verdict != "hit"} == OF_ITS_PLACE | SEE_THE_HEADER
    told = {judged.name: judged.why for judged in account.visits[-1].judged}
    assert "tile.h changed" in told["pre-included by absolute path"]


def test_a_deploy_ends_in_a_frozen_run_without_a_compiler(account):
    done = account.deploy
    assert done.recorded["hits"] == [False, False, False]
    assert done.lock == done.again, "the same programs, recorded as another user elsewhere"
    assert (done.prewarmed["compiled"], done.prewarmed["failed"]) == (3, 0)
    assert done.proved["counts"]["hit"] == 3
    assert done.proved["ok"]
    assert done.compilers == []
    assert done.frozen == {**done.recorded, "hits": [True, True, True], "compilers": []}


def test_after_an_edit_the_proof_and_the_frozen_run_say_the_same(account):
    done = account.deploy
    wrong = [program for program in done.stale["programs"] if program["status"] != "hit"]
    assert [(program["kernel"], program["status"]) for program in wrong] == [("fill.cu", "stale")]
    assert wrong[0]["reasons"] == ["header size.h changed (1 of 1 headers differ)"]
    assert done.edited["refused"] == [wrong[0]["reasons"]]
    assert done.edited["hits"] == [True, True]


def test_the_long_run_has_forty_programs_and_more():
    assert len(PROGRAMS) > 40
    assert len({program.name for program in PROGRAMS}) == len(PROGRAMS)

# SPDX-License-Identifier: Apache-2.0
"""The plan of a farm on paper is what the guide says, and adds up."""

from __future__ import annotations

from pathlib import Path

import pytest

from ci import farm_plan

GUIDE = Path(__file__).parents[2] / "ci" / "docs" / "guides" / "farm.md"


def test_the_guide_has_the_table():
    assert farm_plan.table() in GUIDE.read_text(encoding="utf-8")


@pytest.mark.parametrize("lost", [0, 3])
def test_no_plan_is_better_than_its_work_allows(lost):
    few = farm_plan.Programs(variants=200, archs=2)
    made = farm_plan.plan(few, 10, 4, lost=lost)
    assert made.seconds >= made.hours * 3600 / made.workers
    assert 0 <= made.idle < 1
    assert len(farm_plan.jobs(few)) == 400

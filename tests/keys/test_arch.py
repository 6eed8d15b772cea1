# SPDX-License-Identifier: Apache-2.0
"""Architectures: how they are written, and which device runs what."""

from __future__ import annotations

import itertools

import pytest

from cuda_progcache.errors import ArchError
from cuda_progcache.keys.arch import Arch


@pytest.mark.parametrize(
    "text",
    [f"{k}_{n}{f}" for k, n, f in itertools.product(("sm", "compute", "lto"), (50, 90, 103, 120), ("", "a", "f"))],
)
def test_what_is_read_is_written(text):
    assert str(Arch.parse(text)) == text
    assert str(Arch.parse(f" {text}\n")) == text


@pytest.mark.parametrize(
    "text",
    ["", "sm", "sm_", "sm_a", "sm90", "90", "sm_90b", "sm_9x", "sm_9_0", "sm_٩٠", "SM_90", "gfx90a", "sm_-90", 90],
)
def test_what_is_none_is_refused(text):
    with pytest.raises(ArchError, match="is not an architecture"):
        Arch.parse(text)


def test_parts():
    arch = Arch.parse("compute_103f")
    assert (arch.kind, arch.capability, arch.major, arch.feature) == ("compute", 103, 10, "f")

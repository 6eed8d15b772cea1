# SPDX-License-Identifier: Apache-2.0
"""Programs compiled by NVRTC 12.9, with CCCL of its age; ``python -m ci.matrix`` tries the other releases."""

from __future__ import annotations

import pytest

from ci import matrix


def test_what_is_compiled_here_serves_there(oldest_release):
    """The newest release is what all the other tests run on."""
    rows = matrix.check(oldest_release, [name for name, case in matrix.CASES.items() if case.quick], thorough=False)
    assert len(rows) >= 10
    assert {row.name: row.trouble for row in rows if row.trouble} == {}


MADE = {"hit": False, "reason": None, "digest": "a", "exactly": "a", "why": ["the reason"]}


@pytest.mark.parametrize(
    ("place", "made", "served", "edited", "trouble"),
    [
        (False, {}, {"hit": True}, {"digest": "b"}, None),
        (True, {}, {"digest": "b", "exactly": "b", "fresh": "b"}, {"digest": "c"}, None),
        (True, {}, {"hit": True, "fresh": "a"}, None, None),
        (False, {"refused": "no"}, {"hit": True}, None, "here: refused: no"),
        (False, {"reason": "why"}, {"hit": True}, None, "here: isn't kept: why"),
        (False, {}, {}, None, "there: a miss: the reason"),
        (False, {}, {"hit": True, "digest": "b"}, None, "there: a hit with another output"),
        (False, {}, {"hit": True, "fresh": "b"}, None, "there: not what a fresh compile gives"),
        (True, {}, {"fresh": "a"}, None, "there: a miss, though the output is the same"),
        (False, {}, {"hit": True}, {"hit": True}, "edited: what was made before the edit"),
        (False, {}, {"hit": True}, {"digest": "b", "reason": "why"}, "edited: isn't kept: why"),
    ],
)
def test_trouble_is_seen(place, made, served, edited, trouble):
    edited = None if edited is None else MADE | edited
    assert matrix._trouble(place, MADE | made, MADE | served, edited) == trouble


@pytest.mark.parametrize(
    ("wheel", "error"), [("jinja2-3.1", matrix.UnavailableError), ("nvidia_nvjitlink-13.0.1", RuntimeError)]
)
def test_without_a_registry_it_says_so(tmp_path, monkeypatch, wheel, error):
    """One that has others of NVIDIA's is there: then the table of releases is wrong, and nothing is skipped."""
    monkeypatch.setattr(matrix, "RELEASES", {"13.0": matrix.RELEASES["13.0"][:2]})
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (tmp_path / f"{wheel}-py3-none-any.whl").touch()
    with pytest.raises(error, match="pip can't install nvidia-cuda-nvrtc") as raised:
        matrix.environment("13.0")
    assert raised.type is error
    assert not (tmp_path / ".venv-nvrtc-13.0" / "progcache-matrix.json").exists()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("ERROR: No matching distribution found for nvidia-cuda-nvrtc==13.0.* (from versions: 1.0)", False),
        ("ERROR: HTTP error 503 while getting nvidia-cuda-nvrtc", True),
        ("WARNING: Retrying after connection broken by 'HTTPSConnectionPool(...)' (from versions: none)", True),
    ],
)
def test_only_what_no_registry_answers_is_out_of_reach(said, reason):
    assert matrix._is_out_of_reach(said) is reason

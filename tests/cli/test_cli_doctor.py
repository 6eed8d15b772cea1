# SPDX-License-Identifier: Apache-2.0
"""``doctor`` finds what is wrong and says what to do; ``config`` knows every variable that is read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cuda_progcache
from cuda_progcache import FileStreamProgramCache
from cuda_progcache.service.settings import SETTINGS

PACKAGE = Path(cuda_progcache.__file__).parent


def found(listed, name):
    (one,) = [one for one in listed["findings"] if one["name"] == name]
    return one


def test_all_is_well(cli, cli_json, root):
    listed = cli_json("doctor")
    assert listed["ok"] and not any(one["problem"] for one in listed["findings"])
    assert re.match(r"\d+\.\d+\.\d+  /.*libnvrtc.*\(build [0-9a-f]+\)", found(listed, "nvrtc")["value"])
    assert "sm_90" in found(listed, "architectures")["value"]
    assert found(listed, "directory")["value"] == f"{root}, doesn't exist yet"
    assert found(listed, "mode")["value"] == "rw"
    assert not root.exists()  # looking makes nothing
    with FileStreamProgramCache() as cache:
        cache["k"] = b"12345"
    text = cli("doctor").stdout
    assert text.endswith("no problems\n")
    assert f"{root}: 1 entry, 5 B" in text


@pytest.mark.parametrize(
    ("variable", "value", "name", "problem", "advice"),
    [
        ("CUDA_PROGCACHE_NVRTC", "{here}", "nvrtc", "can't load", "reinstall nvidia-cuda-nvrtc"),
        ("CUDA_PROGCACHE_NVRTC", "{here}.none", "nvrtc", "none", "pip install nvidia-cuda-nvrtc"),
        ("CUDA_PROGCACHE", "readonly", "mode", "isn't a mode of the cache", "rw, ro, off, frozen"),
        ("CUDA_PROGCACHE_MAX_SIZE", "1y", "size cap", "isn't a size", "5GB"),
        ("CUDA_PROGCACHE_LOG", "yes", "CUDA_PROGCACHE_LOG", "nothing is printed", "explain or all"),
        ("CUDA_PROGCACHE_MODE", "ro", "CUDA_PROGCACHE_MODE", "nothing reads", "did you mean"),
        ("CUDA_PROGCACHE_DIR", "{here}", "directory", "", "CUDA_PROGCACHE_DIR"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(
    cli, cli_json, monkeypatch, tmp_path, variable, value, name, problem, advice
):
    here = tmp_path / "a file"
    here.write_text("of something else")
    monkeypatch.setenv(variable, value.format(here=here))
    listed = cli_json("doctor", code=1)
    assert not listed["ok"]
    one = found(listed, name)
    assert one["problem"] and problem in one["problem"]
    assert advice in one["advice"]
    text = cli("doctor", code=1).stdout
    assert re.search(rf"^! {name}", text, re.MULTILINE) and re.search(r"\n\d problems?\n$", text)


def test_what_is_not_needed_is_no_problem(cli_json, monkeypatch, tmp_path):
    for name in ("NVJITLINK", "NVVM"):
        monkeypatch.setenv(f"CUDA_PROGCACHE_{name}", str(tmp_path / "none"))
    listed = cli_json("doctor")
    assert listed["ok"]
    for name in ("nvJitLink", "nvvm"):
        assert "not installed" in found(listed, name)["value"]
        assert "pip install" in found(listed, name)["advice"]


def test_config_shows_values(cli, cli_json, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_MAX_SIZE", "7GB")
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", "redis://ci:${NOT_SET_ANYWHERE}@127.0.0.1:1")
    assert "password variable NOT_SET_ANYWHERE (not set)" in cli("config").stdout
    monkeypatch.setenv("NOT_SET_ANYWHERE", "x")
    assert cli("config").stdout.endswith("password variable NOT_SET_ANYWHERE\n")
    monkeypatch.delenv("CUDA_PROGCACHE_TIERS")
    listed = {one["name"]: one for one in cli_json("config")["settings"]}
    assert listed["CUDA_PROGCACHE_MAX_SIZE"]["value"] == "7GB"
    assert listed["CUDA_PROGCACHE_RECORD"]["value"] is None
    assert re.search(r"^CUDA_PROGCACHE_MAX_SIZE +7GB +5 GB +the size cap", cli("config").stdout, re.MULTILINE)


def test_every_variable_that_is_read_is_in_the_table():
    named = set()
    for path in PACKAGE.rglob("*.py"):
        named |= set(re.findall(r"\bCUDA_PROGCACHE(?:_[A-Z]+)*\b", path.read_text()))
    prefixes = {name for name in named if any(other.startswith(f"{name}_") for other in named)} - {"CUDA_PROGCACHE"}
    assert named - prefixes <= {setting.name for setting in SETTINGS}
    assert len({setting.name for setting in SETTINGS}) == len(SETTINGS)

# SPDX-License-Identifier: Apache-2.0
"""cuobjdump and nvdisasm on binaries, and directly on the files of entries."""

from __future__ import annotations

import subprocess

import pytest

from cuda_progcache import inspect
from cuda_progcache.errors import InspectError


def test_sass(compiled):
    assert "EXIT" in compiled().sass()


def test_an_entry_can_be_opened_as_it_lies(cache, compiled):
    path = cache.info(compiled().digest).path
    assert "/entries/" in str(path)
    for tool, arguments, words in (
        ("cuobjdump", ["--dump-resource-usage"], "Function k"),
        ("cuobjdump", ["-sass"], "EXIT"),
        ("nvdisasm", [], ".text.k"),
    ):
        done = subprocess.run(
            [inspect.find_tool(tool), *arguments, str(path)], capture_output=True, text=True, check=True
        )
        assert words in done.stdout


def test_what_nvdisasm_refuses():
    with pytest.raises(InspectError, match="nvdisasm failed with status"):
        inspect.sass(b"\x7fELF\x02\x01" + b"\0" * 100)


def test_a_missing_tool_names_its_wheel(monkeypatch, compiled):
    import cuda.pathfinder

    monkeypatch.setattr(cuda.pathfinder, "find_nvidia_binary_utility", lambda name: None)
    monkeypatch.setenv("PATH", "")
    inspect.find_tool.cache_clear()
    try:
        with pytest.raises(InspectError, match="pip install nvidia-cuda-nvdisasm"):
            compiled().sass()
    finally:
        inspect.find_tool.cache_clear()

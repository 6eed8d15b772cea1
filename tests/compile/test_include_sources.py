# SPDX-License-Identifier: Apache-2.0
"""How it is found out what an NVRTC tells of its headers, and that this is done once."""

from __future__ import annotations

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.compile import compilers, own_process
from cuda_progcache.keys import includes, toolchain
from cuda_progcache.keys.includes import NOTHING, TIME_TRACE, TRACE

SOURCE = '#include "value.h"\nextern "C" __global__ void k(int *a) { *a = VALUE; }\n'


@pytest.fixture(autouse=True)
def unknown(monkeypatch):
    """Nothing is known of this NVRTC yet."""
    monkeypatch.setattr(compilers, "include_sources", {})


@pytest.fixture
def tries(monkeypatch):
    """A list that grows with each try."""
    tried = []
    original = compilers._try_include_sources
    monkeypatch.setattr(compilers, "_try_include_sources", lambda: tried.append(1) or original())
    return tried


def test_the_installed_nvrtc_has_the_trace():
    assert compilers.include_source() == TRACE


def test_the_time_trace_is_the_second_choice(monkeypatch):
    monkeypatch.setattr(compilers, "parse_trace", lambda text: None)
    assert compilers.include_source() == TIME_TRACE


def test_a_trace_in_another_form_is_not_taken(monkeypatch):
    """One that lists the outermost headers alone, say: its prologue is there, and it would be believed."""
    monkeypatch.setattr(compilers, "parse_trace", lambda text: [h for h in includes.parse_trace(text) if h[0] == 0])
    assert compilers.include_source() == TIME_TRACE


def test_else_nothing_tells(monkeypatch):
    monkeypatch.setattr(compilers, "parse_trace", lambda text: None)
    monkeypatch.setattr(compilers, "parse_time_trace", lambda text: None)
    assert compilers.include_source() == NOTHING


def test_options_that_an_nvrtc_does_not_know(monkeypatch):
    original = own_process.ask

    def old(job, **about):
        if job["given"]["tell"] == TIME_TRACE:
            job["given"]["flags"].append(b"--no-such-option")
        return original(job, **about)

    monkeypatch.setattr(compilers, "parse_trace", lambda text: None)
    monkeypatch.setattr(own_process, "ask", old)
    assert compilers.include_source() == NOTHING


def test_an_nvrtc_that_cannot_stop_after_the_front_end(monkeypatch):
    original = own_process.ask

    def old(job, **about):
        if b"--fdevice-syntax-only" in job["given"]["flags"]:
            job["given"]["flags"].append(b"--no-such-option")
        return original(job, **about)

    monkeypatch.setattr(own_process, "ask", old)
    assert compilers.include_source() == TRACE


def test_tried_once_per_build(tries, compiled, project, monkeypatch):
    project("value.h", "#define VALUE 1")
    for source in (SOURCE, SOURCE + "__device__ int a;"):
        compiled(source)
    assert len(tries) == 1
    monkeypatch.setattr(toolchain, "build", lambda code_type: "0" * 64)
    compiled(SOURCE + "__device__ int b;")
    assert len(tries) == 2


def test_nothing_is_tried_for_a_source_without_headers(tries, compiled):
    compiled()
    assert not tries


@pytest.mark.parametrize("content", ["trace", "nothing", "nonsense", ""])
def test_kept_in_the_caches_directory(tries, cache, compiled, project, content):
    project("value.h", "#define VALUE 1")
    compiled(SOURCE)
    (file,) = (cache.path / "manifests").glob("nvrtc-*")
    assert file.read_text() == TRACE
    file.write_text(content)
    compilers.include_sources.clear()
    other = FileStreamProgramCache(cache.path)  # as another process would open it
    made = Program(SOURCE + "//", "c++", ProgramOptions(arch="sm_80")).compiled("cubin", cache=other)
    assert made.reason is None
    known = content in {"trace", "nothing"}
    assert compilers.include_source() == (content if known else TRACE)
    assert len(tries) == (1 if known else 2)

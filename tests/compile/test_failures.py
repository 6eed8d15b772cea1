# SPDX-License-Identifier: Apache-2.0
"""Failed compiles that are remembered for a while, where that was asked for."""

from __future__ import annotations

import os

import pytest

from cuda_progcache import CompileError, CompileService, InMemoryProgramCache, ProgramCacheStack, ProgramOptions
from cuda_progcache.compile.failures import recall, remember
from cuda_progcache.compile.output import CompilerRefusal
from cuda_progcache.keys.headers import NO_HEADERS
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.schema import base_key

BAD = '#include "value.h"\n__device__ int x = nope + value;\n'


@pytest.fixture(params=["disk", "memory"])
def service(request, cache):
    return CompileService(cache if request.param == "disk" else InMemoryProgramCache(), keep_failures=3600.0)


@pytest.fixture
def refuse(compiler_runs):
    """Have the compiler refuse something; returns the error, and whether the compiler was asked."""

    def run(service, source=BAD, code_type="c++", target_type="cubin", **options):
        before = len(compiler_runs)
        with pytest.raises(CompileError) as caught:
            service.compile(
                source, code_type, options=ProgramOptions(**{"arch": "sm_80"} | options), target_type=target_type
            )
        return caught.value, len(compiler_runs) > before

    return run


def test_it_is_asked_once_and_says_the_same(project, service, refuse):
    project("value.h", "#define value 1\n")
    (first, asked), (second, again) = refuse(service), refuse(service)
    assert (asked, again) == (True, False)
    assert str(first) == str(second)
    assert (first.log, first.diagnostics, first.options) == (second.log, second.diagnostics, second.options)
    assert not hasattr(first, "__notes__")
    assert "remembered" in second.__notes__[0]


def test_off_by_default(project, refuse, cache):
    project("value.h", "#define value 1\n")
    plain = CompileService(cache)
    assert [refuse(plain)[1] for _ in range(2)] == [True, True]
    assert not os.path.exists(os.path.join(cache.path, "failures"))
    with pytest.raises(ValueError, match="keep_failures"):
        CompileService(cache, keep_failures=-1)


def test_an_edit_is_seen_at_once(project, service, refuse):
    project("value.h", "#define value 1\n")
    refuse(service)
    project("value.h", "#define value 1\n#define nope 2\n")
    assert service.compile(BAD, options=ProgramOptions(arch="sm_80")).data


def test_other_inputs_are_asked_for(project, service, refuse):
    project("value.h", "#define value 1\n")
    refuse(service)
    assert refuse(service, arch="sm_90")[1]
    assert refuse(service, BAD + "// another")[1]
    assert not refuse(service)[1]


def test_a_missing_header_is_looked_for_each_time(project, service, refuse):
    assert [refuse(service)[1] for _ in range(2)] == [True, True]
    project("value.h", "#define value 1\n")
    assert refuse(service)[1]


def test_a_header_that_a_header_misses_is_looked_for_each_time(project, service, refuse):
    project("value.h", '#define value 1\n#include "more.h"\n')
    assert [refuse(service)[1] for _ in range(2)] == [True, True]


def test_other_compilers(service, refuse):
    for code_type, target_type in (("ptx", "cubin"), ("nvvm", "ptx")):
        asked = [refuse(service, "nonsense", code_type=code_type, target_type=target_type)[1] for _ in range(2)]
        assert asked == [True, False]


def test_clear_forgets_refusals(project, service, refuse):
    project("value.h", "#define value 1\n")
    refuse(service)
    service.cache.clear()
    assert refuse(service)[1]
    assert not refuse(service)[1]


def test_a_stack_in_memory_forgets_refusals(project, refuse):
    project("value.h", "#define value 1\n")
    service = CompileService(ProgramCacheStack((InMemoryProgramCache(), InMemoryProgramCache())), keep_failures=3600.0)
    assert [refuse(service)[1] for _ in range(2)] == [True, False]
    service.cache.clear()
    assert refuse(service)[1]


def test_only_for_a_while(project, refuse, cache):
    project("value.h", "#define value 1\n")
    service = CompileService(cache, keep_failures=3600.0)
    refuse(service)
    folder = os.path.join(cache.path, "failures")
    (name,) = os.listdir(folder)
    for mtime in (1.0, 4e9):  # long ago, and from a clock that is ahead
        os.utime(os.path.join(folder, name), (mtime, mtime))
        assert refuse(service)[1]
        assert not refuse(service)[1]
    os.utime(os.path.join(folder, name), (1.0, 1.0))
    refuse(service, BAD + "// another")
    assert name not in os.listdir(folder), "what is old is removed"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 99}'])
def test_a_damaged_file_is_nothing(project, refuse, cache, content):
    project("value.h", "#define value 1\n")
    service = CompileService(cache, keep_failures=3600.0)
    refuse(service)
    folder = os.path.join(cache.path, "failures")
    (name,) = os.listdir(folder)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(content)
    assert refuse(service)[1]
    assert not refuse(service)[1]


def test_time_macros_are_asked_for_each_time(service, refuse):
    source = "const char *t = __TIME__; int x = nope;"
    assert [refuse(service, source)[1] for _ in range(2)] == [True, True]


@pytest.mark.parametrize(
    ("status", "log", "kept"),
    [
        ("NVRTC_ERROR_COMPILATION", 'k.cu(1): error: identifier "nope" is undefined', True),
        ("NVRTC_ERROR_COMPILATION", "Catastrophic error: out of memory", False),
        ("NVRTC_ERROR_COMPILATION", 'k.cu(1): catastrophic error: could not open source file "a.h"', False),
        ("NVRTC_ERROR_OUT_OF_MEMORY", "", False),
    ],
)
def test_what_the_machine_was_in_the_way_of_is_not_kept(cache, status, log, kept):
    """Refusals that can't be had at will, as the compilers word them."""
    base = base_key(
        normalize(code="int x;", code_type="c++", target_type="cubin", options=ProgramOptions(arch="sm_80"))
    )
    assert remember(base, CompilerRefusal(status, log), NO_HEADERS, cache, 3600.0) is kept
    assert (recall(base, cache, 3600.0) is not None) is kept

# SPDX-License-Identifier: Apache-2.0
"""Flags that have no field, and flags that have one: both ways of saying a thing come to the same."""

from __future__ import annotations

import re

import cuda.core
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_progcache import (
    FileStreamProgramCache,
    LinkerOptions,
    Program,
    ProgramOptions,
    link,
    make_program_cache_key,
)
from cuda_progcache.errors import CompileError, OptionError, UncacheableError

SOURCE = """
#if __has_include("h.h")
#include "h.h"
#endif
#ifndef N
#define N 1
#endif
extern "C" __global__ void k(float *a, float b, float c) {
    int unused;
    for (int i = 0; i < 8; i++) a[i] = a[i] / b * N + sqrtf(c);
}
"""
NAME = {"arch": "sm_80", "name": "k.cu"}
TIME = r"Compile time = [\d.]+ ms"


@pytest.fixture(autouse=True)
def in_a_project(project):
    project("inc/h.h", "#define N 5\n")
    project("other/h.h", "#define N 7\n")
    project("pre.h", "#define N 9\n")


def fresh(**options):
    return bytes(cuda.core.Program(SOURCE, "c++", cuda.core.ProgramOptions(**NAME | options)).compile("cubin").code)


# A field, and other spellings of it.
ALIKE = [
    ({"debug": True}, [("-G",), ("--device-debug",), (" -G ",)]),
    ({"lineinfo": True}, [("-lineinfo",), ("--generate-line-info",)]),
    ({"define_macro": "N=3"}, [("-DN=3",), ("-D", "N=3"), ("--define-macro", "N=3"), ("-D N=3",)]),
    ({"include_path": "inc"}, [("-Iinc",), ("-I", "inc"), ("--include-path", "inc"), ("-I=inc",), ("-I inc",)]),
    ({"pre_include": "pre.h"}, [("-include", "pre.h"), ("--pre-include=pre.h",), ("-include=pre.h",)]),
    ({"fma": False}, [("-fmad=false",), ("--fmad", "false")]),
    ({"max_register_count": 16}, [("-maxrregcount=16",), ("--maxrregcount", "16")]),
    ({"std": "c++20"}, [("-std=c++20",), ("--std=c++20",)]),
    ({"restrict": True}, [("-restrict",), ("--restrict",)]),
    ({"ptxas_options": ["-v", "-O1"]}, [("-Xptxas", "-v", "-Xptxas=-O1"), ("--ptxas-options", "-v", "-Xptxas", "-O1")]),
    ({"use_fast_math": True}, [("-use_fast_math",)]),
    ({"disable_warnings": True}, [("-w",), ("--disable-warnings",)]),
]


@pytest.mark.parametrize(("fields", "spelled"), ALIKE, ids=lambda value: next(iter(value)) if value else None)
def test_a_flag_is_its_field(compiled, fields, spelled):
    expected = compiled(SOURCE, **NAME | fields)
    assert expected.data == fresh(**fields)
    for extra in spelled:
        made = compiled(SOURCE, **NAME, extra_flags=extra)
        assert made.data == expected.data, extra
        assert re.sub(TIME, "", made.log) == re.sub(TIME, "", expected.log), extra
        assert made.reason is None
        assert compiled(SOURCE, **NAME, extra_flags=extra).hit


@pytest.mark.parametrize("extra", [("-enable-tile",), ("-Werror", "reorder"), ("--Wreorder",), ("--fmax-errors", "3")])
def test_flags_without_a_field(compiled, extra):
    plain = compiled(SOURCE, **NAME)
    first, again = (compiled(SOURCE, **NAME, extra_flags=extra) for _ in range(2))
    assert (plain.hit, first.hit, again.hit) == (False, False, True)
    assert first.digest != plain.digest


def test_no_flags_are_none(compiled):
    assert not compiled(SOURCE, **NAME).hit
    for extra in (None, (), [], ""):
        assert compiled(SOURCE, **NAME, extra_flags=extra).hit


def test_their_order_counts(compiled):
    both = {("-DN=2", "-UN"), ("-UN", "-DN=2")}
    made = {extra: compiled(SOURCE, **NAME, extra_flags=extra) for extra in both}
    assert len({program.digest for program in made.values()}) == 2


@pytest.mark.parametrize("extra", [("-Iinc",), ("-I", "inc"), ("--include-path=inc",), ("-I=inc",), ("-I inc ",)])
def test_headers_of_an_include_path_are_keyed_by_content(compiled, project, extra):
    first = compiled(SOURCE, **NAME, extra_flags=extra)
    assert [h["name"] for h in first.record["headers"]] == ["h.h"]
    project("inc/h.h", "#define N 6\n")
    changed = compiled(SOURCE, **NAME, extra_flags=extra)
    assert not changed.hit
    assert changed.data != first.data
    project("inc/h.h", "#define N 5\n")
    assert compiled(SOURCE, **NAME, extra_flags=extra).hit
    # The directory's own name is in no key.
    project("renamed/h.h", "#define N 5\n")
    renamed = [re.sub(r"\binc\b|(?<=-I)inc", "renamed", word) for word in extra]
    assert compiled(SOURCE, **NAME, extra_flags=renamed).hit


@pytest.mark.parametrize("folder", [" inc", "a\nb"])
def test_a_directory_that_the_list_of_headers_cannot_tell(compiled, project, folder):
    """NVRTC lists ``inc/h.h`` for a header in " inc" as well."""
    for value in (5, 6):
        project(f"{folder}/h.h", f"#define N {value}\n")
        made = compiled(SOURCE, **NAME, include_path=folder)
        assert made.data == fresh(include_path=folder)
        assert not made.hit


@pytest.mark.parametrize("flag", ["-G", "-lineinfo"])
def test_paths_reach_the_output_with_debug_information(compiled, project, monkeypatch, flag):
    first = compiled(SOURCE, extra_flags=(flag,))
    assert compiled(SOURCE, extra_flags=(flag,)).hit
    (project.folder / "elsewhere").mkdir()
    monkeypatch.chdir(project.folder / "elsewhere")
    there = compiled(SOURCE, extra_flags=(flag,))
    assert not there.hit
    assert there.data != first.data


def test_what_the_compiler_does_not_forget(compiled):
    """It is compiled in a process of its own, in either spelling."""
    # With --restrict, b[0] is read once.
    source = 'extern "C" __global__ void k(int *a, const int *b) { a[0] = b[0] + 1; a[1] = b[0] * 2; }'
    clean = compiled(source, target_type="ptx")
    for extra in (("-restrict",), ("--restrict",)):
        assert compiled(source, target_type="ptx", extra_flags=extra).data != clean.data
        assert Program(source, "c++", ProgramOptions(arch="sm_80")).compiled("ptx").data == clean.data


@pytest.mark.parametrize("extra", [("-arch=sm_90",), ("--gpu-architecture", "sm_90")])
def test_the_architecture_has_a_field(compiled, compiler_runs, extra):
    with pytest.raises(OptionError, match="set arch="):
        compiled(extra_flags=extra)
    with pytest.raises(OptionError, match="is given twice with different values"):
        compiled(std="c++17", extra_flags=("-std=c++20",))
    assert compiler_runs == []


WRITE = [
    ("--time=t.csv",),
    ("-time=t.csv",),
    ("-create-pch=x.pch",),
    ("-fdevice-time-trace=t",),
    ("-Xptxas=--link-info=x",),
]


@pytest.mark.parametrize("extra", WRITE, ids=" ".join)
def test_flags_that_write_files(compiled, compiler_runs, project, extra):
    before = set(project.folder.iterdir())
    with pytest.raises(UncacheableError, match="write a file"):
        compiled(SOURCE, extra_flags=extra)
    with pytest.raises(UncacheableError, match="write a file"):
        make_program_cache_key(
            code=SOURCE, code_type="c++", options=ProgramOptions(arch="sm_80", extra_flags=extra), target_type="cubin"
        )
    assert compiler_runs == []
    compiled(SOURCE, store=None, extra_flags=extra)
    assert set(project.folder.iterdir()) > before, "it does write one"


OPTION_FILES = [
    {"ptxas_options": "--options-file=o.txt"},
    {"ptxas_options": ["-v", "-optf=o.txt"]},
    {"ptxas_options": ["--options-file", "o.txt"]},
    {"extra_flags": ("-Xptxas", "-optf=o.txt")},
    {"extra_flags": ("-Xptxas=-optf", "-Xptxas=o.txt")},
    {"extra_flags": ("--ptxas-options", "--options-file=o.txt")},
]


@pytest.mark.parametrize("options", OPTION_FILES, ids=str)
def test_files_of_options(compiled, cache, project, options):
    made = []
    for content in ("-O3", "-O0", "-O3"):
        project("o.txt", content)
        made.append(compiled(SOURCE, **NAME, **options))
        if "extra_flags" not in options:
            assert made[-1].data == fresh(**options)
    assert [m.hit for m in made] == [False, False, False]
    assert made[0].data == made[2].data != made[1].data
    assert all("o.txt names a file" in m.reason for m in made)
    assert len(cache) == 0


@pytest.mark.parametrize(
    "options", [{"ptxas_options": "--options-file=o.txt"}, {"extra_flags": "-Xptxas=-optf=o.txt"}], ids=str
)
def test_files_of_options_when_linking(compiled, cache, project, options):
    ptx = compiled(SOURCE, target_type="ptx", store=None)
    made = []
    for content in ("-O3", "-O0", "-O3"):
        project("o.txt", content)
        made.append(link([ptx], LinkerOptions(arch="sm_80", **options), cache=cache))
        made.append(compiled(ptx.data.decode(), "ptx", **options))
    assert not any(m.hit for m in made)
    assert made[0].data == made[4].data != made[2].data
    assert made[1].data == made[5].data != made[3].data
    assert all("o.txt names a file" in m.reason for m in made)
    assert len(cache) == 0
    with pytest.raises(UncacheableError, match="write a file"):
        link([ptx], LinkerOptions(arch="sm_80", extra_flags="-Xptxas=-link-info=x"), cache=cache)


def test_flags_of_the_other_compilers(compiled):
    ptx = compiled(SOURCE, target_type="ptx").data.decode()
    assert compiled(ptx, "ptx", debug=True).data == compiled(ptx, "ptx", extra_flags="-g").data
    with pytest.raises(CompileError, match="-nonsense"):
        compiled(ptx, "ptx", extra_flags="-nonsense")
    with pytest.raises(CompileError, match="-nonsense"):
        compiled(extra_flags="-nonsense")


FIELDS = {
    "std": st.sampled_from(["c++17", "c++20"]),
    "fma": st.booleans(),
    "ftz": st.booleans(),
    "prec_div": st.booleans(),
    "max_register_count": st.sampled_from([24, 32]),
    "define_macro": st.sampled_from(["N=3", ["N=4", "M"], ("N", "2")]),
    "include_path": st.sampled_from(["inc", ["other", "inc"], ("inc", "other")]),
    "pre_include": st.just("pre.h"),
    "lineinfo": st.just(True),
    "debug": st.just(True),
    "ptxas_options": st.sampled_from(["-v", ["-v", "-warn-spills"]]),
    "use_fast_math": st.just(True),
    "disable_warnings": st.just(True),
    "diag_suppress": st.just(177),
    "no_display_error_number": st.just(True),
    "device_int128": st.just(True),
}


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory):
    with FileStreamProgramCache(tmp_path_factory.mktemp("extra"), durability="none") as store:
        yield store


@settings(max_examples=18, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.data())
def test_random_options_compile_as_with_cuda_core(one_cache, data):
    """Some as fields, some as flags, in words of one or two: the bytes are those of cuda.core, when hit as well."""
    chosen = data.draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=5))
    options = {name: data.draw(FIELDS[name], name) for name in chosen}
    as_flags = {name for name in chosen if data.draw(st.booleans(), f"{name} as a flag")}
    extra = []
    for name in as_flags:
        for flag in cuda.core.ProgramOptions(arch="sm_80", **{name: options[name]}).as_bytes("nvrtc")[1:]:
            word, equals, value = flag.decode().partition("=")
            two = equals and word != "--std" and data.draw(st.booleans(), f"{flag} in two words")
            extra += [word, value] if two else [flag.decode()]
    fields = {name: value for name, value in options.items() if name not in as_flags}
    ours = ProgramOptions(**NAME, **fields, extra_flags=extra)
    assert sorted(ours.as_bytes("nvrtc")[: -len(extra) or None]) == sorted(
        cuda.core.ProgramOptions(**NAME, **fields).as_bytes("nvrtc")
    )
    first, again = (Program(SOURCE, "c++", ours).compiled("cubin", cache=one_cache) for _ in range(2))
    assert again.hit
    assert first.data == again.data == fresh(**options)

# SPDX-License-Identifier: Apache-2.0
"""Precompiled headers: nothing that comes out tells that there was one, and none is ever stale."""

from __future__ import annotations

import os

import pytest

from cuda_progcache import CompileError, FileStreamProgramCache, ProgramOptions
from cuda_progcache.compile import compilers
from cuda_progcache.compile.pipeline import obtain
from cuda_progcache.compile.policy import MissPolicy
from cuda_progcache.compile.precompiled import PrecompiledHeaders, prefix_id, reaches_many_headers, shared_prefix
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.toolchain import header_root

BODY = 'extern "C" __global__ void k(int *a) { *a = value() + %d; }\n'


def inputs_of(code, target_type="cubin", names=(), **options):
    options = ProgramOptions(**{"arch": "sm_80"} | options)
    return normalize(code=code, code_type="c++", options=options, target_type=target_type, name_expressions=names)


@pytest.fixture
def batch(monkeypatch):
    """The precompiled headers of this process, which compiles in itself as a worker of a batch does."""
    monkeypatch.setattr(compilers, "compiles_itself", True)
    precompiled = PrecompiledHeaders()
    yield precompiled
    precompiled.close()


@pytest.fixture
def get(cache, batch):
    return lambda code, **given: obtain(inputs_of(code, **given), cache, policy=MissPolicy(batch))


@pytest.fixture
def plain(tmp_path):
    """Compile without precompiled headers, into another cache."""
    store = FileStreamProgramCache(tmp_path / "plain", durability="none")
    return lambda code, **given: obtain(inputs_of(code, **given), store)


def assert_alike(made, expected):
    for attribute in ("data", "symbol_mapping", "log", "digest", "name", "reason"):
        assert getattr(made, attribute) == getattr(expected, attribute), attribute
    for field in ("components", "headers", "key", "manifest", "toolchain", "resource_usage"):
        assert made.record.get(field) == expected.record.get(field), field


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"target_type": "ptx"},
        {"target_type": "ltoir"},
        {"lineinfo": True, "name": "some/where.cu"},
        {"relocatable_device_code": True, "std": "c++20"},
    ],
    ids=str,
)
def test_the_same_comes_out(project, get, plain, batch, given):
    project("inc/value.h", "#pragma once\n#include <other.h>\ninline __device__ int value() { return other(); }\n")
    project("inc/other.h", "namespace { __device__ __noinline__ int other() { return __LINE__; } }\n")
    given = given | {"include_path": "inc"}
    for n in range(4):
        source = f"// number {n}\n#include <value.h>\n" + BODY % n
        assert_alike(get(source, **given), plain(source, **given))
    assert (batch.made, batch.used) == (1, 3)


def test_cub_comes_out_the_same(get, plain, batch):
    source = (
        "#include <cub/warp/warp_reduce.cuh>\n"
        "template <class T, int N> __global__ void k(const T *x, T *out) {\n"
        "  using Reduce = cub::WarpReduce<T, N>;\n  __shared__ typename Reduce::TempStorage storage;\n"
        "  T sum = Reduce(storage).Sum(x[threadIdx.x]);\n  if (threadIdx.x == 0) *out = sum;\n}\n"
    )
    include = [header_root("cuda"), header_root("cccl")]
    get(source, include_path=include, names=("k<int, 32>",))
    names = ("k<float, 32>", b"k<double, 16>")
    assert_alike(get(source, include_path=include, names=names), plain(source, include_path=include, names=names))
    assert (batch.made, batch.used) == (1, 1)


@pytest.mark.parametrize("how", ["edited", "edited, same size and time", "replaced", "shadowed", "gone"])
def test_it_is_never_stale(project, get, plain, batch, how):
    project("b/value.h", "inline __device__ int value() { return 1; }\n")
    given = {"include_path": ["a", "b"]}
    source = "#include <value.h>\n" + BODY
    for n in range(2):
        get(source % n, **given)
    assert batch.used == 1
    if how == "edited, same size and time":
        status = os.stat("b/value.h")
        project("b/value.h", "inline __device__ int value() { return 2; }\n")
        os.utime("b/value.h", ns=(status.st_atime_ns, status.st_mtime_ns))
    elif how == "edited":
        project("b/value.h", "inline __device__ int value() { return 42; }\n")
    elif how == "replaced":
        os.replace(project("b/new.h", "inline __device__ int value() { return 2; }\n"), "b/value.h")
    elif how == "shadowed":
        project("a/value.h", "inline __device__ int value() { return 2; }\n")
    else:
        os.unlink("b/value.h")
        with pytest.raises(CompileError, match=r"value\.h"):
            get(source % 7, **given)
        return
    assert_alike(get(source % 7, **given), plain(source % 7, **given))
    assert batch.used == 1, "the precompiled header was not taken"
    assert_alike(get(source % 8, **given), plain(source % 8, **given))


def test_an_edit_while_it_is_made_is_seen(project, get, plain, batch, monkeypatch):
    path = project("value.h", "inline __device__ int value() { return 1; }\n")
    original = compilers.compile_cpp

    def edited_behind(*arguments, **given):
        output = original(*arguments, **given)
        if any(flag.startswith("--create-pch=") for flag in given["flags"]):
            project("value.h", "inline __device__ int value() { return 2; }\n")
        return output

    monkeypatch.setattr(compilers, "compile_cpp", edited_behind)
    source = '#include "value.h"\n' + BODY
    assert_alike(get(source % 1), plain(source % 1))
    assert batch.made == 0
    assert os.path.exists(path)


def test_warnings_of_headers_are_in_every_log(project, get, plain, batch):
    project("value.h", "#warning careful\ninline __device__ int value() { return 1; }\n")
    source = '#include "value.h"\n' + BODY
    for n in range(3):
        made = get(source % n)
        assert "careful" in made.log
        assert_alike(made, plain(source % n))
    assert (batch.made, batch.used) == (0, 0)


def test_warnings_of_the_source_are_in_its_log(project, get, plain, batch):
    project("value.h", "inline __device__ int value() { return 1; }\n")
    source = '#include "value.h"\n' + BODY
    get(source % 1)
    careful = source % 2 + "#warning careful\n"
    assert_alike(get(careful), plain(careful))
    assert batch.used == 1


def test_errors_are_those_of_a_plain_compile(project, get, plain):
    project("value.h", "inline __device__ int value() { return 1; }\n")
    get('#include "value.h"\n' + BODY % 1)
    errors = []
    for way in (get, plain):
        with pytest.raises(CompileError) as caught:
            way('#include "value.h"\nint x = nope;\n')
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    assert "pch" not in errors[0].lower()


def test_one_that_is_not_taken_is_given_up(project, get, plain, batch, monkeypatch):
    project("value.h", "inline __device__ int value() { return 1; }\n")
    source = '#include "value.h"\n' + BODY
    get(source % 1)
    original = compilers.compile_cpp
    runs = []

    def another_standard(*arguments, **given):
        runs.append(given["flags"])
        if any(flag.startswith("--use-pch=") for flag in given["flags"]):
            given["flags"] = (*given["flags"], "--std=c++14")  # not what it was made with
        return original(*arguments, **given)

    monkeypatch.setattr(compilers, "compile_cpp", another_standard)
    for n in (2, 3):
        assert_alike(get(source % n), plain(source % n))
    assert sum("--pch-messages=false" in flags for flags in runs) == 1
    assert (batch.made, batch.used) == (1, 0)


def test_one_that_can_not_be_read_is_given_up(project, get, plain, batch):
    project("value.h", "inline __device__ int value() { return 1; }\n")
    source = '#include "value.h"\n' + BODY
    get(source % 1)
    (known,) = batch._kept.values()
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, known.descriptor)
    os.close(nothing)
    for n in (2, 3):
        assert_alike(get(source % n), plain(source % n))
    assert (batch.used, len(batch._kept)) == (0, 0)


def test_two_are_kept_and_no_files_remain(project, get, batch, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    batch._scratch = str(scratch)
    before = set(os.listdir("/proc/self/fd"))
    for name in "abc":
        project(f"{name}.h", f"inline __device__ int value() {{ return {ord(name)}; }}\n")
        for n in range(2):
            get(f'#include "{name}.h"\n' + BODY % n)
    assert (batch.made, batch.used) == (3, 3)
    assert not list(scratch.iterdir())
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 3  # two, and the one that lists
    batch.close()
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1


@pytest.mark.parametrize(
    ("source", "prefix"),
    [
        ("#include <a.h>\nint x;", b"#include <a.h>"),
        ('// hello\n/* b\n */ #include <a.h> // c\n#define N 3\n\n# include "b.h"\nint x;',
         b'#include <a.h> // c\n#define N 3\n# include "b.h"'),
        ("#pragma once\n#include <a.h>", b"#pragma once\n#include <a.h>"),
        ("int x;", None),
        ("#define N 3\nint x;", None),
        ("int x;\n#include <a.h>", None),
        ("#include <a.h>\nint x;\n#include <b.h>\n", None),
        ("#include <a.h>\n#if N\n#endif\n", None),
        ("#include <a.h>\n#define TWO \\\n 2\nint x;", None),
        ("#include <a.h>\n%:define N 3\nint x;", None),
        ("#include NAME\nint x;", None),
        ("#include <a.h>\n#define A /*\n*/ 3\nint x;", None),
        ("#define H __has_include(<b.h>)\n#include <a.h>\nint x;", None),
    ],
)  # fmt: skip
def test_prefix(source, prefix):
    assert shared_prefix(inputs_of(source)) == prefix


@pytest.mark.parametrize(
    "option", [{"pre_include": "a.h"}, {"pch": True}, {"debug": True}, {"fdevice_syntax_only": True}], ids=str
)
def test_options_without_a_prefix(option):
    assert shared_prefix(inputs_of("#include <a.h>\nint x;", **option)) is None


def test_whose_prefix_is_the_same():
    source = "#include <a.h>\nint x = 1;"
    first = prefix_id(inputs_of(source), "/here")
    assert first == prefix_id(inputs_of("#include <a.h>\nint x = 2;", target_type="ptx"), "/here")
    for other in ({"arch": "sm_90"}, {"include_path": "b"}, {"name": "b/k.cu"}, {"std": "c++20"}):
        assert prefix_id(inputs_of(source, **other), "/here") != first
    assert prefix_id(inputs_of(source), "/there") != first


def test_heavy_and_light():
    include = [header_root("cuda"), header_root("cccl")]
    for header, heavy in (("cuda_fp16.h", False), ("mma.h", False), ("cub/block/block_reduce.cuh", True),
                          ("cooperative_groups.h", True), ("nowhere.h", False)):  # fmt: skip
        inputs = inputs_of(f"#include <{header}>\nint x;", include_path=include)
        assert reaches_many_headers(inputs, inputs.search_path()) is heavy, header

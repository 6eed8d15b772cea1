# SPDX-License-Identifier: Apache-2.0
"""Compiles from memory: what is in the key is what was compiled, whatever happens to the files meanwhile."""

from __future__ import annotations

import os
import threading
from hashlib import sha256

import pytest

from cuda_progcache import CompileError, HeaderPolicy, InMemoryProgramCache, Program, ProgramOptions
from cuda_progcache.compile import hermetic
from cuda_progcache.keys.toolchain import header_root

KERNEL = '\nextern "C" __global__ void k(int *a) { *a = VALUE; }\n'
HERMETIC = HeaderPolicy(hermetic=True)


@pytest.fixture
def made(cache):
    """Compile hermetically, through the cache or ``store``."""

    def run(source, target_type="cubin", names=(), store=cache, **options):
        program = Program(source, "c++", ProgramOptions(**{"arch": "sm_80"} | options), header_policy=HERMETIC)
        return program.compiled(target_type, names, cache=store)

    return run


def plain(source, target_type="cubin", **options):
    return Program(source, "c++", ProgramOptions(**{"arch": "sm_80"} | options)).compiled(target_type)


@pytest.fixture
def just_before(monkeypatch):
    """``just_before(action)``: done when the headers are in memory, before the compiler gets them."""

    def arrange(action, times=1):
        original = hermetic._in_memory
        left = [times]

        def recorded(*arguments):
            memory = original(*arguments)
            if left[0]:
                left[0] -= 1
                action()
            return memory

        monkeypatch.setattr(hermetic, "_in_memory", recorded)

    return arrange


def test_a_header_edited_between_digest_and_compile(made, project, just_before):
    project("value.h", "#define VALUE 1")
    source = '#include "value.h"' + KERNEL
    of_one = plain(source).data
    just_before(lambda: project("value.h", "#define VALUE 2"))
    first = made(source)
    assert first.data == of_one
    assert first.record["headers"] == [{"name": "value.h", "digest": sha256(b"#define VALUE 1").hexdigest()}]
    second = made(source)
    assert not second.hit, "the header is another one now"
    assert second.data == plain(source).data != first.data
    project("value.h", "#define VALUE 1")
    assert made(source).hit


def test_without_it_such_a_program_is_not_kept(compiled, project, monkeypatch):
    from cuda_progcache.keys import includes

    project("value.h", "#define VALUE 1")
    original = includes.headers_read

    def edited(*arguments):
        project("value.h", "#define VALUE 2", old=False)
        return original(*arguments)

    monkeypatch.setattr("cuda_progcache.compile.miss.headers_read", edited)
    assert "modified while it was being compiled" in compiled('#include "value.h"' + KERNEL).reason


def test_a_new_header_that_would_shadow_one_between_digest_and_compile(made, project, just_before):
    project("two/value.h", "#define VALUE 1")
    source, options = "#include <value.h>" + KERNEL, {"include_path": ["one", "two"]}
    of_one = plain(source, **options).data
    just_before(lambda: project("one/value.h", "#define VALUE 2"))
    assert made(source, **options).data == of_one
    again = made(source, **options)
    assert not again.hit
    assert again.data != of_one


def test_headers_that_change_all_the_time(made, project):
    """Whatever was compiled is what the record says."""
    source = '#include "value.h"\n#include "more.h"' + KERNEL
    texts = {n: f"#define VALUE {n}" for n in range(10)}
    project("more.h", "#define MORE 1")
    project("value.h", texts[0])
    stop = threading.Event()

    def edit():
        n = 0
        while not stop.is_set():
            n += 1
            project("new.h", texts[n % 10], old=False)
            os.replace("new.h", "value.h")

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        runs = [made(source, name=f"k{n}.cu") for n in range(5)]
    finally:
        stop.set()
        editor.join()
    numbers = {sha256(text.encode()).hexdigest(): n for n, text in texts.items()}
    for number, run in enumerate(runs):
        assert run.reason is None
        value = numbers[run.record["headers"][0]["digest"]]
        project("value.h", texts[value])
        assert run.data == plain(source, name=f"k{number}.cu").data


def test_a_header_whose_includes_change_is_tried_again(made, project, just_before):
    """The first list of headers doesn't fit what was recorded: nothing of it may be used."""
    source = "#include <outer.h>" + KERNEL
    project("inc/outer.h", "#include <a.h>")
    project("inc/a.h", "#define VALUE 1")
    project("inc/b.h", "#define VALUE 2")
    original = hermetic.headers_read

    def changed(*arguments):
        project("inc/outer.h", "#include <b.h>")
        return original(*arguments)

    hermetic_read = pytest.MonkeyPatch()
    hermetic_read.setattr(hermetic, "headers_read", changed)
    try:
        done = made(source, include_path="inc")
    finally:
        hermetic_read.undo()
    assert done.data == plain(source, include_path="inc").data
    assert done.reason is None
    assert [h["name"] for h in done.record["headers"]] == ["outer.h", "b.h"]


def test_a_header_that_only_the_disk_has_is_noticed(made, project, monkeypatch):
    """NVRTC takes from the disk what isn't in memory: nothing that did so is kept, it is tried again."""
    project("inc/outer.h", "#define VALUE 1")
    late = project("late.h", "#define VALUE 2")
    original = hermetic.headers_read

    def changed(*arguments):
        project("inc/outer.h", f'#include "{late}"')
        return original(*arguments)

    monkeypatch.setattr(hermetic, "headers_read", changed)
    done = made("#include <outer.h>" + KERNEL, include_path="inc")
    assert done.reason is None
    assert [os.path.basename(h["name"]) for h in done.record["headers"]] == ["outer.h", "late.h"]


WAYS = {
    "quoted": ('#include "a.h"', {"a.h": "#define VALUE 1"}, {}),
    "angled": ("#include <a.h>", {"inc/a.h": "#define VALUE 1"}, {"include_path": "inc"}),
    "beside the includer": (
        '#include "x/a.h"',
        {"x/a.h": '#include "b.h"\n#include "../c.h"', "x/b.h": "#define B 1", "c.h": "#define VALUE B"},
        {},
    ),
    "two names, pragma once": (
        "#include <x/a.h>\n#include <b.h>",
        {"inc/x/a.h": '#include "../b.h"', "inc/b.h": "#pragma once\nstruct S {};\n#define VALUE 1"},
        {"include_path": "inc"},
    ),
    "one name, equal headers": (
        '#include "x/a.h"\n#include "y/a.h"',
        {"x/a.h": '#include "v.h"', "y/a.h": '#include "v.h"', "x/v.h": "#define VALUE 1", "y/v.h": "#define VALUE 1"},
        {},
    ),
    "one name, two headers": (
        '#include "x/a.h"\n#include "y/a.h"',
        {"x/a.h": '#include "v.h"', "y/a.h": '#include "v.h"', "x/v.h": "#define V 1", "y/v.h": "#define VALUE V"},
        {},
    ),
    "next": (
        "#include <a.h>",
        {"inc/a.h": "#include_next <a.h>\n", "other/a.h": "#define VALUE 1"},
        {"include_path": ["inc", "other"]},
    ),
    "macro": (
        "#include HEADER",
        {"inc/a.h": "#define VALUE 1"},
        {"include_path": "inc", "define_macro": "HEADER=<a.h>"},
    ),
    "pre_include": ("", {"inc/a.h": "#define VALUE 1"}, {"include_path": "inc", "pre_include": "a.h"}),
    "absolute": ('#include "/ROOT/a.h"', {"a.h": "#define VALUE 1"}, {}),
    "asked for": (
        "#if __has_include(<a.h>) && !__has_include(<gone.h>)\n#define VALUE 1\n#endif",
        {"inc/a.h": ""},
        {"include_path": "inc"},
    ),
    "asked for, and there under another name": (
        '#include "x/a.h"',
        {
            "x/a.h": '#include "b.h"\n#if !__has_include(<b.h>)\n#define VALUE 1\n#else\n#define VALUE 2\n#endif',
            "x/b.h": "",
        },
        {},
    ),
    "a folder in the name": ('#include "a.h"', {"src/a.h": "#define VALUE 1"}, {"name": "src/k.cu"}),
}
CANNOT = {"one name, equal headers", "one name, two headers", "next", "asked for, and there under another name"}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_header(made, project, way):
    first, files, options = WAYS[way]
    for name, text in files.items():
        project(name, text)
    source = first.replace("/ROOT", str(project.folder)) + KERNEL
    runs = [made(source, **options) for _ in range(2)]
    assert runs[0].data == runs[1].data == plain(source, **options).data
    if way in CANNOT:
        assert "can't be compiled hermetically" in runs[0].reason
    else:
        assert runs[0].reason is None
        assert runs[1].hit


@pytest.mark.parametrize(
    "source",
    [
        '#include <cuda_fp16.h>\n#include <mma.h>\nextern "C" __global__ void k(__half *a) { *a = __hadd(*a, *a); }',
        '#include <cuda/std/cstdint>\nextern "C" __global__ void k(cuda::std::int32_t *a) { *a = 1; }',
    ],
    ids=["cuda", "cccl"],
)
def test_real_headers(made, source):
    options = {"include_path": [header_root("cuda"), header_root("cccl")], "std": "c++17"}
    done = made(source, **options)
    assert done.reason is None
    assert done.data == plain(source, **options).data
    assert made(source, **options).hit


def test_entries_are_shared_with_plain_compiles_where_no_path_reaches_the_output(made, compiled, project):
    project("inc/value.h", "#define VALUE 1")
    source = "#include <value.h>" + KERNEL
    assert [made(source, include_path="inc").hit, compiled(source, include_path="inc").hit] == [False, True]
    for target_type, options in (("ltoir", {}), ("cubin", {"lineinfo": True})):
        runs = [
            make(source, target_type=target_type, include_path="inc", **options)
            for make in (made, compiled, made, compiled)
        ]
        assert [run.hit for run in runs] == [False, False, True, True]


def test_name_expressions_and_no_cache(made, project):
    project("inc/value.h", "template <class T> __global__ void k(T *a) { *a = 1; }")
    source = "#include <value.h>\n"
    for store in (InMemoryProgramCache(), None):
        done = made(source, names=("k<int>",), include_path="inc", store=store)
        assert done.symbol_mapping == {"k<int>": b"_Z1kIiEvPT_"}


def test_a_program_that_the_compiler_refuses(made, project):
    project("inc/value.h", "#define VALUE nope")
    for names in ((), ("k<int>",)):
        with pytest.raises(CompileError, match="nope"):
            made("#include <value.h>" + KERNEL, include_path="inc", names=names)
    project("inc/value.h", "#define VALUE 1")
    with pytest.raises(CompileError, match="no_such"):
        made("#include <value.h>" + KERNEL, include_path="inc", names=("no_such<int>",))


def test_an_nvrtc_that_does_not_tell(made, project, monkeypatch):
    from cuda_progcache.compile import compilers
    from cuda_progcache.keys import toolchain

    project("inc/value.h", "#define VALUE 1")
    for source_of_includes in ("time-trace", "text"):
        monkeypatch.setitem(compilers.include_sources, toolchain.build("c++"), source_of_includes)
        done = made("#include <value.h>" + KERNEL, include_path="inc")
        assert done.data == plain("#include <value.h>" + KERNEL, include_path="inc").data
        assert "doesn't say which header includes which" in done.reason

# SPDX-License-Identifier: Apache-2.0
"""Headers with a real compiler: what it reads, where it looks, and that cached output equals fresh output."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_progcache import CompileService, FileStreamProgramCache, HeaderPolicy, Program, ProgramOptions
from cuda_progcache.compile import compilers, own_process
from cuda_progcache.compile.nvrtc import Nvrtc
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.includes import TIME_TRACE, TRACE
from cuda_progcache.keys.toolchain import header_root

KERNEL = '\nextern "C" __global__ void k(int *a) { *a = VALUE; }\n'


@pytest.fixture(params=[TRACE, TIME_TRACE])
def include_source(request, monkeypatch):
    """Compile as with an NVRTC that tells of its headers in this way, or not at all."""
    monkeypatch.setitem(compilers.include_sources, toolchain.build("c++"), request.param)
    return request.param


def fresh(source, **options):
    return Program(source, "c++", ProgramOptions(**{"arch": "sm_80"} | options)).compiled("cubin").data


@pytest.fixture
def right(compiled):
    """Compile through the cache and compare with a fresh compile; returns whether it was a hit."""

    def check(source, **options):
        made = compiled(source, **options)
        assert made.data == fresh(source, **options)
        return made.hit

    return check


@pytest.mark.usefixtures("include_source")
def test_an_edited_header_is_a_miss_and_an_edit_undone_a_hit(right, project):
    source = '#include "value.h"' + KERNEL
    project("value.h", "#define VALUE 1")
    assert [right(source), right(source)] == [False, True]
    project("value.h", "#define VALUE 2")
    assert [right(source), right(source)] == [False, True]
    project("value.h", "#define VALUE 1")
    assert right(source), "both versions are kept"


@pytest.mark.usefixtures("include_source")
def test_edits_in_quick_succession(right, project):
    """Same size, within one tick of the file system's clock."""
    source = '#include "value.h"' + KERNEL
    for value in range(8):
        project("value.h", f"#define VALUE {value}", old=False)
        right(source)


@pytest.mark.usefixtures("include_source")
def test_the_working_directory_counts(right, project, monkeypatch):
    """With the default name NVRTC looks for quoted includes in the working directory, and no option says so."""
    source = '#include "value.h"' + KERNEL
    project("a/value.h", "#define VALUE 1")
    project("b/value.h", "#define VALUE 2")
    project("c/value.h", "#define VALUE 1")
    for folder, hit in (("a", False), ("b", False), ("c", True), ("b", True)):
        monkeypatch.chdir(project.folder / folder)
        assert right(source) is hit


@pytest.mark.usefixtures("include_source")
def test_a_name_with_a_folder(right, project):
    source = '#include "value.h"' + KERNEL
    project("src/value.h", "#define VALUE 1")
    assert [right(source, name="src/k.cu"), right(source, name="src/k.cu")] == [False, True]
    project("src/value.h", "#define VALUE 2")
    assert not right(source, name="src/k.cu")


@pytest.mark.parametrize("how", ["include_path", "pre_include", "macro", "nested", "symlink"])
def test_every_way_to_a_header(right, compiled, project, include_source, how):
    options = {}
    source = "#include <value.h>" + KERNEL
    if how == "include_path":
        options = {"include_path": ["missing", str(project.folder / "inc")]}
    elif how == "pre_include":
        source, options = KERNEL, {"pre_include": "inc/value.h"}
    elif how == "macro":
        source, options = "#include HEADER" + KERNEL, {"define_macro": ("HEADER", '"inc/value.h"')}
    elif how == "nested":
        project("top/outer.h", '#include "../inc/value.h"')
        source = '#include "top/outer.h"' + KERNEL
    elif how == "symlink":
        os.symlink(project.folder / "inc", project.folder / "link")
        options = {"include_path": "link"}
    project("inc/value.h", "#define VALUE 1")
    assert [right(source, **options), right(source, **options)] == [False, True]
    project("inc/value.h", "#define VALUE 2")
    assert [right(source, **options), right(source, **options)] == [False, True]


@pytest.mark.usefixtures("include_source")
def test_a_new_file_that_shadows_a_header(right, project):
    source = "#include <value.h>" + KERNEL
    options = {"include_path": ["first", "second"]}
    project("second/value.h", "#define VALUE 1")
    assert [right(source, **options), right(source, **options)] == [False, True]
    project("first/value.h", "#define VALUE 2")
    assert not right(source, **options)
    os.unlink("first/value.h")
    assert right(source, **options)


@pytest.mark.usefixtures("include_source")
def test_has_include(right, project):
    source = "#if __has_include(<extra.h>)\n#define VALUE 1\n#else\n#define VALUE 2\n#endif" + KERNEL
    options = {"include_path": "inc"}
    assert [right(source, **options), right(source, **options)] == [False, True]
    project("inc/extra.h", "")
    assert [right(source, **options), right(source, **options)] == [False, True]
    project("inc/extra.h", "another content, and nobody reads it")
    assert right(source, **options)


PROBED = "\n#define VALUE 1\n#else\n#define VALUE 2\n#endif" + KERNEL


@pytest.mark.usefixtures("include_source")
def test_what_has_include_comes_to_is_in_the_key(right, project):
    """Neither reads a file: without it, both ways would be one entry, and each would be served for the other."""
    source = '#if __has_include("extra.h")' + PROBED
    assert [right(source), right(source)] == [False, True]
    project("extra.h", "")
    assert [right(source), right(source)] == [False, True]
    os.unlink("extra.h")
    assert right(source)
    os.mkdir("extra.h")  # NVRTC says no
    assert [right(source), right(source)] == [False, True]
    os.rmdir("extra.h")
    project("extra.h", "")
    assert right(source)


@pytest.mark.usefixtures("include_source")
def test_has_include_in_a_header_that_stays_the_same(right, project):
    project("inc/value.h", "#if defined(__has_include) && \\\n    __has_include(<extra.h>)" + PROBED.split("extern")[0])
    source, options = "#include <value.h>" + KERNEL, {"include_path": "inc"}
    assert [right(source, **options), right(source, **options)] == [False, True]
    project("inc/extra.h", "")
    assert [right(source, **options), right(source, **options)] == [False, True]
    os.unlink("inc/extra.h")
    assert right(source, **options)


@pytest.mark.parametrize(
    "test",
    [
        "__has_include(<@>)",
        '__has_include ( "@" )',
        '__has_include\\\n("@")',
        '__has_inc\\\nlude("@")',
        '__has_include/**/("@")',
        'defined(__has_include) && __has_include("@")',
        'defined __has_include && __has_include("@")',
        '!__has_include("missing.h") && __has_include("@")',
    ],
)
def test_every_way_to_write_has_include(right, project, test):
    source = f"#if {test.replace('@', 'extra.h')}" + PROBED
    assert [right(source, include_path="."), right(source, include_path=".")] == [False, True]
    project("extra.h", "")
    assert [right(source, include_path="."), right(source, include_path=".")] == [False, True]


@pytest.mark.parametrize(
    ("test", "options", "reason"),
    [
        ('__has_include(/**/"extra.h")', {}, None),
        ("__has_include(NAME)", {"define_macro": 'NAME="extra.h"'}, "the source tests __has_include(NAME)"),
        ("PROBE", {"define_macro": 'PROBE=__has_include("extra.h")'}, "an option tests __has_include"),
        ('HAS("extra.h")\n#endif\n#define HAS __has_include /**/\n#if 0', {}, None),
    ],
)
def test_a_has_include_that_cannot_be_known(compiled, project, test, options, reason):
    source = f"#define HAS(name) 0\n#if {test}" + PROBED
    for content in (None, ""):
        if content is not None:
            project("extra.h", content)
        made = compiled(source, **options)
        assert made.data == fresh(source, **options)
        assert reason is None or reason in made.reason


@pytest.mark.usefixtures("include_source")
def test_a_folder_in_the_place_of_a_header(right, project):
    """The search passes it over; a file that takes its place would be read."""
    (project.folder / "first/value.h").mkdir(parents=True)
    project("second/value.h", "#define VALUE 1")
    source, options = "#include <value.h>" + KERNEL, {"include_path": ["first", "second"]}
    assert [right(source, **options), right(source, **options)] == [False, True]
    os.rmdir("first/value.h")
    project("first/value.h", "#define VALUE 2")
    assert not right(source, **options)


def test_the_sources_folder_counts_for_what_is_looked_for_there(right, project, monkeypatch):
    """A header in angle brackets isn't: compiled elsewhere, it is found where the include directory is the own one."""
    project("inc/value.h", "#define VALUE 1")
    project("inc/other.h", "#define VALUE 2")
    given = {"include_path": str(project.folder / "inc")}
    angled = "#include <value.h>" + KERNEL
    by_macro = "#define NAME <value.h>\n#include NAME" + KERNEL
    quoted = '#include <value.h>\n#undef VALUE\n#include "other.h"' + KERNEL
    for source in (angled, by_macro, quoted):
        right(source, **given)
    right(angled, **given, name="k.cu")
    monkeypatch.chdir(project.folder / "inc")
    assert right(angled, **given)
    assert right(angled, include_path=".")
    assert right(angled, **given, name=str(project.folder / "inc" / "k.cu"))
    for source in (by_macro, quoted):
        right(source, **given)
    project("elsewhere/value.h", "#define VALUE 3")
    project("elsewhere/other.h", "#define VALUE 4")
    monkeypatch.chdir(project.folder / "elsewhere")
    assert right(angled, **given)
    for source in (by_macro, quoted):
        right(source, **given)


@pytest.mark.parametrize(
    ("include", "first", "then"),
    [
        ('#include "inc/value.h"', "p/inc", "other"),
        ('#include "value.h"', "p", "p"),
        ('#define NAME "value.h"\n#include NAME', "p", "p"),
        ("#include <inc/value.h>", "p p/inc", "q other"),
        ('#include <value.h>\n#undef VALUE\n#include "value.h"', "p", "p"),
    ],
    ids=["below", "beside", "by a macro", "nested", "in both ways"],
)
def test_two_places_that_are_one_where_it_is_compiled(right, project, monkeypatch, include, first, then):
    """Elsewhere they are two, and the one that the compiler takes may be another."""
    for name, value in {"p/inc": 1, "p": 1, "q/inc": 2, "q": 2, "other": 1}.items():
        project(f"{name}/value.h", f"#define VALUE {value}")
    for cwd, folders in (("p", first), ("q", then), ("p", first), ("q", then)):
        monkeypatch.chdir(project.folder / cwd)
        right(include + KERNEL, include_path=[str(project.folder / folder) for folder in folders.split()])


def test_paths_that_begin_with_a_blank(right, project):
    """In a trace a blank before a path says how deep it lies."""
    for folder in (" inc", "inc"):
        project(f"{folder}/value.h", "#define VALUE 1")
    project("first.h", "")
    source, options = '#include "first.h"\n#include <value.h>' + KERNEL, {"include_path": " inc"}
    right(source, **options)
    project(" inc/value.h", "#define VALUE 2")
    assert not right(source, **options)


@pytest.mark.usefixtures("include_source")
@pytest.mark.parametrize("name", ["__FILE__", "__FI\\\nLE__", "__builtin_FILE()"])
def test_the_name_of_a_file_in_a_header(right, project, name):
    source = "#include <value.h>" + KERNEL
    at = len(str(project.folder)) + 1
    for place in ("one", "two"):
        path = project(
            f"{place}/value.h", f"__device__ const char *file() {{ return {name}; }}\n#define VALUE file()[{at}]"
        )
        assert not right(source, include_path=os.path.dirname(path))


def test_a_working_directory_that_is_gone(compiled, project, monkeypatch):
    header = project("inc/value.h", "#define VALUE 1")
    plain, including = "#define VALUE 1" + KERNEL, "#include <value.h>" + KERNEL
    (project.folder / "gone").mkdir()
    monkeypatch.chdir(project.folder / "gone")
    os.rmdir(project.folder / "gone")
    assert [compiled(plain).hit, compiled(plain).hit] == [False, True]
    for made in (compiled(including, include_path=os.path.dirname(header)), compiled(plain, lineinfo=True)):
        assert made.data
        assert made.reason == "the working directory is gone"


def test_a_working_directory_that_changes_during_the_compile(cache, compiled, project, monkeypatch):
    """By another thread: where NVRTC looked for the header, nobody knows."""
    project("a/value.h", "#define VALUE 1")
    project("b/value.h", "#define VALUE 2")
    monkeypatch.chdir(project.folder / "a")
    original = compilers._compile_cpp

    def elsewhere(*arguments, **given_):
        os.chdir(project.folder / "b")
        return original(*arguments, **given_)

    monkeypatch.setattr(compilers, "_compile_cpp", elsewhere)
    assert compiled('#include "value.h"' + KERNEL).reason == (
        "the working directory was changed while it was being compiled"
    )
    assert len(cache) == 0


@pytest.mark.usefixtures("include_source")
def test_the_same_project_in_two_places_shares_entries(right, project, monkeypatch):
    for place in ("one", "two"):
        project(f"{place}/inc/value.h", "#define VALUE 1")
    for place, hit in (("one", False), ("two", True)):
        monkeypatch.chdir(project.folder / place)
        assert right("#include <value.h>" + KERNEL, include_path=str(project.folder / place / "inc")) is hit


def test_file_macro_in_a_header_is_not_shared(compiled, project, monkeypatch):
    header = "#define VALUE (sizeof(__FILE__))"
    for place in ("one", "another"):
        project(f"{place}/inc/value.h", header)
        monkeypatch.chdir(project.folder / place)
        options = {"include_path": str(project.folder / place / "inc")}
        source = "#include <value.h>" + KERNEL
        made = compiled(source, **options)
        assert not made.hit
        assert made.data == fresh(source, **options)


def test_headers_and_their_digests_are_in_the_record(compiled, project):
    project("inc/value.h", "#define VALUE 1")
    made = compiled("#include <value.h>" + KERNEL, include_path=str(project.folder / "inc"))
    assert [h["name"] for h in made.record["headers"]] == ["value.h"]
    assert str(project.folder) not in str(made.record)


def test_cccl_is_cached_with_hundreds_of_headers(compiled, compiler_runs):
    source = (
        "#include <cub/block/block_reduce.cuh>\n"
        "template <class T> __global__ void sum(const T *in, T *out) {\n"
        "  using Reduce = cub::BlockReduce<T, 128>;\n"
        "  __shared__ typename Reduce::TempStorage storage;\n"
        "  T total = Reduce(storage).Sum(in[threadIdx.x]);\n"
        "  if (threadIdx.x == 0) *out = total;\n}\n"
    )
    options = {"include_path": [header_root("cuda"), header_root("cccl")]}
    first, again = (compiled(source, names=("sum<float>",), **options) for _ in range(2))
    assert (first.hit, again.hit, len(compiler_runs)) == (False, True, 1)
    assert len(first.record["headers"]) > 100
    assert first.symbol_mapping == again.symbol_mapping


def test_the_trace_changes_no_byte(project, include_source):
    project("value.h", "#define VALUE 1")
    code = ('#include "value.h"' + KERNEL).encode()
    given_ = {"name": "k.cu", "flags": ["-arch=sm_80"], "target_type": "cubin"}
    traced, plain = (compilers.compile_cpp(code, trace=trace, **given_) for trace in (True, False))
    assert traced.data == plain.data
    assert traced.trace == {TRACE: [(0, "value.h")], TIME_TRACE: [(-1, "value.h")]}[include_source]
    assert plain.trace is None


@pytest.mark.usefixtures("include_source")
def test_no_trace_file_is_left_behind(compiled, project, monkeypatch):
    scratch = project.folder / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    own_process._pool.end_all()
    project("value.h", "#define VALUE 1")
    compiled('#include "value.h"' + KERNEL)
    with pytest.raises(Exception, match="undefined"):
        compiled('#include "value.h"\nint x = nope;')
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("tell", [TRACE, TIME_TRACE])
def test_the_trace_lies_where_nobody_else_writes(project, monkeypatch, tell):
    """In /tmp, under a name made of the process id, it was anybody's to link elsewhere, or to fill."""
    import tempfile

    scratch = project.folder / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    seen = []

    class Looking(Nvrtc):
        def _compile(self, *arguments):
            seen.extend(path.stat().st_mode & 0o170777 for path in scratch.iterdir())
            return super()._compile(*arguments)

    project("value.h", "#define VALUE 1")
    code = ('#include "value.h"' + KERNEL).encode()
    made = Looking(toolchain.locate("nvrtc")).compile(code, b"k.cu", [b"-arch=sm_80"], "cubin", tell=tell)
    assert b"value.h" in made["told"]
    assert seen == {TRACE: [], TIME_TRACE: [0o40700]}[tell]
    assert not list(scratch.iterdir())


@pytest.mark.usefixtures("include_source")
def test_a_symlinked_include_directory_that_is_turned_elsewhere(right, project):
    for version in "12":
        project(f"v{version}/value.h", f"#define VALUE {version}")
    os.symlink("v1", "current")
    source, options = "#include <value.h>" + KERNEL, {"include_path": "current"}
    assert [right(source, **options), right(source, **options)] == [False, True]
    os.unlink("current")
    os.symlink("v2", "current")
    assert [right(source, **options), right(source, **options)] == [False, True]


@pytest.mark.usefixtures("include_source")
def test_a_header_that_is_a_link(right, project):
    for version in "12":
        project(f"v{version}.h", f"#define VALUE {version}")
    os.symlink("v1.h", "value.h")
    source = '#include "value.h"' + KERNEL
    assert [right(source), right(source)] == [False, True]
    os.unlink("value.h")
    os.symlink("v2.h", "value.h")
    assert [right(source), right(source)] == [False, True]


@pytest.mark.usefixtures("include_source")
def test_pre_include_and_what_it_includes(right, project):
    project("inc/pre.h", "#include <value.h>")
    project("inc/value.h", "#define VALUE 1")
    options = {"pre_include": "pre.h", "include_path": "inc"}
    assert [right(KERNEL, **options), right(KERNEL, **options)] == [False, True]
    project("inc/value.h", "#define VALUE 2")
    assert [right(KERNEL, **options), right(KERNEL, **options)] == [False, True]
    project("pre.h", "#define VALUE 3")  # the working directory comes first
    assert [right(KERNEL, **options), right(KERNEL, **options)] == [False, True]


@pytest.mark.usefixtures("include_source")
def test_the_next_header_of_the_same_name(right, project):
    project("one/value.h", "#include_next <value.h>\n#define VALUE (V + 10)")
    project("two/value.h", "#define V 1")
    source, options = "#include <value.h>" + KERNEL, {"include_path": ["one", "two"]}
    assert [right(source, **options), right(source, **options)] == [False, True]
    project("two/value.h", "#define V 2")
    assert [right(source, **options), right(source, **options)] == [False, True]


@pytest.mark.usefixtures("include_source")
def test_a_header_edited_during_the_compile_is_not_kept(cache, compiled, project, monkeypatch):
    header = project("value.h", "#define VALUE 1")
    original = compilers._compile_cpp

    def meanwhile(*arguments, **given_):
        output = original(*arguments, **given_)
        with open(header, "w", encoding="ascii") as file:
            file.write("#define VALUE 2")
        return output

    monkeypatch.setattr(compilers, "_compile_cpp", meanwhile)
    made = compiled('#include "value.h"' + KERNEL)
    assert made.reason == "header value.h was modified while it was being compiled"
    assert len(cache) == 0
    monkeypatch.undo()


def test_time_trace_and_trace_give_one_key(compiled, cache, project, monkeypatch):
    project("inc/sub/value.h", '#include "more.h"\n#define VALUE MORE')
    project("inc/sub/more.h", "#define MORE 1")
    project("inc/other.h", "")
    source = "#include <sub/value.h>\n#include <other.h>" + KERNEL
    keys = []
    for source_of_includes in (TRACE, TIME_TRACE):
        monkeypatch.setitem(compilers.include_sources, toolchain.build("c++"), source_of_includes)
        made = compiled(source, include_path="inc", store=FileStreamProgramCache(cache.path / source_of_includes))
        assert [h["name"] for h in made.record["headers"]] in (
            ["sub/value.h", "sub/more.h", "other.h"],
            ["sub/value.h", "other.h", "sub/more.h"],
        )
        keys.append(made.record["key"])
    assert keys[0] == keys[1]


def test_bundled_headers_are_keyed_by_content(compiled, project, monkeypatch):
    """In the peer's key is the user's cache directory; here, two users share an entry."""
    source = '#include <cuda_fp16.h>\nextern "C" __global__ void k(__half *a) { *a = __hadd(*a, *a); }\n'
    made = []
    for user in "abab":
        monkeypatch.setenv("XDG_CACHE_HOME", str(project.folder / user))
        made.append(compiled(source, use_bundled_headers=True))
    assert len({one.digest for one in made}) == 1
    assert [one.hit for one in made] == [False, False, True, True], "NVRTC has to bring each user the headers once"
    assert str(project.folder) not in str(made[0].record)
    with open(project.folder / "b/cuda-python/nvrtc-bundled-headers/cuda_fp16.h", "a", encoding="ascii") as file:
        file.write("// edited")
    assert compiled(source, use_bundled_headers=True).digest != made[0].digest


def test_within_the_interval_headers_are_not_looked_at_again(cache, project):
    """What was asked for: an edit is served late by as much, in this process alone."""
    project("value.h", "#define VALUE 1")
    source, options = '#include "value.h"' + KERNEL, ProgramOptions(arch="sm_80")
    eager = Program(source, "c++", options)
    patient = Program(source, "c++", options, header_policy=HeaderPolicy(recheck_after=3600))
    service = CompileService(cache, header_policy=HeaderPolicy(recheck_after=3600))
    first = patient.compiled("cubin", cache=cache)
    assert patient.compiled("cubin", cache=cache).hit
    project("value.h", "#define VALUE 2")
    assert patient.compiled("cubin", cache=cache).data == first.data
    assert service.compile(source, options=options).data == first.data
    second = eager.compiled("cubin", cache=cache)
    assert not second.hit
    assert second.data != first.data
    assert patient.compiled("cubin", cache=cache).data == second.data, "what this process compiles is known at once"


edits = st.lists(
    st.one_of(
        st.tuples(
            st.sampled_from(["first/value.h", "second/value.h", "value.h", "second/more.h", "second/asked.h"]),
            st.integers(0, 3),
        ),
        st.tuples(st.just("remove"), st.sampled_from(["first/value.h", "value.h", "second/more.h", "second/asked.h"])),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    edits=edits,
    quoted=st.booleans(),
    fma=st.sampled_from([None, False]),
    told=st.sampled_from([TRACE, TIME_TRACE]),
)
def test_after_any_edits_cached_output_is_fresh_output(tmp_path_factory, monkeypatch, edits, quoted, fma, told):
    folder = tmp_path_factory.mktemp("edits")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(compilers.include_sources, toolchain.build("c++"), told)
    cache = FileStreamProgramCache(folder / "cache", durability="none")

    def write(name, value):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        more = "#if __has_include(<more.h>)\n#include <more.h>\n#endif\n#ifndef MORE\n#define MORE 0\n#endif\n"
        asked = "#if __has_include(<asked.h>)\n#define ASKED 100\n#else\n#define ASKED 0\n#endif\n"
        own = f"{more}{asked}#define VALUE ({value} + MORE + ASKED)\n"
        path.write_text(f"#define MORE {value}\n" if "more" in name else own)

    write("second/value.h", 0)
    source = ('#include "value.h"' if quoted else "#include <value.h>") + KERNEL
    options = {"include_path": ["first", "second"], "fma": fma, "arch": "sm_80"}
    for name, value in [("second/value.h", 0), *edits]:
        if name == "remove":
            (folder / value).unlink(missing_ok=True)
        else:
            write(name, value)
        made = Program(source, "c++", ProgramOptions(**options)).compiled("cubin", cache=cache)
        assert made.data == fresh(source, **options)

# SPDX-License-Identifier: Apache-2.0
"""Misses that explain themselves, with real compiles; events and logs."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from cuda_progcache import (
    CompileService,
    Event,
    FileStreamProgramCache,
    InMemoryProgramCache,
    Program,
    ProgramOptions,
    subscribe,
)
from cuda_progcache.compile import history, lines, manifests
from cuda_progcache.errors import CompileError
from cuda_progcache.store.compile_record import CompileRecord

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


@pytest.fixture
def seen():
    """Every event, as it comes."""
    caught: list[Event] = []
    unsubscribe = subscribe(caught.append)
    yield caught
    unsubscribe()


def why(seen):
    """The reasons of the last miss."""
    return [e for e in seen if e.kind == "miss"][-1].reasons


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_why_a_miss_missed(seen, project, cache, kind):
    store = cache if kind == "disk" else InMemoryProgramCache()

    def compile_(source='#include "cfg.cuh"\n' + SOURCE, target="cubin", **options):
        given = ProgramOptions(**{"arch": "sm_80", "name": "k.cu"} | options)
        return Program(source, "c++", given).compiled(target, cache=store)

    project("cfg.cuh", "#define A 1")
    compile_()
    assert why(seen) == ("first compile of this program",)
    project("cfg.cuh", "#define A 2")
    compile_()
    assert why(seen) == ("header cfg.cuh changed (1 of 1 headers differ)",)
    compile_(max_register_count=32)
    assert why(seen) == ("option max_register_count unset → 32",)
    compile_(max_register_count=64, arch="sm_90")
    assert why(seen) == ("option arch sm_80 → sm_90", "option max_register_count unset → 64")
    compile_('#include "cfg.cuh"\n' + SOURCE.replace("1", "2"))
    assert why(seen) == ("the source differs",)
    compile_(name="other.cu")
    assert why(seen) == ("first compile of this program",)
    made = compile_()
    assert made.hit
    store.remove(made.digest)
    compile_()
    assert why(seen) == ("it was in the cache before, and was evicted, removed or damaged since",)


def test_another_compiler_build_is_named(seen, compiled, monkeypatch):
    from cuda_progcache.keys import schema, toolchain

    compiled()
    real = toolchain.toolchain

    def another(*arguments, **given):
        return tuple(tool._replace(identity="build-id:0:0") for tool in real(*arguments, **given)[:1])

    for module in (schema, toolchain):
        monkeypatch.setattr(module, "toolchain", another)
    compiled()
    assert why(seen)[0].startswith("nvrtc build differs: 13.")
    assert why(seen)[0].endswith(" (build 0)")


def test_events_of_a_miss_and_of_a_hit(seen, compiled):
    first = compiled(name="k.cu")
    compiled(name="k.cu")
    assert [e.kind for e in seen] == ["miss", "compile", "store", "hit"]
    assert {e.digest for e in seen} == {first.digest}
    assert {(e.name, e.target_type, e.arch) for e in seen} == {("k.cu", "cubin", "sm_80")}
    assert seen[1].seconds > 0
    assert str(seen[3]) == f"hit: k.cu (cubin, sm_80) {first.digest[:12]}"
    assert seen[3].seconds == seen[1].seconds, "what it spared"


def test_what_is_not_kept_says_why(seen, compiled, tmp_path):
    store = FileStreamProgramCache(tmp_path / "gone")
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").write_text("")
    with pytest.warns(RuntimeWarning):
        compiled(store=store)
    assert [e.kind for e in seen] == ["miss", "compile", "drop"]
    assert "dropped" in seen[-1].reasons[0]


def test_what_the_compiler_refuses_is_told(seen, compiled):
    with pytest.raises(CompileError):
        compiled("nope", name="k.cu")
    (event,) = seen
    assert (event.kind, event.name, event.digest) == ("refused", "k.cu", None)
    assert event.reasons == ("NVRTC_ERROR_COMPILATION",)


def test_a_program_that_another_one_had_compiled_is_told(seen, project, cache):
    """Two spellings of one include: they are looked up apart, and come to the same key."""
    header = project("inc/value.h", "#define VALUE 3\n")
    for options in ({"include_path": os.path.dirname(header), "pre_include": "value.h"}, {"pre_include": header}):
        given = ProgramOptions(arch="sm_80", name="k.cu", **options)
        done = Program(SOURCE.replace("1", "VALUE"), "c++", given).compiled("cubin", cache=cache)
    assert not done.hit
    assert why(seen) == (
        "the cache has it, but not by these paths or headers; or it was compiled elsewhere at the same moment",
    )


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_evictions_are_told(seen, compiled, tmp_path, kind):
    cap = 12_000  # two or three programs, and their records
    if kind == "disk":
        store = FileStreamProgramCache(tmp_path / "capped", durability="none", max_size_bytes=cap)
    else:
        store = InMemoryProgramCache(max_size_bytes=cap)
    digests = [compiled(name=f"k{n}.cu", store=store).digest for n in range(6)]
    evicted = [event.digest for event in seen if event.kind == "evict"]
    assert len(evicted) == store.stats().evicted > 0
    assert evicted == digests[: len(evicted)], "the oldest first"
    assert str(next(event for event in seen if event.kind == "evict")) == f"evict: {evicted[0][:12]}"


def test_a_failing_subscriber_fails_nothing(compiled, caplog):
    def broken(event):
        raise RuntimeError("listener")

    unsubscribe = subscribe(broken)
    try:
        assert compiled().data
    finally:
        unsubscribe()
        unsubscribe()
    assert "a subscriber failed" in caplog.text


def test_logging(compiled, caplog):
    with caplog.at_level(logging.INFO, "cuda_progcache"):
        compiled(name="k.cu")
        compiled(name="k.cu")
    assert [r.message for r in caplog.records] == [
        f"miss: k.cu (cubin, sm_80) {compiled(name='k.cu').digest[:12]}: first compile of this program"
    ]
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "cuda_progcache"):
        compiled(name="k.cu")
    assert [r.message.split(":")[0] for r in caplog.records] == ["hit"]


@pytest.mark.parametrize(
    ("level", "kinds"), [("explain", ["miss"]), ("all", ["miss", "compile", "store", "hit"]), ("", [])]
)
def test_the_environment_asks_for_it(tmp_path, level, kinds, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_LOG", level)
    code = (
        "from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions\n"
        f"cache = FileStreamProgramCache({str(tmp_path / 'c')!r})\n"
        f"for _ in 'ab': Program({SOURCE!r}, 'c++', ProgramOptions(arch='sm_80')).compiled('cubin', cache=cache)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split(": ")[1] for line in done.stderr.splitlines()] == kinds
    stamp = re.compile(r"cuda_progcache\[\d+\] \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z: ")
    assert all(stamp.match(line) for line in done.stderr.splitlines())


def test_a_probe_is_explained(seen, compiled, project):
    source = '#if __has_include("extra.h")\n#endif\n' + SOURCE
    compiled(source)
    project("extra.h", "")
    compiled(source)
    assert why(seen) == ('__has_include("extra.h") in the source: missing → there',)


def test_an_entry_is_explained_later(cache, compiled):
    service = CompileService(cache)
    first = compiled(name="k.cu")
    second = compiled(name="k.cu", fma=False)
    assert service.explain(first.digest) == ("first compile of this program",)
    assert service.explain(second.digest[:12]) == ("option fma unset → false",)
    cache["by hand"] = b"x"
    by_hand = next(e.digest for e in cache.entries() if not e.record)
    for missing in (by_hand, "0" * 64):
        with pytest.raises(KeyError):
            service.explain(missing)


def test_the_history_is_disposable(cache, compiled, seen):
    compiled(name="k.cu")
    (folder,) = [p for p in cache.path.iterdir() if p.name == "latest"]
    (file,) = folder.iterdir()
    file.write_bytes(b"\xff junk\n")
    compiled(name="k.cu", fma=False)
    assert why(seen) == ("first compile of this program",)
    shutil.rmtree(folder)
    compiled(name="k.cu", fma=True)
    assert why(seen) == ("first compile of this program",)
    compiled(name="k.cu", ftz=True)
    assert why(seen)[0].startswith("option")
    assert len(history.latest(cache, "k.cu")) == 2


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_what_is_derived_goes_with_the_entries(seen, project, cache, kind):
    store = cache if kind == "disk" else InMemoryProgramCache()
    project("value.h", "#define VALUE 1\n")
    program = Program('#include "value.h"\n' + SOURCE, "c++", ProgramOptions(arch="sm_80"))
    digest = program.compiled("cubin", cache=store).digest
    if kind == "disk":
        assert {"latest", "manifests"} <= {path.name for path in cache.path.iterdir()}
    store.clear()
    if kind == "disk":
        assert not {"failures", "latest", "manifests"} & {path.name for path in cache.path.iterdir()}
    assert program.compiled("cubin", cache=store).digest == digest
    assert why(seen) == ("first compile of this program",)
    assert program.compiled("cubin", cache=store).hit


def test_a_spared_program_is_still_found(project, cache):
    """Its key takes the header manifest, which clear() must leave then."""
    project("value.h", "#define VALUE 1\n")
    program = Program('#include "value.h"\n' + SOURCE, "c++", ProgramOptions(arch="sm_80"))
    cache.pin(program.compiled("cubin", cache=cache).digest)
    cache.clear(pinned=False)
    manifests._manifests.clear()  # as in the next process
    assert program.compiled("cubin", cache=cache).hit


def a_record(name="k.cu", **fields):
    return CompileRecord({"name": name, "components": [], **fields})


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_the_history_does_not_grow_for_ever(cache, kind):
    store = cache if kind == "disk" else InMemoryProgramCache()
    for n in range(2000):
        history.note(store, a_record(), f"{n:064x}")
    kept = [one.digest for one in history.latest(store, "k.cu")]
    assert kept == [f"{n:064x}" for n in range(1999, 1999 - len(kept), -1)]
    assert 256 <= len(kept) < 1000


def test_processes_that_compile_at_once_lose_none_of_each_others_lines(cache):
    code = "import sys\nfrom cuda_progcache import FileStreamProgramCache\nfrom cuda_progcache.compile import history\n"
    code += "cache = FileStreamProgramCache(sys.argv[1])\nsys.stdin.readline()\n"
    code += "from cuda_progcache.store.compile_record import CompileRecord\nabout = CompileRecord({'name': 'k.cu'})\n"
    code += "for n in range(50): history.note(cache, about, f'{int(sys.argv[2]) + n:064x}')\n"
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(cache.path), str(k * 50)], stdin=subprocess.PIPE)
        for k in range(4)
    ]
    for process in running:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in running:
        process.communicate(timeout=600)
    assert {one.digest for one in history.latest(cache, "k.cu")} == {f"{n:064x}" for n in range(200)}


def test_processes_that_begin_a_file_at_once_lose_none_of_each_others_lines(cache, monkeypatch):
    """Each of them has just seen that there is none."""
    make = lines.write_beside

    def after_others(*given, **named):
        monkeypatch.setattr(lines, "write_beside", make)
        history.note(cache, a_record(), "1" * 64)
        return make(*given, **named)

    monkeypatch.setattr(lines, "write_beside", after_others)
    history.note(cache, a_record(), "2" * 64)
    history.note(cache, a_record(), "3" * 64)
    assert [one.digest[0] for one in history.latest(cache, "k.cu")] == ["3", "2", "1"]


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_of_ever_new_program_names_some_thousands_are_remembered(cache, monkeypatch, kind):
    monkeypatch.setattr(history, "_NAMES", 8)
    store = cache if kind == "disk" else InMemoryProgramCache()
    digests = [f"{number:064x}" for number in range(300)]
    for number, digest in enumerate(digests):
        history.note(store, a_record(f"kernel_{number}.cu"), digest)
    known = [number for number in range(300) if history.latest(store, f"kernel_{number}.cu")]
    assert len(known) < 100  # one new name in sixteen looks at them all
    assert len(known) >= 6
    assert known[-1] > 280  # files made within one tick of the clock have no order


def test_header_manifests_go_when_their_entries_have_gone(project, cache, monkeypatch):
    monkeypatch.setattr(manifests, "_FEW", 3)
    monkeypatch.setattr(manifests, "_LOOKED_AT", 5)
    source, options = '#include "cfg.cuh"\n' + SOURCE, ProgramOptions(arch="sm_80", name="k.cu")
    project("cfg.cuh", "#define A 1")
    first = Program(source, "c++", options).compiled("cubin", cache=cache)
    name = first.record["manifest"]
    manifest = cache.path / "manifests" / name[:2] / name[2:]
    content = manifest.read_text()
    assert first.digest in content
    of_an_evicted = content.replace(first.digest, "ab" * 32)
    hour = 3600
    beside = {"living": (content, 2), "evicted": (of_an_evicted, 2), "on its way": (of_an_evicted, 0), "junk": ("{", 2)}
    for name, (text, hours) in beside.items():
        path = manifest.with_name(name)
        path.write_text(text)
        os.utime(path, ns=(0, time.time_ns() - hours * hour * 10**9))
    project("cfg.cuh", "#define A 2")
    assert not Program(source, "c++", options).compiled("cubin", cache=cache).hit
    assert {path.name for path in manifest.parent.iterdir()} == {manifest.name, "living", "on its way"}
    manifests._manifests.clear()  # as in a new process
    assert Program(source, "c++", options).compiled("cubin", cache=cache).hit


# Which compile a miss is compared with


class Library:
    """A kernel library with two kernels; its texts can be edited."""

    MANIFEST = """
    format = 1
    [kernels.gemv]
    template = "gemv.cu.j2"
    name_expressions = ["gemv<{{ dtype }}>"]
    [kernels.gemv.parameters]
    dtype = { type = "str", default = "float" }
    rows = { type = "int", default = 4 }
    """
    TEMPLATE = "template <class T> __global__ void gemv(T *a) { a[{{ rows }}] = 1; }"

    def __init__(self, folder, cache):
        self.folder, self.cache = folder, cache
        folder.mkdir()
        (folder / "manifest.toml").write_text(self.MANIFEST)
        self.write(self.TEMPLATE)

    def write(self, text):
        (self.folder / "gemv.cu.j2").write_text(text)

    def compile(self, arch="sm_80", target_type="cubin", **parameters):
        service = CompileService(self.cache, library=self.folder)
        return service.kernel("gemv", arch=arch, target_type=target_type, **parameters)


@pytest.fixture
def library(tmp_path, cache):
    return Library(tmp_path / "library", cache)


def why_later(cache, done):
    return CompileService(cache).explain(done.digest)


VARIANTS = [
    {"arch": arch, "rows": rows, "dtype": dtype}
    for arch in ("sm_80", "sm_90", "sm_100")
    for rows in (4, 8, 16)
    for dtype in ("float", "double")
]


def test_after_an_edit_of_its_template_each_variant_is_compared_with_itself(library, seen):
    for variant in VARIANTS:
        library.compile(**variant)
    library.write(library.TEMPLATE.replace("= 1", "= 2"))
    for variant in reversed(VARIANTS):
        done = library.compile(**variant)
        (reason,) = why(seen)
        assert reason.startswith("template gemv.cu.j2 changed (")
        assert done.record["kernel"]["templates"][0]["digest"][:12] in reason
        assert why_later(library.cache, done) == (reason,)


def test_a_new_variant_is_told_by_its_parameters(library, seen):
    library.compile(rows=4)
    done = library.compile(rows=8, dtype="double")
    assert why(seen) == ("parameter dtype float → double", "parameter rows 4 → 8")
    assert why_later(library.cache, done) == why(seen)
    library.compile(rows=8, dtype="double", arch="sm_90")
    assert why(seen) == ("option arch sm_80 → sm_90",)
    library.compile(rows=8, dtype="double", arch="sm_90", target_type="ptx")
    assert why(seen) == ("target_type cubin → ptx",)
    library.write(library.TEMPLATE.replace("= 1", "= 2"))
    library.compile(rows=16, dtype="double", arch="sm_90", target_type="ptx")
    parameter, template = why(seen)
    assert (parameter, template[:28]) == ("parameter rows 8 → 16", "template gemv.cu.j2 changed ")


def test_the_same_program_comes_before_another_variant_that_is_nearer(seen, project, compiled, tmp_path):
    """Other include directories are many components, another option is one."""
    source = '#include "cfg.cuh"\n' + SOURCE
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    for folder in ("one", "two"):
        (tmp_path / folder / "cfg.cuh").write_text(f"__device__ int {folder} = 1;\n")
    given = {"name": "k.cu", "lineinfo": True}
    compiled(source, include_path=[str(tmp_path / "one")], **given)
    other = compiled(source, include_path=[str(tmp_path / "two")], max_register_count=32, **given)
    done = compiled(source, include_path=[str(tmp_path / "two")], **given)
    assert other.digest != done.digest
    assert why(seen) == (
        "header cfg.cuh changed (1 of 1 headers differ)",
        "the include directories differ, and reach the output",
    )


def test_the_folder_before_a_name_is_not_another_program(seen, compiled, cache, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    compiled(name="gemv.cu")
    monkeypatch.chdir(tmp_path / "sub")
    done = compiled(SOURCE.replace("1", "2"), name="../gemv.cu", fma=False)
    assert "first compile of this program" not in why(seen)
    assert "option fma unset → false" in why(seen)
    assert "first compile of this program" not in why_later(cache, done)


def test_of_equals_the_newest_counts(compiled, cache):
    first = compiled(SOURCE.replace("1", "2"), name="k.cu", max_register_count=32)
    second = compiled(SOURCE.replace("1", "3"), name="k.cu", max_register_count=64)
    done = compiled(SOURCE.replace("1", "4"), name="k.cu", max_register_count=128)
    assert first.digest != second.digest
    assert why_later(cache, done) == ("option max_register_count 64 → 128", "the source differs")


@pytest.mark.parametrize("option", ["lineinfo", "debug"])
def test_an_option_that_brings_paths_into_the_key_is_the_one_cause(seen, compiled, cache, option):
    compiled(name="k.cu")
    done = compiled(name="k.cu", **{option: True})
    assert why(seen) == (f"option {option} unset → on",)
    assert why_later(cache, done) == why(seen)
    compiled(name="k.cu", max_register_count=32)
    assert why(seen) == ("option max_register_count unset → 32",)

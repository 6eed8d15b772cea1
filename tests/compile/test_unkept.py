# SPDX-License-Identifier: Apache-2.0
"""Programs that are compiled and not kept: counted by reason, told once, listed, explained; never silent."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest

from cuda_progcache import FileStreamProgramCache, InMemoryProgramCache, Program, ProgramOptions
from cuda_progcache.compile import history, unkept
from cuda_progcache.errors import ProgCacheWarning
from cuda_progcache.keys.headers import HeaderPolicy
from cuda_progcache.store.compile_record import CompileRecord

KERNEL = 'extern "C" __global__ void k(int *a) { *a = 1; }\n'


@pytest.fixture(autouse=True)
def told_nobody(monkeypatch):
    monkeypatch.setattr(unkept, "_told", set())


def edits_a_header_meanwhile(monkeypatch, project):
    """The header has other bytes when the compile ends than when it began."""
    from cuda_progcache.compile import miss

    project("cfg.h", "#define A 1\n")
    run = miss._run

    def while_it_runs(*arguments, **given):
        output = run(*arguments, **given)
        project("cfg.h", "#define A 2\n", old=False)
        return output

    monkeypatch.setattr(miss, "_run", while_it_runs)
    return '#include "cfg.h"\n' + KERNEL


def leaves_the_directory(monkeypatch, project):
    from cuda_progcache.compile import miss

    project("other/x", "")
    project("cfg.h", "#define A 1\n")
    run = miss._run

    def while_it_runs(*arguments, **given):
        output = run(*arguments, **given)
        monkeypatch.chdir(project.folder / "other")
        return output

    monkeypatch.setattr(miss, "_run", while_it_runs)
    return "#include <cfg.h>\n" + KERNEL


#: By kind: a source, or what makes one; and options.
CASES = {
    "time_macro": [
        ("// \n__device__ const char *t = __TIME__;\n" + KERNEL, {}),
        (KERNEL, {"define_macro": [("WHEN", "__DATE__")]}),
    ],
    "undecided_header": [
        ('#define NAME "nowhere.h"\n#define T __has_include(NAME)\n#if T\n#endif\n' + KERNEL, {}),
    ],
    "changed": [(edits_a_header_meanwhile, {})],
    "working_directory": [(leaves_the_directory, {"include_path": ["."], "lineinfo": True})],
}
FLAT = [(kind, *case) for kind, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("where", ["disk", "memory"])
@pytest.mark.parametrize(("kind", "source", "options"), FLAT, ids=[f"{k}{n}" for n, (k, *_) in enumerate(FLAT)])
def test_each_is_counted_told_and_listed(monkeypatch, project, cache, where, kind, source, options):
    store = cache if where == "disk" else InMemoryProgramCache()
    if callable(source):
        source = source(monkeypatch, project)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = Program(source, "c++", ProgramOptions(arch="sm_80", name="k.cu", **options)).compiled(
            "cubin", cache=store
        )
    assert (made.digest, made.reason is None) == (None, False)
    (warning,) = caught
    assert issubclass(warning.category, ProgCacheWarning)
    assert warning.filename == __file__, "the warning points at the caller"
    assert made.reason in str(warning.message)
    assert unkept.KINDS[kind][1] in str(warning.message), "it says how to mend it"
    stats = store.stats()
    assert (stats.unkeyed, stats.unkeyed_by) == (1, {kind: 1})
    assert (stats.hits, stats.misses, stats.dropped) == (0, stats.misses, 0)
    (one,) = unkept.listed(store)
    assert (one.name, one.arch, one.target_type, one.kind, one.reason) == ("k.cu", "sm_80", "cubin", kind, made.reason)


def test_a_program_is_told_once_and_counted_each_time(compiled, cache):
    with pytest.warns(ProgCacheWarning, match="k.cu for sm_80 was compiled but not kept"):
        compiled("// __TIME__\n__device__ int t = sizeof(__TIME__);\n" + KERNEL, name="k.cu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            compiled("// __TIME__\n__device__ int t = sizeof(__TIME__);\n" + KERNEL, name="k.cu")
    with pytest.warns(ProgCacheWarning, match="other.cu"):
        compiled("__device__ int t = sizeof(__TIME__);\n" + KERNEL, name="other.cu")
    assert cache.stats().unkeyed == 5
    assert [one.name for one in unkept.listed(cache)] == ["other.cu", "k.cu"]


def test_all_processes_add_up(cache):
    code = (
        "import sys, warnings\nwarnings.simplefilter('ignore')\n"
        "from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions\n"
        "cache = FileStreamProgramCache(sys.argv[1])\n"
        f"source = '__device__ int t = sizeof(__TIME__);' + {KERNEL!r}\n"
        "for n in range(3):\n"
        "    options = ProgramOptions(arch='sm_80', name=f'k{n}.cu')\n"
        "    Program(source, 'c++', options).compiled('cubin', cache=cache)\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(cache.path)]) for _ in range(2)]
    assert [process.wait(600) for process in running] == [0, 0]
    with FileStreamProgramCache(cache.path) as again:
        assert again.stats().all_time.unkeyed == 6
        assert unkept.by_kind(unkept.listed(again)) == {"time_macro": 3}


def test_what_is_kept_later_is_off_the_list(monkeypatch, project, compiled, cache):
    with (
        monkeypatch.context() as patch,
        pytest.warns(ProgCacheWarning, match="next compile keeps it, if no file changes meanwhile"),
    ):
        source = edits_a_header_meanwhile(patch, project)
        compiled(source, name="k.cu")
    (listed,) = unkept.listed(cache)
    project("cfg.h", "#define A 1\n")
    made = compiled(source, name="k.cu")
    assert made.digest == listed.digest or made.digest
    assert [one for one in unkept.listed(cache) if one.digest == made.digest] == []


def test_hermetic_programs_that_cannot_be(project, cache):
    """Two headers of one name: in memory there can be but one."""
    for folder, text in (("x", "#define V 1"), ("y", "#define VALUE V")):
        project(f"{folder}/a.h", '#include "v.h"')
        project(f"{folder}/v.h", text)
    source = '#include "x/a.h"\n#include "y/a.h"\nextern "C" __global__ void k(int *a) { *a = VALUE; }\n'
    program = Program(source, "c++", ProgramOptions(arch="sm_80"), header_policy=HeaderPolicy(hermetic=True))
    with pytest.warns(ProgCacheWarning, match="header policy that isn't hermetic"):
        made = program.compiled("cubin", cache=cache)
    assert unkept.kind_of(made.reason) == "hermetic"


def test_a_foreign_store_in_trouble(tmp_path):
    pytest.importorskip("cuda.core.utils")
    from cuda.core.utils import ProgramCacheResource

    class Full(ProgramCacheResource):
        def __getitem__(self, key):
            raise KeyError(key)

        def __setitem__(self, key, value):
            raise OSError(28, "No space left on device")

        def __delitem__(self, key):
            raise KeyError(key)

        def __len__(self):
            return 0

        def clear(self):
            pass

    with pytest.warns(ProgCacheWarning, match="No space left"):
        made = Program(KERNEL, "c++", ProgramOptions(arch="sm_80")).compiled("cubin", cache=Full())
    assert unkept.kind_of(made.reason) == "store"


def test_the_list_has_a_bound_and_outlives_damage(cache, monkeypatch):
    monkeypatch.setattr(unkept, "_LARGEST", 20_000)
    monkeypatch.setattr(unkept, "warn", lambda *_: None)
    record = {"name": "k.cu", "code_type": "c++", "target_type": "cubin", "arch": "sm_80"}
    for n in range(500):
        unkept.note(cache, CompileRecord(record), f"{n:064x}", "the source uses __TIME__")
    listed = unkept.listed(cache)
    assert [one.digest for one in listed[:256]] == [f"{n:064x}" for n in range(499, 243, -1)]
    assert os.path.getsize(cache.path / "unkept" / "programs") < 200_000
    with open(cache.path / "unkept" / "programs", "a", encoding="utf-8") as file:
        file.write('{"cut\n[1, 2]\n\xff')
    assert unkept.listed(cache)[0] == listed[0]
    assert cache.verify().clean
    cache.clear()
    assert unkept.listed(cache) == []


SENTENCES = {
    "changed": [
        "header {} was modified while it was being compiled",
        "header {} appeared while it was being compiled",
        "the folder {} was changed while headers were read from there",
        "the files of nvrtc were replaced while it was compiling",
        "it can't be compiled hermetically: its headers changed again and again while it was being compiled",
    ],
    "unreadable": [
        "header {} can't be read after the compile",
        "the path of {} or of another header begins with a blank: the trace can't tell",
        "the include directory '{}' can't be told from another in the compiler's list of headers",
    ],
    "untold_headers": ["this NVRTC doesn't tell which headers it reads"],
    "working_directory": [
        "the working directory is gone",
        "the working directory was changed while it was being compiled",
    ],
    "time_macro": ["the source uses __TIME__", "header {} uses __DATE__", "macros may paste __TIMESTAMP__ together"],
    "undecided_header": [
        "a macro from an option tests __has_include, and what it looks at isn't in the key",
        "{} passes __has_include on to a macro",
        "{} passes HAS, which tests for a header, on to another macro",
        "{} uses HAS, which makes the name of a header it tests for with # or ##",
        "{} tests HAS(X), and a macro gives the header's name",
        "{} tests for a header through a macro, and X in its name is another macro",
        "macros may paste __has_include together",
    ],
    "hermetic": ["it can't be compiled hermetically: the compiler refuses it with headers from memory (7)"],
    "store": ["the cache couldn't store it: [Errno 28] No space left on device: '{}'"],
    "other": ["who knows"],
}


@pytest.mark.parametrize(
    "name", ["cfg.h", "option store/changed_macro.h", "__has_include.h", "the working directory.h"]
)
def test_names_of_files_do_not_make_another_kind(name):
    for kind, sentences in SENTENCES.items():
        for sentence in sentences:
            assert unkept.kind_of(sentence.format(name)) == kind, sentence


class Contended(dict):
    """The first of its names is removed by another thread, as soon as somebody has seen it."""

    def __iter__(self):
        names = list(super().__iter__())
        super().pop(names[0])
        return iter(names)


@pytest.mark.parametrize(("room", "most"), [(unkept, "_KEPT"), (history, "_NAMES")])
def test_threads_forget_the_oldest_at_once(monkeypatch, room, most):
    kept = Contended({f"{n}": () for n in range(3)})
    monkeypatch.setattr(room, most, 2)
    monkeypatch.setattr(room, "derived", lambda cache, what: kept)
    record = {"name": "a", "components": []}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        room.note(
            InMemoryProgramCache(), CompileRecord(record), "d" * 64, *(["it may differ"] if room is unkept else [])
        )
    assert len(kept) == 2

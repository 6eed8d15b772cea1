# SPDX-License-Identifier: Apache-2.0
"""The modes of the cache: what each does to each thing that is kept, in processes of their own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    FrozenMissError,
    FrozenProgramCache,
    InMemoryProgramCache,
    ModeError,
    Program,
    ProgramCacheStack,
    ReadOnlyError,
)

WORKER = Path(__file__).with_name("mode_worker.py")
ROOT = Path(__file__).parents[2]
#: Every place that something is kept at, and the writer (mode_worker.py) that is seen to write there in mode rw.
WRITTEN = {
    "cache/entries": "program",
    "cache/records": "program",
    "cache/ledger": "program",
    "cache/counters.log": "program",
    "cache/manifests": "program",
    "cache/latest": "program",
    "cache/toolchains": "program",
    "cache/leases": "program",
    "cache/tmp": "program",
    "cache/steps": "kernel",
    "templates": "kernel",
    "cache/unkept": "not_kept",
    "cache/failures": "refused",
    "first/entries": "levels",
    "second/entries": "levels",
    "calls": "memoized",
    "files": "saved",
    "xdg": "saved_by_default",
}
COMPILES = {
    "program", "kernel", "analysis", "linked", "not_kept", "refused", "prewarmed", "levels", "layered", "peer",
    "peer_levels", "peer_layer", "peer_memory",
}  # fmt: skip
WRITERS = (*COMPILES, "memoized", "saved", "saved_by_default")
#: What is never a hit: it can't be kept, a refusal is no program, and memory is new in each process.
NEVER = {"not_kept", "refused", "peer_memory"}


def place_in(folder):
    (folder / "include").mkdir(parents=True)
    (folder / "include" / "size.h").write_text("#define SIZE 4\n")
    (folder / "xdg").mkdir()
    (folder / "work").mkdir()
    return folder


def settings(place, mode):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_PROGCACHE", "XDG_"))}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CUDA_PROGCACHE": mode,
        "CUDA_PROGCACHE_DIR": str(place / "cache"),
        "CUDA_PROGCACHE_TEMPLATES": str(place / "templates"),
        "XDG_CACHE_HOME": str(place / "xdg"),
        "HOME": str(place / "work"),
    }


def work(place, mode, writers=()):
    command = [sys.executable, WORKER, place, *([",".join(writers)] if writers else [])]
    done = subprocess.run(
        [*map(str, command)], cwd=place / "work", env=settings(place, mode), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A place whose caches hold everything."""
    place = place_in(tmp_path_factory.mktemp("warm"))
    return place, work(place, "rw")


def test_in_rw_every_place_is_written(warm):
    _, told = warm
    for place, writer in WRITTEN.items():
        assert any(path.startswith(place) for path in told[writer]["changed"]), (place, told[writer])
    assert {name for name, one in told.items() if one["outcome"] not in {True, False}} == set()


# Compiled once more each, where nothing is kept; these three say nothing that the others don't.
COLD = tuple(name for name in WRITERS if name not in {"analysis", "prewarmed", "refused"})


@pytest.mark.parametrize(
    ("mode", "start"), [("ro", "cold"), ("frozen", "cold"), ("ro", "warm"), ("off", "warm"), ("frozen", "warm")]
)
def test_otherwise_nothing_is(mode, start, warm, tmp_path):
    place = place_in(tmp_path / "cold") if start == "cold" else warm[0]
    told = work(place, mode, COLD if (mode, start) in {("ro", "cold"), ("off", "warm")} else ())
    assert {name: one["changed"] for name, one in told.items() if one["changed"]} == {}
    for name, one in told.items():
        outcome = one["outcome"]
        if mode == "off":
            assert one["opened"] == [], name
        if start == "warm" and mode != "off" and name not in NEVER:
            assert outcome is True, (name, outcome)
        elif mode == "frozen" and name in COMPILES - {"prewarmed", "layered", "peer_layer"}:
            assert outcome.startswith("FrozenMissError: "), (name, outcome)
            assert "nothing was compiled" in outcome.lower()
        elif name in COMPILES:
            assert outcome is False, (name, outcome)
        if mode == "frozen" and not name.startswith("peer"):  # cuda.core loads the compiler to make its Program
            assert (one["compilers"], one["started"]) == ([], []), name


def test_a_damaged_entry_is_left_where_it_is(warm, tmp_path):
    place = tmp_path / "damaged"
    shutil.copytree(warm[0], place, symlinks=True)
    damaged = [path for path in (place / "cache" / "entries").rglob("*") if path.is_file()]
    damaged += [path for folder in ("templates", "files", "calls") for path in (place / folder).rglob("*")]
    for path in damaged:
        if path.is_file():
            path.write_bytes(b"?" + path.read_bytes()[1:])
    told = work(place, "ro", ("program", "kernel", "memoized", "saved"))
    assert {name: one["changed"] for name, one in told.items() if one["changed"]} == {}
    assert {one["outcome"] for one in told.values()} == {False}
    assert "evicted, removed or damaged" in work(place, "frozen", ["program"])["program"]["outcome"]


@pytest.fixture
def source(tmp_path):
    header = tmp_path / "include" / "value.h"
    header.parent.mkdir()
    header.write_text("#define VALUE 1\n")
    options = {"arch": "sm_90", "name": "set.cu", "include_path": str(header.parent)}

    def compile_(cache, **changed):
        text = '#include "value.h"\nextern "C" __global__ void set(int *p) { *p = VALUE; }\n'
        text = changed.pop("text", text)
        return Program(text, "c++", options | changed).compiled("cubin", cache=cache)

    return header, compile_


@pytest.mark.parametrize(
    "wrap",
    [
        lambda path: FrozenProgramCache(FileStreamProgramCache(path)),
        FrozenProgramCache,
        lambda path: FileStreamProgramCache(path, mode="frozen"),
        lambda path: FrozenProgramCache(ProgramCacheStack([InMemoryProgramCache(), FileStreamProgramCache(path)])),
    ],
    ids=["store", "path", "mode", "stack"],
)
def test_the_error_says_why(source, tmp_path, wrap):
    header, compile_ = source
    kept = compile_(FileStreamProgramCache(tmp_path / "cache"))
    frozen = wrap(tmp_path / "cache")
    assert compile_(frozen).data == kept.data
    causes = {
        "option arch sm_90 → sm_80": {"arch": "sm_80"},
        "option std": {"std": "c++14"},
        "the source differs": {"text": '#include "value.h"\nextern "C" __global__ void set(int *p) { *p = -VALUE; }\n'},
        "first compile of this program": {"name": "other.cu"},
    }
    for cause, changed in causes.items():
        with pytest.raises(FrozenMissError) as caught:
            compile_(frozen, **changed)
        assert any(cause in reason for reason in caught.value.reasons), (cause, caught.value.reasons)
        assert str(caught.value).endswith(f"To fix it: {caught.value.command}")
    header.write_text("#define VALUE 2 // edited\n")
    with pytest.raises(FrozenMissError, match=r"header value\.h changed \(1 of 1 headers differ\)") as caught:
        compile_(frozen)
    assert caught.value.reasons == ("header value.h changed (1 of 1 headers differ)",)
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize("own", [False, True])
def test_the_command_mends_it(own, tmp_path):
    library, headers = None, []
    if own:
        library, headers = tmp_path / "library", [tmp_path / "include"]
        library.mkdir()
        headers[0].mkdir()
        (headers[0] / "value.h").write_text("#define VALUE 1\n")
        (library / "manifest.toml").write_text(
            "format = 1\n[kernels.axpby]\ntemplate = 'k.cu.j2'\ndescription = 'k'\nentry_points = ['k']\n"
            "[kernels.axpby.parameters]\ndtype = { type = 'dtype', default = 'float32', description = 'of elements' }\n"
        )
        (library / "k.cu.j2").write_text(
            '#include "value.h"\nextern "C" __global__ void k({{ dtype | ctype }} *p) { *p = VALUE; }\n'
        )
    service = CompileService(tmp_path / "cache", library=library, include_path=headers, mode="frozen")
    with pytest.raises(FrozenMissError) as caught:
        service.kernel("axpby", arch="sm_90", dtype="float32")
    assert caught.value.command.startswith("CUDA_PROGCACHE=rw cuda-progcache compile --kernel axpby")
    assert str(caught.value).endswith(f"To fix it: {caught.value.command}")
    command = caught.value.command.replace("cuda-progcache", f"{sys.executable} -m cuda_progcache", 1)
    subprocess.run(command, shell=True, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert service.kernel("axpby", arch="sm_90", dtype="float32").hit


def test_without_a_cache_a_frozen_run_compiles_nothing(source, monkeypatch):
    _, compile_ = source
    monkeypatch.setenv("CUDA_PROGCACHE", "frozen")
    with pytest.raises(FrozenMissError, match="no cache was given"):
        compile_(None)


def test_what_code_asks_for_wins(source, tmp_path, monkeypatch):
    _, compile_ = source
    monkeypatch.setenv("CUDA_PROGCACHE", "off")
    cache = FileStreamProgramCache(tmp_path / "cache", mode="rw")
    assert not compile_(cache).hit
    assert compile_(cache).hit
    assert not compile_(FileStreamProgramCache(tmp_path / "cache")).hit
    assert CompileService(tmp_path / "cache", mode="ro").mode == "ro"
    assert CompileService(cache).mode == "rw"
    assert CompileService(InMemoryProgramCache()).mode == "off"


@pytest.mark.parametrize("mode", ["ro", "off", "frozen"])
def test_what_an_owner_asks_for_is_refused(mode, tmp_path):
    key = b"k"
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        cache[key] = b"data"
    cache = FileStreamProgramCache(tmp_path / "cache", mode=mode)
    digest = next(FileStreamProgramCache(tmp_path / "cache").entries()).digest
    for change in (
        cache.clear,
        lambda: cache.remove(digest),
        lambda: cache.quarantine(digest),
        lambda: cache.__delitem__(key),
        lambda: cache.pin(key),
        lambda: cache.unpin(key),
        lambda: cache.verify(repair=True),
        lambda: cache.prune(max_size_bytes=0),
        lambda: cache.adopt(tmp_path / "x", key),
        lambda: cache.import_(tmp_path / "x"),
    ):
        with pytest.raises(ReadOnlyError, match=f"in mode '{mode}'"):
            change()
    cache[b"other"] = b"data"  # what cuda.core does after a compile
    assert len(FileStreamProgramCache(tmp_path / "cache")) == 1
    assert cache.settings["mode"] == mode


@pytest.mark.parametrize(("text", "nearest"), [("OF", "off"), ("readonly", None), ("freeze", "frozen")])
def test_a_mode_that_does_not_exist_is_told_of(text, nearest, tmp_path, monkeypatch):
    told = rf"={text!r} isn't a mode of the cache \(rw, ro, off, frozen\)"
    told += "$" if nearest is None else rf"; did you mean {nearest!r}\?$"
    with pytest.raises(ModeError, match=f"mode{told}"):
        FileStreamProgramCache(tmp_path / "cache", mode=text)
    monkeypatch.setenv("CUDA_PROGCACHE", text)
    with pytest.raises(ModeError, match=f"CUDA_PROGCACHE{told}"):
        CompileService(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mode", ["rw", "ro", "off", "frozen"])
def test_a_mode_is_no_directory(mode, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", mode)
    with pytest.raises(ModeError, match=f"set CUDA_PROGCACHE={mode} for the mode"):
        CompileService()
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", f"./{mode}")
    assert FileStreamProgramCache().directory == str(tmp_path / mode)
    assert os.listdir(tmp_path) == [mode]

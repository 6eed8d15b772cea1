# SPDX-License-Identifier: Apache-2.0
"""Lockfiles: written from recorded runs and manifests, compiled elsewhere, proved, and stale by an edit."""

import json
import os
import random
from xml.etree import ElementTree as ET

import pytest

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    FrozenMissError,
    KernelNotFoundError,
    LockError,
    OptionError,
    Program,
    ProgramOptions,
    link,
)
from cuda_progcache.service import junit
from cuda_progcache.service.lock import Lock, Locked

SOURCE = """\
#include "size.h"
// \u202e\x85 \u2028 é "quoted" \\ .
template <typename T> __global__ void fill(T *p) { p[threadIdx.x] = SIZE; }
"""
NAMES = ["fill<int>"]
IR = b"""\
target datalayout = "e-i64:64-i128:128-v16:16-v32:32-n16:32:64"
target triple = "nvptx64-nvidia-cuda"
define void @empty() { ret void }
!nvvm.annotations = !{!0}
!0 = !{void ()* @empty, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0, i32 3, i32 1}
"""


def use(cache, include):
    """What an application uses: a kernel, a linked one, a program from source, one of NVVM IR, and a link."""
    service = CompileService(cache)
    kernel = service.kernel("axpby", arch="sm_90", dtype="float16", block=128)
    linked = service.kernel("saxpy_nvvm", arch="sm_90")
    options = ProgramOptions(
        arch="sm_90", name="fill.cu", include_path=[str(include)], define_macro=[("A", "1"), "B"], std="c++17"
    )
    fill = Program(SOURCE, "c++", options).compiled("cubin", NAMES, cache=cache)
    ir = Program(IR, "nvvm", ProgramOptions(arch="sm_90", name="ir")).compiled("ptx", cache=cache)
    whole = link([fill], {"arch": "sm_90"}, cache=cache)
    return [kernel, linked, fill, ir, whole]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A project whose run was recorded, in a directory of its own."""
    folder = tmp_path_factory.mktemp("place")
    before = os.getcwd()
    os.chdir(folder)
    (folder / "include").mkdir()
    (folder / "include" / "size.h").write_text("#define SIZE 4\n")
    with FileStreamProgramCache(folder / "cache", mode="rw") as cache, CompileService(cache).record("run.json"):
        used = use(cache, folder / "include")
    yield folder, used
    os.chdir(before)


@pytest.fixture
def lock(place):
    return CompileService(place[0] / "cache").lock([place[0] / "run.json"])


def test_a_lock_of_a_run_has_what_it_used(place, lock):
    _, used = place
    assert {program.key for program in lock.programs} == {done.digest for done in used}
    assert {name for name, _ in lock.toolchain} == {"nvrtc", "nvrtc-builtins", "nvvm", "nvJitLink"}
    assert [program.kernel or program.name for program in lock.programs] == sorted(
        (program.kernel or program.name for program in lock.programs),
        key=lambda name: (name not in {"axpby", "saxpy_nvvm"}, name),
    )


def test_it_is_stable_and_has_a_program_a_line(place, lock, tmp_path):
    lock.write(tmp_path / "one.lock")
    text = (tmp_path / "one.lock").read_text()
    assert Lock.read(tmp_path / "one.lock") == lock
    assert Lock.read(tmp_path / "one.lock").text() == text
    lines = (place[0] / "run.json").read_text().split("\n")
    random.Random(1).shuffle(lines)  # as other processes would have written it
    (tmp_path / "other.json").write_text("\n".join([*lines, *lines]))
    again = CompileService(place[0] / "cache").lock([tmp_path / "other.json", place[0] / "run.json"])
    assert again.text() == text
    assert sum(line.startswith(('{"kernel"', '{"name": "fill')) for line in text.splitlines()) == 3
    assert all(line.isprintable() for line in text.splitlines())
    json.loads(text)
    before = (tmp_path / "one.lock").stat().st_ino
    lock.write(tmp_path / "one.lock")
    assert (tmp_path / "one.lock").stat().st_ino == before


def test_prewarmed_elsewhere_everything_is_there(place, lock, tmp_path):
    folder, used = place
    service = CompileService(tmp_path / "cache", mode="rw")
    dry = service.prewarm(lock=lock, dry_run=True)
    assert {item.status for item in dry.items} == {"missing", "failed"}
    assert not (tmp_path / "cache" / "latest").exists()
    report = service.prewarm(lock=lock, jobs=2)
    by_name = {item.kernel: item for item in report.items}
    linked = used[-1]
    assert by_name.pop(linked.name if linked.name != "fill.cu" else "").status == "failed"
    assert {item.status for item in by_name.values()} <= {"compiled"}
    assert {item.digest for item in by_name.values()} == {done.digest for done in used[:-1]}
    proof = service.check(lock)
    assert not proof.ok
    assert {program.status for program in proof.programs} == {"hit", "missing"}
    assert proof.count("hit") == 4
    # And frozen, as the application asks.
    with pytest.raises(FrozenMissError, match="never linked"):
        use(FileStreamProgramCache(tmp_path / "cache", mode="frozen"), folder / "include")
    again = service.prewarm(lock=lock)
    assert (again.hits, again.compiled) == (4, 0)


def test_what_is_stale_says_why_in_the_words_of_a_frozen_run(place, lock):
    folder, _ = place
    header = folder / "include" / "size.h"
    service = CompileService(folder / "cache")
    assert service.check(lock).ok
    header.write_text("#define SIZE 5 // edited\n")
    try:
        proof = service.check(lock)
        stale = [program for program in proof.programs if program.status != "hit"]
        with pytest.raises(FrozenMissError) as caught:
            use(FileStreamProgramCache(folder / "cache", mode="frozen"), folder / "include")
    finally:
        header.write_text("#define SIZE 4\n")
    assert [program.title for program in stale] == ["fill.cu sm_90"]
    assert stale[0].reasons == caught.value.reasons == ("header size.h changed (1 of 1 headers differ)",)
    assert proof.unused == ()  # the link, which is there, was made of its old entry


def test_a_hit_of_another_key_is_stale(place, lock):
    folder, _ = place
    program = next(program for program in lock.programs if program.kernel == "axpby")
    moved = program._replace(key="0" * 64, flags=("-arch=sm_90", "--std=c++14"), headers="f" * 64)
    proof = CompileService(folder / "cache").check(Lock((moved,)))
    assert proof.programs[0].status == "stale"
    told = "options differ from the locked ones: --std=c++17 is new, --std=c++14 is gone"
    assert proof.programs[0].reasons == (told, "headers differ from the locked ones")
    assert len(proof.unused) == len(FileStreamProgramCache(folder / "cache")) - 1


def test_a_manifest_is_locked_and_checked(place, tmp_path):
    service = CompileService(place[0] / "cache")
    lock = service.lock(archs=["sm_90", "sm_80"], kernels=["axpby"])
    assert {program.arch for program in lock.programs} == {"sm_80", "sm_90"}
    assert not any(program.key for program in lock.programs if program.arch == "sm_80")
    proof = service.check(archs=["sm_80"], kernels=["axpby"])
    assert {program.status for program in proof.programs} <= {"missing", "stale"}
    both = service.lock([place[0] / "run.json"], archs=["sm_90"], kernels=["axpby"])
    assert len(both.programs) == len({program.identity for program in both.programs})


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is not a lockfile"),
        ("[]", "is not a lockfile"),
        ('{"format": 2}', "format 2"),
        ('{"format": 1, "toolchain": [], "programs": [{"kernel": "a"}], "sources": {}}', "needs a kernel or a name"),
        ('{"format": 1, "toolchain": [], "programs": [{"colour": 1}], "sources": {}}', "colour"),
    ],
)
def test_what_is_no_lockfile_is_refused(text, why, tmp_path):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(LockError, match=why):
        Lock.read(tmp_path / "lock")


@pytest.mark.parametrize("more", [{"archs": ["sm_90"]}, {"kernels": ["axpby"]}])
@pytest.mark.parametrize("how", ["prewarm", "check"])
def test_a_lockfile_says_itself_what_is_needed(place, lock, how, more):
    service = CompileService(place[0] / "cache")
    if how == "prewarm" and "kernels" in more:
        assert [item.status for item in service.prewarm(lock=lock, **more).items] == ["hit"]
        with pytest.raises(KernelNotFoundError, match="no program of the kernel 'softmax'"):
            service.prewarm(lock=lock, kernels=["axpby", "softmax"])
        return
    with pytest.raises(OptionError, match=f"{'kernels' if 'kernels' in more else 'architectures'} can't be given"):
        getattr(service, how)(lock=lock, **more)


def test_a_kernel_that_is_gone_has_failed(place):
    lock = Lock((Locked("axpbyy", {}, arch="sm_90"), Locked("axpby", {"block": 33}, arch="sm_90")))
    proof = CompileService(place[0] / "cache").check(lock)
    assert [program.status for program in proof.programs] == ["failed", "failed"]
    assert "did you mean 'axpby'" in proof.programs[0].reasons[0]


def test_a_junit_report_is_read_by_others(tmp_path):
    cases = [
        junit.Case("a", "a x=1", 0.5),
        junit.Case("a", "a \x1b[2J", failure="line one\nline two"),
        junit.Case("b", "b", skipped="late"),
    ]
    junit.write(tmp_path / "report.xml", "some", cases)
    (suite,) = ET.parse(tmp_path / "report.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("3", "1", "1")
    assert suite[1][0].get("message") == "line one"

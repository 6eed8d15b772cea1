# SPDX-License-Identifier: Apache-2.0
"""Batches with heavy front ends: worker processes, which precompile what is shared, and end with the batch."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, InMemoryProgramCache, subscribe
from cuda_progcache.service.worker import Worker

MANY = 40

MANIFEST = """
format = 1
[kernels.heavy]
template = "heavy.cu.j2"
entry_points = ["heavy"]
options = {{ include_path = {include!r} }}
[kernels.heavy.parameters]
value = {{ type = "int", default = 0 }}
{variants}

[kernels.light]
template = "light.cu.j2"
entry_points = ["light"]
"""


@pytest.fixture
def library_dir(tmp_path):
    """A library over forty headers: many enough to be called heavy, and compiled in no time."""
    include = tmp_path / "include"
    include.mkdir()
    for n in range(MANY):
        (include / f"h{n}.h").write_text(f"inline __device__ int h{n}() {{ return {n}; }}\n")
    (include / "all.h").write_text("".join(f"#include <h{n}.h>\n" for n in range(MANY)))
    for path in include.iterdir():
        os.utime(path, (1, 1))
    folder = tmp_path / "library"
    folder.mkdir()
    variants = "".join(f"[[kernels.heavy.variants]]\nvalue = {n}\n" for n in range(6))
    (folder / "manifest.toml").write_text(MANIFEST.format(include=str(include), variants=variants))
    (folder / "heavy.cu.j2").write_text(
        '#include <all.h>\nextern "C" __global__ void heavy(int *a) { *a = h7() + {{ value }}; }\n'
    )
    (folder / "light.cu.j2").write_text('extern "C" __global__ void light(int *a) { *a = 1; }\n')
    return folder


@pytest.fixture
def service(tmp_path, library_dir):
    return CompileService(FileStreamProgramCache(tmp_path / "cache", durability="none"), library=library_dir)


def children():
    listed = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True, text=True, check=False
    ).stdout
    return [line for line in listed.splitlines() if "service.worker" in line]


def worker(service):
    return Worker({"compiler": {"cache": service.cache.settings}, "library": service.library.settings})


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_comes_out_is_what_one_by_one_gives(service, library_dir, jobs):
    report = service.prewarm(archs=["sm_80", "sm_90"], jobs=jobs)
    assert (report.compiled, report.failed) == (14, 0)
    plain = CompileService(InMemoryProgramCache(), library=library_dir)
    for item in report.items:
        made = plain.kernel(item.kernel, arch=item.arch, **item.variant)
        assert item.digest == made.digest
        found = service.kernel(item.kernel, arch=item.arch, **item.variant)
        assert found.hit
        assert (found.data, found.log) == (made.data, made.log)
        for field in ("components", "headers", "manifest"):
            assert found.record.get(field) == made.record.get(field)
    assert not children()


def test_only_heavy_ones_get_processes(service, monkeypatch):
    started = []
    original = Worker.__init__
    monkeypatch.setattr(Worker, "__init__", lambda self, setup: (started.append(setup), original(self, setup))[1])
    assert service.prewarm(archs=["sm_80", "sm_90"], kernels=["light"], jobs=2).compiled == 2
    assert not started
    assert service.prewarm(archs=["sm_80"], kernels=["heavy"], jobs=2).compiled == 6
    assert 1 <= len(started) <= 2
    assert all(setup["scratch"].startswith(tempfile.gettempdir()) for setup in started)
    assert not any(os.path.exists(setup["scratch"]) for setup in started)


def test_a_worker_precompiles_when_it_is_told_to(service):
    made = worker(service)
    try:
        answers = [
            made.run({"kernel": "heavy", "variant": {"value": n}, "arch": "sm_80", "precompile": n > 0})
            for n in range(4)
        ]
    finally:
        made.close()
    assert [answer["precompiled"] for answer in answers] == [False, False, True, True]


def test_the_folder_it_is_started_in_brings_no_modules(service, tmp_path, monkeypatch):
    """``python -m`` would look there first."""
    (tmp_path / "json.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    made = worker(service)
    try:
        assert made.run({"kernel": "light", "variant": {}, "arch": "sm_80"})["digest"]
    finally:
        made.close()


def test_an_edited_header_is_seen_in_the_middle_of_a_batch(service, library_dir, tmp_path):
    made = worker(service)
    job = {"kernel": "heavy", "variant": {"value": 1}, "arch": "sm_80", "precompile": True}
    try:
        for n in range(2):
            made.run(job | {"variant": {"value": n}})
        (tmp_path / "include" / "h7.h").write_text("inline __device__ int h7() { return 777; }\n")
        answer = made.run(job)
    finally:
        made.close()
    assert (answer["hit"], answer["precompiled"]) == (False, False)
    fresh = CompileService(InMemoryProgramCache(), library=library_dir).kernel("heavy", arch="sm_80", value=1)
    assert service.cache.info(answer["digest"]).path.read_bytes() == fresh.data
    assert answer["digest"] == fresh.digest


def test_a_worker_that_dies_fails_its_job_and_no_other(service, monkeypatch):
    original = Worker.run

    def killed_for_three(self, job):
        if job["variant"] == {"value": 3}:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        return original(self, job)

    monkeypatch.setattr(Worker, "run", killed_for_three)
    report = service.prewarm(archs=["sm_80", "sm_90"], jobs=2)
    assert [i.variant for i in report.items if i.status == "failed"] == [{"value": 3}] * 2
    assert report.compiled == 12
    assert all("signal 9" in i.error for i in report.items if i.status == "failed")


def test_the_advice_after_a_workers_death_compiles_that_very_program(service, tmp_path, monkeypatch):
    """It is typed into another shell: kernel, variant, architecture, manifest and cache are all in it."""
    original = Worker.run

    def killed(self, job):
        self._process.kill()
        self._process.wait()
        return original(self, job)

    monkeypatch.setattr(Worker, "run", killed)
    report = service.prewarm(archs=["sm_80"], kernels=["heavy"], jobs=2)
    monkeypatch.undo()
    assert report.failed == 6
    item = report.items[3]
    _, advice = item.error.split("compile it alone to see why: ")
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "CUDA_PROGCACHE_DIR": str(tmp_path / "another")}
    command = [sys.executable, "-m", "cuda_progcache", *shlex.split(advice)[1:]]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    made = service.kernel("heavy", arch="sm_80", **item.variant)
    assert made.hit
    assert len(service.cache) == 1


@pytest.mark.parametrize("when", ["on_start", "on_progress"])
def test_an_interrupted_prewarm_leaves_no_worker_behind(service, when):
    def stop(item, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        service.prewarm(archs=["sm_80"], jobs=2, **{when: stop})
    assert not children()


@pytest.mark.parametrize(
    ("number", "early"),
    [
        *((signal.SIGINT, early) for early in (True, False)),
        *((signal.SIGTERM, early) for early in (True, False)),
        (
            signal.SIGKILL,
            False,
        ),  # killed before it has a worker, it leaves an empty folder: nobody is there to remove it
    ],
)
def test_a_signal_leaves_no_traceback_and_nothing_behind(library_dir, tmp_path, number, early):
    """To the whole group, as a terminal or a CI server sends it; SIGKILL to the command alone."""
    variants = "".join(f"[[kernels.heavy.variants]]\nvalue = {n}\n" for n in range(100))
    text = MANIFEST.format(include=str(tmp_path / "include"), variants=variants)
    (library_dir / "manifest.toml").write_text(text)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-m", "cuda_progcache", "prewarm", "--manifest", str(library_dir), "--jobs", "2"]
    environment = {**os.environ, "TMPDIR": str(temporary), "CUDA_PROGCACHE_DIR": str(tmp_path / "kept")}
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True, "env": environment}
    with subprocess.Popen([*command, "--kernel", "heavy"], text=True, **given) as running:
        # It tells of each program, and waits where nobody reads that: it doesn't end before the signal.
        fcntl.fcntl(running.stderr, fcntl.F_SETPIPE_SZ, 4096)
        if early:
            wait_for(lambda: list(temporary.glob("progcache-*")) or running.poll() is not None)  # they start
        else:
            running.stderr.readline()
        (os.kill if number == signal.SIGKILL else os.killpg)(running.pid, number)
        said = running.stderr.read()  # to the end: until no worker is there any more
    assert "Traceback" not in said
    assert running.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    wait_for(lambda: not os.listdir(temporary))
    assert os.listdir(temporary) == []


def wait_for(condition):
    latest = time.monotonic() + 600
    while not condition() and time.monotonic() < latest:
        time.sleep(0.002)


def test_what_happens_in_workers_is_heard(service):
    heard = []
    unsubscribe = subscribe(heard.append)
    try:
        service.prewarm(archs=["sm_80"], kernels=["heavy"], jobs=2)
    finally:
        unsubscribe()
    for kind in ("miss", "compile", "store"):
        events = [event for event in heard if event.kind == kind]
        assert len(events) == 6
        assert {event.name for event in events} == {"heavy.cu"}
    assert all(event.reasons for event in heard if event.kind == "miss")


def test_workers_refusals_are_remembered(service, library_dir):
    (library_dir / "heavy.cu.j2").write_text("#include <all.h>\n__device__ int x = nope + {{ value }};\n")
    keeping = CompileService(service.cache, library=library_dir, keep_failures=3600.0)
    for _ in range(2):
        report = keeping.prewarm(archs=["sm_80"], kernels=["heavy"], jobs=2)
        assert report.failed == 6
        assert "heavy.cu.j2:2: error" in report.items[0].error
    assert len(os.listdir(service.cache.path / "failures")) == 6

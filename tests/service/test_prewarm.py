# SPDX-License-Identifier: Apache-2.0
"""Prewarming: everything that was listed lies in the cache afterwards, or the report says what doesn't."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, InMemoryProgramCache
from cuda_progcache.errors import ArchError, KernelNotFoundError, WorkerDiedError
from cuda_progcache.service.manifest import KernelLibrary
from cuda_progcache.service.worker import Worker
from cuda_progcache.templates import BytecodeCache

ARCHS = ["sm_80", "sm_90"]


def test_twice(service):
    first = service.prewarm(archs=ARCHS, jobs=2)
    assert (first.ok, first.compiled, first.hits, first.failed) == (True, 10, 0, 0)
    assert first.compile_seconds > 0
    assert first.saved_seconds == 0
    counted = service.cache.stats().all_time  # each was looked up here; it and its parts by the worker that made them
    parts = len(service.cache)
    assert (counted.stored, counted.hits, counted.misses) == (parts, 0, 10 + parts)
    again = service.prewarm(archs=ARCHS, jobs=2)
    assert (again.ok, again.compiled, again.hits) == (True, 0, 10)
    assert again.saved_seconds > 0
    assert service.cache.stats().all_time._replace(hits=0) == counted
    assert again.bytes == first.bytes == sum(item.size for item in first.items)
    assert [i.digest for i in again.items] == [i.digest for i in first.items]
    for item in first.items:
        assert service.cache.info(item.digest).size == item.size
        assert service.kernel(item.kernel, arch=item.arch, **item.variant).hit


def test_the_report_is_in_the_manifests_order(service):
    report = service.prewarm(archs=ARCHS, jobs=2)
    kernels = ["fill", "fill", "fill", "fill", "typed", "typed", "pair", "pair", "ir", "ir"]
    assert [i.kernel for i in report.items] == kernels
    assert [i.arch for i in report.items] == ARCHS * 5
    assert [i.variant for i in report.items[:4]] == [{}, {}, {"dtype": "int32"}, {"dtype": "int32"}]
    written = json.loads(json.dumps(report.to_dict()))
    assert written["compiled"] == 10
    assert written["items"][2]["variant"] == {"dtype": "int32"}


def test_progress_comes_in_the_calling_thread(service):
    seen = []
    service.prewarm(
        archs=ARCHS, jobs=2, on_progress=lambda item, done, total: seen.append((done, total, threading.get_ident()))
    )
    assert seen == [(n, 10, threading.get_ident()) for n in range(1, 11)]


def test_a_run_over_a_cache_that_is_only_read_is_not_said_to_be_recorded(service, library_dir):
    made = service.prewarm(archs=["sm_80"])
    again = CompileService(service.cache.path, library=library_dir, mode="ro").prewarm(archs=["sm_80"])
    assert (again.hits, again.failed, again.call) == (made.compiled, 0, None)
    assert service.prewarm(archs=["sm_80"]).call == made.call is not None


def test_starts_are_told_too(service):
    told = []
    service.prewarm(
        archs=["sm_80"],
        jobs=2,
        on_start=lambda item, done, total: told.append((item.kernel, item.status, total, threading.get_ident())),
        on_progress=lambda item, done, total: told.append((item.kernel, item.status, total, threading.get_ident())),
    )
    assert len(told) == 10
    for kernel in ("fill", "typed", "pair", "ir"):
        statuses = [status for name, status, _, _ in told if name == kernel]
        assert statuses[0] == "compiling"
        assert sorted(set(statuses)) == ["compiled", "compiling"]
    assert {(total, thread) for _, _, total, thread in told} == {(5, threading.get_ident())}
    told.clear()
    service.prewarm(archs=["sm_80"], on_start=lambda *given: told.append(given))
    assert not told, "hits don't start"


@pytest.mark.parametrize("jobs", [1, 2])
def test_compiled_templates_are_kept_where_the_library_says(tmp_path, library_dir, jobs):
    kept = BytecodeCache(tmp_path / "templates")
    library = KernelLibrary(library_dir, bytecode_cache=kept, line_directives=True)
    service = CompileService(FileStreamProgramCache(tmp_path / "cache", durability="none"), library=library)
    assert service.prewarm(archs=["sm_80"], kernels=["fill", "typed"], jobs=jobs).compiled == 3
    assert kept.stats()["file_count"] == 4  # the manifest, two templates, and a name that is one
    again = CompileService(service.cache, library=KernelLibrary(**library.settings))
    assert again.kernel("fill", arch="sm_80").hit  # the workers wrote #line, too


@pytest.mark.parametrize("jobs", [1, 2])
def test_in_memory_caches_are_filled_by_threads(library_dir, jobs):
    service = CompileService(InMemoryProgramCache(), library=library_dir)
    assert service.prewarm(archs=["sm_80"], jobs=jobs).compiled == 5
    assert service.kernel("typed", arch="sm_80").hit


def test_failures_are_reported_and_the_rest_is_done(service, library_dir):
    (library_dir / "typed.cu.j2").write_text("int x = {{ dtype }};")
    (library_dir / "ir.ll.j2").write_text("{{ nope }}")
    report = service.prewarm(archs=ARCHS, jobs=2)
    assert not report.ok
    assert (report.compiled, report.failed) == (6, 4)
    errors = {i.kernel: i.error for i in report.items if i.status == "failed"}
    assert "typed.cu.j2:1: error" in errors["typed"]
    assert "nope" in errors["ir"]


def test_what_a_kernel_cannot_run_on_is_skipped(service):
    report = service.prewarm(archs=["sm_75"], jobs=1)
    skipped = [i for i in report.items if i.status == "skipped"]
    assert [i.kernel for i in skipped] == ["typed"]
    assert "sm_80 or later" in skipped[0].error
    assert (report.skipped, report.compiled, report.ok) == (1, 4, True)


def test_only_some_kernels_and_another_library(service, tmp_path):
    assert service.prewarm(archs=["sm_80"], kernels=["pair", "ir"]).compiled == 2
    other = CompileService(service.cache)
    assert other.prewarm(service.library.path, archs=["sm_80"], kernels=["pair"]).hits == 1


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"archs": []}, ArchError, "no architecture"),
        ({"archs": ["sm_80", "sm_999"]}, ArchError, "sm_999"),
        ({"archs": ["sm_80"], "kernels": ["fil"]}, KernelNotFoundError, "fill"),
        ({"archs": ["sm_80"], "kernels": []}, KernelNotFoundError, "no kernel"),
        ({"archs": ["sm_80"], "jobs": 0}, ValueError, "at least 1"),
    ],
    ids=str,
)
def test_wrong_input_before_any_compile(service, given, error, words):
    with pytest.raises(error, match=words):
        service.prewarm(**given)
    assert len(service.cache) == 0


def test_what_could_not_be_stored_is_a_failure(service, library_dir):
    (library_dir / "typed.cu.j2").write_text(
        "__device__ const char *now = __TIME__;\ntemplate <class T> __global__ void typed(T *a) {}\n"
    )
    path = library_dir / "manifest.toml"
    path.write_text(path.read_text().replace("{{ dtype | ctype }}", "float"))
    report = CompileService(service.cache, library=library_dir).prewarm(archs=["sm_80"], kernels=["typed"], jobs=1)
    assert report.failed == 1
    assert "__TIME__" in report.items[0].error


def test_worker_protocol(service):
    worker = Worker({"compiler": {"cache": service.cache.settings}, "library": service.library.settings})
    try:
        answer = worker.run({"kernel": "fill", "variant": {}, "arch": "sm_80"})
        assert (answer["hit"], len(answer["digest"])) == (False, 64)
        assert "no kernel 'gone'" in worker.run({"kernel": "gone", "variant": {}, "arch": "sm_80"})["error"]
    finally:
        worker.close()
    with pytest.raises(WorkerDiedError):
        worker.run({"kernel": "fill", "variant": {}, "arch": "sm_80"})


def test_a_script_without_a_main_guard_may_prewarm(tmp_path, library_dir):
    """Worker processes don't run the caller's script again, as multiprocessing's spawn would."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(f"""
        from cuda_progcache import CompileService
        print("started")
        service = CompileService({str(tmp_path / "cache")!r}, library={str(library_dir)!r})
        report = service.prewarm(archs=["sm_80"], jobs=2)
        print(report.compiled)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["started", "5"]


def test_entries_written_by_workers_are_durable_as_the_cache_asks(tmp_path, library_dir):
    cache = FileStreamProgramCache(tmp_path / "capped", durability="none", max_size_bytes=1 << 30)
    assert cache.settings == {
        "path": str(tmp_path / "capped"), "max_size_bytes": 1 << 30, "durability": "none", "shared": False,
    }  # fmt: skip
    assert CompileService(cache, library=library_dir).prewarm(archs=["sm_80"], jobs=2).ok


@pytest.mark.parametrize("where", ["render", "look_up"])
def test_one_variants_trouble_does_not_kill_a_prewarm(service, monkeypatch, where):
    """Not even an error that isn't ours: a defect, or trouble of the file system."""
    from cuda_progcache.service.kernel_unit import KernelUnit

    owner, name = (KernelLibrary, "render") if where == "render" else (KernelUnit, "look_up")
    original = getattr(owner, name)

    def failing(self, *arguments, **given):
        if (
            given.get("dtype") == "int32"
            or getattr(getattr(self, "rendered", None), "params", {}).get("dtype") == "int32"
        ):
            raise RuntimeError("out of luck")
        return original(self, *arguments, **given)

    monkeypatch.setattr(owner, name, failing)
    report = service.prewarm(archs=["sm_80"], jobs=2)
    assert [(i.kernel, i.error) for i in report.items if i.status == "failed"] == [
        ("fill", "RuntimeError: out of luck")
    ]
    assert report.compiled == 4


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_that_is_not_ours_fails_its_job_alone(service, monkeypatch, jobs):
    from cuda_progcache.service.cached_compiler import CachedCompiler

    original = CachedCompiler.compile_kernel

    def failing(self, unit, *arguments):
        if unit.rendered.spec.name == "pair":
            raise ValueError("what can't be")
        return original(self, unit, *arguments)

    monkeypatch.setattr(CachedCompiler, "compile_kernel", failing)
    report = service.prewarm(archs=["sm_80"], jobs=jobs)
    assert [i.error for i in report.items if i.status == "failed"] == ["ValueError: what can't be"]
    assert report.compiled == 4


def test_virtual_architectures_are_refused_before_any_compile(service):
    with pytest.raises(ArchError, match="compute_90"):
        service.prewarm(archs=["sm_80", "compute_90"])
    assert len(service.cache) == 0

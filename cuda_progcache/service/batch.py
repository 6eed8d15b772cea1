# SPDX-License-Identifier: Apache-2.0
"""Batches of compiles, run by threads or worker processes as :mod:`cuda_progcache.service.plan` decides."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cuda_progcache import events
from cuda_progcache._util.running import asked_by, here
from cuda_progcache._util.scratch import ScratchFolder
from cuda_progcache._util.who import who
from cuda_progcache.errors import WorkerDiedError
from cuda_progcache.service.plan import Load, Plan
from cuda_progcache.service.wanted import Job
from cuda_progcache.service.worker import Worker, told_of, trouble

if TYPE_CHECKING:
    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.manifest import KernelLibrary

Answer = Mapping[str, Any]
"""``{"seconds"}`` and either ``{"error"}`` or ``{"hit", "size", "digest", "reason", "duration"}``."""


@dataclass(frozen=True)
class Batch:
    """Jobs to compile into a compiler's cache.

    Attributes
    ----------
    compiler : CachedCompiler
    library : KernelLibrary
        The library that the jobs' kernels belong to.
    jobs : sequence of Job
    workers : int
        How many jobs are compiled at once.
    began, ended : callable
        Called when a job starts, and when it ends with its answer; both in the thread that called
        :func:`compile_batch`. An exception from either ends the batch.
    """

    compiler: CachedCompiler
    library: KernelLibrary
    jobs: Sequence[Job]
    workers: int
    began: Callable[[Job], None]
    ended: Callable[[Job, Answer], None]


def compile_batch(batch: Batch) -> None:
    """Compile all jobs of a batch on the current machine."""
    compiler, workers = batch.compiler, batch.workers
    plan = Plan(batch.jobs, loads())
    settings = compiler.settings
    pool = _WorkerPool(settings, batch.library) if settings is not None and plan.wants_processes(workers) else None
    messages: queue.SimpleQueue[Job | tuple[Job, Answer] | BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        prefix = None
        executor: _InThisProcess | _InWorker = _InThisProcess(compiler) if pool is None else _InWorker(pool)
        try:
            while (step := plan.take(prefix)) is not None:
                prefix = step.prefix or prefix
                messages.put(step.job)
                messages.put((step.job, executor.run(step.job, precompile=step.precompile)))
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that called compile_batch
            messages.put(error)
        finally:
            messages.put(None)

    threads = [threading.Thread(target=here(work), name=f"prewarm-{n}") for n in range(workers)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        working = len(started)
        while working:
            message = messages.get()
            if message is None:
                working -= 1
            elif isinstance(message, BaseException):
                raise message
            elif isinstance(message, Job):
                batch.began(message)
            else:
                batch.ended(*message)
    finally:
        plan.cancel()
        if pool is not None:
            pool.close()
        for thread in started:
            thread.join()


def loads() -> Callable[[Job], Load]:
    """Return a function that estimates a job's front-end load; a job of several modules is heavy if one of them is."""
    from cuda_progcache.compile.precompiled import prefix_id, reaches_many_headers

    cwd = os.getcwd()
    known: dict[str, bool] = {}

    def load_of(job: Job) -> Load:
        load = Load(heavy=False)
        for inputs in job.unit.compiles:
            prefix = prefix_id(inputs, cwd)
            heavy = None if prefix is None else known.get(prefix)
            if heavy is None:
                heavy = reaches_many_headers(inputs, inputs.search_path(cwd))
            if prefix is not None:
                known[prefix] = heavy
            if heavy:
                load = Load(heavy, prefix)
        return load

    return load_of


class _InThisProcess:
    """Compiles jobs in the calling thread. It precompiles nothing, since precompiled headers would stay in memory."""

    def __init__(self, compiler: CachedCompiler) -> None:
        self._compiler = compiler

    def run(self, job: Job, *, precompile: bool) -> Answer:  # noqa: ARG002 - see the class
        started = time.perf_counter()
        try:
            answer = told_of(self._compiler.compile_kernel(job.unit))
        except Exception as error:  # noqa: BLE001 - a job that fails doesn't end the batch
            answer = {"error": trouble(error)}
        return {**answer, "seconds": time.perf_counter() - started}


class _WorkerPool:
    """The worker processes of a batch. They end with the batch, and their precompiled headers go with them."""

    def __init__(self, compiler: Mapping[str, Any], library: KernelLibrary) -> None:
        self._scratch = ScratchFolder("progcache-batch-")
        self._setup = {
            "compiler": compiler,
            "library": library.settings,
            "scratch": self._scratch.path,
            "asked_by": asked_by(),
            "who": who(),
            "events": events.wanted("hit"),
        }
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._closed = False

    def start(self) -> Worker:
        with self._lock:
            if self._closed:
                raise WorkerDiedError("the batch was cancelled")
            worker = Worker(self._setup)
            self._workers.append(worker)
            return worker

    def close(self) -> None:
        with self._lock:
            self._closed = True
        for worker in self._workers:
            worker.close()
        self._scratch.close()


class _InWorker:
    """Compiles jobs in a worker process, started with the first job; one that dies is replaced for the next job."""

    def __init__(self, pool: _WorkerPool) -> None:
        self._pool = pool
        self._worker: Worker | None = None

    def run(self, job: Job, *, precompile: bool) -> Answer:
        started = time.perf_counter()
        try:
            if self._worker is None:
                self._worker = self._pool.start()
            answer = self._worker.run({**job.wanted.message(), "precompile": precompile})
        except WorkerDiedError as error:
            self._worker = None
            return {"error": str(error), "seconds": time.perf_counter() - started}
        return relay(answer)


def relay(answer: Answer) -> Answer:
    """Emit, in the current process, the events of a job that ran in another; return its answer."""
    for kind, name, target_type, arch, digest, reasons, seconds in answer.get("events") or ():
        events.relay(events.Event(kind, name, target_type, arch, digest, tuple(reasons), seconds))
    return answer

# SPDX-License-Identifier: Apache-2.0
"""Batches of compiles on an executor: a process pool, or a cluster whose workers publish to a shared tier.

The messages to workers are small and contain no secrets: the names of the programs and the compile settings. Workers
return keys and times; the programs go to the shared cache. Programs that begin with the same headers go to one worker
in a row, so that it precompiles these headers once.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache import events
from cuda_progcache._util.running import asked_by
from cuda_progcache._util.warning import warn
from cuda_progcache._util.who import who
from cuda_progcache.errors import ProgCacheError, ProgCacheWarning, ToolchainError, WorkerDiedError
from cuda_progcache.service.batch import Answer, Batch, compile_batch, loads, relay
from cuda_progcache.service.plan import WORTH_PRECOMPILING, Load
from cuda_progcache.service.worker import Worker, trouble

if TYPE_CHECKING:
    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.service.wanted import Job
    from cuda_progcache.store.base import ProgramCacheResource

#: The most programs in one task: programs that share precompiled headers, and light programs.
_MOST_ALIKE, _MOST_LIGHT = 16, 8
#: The number of tasks from which a scheduler, at a millisecond per task, would become the bottleneck.
_MANY = 5_000


class Task(NamedTuple):
    """The jobs that one worker gets at once.

    Attributes
    ----------
    jobs : tuple of Job
        Compiled one after the other.
    precompile : bool
        Whether to precompile the headers that all of them begin with.
    """

    jobs: tuple[Job, ...]
    precompile: bool = False


def tasks(jobs: Sequence[Job], load_of: Callable[[Job], Load], workers: int) -> list[Task]:
    """Divide jobs into tasks: jobs with the same headers together, heavy jobs first, no task so large that others wait.

    Parameters
    ----------
    jobs : sequence of Job
    load_of : callable
        Returns the front-end load of a job.
    workers : int
        The number of workers.
    """
    groups: dict[str, list[Job]] = {}
    heavy: list[Job] = []
    light: list[Job] = []
    for job in jobs:
        load = load_of(job)
        if load.heavy and load.prefix is not None:
            groups.setdefault(load.prefix, []).append(job)
        else:
            (heavy if load.heavy else light).append(job)
    made: list[Task] = []
    for group in sorted(groups.values(), key=len, reverse=True):
        if len(group) < WORTH_PRECOMPILING:
            heavy += group
            continue
        size = min(max(-(-len(group) // workers), WORTH_PRECOMPILING), _MOST_ALIKE)
        made += [Task(tuple(portion), precompile=True) for portion in _portions(group, size)]
    made += [Task((job,)) for job in heavy]
    # Small tasks, so that no worker is waited for at the end; larger ones for very many jobs, to spare the scheduler.
    size = min(max(len(light) // (4 * workers), len(light) // _MANY, 1), _MOST_LIGHT)
    return made + [Task(tuple(portion)) for portion in _portions(light, size)]


def _portions(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def compile_on(executor: Executor, batch: Batch) -> None:
    """Compile all jobs of a batch on an executor.

    If a worker dies, the jobs of its task are submitted again one by one, so that a job that kills its worker fails
    alone. If the executor itself breaks, as a process pool does when one of its processes is killed, the remaining jobs
    are compiled in the current process.

    Parameters
    ----------
    executor : Executor
        Its workers must be able to import this package and have the library's folder at the same path.
    batch : Batch
        The compiler's cache must have a directory or tiers that the workers share. ``workers`` is the number of the
        executor's workers; twice as many tasks are submitted at a time.

    Raises
    ------
    ProgCacheError
        If the cache is in memory only, where workers can't store programs.
    """
    compiler, workers = batch.compiler, batch.workers
    setup = _setup(compiler, batch.library)
    waiting = deque(tasks(batch.jobs, loads(), workers))
    out: dict[Future[list[Answer]], Task] = {}
    again: set[int] = set()
    try:
        while waiting or out:
            while waiting and len(out) < 2 * workers:
                task = waiting[0]
                messages = [{**job.wanted.message(), "precompile": task.precompile} for job in task.jobs]
                out[executor.submit(work, setup, messages)] = task
                waiting.popleft()  # only now: submit() raises if the pool is broken, and the task must not be lost
                for job in task.jobs:
                    if job.index not in again:
                        batch.began(job)
            for future in wait(out, return_when=FIRST_COMPLETED).done:
                task = out.pop(future)
                try:
                    answers = future.result()
                except BrokenExecutor:
                    waiting.appendleft(task)
                    raise
                except (Exception, CancelledError) as error:  # noqa: BLE001 - clusters raise their own if a worker dies
                    if len(task.jobs) > 1 or task.jobs[0].index not in again:
                        again.update(job.index for job in task.jobs)
                        waiting.extend(Task((job,)) for job in task.jobs)
                        continue
                    answers = [{"error": f"no worker could compile it: {trouble(error)}", "seconds": 0.0}]
                for job, answer in zip(task.jobs, answers, strict=True):
                    batch.ended(job, relay(_had(compiler, answer)))
    except BrokenExecutor as error:
        left = [job for task in (*out.values(), *waiting) for job in task.jobs]
        warn(f"the executor is broken ({error}); {len(left)} programs are compiled without it", ProgCacheWarning)
        here = min(workers, os.cpu_count() or 1, len(left))
        compile_batch(replace(batch, jobs=left, workers=here, began=lambda _: None))
    finally:
        for future in out:
            future.cancel()
        _Compiling.close_all()  # an executor's workers may be threads of the current process


def _setup(compiler: CachedCompiler, library: KernelLibrary) -> dict[str, Any]:
    """Return the settings for workers. Secrets given literally are left out; those in variables or files are named."""
    settings = compiler.settings
    if settings is None:
        raise ProgCacheError(
            "an executor's workers can't use a cache in memory; give the service a cache directory or tiers"
        )
    return {
        # TierSettings, whose pickles have no secrets, in place of the settings for a child's pipe, which have.
        "compiler": {**settings, "cache": {**settings["cache"], "tiers": tuple(getattr(compiler.cache, "tiers", ()))}},
        "library": library.settings,
        "asked_by": asked_by(),
        "who": who(),
        "events": events.wanted("hit"),
        "tools": _tools(),
    }


def _had(compiler: CachedCompiler, answer: Answer) -> Answer:
    """Return the answer, or an error if the program is in no store that the compiler's cache reads."""
    from cuda_progcache.store.tiers import behind

    digest = answer.get("digest")
    tiers = getattr(compiler.cache, "tiers", ())
    if digest is None or any(tier.mode == "rw" for tier in tiers):  # the worker reports whether a tier took it
        return answer
    if _holds(compiler.cache, digest) or (tiers and any(_holds(store, digest) for store in behind.stores(tiers))):
        return answer
    error = (
        f"it was compiled on {answer.get('host')} but isn't in this cache; give the service a tier that its workers "
        "share and can write to, or a directory that they share"
    )
    return {**answer, "error": error}


def _holds(store: ProgramCacheResource, digest: str) -> bool:
    try:
        store.info(digest)
    except KeyError:
        return False
    return True


def _tools() -> dict[str, str]:
    """Return what determines keys in the current process: the schema and the identities of the installed compilers."""
    from cuda_progcache.keys.schema import SCHEMA
    from cuda_progcache.keys.toolchain import LIBRARY_OF, toolchain

    found = {"key schema": SCHEMA}
    for code_type in LIBRARY_OF:
        try:
            found |= {tool.name: tool.identity for tool in toolchain(code_type, libdevice=code_type == "nvvm")}
        except ToolchainError:
            continue
    return found


# On the worker


def work(setup: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Compile a task's programs; this runs on an executor's worker.

    Parameters
    ----------
    setup : mapping
        The batch's settings.
    messages : sequence of mapping
        The result of :meth:`~cuda_progcache.service.wanted.Wanted.message` and ``"precompile"``, per program.

    Returns
    -------
    list of mapping
        An :data:`~cuda_progcache.service.batch.Answer` per program, without its bytes; ``"host"`` is the worker's host.
    """
    host = socket.gethostname()
    mine = _tools()
    for name, identity in setup["tools"].items():
        if mine.get(name) != identity:
            had = mine.get(name, "not installed")
            error = f"{name} differs on the worker's host {host} ({had}, not {identity}), so its keys would differ, too"
            return [{"error": error, "seconds": 0.0} for _ in messages]
    if not os.path.isdir(setup["library"]["path"]):
        error = f"there is no kernel library at {setup['library']['path']} on {host}; share it or install it there"
        return [{"error": error, "seconds": 0.0} for _ in messages]
    answers: list[Answer] = []
    worker: _Compiling | None = None
    for message in messages:
        started = time.perf_counter()
        try:
            worker = worker or _Compiling.of(setup)
            answers.append({**worker.process.run(dict(message)), "host": host})
        except WorkerDiedError as error:
            if worker is not None:
                worker.close()
            worker = None
            answers.append({"error": f"on {host}: {error}", "seconds": time.perf_counter() - started})
    if worker is not None:
        worker.give_back(precompiled=any(message.get("precompile") for message in messages))
    return answers


class _Compiling:
    """A process in which an executor's worker compiles, so that a compiler crash costs one job and not the worker.

    The process is kept for :attr:`KEPT_FOR` seconds, for the next task of the same batch, unless it has precompiled
    headers, which take a lot of memory.
    """

    KEPT_FOR = 30.0

    _lock = threading.Lock()
    _idle: dict[str, list[_Compiling]] = {}  # noqa: RUF012 - shared by the worker's threads on purpose
    _ends: threading.Timer

    def __init__(self, setup: Mapping[str, Any], name: str) -> None:
        self._name = name
        self._scratch = tempfile.mkdtemp(prefix="progcache-farm-")
        compiler = dict(setup["compiler"])
        cache = dict(compiler["cache"])
        tiers = cache.pop("tiers", ())
        if tiers:
            cache["tiers"] = [tier.for_child() for tier in tiers]
            if not os.path.isdir(cache["path"]):
                cache["path"] = None  # another host: use its own default directory
        told = {key: setup[key] for key in ("library", "asked_by", "who", "events")}
        self.process = Worker(
            {**told, "compiler": {**compiler, "cache": cache}, "scratch": self._scratch, "publishes": bool(tiers)}
        )

    @classmethod
    def of(cls, setup: Mapping[str, Any]) -> _Compiling:
        name = json.dumps(setup, sort_keys=True, default=repr)
        with cls._lock:
            if kept := cls._idle.get(name):
                found = kept.pop()
                found._ends.cancel()
                return found
        return cls(setup, name)

    def give_back(self, *, precompiled: bool) -> None:
        if precompiled:
            self.close()
            return
        self._ends = threading.Timer(self.KEPT_FOR, self._end)
        self._ends.daemon = True
        with self._lock:
            self._idle.setdefault(self._name, []).append(self)
            self._ends.start()

    def _end(self) -> None:
        with self._lock:
            kept = self._idle.get(self._name, [])
            if self not in kept:
                return  # a task has just taken it
            kept.remove(self)
        self.close()

    def close(self) -> None:
        self.process.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    @classmethod
    def close_all(cls) -> None:
        with cls._lock:
            kept = [each for idle in cls._idle.values() for each in idle]
            cls._idle.clear()
        for each in kept:
            each._ends.cancel()
            each.close()


atexit.register(_Compiling.close_all)


# Executors


def workers_of(executor: Executor) -> int:
    """Return how many workers an executor reports, or the CPU count of the current machine if it reports none."""
    said = getattr(executor, "_max_workers", None)
    if said is None and (client := getattr(executor, "_client", None)) is not None:
        said = sum(client.nthreads().values())  # a Dask executor
    return max(int(said), 1) if said else os.cpu_count() or 1


@contextmanager
def dask(address: str) -> Iterator[Executor]:
    """Provide the executor of a Dask cluster while the block runs.

    Parameters
    ----------
    address : str
        The scheduler's address, ``tcp://host:8786``; or ``local:2`` for a cluster of two processes on this machine.

    Raises
    ------
    ProgCacheError
        If ``distributed`` isn't installed or no scheduler answers at the address.
    ValueError
        If the address is invalid.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ProgCacheError(f"a Dask cluster needs `pip install 'cuda-progcache[dask]'` ({error})") from error
    kind, _, rest = address.partition(":")
    if kind == "local":
        if not rest.isdecimal() or int(rest) < 1:
            raise ValueError(f"{address!r} isn't a local cluster; write local:2 for a cluster of two processes")
        with (
            tempfile.TemporaryDirectory(prefix="progcache-dask-") as folder,
            LocalCluster(
                n_workers=int(rest),
                threads_per_worker=1,
                dashboard_address=None,
                local_directory=folder,
                silence_logs="ERROR",
            ) as cluster,
            Client(cluster) as client,
            client.get_executor(pure=False) as executor,
        ):
            yield executor
        return
    if kind not in {"tcp", "tls", "ws", "wss", "ucx"} or not rest:
        raise ValueError(f"{address!r} isn't the address of a Dask scheduler, such as tcp://host:8786, or local:2")
    try:
        client = Client(address, timeout=10)
    except OSError as error:
        raise ProgCacheError(f"no Dask scheduler answers at {address}: {error}") from error
    with client, client.get_executor(pure=False) as executor:
        yield executor

# SPDX-License-Identifier: Apache-2.0
"""A batch of compiles on an executor: a pool of processes, or a cluster whose workers publish to a tier that all share.

What is handed over is small and has no secrets: the names of what is wanted, and how it is compiled. What comes back
are keys and times; the programs go where all look for them. Programs that begin with the same headers are compiled by
one worker, in a row, so that it precompiles these once.
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

#: Programs that a worker is given at once, at most: behind the same headers, and light ones.
_MOST_ALIKE, _MOST_LIGHT = 16, 8
#: Portions beyond which a scheduler, at a millisecond each, would be what all wait for.
_MANY = 5_000


class Task(NamedTuple):
    """What one worker is given.

    Attributes
    ----------
    jobs : tuple of Job
        Compiled in a row.
    precompile : bool
        Whether behind the headers that they all begin with.
    """

    jobs: tuple[Job, ...]
    precompile: bool = False


def tasks(jobs: Sequence[Job], load_of: Callable[[Job], Load], workers: int) -> list[Task]:
    """Jobs in portions: those that share headers together, heavy ones first, none so large that a worker lags behind.

    Parameters
    ----------
    jobs : sequence of Job
    load_of : callable
        What a job asks of the front end.
    workers : int
        How many there are.
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
    # Small ones, so that nobody waits for the last; of very many jobs larger ones, which a scheduler can hand out.
    size = min(max(len(light) // (4 * workers), len(light) // _MANY, 1), _MOST_LIGHT)
    return made + [Task(tuple(portion)) for portion in _portions(light, size)]


def _portions(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    for start in range(0, len(jobs), size):
        yield jobs[start : start + size]


def compile_on(executor: Executor, batch: Batch) -> None:
    """Compile all jobs of a batch on an executor.

    What a worker that died was given is given to another one, a job at a time: so one that ends its worker fails
    alone. If the executor itself breaks, as a pool does over one process that is killed, the rest is compiled here.

    Parameters
    ----------
    executor : Executor
        Whose workers can import this package, and find the library's folder where it is here.
    batch : Batch
        Its compiler's cache has a directory, or tiers, that the workers share; ``workers`` is how many the executor
        has: twice as many portions are out at a time.

    Raises
    ------
    ProgCacheError
        The cache is in memory alone, where no worker could put anything.
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
                waiting.popleft()  # only now: a pool that is found broken keeps none of it
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
                except (Exception, CancelledError) as error:  # noqa: BLE001 - a cluster's own, of a worker that died
                    if len(task.jobs) > 1 or task.jobs[0].index not in again:
                        again.update(job.index for job in task.jobs)
                        waiting.extend(Task((job,)) for job in task.jobs)
                        continue
                    answers = [{"error": f"no worker could do it: {trouble(error)}", "seconds": 0.0}]
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
        _Compiling.close_all()  # of an executor whose workers are threads of this process


def _setup(compiler: CachedCompiler, library: KernelLibrary) -> dict[str, Any]:
    """What a worker has to know. Secrets that were given as such stay here; those in variables and files are named."""
    settings = compiler.settings
    if settings is None:
        raise ProgCacheError(
            "an executor's workers can't reach a cache in memory; give the service a directory or tiers"
        )
    return {
        # The settings of tiers themselves, whose pickles have no secrets, in the place of those for a child's pipe.
        "compiler": {**settings, "cache": {**settings["cache"], "tiers": tuple(getattr(compiler.cache, "tiers", ()))}},
        "library": library.settings,
        "asked_by": asked_by(),
        "who": who(),
        "events": events.wanted("hit"),
        "tools": _tools(),
    }


def _had(compiler: CachedCompiler, answer: Answer) -> Answer:
    """The answer, or an error where the program is nowhere that this cache would find it."""
    from cuda_progcache.store.tiers import behind

    digest = answer.get("digest")
    tiers = getattr(compiler.cache, "tiers", ())
    if digest is None or any(tier.mode == "rw" for tier in tiers):  # the worker says whether one took it
        return answer
    if _holds(compiler.cache, digest) or (tiers and any(_holds(store, digest) for store in behind.stores(tiers))):
        return answer
    error = (
        f"it was compiled on {answer.get('host')}, and isn't in this cache: give the service a tier that its workers "
        "share and may write to, or a directory that they share"
    )
    return {**answer, "error": error}


def _holds(store: ProgramCacheResource, digest: str) -> bool:
    try:
        store.info(digest)
    except KeyError:
        return False
    return True


def _tools() -> dict[str, str]:
    """What makes keys here: the schema, and the compilers' files as far as they are installed."""
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
    """Compile on an executor's worker: called there, by its name.

    Parameters
    ----------
    setup : mapping
        Of the batch.
    messages : sequence of mapping
        What :meth:`~cuda_progcache.service.wanted.Wanted.message` gives, with ``"precompile"``.

    Returns
    -------
    list of mapping
        An :data:`~cuda_progcache.service.batch.Answer` each, without bytes; ``"host"`` is where it was made.
    """
    host = socket.gethostname()
    mine = _tools()
    for name, identity in setup["tools"].items():
        if mine.get(name) != identity:
            had = mine.get(name, "not there")
            error = f"{name} of the worker on {host} is another ({had}, and here {identity}): keys would be others, too"
            return [{"error": error, "seconds": 0.0} for _ in messages]
    if not os.path.isdir(setup["library"]["path"]):
        error = f"there is no kernel library at {setup['library']['path']} on {host}; share or install it there"
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
    """A process of the worker's that compiles, so that a compiler that crashes takes a job along and no worker.

    It is kept for a while, for the next portion of the same batch, unless it has precompiled headers, which take much
    memory.
    """

    KEPT_FOR = 30.0

    _lock = threading.Lock()
    _idle: dict[str, list[_Compiling]] = {}  # noqa: RUF012 - of this worker, which isn't forked
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
                cache["path"] = None  # another host, which keeps what it compiles where it does otherwise
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
                return  # it was taken just now
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
    """How many workers an executor has, as far as it says; else the processors of this machine."""
    said = getattr(executor, "_max_workers", None)
    if said is None and (client := getattr(executor, "_client", None)) is not None:
        said = sum(client.nthreads().values())  # distributed's
    return max(int(said), 1) if said else os.cpu_count() or 1


@contextmanager
def dask(address: str) -> Iterator[Executor]:
    """The executor of a Dask cluster, as long as the block runs.

    Parameters
    ----------
    address : str
        Of its scheduler, ``tcp://host:8786``; or ``local:2``: a cluster of two processes on this machine.

    Raises
    ------
    ProgCacheError
        ``distributed`` isn't installed, or no scheduler answers there.
    ValueError
        It is no such address.
    """
    try:
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ProgCacheError(f"a Dask cluster needs `pip install 'cuda-progcache[dask]'` ({error})") from error
    kind, _, rest = address.partition(":")
    if kind == "local":
        if not rest.isdecimal() or int(rest) < 1:
            raise ValueError(f"{address!r} isn't a local cluster; local:2 is one of two processes")
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

# SPDX-License-Identifier: Apache-2.0
"""Prewarming on executors: what they were given is in the cache or the tier afterwards, whichever worker dies."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ci.fleet.server import RedisServer, why_no_server
from cuda_progcache import CompileService, FileStreamProgramCache, InMemoryProgramCache, subscribe
from cuda_progcache.cli import main
from cuda_progcache.errors import ProgCacheError, ProgCacheWarning
from cuda_progcache.service import farm
from cuda_progcache.service.plan import WORTH_PRECOMPILING, Load

ARCHS, KERNELS = ["sm_80", "sm_90"], ["fill", "typed"]


@given(
    kinds=st.lists(st.sampled_from([Load(heavy=False), Load(True), Load(True, "a"), Load(True, "b")]), max_size=80),
    workers=st.integers(1, 200),
)
def test_each_job_is_in_one_task_and_what_shares_headers_is_together(kinds, workers):
    jobs = [SimpleNamespace(index=n, load=load) for n, load in enumerate(kinds)]
    made = farm.tasks(jobs, lambda job: job.load, workers)
    assert sorted(job.index for task in made for job in task.jobs) == list(range(len(jobs)))
    for task in made:
        loads = {job.load for job in task.jobs}
        assert len(loads) == 1
        if task.precompile:
            assert task.jobs[0].load.prefix
            assert len(task.jobs) <= 16
        elif task.jobs[0].load.heavy:
            assert len(task.jobs) == 1
    for prefix in "ab":
        count = sum(load.prefix == prefix for load in kinds)
        portions = [len(task.jobs) for task in made if task.precompile and task.jobs[0].load.prefix == prefix]
        assert sum(portions) == (count if count >= WORTH_PRECOMPILING else 0)
        assert len(portions) <= max(workers, -(-count // 16))
    order = [task.jobs[0].load.heavy for task in made]
    assert order == sorted(order, reverse=True), "heavy ones first"


def test_an_executor_gives_the_report_that_this_process_would(service):
    seen, starts, events = [], [], []
    unsubscribe = subscribe(events.append)
    with ThreadPoolExecutor(2) as pool:
        made = service.prewarm(
            archs=["sm_80"],
            executor=pool,
            on_progress=lambda item, done, total: seen.append((done, total)),
            on_start=lambda item, done, total: starts.append((item.kernel, item.status)),
        )
    unsubscribe()
    assert made.jobs == 2
    assert made.call is not None
    assert seen == [(n, 5) for n in range(1, 6)]
    assert sorted(starts) == sorted((item.kernel, "compiling") for item in made.items)
    assert {event.kind for event in events} >= {"compile", "miss", "store"}
    again = service.prewarm(archs=["sm_80"], jobs=2)
    assert [(item.kernel, item.digest, item.size) for item in again.items if item.status == "hit"] == [
        (item.kernel, item.digest, item.size) for item in made.items if item.status == "compiled"
    ]
    assert again.hits == 5


def test_failures_are_told_as_ever(service, library_dir):
    (library_dir / "fill.cu.j2").write_text('extern "C" __global__ void fill() { no }')
    with ThreadPoolExecutor(1) as pool:
        library = CompileService(service.cache.path, library=library_dir)
        made = library.prewarm(archs=["sm_80"], kernels=["fill", "pair"], executor=pool)
    assert [item.status for item in made.items] == ["failed", "failed", "compiled"]
    assert "no" in made.items[0].error


class Broken(Executor):
    """A pool whose process is killed by the second thing that it is asked for."""

    def __init__(self):
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.asked = 0

    def submit(self, function, /, *given, **named):
        self.asked += 1
        if self.asked == 2:
            return self.pool.submit(os.kill, next(iter(self.pool._processes)), signal.SIGKILL)
        return self.pool.submit(function, *given, **named)


def test_what_a_broken_pool_leaves_is_compiled_here(service):
    executor = Broken()
    with pytest.warns(ProgCacheWarning, match="the executor is broken"):
        made = service.prewarm(archs=["sm_80"], kernels=["fill", "ir"], executor=executor, jobs=1)
    executor.pool.shutdown()
    assert (made.ok, made.compiled + made.hits) == (True, 3)


class Gone(Executor):
    """A pool that is found broken when the second thing is handed over."""

    def __init__(self):
        self.asked = 0

    def submit(self, function, /, *given, **named):
        self.asked += 1
        if self.asked == 2:
            raise BrokenProcessPool("a child process terminated abruptly")
        return Future()  # of what nobody will do


def test_what_a_pool_could_not_be_handed_is_compiled_here(service):
    told = []

    def tell(item, done, total):
        told.append((done, total))

    with pytest.warns(ProgCacheWarning, match="the executor is broken"):
        made = service.prewarm(archs=["sm_80"], kernels=["fill", "ir"], executor=Gone(), jobs=1, on_progress=tell)
    assert (made.ok, made.compiled + made.hits) == (True, 3)
    assert told == [(1, 3), (2, 3), (3, 3)]  # each once


class Dying(Executor):
    """Loses some of what it is asked for, as a cluster does whose workers are killed."""

    def __init__(self, lost):
        self.lost, self.asked = lost, []

    def submit(self, function, setup, messages):
        done = Future()
        self.asked.append([message["kernel"] for message in messages])
        if any(self.lost(message, len(self.asked)) for message in messages):
            done.set_exception(RuntimeError("KilledWorker"))
        else:
            done.set_result(function(setup, messages))
        return done


def test_one_that_ends_its_workers_fails_alone(service):
    executor = Dying(lambda message, _: message["kernel"] == "pair")
    made = service.prewarm(archs=["sm_80"], kernels=["fill", "pair"], executor=executor, jobs=1)
    assert [item.kernel for item in made.items if item.status == "failed"] == ["pair"]
    assert all("no worker could compile it: RuntimeError: KilledWorker" in i.error for i in made.items if i.error)
    assert made.compiled == 2


def test_work_that_was_lost_is_done_by_another(service):
    executor = Dying(lambda _, number: number <= 2)
    made = service.prewarm(archs=["sm_80"], kernels=["fill"], executor=executor, jobs=1)
    assert (made.ok, made.compiled) == (True, 2)


def test_a_worker_that_would_make_other_keys_compiles_nothing(service, monkeypatch):
    setup = farm._setup(service._compiler, service.library)
    (answer,) = farm.work({**setup, "tools": {**setup["tools"], "nvrtc": "another"}}, [{"kernel": "fill"}])
    assert "nvrtc differs on the worker" in answer["error"]
    (answer,) = farm.work({**setup, "library": {**setup["library"], "path": "/not/there"}}, [{"kernel": "fill"}])
    assert "no kernel library at /not/there" in answer["error"]


def test_what_was_made_elsewhere_and_lies_nowhere_is_a_failure(service):
    answer = {"digest": "0" * 64, "host": "afar", "seconds": 1.0}
    assert "compiled on afar but isn't in this cache" in farm._had(service._compiler, answer)["error"]


def test_tiers_that_are_only_read_have_what_they_have(service, library_dir, tmp_path):
    """What a worker compiled there went nowhere; what it found there is found here, too."""
    with FileStreamProgramCache(tmp_path / "layer") as layer:
        layer[b"k"] = b"program"
        (digest,) = layer._digests("")
    reading = CompileService(tmp_path / "near", library=library_dir, tiers=[f"file://{tmp_path}/layer?mode=ro"])
    assert "error" not in farm._had(reading._compiler, {"digest": digest, "hit": True, "seconds": 1.0})
    for hit in (True, False):
        assert "isn't in this cache" in farm._had(reading._compiler, {"digest": "0" * 64, "hit": hit})["error"]


def test_no_secret_travels(library_dir, tmp_path):
    cache = FileStreamProgramCache(tmp_path / "c", tiers=["redis://user:hush-hush@127.0.0.1:1/0"])
    compiler = CompileService(cache, library=library_dir)._compiler
    assert b"hush-hush" not in pickle.dumps(farm._setup(compiler, CompileService(cache, library=library_dir).library))


def test_a_cache_in_memory_and_bad_addresses_are_refused(library_dir):
    service = CompileService(InMemoryProgramCache(), library=library_dir)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ProgCacheError, match="in memory"):
        service.prewarm(archs=ARCHS, executor=pool)
    for address in ("local:", "local:0", "host:8786", "tcp:", ""):
        with pytest.raises(ValueError, match=r"isn't (a local cluster|the address)"), farm.dask(address):
            pass


@pytest.mark.skipif(why_no_server() is not None, reason=str(why_no_server()))
@pytest.mark.filterwarnings("ignore")  # distributed's own, of workers that are killed
def test_a_cluster_whose_worker_is_killed(library_dir, tmp_path, capsys):
    """A real scheduler, and workers that are processes; one is killed while it compiles."""
    with RedisServer(tmp_path / "redis") as server, farm.dask("local:2") as executor:
        tier = f"{server.url}?timeout=60"
        client = executor._client
        workers = client.run(os.getpid)

        def kill_one(item, done, total):
            if workers:
                os.kill(workers.popitem()[1], signal.SIGKILL)
                workers.clear()

        near = CompileService(tmp_path / "near", library=library_dir, tiers=[tier])
        made = near.prewarm(archs=ARCHS, kernels=KERNELS, executor=executor, on_progress=kill_one)
        assert [item.error for item in made.items if item.error] == []
        assert (made.compiled + made.hits, made.jobs) == (6, 2)
        # Another machine, from the command line, on the same cluster: all is in the tier.
        command = ["prewarm", "--manifest", str(library_dir), "--cache-dir", str(tmp_path / "far"), "--json"]
        chosen = [option for arch in ARCHS for option in ("--arch", arch)]
        chosen += [option for kernel in KERNELS for option in ("--kernel", kernel)]
        address = client.scheduler_info()["address"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUDA_PROGCACHE_TIERS", tier)
            with pytest.raises(SystemExit) as ended:
                main([*command, *chosen, "--dask", address])
        assert ended.value.code == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["hits"], told["compiled"], told["failed"]) == (6, 0, 0)

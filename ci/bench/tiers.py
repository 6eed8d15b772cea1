# SPDX-License-Identifier: Apache-2.0
"""Tiers: hits compared with the bare clients, a fresh machine, a dead tier, and the cost of a tier that isn't asked.

The benchmarks of a server that isn't available are left out; ``make servers`` installs the servers.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ci import servers, tier_faults
from ci.bench.harness import OURS, Benchmark, Sides, at_most, over, ratio
from ci.servers.distance import at_a_distance

BARE, COPIED, KEPT, DISK = "bare get", "with its copying", "put on disk", "disk alone"
PROGRAM = os.urandom(20_000)
RECORD = {"name": "axpby", "arch": "sm_90", "components": [[f"component {i}", f"value {i}"] for i in range(24)]}
PROGRAMS = 180
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
#: Hits in a row, each of a program that isn't on the disk yet, and the number of such bursts.
_BURST, _BURSTS = 25, 40
Server = Callable[[Path], AbstractContextManager[servers.Served]]
#: A server of each kind, and the client with which ours is compared.
_SERVERS: dict[str, tuple[Server, str]] = {
    "redis": (servers.redis, "redis"),
    "http": (servers.nginx, "urllib3"),
    "s3": (servers.nanio, "obstore"),
}


def _key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def _bare(url: str) -> Callable[[], object]:
    """Return a get of the object under key 0 by the client alone, over a connection that it keeps."""
    from urllib.parse import parse_qsl, urlsplit

    from cuda_progcache.store.base import entry_digest

    digest, parts = entry_digest(_key(0)), urlsplit(url)
    name = f"v1/programs/{digest[:2]}/{digest[2:]}"
    if parts.scheme == "redis":
        import redis

        from cuda_progcache.store.tiers.redis import _key as redis_key

        client = redis.Redis("127.0.0.1", parts.port or 0, username=parts.username, password=parts.password)
        return lambda: client.get(redis_key(name))
    if parts.scheme == "http":
        import urllib3

        pool = urllib3.HTTPConnectionPool("127.0.0.1", parts.port)
        return lambda: pool.request("GET", f"{parts.path}/{name}", retries=False).data
    import obstore
    from obstore.store import S3Store

    options = dict(parse_qsl(parts.query))
    config: Any = {"access_key_id": parts.username, "secret_access_key": parts.password, **options}
    bucket = S3Store(
        parts.netloc.rpartition("@")[2], prefix=parts.path, config=config, client_options={"allow_http": True}
    )
    return lambda: obstore.get(bucket, name).bytes()


@contextmanager
def _filled(server: Server, directory: Path, programs: int) -> Iterator[tuple[Any, Callable[[], object]]]:
    """Yield a tier with ``programs`` programs, and a get by the client alone."""
    from cuda_progcache.store.tiers import open_tier
    from cuda_progcache.store.tiers.settings import parse_tier

    folder = directory / "server"
    folder.mkdir()
    with server(folder) as served:
        tier: Any = open_tier(parse_tier(served.writer))
        for number in range(programs):
            assert tier.publish(_key(number), PROGRAM, RECORD)
        assert tier.flush(600)
        bare: Callable[[], Any] = _bare(served.writer)
        assert bytes(bare())[-len(PROGRAM) :] == PROGRAM
        yield tier, bare
        tier.close()


def _hit(server: Server) -> Callable[[Path], Any]:
    """Compare hits in the tier alone with the client's gets."""

    @contextmanager
    def sides(directory: Path) -> Iterator[Sides]:
        with _filled(server, directory, 1) as (tier, bare):
            yield {OURS: lambda: tier.get(_key(0)), BARE: bare}

    return sides


def _first_hits(server: Server) -> Callable[[Path, float], Mapping[str, list[float]]]:
    """Time bursts of hits of programs that this machine lacks, and the copying to the disk that follows each burst.

    The samples also have the whole time per program, copying included, and the time of a put on the disk alone.
    """

    def samples(directory: Path, effort: float) -> Mapping[str, list[float]]:
        from cuda_progcache.store.file_stream import FileStreamProgramCache
        from cuda_progcache.store.stack import ProgramCacheStack

        rounds = max(2, round(_BURSTS * effort))
        taken: dict[str, list[float]] = {OURS: [], BARE: [], COPIED: [], KEPT: []}
        numbers, others = itertools.count(), itertools.count()
        with _filled(server, directory, rounds * _BURST + 2) as (tier, bare):
            disk = FileStreamProgramCache(directory / "disk", durability="none", tiers=())
            cache = FileStreamProgramCache(directory / "cache", durability="none", tiers=())
            stack = ProgramCacheStack([cache, tier])

            def hits() -> None:
                started = time.perf_counter()
                taken[OURS] += _each(lambda: stack.get(_key(next(numbers))))
                assert stack.flush(600)
                taken[COPIED].append((time.perf_counter() - started) / _BURST)

            def gets() -> None:
                taken[BARE] += _each(bare)

            def puts() -> None:
                taken[KEPT] += _each(lambda: disk.publish(_key(next(others)), PROGRAM, RECORD))

            sides = [hits, gets, puts]
            for _ in range(2):  # imports and other work that is done once
                assert stack.get(_key(next(numbers))) is not None
            for _ in range(rounds):
                for side in sides:
                    side()
                sides.reverse()
        return taken

    return samples


def _each(call: Callable[[], object]) -> list[float]:
    """Return the seconds of each call of a burst."""
    taken = []
    for _ in range(_BURST):
        started = time.perf_counter()
        found = call()
        taken.append(time.perf_counter() - started)
        assert found
    return taken


def _fresh(server: Server, round_trip: float = 0.0) -> Callable[[Path, float], Mapping[str, list[float]]]:
    """Time a library's prewarm on machines that have compiled nothing, with a tier that another machine filled."""

    def samples(directory: Path, effort: float) -> Mapping[str, list[float]]:
        archs = ARCHS[: max(1, min(len(ARCHS), round(len(ARCHS) * effort)))]
        folder = directory / "server"
        folder.mkdir()
        with server(folder) as served:
            # compiled once for all benchmarks
            first = directory.parent / "tiers.library"
            _prewarm(first, "", archs)
            command = [sys.executable, "-m", "cuda_progcache", "sync", str(first), served.writer]
            subprocess.run(command, capture_output=True, check=True)
            with at_a_distance(served.port, round_trip) as port:
                url = served.reader.replace(str(served.port), str(port if round_trip else served.port))
                taken = [_prewarm(directory / f"fresh{number}", url, archs) for number in range(5)]
        assert len({report.hits for report in taken}) == 1
        assert all(report.compiled == 0 for report in taken), "a fresh machine compiled"
        busy = f"of the processor, for {taken[0].hits} programs"
        return {OURS: [report.seconds for report in taken], busy: [report.processor for report in taken]}

    return samples


class _Prewarmed(NamedTuple):
    seconds: float
    processor: float  # CPU seconds, which exclude the time that a busy machine spends on other work
    hits: int
    compiled: int


def _prewarm(cache: Path, url: str, archs: tuple[str, ...]) -> _Prewarmed:
    """Prewarm in a separate process, whose start isn't counted."""
    script = (
        "import sys, time\n"
        "from cuda_progcache import CompileService\n"
        "service = CompileService(sys.argv[1], tiers=sys.argv[2].split())\n"
        "started, busy = time.perf_counter(), time.process_time()\n"
        "report = service.prewarm(archs=sys.argv[3:])\n"
        "print(time.perf_counter() - started, time.process_time() - busy, report.hits, report.compiled)\n"
    )
    command = [sys.executable, "-c", script, str(cache), url, *archs]
    # Write .pyc files, as everywhere except in tests.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, busy, hits, compiled = done.stdout.split()
    return _Prewarmed(float(seconds), float(busy), int(hits), int(compiled))


def _dead(which: str) -> Callable[[Path, float], Mapping[str, list[float]]]:
    def samples(directory: Path, _: float) -> Mapping[str, list[float]]:
        outcomes = [tier_faults.try_trouble(tier, "black hole", directory) for tier in tier_faults.TIERS]
        assert not any(outcome.wrong or outcome.raised for outcome in outcomes)
        took = {o.tier: [o.first + o.more if which == "look-ups" else o.threads] for o in outcomes}
        return {OURS: [max(seconds for one in took.values() for seconds in one)], **took}

    return samples


@contextmanager
def _local_hit(directory: Path) -> Iterator[Sides]:
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    nobody = f"redis://127.0.0.1:{servers.free_port()}"
    with (
        FileStreamProgramCache(directory / "alone", tiers=()) as alone,
        FileStreamProgramCache(directory / "tiers", tiers=[nobody]) as tiered,
    ):
        for path in ("alone", "tiers"):
            with FileStreamProgramCache(directory / path, tiers=()) as store:
                assert store.publish(_key(0), PROGRAM, RECORD)
        time.sleep(0.05)  # each read verifies again what was written within the last clock tick
        assert alone.get(_key(0)) == tiered.get(_key(0)) == PROGRAM
        yield {OURS: lambda: tiered.get(_key(0)), DISK: lambda: alone.get(_key(0))}


def _write_back(server: Server) -> Callable[[Path, float], Mapping[str, list[float]]]:
    """Time the publishing of a program on the disk alone, and with a tier behind the disk."""

    def samples(directory: Path, _: float) -> Mapping[str, list[float]]:
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        folder = directory / "server"
        folder.mkdir()
        taken: dict[str, list[float]] = {OURS: [], DISK: []}
        with (
            server(folder) as served,
            FileStreamProgramCache(directory / "alone", tiers=()) as alone,
            FileStreamProgramCache(directory / "tiers", tiers=[served.writer]) as tiered,
        ):
            for number in range(PROGRAMS):
                for side, store in ((DISK, alone), (OURS, tiered)):
                    started = time.perf_counter()
                    assert store.publish(_key(number), PROGRAM, RECORD)
                    taken[side].append(time.perf_counter() - started)
        return taken

    return samples


def _rows() -> Iterator[Benchmark]:
    here = {name: server for name, (server, client) in _SERVERS.items() if _is_here(server, client)}
    for name, server in here.items():
        what = f"20 kB from {server.__name__}, verified, beside its client's get"
        yield Benchmark(f"tiers.hit_{name}", what, over(BARE, 60e-6), _hit(server), 40, 25, beside=BARE)
        what = "the same, not on the disk yet; it is copied there afterwards"
        row = _first_hits(server)
        yield Benchmark(f"tiers.first_hit_{name}", what, over(BARE, 60e-6), samples=row, beside=BARE)
    for name, server in here.items():
        what = f"prewarm on a new machine, all in {server.__name__}"
        yield Benchmark(f"tiers.fresh_{name}", what, at_most(1.0), samples=_fresh(server))
    if "redis" in here:
        what = "the same at 5 ms to the server and back"
        yield Benchmark("tiers.fresh_redis_5ms", what, at_most(1.5), samples=_fresh(servers.redis, 0.005))
        what = "publish with a tier behind the disk, a program"
        row = _write_back(servers.redis)
        yield Benchmark("tiers.write_back", what, over(DISK, 1e-3), samples=row)
    what = "1,001 look-ups in a tier that never answers"
    yield Benchmark("tiers.dead", what, at_most(2.1), samples=_dead("look-ups"))
    yield Benchmark("tiers.dead_threads", "8 threads at once, as above", at_most(2.5), samples=_dead("threads"))
    what = "get from the disk with a tier configured, and without one"
    yield Benchmark("tiers.local_hit", what, ratio(1.05, DISK), _local_hit, rounds=200)


def _is_here(server: Server, client: str) -> bool:
    """Return whether a server's program and the client to compare with are installed; nothing is started."""
    return servers.why_not(server.__name__) is None and importlib.util.find_spec(client) is not None


BENCHMARKS = tuple(_rows())

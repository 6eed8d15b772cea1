# SPDX-License-Identifier: Apache-2.0
"""The stores: get, load, miss and put. :mod:`ci.bench.scaling` has what depends on their size."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, PEER, Benchmark, Sides, at_most, ratio

TEN_KB = os.urandom(10_000)
#: The lower bound for a put that makes an entry and a record.
BARE = "two bare files"
KEY = b"\x5a" * 32


@contextmanager
def _stores(directory: Path, **settings: Any) -> Iterator[tuple[Any, Any]]:
    from cuda.core.utils import FileStreamProgramCache as PeerStore

    from cuda_progcache.store.file_stream import FileStreamProgramCache

    with FileStreamProgramCache(directory / "ours", **settings) as ours, PeerStore(directory / "peer") as peer:
        yield ours, peer


@contextmanager
def _get(directory: Path) -> Iterator[Sides]:
    with _stores(directory) as (ours, peer):
        ours[KEY] = peer[KEY] = TEN_KB
        time.sleep(0.05)  # each read verifies again what was written within the last clock tick
        assert ours.get(KEY) == peer.get(KEY) == TEN_KB
        yield {OURS: lambda: ours.get(KEY), PEER: lambda: peer.get(KEY)}


@contextmanager
def _get_in_memory(_: Path) -> Iterator[Sides]:
    from cuda.core.utils import InMemoryProgramCache as PeerStore

    from cuda_progcache.store.in_memory import InMemoryProgramCache

    with InMemoryProgramCache() as ours, PeerStore() as peer:
        ours[KEY] = peer[KEY] = TEN_KB
        assert ours.get(KEY) == peer.get(KEY) == TEN_KB
        yield {OURS: lambda: ours.get(KEY), PEER: lambda: peer.get(KEY)}


RECORD = {
    "name": "axpby",
    "arch": "sm_90",
    "components": [[f"component {i}", f"value {i}"] for i in range(24)],
    "toolchain": [{"name": "libnvrtc.so", "digest": "5a" * 32}],
    "log": "",
    "symbol_mapping": {"axpby": "axpby"},
}


@contextmanager
def _load(directory: Path) -> Iterator[Sides]:
    with _stores(directory) as (ours, peer):
        assert ours.publish(KEY, TEN_KB, RECORD)
        peer[KEY] = TEN_KB
        time.sleep(0.05)  # each read verifies again what was written within the last clock tick
        assert ours.load(KEY) == (TEN_KB, RECORD)
        yield {OURS: lambda: ours.load(KEY), PEER: lambda: peer.get(KEY)}


@contextmanager
def _miss(directory: Path) -> Iterator[Sides]:
    with _stores(directory) as (ours, peer):
        ours[KEY] = peer[KEY] = TEN_KB
        absent = b"\xa5" * 32
        assert ours.get(absent) is None
        assert peer.get(absent) is None
        yield {OURS: lambda: ours.get(absent), PEER: lambda: peer.get(absent)}


def _put(durability: str) -> Callable[[Path], Any]:
    @contextmanager
    def sides(directory: Path) -> Iterator[Sides]:
        with _stores(directory, durability=durability) as (ours, peer):
            bare = _bare_putter(directory / "bare", sync=durability != "none")
            yield {OURS: _putter(ours), BARE: bare, PEER: _putter(peer)}

    return sides


def _bare_putter(directory: Path, *, sync: bool) -> Callable[[], None]:
    """Return a function that makes only the system calls for two files: one is written and renamed, one in place."""
    numbers = itertools.count()
    record = os.urandom(280)
    for tree in ("entries", "records"):
        for shard in range(256):
            (directory / tree / f"{shard:02x}").mkdir(parents=True)
    staging = directory / "tmp"
    staging.mkdir()
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL

    def put() -> None:
        number = next(numbers)
        name = hashlib.sha256(number.to_bytes(32, "little")).hexdigest()
        staged, place = f"{staging}/{number}", f"{name[:2]}/{name[2:]}"
        for path, data in ((staged, TEN_KB), (f"{directory}/records/{place}", record)):
            fd = os.open(path, flags, 0o600)
            os.write(fd, data)
            if sync and path is staged:
                os.fsync(fd)
            os.close(fd)
        os.replace(staged, f"{directory}/entries/{place}")

    return put


def _putter(store: Any) -> Callable[[], None]:
    numbers = itertools.count()

    def put() -> None:
        store[next(numbers).to_bytes(32, "little")] = TEN_KB

    return put


BENCHMARKS = (
    Benchmark("store.get", "get of a 10 kB entry, page cache warm, verified", ratio(0.5), _get, rounds=200),
    Benchmark("store.load", "the same with its record of 1 kB; the peer's get", ratio(1.0), _load, rounds=200),
    Benchmark("store.get_in_memory", "the same from memory", at_most(1e-6), _get_in_memory, rounds=200),
    Benchmark("store.miss", "get of an absent key", ratio(0.4), _miss, rounds=200),
    Benchmark("store.put_fsync", "put of a new 10 kB entry, fsynced as the peer's", ratio(1.1), _put("fsync"), 100, 10),
    Benchmark("store.put_none", 'put with durability="none"; the peer fsyncs', ratio(0.2), _put("none"), 100, 10),
)

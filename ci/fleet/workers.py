# SPDX-License-Identifier: Apache-2.0
"""The processes of a simulated fleet: each wants every program, in its own order, and logs what it does."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuda_progcache.compile import single_flight
from cuda_progcache.compile.lookup import fleet, leases_dir
from cuda_progcache.compile.single_flight import fly
from cuda_progcache.store import arrivals
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.tiers import behind, configuration, leases, on_demand
from cuda_progcache.store.tiers import redis as engine

if TYPE_CHECKING:
    from ci.fleet.log import Log
    from ci.fleet.server import RedisServer

#: Bytes of a stand-in's program.
_SIZE = 20_000
#: Modules that each process would import at first use, all at once; the parent imports them instead.
IMPORTED = (arrivals, configuration, engine, leases, on_demand)


def open_cache(folder: Path, host: int, url: str) -> FileStreamProgramCache:
    """Open the directory of a host, with the fleet's tier behind it."""
    return FileStreamProgramCache(folder / f"host-{host}", durability="none", tiers=[url])


def program_name(key: int) -> bytes:
    """Return the key of a program in the cache."""
    return f"key {key}".encode()


@functools.cache
def program(key: int) -> bytes:
    """Return what a compile of that key produces, in any process."""
    return hashlib.shake_128(f"program {key}".encode()).digest(_SIZE)


class StandIn:
    """A compile that takes time but no CPU.

    Parameters
    ----------
    cache : FileStreamProgramCache
        The cache of the host.
    log : Log
        The log of the fleet.
    host : int
        The number of the host.
    seconds : float
        The duration of a compile.
    server : RedisServer
        The server, asked for the program when a compile begins.
    """

    def __init__(self, cache: FileStreamProgramCache, log: Log, host: int, seconds: float, server: RedisServer) -> None:
        self._cache, self._log, self._host, self._seconds, self._server = cache, log, host, seconds, server
        self._tier: Any = behind.stores(cache.tiers)[0]

    def _begin(self, key: int, name: bytes) -> None:
        has = self._server.has(f"pc1:{{{entry_digest(name)}}}:e")
        self._log.add("away" if has is None else "there" if has else "begin", key, self._host)

    def obtain(self, key: int) -> bytes:
        """Return the program, from the cache or from the compile of the first process of the fleet that needs it."""
        name = program_name(key)
        flight = hashlib.sha256(name).hexdigest()
        if (entry := self._cache.load(name)) is not None:
            return entry.data

        def compile_() -> bytes:
            self._begin(key, name)
            time.sleep(self._seconds)
            data = program(key)
            self._cache.publish(name, data, {"key": key})
            self._log.add("end", key, self._host)
            self._tier.then(lambda: self._log.add("landed", key, self._host))
            return data

        def look_up() -> bytes | None:
            found = self._cache.load_again(name)
            return None if found is None else found.data

        return fly(flight, leases_dir(self._cache), compile_, look_up, fleet=fleet(self._cache, flight))

    def right(self, key: int, data: bytes) -> bool:
        """Return whether ``data`` is the program."""
        return data == program(key)

    def close(self) -> None:
        """Send what is queued for the tier, and close the cache."""
        self._cache.close()


class Real:
    """A compile with NVRTC, through the whole pipeline."""

    def __init__(self, cache: FileStreamProgramCache, log: Log, host: int) -> None:
        from cuda_progcache import events

        self._cache, self._log, self._host, self._key = cache, log, host, 0
        events.subscribe(self._note)

    def _note(self, event: object) -> None:
        if getattr(event, "kind", "") == "compile":
            self._log.add("end", self._key, self._host)

    def obtain(self, key: int) -> bytes:
        """Return the program."""
        from cuda_progcache import Program, ProgramOptions

        self._key = key
        source = f'extern "C" __global__ void k{key}(int *a) {{ *a = {key}; }}'
        return Program(source, "c++", ProgramOptions(arch="sm_80")).compiled("cubin", cache=self._cache).data

    def right(self, key: int, data: bytes) -> bool:
        """Return whether ``data`` is the program."""
        return data.startswith(b"\x7fELF") and f"k{key}".encode() in data

    def close(self) -> None:
        """Send what is queued for the tier, and close the cache."""
        self._cache.close()


def work(make: Callable[[], StandIn | Real], start: Callable[[], None], log: Log, host: int, order: list[int]) -> None:
    """Obtain every program in this order once ``start`` returns; then end the process, which was forked for this."""
    status = 1
    try:
        warnings.simplefilter("ignore")  # about a server that is killed on purpose
        single_flight.STANDSTILL = 60.0  # many processes share few processors: one that doesn't move isn't stuck
        worker = make()
        start()
        for key in order:
            log.add("got" if worker.right(key, worker.obtain(key)) else "wrong", key, host)
        worker.close()
        status = 0
    except BaseException as error:  # noqa: BLE001 - it is printed, and ends this process
        print(f"process {os.getpid()} of host {host}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(status)

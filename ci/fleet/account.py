# SPDX-License-Identifier: Apache-2.0
"""What a fleet compiled while its holders and its server died, and whether anything was lost or wrong."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ci.fleet.server import RedisServer
from ci.fleet.workers import Log, Real, StandIn, open_cache, program_name, work


class Plan(NamedTuple):
    """What is simulated.

    Attributes
    ----------
    hosts, processes : int
        Hosts, and processes in all.
    keys : int
        Programs that each process wants.
    seconds : float
        That a stand-in's compile takes.
    kills : int
        Holders that are killed while they compile.
    restarts : int
        How often the server is killed and started again.
    away : float
        Seconds that it is away.
    lasting : bool
        Whether the server has after a kill what it had before.
    real : bool
        Whether NVRTC compiles, instead of a stand-in.
    """

    hosts: int = 4
    processes: int = 64
    keys: int = 200
    seconds: float = 0.05
    kills: int = 0
    restarts: int = 0
    away: float = 0.3
    lasting: bool = True
    real: bool = False


class Account(NamedTuple):
    """What came of it.

    Attributes
    ----------
    seconds : float
        Wall time.
    compiles : int
        That ended.
    extra : int
        Of them, those of programs that had been compiled before.
    most_by_host : int
        Compiles of one program by one host, at most.
    killed : int
        Holders.
    lost : int
        Programs that no process of some host has got, or that lie nowhere at the end.
    wrong : int
        Times that a process got something else.
    failed : int
        Processes that ended by themselves before they had all.
    unpublished : int
        Programs that a new host doesn't find in the tier at the end: those that were compiled while it was away for
        longer than a write waits, or before it came back empty.
    """

    seconds: float
    compiles: int
    extra: int
    most_by_host: int
    killed: int
    lost: int
    wrong: int
    failed: int
    unpublished: int

    def faults(self, plan: Plan) -> list[str]:
        """What isn't as it should be."""
        found = [f"{getattr(self, name)} {name}" for name in ("lost", "wrong", "failed") if getattr(self, name)]
        if self.most_by_host > 1:  # what ended lies in the host's directory
            found.append(f"a host compiled one program {self.most_by_host} times")
        if not plan.restarts and not plan.kills and (self.extra or self.unpublished):
            found.append(f"{self.extra} extra compiles and {self.unpublished} unpublished programs without any trouble")
        return found


def simulate(plan: Plan, folder: Path, seed: int = 0) -> Account:
    """Let a fleet go through its programs.

    Parameters
    ----------
    plan : Plan
    folder : path
        For the hosts' directories and the server's files; empty.
    seed : int
        Of the processes' orders, and of who is killed.
    """
    log = Log(folder / "log")
    with RedisServer(folder / "redis", lasting=plan.lasting) as server:
        started = time.perf_counter()
        # So many processes on so few processors: what takes long is not the server.
        url = f"{server.url}?connect_timeout=30&timeout=60"
        children = {_fork(plan, folder, url, log, n, seed): n for n in range(plan.processes)}
        killed, failed = _disturb(plan, server, log, children, random.Random(seed))  # noqa: S311 - no secret
        seconds = time.perf_counter() - started
        happened = list(Log(log.path).read())
        ended = Counter(line.key for line in happened if line.what == "end")
        by_host = Counter((line.key, line.host) for line in happened if line.what == "end")
        got = {(line.key, line.host) for line in happened if line.what == "got"}
        missing = _missing(plan, folder, server.url, plan.hosts)
        gone = set(missing)
        for host in range(plan.hosts):
            gone &= set(_missing(plan, folder, "redis://127.0.0.1:1", host)) if gone else gone
        return Account(
            seconds=seconds,
            compiles=ended.total(),
            extra=sum(count - 1 for count in ended.values()),
            most_by_host=max(by_host.values(), default=0),
            killed=killed,
            lost=plan.keys * plan.hosts - len(got) + len(gone),
            wrong=sum(line.what == "wrong" for line in happened),
            failed=failed,
            unpublished=len(missing),
        )


def _fork(plan: Plan, folder: Path, url: str, log: Log, number: int, seed: int) -> int:
    host = number % plan.hosts
    child = os.fork()
    if not child:
        work(_maker(plan, folder, url, log, host), log, host, plan.keys, seed * plan.processes + number)
    return child


def _maker(plan: Plan, folder: Path, url: str, log: Log, host: int) -> Callable[[], StandIn | Real]:
    def make() -> StandIn | Real:
        cache = open_cache(folder, host, url)
        return Real(cache, log, host) if plan.real else StandIn(cache, log, host, plan.seconds)

    return make


def _disturb(
    plan: Plan, server: RedisServer, log: Log, children: dict[int, int], chance: random.Random
) -> tuple[int, int]:
    """Kill holders and the server, evenly over the programs; wait for all. The numbers of killed and of failed."""
    left, killed, failed, restarts = dict(children), set[int](), 0, 0
    working, compiled = set[tuple[int, int]](), set[int]()  # process and key
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del left[child]
                failed += child not in killed and status != 0
        for line in log.read():
            if line.what == "begin":
                working.add((line.process, line.key))
            elif line.what == "end":
                working.discard((line.process, line.key))
                compiled.add(line.key)
        share = len(compiled) / plan.keys
        victims = sorted({process for process, _ in working if process in left} - killed)
        if victims and len(killed) < plan.kills and share * plan.kills >= len(killed):
            killed.add(victim := chance.choice(victims))
            os.kill(victim, signal.SIGKILL)
        if restarts < plan.restarts and share >= (restarts + 1) / (plan.restarts + 1):
            restarts += 1
            server.kill()
            time.sleep(plan.away)
            server.start()
        time.sleep(0.005)
    return len(killed), failed


def _missing(plan: Plan, folder: Path, url: str, host: int) -> list[int]:
    """The programs that a host finds neither in its directory nor in the tier."""
    if plan.real:
        return []  # their keys are known to the compiler's path alone; the test lets a new host go through them
    with warnings.catch_warnings(), open_cache(folder, host, url) as cache:
        warnings.simplefilter("ignore")
        return [key for key in range(plan.keys) if cache.load(program_name(key)) is None]

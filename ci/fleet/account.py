# SPDX-License-Identifier: Apache-2.0
"""What a fleet compiled while its holders and its server died, and whether anything was lost or wrong."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ci.fleet.server import RedisServer
from ci.fleet.workers import Log, Real, StandIn, open_stack, work


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
        Programs that a new host doesn't find in the tier at the end, and that no process of some host has got.
    wrong : int
        Times that a process got something else.
    failed : int
        Processes that ended by themselves before they had all.
    """

    seconds: float
    compiles: int
    extra: int
    most_by_host: int
    killed: int
    lost: int
    wrong: int
    failed: int

    def faults(self, plan: Plan) -> list[str]:
        """What isn't as it should be."""
        found = [f"{getattr(self, name)} {name}" for name in ("lost", "wrong", "failed") if getattr(self, name)]
        # A killed holder may have compiled, and not published; each host compiles for itself while the server is away.
        allowed = self.killed + plan.restarts * plan.hosts * plan.keys
        if self.extra > allowed:
            found.append(f"{self.extra} extra compiles, where {allowed} may be")
        if self.most_by_host > 1 + plan.restarts + self.killed:
            found.append(f"a host compiled one program {self.most_by_host} times")
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
        children = {_fork(plan, folder, server.url, log, n, seed): n for n in range(plan.processes)}
        killed, failed = _disturb(plan, server, log, children, random.Random(seed))  # noqa: S311 - no secret
        seconds = time.perf_counter() - started
        happened = list(log.read())
        ended = Counter(line.key for line in happened if line.what == "end")
        by_host = Counter((line.key, line.host) for line in happened if line.what == "end")
        got = {(line.key, line.host) for line in happened if line.what == "got"}
        unseen = plan.keys * plan.hosts - len(got)
        return Account(
            seconds=seconds,
            compiles=ended.total(),
            extra=sum(count - 1 for count in ended.values()),
            most_by_host=max(by_host.values(), default=0),
            killed=killed,
            lost=unseen + _missing(plan, folder, server.url),
            wrong=sum(line.what == "wrong" for line in happened),
            failed=failed,
        )


def _fork(plan: Plan, folder: Path, url: str, log: Log, number: int, seed: int) -> int:
    host = number % plan.hosts
    child = os.fork()
    if not child:
        work(_maker(plan, folder, url, log, host), log, host, plan.keys, seed * plan.processes + number)
    return child


def _maker(plan: Plan, folder: Path, url: str, log: Log, host: int) -> Callable[[], StandIn | Real]:
    def make() -> StandIn | Real:
        stack = open_stack(folder, host, url)
        return Real(stack, log, host) if plan.real else StandIn(stack, log, host, plan.seconds)

    return make


def _disturb(
    plan: Plan, server: RedisServer, log: Log, children: dict[int, int], chance: random.Random
) -> tuple[int, int]:
    """Kill holders and the server, evenly over the programs; wait for all. How many were killed, and how many failed."""
    left, killed, failed, restarts = dict(children), set[int](), 0, 0
    while left:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del left[child]
                failed += child not in killed and status != 0
        happened = list(log.read())
        share = len({line.key for line in happened if line.what == "end"}) / plan.keys
        if len(killed) < plan.kills and share * plan.kills >= len(killed):
            ends = {(line.process, line.key) for line in happened if line.what == "end"}
            working = [n.process for n in happened if n.what == "begin" and (n.process, n.key) not in ends]
            if victims := [process for process in working if process in left and process not in killed]:
                killed.add(chance.choice(victims))
                os.kill(max(killed & {*victims}), signal.SIGKILL)
        if restarts < plan.restarts and share >= (restarts + 1) / (plan.restarts + 1):
            restarts += 1
            server.kill()
            time.sleep(plan.away)
            server.start()
        time.sleep(0.005)
    return len(killed), failed


def _missing(plan: Plan, folder: Path, url: str) -> int:
    """How many programs a host that has nothing yet doesn't find in the tier."""
    if plan.real:
        return 0  # their keys are known to the compiler's path alone; the test lets a new host go through them
    with open_stack(folder, plan.hosts, url) as stack:
        return sum(stack.load(f"key {key}".encode()) is None for key in range(plan.keys))

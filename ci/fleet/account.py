# SPDX-License-Identifier: Apache-2.0
"""What a fleet compiled while its holders and its server were killed, and whether anything was lost or wrong."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from ci.fleet.log import Log
from ci.fleet.server import RedisServer
from ci.fleet.verdicts import judge
from ci.fleet.workers import Real, StandIn, open_cache, program, program_name, work
from cuda_progcache.store.tiers import leases


class Plan(NamedTuple):
    """The parameters of a simulation.

    Attributes
    ----------
    hosts, processes : int
        The number of hosts, and of processes in all.
    keys : int
        The number of programs that each process wants.
    seconds : float
        The duration of a stand-in's compile.
    kills : int
        The number of holders that are killed while they compile.
    restarts : int
        How often the server is killed and started again.
    away : float
        Seconds for which it is away.
    lasting : bool
        Whether the server's data survives a kill.
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

    @property
    def soon(self) -> bool:
        """Whether the server is back, with its data, while the leases still wait for it."""
        return self.lasting and self.away < leases.PATIENCE


class Account(NamedTuple):
    """The outcome of a simulation.

    Attributes
    ----------
    start : float
        Seconds in which the processes were started.
    seconds : float
        Seconds from then until the last process had every program and had sent what it compiled.
    busy : float
        CPU seconds of all processes.
    compiles : int
        The number of completed compiles.
    extra : int
        The number of compiles of programs that had been compiled before.
    needless, away, gone : int
        The extra compiles by reason; see :class:`~ci.fleet.verdicts.Extra`.
    most_by_host : int
        The highest number of compiles of one program by one host.
    killed : int
        The number of holders that were killed.
    lost : int
        The number of programs that no process of some host has got, or that are stored nowhere at the end.
    wrong : int
        How often a process got something else.
    failed : int
        The number of processes that ended by themselves before they had every program.
    unpublished : int
        The number of programs that a new host doesn't find in the tier at the end.
    """

    start: float
    seconds: float
    busy: float
    compiles: int
    extra: int
    needless: int
    away: int
    gone: int
    most_by_host: int
    killed: int
    lost: int
    wrong: int
    failed: int
    unpublished: int

    def faults(self, plan: Plan) -> list[str]:
        """Return a description of each fault."""
        found = [f"{getattr(self, name)} {name}" for name in ("lost", "wrong", "failed") if getattr(self, name)]
        if self.most_by_host > 1:  # the host's directory has every program that the host compiled
            found.append(f"a host compiled one program {self.most_by_host} times")
        # Leases wait for a server that is back soon. If it comes back later, or empty, each process may be at a compile
        # that no other host knows of.
        if self.needless > plan.restarts * (plan.hosts if plan.soon else plan.processes):
            found.append(f"{self.needless} needless compiles")
        if not plan.restarts and not plan.kills and (self.extra or self.unpublished):
            found.append(f"{self.extra} extra compiles and {self.unpublished} unpublished programs without any trouble")
        return found


def simulate(plan: Plan, folder: Path, seed: int = 0) -> Account:
    """Simulate a fleet that goes through its programs.

    Parameters
    ----------
    plan : Plan
        What to simulate.
    folder : path
        An empty folder for the hosts' directories and the server's files.
    seed : int
        The seed for the processes' orders and for the choice of the holders to kill.
    """
    log = Log(folder / "log")
    with RedisServer(folder / "redis", lasting=plan.lasting) as server:
        for key in range(plan.keys):
            program(key)  # cached before the fork, so that no process has to make it
        began = time.perf_counter()
        fleet = _Fleet(plan, folder, server, log, seed)
        started = time.perf_counter()
        fleet.start()
        fleet.disturb(random.Random(seed))  # noqa: S311 - no secret
        seconds = time.perf_counter() - started
        happened = log.all()
        log.close()
        ended = Counter(line.key for line in happened if line.what == "end")
        by_host = Counter((line.key, line.host) for line in happened if line.what == "end")
        got = {(line.key, line.host) for line in happened if line.what == "got"}
        missing = _missing(plan, folder, server.url, plan.hosts)
        gone = set(missing)
        for host in range(plan.hosts):
            gone &= set(_missing(plan, folder, "redis://127.0.0.1:1", host)) if gone else gone
        return Account(
            start=started - began,
            seconds=seconds,
            busy=fleet.busy,
            compiles=ended.total(),
            extra=sum(count - 1 for count in ended.values()),
            **judge(happened)._asdict(),
            most_by_host=max(by_host.values(), default=0),
            killed=len(fleet.killed),
            lost=plan.keys * plan.hosts - len(got) + len(gone),
            wrong=sum(line.what == "wrong" for line in happened),
            failed=fleet.failed,
            unpublished=len(missing),
        )


class _Fleet:
    """The processes of a fleet, all of them ready to start.

    Attributes
    ----------
    killed : set of int
        The processes that were killed.
    failed : int
        The number of processes that ended by themselves before they had every program.
    busy : float
        CPU seconds of the processes that have ended.
    """

    def __init__(self, plan: Plan, folder: Path, server: RedisServer, log: Log, seed: int) -> None:
        self._plan, self._folder, self._server, self._log = plan, folder, server, log
        self.killed = set[int]()
        self.failed, self.busy = 0, 0.0
        ready, self._ready = os.pipe()
        self._gate, self._barrier = os.pipe()
        self._left = {self._fork(n, seed) for n in range(plan.processes)}
        os.close(self._ready)
        os.close(self._gate)
        missing = plan.processes
        while missing and (told := os.read(ready, missing)):
            missing -= len(told)
        os.close(ready)

    def start(self) -> None:
        """Let the processes go."""
        os.close(self._barrier)

    def _fork(self, number: int, seed: int) -> int:
        plan, host = self._plan, number % self._plan.hosts
        order = list(range(plan.keys))
        random.Random(seed * plan.processes + number).shuffle(order)  # noqa: S311 - no secret
        child = os.fork()
        if not child:
            os.close(self._barrier)
            work(lambda: self._worker(host), self._wait, self._log, host, order)
        return child

    def _worker(self, host: int) -> StandIn | Real:
        # Many processes share few processors: a slow answer isn't the server's fault, and a slow process isn't dead.
        leases.REMEMBERED = 600.0
        if self._plan.soon:
            leases.PATIENCE = 60.0
        if not (self._plan.kills or self._plan.restarts):
            leases.LIFE = 600.0  # no lease has to expire, for its holder lives and the server answers it
        cache = open_cache(self._folder, host, f"{self._server.url}?connect_timeout=300&timeout=300&write_timeout=300")
        if self._plan.real:
            return Real(cache, self._log, host)
        return StandIn(cache, self._log, host, self._plan.seconds, self._server)

    def _wait(self) -> None:
        """Wait, in a process of the fleet, until all processes are ready."""
        os.write(self._ready, b".")
        os.close(self._ready)
        os.read(self._gate, 1)

    def disturb(self, chance: random.Random) -> None:
        """Kill holders and the server, spread evenly over the programs; wait for all processes."""
        plan, restarts = self._plan, 0
        working, compiled = set[tuple[int, int]](), set[int]()  # process and key
        while self._left:
            self._collect()
            for line in self._log.news():
                if line.what in {"begin", "there", "away"}:
                    working.add((line.process, line.key))
                elif line.what == "end":
                    working.discard((line.process, line.key))
                    compiled.add(line.key)
            share = len(compiled) / plan.keys
            victims = sorted({process for process, _ in working if process in self._left} - self.killed)
            if victims and len(self.killed) < plan.kills and share * plan.kills >= len(self.killed):
                self._kill(chance.choice(victims))
            if restarts < plan.restarts and share >= (restarts + 1) / (plan.restarts + 1):
                restarts += 1
                self._server.kill()
                time.sleep(plan.away)
                self._server.start()
            time.sleep(0.005)

    def _kill(self, victim: int) -> None:
        self.killed.add(victim)
        os.kill(victim, signal.SIGKILL)
        os.waitid(os.P_PID, victim, os.WEXITED | os.WNOWAIT)  # after this it writes nothing more
        self._log.add("killed", -1, -1, victim)

    def _collect(self) -> None:
        for child in list(self._left):
            ended, status, used = os.wait4(child, os.WNOHANG)
            if ended:
                self._left.remove(child)
                self.busy += used.ru_utime + used.ru_stime
                self.failed += child not in self.killed and status != 0


def _missing(plan: Plan, folder: Path, url: str, host: int) -> list[int]:
    """Return the programs that a host finds neither in its directory nor in the tier."""
    if plan.real:
        return []  # only the compilers know the keys of real programs
    with warnings.catch_warnings(), open_cache(folder, host, url) as cache:
        warnings.simplefilter("ignore")
        missing = [key for key in range(plan.keys) if cache.load(program_name(key)) is None]
        if cache._stack is not None:  # what was found is being copied to the directory, which is about to be removed
            cache._stack.flush(60.0)
        return missing

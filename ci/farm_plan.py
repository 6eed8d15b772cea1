# SPDX-License-Identifier: Apache-2.0
"""Simulation of a large prewarm on a farm: ``python -m ci.farm_plan``.

The programs are stand-ins with measured costs. :func:`cuda_progcache.service.farm.tasks`, the farm's own function,
divides them into portions, which are handed out as an executor does: the next portion to the first free worker.
"""

from __future__ import annotations

import functools
import heapq
import sys
from collections.abc import Iterator
from typing import NamedTuple

from cuda_progcache.service.farm import Task, tasks
from cuda_progcache.service.plan import Load


class Costs(NamedTuple):
    """Durations in seconds, and the size of a program.

    Attributes
    ----------
    light, heavy : float
        A compile that reads few headers, and one that reads many (NVRTC 13.5; ``cub::BlockReduce``).
    behind : float
        A heavy compile with a precompiled header.
    header : float
        Precompiling a header.
    start : float
        Starting a compiler process, until its first compile.
    publish : float
        Making the key and record, and queueing the program for the tier; the upload overlaps with the next compile.
    hand : float
        The scheduler's work per portion; portions are handed out one at a time.
    look : float
        Looking up a program; the caller looks programs up one at a time.
    size : int
        Size of a program with its record, in bytes.
    """

    light: float = 0.026
    heavy: float = 1.38
    behind: float = 0.515
    header: float = 0.47
    start: float = 0.3
    publish: float = 0.003
    hand: float = 0.001
    look: float = 0.001
    size: int = 25_000


_MEASURED = Costs()


class Programs(NamedTuple):
    """The programs to prewarm.

    Attributes
    ----------
    variants, archs : int
        The number of variants, and of architectures for each.
    heavy : float
        The fraction of variants that read many headers.
    alike : int
        How many heavy variants begin with the same headers and flags; different architectures have different flags.
    """

    variants: int = 10_000
    archs: int = 6
    heavy: float = 0.2
    alike: int = 50


class Job(NamedTuple):
    """A program, with the attributes needed to divide programs into portions."""

    number: int
    load: Load


class Plan(NamedTuple):
    """The simulated run of a farm.

    Attributes
    ----------
    hosts, workers : int
        The number of hosts, and of workers on all hosts.
    portions : int
        The number of portions.
    seconds : float
        Time from the first portion until the last program is in the tier.
    idle : float
        The fraction of the workers' time in which they are idle.
    hours : float
        Total compile time, in hours.
    handing : float
        Seconds that the scheduler spends on handing out portions. If that is close to the wall time, more hosts don't
        help.
    rate : float
        Mean rate of data into the tier, in bytes per second.
    """

    hosts: int
    workers: int
    portions: int
    seconds: float
    idle: float
    hours: float
    handing: float
    rate: float


@functools.lru_cache(maxsize=1)
def jobs(programs: Programs) -> tuple[Job, ...]:
    """Return the programs, each with its load on the compiler's front end."""
    return tuple(_jobs(programs))


def _jobs(programs: Programs) -> Iterator[Job]:
    heavy = int(programs.variants * programs.heavy)
    for variant in range(programs.variants):
        for arch in range(programs.archs):
            prefix = f"{variant // programs.alike} {arch}" if variant < heavy else None
            yield Job(variant * programs.archs + arch, Load(prefix is not None, prefix))


def takes(task: Task, costs: Costs) -> float:
    """Return the seconds that a worker takes for a portion."""
    count = len(task.jobs)
    if task.precompile:  # the first is compiled while its header is precompiled
        work = costs.start + costs.header + costs.heavy + (count - 1) * costs.behind
    else:
        load: Load = task.jobs[0].load  # type: ignore[attr-defined]  # the job is a stand-in
        work = count * (costs.heavy if load.heavy else costs.light)
    return work + count * costs.publish


def plan(
    programs: Programs, hosts: int, workers_each: int = 16, costs: Costs = _MEASURED, lost: int = 0
) -> Plan:  # fmt: skip
    """Simulate a prewarm.

    Parameters
    ----------
    programs : Programs
    hosts, workers_each : int
        The number of hosts, and of workers per host.
    costs : Costs
    lost : int
        The number of hosts that die halfway; other workers redo the portions in progress there.
    """
    workers = hosts * workers_each
    made = tasks(jobs(programs), lambda job: job.load, workers)  # type: ignore[arg-type, attr-defined]
    seconds = [takes(task, costs) for task in made]
    free = [(costs.start, worker) for worker in range(workers)]
    dies = sum(seconds) / workers / 2
    handed = busy = 0.0
    waiting = list(reversed(seconds))
    ends = 0.0
    while waiting:
        now, worker = heapq.heappop(free)
        work = waiting.pop()
        handed = max(handed, now) + costs.hand  # portions are handed out one at a time
        end = handed + work
        if worker < lost * workers_each and end > dies:
            waiting.append(work)  # the worker is lost; another one redoes its portion
            continue
        busy += work
        ends = max(ends, end)
        heapq.heappush(free, (end, worker))
    return Plan(
        hosts=hosts,
        workers=workers,
        portions=len(made),
        seconds=ends,
        idle=1 - busy / (ends * workers),
        hours=sum(seconds) / 3600,
        handing=len(made) * costs.hand,
        rate=programs.variants * programs.archs * costs.size / ends,
    )


#: The farms to simulate, by their label in the table: the number of hosts, and of hosts that die.
FARMS = {"1": (1, 0), "10": (10, 0), "100": (100, 0), "100, of which 10 die halfway": (100, 10), "400": (400, 0)}


def table() -> str:
    """Return the plans for several farms as a Markdown table."""
    lines = [
        "| hosts | workers | batches | wall | CPU hours | idle | handing out | into the tier |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (hosts, lost) in FARMS.items():
        made = plan(Programs(), hosts, lost=lost)
        lines.append(
            f"| {name} | {made.workers:,} | {made.portions:,} | {_time(made.seconds)} | {made.hours:.1f} | "
            f"{made.idle:.0%} | {made.handing:.1f} s | {made.rate / 1e6:.1f} MB/s |"
        )
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")

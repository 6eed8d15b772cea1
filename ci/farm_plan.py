# SPDX-License-Identifier: Apache-2.0
"""``python -m ci.farm_plan``: a large prewarm on paper, by the portions that the farm really makes of it.

The programs are stand-ins with the costs of measured ones; :func:`cuda_progcache.service.farm.tasks` portions them, and
they are handed out as an executor does it: the next portion to the first worker that is free.
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
    """What things take, in seconds, but for the sizes.

    Attributes
    ----------
    light, heavy : float
        A compile that reads few headers, and one that reads many (NVRTC 13.5; ``cub::BlockReduce``).
    behind : float
        A heavy one behind its precompiled header.
    header : float
        Precompiling a header.
    start : float
        A compiling process, until it compiles.
    publish : float
        Key, record, and handing the program to the tier; it travels beside the next compile.
    hand : float
        The scheduler's share of a portion, one after the other.
    look : float
        Looking a program up, by the one who asks, one after the other.
    size : int
        Bytes of a program with its record.
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
    """What is wanted.

    Attributes
    ----------
    variants, archs : int
    heavy : float
        The share of them that reads many headers.
    alike : int
        Heavy variants that begin with the same headers and flags; another architecture is another flag.
    """

    variants: int = 10_000
    archs: int = 6
    heavy: float = 0.2
    alike: int = 50


class Job(NamedTuple):
    """A program, as far as the portions go."""

    number: int
    load: Load


class Plan(NamedTuple):
    """What a farm makes of it.

    Attributes
    ----------
    hosts, workers : int
        Hosts, and workers in all.
    portions : int
    seconds : float
        From the first portion until the last program is in the tier.
    idle : float
        The share of the workers' time in which they have nothing to do.
    hours : float
        Of compiling, added up.
    handing : float
        Seconds in which the scheduler hands portions out: where that comes near the wall time, more hosts don't help.
    rate : float
        Bytes a second into the tier, on average.
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
    """The programs, each with what it asks of the front end."""
    return tuple(_jobs(programs))


def _jobs(programs: Programs) -> Iterator[Job]:
    heavy = int(programs.variants * programs.heavy)
    for variant in range(programs.variants):
        for arch in range(programs.archs):
            prefix = f"{variant // programs.alike} {arch}" if variant < heavy else None
            yield Job(variant * programs.archs + arch, Load(prefix is not None, prefix))


def takes(task: Task, costs: Costs) -> float:
    """Seconds that a worker takes for a portion."""
    count = len(task.jobs)
    if task.precompile:  # the first is compiled while its header is precompiled
        work = costs.start + costs.header + costs.heavy + (count - 1) * costs.behind
    else:
        load: Load = task.jobs[0].load  # type: ignore[attr-defined]  # a stand-in's
        work = count * (costs.heavy if load.heavy else costs.light)
    return work + count * costs.publish


def plan(
    programs: Programs, hosts: int, workers_each: int = 16, costs: Costs = _MEASURED, lost: int = 0
) -> Plan:  # fmt: skip
    """Hand the portions out.

    Parameters
    ----------
    programs : Programs
    hosts, workers_each : int
    costs : Costs
    lost : int
        Hosts that die halfway; what their workers had is done again by others.
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
        handed = max(handed, now) + costs.hand  # one after the other
        end = handed + work
        if worker < lost * workers_each and end > dies:
            waiting.append(work)  # it is gone, and what it had is another's
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


#: Farms, by what is told of them.
FARMS = {"1": (1, 0), "10": (10, 0), "100": (100, 0), "100, of which 10 die halfway": (100, 10), "400": (400, 0)}


def table() -> str:
    """The plan for several farms, in Markdown."""
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

# SPDX-License-Identifier: Apache-2.0
"""Processes that wait for another's compile: the delay after it is published, or after its process is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ci.bench.batches import BUSY
from ci.bench.harness import OURS, Benchmark, at_most
from ci.bench.programs import ARCH

# Its lines give the times at which it began to compile, had published the program, and had the program. The clock
# is the machine's, the same for all processes.
_WORKER = f"""
import sys, time
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.compile import compilers, miss
compilers.supported_archs()
cache = FileStreamProgramCache(sys.argv[1])
run, publish = miss._run, cache.publish

def compiling(*given, **named):
    print("compiling", time.monotonic(), flush=True)
    return run(*given, **named)

def published(*given):
    kept = publish(*given)
    print("published", time.monotonic(), flush=True)
    return kept

miss._run, cache.publish = compiling, published
print("ready", time.monotonic(), flush=True)
for line in sys.stdin:
    source = {BUSY!r} + "__device__ int fresh_" + line.strip() + ";"  # a comment alone would be a hit
    done = Program(source, "c++", ProgramOptions(arch={ARCH!r})).compiled("cubin", cache=cache)
    print("hit" if done.hit else "compiled", time.monotonic(), flush=True)
"""
#: Seconds after which a process that found another one compiling is waiting: it has checked the cache and the lease.
_SETTLED = 0.1


class _Worker:
    def __init__(self, cache: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.expect("ready")

    def ask(self, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def hear(self) -> tuple[str, float]:
        assert self.process.stdout is not None
        what, when = self.process.stdout.readline().split()
        return what, float(when)

    def expect(self, what: str) -> float:
        said, when = self.hear()
        assert said == what, f"{said!r} where {what!r} was expected"
        return when


@contextmanager
def _worker(cache: Path) -> Iterator[_Worker]:
    worker = _Worker(cache)
    with worker.process:  # closes its input at the end, which makes it exit
        yield worker


def _wake(directory: Path, effort: float) -> dict[str, list[float]]:
    """Time the delay between the publication and the moment at which a waiting process has the program."""
    taken = []
    with _worker(directory / "cache") as holder, _worker(directory / "cache") as waiter:
        for number in range(max(2, round(20 * effort))):
            holder.ask(number)
            holder.expect("compiling")
            waiter.ask(number)
            published = holder.expect("published")
            holder.expect("compiled")
            taken.append(waiter.expect("hit") - published)
    return {OURS: taken}


def _take_over(directory: Path, effort: float) -> dict[str, list[float]]:
    """Time the delay between the holder's death and the start of the compiler in a waiting process."""
    taken = []
    with _worker(directory / "cache") as waiter:
        for number in range(max(2, round(8 * effort))):
            with _worker(directory / "cache") as holder:
                holder.ask(number)
                holder.expect("compiling")
                waiter.ask(number)
                time.sleep(_SETTLED)
                holder.process.kill()
                killed = time.monotonic()
            said, when = waiter.hear()
            if said == "compiling":  # otherwise the holder finished before it died
                taken.append(when - killed)
                waiter.expect("published")
                waiter.expect("compiled")
    assert taken, "no holder was killed in time"
    return {OURS: taken}


BENCHMARKS = (
    Benchmark(
        "waiters.wake",
        "from the publication to the program in a process that waited, the slowest",
        at_most(50e-3),
        samples=_wake,
        statistic="p99",
    ),
    Benchmark(
        "waiters.take_over",
        "from the holder's kill to the compiler's start in a process that waited, the slowest",
        at_most(2.0),
        samples=_take_over,
        statistic="p99",
    ),
)

# SPDX-License-Identifier: Apache-2.0
"""The plan of a batch: which compile is next, which worker does it, and how. This module decides but doesn't compile.

NVRTC releases the GIL, so light compiles run in parallel threads. Front ends that read a hundred headers or more slow
each other down in one process: two threads take 0.9 of the time of one, two processes 0.45. If several compiles begin
with the same includes, a worker process can precompile these (:mod:`cuda_progcache.compile.precompiled`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

#: The number of compiles with the same includes from which a precompiled header pays: making the header costs 0.6 of a
#: compile, and each further compile takes 0.4 of one.
WORTH_PRECOMPILING = 3


@dataclass(frozen=True)
class Load:
    """The load that a compile puts on the front end.

    Attributes
    ----------
    heavy : bool
        Whether it reads many headers.
    prefix : str or None
        An identifier of its leading includes, flags and search path; None if the includes can't be precompiled.
    """

    heavy: bool
    prefix: str | None = None


class Step(NamedTuple, Generic[T]):
    """A job, whether to compile it with a precompiled header, and the prefix of that header."""

    job: T
    precompile: bool
    prefix: str | None


class Plan(Generic[T]):
    """The jobs of a batch, handed out one by one to any number of workers, heavy jobs first.

    Parameters
    ----------
    jobs : sequence
    load_of : callable
        Returns the :class:`Load` of a job.

    Notes
    -----
    A worker stays with the includes that it has precompiled. Another worker precompiles the same includes only if
    enough jobs are left for both. No job is assigned in advance, so no worker is left with a long tail.
    """

    def __init__(self, jobs: Sequence[T], load_of: Callable[[T], Load]) -> None:
        self._lock = threading.Lock()
        self._groups: dict[str, deque[T]] = {}
        self._workers: dict[str, int] = {}
        heavy: list[T] = []
        light: list[T] = []
        for job in jobs:
            load = load_of(job)
            if load.heavy and load.prefix is not None:
                self._groups.setdefault(load.prefix, deque()).append(job)
            else:
                (heavy if load.heavy else light).append(job)
        for prefix in [p for p, group in self._groups.items() if len(group) < WORTH_PRECOMPILING]:
            heavy += self._groups.pop(prefix)
        self.heavy = len(heavy) + sum(map(len, self._groups.values()))
        """The number of heavy jobs."""
        self._single = deque([*heavy, *light])

    @property
    def precompiles(self) -> bool:
        """Whether any jobs are to be compiled with a precompiled header."""
        return bool(self._groups)

    def wants_processes(self, workers: int) -> bool:
        """Whether worker processes pay for these jobs and this number of workers."""
        return self.precompiles or (workers > 1 and self.heavy > 1)

    def take(self, held: str | None = None) -> Step[T] | None:
        """Return the next job; None if no jobs are left.

        Parameters
        ----------
        held : str or None
            The prefix that the calling worker precompiled last.
        """
        with self._lock:
            prefix = held if self._groups.get(held or "") else self._largest_group()
            if prefix is not None:
                group = self._groups[prefix]
                if prefix != held:
                    self._workers[prefix] = self._workers.get(prefix, 0) + 1
                # A worker that joins a small group late compiles without precompiling.
                precompile = prefix == held or len(group) >= WORTH_PRECOMPILING * self._workers[prefix]
                return Step(group.popleft(), precompile, prefix if precompile else None)
            return Step(self._single.popleft(), precompile=False, prefix=None) if self._single else None

    def _largest_group(self) -> str | None:
        """Return the prefix with the most jobs left per worker, counting the worker that would join."""
        left = {p: len(group) / (self._workers.get(p, 0) + 1) for p, group in self._groups.items() if group}
        return max(left, key=lambda prefix: left[prefix]) if left else None

    def cancel(self) -> None:
        """Discard the jobs that are left."""
        with self._lock:
            self._groups.clear()
            self._single.clear()

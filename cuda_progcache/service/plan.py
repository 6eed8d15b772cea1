# SPDX-License-Identifier: Apache-2.0
"""Which compile of a batch is done next, by whom, and how: decisions alone, nothing is compiled here.

NVRTC lets go of the interpreter's lock, so light compiles go side by side in threads. Front ends that read a hundred
headers and more stand in each other's way in one process (two threads take 0.9 of the time of one, two processes 0.45),
and where several of them begin with the same includes, a process of their own can precompile these
(:mod:`cuda_progcache.compile.precompiled`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")

#: Compiles over the same includes from which a precompiled header pays: making one costs 0.6 of a compile, and each
#: further compile takes 0.4 of one.
WORTH_PRECOMPILING = 3


@dataclass(frozen=True)
class Load:
    """What a compile asks of the front end.

    Attributes
    ----------
    heavy : bool
        Whether it reads many headers.
    prefix : str or None
        Names the includes that it begins with, its flags and its search path; None where these can't be precompiled.
    """

    heavy: bool
    prefix: str | None = None


class Step(NamedTuple, Generic[T]):
    """A job, and whether to do it behind a precompiled header."""

    job: T
    precompile: bool
    prefix: str | None


class Plan(Generic[T]):
    """The jobs of a batch, handed out one by one to any number of workers: heavy ones first.

    Parameters
    ----------
    jobs : sequence
        What is to be done.
    load_of : callable
        The :class:`Load` of a job.

    Notes
    -----
    A worker stays with the includes that it has precompiled; another one joins it only where enough is left for both.
    Nothing is shared out in advance, so that no worker is left with a long tail.
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
        """How many of the jobs are heavy."""
        self._single = deque([*heavy, *light])

    @property
    def precompiles(self) -> bool:
        """Whether any of the jobs is to be done behind a precompiled header."""
        return bool(self._groups)

    def wants_processes(self, workers: int) -> bool:
        """Whether processes of their own pay for these jobs, with so many workers."""
        return self.precompiles or (workers > 1 and self.heavy > 1)

    def take(self, held: str | None = None) -> Step[T] | None:
        """The next job; None when there is none left.

        Parameters
        ----------
        held : str or None
            The prefix that this worker has precompiled last.
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
        """The prefix with the most jobs left for each worker that is at it."""
        left = {p: len(group) / (self._workers.get(p, 0) + 1) for p, group in self._groups.items() if group}
        return max(left, key=lambda prefix: left[prefix]) if left else None

    def cancel(self) -> None:
        """Hand out nothing more."""
        with self._lock:
            self._groups.clear()
            self._single.clear()

# SPDX-License-Identifier: Apache-2.0
"""Every order of the calls of a few actors that can matter, one execution each.

Two calls that don't touch the same thing can be done in either order: the disk is the same afterwards. So of all
interleavings only one of each class of equals has to be run. This is dynamic partial-order reduction with sleep sets
(C. Flanagan, P. Godefroid, "Dynamic partial-order reduction for model checking software", POPL 2005): run one
execution, find the pairs of calls of two actors that conflict and are ordered by nothing else, and run others in which
the second comes first, until none is left. Each execution starts from the beginning, as actors can't be copied.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from ci.schedules.disk import Call, Disk


class _Stopped(BaseException):
    """Ends an actor in the middle of a call: it was killed, or its schedule is no use."""


class Step(NamedTuple):
    """A call that was made, and by which actor."""

    actor: int
    call: Call


class Outcome(NamedTuple):
    """What came of an actor's work: what it returned or raised; ``None`` and ``None`` if it was killed.

    Attributes
    ----------
    first, last : int
        Steps between which it worked: no step of another actor before ``first`` came after this actor had begun.
    """

    value: Any
    error: BaseException | None
    killed: bool
    first: int
    last: int


class Execution(NamedTuple):
    """One schedule, run to its end."""

    disk: Disk
    steps: list[Step]
    outcomes: list[Outcome]


class _Actor:
    def __init__(self, number: int, work: Callable[[], Any]) -> None:
        self.number, self.work = number, work
        self.go = threading.Semaphore(0)
        self.pending: Call | None = None
        self.killed = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.calls = 0
        self.first: int | None = None
        self.last = 0


class Run:
    """One execution: the actors take turns, call by call, as ``choose`` says.

    Parameters
    ----------
    disk : Disk
        Used up by it.
    works : sequence of callable
        What each actor does; called in a thread of its own, one at a time.
    choose : callable
        Given the actors that could go on, by number with their next calls, says which does; ``None``: stop here.
    kill : tuple of int, or None
        Actor, and how many calls it makes before it is killed.
    fail : tuple of (int, int, callable), or None
        Actor, number of a call, and what makes the error that it raises instead.
    """

    here = threading.local()

    def __init__(
        self, disk: Disk, works: Sequence[Callable[[], Any]], choose: Callable[[dict[int, Call]], int | None], *,
        kill: tuple[int, int] | None = None, fail: tuple[int, int, Callable[[Call], OSError]] | None = None,
    ) -> None:  # fmt: skip
        self.disk = disk
        self.steps: list[Step] = []
        self._actors = [_Actor(number, work) for number, work in enumerate(works)]
        self._choose, self._kill, self._fail = choose, kill, fail
        self._done = threading.Semaphore(0)
        self.stopped = False

    def run(self) -> Execution | None:
        """Run it; ``None`` if ``choose`` stopped it."""
        self.disk.before = self._before
        for actor in self._actors:  # each up to its first call
            _pool.submit(self._live, actor)
            self._done.acquire()
        self._next()
        self._done.acquire()
        self.disk.before = None
        if self.stopped:
            return None
        outcomes = [Outcome(a.value, a.error, a.killed, a.first or 0, a.last) for a in self._actors]
        return Execution(self.disk, self.steps, outcomes)

    def _live(self, actor: _Actor) -> None:
        self.here.actor = actor
        try:
            actor.value = actor.work()
        except _Stopped:
            actor.killed = True
        except BaseException as exc:  # noqa: BLE001 - the invariants say what may be raised
            actor.error = exc
        self.here.actor = None
        started = actor.pending is not None
        actor.pending = None
        actor.last = len(self.steps)
        if started:
            self._next()
        else:
            self._done.release()  # without a single call

    def _before(self, call: Call) -> None:
        actor: _Actor | None = getattr(self.here, "actor", None)
        if actor is None:
            return
        if actor.killed:
            raise _Stopped  # what a program does about an exception, a killed one doesn't
        first = actor.pending is None
        actor.pending = call
        if first:
            self._done.release()
            actor.go.acquire()
        else:
            self._next(actor)
        if actor.first is None:
            actor.first = len(self.steps)
        if self.stopped or self._kill == (actor.number, actor.calls):
            actor.killed = True
            self.steps.append(Step(actor.number, Call("kill", call.path, frozenset(), frozenset())))
            raise _Stopped
        self.steps.append(Step(actor.number, call))
        actor.calls += 1
        if self._fail is not None and self._fail[:2] == (actor.number, actor.calls - 1):
            raise self._fail[2](call)

    def _next(self, running: _Actor | None = None) -> None:
        """Choose who goes on, and let that actor go; returns when it is ``running``'s turn."""
        enabled = {actor.number: actor.pending for actor in self._actors if actor.pending is not None}
        if not enabled:
            self._done.release()
            return
        chosen = None if self.stopped else self._choose(enabled)
        if chosen is None:
            self.stopped = True
            chosen = min(enabled)  # one after the other they end
        if running is None or chosen != running.number:
            self._actors[chosen].go.release()
            if running is not None:
                running.go.acquire()


class _Pool:
    """Threads that are used again: to start one takes longer than most schedules."""

    def __init__(self) -> None:
        self._idle: list[_Thread] = []

    def submit(self, work: Callable[[_Actor], None], actor: _Actor) -> None:
        thread = self._idle.pop() if self._idle else _Thread(self._idle)
        thread.give(work, actor)


class _Thread:
    def __init__(self, idle: list[_Thread]) -> None:
        self._idle = idle
        self._given = threading.Semaphore(0)
        self._work: tuple[Callable[[_Actor], None], _Actor] | None = None
        threading.Thread(target=self._loop, daemon=True).start()

    def give(self, work: Callable[[_Actor], None], actor: _Actor) -> None:
        self._work = work, actor
        self._given.release()

    def _loop(self) -> None:
        while True:
            self._given.acquire()
            assert self._work is not None
            work, actor = self._work
            self._idle_later(actor)
            work(actor)

    def _idle_later(self, actor: _Actor) -> None:
        # Given back when its actor's run is over; a thread that is still on its way waits at its semaphore.
        before = actor.work

        def then() -> Any:
            try:
                return before()
            finally:
                self._idle.append(self)

        actor.work = then


_pool = _Pool()


class _Node:
    """A moment of an execution at which somebody was chosen."""

    __slots__ = ("chosen", "done", "pending", "sleep", "todo")

    def __init__(self, pending: dict[int, Call], sleep: dict[int, Call]) -> None:
        self.pending = pending
        self.sleep = sleep  # who needs not go on from here: it was tried from an earlier node with the same outcome
        self.done: dict[int, Call] = {}
        self.todo: set[int] = set()
        self.chosen = -1


Make = Callable[[], tuple[Disk, Sequence[Callable[[], Any]]]]


class Count:
    """Schedules run to their end, and those given up because an equal one had been run."""

    def __init__(self) -> None:
        self.complete = self.pruned = 0
        self.exhausted = True


def every_schedule(make: Make, count: Count, *, at_most: int | None = None, **stops: Any) -> Iterator[Execution]:
    """Run every class of schedules once.

    Parameters
    ----------
    make : callable
        Gives a disk and what the actors do on it, each time the same.
    count : Count
        Told how many.
    at_most : int, optional
        Give up after so many schedules; ``count.exhausted`` is then false.
    **stops
        ``kill`` or ``fail`` of :class:`Run`.
    """
    path: list[_Node] = []
    while True:
        depth = 0

        def choose(pending: dict[int, Call]) -> int | None:
            nonlocal depth
            if depth == len(path):
                before = path[-1] if path else None
                sleep = {} if before is None else _asleep(before)
                node = _Node(dict(pending), sleep)
                awake = [number for number in pending if number not in sleep]
                path.append(node)
                if not awake:
                    return None
                last = before.chosen if before is not None else -1
                node.chosen = last if last in awake else awake[0]
            chosen = path[depth].chosen
            depth += 1
            return chosen

        disk, works = make()
        run = Run(disk, works, choose, **stops)
        execution = run.run()
        if execution is None:
            count.pruned += 1
        else:
            count.complete += 1
            yield execution
        _find_races(path, run.steps)
        while path:
            node = path[-1]
            if node.chosen >= 0:
                node.done[node.chosen] = node.pending[node.chosen]
            ahead = sorted(node.todo - node.done.keys() - node.sleep.keys())
            if ahead:
                node.chosen = ahead[0]
                break
            path.pop()
        if not path:
            return
        if at_most is not None and count.complete >= at_most:
            count.exhausted = False
            return


def _asleep(node: _Node) -> dict[int, Call]:
    """Who sleeps after the step chosen at ``node``: who slept or was tried there, unless the step wakes them."""
    made = node.pending[node.chosen]
    return {
        number: call
        for number, call in {**node.sleep, **node.done}.items()
        if number != node.chosen and not call.conflicts(made)
    }


def _find_races(path: list[_Node], steps: list[Step]) -> None:
    """Note at each node who has to be tried there as well."""
    clocks: list[dict[int, int]] = []  # of each step: the last step of each actor that came before it
    latest: dict[int, dict[int, int]] = {}  # of each actor
    ends = [*steps]
    if path and path[-1].chosen < 0:  # given up: what would have come next conflicts, too
        ends += [Step(number, call) for number, call in path[-1].pending.items()]
    for i, (actor, call) in enumerate(ends):
        clock = dict(latest.get(actor, {}))
        for j in range(min(i, len(steps)) - 1, -1, -1):
            other, earlier = ends[j]
            if other == actor or clock.get(other, -1) >= j or not call.conflicts(earlier):
                continue
            node = path[j]
            node.todo |= {actor} if actor in node.pending else set(node.pending)
            for who, when in clocks[j].items():
                clock[who] = max(clock.get(who, -1), when)
        if i < len(steps):
            clock[actor] = i
            clocks.append(clock)
            latest[actor] = clock


def random_schedules(make: Make, seed: int, number: int, **stops: Any) -> Iterator[Execution]:
    """Run so many schedules in which turns are drawn, each with another inclination to change."""
    for turn in range(number):
        draw = random.Random(f"{seed}/{turn}")  # noqa: S311 - no secret
        change, last = draw.choice((0.05, 0.2, 0.5, 0.9)), -1

        def choose(pending: dict[int, Call], draw: random.Random = draw, change: float = change) -> int:
            nonlocal last
            if last not in pending or draw.random() < change:
                last = draw.choice(sorted(pending))
            return last

        disk, works = make()
        execution = Run(disk, works, choose, **stops).run()
        assert execution is not None
        yield execution

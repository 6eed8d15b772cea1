# SPDX-License-Identifier: Apache-2.0
"""What is tried: operations of the store by two or three processes on one directory, and what must hold afterwards.

After each schedule:

1. Every value that anybody read was published under its key, whole, with its own record.
2. What is there is what the operations give in some order, one after the other, that fits when each began and ended; of
   a killed one, with or without it. Of several removals at a time, all but one may come to nothing: while one has the
   entry moved aside, only to put it back, the others find none.
3. Where a writer put its entry in place after the last removal of it, and the write returned, it is a hit: nobody takes
   away what he hasn't looked at.
4. No entry lies there without a record, and nothing in ``tmp/``; after a kill, when the next process has been here.
5. The directory works: a write is kept and read.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

from ci.schedules import disk as disks
from ci.schedules.disk import Disk
from ci.schedules.explore import Count, Execution, every_schedule, random_schedules
from cuda_progcache._util import liveness
from cuda_progcache.store import FileStreamProgramCache, entry_digest

ROOT = f"{disks.MOUNT}/cache"
STAGING = {os.path.join(ROOT, name) for name in ("tmp", "removed")}
KEY = b"k"
DIGEST = entry_digest(KEY)
ENTRY = f"{ROOT}/entries/{DIGEST[:2]}/{DIGEST[2:]}"
RECORD = f"{ROOT}/records/{DIGEST[:2]}/{DIGEST[2:]}"
OLD = b"old value"
#: Of the key in the sequential model: absent, or which value.
State = bytes | None


class Operation(NamedTuple):
    """Something that a process does with the key.

    Attributes
    ----------
    act : callable
        Does it with a store.
    gives : callable
        From the state before, the state after; the model that it is held against.
    writes : bytes or None
        What it publishes.
    """

    act: Callable[[FileStreamProgramCache], Any]
    gives: Callable[[State], State]
    writes: bytes | None = None

    @property
    def removes(self) -> bool:
        """Whether it takes an entry away that is whole."""
        return self.gives(OLD) is None


def _put(value: bytes) -> Operation:
    def act(store: FileStreamProgramCache) -> bool:
        return store.publish(KEY, value, _record(value))

    return Operation(act, lambda _: value, value)


def _delete(store: FileStreamProgramCache) -> bool:
    try:
        del store[KEY]
    except KeyError:
        return False
    return True


def _read(store: FileStreamProgramCache) -> Any:
    entry = store.load(KEY)
    return None if entry is None else (entry.data, dict(entry.record))


def _pin_and_look(store: FileStreamProgramCache) -> bool:
    """Whether a pin that returned held."""
    try:
        store.pin(KEY)
    except KeyError:
        return False
    return True


def _bundle(store: FileStreamProgramCache) -> Any:
    version = _Imported.version()
    return store._put(DIGEST, version[0], version[1], version[2])


class _Imported:
    @staticmethod
    def version() -> tuple[bytes, bytes, float]:
        from cuda_progcache.store.records import encode_record

        return b"imported", encode_record(_record(b"imported")), disks.START - 1000.0


def _record(value: bytes) -> dict[str, Any]:
    return {"of": value.decode()}


#: What a damaged entry becomes when it is looked at: nothing.
DAMAGED = b"\0damaged"


def _healed(state: State) -> State:
    return None if state == DAMAGED else state


OPERATIONS: dict[str, Operation] = {
    "put": _put(b"new"),
    "put again": _put(OLD),
    "put other": _put(b"another of another length"),
    "del": Operation(_delete, lambda _: None),
    "clear": Operation(lambda store: store.clear(), lambda _: None),
    "prune": Operation(lambda store: store.prune(max_size_bytes=0), lambda _: None),
    "repair": Operation(lambda store: store.verify(repair=True), _healed),
    "quarantine": Operation(lambda store: _delete_by(store.quarantine), lambda _: None),
    "import": Operation(_bundle, lambda _: b"imported", b"imported"),
    "get": Operation(_read, _healed),
}


def _delete_by(remove: Callable[[str], None]) -> None:
    with contextlib.suppress(KeyError):
        remove(DIGEST)


BEFORE: dict[str, Callable[[FileStreamProgramCache, Disk], State]] = {}


def _starts(name: str) -> Callable[[Callable[..., State]], Callable[..., State]]:
    def note(function: Callable[..., State]) -> Callable[..., State]:
        BEFORE[name] = function
        return function

    return note


@_starts("nothing")
def _nothing(store: FileStreamProgramCache, disk: Disk) -> State:  # noqa: ARG001
    return None


@_starts("an entry")
def _an_entry(store: FileStreamProgramCache, disk: Disk) -> State:
    assert store.publish(KEY, OLD, _record(OLD))
    disk.sleep(100)
    return OLD


@_starts("a damaged entry")
def _damaged(store: FileStreamProgramCache, disk: Disk) -> State:
    assert store.publish(KEY, OLD, _record(OLD))
    fd = os.open(ENTRY, os.O_WRONLY)
    os.write(fd, b"X")
    os.close(fd)
    disk.sleep(100)
    return DAMAGED


def _is_at_or_above(path: str) -> bool:
    return path == ENTRY or ENTRY.startswith(path + "/")


class ViolationError(AssertionError):
    """An invariant doesn't hold after a schedule; the message has the schedule."""


class Simulation:
    """Processes on a simulated disk, with names and lives of their own.

    Attributes
    ----------
    disk : Disk
        The one under the functions of ``os`` now.
    """

    def __init__(self) -> None:
        self.disk = Disk()
        self.dead: set[int] = set()
        self._pids = threading.local()

    @contextlib.contextmanager
    def running(self) -> Iterator[Simulation]:
        """Stand in for ``os`` and for the life of processes, while the block runs."""
        random_bytes = itertools.count(1)
        owner = liveness.Owner

        def alive(who: liveness.Owner) -> bool:
            return who.pid not in self.dead

        patches: list[Any] = [
            mock.patch.object(os, "getpid", self.pid),
            mock.patch.object(os, "urandom", lambda size: next(random_bytes).to_bytes(max(size, 4), "little")[:size]),
            mock.patch.object(liveness, "_owner", lambda pid: owner("a" * 12, "b" * 12, pid, 1)),
            mock.patch.object(owner, "is_alive", alive),
        ]
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            stack.enter_context(disks.on(lambda: self.disk))
            for patch in patches:
                stack.enter_context(patch)
            gc.collect()
            gc.disable()  # a finalizer would make calls in the middle of an actor's
            try:
                yield self
            finally:
                gc.enable()

    def pid(self) -> int:
        """The process that the running thread plays."""
        return getattr(self._pids, "value", 1)

    def as_process(self, pid: int, work: Callable[[], Any]) -> Callable[[], Any]:
        """``work``, in that process."""

        def run() -> Any:
            self._pids.value = pid
            try:
                return work()
            finally:
                self._pids.value = 1

        return run

    def open(self, **settings: Any) -> FileStreamProgramCache:
        """A store as a new process would open it."""
        return FileStreamProgramCache(ROOT, **{"durability": "none", **settings})


class Scenario:
    """Some operations at once, from one state.

    Parameters
    ----------
    before : str
        Of :data:`BEFORE`.
    names : sequence of str
        Of :data:`OPERATIONS`.
    settings
        Of the stores.
    """

    def __init__(self, simulation: Simulation, before: str, names: Sequence[str], **settings: Any) -> None:
        self.simulation = simulation
        self.before, self.names, self.settings = before, tuple(names), settings
        self.operations = [OPERATIONS[name] for name in names]
        simulation.disk = Disk()
        store = simulation.open(**settings)
        self.state = BEFORE[before](store, simulation.disk)
        self._start = simulation.disk

    def __str__(self) -> str:
        settings = "".join(f", {name}={value}" for name, value in self.settings.items())
        return f"{' | '.join(self.names)} on {self.before}{settings}"

    def make(self) -> tuple[Disk, list[Callable[[], Any]]]:
        """A disk, and what the processes do on it."""
        simulation = self.simulation
        simulation.dead.clear()
        disk = simulation.disk = self._start.copy()
        works = []
        for number, operation in enumerate(self.operations):
            pid = 1000 + number
            self._stores = getattr(self, "_stores", [])
            store = simulation.as_process(pid, lambda: simulation.open(**self.settings))()
            self._stores.append(store)
            del self._stores[:-6]
            works.append(simulation.as_process(pid, lambda operation=operation, store=store: operation.act(store)))  # type: ignore[misc]
        return disk, works

    # Invariants

    def check(self, execution: Execution) -> None:
        """See that all that must hold does (:class:`ViolationError` where it doesn't)."""
        killed = [outcome.killed for outcome in execution.outcomes]
        self.simulation.dead.update(1000 + number for number, dead in enumerate(killed) if dead)
        try:
            self._check(execution, killed)
        except ViolationError:
            raise
        except BaseException as exc:
            raise ViolationError(f"{type(exc).__name__}: {exc}\n{self._told(execution)}") from exc

    def _check(self, execution: Execution, killed: list[bool]) -> None:
        possible = {operation.writes for operation in self.operations if operation.writes is not None} | {OLD}
        for name, operation, outcome in zip(self.names, self.operations, execution.outcomes, strict=True):
            if outcome.error is not None:
                raise ViolationError(f"{name} raised {outcome.error!r}\n{self._told(execution)}")
            if operation.act is _read and outcome.value is not None:
                data, record = outcome.value
                self._sure(data in possible and record == _record(data), f"read {outcome.value}", execution)
            if operation.writes is not None and not outcome.killed:
                self._sure(outcome.value is True, f"{name} was dropped", execution)
        if any(killed):
            self.simulation.disk.sleep(5)
            self.simulation.open(max_size_bytes=10_000)  # the next process: takes away, or puts back, what lies about
            self.simulation.disk.sleep(5)
        tree = execution.disk.tree()
        left = [path for path in tree if os.path.dirname(path) in STAGING]
        self._sure(not left, f"left behind: {left}", execution)
        after = self.simulation.open()
        entry = after.load(KEY)
        found: State = None if entry is None else entry.data
        if entry is not None:
            self._sure(found in possible and dict(entry.record) == _record(entry.data), f"wrong: {entry}", execution)
        if not any(killed):
            self._sure(
                ENTRY not in tree or RECORD in tree or self.before == "an orphan",
                "an entry without a record",
                execution,
            )
        allowed = self._orders(execution, killed)
        shown = {state if state != DAMAGED else None for state in allowed}
        self._sure(found in shown, f"found {found!r}, possible: {shown}", execution)
        if not any(killed):
            self._sure(
                not self._published_last(execution) or found is not None, "a write that returned is lost", execution
            )
        self._sure(after.publish(KEY, b"later", _record(b"later")), "not writable any more", execution)
        self._sure(self.simulation.open().get(KEY) == b"later", "what is written now is lost", execution)

    def _published_last(self, execution: Execution) -> bool:
        """Whether the last change of the entry's name was a write's, that came from the writer's own file."""
        moved_aside: set[str] = set()
        last = False
        for _, call in execution.steps:
            if call.name in {"replace", "link"} and call.target == ENTRY:
                last = call.path not in moved_aside
            elif (call.path == ENTRY and call.name == "unlink") or (
                call.name == "replace" and _is_at_or_above(call.path)
            ):
                last = False
                if call.target:
                    moved_aside.add(call.target)
        return last and all(
            not outcome.killed and outcome.value
            for operation, outcome in zip(self.operations, execution.outcomes, strict=True)
            if operation.writes is not None
        )

    def _orders(self, execution: Execution, killed: list[bool]) -> set[State]:
        """What the operations may leave: in every order that fits their times, killed ones done or not."""
        numbers = range(len(self.operations))
        removals = {number for number in numbers if self.operations[number].removes}
        idle = [killed[number] or (number in removals and len(removals) > 1) for number in numbers]
        states: set[State] = set()
        for without in itertools.product(*[(False, True) if may else (False,) for may in idle]):
            done = [number for number in numbers if not without[number]]
            if removals and removals.isdisjoint(done) and not any(killed[number] for number in removals):
                continue
            for order in itertools.permutations(done):
                fits = all(
                    not self._ended_before(execution, later, earlier)
                    for i, earlier in enumerate(order) for later in order[i + 1 :]
                )  # fmt: skip
                if fits:
                    state = self.state
                    for number in order:
                        state = self.operations[number].gives(state)
                    states.add(state)
        return states

    @staticmethod
    def _ended_before(execution: Execution, one: int, other: int) -> bool:
        return execution.outcomes[one].last <= execution.outcomes[other].first

    def _sure(self, holds: bool, what: str, execution: Execution) -> None:  # noqa: FBT001
        if not holds:
            raise ViolationError(f"{what}\n{self._told(execution)}")

    def _told(self, execution: Execution) -> str:
        lines = [f"  {self.names[step.actor]:12} {step.call}" for step in execution.steps]
        return "\n".join([f"{self}: schedule of {len(lines)} calls", *lines])


PAIRS = tuple(itertools.combinations_with_replacement(OPERATIONS, 2))


def try_pair(simulation: Simulation, before: str, names: Sequence[str], count: Count, *, at_most: int | None = None,
             **settings: Any) -> ViolationError | None:  # fmt: skip
    """Every schedule of some operations; the first violation, if there is one."""
    scenario = Scenario(simulation, before, names, **settings)
    for execution in every_schedule(scenario.make, count, at_most=at_most):
        try:
            scenario.check(execution)
        except ViolationError as found:
            return found
    return None


def try_killed(simulation: Simulation, before: str, names: Sequence[str], count: Count, *,
               at_most: int | None = None) -> ViolationError | None:  # fmt: skip
    """The same, with the first process killed at each of its calls."""
    scenario = Scenario(simulation, before, names)
    alone = Scenario(simulation, before, names[:1])
    calls = sum(1 for _ in next(every_schedule(alone.make, Count())).steps)
    for call in range(calls):
        for execution in every_schedule(scenario.make, count, at_most=at_most, kill=(0, call)):
            try:
                scenario.check(execution)
            except ViolationError as found:
                return found
    return None


#: Three at once that broke what no two can break, with the state before: what a third publishes, or removes, while one
#: of two makes good what the other did to it.
TRIPLES = (
    ("nothing", ("put", "put other", "import")),
    ("an entry", ("put", "put other", "import")),
    ("nothing", ("put", "put other", "clear")),
    ("an entry", ("put", "del", "prune")),
    ("an entry", ("put", "del", "del")),
    ("an entry", ("put", "put other", "del")),
)


def random_triples(names: Sequence[str], number: int) -> list[tuple[str, tuple[str, ...]]]:
    """Draw states with three operations each."""
    draw = random.Random(1)  # noqa: S311 - no secret
    return [(draw.choice(sorted(BEFORE)), tuple(draw.choice(list(names)) for _ in range(3))) for _ in range(number)]


def walk(
    simulation: Simulation, triples: Sequence[tuple[str, tuple[str, ...]]], number: int
) -> tuple[list[ViolationError], int]:
    """Run random schedules of three operations each; return the violations and the number of runs."""
    violations, walked = [], 0
    for turn, (before, names) in enumerate(triples):
        scenario = Scenario(simulation, before, names)
        for execution in random_schedules(scenario.make, turn, number):
            walked += 1
            try:
                scenario.check(execution)
            except ViolationError as found:
                violations.append(found)
                break
    return violations, walked

# SPDX-License-Identifier: Apache-2.0
"""One compile per program, however many threads and processes ask for it at once.

Threads of a process share a flight: the first compiles, the others get what it
got, an error too. Processes share leases: a file per flight under ``leases/``
of the cache, made with ``O_EXCL``, which names its holder (machine, boot,
process, start time) and is touched while the holder works. No lock of the file
system is used, so it works on NFS.

A thread never waits for itself: where a subscriber, within its own event, asks
for what its thread is compiling, it compiles at once. And nobody waits in vain:
a waiter looks every 10 ms; within 2 s of the holder's death it takes over (seen
by its start time, or across machines by a lease that is no longer touched), and
compiles beside it when the holder is alive but stands still, when the lease
went without a result, or after :data:`LONGEST_WAIT`.

Hosts share leases, too, where a cache has a tier that keeps them
(:mod:`cuda_progcache.store.tiers.leases`): then the one process of a host that
would compile asks there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from functools import partial

from cuda_progcache._util import files, forks
from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache.store.derived import write_beside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    T = TypeVar("T")
    Fleet = Callable[[Callable[[], Any], Callable[[], Any], float], Any]

#: Seconds between looks of a waiter.
POLL = 0.01
#: Seconds between a holder's touches of its leases.
HEARTBEAT = 0.5
#: Seconds without a touch, by the waiter's own clock, after which a holder stands still (stopped, or its machine gone).
STANDSTILL = 3 * HEARTBEAT
#: Seconds after which a waiter compiles itself, whatever the holder does.
LONGEST_WAIT = 300.0


class _Flight:
    """A compile that is under way in this process."""

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.result: object = None
        self.error: Exception | None = None
        #: Who leads it.
        self.thread = threading.get_ident()
        #: Its thread was interrupted (KeyboardInterrupt, SystemExit, ...) and gave nothing: a waiter takes its place.
        self.interrupted = False


class _Process:
    """What is under way in this process; a forked child starts anew, since the parent's flights land in the parent."""

    def __init__(self) -> None:
        self.reset()
        forks.in_child(self.reset)

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.flights: dict[tuple[str | None, str], _Flight] = {}
        #: What each waiting thread waits for.
        self.waits: dict[int, _Flight] = {}
        self.leases: set[str] = set()
        self.heart: threading.Thread | None = None

    def leads(self) -> bool:
        """Whether this thread has a flight under way that other processes may wait for; the lock is held."""
        me = threading.get_ident()
        return any(flight.thread == me for (directory, _), flight in self.flights.items() if directory is not None)

    def would_wait_for_itself(self, flight: _Flight) -> bool:
        """Whether a flight can't land while this thread waits for it; the lock is held.

        Its leader may be this thread (a subscriber that compiles within its own event), or wait for one that is.
        """
        me, waited = threading.get_ident(), flight
        while waited.thread != me:
            further = self.waits.get(waited.thread)
            if further is None:
                return False
            waited = further
        return True


_here = _Process()


def fly(
    flight: str, directory: str | None, compile_: Callable[[], T], look_up: Callable[[], T | None], *,
    longest_wait: float = LONGEST_WAIT, fleet: Fleet | None = None,
) -> T:  # fmt: skip
    """Compile, unless someone else is at it: then wait for them and take what they made.

    Parameters
    ----------
    flight : str
        Names what is compiled, file-name safe; equal only where the outcome is.
    directory : str or None
        Where the leases lie that processes share; None: threads of this process alone.
    compile_ : callable
        Does it.
    look_up : callable
        What is in the cache by now; None if it isn't there.
    longest_wait : float
        Seconds after which a waiter compiles itself, whatever the holder does.
    fleet : callable, optional
        Called by the one that would compile, with ``compile_``, ``look_up`` and ``longest_wait``: does the same among
        hosts.

    Returns
    -------
    What ``compile_`` returned, here or in another thread, or what ``look_up`` found.

    Raises
    ------
    Whatever ``compile_`` raised, here or in another thread. What interrupts a thread (KeyboardInterrupt, SystemExit,
    any BaseException that is no Exception) is its own: one of those that waited for it compiles instead.
    """
    slot = (directory, flight)
    deadline = time.monotonic() + longest_wait
    mine: _Flight | None = None
    nested = False
    try:
        while mine is None:
            with _here.lock:
                current = _here.flights.get(slot)
                if current is None:
                    nested = _here.leads()
                    mine = _here.flights[slot] = _Flight()
                    continue
                if _here.would_wait_for_itself(current):
                    break
                _here.waits[threading.get_ident()] = current
            try:
                landed = current.landed.wait(min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX))
            finally:
                with _here.lock:
                    _here.waits.pop(threading.get_ident(), None)
            if not landed:
                return compile_()
            if current.error is not None:
                raise current.error
            if not current.interrupted:
                found = look_up()
                return found if found is not None else current.result  # type: ignore[return-value]
        if mine is None:
            return compile_()
        # A thread that leads another flight doesn't wait for other processes: one of them may wait for that.
        wait = 0.0 if nested else longest_wait
        first: Callable[[], T] = compile_ if fleet is None else partial(fleet, compile_, look_up, wait)
        result = _lead(flight, directory, compile_, first, look_up, wait)
        mine.result = result
        return result
    except BaseException as error:
        if mine is not None:
            mine.error = error if isinstance(error, Exception) else None
            mine.interrupted = mine.error is None
        raise
    finally:
        if mine is not None:  # an interrupt may come at any line: nobody must wait for a flight that is over
            with _here.lock:
                if _here.flights.get(slot) is mine:
                    del _here.flights[slot]
            mine.landed.set()


def _lead(
    flight: str,
    directory: str | None,
    compile_: Callable[[], T],
    first: Callable[[], T],
    look_up: Callable[[], T | None],
    longest_wait: float,
) -> T:
    """Lead a flight of this process: ``first`` is what the one of this host's processes does that leads it there."""
    if directory is None:
        return first()
    path = os.path.join(directory, flight)
    deadline = time.monotonic() + longest_wait
    while True:
        ours = _take(path)
        if ours is None:
            return first()  # no leases can be made here (read-only, full): a compile too many, and nothing worse
        if not ours:
            ours = _wait(path, deadline)
            if ours is None:
                return compile_()
        try:
            found = look_up()  # someone may have landed between our look and our lease
            if found is not None:
                return found
            if ours:
                return first()
            if not os.path.lexists(path):
                return compile_()  # its compile failed, or could not be kept: waiting would only queue
        finally:
            if ours:
                _release(path)


def _take(path: str) -> bool | None:
    """Take the lease: True if it is ours now, False if another has it, None if leases can't be made here."""
    try:
        write_beside(os.path.dirname(os.path.dirname(path)), path, str(current_owner()).encode(), new=True)
    except FileExistsError:
        return False
    except OSError:
        return None
    _keep_alive(path)
    return True


def _take_over(path: str, dead: files.Identity) -> bool | None:
    """Take a dead holder's lease: True if it is ours now, False if another has it or is at it, None if nobody can.

    The lease is replaced in one step. Were it removed and taken anew, a waiter that looks in between would take it for
    released, and one that found the holder dead a moment ago would remove its successor's.
    """
    claim = f"{path}.after-{dead[0]:x}-{dead[2]:x}"  # one name for all who saw this one dead
    try:
        write_beside(os.path.dirname(os.path.dirname(path)), claim, str(current_owner()).encode(), new=True)
    except FileExistsError:
        return False
    except OSError:
        return None
    try:
        if files.identity(os.lstat(path)) != dead:
            files.unlink_quietly(claim)
            return False
        files.replace(claim, path)
    except OSError as error:
        files.unlink_quietly(claim)
        return False if files.is_missing(error) else None
    _keep_alive(path)
    return True


def _keep_alive(path: str) -> None:
    """Touch a lease from now on."""
    with _here.lock:
        _here.leases.add(path)
    _start_heart()


def _release(path: str) -> None:
    with _here.lock:
        _here.leases.discard(path)
    files.unlink_quietly(path)


def _wait(path: str, deadline: float) -> bool | None:
    """Wait for a lease: False when it was released, True when its holder died and it is ours.

    None when it is better to compile beside its holder.
    """
    touched: int | None = None
    seen_at = time.monotonic()
    read_at = -HEARTBEAT
    lost: files.Identity | None = None
    while os.path.lexists(path):
        now = time.monotonic()
        if now - read_at >= HEARTBEAT / 2:
            read_at = now
            try:
                data, status = files.read_regular(path)  # opened, since a bare stat may be NFS's memory, seconds old
            except OSError:
                return False
            if status.st_mtime_ns != touched:
                touched, seen_at = status.st_mtime_ns, now
            holder = Owner.parse(data.decode("ascii", "replace")) if data else None
            alive = None if holder is None else holder.is_alive()
            stands_still = now - seen_at > STANDSTILL
            if alive is False or (alive is None and stands_still):
                dead = files.identity(status)
                ours = _take_over(path, dead)
                if ours is not False:
                    return ours
                if lost == dead and stands_still:
                    return None  # who was quicker died over it
                if lost != dead:
                    lost, seen_at = dead, now
            elif stands_still:
                return None
        if now > deadline:
            return None
        time.sleep(POLL)
    return False


def _start_heart() -> None:
    with _here.lock:
        if _here.heart is None or not _here.heart.is_alive():
            _here.heart = threading.Thread(target=_beat, name="cuda_progcache-leases", daemon=True)
            _here.heart.start()


def _beat() -> None:
    """Touch this process's leases while there are any; ends when there have been none for a while."""
    idle = 0
    while idle < 20:
        time.sleep(HEARTBEAT)
        with _here.lock:
            held = list(_here.leases)
            idle = 0 if held else idle + 1
            if idle >= 20:
                _here.heart = None
        for path in held:
            try:
                os.utime(path)
            except OSError:
                continue  # released this moment, or the tree is gone: the waiters see that too

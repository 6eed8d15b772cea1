# SPDX-License-Identifier: Apache-2.0
"""Single flight: one compile per program, however many threads and processes ask for it at once.

Threads of a process share a flight, which is one compile: the first thread compiles, and the others get its result or
its error. Processes share leases: a lease is a file per flight under ``leases/`` of the cache, created with ``O_EXCL``,
that names its holder (machine, boot, process, start time) and is touched while the holder works. No file lock is used,
so this works on NFS.

A thread never waits for itself: if an event's subscriber requests the program that its own thread is compiling, it
compiles at once. No wait is endless: a waiter checks every 10 ms. It takes over within 2 s of the holder's death, which
it detects by the holder's start time or, across machines, by a lease that is no longer touched. It compiles in parallel
if the holder is alive but suspended, if the lease ended without a result, or after :data:`LONGEST_WAIT`.

Hosts share leases as well, if the cache has a tier that keeps them (:mod:`cuda_progcache.store.tiers.leases`). The one
process of a host that would compile then takes a lease from the tier.
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

#: Seconds between a waiter's checks.
POLL = 0.01
#: Seconds between a holder's touches of its leases.
HEARTBEAT = 0.5
#: Seconds without a touch, by the waiter's clock, after which a holder counts as suspended or its machine as gone. Time
#: in which the waiter didn't run either doesn't count.
STANDSTILL = 3 * HEARTBEAT
#: Seconds after which a waiter compiles itself, even if the holder is still working.
LONGEST_WAIT = 300.0


class _Flight:
    """A compile in progress in this process."""

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.result: object = None
        self.error: Exception | None = None
        #: The thread that compiles.
        self.thread = threading.get_ident()
        #: Its thread was interrupted (KeyboardInterrupt, SystemExit, ...) without a result: a waiter compiles instead.
        self.interrupted = False


class _Process:
    """The flights of this process. A forked child starts without any, since the parent's end in the parent."""

    def __init__(self) -> None:
        self.reset()
        forks.in_child(self.reset)

    def reset(self) -> None:
        self.lock = threading.Lock()
        self.flights: dict[tuple[str | None, str], _Flight] = {}
        #: The flight that each waiting thread waits for.
        self.waits: dict[int, _Flight] = {}
        self.leases: set[str] = set()
        self.heart: threading.Thread | None = None

    def leads(self) -> bool:
        """Whether this thread leads a flight that other processes may wait for. The lock is held."""
        me = threading.get_ident()
        return any(flight.thread == me for (directory, _), flight in self.flights.items() if directory is not None)

    def would_wait_for_itself(self, flight: _Flight) -> bool:
        """Whether a flight can't end while this thread waits for it. The lock is held.

        Its leader may be this thread (a subscriber that compiles within an event), or wait for a flight of this thread.
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
    """Compile, or wait for the result if another thread or process is compiling the same program.

    Parameters
    ----------
    flight : str
        Identifies the compile, by a string that is safe as a file name; equal only if the outcome is equal.
    directory : str or None
        The directory of the leases that processes share; None: only threads of the current process share the compile.
    compile_ : callable
        Compiles.
    look_up : callable
        Looks the program up in the cache again; returns None if it isn't there.
    longest_wait : float
        Seconds after which a waiter compiles itself, whatever the holder does.
    fleet : callable, optional
        Called by the thread that would compile, with ``compile_``, ``look_up`` and ``longest_wait``; coordinates hosts
        in the same way.

    Returns
    -------
    The result of ``compile_``, in this or another thread, or of ``look_up``.

    Raises
    ------
    Whatever ``compile_`` raised, in this or another thread. An interrupt (KeyboardInterrupt, SystemExit, any
    BaseException that isn't an Exception) only affects its own thread: one of the waiting threads compiles instead.
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
        # A thread that leads another flight doesn't wait for other processes, since one of them may wait for that
        # flight.
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
        if mine is not None:  # an interrupt may come at any line, and nobody may wait for a flight that is over
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
    """Lead a flight in this process; call ``first`` if this process also leads it on this host."""
    if directory is None:
        return first()
    path = os.path.join(directory, flight)
    deadline = time.monotonic() + longest_wait
    while True:
        ours = _take(path)
        if ours is None:
            return first()  # leases can't be made (read-only, full), which at worst costs another compile
        if not ours:
            ours = _wait(path, deadline)
            if ours is None:
                return compile_()
        try:
            found = look_up()  # another process may have finished between our lookup and our lease
            if found is not None:
                return found
            if ours:
                return first()
            if not os.path.lexists(path):
                return compile_()  # its compile failed, or couldn't be kept: waiting again would only queue
        finally:
            if ours:
                _release(path)


def _take(path: str) -> bool | None:
    """Take the lease: True if it is ours now, False if another process has it, None if leases can't be made."""
    try:
        write_beside(os.path.dirname(os.path.dirname(path)), path, str(current_owner()).encode(), new=True)
    except FileExistsError:
        return False
    except OSError:
        return None
    _keep_alive(path)
    return True


def _take_over(path: str, dead: files.Identity) -> bool | None:
    """Take a dead holder's lease: True if it is ours now, False if another process takes it, None if nobody can.

    The lease is replaced atomically. If it were removed and created again, a waiter that checks in between would think
    that it was released, and one that has just found the holder dead would remove its successor's lease.
    """
    claim = f"{path}.after-{dead[0]:x}-{dead[2]:x}"  # the same name for all that found this holder dead
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
    """Start touching a lease regularly."""
    with _here.lock:
        _here.leases.add(path)
    _start_heart()


def _release(path: str) -> None:
    with _here.lock:
        _here.leases.discard(path)
    files.unlink_quietly(path)


def _wait(path: str, deadline: float) -> bool | None:
    """Wait for a lease: False if it was released, True if its holder died and it is ours.

    None if it is better to compile in parallel with its holder.
    """
    touched: int | None = None
    seen_at = time.monotonic()
    read_at = -HEARTBEAT
    lost: files.Identity | None = None
    while os.path.lexists(path):
        now = time.monotonic()
        if now - read_at >= HEARTBEAT / 2:
            seen_at += max(0.0, now - read_at - HEARTBEAT)  # suspended as well, or on a busy machine
            read_at = now
            try:
                data, status = files.read_regular(path)  # opened: a plain stat may be NFS's cache, seconds old
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
                    return None  # the process that took it over has died as well
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
            try:
                _here.heart = threading.Thread(target=_beat, name="cuda_progcache-leases", daemon=True)
                _here.heart.start()
            except RuntimeError:  # no more threads can be started: waiters will compile in parallel
                _here.heart = None


def _beat() -> None:
    """Touch this process's leases while there are any; return when there have been none for a while."""
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
                continue  # just released, or the tree is gone, which the waiters notice as well

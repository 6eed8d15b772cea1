# SPDX-License-Identifier: Apache-2.0
"""Concurrency for many small calls that each wait for the file system or a server."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

#: Unlinking a file takes 10 µs, or half a millisecond if the file system is mounted with ``discard`` (each freed block
#: is a request to the device) or is on a server. Eight such requests at once take little longer than one.
THREADS = 8
#: The mean duration of a call, in seconds, above which starting threads pays off.
_SLOW = 100e-6
#: The number of calls over which the mean is measured.
_TRIED = 8


def for_each(items: Iterable[T], action: Callable[[T], object], threads: int = THREADS) -> None:
    """Call ``action`` with each item: in the caller's thread, and in helper threads if the first calls were slow.

    When this function returns or raises, all helper threads have ended.

    Parameters
    ----------
    items : iterable
        The items; drawn one by one as they are needed, in any of the threads.
    action : callable
        The function to call, in any of the threads.
    threads : int
        The most threads to use, including the caller's.

    Raises
    ------
    BaseException
        The first exception that ``action`` or ``items`` raised. Calls in progress are finished, no others are started.
    """
    remaining = iter(items)
    drawing = threading.Lock()  # two threads can't advance a generator at once
    failed: list[BaseException] = []
    end = object()

    def run() -> None:
        try:
            while not failed:
                with drawing:
                    item = next(remaining, end)
                if item is end:
                    return
                action(item)  # type: ignore[arg-type]
        except BaseException as exc:  # noqa: BLE001 - raised below, in the caller's thread
            failed.append(exc)

    started = time.perf_counter()
    for item in itertools.islice(remaining, _TRIED):
        action(item)
    helpers: list[threading.Thread] = []
    try:
        if time.perf_counter() - started > _SLOW * _TRIED:
            for _ in range(threads - 1):
                helper = threading.Thread(target=run, name="progcache-helper", daemon=True)
                try:
                    helper.start()
                except RuntimeError:  # the interpreter is shutting down, or out of threads
                    break
                helpers.append(helper)
        run()
    finally:
        with drawing:
            remaining = iter(())  # so that an interrupt in this thread stops the others, too
        for helper in helpers:
            helper.join()
    if failed:
        raise failed[0]

# SPDX-License-Identifier: Apache-2.0
"""Many small calls at once, where each of them waits: for the file system, or for a server."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeVar

    T = TypeVar("T")

#: Unlinking a file takes 10 µs, or half a millisecond where the file system is mounted with ``discard`` (each freed
#: block is a request to the device) or lies on a server; eight requests at once then take little longer than one.
THREADS = 8
#: Seconds that a call on average must take for help to be worth its start.
_SLOW = 100e-6
#: Calls after which that is known.
_TRIED = 8


def for_each(items: Iterable[T], action: Callable[[T], object], threads: int = THREADS) -> None:
    """Call ``action`` with each item: in the caller's thread, and with helpers where the first calls were slow.

    When this returns or raises, no helper runs any more.

    Parameters
    ----------
    items : iterable
        Drawn one by one as they are needed, in any of the threads.
    action : callable
        Called in any of the threads.
    threads : int
        How many there may be, the caller's included.

    Raises
    ------
    BaseException
        The first that ``action`` or ``items`` raised; what was begun is finished, the rest is left.
    """
    remaining = iter(items)
    drawing = threading.Lock()  # a generator can't be asked by two at once
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
            remaining = iter(())  # an interrupt in this thread stops the others, too
        for helper in helpers:
            helper.join()
    if failed:
        raise failed[0]

# SPDX-License-Identifier: Apache-2.0
"""Single flight for coroutine functions: tasks of any event loop that make the same call at once share one run."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING, Any

from cuda_progcache._util import forks
from cuda_progcache.memo.frames import refreshing

if TYPE_CHECKING:
    from cuda_progcache.memo.caches.base import BaseCache

_lock = threading.Lock()
_under_way: dict[tuple[int, str], concurrent.futures.Future[Any]] = {}


def _forget() -> None:
    global _lock  # noqa: PLW0603 - a lock that another thread held stays locked in a forked child
    _lock = threading.Lock()
    _under_way.clear()


forks.in_child(_forget)


async def run_async(runner: Any, cache: BaseCache, key: Any, args: Any, kwargs: Any) -> Any:
    """Run a call, or wait for the task that runs it."""
    slot = (id(cache), str(key.digest))
    mine: concurrent.futures.Future[Any] = concurrent.futures.Future()
    if not refreshing.get():
        while True:
            with _lock:
                other = _under_way.setdefault(slot, mine)
            if other is mine:
                break
            try:
                result = await asyncio.shield(asyncio.wrap_future(other))
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if not other.cancelled() or (task is not None and task.cancelling()):
                    raise  # this task is cancelled; otherwise the running task was, and another one takes over
                continue
            found = runner._find(cache, key, again=True)  # load a separate copy
            return result if found is None else found[0]
    try:
        found = None if refreshing.get() else runner._find(cache, key, again=True)  # another run may just have ended
        result = found[0] if found is not None else await _run(runner, cache, key, args, kwargs)
    except Exception as error:
        mine.set_exception(error)
        mine.exception()  # marks it as retrieved, since no other task may be waiting
        raise
    except BaseException:
        mine.cancel()
        raise
    else:
        mine.set_result(result)
        return result
    finally:
        with _lock:
            if _under_way.get(slot) is mine:
                del _under_way[slot]


async def _run(runner: Any, cache: BaseCache, key: Any, args: Any, kwargs: Any) -> Any:
    run = runner._begin(cache, key, room=0)
    try:
        result = await runner.function(*args, **kwargs)
    except BaseException:
        runner._give_up(run)
        raise
    runner._end(run, result)
    return result

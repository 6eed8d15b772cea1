# SPDX-License-Identifier: Apache-2.0
"""An optional, short-lived cache of failed compiles.

Without it, a service that is asked repeatedly for a program that doesn't compile runs the compiler each time. The
compiler's status and log are kept under ``failures/`` of a cache on disk, or in this process's memory. They are used
while they are recent and every header that the compile read is unchanged. Only reproducible failures are kept: not a
missing header, which may exist by now, and not trouble with memory or files.
"""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any

from cuda_progcache._util import files
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.compile.output import CompilerRefusal
from cuda_progcache.keys.headers import HeaderSet, holds
from cuda_progcache.store.derived import derived, write_beside

if TYPE_CHECKING:
    from cuda_progcache.keys.schema import BaseKey

_FORMAT = 1
#: The maximum number of failures kept for a cache in memory.
_KEPT = 256
#: Parts of the compilers' statuses for an invalid program; other statuses are about the machine.
_FINAL = ("COMPIL", "INVALID_IR", "INCORRECT_INPUT")
#: Parts of a log that mean trouble with a file or the machine.
_PASSING = ("catastrophic", "could not open", "cannot open", "out of memory")

_lock = ForkSafeLock()


def recall(base: BaseKey, cache: Any, seconds: float) -> tuple[CompilerRefusal, float] | None:
    """Return a kept failure that this compile would repeat, and its age in seconds; None if there is none.

    Parameters
    ----------
    base : BaseKey
    cache : store
    seconds : float
        The maximum age.
    """
    path = _path(cache, base)
    if path is None:
        with _lock:
            seen_at, content = derived(cache, "failures").get(base.flight, (0.0, b""))
    else:
        try:
            raw, status = files.read_regular(path)
        except OSError:
            return None
        seen_at, content = status.st_mtime, raw or b""
    age = time.time() - seen_at
    if not 0 <= age <= seconds:  # with a time stamp in the future, its age is unknown
        return None
    try:
        data = json.loads(content)
        if data["format"] != _FORMAT:
            return None
        headers = HeaderSet.from_json(data["headers"])
        refusal = CompilerRefusal(str(data["status"]), str(data["log"]))
    except (ValueError, KeyError, TypeError):
        return None
    return (refusal, age) if holds(headers, base.search) else None


def remember(base: BaseKey, refusal: CompilerRefusal, headers: HeaderSet, cache: Any, seconds: float) -> bool:
    """Keep a failure if it is reproducible; return whether it was kept.

    Parameters
    ----------
    base : BaseKey
    refusal : CompilerRefusal
    headers : HeaderSet
        The headers that the compile read before it failed.
    cache : store
    seconds : float
        Older failures are removed.
    """
    log = refusal.log.lower()
    if (
        headers.uncacheable is not None
        or base.inputs.unrepeatable is not None
        or not any(word in refusal.status for word in _FINAL)
        or any(word in log for word in _PASSING)
    ):
        return False
    data = {"format": _FORMAT, "status": refusal.status, "log": refusal.log, "headers": headers.to_json()}
    content = json.dumps(data, separators=(",", ":")).encode()
    path = _path(cache, base)
    if path is None:
        with _lock:
            kept = derived(cache, "failures")
            kept[base.flight] = (time.time(), content)
            while len(kept) > _KEPT:
                kept.pop(next(iter(kept)))
        return True
    try:
        write_beside(cache.path, path, content)
        _remove_old(os.path.dirname(path), seconds)
    except OSError:
        return False  # disposable: the compiler will be called again
    return True


def _path(cache: Any, base: BaseKey) -> str | None:
    root = getattr(cache, "path", None)
    return None if root is None else os.path.join(root, "failures", base.flight)


def _remove_old(folder: str, seconds: float) -> None:
    with os.scandir(folder) as found:
        for item in found:
            if time.time() - item.stat(follow_symlinks=False).st_mtime > seconds:
                files.unlink_quietly(item.path)

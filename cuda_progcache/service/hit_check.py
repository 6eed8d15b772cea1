# SPDX-License-Identifier: Apache-2.0
"""Checks of hits: a sample of the hits is compiled again in the background and compared byte for byte.

The key is meant to contain everything that determines the compiler's output. The check finds mistakes in the key, and
wrong entries in a cache that others fill: a hit that differs from a fresh compile is moved to the quarantine, counted,
and reported by a ``mismatch`` event and a warning.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable

from cuda_progcache import events
from cuda_progcache._util import forks
from cuda_progcache._util.chance import chance
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import ProgCacheError, ProgCacheWarning

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.compile.compiled import CompiledProgram

#: The most hits that wait to be checked; others are skipped, since compiling can't keep up with a warm cache.
_WAITING = 16


class HitCheckStats(NamedTuple):
    """The outcomes of the hits that were drawn.

    Attributes
    ----------
    confirmed : int
        A fresh compile gave the same bytes and symbols.
    mismatched : int
        Two fresh compiles gave the same program, which differs from the hit, and the key still leads to the hit.
    inconclusive : int
        A header or the compiler changed in the meantime, the compile failed, or two fresh compiles differ.
    passed_over : int
        Not checked, because too many hits were waiting or no thread could be started.
    """

    confirmed: int = 0
    mismatched: int = 0
    inconclusive: int = 0
    passed_over: int = 0


class HitCheck:
    """Draws hits and checks them in a background thread, which runs only while hits are waiting.

    Parameters
    ----------
    cache : store
        The store that the hits come from.
    rate : float
        Share of the hits to draw, 0 to 1.

    Notes
    -----
    When the process ends, it waits for the check in progress and drops the hits that are waiting.
    """

    def __init__(self, cache: Any, rate: float) -> None:
        self.cache = cache
        self.rate = rate
        # A random start, so that short processes with a few hits each draw their share, too.
        self._owed = chance.random()
        self._reset()
        forks.in_child(self._reset)

    def _reset(self) -> None:
        """Reset the state; a forked child does so, since it doesn't have the parent's thread or check its hits."""
        self._changed = threading.Condition()
        self._waiting: deque[tuple[CompiledProgram, Callable[[], CompiledProgram], Callable[[], Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._stats = HitCheckStats()

    @property
    def stats(self) -> HitCheckStats:
        """The outcomes of the hits drawn so far; in a forked child, since the fork."""
        return self._stats

    def saw(
        self,
        hit: CompiledProgram,
        compile_again: Callable[[], CompiledProgram],
        look_again: Callable[[], CompiledProgram | None],
    ) -> None:
        """Count a hit, and draw it if its turn has come.

        Parameters
        ----------
        hit : CompiledProgram
        compile_again : callable
            Compiles the program without the cache.
        look_again : callable
            Looks the program up again.
        """
        if hit.digest is None:
            return
        with self._changed:
            self._owed += self.rate
            if self._owed < 1:
                return
            self._owed -= 1
            if len(self._waiting) >= _WAITING:
                self._count("passed_over")
                return
            self._waiting.append((hit, compile_again, look_again))
            if self._thread is None:
                # Not a daemon: it would be abandoned in the middle of a check, and a wrong entry would stay.
                try:
                    self._thread = threading.Thread(target=self._work, name="cuda_progcache-hit-check", daemon=False)
                    self._thread.start()
                except RuntimeError:  # no more threads can be started; the hit is used unchecked
                    self._thread = None
                    self._waiting.clear()
                    self._count("passed_over")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all drawn hits are checked; return False if that takes longer than ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def _work(self) -> None:
        while True:
            with self._changed:
                if not threading.main_thread().is_alive():
                    self._waiting.clear()
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                hit, compile_again, look_again = self._waiting.popleft()
            outcome = self._check(hit, compile_again, look_again)
            with self._changed:
                self._count(outcome)

    def _count(self, outcome: str) -> None:
        self._stats = self._stats._replace(**{outcome: getattr(self._stats, outcome) + 1})

    def _check(
        self,
        hit: CompiledProgram,
        compile_again: Callable[[], CompiledProgram],
        look_again: Callable[[], CompiledProgram | None],
    ) -> str:
        try:
            fresh = compile_again()
            if _same(hit, fresh):
                return "confirmed"
            # Before the hit is called wrong: does the key still lead to it, and is the compile repeatable?
            found = look_again()
            if found is None or found.digest != hit.digest or not _same(hit, found):
                return "inconclusive"
            if not _same(fresh, compile_again()):
                return "inconclusive"
        except (ProgCacheError, OSError):
            return "inconclusive"
        self._report(hit, fresh)
        return "mismatched"

    def _report(self, hit: CompiledProgram, fresh: CompiledProgram) -> None:
        digest = str(hit.digest)
        what = (
            f"the cached {hit.target_type} ({len(hit.data)} bytes) "
            f"differs from a fresh compile's ({len(fresh.data)} bytes)"
            if hit.data != fresh.data
            else "the cached symbol mapping differs from a fresh compile's"
        )
        try:
            self.cache.quarantine(digest)
            done = "it was moved to the quarantine"
        except KeyError:
            done = "it was already removed"
        except (ProgCacheError, OSError) as error:
            done = f"it could not be moved to the quarantine: {error}"
        reasons = (what, done)
        events.emit(events.Event("mismatch", hit.name, hit.target_type, hit.arch, digest, reasons))
        warnings.warn(
            f"a cache hit was wrong: {hit.name} for {hit.arch}, entry {digest[:12]}: {what}; {done}",
            ProgCacheWarning,
            stacklevel=2,
        )


def _same(one: CompiledProgram, other: CompiledProgram) -> bool:
    return one.data == other.data and dict(one.symbol_mapping) == dict(other.symbol_mapping)

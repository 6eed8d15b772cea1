# SPDX-License-Identifier: Apache-2.0
"""Hits put to the test: some are compiled again, in the background, and compared byte for byte.

The key is meant to hold all that decides what a compiler makes. This is how a mistake in that would show, or one in a
shared cache that others fill: a hit that differs from a fresh compile is moved to the quarantine, counted, told as an
event (``mismatch``) and as a warning.
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

#: Hits that wait to be checked, at most; more are passed over, since a cold compiler can't keep up with a warm cache.
_WAITING = 16


class HitCheckStats(NamedTuple):
    """What became of the hits that were drawn.

    Attributes
    ----------
    confirmed : int
        A fresh compile gave the same bytes and symbols.
    mismatched : int
        It gave others, twice the same, for a key that still holds.
    inconclusive : int
        A header or the compiler changed meanwhile, the compile failed, or two fresh compiles differ.
    passed_over : int
        Drawn while too many were waiting, or where there could be no thread to check it.
    """

    confirmed: int = 0
    mismatched: int = 0
    inconclusive: int = 0
    passed_over: int = 0


class HitCheck:
    """Draws hits and checks them in a thread of its own, which runs only while there is something to check.

    Parameters
    ----------
    cache : store
        Where the hits come from.
    rate : float
        Share of the hits to draw, 0 to 1.

    Notes
    -----
    A process that ends waits for the check that is under way, a compile at most, and forgets those that wait.
    """

    def __init__(self, cache: Any, rate: float) -> None:
        self.cache = cache
        self.rate = rate
        # Where it starts is left to chance: short processes that each see a few hits draw their share as well.
        self._owed = chance.random()
        self._reset()
        forks.in_child(self._reset)

    def _reset(self) -> None:
        """Start anew, as in a forked child: the parent's thread isn't there, and its hits are the parent's to check."""
        self._changed = threading.Condition()
        self._waiting: deque[tuple[CompiledProgram, Callable[[], CompiledProgram], Callable[[], Any]]] = deque()
        self._thread: threading.Thread | None = None
        self._stats = HitCheckStats()

    @property
    def stats(self) -> HitCheckStats:
        """What became of the hits drawn so far; in a forked child, since then."""
        return self._stats

    def saw(
        self,
        hit: CompiledProgram,
        compile_again: Callable[[], CompiledProgram],
        look_again: Callable[[], CompiledProgram | None],
    ) -> None:
        """Note a hit, and maybe draw it.

        Parameters
        ----------
        hit : CompiledProgram
        compile_again : callable
            Compiles the same, past the cache.
        look_again : callable
            Looks it up once more.
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
                # No daemon: that would be abandoned in the middle of a check, and a wrong entry would stay.
                try:
                    self._thread = threading.Thread(target=self._work, name="cuda_progcache-hit-check", daemon=False)
                    self._thread.start()
                except RuntimeError:  # there can be no more threads: the hit is used all the same
                    self._thread = None
                    self._waiting.clear()
                    self._count("passed_over")

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until all that was drawn is checked; False if that takes longer than ``timeout`` seconds."""
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
            # Before anything is called wrong: does the key still lead there, and is the compile itself repeatable?
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
            f"the cached {hit.target_type} has {len(hit.data)} bytes, a fresh compile gives {len(fresh.data)} others"
            if hit.data != fresh.data
            else "the cached symbol mapping isn't a fresh compile's"
        )
        try:
            self.cache.quarantine(digest)
            done = "it was moved to the quarantine"
        except KeyError:
            done = "it is gone already"
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

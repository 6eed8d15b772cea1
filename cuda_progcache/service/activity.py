# SPDX-License-Identifier: Apache-2.0
r"""The cache activity of a run: hits, misses by reason, compiles, the time they took and the time that hits saved.

An :class:`Activity` listens to all compile events of its process, with any cache or none::

    activity = Activity()
    stop = cuda_progcache.subscribe(activity)
    ...
    stop()
    print("\n".join(activity.summary()))

``+`` adds the activities of several processes. :meth:`Activity.as_dict` makes them ready to send between processes.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Mapping

from cuda_progcache._util.amounts import plural, seconds, size
from cuda_progcache._util.fields import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from cuda_progcache.events import Event
    from cuda_progcache.store.stats import StoreStats

FORMAT = 1
NO_CACHE = "no cache was given"
#: How many reasons and how many compiles a summary lists.
_LISTED = 5, 3


class Compile(NamedTuple):
    """One run of a compiler.

    Attributes
    ----------
    name, target_type, arch : str
    digest : str or None
        The digest of the entry; None if no cache was given or the compiler refused the program.
    seconds : float
    reasons : tuple of str
        Why the program wasn't in the cache; if it was refused, the compiler's message.
    where : str
        The value of :attr:`Activity.where` at the time.
    refused : bool
        Whether the compiler refused the program.
    """

    name: str
    target_type: str
    arch: str
    digest: str | None
    seconds: float
    reasons: tuple[str, ...]
    where: str
    refused: bool

    def __str__(self) -> str:
        took = "refused by the compiler" if self.refused else f"compiled in {seconds(self.seconds)}"
        return f"{self.name} ({self.target_type}, {self.arch}) {took}: {'; '.join(self.reasons)}"


class CacheState(NamedTuple):
    """The size of a cache and the trouble it met, in one process or in several.

    Attributes
    ----------
    path : str
    mode : str
    bytes : int
        The size at the end of the run.
    dropped, refused : int
        Programs that couldn't be stored; programs that were larger than the size cap.
    not_kept : int
        Programs that were compiled but not stored, since a hit could differ from a fresh compile.
    damaged, read_errors, evicted : int
        Damaged entries that lookups found; lookups that failed; entries removed to keep the size cap.
    """

    path: str
    mode: str
    bytes: int
    dropped: int
    refused: int
    not_kept: int
    damaged: int
    read_errors: int
    evicted: int

    @classmethod
    def of(cls, path: str, mode: str, stats: StoreStats) -> CacheState:
        """Return the state that a store's statistics describe."""
        return cls(
            path, mode, stats.bytes, stats.dropped, stats.refused, stats.unkeyed, stats.corrupt, stats.read_errors,
            stats.evicted,
        )  # fmt: skip

    def plus(self, other: CacheState) -> CacheState:
        """Return the sum of two states; its size is the larger one, usually seen by the process that ended last."""
        counts = map(int.__add__, self[3:], other[3:])
        return CacheState(self.path, self.mode, max(self.bytes, other.bytes), *counts)


class Activity:
    """The cache activity since the object was subscribed (:func:`cuda_progcache.subscribe`). Thread-safe.

    Attributes
    ----------
    hits : int
    avoided : float
        Seconds that the original compiles of the hits took, as far as known.
    misses : Counter of str
        Misses by reason. In mode ``frozen``, no compile follows a miss.
    compiles : list of Compile
        Every run of a compiler, with or without a cache.
    mismatches : int
        Hits that a fresh compile didn't confirm.
    where : str
        A label of what is running, noted with each compile; set by the caller.
    cache : CacheState or None
        The state of the run's cache; set by the caller.
    """

    def __init__(self) -> None:
        self.hits = 0
        self.avoided = 0.0
        self.misses: Counter[str] = Counter()
        self.compiles: list[Compile] = []
        self.mismatches = 0
        self.where = ""
        self.cache: CacheState | None = None
        self._lock = threading.Lock()
        self._missed: dict[int, Event] = {}

    def __call__(self, event: Event) -> None:
        """Note an event."""
        with self._lock:
            if event.kind == "hit":
                self.hits += 1
                self.avoided += event.seconds
            elif event.kind == "miss":
                self.misses["; ".join(event.reasons)] += 1
                self._missed[threading.get_ident()] = event  # the compile comes next in its thread
            elif event.kind == "compile":
                missed = self._missed.pop(threading.get_ident(), None)
                known = missed is not None and missed.digest == event.digest and event.digest is not None
                self._compiled(event, missed.reasons if known and missed is not None else (NO_CACHE,), refused=False)
            elif event.kind == "refused" and not event.reasons[0].startswith("remembered"):
                self._compiled(event, event.reasons, refused=True)
            elif event.kind == "mismatch":
                self.mismatches += 1

    def _compiled(self, event: Event, reasons: tuple[str, ...], *, refused: bool) -> None:
        self.compiles.append(
            Compile(
                event.name, event.target_type, event.arch, event.digest, event.seconds, reasons, self.where, refused
            )
        )

    def __bool__(self) -> bool:
        """Whether anything happened."""
        return bool(self.hits or self.misses or self.compiles or self.cache)

    def __add__(self, other: object) -> Self:
        if not isinstance(other, Activity):
            return NotImplemented
        total = type(self)()
        total.hits = self.hits + other.hits
        total.avoided = self.avoided + other.avoided
        total.misses = self.misses + other.misses
        total.compiles = self.compiles + other.compiles
        total.mismatches = self.mismatches + other.mismatches
        caches = [one.cache for one in (self, other) if one.cache is not None]
        total.cache = caches[0].plus(caches[1]) if len(caches) == 2 else next(iter(caches), None)
        return total

    @property
    def uncached(self) -> int:
        """The number of programs that were compiled without a cache."""
        return sum(one.digest is None and not one.refused for one in self.compiles)

    @property
    def compile_seconds(self) -> float:
        """The total compile time in seconds."""
        return sum(one.seconds for one in self.compiles)

    def at(self, where: str) -> list[Compile]:
        """Return the compiles noted with this value of :attr:`where`."""
        return [one for one in self.compiles if one.where == where]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; ``compiles`` are in order of time, process by process."""
        return {
            "format": FORMAT,
            "hits": self.hits,
            "misses": self.misses.total(),
            "misses_by_reason": dict(self.misses.most_common()),
            "compiled": sum(not one.refused for one in self.compiles),
            "compiled_without_a_cache": self.uncached,
            "refused": sum(one.refused for one in self.compiles),
            "mismatches": self.mismatches,
            "compile_seconds": self.compile_seconds,
            "avoided_seconds": self.avoided,
            "cache": None if self.cache is None else self.cache._asdict(),
            "compiles": [one._asdict() | {"reasons": list(one.reasons)} for one in self.compiles],
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Self:
        """Return the activity that :meth:`as_dict` described, usually in another process."""
        made = cls()
        made.hits, made.avoided, made.mismatches = told["hits"], told["avoided_seconds"], told["mismatches"]
        made.misses = Counter(told["misses_by_reason"])
        made.compiles = [Compile(**{**one, "reasons": tuple(one["reasons"])}) for one in told["compiles"]]
        made.cache = None if told["cache"] is None else CacheState(**told["cache"])
        return made

    @property
    def is_well(self) -> bool:
        """Whether every program went through the cache and was stored, and the cache met no trouble."""
        cache = self.cache
        trouble = cache is not None and (cache.damaged or cache.read_errors or cache.not_kept)
        lost = cache is not None and cache.mode == "rw" and (cache.dropped or cache.refused)
        return not (self.uncached or self.mismatches or trouble or lost)

    def summary(self) -> list[str]:
        """Return lines for display: the counts, compile times, miss reasons, the slowest compiles and cache trouble."""
        if not self:
            return []
        lines = [", ".join(self._counts())]
        done = [one for one in self.compiles if not one.refused]
        times = []
        if done:
            times.append(f"compiled {plural(len(done), 'program')} in {seconds(self.compile_seconds)}")
        if self.avoided:
            times.append(f"hits saved {seconds(self.avoided)} of compiling")
        lines += ["; ".join(times)] if times else []
        reasons = self.misses.most_common(_LISTED[0])
        lines += [f"missed: {number} × {reason}" for reason, number in reasons]
        if left := self.misses.total() - sum(number for _, number in reasons):
            lines.append(f"missed: {left} × for other reasons")
        for one in sorted(done, key=lambda one: -one.seconds)[: _LISTED[1]]:
            at = f" at {one.where}" if one.where else ""
            lines.append(f"slowest: {seconds(one.seconds)} {one.name} ({one.target_type}, {one.arch}){at}")
        return [*lines, *self._trouble()]

    def _counts(self) -> Iterable[str]:
        cache, misses = self.cache, self.misses.total()
        if cache is None and not (self.hits or misses):
            yield f"{plural(self.uncached, 'program')} compiled without a cache"
            return
        share = self.hits + misses + self.uncached
        counts = [plural(self.hits, "hit"), plural(misses, "miss")]
        if cache is not None:
            counts.append(f"{cache.dropped + cache.refused} dropped")
            counts += [f"{cache.not_kept} not kept"] if cache.not_kept else []
        if self.uncached:
            counts.append(f"{self.uncached} compiled without a cache")
        yield ", ".join(counts) + (f" ({100 * self.hits // share}% hits)" if share else "")
        if cache is None:
            yield "in the programs' own caches"
        elif cache.mode == "off":
            yield "the cache is off"
        else:
            told = "" if cache.mode == "rw" else f" (mode {cache.mode})"
            yield f"{size(cache.bytes)} at {cache.path}{told}"

    def _trouble(self) -> Iterable[str]:
        cache = self.cache
        if cache is not None and cache.damaged:
            yield f"{plural(cache.damaged, 'damaged entry')} found and not used"
        if cache is not None and cache.read_errors:
            yield f"{plural(cache.read_errors, 'lookup')} failed, since the cache couldn't be read"
        if cache is not None and cache.evicted:
            yield f"{plural(cache.evicted, 'entry')} evicted to keep the size cap"
        if self.mismatches:
            yield f"{plural(self.mismatches, 'hit')} differed from a fresh compile"

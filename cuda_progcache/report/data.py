# SPDX-License-Identifier: Apache-2.0
"""The data of a report, as plain values read from a store's entries, records and counters.

Text in records may come from an imported bundle. All of it passes through :func:`visible`, which escapes control
characters and characters that change the direction of text.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cuda_progcache._util.printable import one_line, printable

if TYPE_CHECKING:
    from cuda_progcache.service.comparison import KernelUse
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.compile_record import CompileRecord
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.stats import Span, Totals

#: Characters of a log or a key component to show.
LONGEST = 4000
#: How many of the newest earlier compiles of the same name an entry is compared with; the same as for explained misses.
_COMPARED = 4
#: The number of periods that the time axis is divided into.
_PERIODS = 32

_HOUR, _DAY = 3600.0, 86400.0

FIRST, AGAIN = "first of its name", "nothing: compiled again"
_WORDS = {
    "code": "source",
    "name_expression": "template instances",
    "headers": "headers",
    "option": "options",
    "target_type": "kind of binary",
    "code_type": "language",
    "extra_source": "further sources",
    "has_include": "headers that are tested for",
    "name": "name",
    "schema": "version of the key",
}


class Kernel(NamedTuple):
    """The resource usage of one kernel of a program; None if unknown."""

    name: str
    registers: int
    spill_store_bytes: int | None
    spill_load_bytes: int | None
    stack_bytes: int | None
    shared_bytes: int
    code_bytes: int
    block_size: int | None
    occupancy: float | None
    limiters: tuple[str, ...]


class Program(NamedTuple):
    """An entry of the cache.

    Attributes
    ----------
    digest, name, parameters, target, arch : str
    size : int
        Size in bytes.
    created, last_used : float
        Seconds since the epoch.
    seconds : float or None
        The duration of the compile; None if it isn't recorded.
    why : tuple of str
        What had changed since the nearest earlier compile of the same name, in a few words.
    reasons : tuple of str
        The same, one sentence per difference.
    kernels : tuple of Kernel
        The kernels of a cubin; empty for other kinds of binary.
    components : tuple of (str, str)
        Labels and values of the key's components.
    headers, toolchain : tuple of (str, str)
        Names and digests.
    symbols : tuple of (str, str)
        Name expressions and symbols.
    log : str
        The compiler's log.
    """

    digest: str
    name: str
    parameters: str
    target: str
    arch: str
    size: int
    created: float
    last_used: float
    seconds: float | None
    why: tuple[str, ...]
    reasons: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    components: tuple[tuple[str, str], ...]
    headers: tuple[tuple[str, str], ...]
    toolchain: tuple[tuple[str, str], ...]
    symbols: tuple[tuple[str, str], ...]
    log: str


class Cost(NamedTuple):
    """The total cost of the programs of one kernel for one architecture."""

    name: str
    arch: str
    programs: int
    seconds: float
    bytes: int


class Period(NamedTuple):
    """The programs that were compiled in one period of time and are still in the cache."""

    start: float
    programs: int
    seconds: float


class Lookups(NamedTuple):
    """The lookups in one period of time.

    Attributes
    ----------
    start : float
        Seconds since the epoch; 0.0 for everything before the days that are counted separately.
    seconds : float
        Length of the period: an hour or a day; 0.0 if unknown.
    hits, misses : int
    """

    start: float
    seconds: float
    hits: int
    misses: int

    @property
    def hit_rate(self) -> float:
        """The fraction of lookups that were hits."""
        return self.hits / (self.hits + self.misses)


class Header(NamedTuple):
    """A header that programs include: the number of different contents and of programs, and their compile time."""

    name: str
    contents: int
    programs: int
    seconds: float


class Report(NamedTuple):
    """Everything that a report shows except the listings.

    Attributes
    ----------
    root : str
        The cache's directory.
    made : float
        When the report was made, in seconds since the epoch.
    programs : tuple of Program
        The programs, newest first.
    bytes, record_bytes : int
        Size of the entries and of their records.
    cap : int or None
        Maximum size of the cache in bytes; None if there is no cap or it isn't known.
    seconds : float
        Total duration of the programs' compiles.
    counted : Totals
        Counters of all processes that used this cache, since it was created.
    lookups : tuple of Lookups
        The lookups in order of time: per hour if they span less than two days, otherwise per day. Periods without
        lookups are left out.
    costs : tuple of Cost
        The costs, highest first.
    periods : tuple of Period
        Periods of equal length, in order of time; empty if there are no programs.
    why : mapping of str to int
        The number of programs compiled because of each kind of change; a program with two changes counts in both.
    unkept : mapping of str to int
        The number of programs that were compiled but can't be kept, by kind of reason.
    headers : tuple of Header
        The headers, those with the highest total compile time of their programs first.
    unreadable : int
        The number of binaries whose kernels can't be read.
    """

    root: str
    made: float
    programs: tuple[Program, ...]
    bytes: int
    record_bytes: int
    cap: int | None
    seconds: float
    counted: Totals
    lookups: tuple[Lookups, ...]
    costs: tuple[Cost, ...]
    periods: tuple[Period, ...]
    why: Mapping[str, int]
    unkept: Mapping[str, int]
    headers: tuple[Header, ...]
    unreadable: int

    @property
    def hit_rate(self) -> float | None:
        """The fraction of all lookups that were hits; None if there were no lookups."""
        lookups = self.counted.hits + self.counted.misses
        return self.counted.hits / lookups if lookups else None

    @property
    def mean(self) -> float | None:
        """The mean duration of a compile in seconds; None if no duration is recorded."""
        known = [one.seconds for one in self.programs if one.seconds is not None]
        return sum(known) / len(known) if known else None

    @property
    def saved(self) -> float | None:
        """The seconds of compiling that hits saved, if each hit a program of mean cost; None if the mean is unknown."""
        return None if self.mean is None else self.counted.hits * self.mean


def collect(cache: FileStreamProgramCache, cap: int | None = None) -> Report:
    """Read the data of a report.

    Parameters
    ----------
    cache : FileStreamProgramCache
    cap : int, optional
        Maximum size of the cache in bytes.

    Raises
    ------
    StoreError
        The cache can't be read.
    """
    from cuda_progcache.compile.unkept import by_kind, listed
    from cuda_progcache.service.comparison import kernel_uses
    from cuda_progcache.service.described import all_described
    from cuda_progcache.store.stats import total

    entries = sorted(all_described(cache.entries()), key=lambda entry: (entry.created, entry.digest))
    failed: list[EntryInfo] = []
    used: dict[str, list[Kernel]] = defaultdict(list)
    for one in kernel_uses(entries, on_error=lambda entry, _: failed.append(entry)):
        used[one.entry.digest].append(_kernel(one))
    programs = []
    earlier: dict[str, list[CompileRecord]] = defaultdict(list)
    for entry in entries:
        about = entry.about
        why, reasons = _why(about, earlier[about.title])
        programs.append(_program(entry, about, why, reasons, used.get(entry.digest, ())))
        earlier[about.title] = [*earlier[about.title][1 - _COMPARED :], about]
    held, spans = cache.stats(), cache.over_time()
    return Report(
        root=visible(str(cache.path)),
        made=time.time(),
        programs=tuple(reversed(programs)),
        bytes=sum(one.size for one in programs),
        record_bytes=held.record_bytes,
        cap=cap,
        seconds=sum(one.seconds or 0.0 for one in programs),
        counted=total(spans),
        lookups=_lookups(spans),
        costs=_costs(programs),
        periods=_periods(programs),
        why=dict(Counter(word for one in programs for word in one.why).most_common()),
        unkept=dict(by_kind(listed(cache))),
        headers=_headers(programs),
        unreadable=len(failed),
    )


def visible(text: object, *, lines: bool = False) -> str:
    """Return text with invisible and control characters escaped, as the command line prints it.

    Parameters
    ----------
    text : object
        The text; converted with ``str``.
    lines : bool
        Whether to keep line breaks and tabs.
    """
    return printable(str(text)) if lines else one_line(str(text))


def shortened(text: str, limit: int = LONGEST) -> str:
    """Return text truncated to a limit; a truncated text ends with the length of the whole."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def _kernel(one: KernelUse) -> Kernel:
    used, runs = one.resources, one.occupancy
    return Kernel(
        visible(one.kernel),
        used.registers,
        used.spill_store_bytes,
        used.spill_load_bytes,
        used.stack_bytes,
        used.shared_bytes,
        used.code_bytes,
        None if runs is None else runs.block_size,
        None if runs is None else runs.ratio,
        () if runs is None or runs.warps == runs.most_warps else tuple(runs.limiters),
    )


def _program(
    entry: EntryInfo, about: CompileRecord, why: Sequence[str], reasons: Sequence[str], kernels: Sequence[Kernel]
) -> Program:
    parameters = {} if about.kernel is None else about.kernel.parameters
    return Program(
        digest=entry.digest,
        name=shortened(visible(about.title), 200),
        parameters=shortened(visible(" ".join(f"{name}={value}" for name, value in parameters.items())), 400),
        target=visible(about.target_type or "-"),
        arch=visible(about.arch or "-"),
        size=entry.size,
        created=entry.created,
        last_used=entry.last_used,
        seconds=about.duration,
        why=tuple(why),
        reasons=tuple(shortened(visible(one)) for one in reasons),
        kernels=tuple(kernels),
        components=_pairs(about.components),
        headers=_pairs(about.headers),
        toolchain=_pairs((tool.name, tool.digest) for tool in about.toolchain),
        symbols=_pairs(about.symbol_mapping.items()),
        log=shortened(visible(about.log, lines=True)),
    )


def _pairs(found: Iterable[tuple[object, object]]) -> tuple[tuple[str, str], ...]:
    return tuple((visible(left), shortened(visible(right))) for left, right in found)


def _why(about: CompileRecord, earlier: Sequence[CompileRecord]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what had changed since the nearest earlier compile: in a few words, and in sentences."""
    from cuda_progcache.compile.history import differences, nearest
    from cuda_progcache.keys.explain import differing

    if not about.is_compile:
        return (), ()  # stored by hand
    found = nearest(about, [one for one in reversed(earlier) if one.is_compile])
    if found is None:
        return (FIRST,), ("first compile of this program",)
    sentences = differences(about, found)
    if not sentences:
        return (AGAIN,), ("it was compiled again: its entry was evicted, removed or corrupt",)
    words: dict[str, None] = {}
    rendered = [one.partition(" ")[0] for one in sentences if one.startswith(("parameter ", "template "))]
    words.update(dict.fromkeys(f"{one}s" for one in rendered))
    for label, sentence in differing(about.components, found.components, {}, {}):
        if rendered and label in {"code", "name_expression"}:
            continue
        words["architecture" if sentence.startswith("option arch ") else _word(label)] = None
    return tuple(words), tuple(sentences)


def _word(label: str) -> str:
    return "compiler" if label.startswith("tool ") else _WORDS.get(label, "paths that reach the output")


def _costs(programs: Iterable[Program]) -> tuple[Cost, ...]:
    found: dict[tuple[str, str], list[Program]] = defaultdict(list)
    for one in programs:
        found[one.name, one.arch].append(one)
    costs = [
        Cost(name, arch, len(them), sum(one.seconds or 0.0 for one in them), sum(one.size for one in them))
        for (name, arch), them in found.items()
    ]
    return tuple(sorted(costs, key=lambda cost: (-cost.seconds, -cost.bytes, cost.name, cost.arch)))


def _periods(programs: Sequence[Program]) -> tuple[Period, ...]:
    if not programs:
        return ()
    first, last = (pick(one.created for one in programs) for pick in (min, max))
    length = max(last - first, 60.0) / _PERIODS
    found = [[0, 0.0] for _ in range(_PERIODS)]
    for one in programs:
        period = found[min(int((one.created - first) / length), _PERIODS - 1)]
        period[0] += 1
        period[1] += one.seconds or 0.0
    return tuple(Period(first + at * length, int(count), took) for at, (count, took) in enumerate(found))


def _lookups(spans: Iterable[Span]) -> tuple[Lookups, ...]:
    found = [span for span in spans if span.counted.hits + span.counted.misses]
    dated = [span.start for span in found if span.start]
    hourly = bool(dated) and max(dated) - min(dated) < 2 * _DAY
    counts: dict[float, list[int]] = {}
    for span in found:
        so_far = counts.setdefault(span.start if hourly else span.start // _DAY * _DAY, [0, 0])
        so_far[0] += span.counted.hits
        so_far[1] += span.counted.misses
    length = _HOUR if hourly else _DAY
    return tuple(Lookups(start, length if start else 0.0, *both) for start, both in sorted(counts.items()))


def _headers(programs: Iterable[Program]) -> tuple[Header, ...]:
    contents: dict[str, set[str]] = defaultdict(set)
    readers: dict[str, list[float]] = defaultdict(list)
    for one in programs:
        for name, digest in one.headers:
            contents[name].add(digest)
            readers[name].append(one.seconds or 0.0)
    found = [Header(name, len(contents[name]), len(took), sum(took)) for name, took in readers.items()]
    return tuple(sorted(found, key=lambda header: (-header.seconds, header.name)))

# SPDX-License-Identifier: Apache-2.0
"""Operations that depend on the number of entries: puts at the size cap, opening with a cap, len, clear; and a plot."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, PEER, Benchmark, Goal, Result, at_most, ratio

SIZES = (1_000, 10_000, 100_000)
FULL_SIZES = (*SIZES, 1_000_000)
#: The size for which the goals are set.
LARGE = 100_000
ENTRY = os.urandom(1000)

Samples = dict[str, list[float]]

_serial = itertools.count()


def benchmarks(sizes: Sequence[int]) -> list[Benchmark]:
    """Return the benchmarks for stores of these sizes; clear is last because it removes what the others share."""
    made = []
    for size in sizes:
        name = _short(size)
        mean, tail, opening = (
            (ratio(1 / 500), at_most(25e-3), at_most(5e-3)) if size == LARGE else (ratio(0.5), _any(), ratio(1.0))
        )
        made += [
            Benchmark(
                f"scaling.open_{name}", f"opening with a cap, {size:,} entries", opening, samples=partial(_open, size)
            ),
            Benchmark(
                f"scaling.put_at_cap_{name}",
                f"mean of puts of 1 kB at the cap, {size:,} entries",
                mean,
                samples=partial(_put_at_cap, size),
                statistic="mean",
            ),
            Benchmark(
                f"scaling.put_at_cap_{name}_p99",
                "the slowest of 100 of these puts",
                tail,
                samples=partial(_put_at_cap, size),
                statistic="p99",
            ),
        ]
    return [
        *made,
        Benchmark("scaling.len_100k", "len at 100,000 entries", ratio(0.5), samples=_len),
        Benchmark("scaling.clear_100k", "clear at 100,000 entries, records too", ratio(0.5), samples=_clear),
    ]


def _any() -> Goal:
    return Goal("—", lambda _: True)


def _short(size: int) -> str:
    return f"{size // 1_000_000}M" if size >= 1_000_000 else f"{size // 1000}k"


# The directories


def _directories(own: Path, size: int) -> dict[str, Path]:
    """Return directories of ``size`` entries, ours and the peer's, built once per run and synced to the disk."""
    shared = own.parent / f"entries-{size}"
    ours, peer = shared / "ours", shared / "peer"
    if not shared.exists():
        _build(ours, size, records=True)
        _build(peer, size, records=False)
        os.sync()  # removing a file that was never written out costs nothing, but most files of a cache have been
    return {OURS: ours, PEER: peer}


def _build(root: Path, size: int, *, records: bool) -> None:
    from cuda_progcache.store.records import Version, encode

    version = Version.of(ENTRY, b"{}", time.time())
    for tree in ("entries", "records") if records else ("entries",):
        for shard in range(256):
            (root / tree / f"{shard:02x}").mkdir(parents=True)
    root.chmod(0o700)
    for number in range(size):
        digest = hashlib.sha256(_key(number)).hexdigest()
        name = f"{digest[:2]}/{digest[2:]}"
        _write(f"{root}/entries/{name}", ENTRY)
        if records:
            _write(f"{root}/records/{name}", encode(digest, [version]))


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, data)
    os.close(fd)


def _key(number: int) -> bytes:
    return number.to_bytes(32, "little")


def _store(side: str, path: Path, cap: int | None = None) -> Any:
    if side == PEER:
        from cuda.core.utils import FileStreamProgramCache as PeerStore

        return PeerStore(path, max_size_bytes=cap)
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    return FileStreamProgramCache(path, max_size_bytes=cap)


def _timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


# The samples


def _open(size: int, own: Path, effort: float) -> Samples:
    directories = _directories(own, size)
    calls = {OURS: 20, PEER: 20 if size < 10_000 else 3}
    return {
        side: [
            _timed(partial(_store, side, path, size * len(ENTRY))) for _ in range(max(2, round(calls[side] * effort)))
        ]
        for side, path in directories.items()
    }


_puts_at_cap: dict[Path, Samples] = {}


def _put_at_cap(size: int, own: Path, effort: float) -> Samples:
    """Time puts of new keys into a full store, including the first one, which counts whatever has to be counted.

    The peer's cost doesn't depend on earlier puts, so a few of them are enough.
    """
    directories = _directories(own, size)
    if directories[OURS] not in _puts_at_cap:
        puts = {OURS: 5000, PEER: max(3, min(200, 500_000 // size))}
        _puts_at_cap[directories[OURS]] = {
            side: _puts(_store(side, path, size * len(ENTRY)), max(2, round(puts[side] * effort)))
            for side, path in directories.items()
        }
    return _puts_at_cap[directories[OURS]]


def _puts(store: Any, count: int) -> list[float]:
    keys = (_key((1 << 64) + next(_serial)) for _ in range(count))
    return [_timed(partial(store.__setitem__, key, ENTRY)) for key in keys]


def _len(own: Path, effort: float) -> Samples:
    stores = {side: _store(side, path) for side, path in _directories(own, LARGE).items()}
    return {side: [_timed(store.__len__) for _ in range(max(2, round(5 * effort)))] for side, store in stores.items()}


def _clear(own: Path, effort: float) -> Samples:  # noqa: ARG001  once, however much effort
    stores = {side: _store(side, path) for side, path in _directories(own, LARGE).items()}
    os.sync()
    taken = {side: [_timed(store.clear)] for side, store in stores.items()}
    assert not any(len(store) for store in stores.values())
    return taken


# The plot


def plot(results: Iterable[Result], target: Path) -> Path | None:
    """Plot puts at the cap and opening against the number of entries.

    Parameters
    ----------
    results : iterable of Result
        The results of a run.
    target : Path
        The PNG file to write.

    Returns
    -------
    Path or None
        The file, or None if these benchmarks weren't run.
    """
    by_name = {result.benchmark.name: result for result in results}
    puts = _by_size(by_name, "scaling.put_at_cap_{}")
    opens = _by_size(by_name, "scaling.open_{}")
    if len(puts) < 2 and len(opens) < 2:
        return None
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharex=True)
    for axes, title, rows, lines in (
        (left, "put at the size cap", puts, [("mean", "mean", "-"), ("p99", "99th percentile", "--")]),
        (right, "opening with a size cap", opens, [("median", "median", "-")]),
    ):
        for side, colour in ((OURS, "tab:green"), (PEER, "tab:red")):
            for statistic, label, style in lines:
                axes.plot(
                    list(rows),
                    [getattr(result.measured[side], statistic) * 1e3 for result in rows.values()],
                    style,
                    marker="o",
                    color=colour,
                    label=f"{side}, {label}",
                )
        axes.set(xscale="log", yscale="log", title=title, xlabel="entries of 1 kB", ylabel="ms")
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend()
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)
    return target


def _by_size(results: Mapping[str, Result], name: str) -> dict[int, Result]:
    found = {size: results.get(name.format(_short(size))) for size in FULL_SIZES}
    return {size: result for size, result in found.items() if result is not None}

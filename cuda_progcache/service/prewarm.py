# SPDX-License-Identifier: Apache-2.0
"""Prewarming: compiling programs into a cache ahead of time, so that nothing is compiled at run time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cuda_progcache._util.amounts import plural
from cuda_progcache._util.json_values import json_value
from cuda_progcache.compile.arch import known_arch
from cuda_progcache.errors import ArchError, KernelNotFoundError, ModeError
from cuda_progcache.provenance.steps import PrewarmRun
from cuda_progcache.service.wanted import Job, Units, Wanted, of_manifest
from cuda_progcache.store.base import EntryInfo

if TYPE_CHECKING:
    from concurrent.futures import Executor
    from pathlib import Path

    from cuda_progcache.service.batch import Answer
    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.kernel_unit import KernelUnit
    from cuda_progcache.service.lock import Lock
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.service.wanted import SourceUnit

#: How many programs are fetched from the tiers at once.
_FETCHED = 500

Progress = Callable[["PrewarmItem", int, int], None]
#: The counts of a report.
_COUNTED = ("compiled", "hits", "failed", "skipped", "missing")


@dataclass(frozen=True)
class PrewarmItem:
    """The outcome of one variant for one architecture.

    Attributes
    ----------
    kernel : str
    variant : dict
        The parameters it sets; the others have their defaults.
    arch : str
    status : {"hit", "compiled", "failed", "skipped", "missing"}
        ``"skipped"``: the kernel needs a later architecture. ``"missing"``: a real run would compile it (in a dry run
        only). In calls of ``on_start``: ``"compiling"``.
    seconds : float
        Wall time that the variant took in this run.
    saved : float
        Compile time in seconds that a hit saved.
    size : int
        Size of the binary in bytes.
    digest : str or None
        The digest of its entry.
    error : str or None
        Why it failed or was skipped.
    target : str
        The target: ``"cubin"``, unless a lockfile asks for another one.
    reasons : tuple of str
        If missing: the differences from the nearest program in the cache.
    """

    kernel: str
    variant: dict[str, Any]
    arch: str
    status: str
    seconds: float = 0.0
    saved: float = 0.0
    size: int = 0
    digest: str | None = None
    error: str | None = None
    target: str = "cubin"
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class PrewarmReport:
    """The result of a prewarm.

    Attributes
    ----------
    items : tuple of PrewarmItem
        In the order of the manifest (kernel, variant, architecture) or of the lockfile.
    archs : tuple of str
    seconds : float
        Wall time of the prewarm.
    jobs : int
        How many programs were compiled at once.
    call : str or None
        The key of the run's record in the service's ``calls``; None if the run wasn't recorded.
    """

    items: tuple[PrewarmItem, ...]
    archs: tuple[str, ...]
    seconds: float
    jobs: int = field(default=1)
    call: str | None = None

    def _count(self, status: str) -> int:
        return sum(item.status == status for item in self.items)

    @property
    def compiled(self) -> int:
        """The number of programs compiled in this run."""
        return self._count("compiled")

    @property
    def hits(self) -> int:
        """The number of programs that were in the cache already."""
        return self._count("hit")

    @property
    def failed(self) -> int:
        """The number of programs that failed."""
        return self._count("failed")

    @property
    def skipped(self) -> int:
        """The number of programs skipped because of the kernel's ``min_arch``."""
        return self._count("skipped")

    @property
    def missing(self) -> int:
        """The number of programs that a dry run found missing."""
        return self._count("missing")

    @property
    def ok(self) -> bool:
        """Whether no program failed."""
        return self.failed == 0

    @property
    def bytes(self) -> int:
        """The total size of the binaries."""
        return sum(item.size for item in self.items)

    @property
    def compile_seconds(self) -> float:
        """The total compile time of all workers, in seconds."""
        return sum(item.seconds for item in self.items if item.status == "compiled")

    @property
    def saved_seconds(self) -> float:
        """The compile time in seconds that the hits saved."""
        return sum(item.saved for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types: the counts, the sums and every item."""
        told = {"ok": self.ok, "call": self.call, "archs": list(self.archs), **self._figures()}
        return {**told, "items": [json_value(asdict(item)) for item in self.items]}

    def _figures(self) -> dict[str, float]:
        names = ("jobs", "seconds", *_COUNTED, "bytes", "compile_seconds", "saved_seconds")
        return {name: getattr(self, name) for name in names}


def prewarm(
    compiler: CachedCompiler,
    library: KernelLibrary,
    wanted: Sequence[Wanted],
    *,
    archs: Iterable[str],
    jobs: int | None = None,
    kernels: Iterable[str] = (),
    dry_run: bool = False,
    on_progress: Progress | None = None,
    on_start: Progress | None = None,
    executor: Executor | None = None,
    lock: Lock | None = None,
) -> PrewarmReport:
    """Compile programs into a cache; see :meth:`CompileService.prewarm`.

    ``archs`` and ``kernels`` are only recorded. ``lock`` is given if the whole lockfile is wanted: a tier may have its
    pack.
    """
    since, started = time.time(), time.perf_counter()
    if jobs is None:
        jobs = _jobs_of(executor)
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    total = len(wanted)
    items: dict[int, PrewarmItem] = {}

    def finished(index: int, item: PrewarmItem) -> None:
        items[index] = item
        if on_progress is not None:
            on_progress(item, len(items), total)

    def began(job: Job) -> None:
        if on_start is not None:
            on_start(_of(job.wanted, "compiling"), len(items), total)

    def ended(job: Job, answer: Answer) -> None:
        finished(job.index, _item(job.wanted, answer))

    run = PrewarmRun(_digest_of(library.manifest), tuple(dict.fromkeys(archs)), tuple(kernels))
    with run.running():
        units = Units(compiler, library)
        units.fetch_pack(lock)
        missing = _look_up(units, wanted, finished)
        _refuse_to_lose(compiler, 0 if dry_run else len(missing), total)
        if dry_run:
            frozen = compiler.frozen()
            for job in missing:
                finished(job.index, _of(job.wanted, "missing", reasons=frozen.reasons(job.unit)))
        elif missing:
            # Imported only if something is compiled.
            from cuda_progcache.service.batch import Batch, compile_batch

            if executor is not None:
                from cuda_progcache.service.farm import compile_on

                compile_on(executor, Batch(compiler, library, missing, jobs, began, ended))
            else:
                compile_batch(Batch(compiler, library, missing, min(jobs, len(missing)), began, ended))
    seconds = time.perf_counter() - started
    steps = None if dry_run or compiler.mode != "rw" else compiler.steps
    key = None if steps is None else str(run.key)
    report = PrewarmReport(tuple(items[i] for i in range(total)), tuple(dict.fromkeys(archs)), seconds, jobs, key)
    if steps is not None:
        told = {"ok": report.ok, **report._figures()}
        del told["missing"]
        if not run.record(steps, told, [item.digest for item in report.items if item.digest], since):
            report = replace(report, call=None)
    return report


def _jobs_of(executor: Executor | None) -> int:
    """Return how many programs are compiled at once by default."""
    if executor is None:
        return os.cpu_count() or 1
    from cuda_progcache.service.farm import workers_of

    return workers_of(executor)


def _refuse_to_lose(compiler: CachedCompiler, missing: int, total: int) -> None:
    """Raise ModeError if compiles are needed but the mode stores none; a cache in memory stores them in every mode."""
    if missing and compiler.mode in {"ro", "off"} and compiler.settings is not None:
        raise ModeError(
            f"{plural(missing, 'program')} of {total:,} can't be prewarmed: nothing is kept in mode {compiler.mode!r}; "
            "use mode 'rw', or a dry run, which compiles nothing"
        )


def checked_archs(archs: Iterable[str]) -> tuple[str, ...]:
    """Return device architectures without duplicates.

    Raises
    ------
    ArchError
        If there are none, or one isn't a device's architecture.
    """
    found = tuple(dict.fromkeys(archs))
    if not found:
        raise ArchError("no architecture to prewarm for: give archs=['sm_80', ...]")
    for arch in found:
        if known_arch(arch).kind != "sm":
            raise ArchError(
                f"prewarm compiles to machine code, but {arch} is not a device's architecture such as sm_90"
            )
    return found


def variants(library: KernelLibrary, archs: Iterable[str], kernels: Iterable[str] | None) -> list[Wanted]:
    """Return the variants that a library lists, for some architectures.

    Raises
    ------
    KernelNotFoundError
        If a kernel doesn't exist, or there are no kernels.
    ArchError
        If an architecture is invalid, or there are none.
    """
    wanted = of_manifest(library, checked_archs(archs), kernels)
    if not wanted:
        raise KernelNotFoundError(f"{library.manifest} has no kernel to prewarm")
    return wanted


def _digest_of(manifest: Path) -> str:
    try:
        return sha256(manifest.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError:
        return "gone"  # removed since the library was opened


def _look_up(
    units: Units,
    wanted: Sequence[Wanted],
    finished: Callable[[int, PrewarmItem], None],
) -> list[Job]:
    """Report the programs that are in the cache, without loading a compiler; return jobs for the others."""
    missing: list[Job] = []
    known: dict[int, KernelUnit | SourceUnit] = {}
    for index, one in enumerate(wanted):
        if index % _FETCHED == 0:
            known = _fetched(units, wanted, index)
        started = time.perf_counter()
        try:
            found, unit = units.look_up(one, known.pop(index, None))
        except Exception as error:  # noqa: BLE001 - a program that fails doesn't end the prewarm
            from cuda_progcache.service.worker import trouble

            status = "skipped" if units.rules_out(one) else "failed"
            finished(index, _of(one, status, error=trouble(error)))
            continue
        if found is None and unit is not None:
            missing.append(Job(index, one, unit))
        elif found is not None:
            seconds = time.perf_counter() - started
            size = found.size if isinstance(found, EntryInfo) else len(found.data)
            saved = found.about.seconds
            finished(index, _of(one, "hit", seconds=seconds, saved=saved, size=size, digest=found.digest))
    return missing


def _fetched(units: Units, wanted: Sequence[Wanted], start: int) -> dict[int, KernelUnit | SourceUnit]:
    """Fetch the next programs' entries from the tiers; return their units by index. Empty if there are no tiers."""
    if not units.reach_beyond:
        return {}
    made = {}
    for index in range(start, min(start + _FETCHED, len(wanted))):
        with contextlib.suppress(Exception):  # reported by this program's own lookup
            made[index] = units.unit(wanted[index])
    units.fetch(made.values())
    return made


def _of(wanted: Wanted, status: str, **more: Any) -> PrewarmItem:
    return PrewarmItem(wanted.kernel, wanted.variant, wanted.arch, status, target=wanted.target, **more)


def _item(wanted: Wanted, answer: Answer) -> PrewarmItem:
    seconds = float(answer["seconds"])
    error = answer.get("error")
    if error is None and answer["digest"] is None:
        # The next process would compile it again, so it isn't prewarmed.
        error = f"compiled, but not stored: {answer.get('reason')}"
    if error is not None:
        return _of(wanted, "failed", seconds=seconds, error=error)
    saved = float(answer["duration"] or 0.0) if answer["hit"] else 0.0
    status = "hit" if answer["hit"] else "compiled"
    return _of(wanted, status, seconds=seconds, saved=saved, size=answer["size"], digest=answer["digest"])

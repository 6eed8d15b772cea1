# SPDX-License-Identifier: Apache-2.0
"""Compile a library's variants ahead of time, so that nothing is compiled at run time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from cuda_progcache._util.json_values import json_value
from cuda_progcache.compile.arch import known_arch
from cuda_progcache.errors import ArchError, KernelNotFoundError
from cuda_progcache.provenance.steps import PrewarmRun
from cuda_progcache.service.batch import Answer, Job, compile_batch
from cuda_progcache.service.kernel_unit import require_arch
from cuda_progcache.service.worker import trouble

if TYPE_CHECKING:
    from pathlib import Path

    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.manifest import KernelLibrary, KernelSpec, RenderedKernel

Progress = Callable[["PrewarmItem", int, int], None]


@dataclass(frozen=True)
class PrewarmItem:
    """What became of one variant for one architecture.

    Attributes
    ----------
    kernel : str
    variant : dict
        The parameters it sets; the others have their defaults.
    arch : str
    status : {"hit", "compiled", "failed", "skipped"}
        Skipped: the kernel needs a later architecture. In a call of ``on_start``: ``"compiling"``.
    seconds : float
        Wall time it took now.
    saved : float
        Seconds of compiling that a hit spared.
    size : int
        Bytes of the binary.
    digest : str or None
        Digest of its entry.
    error : str or None
        Why it failed or was skipped.
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


@dataclass(frozen=True)
class PrewarmReport:
    """What a prewarm did.

    Attributes
    ----------
    items : tuple of PrewarmItem
        In the manifest's order: kernel, variant, architecture.
    archs : tuple of str
    seconds : float
        Wall time of the whole.
    jobs : int
        How many were compiled at once.
    call : str or None
        Under which the run is recorded in the service's ``calls``; None where the cache keeps no records.
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
        """How many were compiled now."""
        return self._count("compiled")

    @property
    def hits(self) -> int:
        """How many were in the cache already."""
        return self._count("hit")

    @property
    def failed(self) -> int:
        """How many could not be had."""
        return self._count("failed")

    @property
    def skipped(self) -> int:
        """How many a kernel's ``min_arch`` rules out."""
        return self._count("skipped")

    @property
    def ok(self) -> bool:
        """Whether nothing failed: what was asked for lies in the cache."""
        return self.failed == 0

    @property
    def bytes(self) -> int:
        """Size of all the binaries."""
        return sum(item.size for item in self.items)

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling, added up over the workers."""
        return sum(item.seconds for item in self.items if item.status == "compiled")

    @property
    def saved_seconds(self) -> float:
        """Time of compiling that the hits spared."""
        return sum(item.saved for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON: the counts and sums above, and every item."""
        return {
            "ok": self.ok,
            "call": self.call,
            "archs": list(self.archs),
            "jobs": self.jobs,
            "seconds": self.seconds,
            "compiled": self.compiled,
            "hits": self.hits,
            "failed": self.failed,
            "skipped": self.skipped,
            "bytes": self.bytes,
            "compile_seconds": self.compile_seconds,
            "saved_seconds": self.saved_seconds,
            "items": [json_value(asdict(item)) for item in self.items],
        }


def prewarm(
    compiler: CachedCompiler,
    library: KernelLibrary,
    *,
    archs: Iterable[str],
    jobs: int | None = None,
    kernels: Iterable[str] | None = None,
    on_progress: Progress | None = None,
    on_start: Progress | None = None,
) -> PrewarmReport:
    """Compile a library's variants into a cache (see :meth:`CompileService.prewarm`)."""
    since, started = time.time(), time.perf_counter()
    archs = tuple(dict.fromkeys(archs))
    if not archs:
        raise ArchError("no architecture to prewarm for: give archs=['sm_80', ...]")
    for arch in archs:
        if known_arch(arch).kind != "sm":
            raise ArchError(f"a prewarm makes machine code, and {arch} is no device's architecture; give sm_90 or so")
    jobs = jobs if jobs is not None else os.cpu_count() or 1
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    chosen = None if kernels is None else tuple(dict.fromkeys(kernels))
    specs = list(library) if chosen is None else [library[name] for name in chosen]
    if not specs:
        raise KernelNotFoundError(f"{library.manifest} has no kernel to prewarm")

    total = sum(len(spec.variants or ({},)) for spec in specs) * len(archs)
    items: dict[int, PrewarmItem] = {}

    def finished(index: int, item: PrewarmItem) -> None:
        items[index] = item
        if on_progress is not None:
            on_progress(item, len(items), total)

    def began(job: Job) -> None:
        if on_start is not None:
            on_start(PrewarmItem(job.kernel, job.variant, job.arch, "compiling"), len(items), total)

    def ended(job: Job, answer: Answer) -> None:
        finished(job.index, _item(job, answer))

    run = PrewarmRun(_digest_of(library.manifest), archs, chosen or ())
    with run.running():
        missing = _look_up(compiler, library, specs, archs, finished)
        if missing:
            compile_batch(compiler, library, missing, min(jobs, len(missing)), began, ended)
    seconds = time.perf_counter() - started
    key = None if compiler.steps is None else str(run.key)
    report = PrewarmReport(tuple(items[i] for i in range(total)), archs, seconds, jobs, key)
    if compiler.steps is not None:
        told = {name: value for name, value in report.to_dict().items() if name not in {"items", "archs", "call"}}
        run.record(compiler.steps, told, [item.digest for item in report.items if item.digest], since)
    return report


def _digest_of(manifest: Path) -> str:
    try:
        return sha256(manifest.read_bytes(), usedforsecurity=False).hexdigest()
    except OSError:
        return "gone"  # since the library was opened


def _look_up(
    compiler: CachedCompiler,
    library: KernelLibrary,
    specs: Iterable[KernelSpec],
    archs: tuple[str, ...],
    finished: Callable[[int, PrewarmItem], None],
) -> list[Job]:
    """Report what is there already (no compiler is loaded for that); return what isn't."""
    missing: list[Job] = []
    index = -1
    for spec in specs:
        for variant in map(dict, spec.variants or ({},)):
            try:
                rendered: RenderedKernel | str = library.render(spec.name, **variant)
            except Exception as error:  # noqa: BLE001 - one variant's trouble isn't the others'
                rendered = trouble(error)
            for arch in archs:
                index += 1
                common = (spec.name, variant, arch)
                started = time.perf_counter()
                if isinstance(rendered, str):
                    finished(index, PrewarmItem(*common, "failed", error=rendered))
                    continue
                try:
                    require_arch(arch, spec)
                except ArchError as error:
                    finished(index, PrewarmItem(*common, "skipped", error=str(error)))
                    continue
                try:
                    unit = compiler.unit(rendered, arch)
                    found = unit.look_up(compiler.cache)
                except Exception as error:  # noqa: BLE001 - as above
                    finished(index, PrewarmItem(*common, "failed", error=trouble(error)))
                    continue
                if found is None:
                    missing.append(Job(index, spec.name, variant, arch, unit))
                else:
                    seconds = time.perf_counter() - started
                    spared = float(found.record.get("duration") or 0.0)
                    item = PrewarmItem(*common, "hit", seconds, spared, len(found.data), found.digest)
                    finished(index, item)
    return missing


def _item(job: Job, answer: Answer) -> PrewarmItem:
    common = (job.kernel, job.variant, job.arch)
    seconds = float(answer["seconds"])
    error = answer.get("error")
    if error is None and answer["digest"] is None:
        # It compiles, but the next process will compile it again: that isn't prewarmed.
        error = f"compiled, but not stored: {answer.get('reason')}"
    if error is not None:
        return PrewarmItem(*common, "failed", seconds, error=error)
    saved = float(answer["duration"] or 0.0) if answer["hit"] else 0.0
    return PrewarmItem(
        *common, "hit" if answer["hit"] else "compiled", seconds, saved, answer["size"], answer["digest"]
    )

# SPDX-License-Identifier: Apache-2.0
"""``prewarm`` and ``demo``: compile a whole kernel library into the cache before it is needed."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.app import ExitCode, Terminated
from cuda_progcache.cli.entries import cuobjdump, parameters_text
from cuda_progcache.cli.proof import junit_option, lock_option
from cuda_progcache.cli.session import (
    OutputFile,
    Session,
    archs_option,
    common_options,
    include_option,
    kernels_option,
    library_at,
    manifest_option,
    verbose_option,
)

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from cuda_progcache.service.compile_service import CompileService
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.service.prewarm import PrewarmItem, PrewarmReport, Progress

DEMO_ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")

PREWARM_JSON = """
--json: {"ok": bool, "call" (the run's key, for provenance), "archs", "kernels": int, "variants": int, "jobs",
"compiled", "hits", "failed", "skipped", "missing" (with --dry-run), "bytes", "seconds" (this call),
"compile_seconds", "saved_seconds" (compile time that hits saved), "root", "items": [{"kernel", "variant": {parameter:
value}, "arch", "status": "hit" | "compiled" | "failed" | "skipped" (the kernel needs a later architecture) |
"missing" (with --dry-run), "seconds", "saved", "size", "digest", "error", "target", "reasons": [str] (why it is
missing)}]}

Exit code 1: a program failed (the others are compiled and kept), or with --require-hits, a program is missing. Exit
code 130 (Ctrl-C) or 143 (SIGTERM): stopped; the programs compiled so far are kept, and the same command continues.
"""


_jobs_option = click.option(
    "--jobs",
    "-j",
    type=click.IntRange(min=1),
    metavar="N",
    help="Run N compiles at once. [default: depends on the number of cores]",
)


@click.command(
    "prewarm",
    short_help="Compile a library's variants before they are needed.",
    epilog=PREWARM_JSON,
)
@manifest_option
@archs_option(f"Compile for this architecture; repeatable. [default: {', '.join(DEMO_ARCHS)}]")
@_jobs_option
@kernels_option("Compile only this kernel; repeatable.")
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Compile on a Dask cluster whose workers share a tier, such as tcp://HOST:8786, or in two local processes "
    "(local:2).",
)
@lock_option
@click.option("--dry-run", is_flag=True, help="Compile nothing; show what would be compiled, and why.")
@click.option("--require-hits", is_flag=True, help="Compile nothing; fail if any program is missing.")
@include_option
@click.option(
    "--report",
    "report_file",
    type=OutputFile(),
    metavar="FILE",
    help="Also write what --json prints to this file.",
)
@junit_option
@verbose_option
@common_options
@click.pass_obj
def prewarm_command(
    session: Session,
    manifest: Path | None,
    archs: tuple[str, ...],
    jobs: int | None,
    kernels: tuple[str, ...],
    dask: str | None,
    lock_file: Path | None,
    *,
    dry_run: bool,
    require_hits: bool,
    include_paths: tuple[str, ...],
    report_file: Path | None,
    junit: Path | None,
) -> None:
    """Compile every variant in a manifest for every architecture, or every program in a lockfile.

    Programs that are already in the cache aren't compiled again, so a stopped prewarm continues where it left off.
    With --lock, --manifest gives the library of the lockfile's kernels.
    """
    if lock_file is not None and archs:
        raise click.UsageError("--lock and --arch can't be combined: a lockfile lists its architectures")
    library = library_at(manifest)
    for name in kernels:
        library[name]  # raises for an unknown kernel, before anything is compiled
    looking = dry_run or require_hits
    service = session.service(library, include_paths, make=not looking)
    if not looking:
        _must_outlive(session, service)
    with _executor(dask if not looking else None) as executor:
        report = run_prewarm(
            session,
            service,
            library,
            () if lock_file is not None else archs or DEMO_ARCHS,
            jobs=jobs,
            kernels=kernels or None,
            lock=lock_file,
            dry_run=looking,
            executor=executor,
        )
    if report_file is not None:
        report_file.write_text(output.json_text(report_json(session, report)) + "\n", encoding="utf-8")
    if junit is not None:
        write_junit(junit, report)
    if session.json:
        output.emit(report_json(session, report))
    else:
        print_report(session, report)
    if not report.ok or (require_hits and report.missing):
        raise click.exceptions.Exit(ExitCode.FAILED)


def _must_outlive(session: Session, service: CompileService) -> None:
    """Raise StoreError if the cache is in memory without a tier behind it: its programs would be lost at exit."""
    from cuda_progcache.errors import StoreError
    from cuda_progcache.store.fallback import KeptInMemory

    if isinstance(service.cache, KeptInMemory) and not service.cache.tiers:
        raise StoreError(
            errno.ENOTSUP,
            "can't prewarm: the programs would be kept only in memory; give a writable directory (--cache-dir)",
            str(session.root()),
        )


@contextmanager
def _executor(address: str | None) -> Iterator[Executor | None]:
    """Open the executor of a Dask address; None if the current process compiles."""
    if address is None:
        yield None
        return
    from cuda_progcache.service.farm import dask

    with ExitStack() as open_:
        try:
            executor = open_.enter_context(dask(address))
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        yield executor


@click.command("demo", short_help="Compile the bundled kernels for four architectures.", epilog=PREWARM_JSON)
@_jobs_option
@verbose_option
@common_options
@click.pass_obj
def demo_command(session: Session, jobs: int | None) -> None:
    """Compile the bundled kernel library for four architectures. No GPU is needed.

    Run it twice: the second time, everything is a hit.
    """
    library = library_at(None)
    if not session.json:
        output.show(
            output.text("cuda_progcache", "bold cyan")
            + output.text(f": {len(library)} kernel templates, four architectures, no GPU needed")
        )
    report = run_prewarm(session, session.service(library), library, DEMO_ARCHS, jobs=jobs)
    if session.json:
        output.emit(report_json(session, report))
    else:
        print_report(session, report)
        print_next(session, report)
    if not report.ok:
        raise click.exceptions.Exit(ExitCode.FAILED)


def report_json(session: Session, report: PrewarmReport) -> dict[str, object]:
    """Return the JSON form of a report."""
    return {
        **report.to_dict(),
        "ok": report.ok,
        "kernels": len({item.kernel for item in report.items}),
        "variants": len({_variant(item) for item in report.items}),
        "root": session.root(),
    }


def _variant(item: PrewarmItem) -> tuple[str, str]:
    return item.kernel, parameters_text(item.variant)


class StoppedError(click.ClickException):
    """A prewarm was stopped by Ctrl-C."""

    exit_code = ExitCode.INTERRUPTED


class TerminatedError(click.ClickException):
    """A prewarm was stopped by SIGTERM."""

    exit_code = ExitCode.TERMINATED


def run_prewarm(
    session: Session,
    service: CompileService,
    library: KernelLibrary,
    archs: Sequence[str],
    **how: Any,
) -> PrewarmReport:
    """Prewarm with a progress display on stderr; if stopped, raise a ClickException that says what is kept."""
    compiled = 0

    def count(item: PrewarmItem, done: int, total: int) -> None:
        nonlocal compiled
        compiled += item.status == "compiled"
        on_progress(item, done, total)

    try:
        with _progress() as (on_start, on_progress):
            return service.prewarm(library, archs=tuple(archs), on_start=on_start, on_progress=count, **how)
    except KeyboardInterrupt as stop:
        terminated = isinstance(stop, Terminated)
        error, word = (TerminatedError, "terminated") if terminated else (StoppedError, "interrupted")
        kept = f"{output.plural(compiled, 'program')} compiled so far are kept in {session.root()}"
        raise error(f"{word}; {kept}, and the same command continues from there") from None


@contextmanager
def _progress() -> Iterator[tuple[Progress | None, Progress]]:
    """Show progress: a live bar on a terminal, otherwise a line for each compile or failure."""
    pace = _Pace()
    if not sys.stderr.isatty():
        yield None, lambda item, done, total: _print_item(item, done, total, pace.told(item, done, total))
        return
    from rich import progress
    from rich.console import Console
    from rich.table import Column

    columns = (
        progress.SpinnerColumn(),
        progress.BarColumn(bar_width=20, complete_style="cyan", finished_style="green"),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[pace]}"),
        progress.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis")),
    )
    with progress.Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as display:
        task = display.add_task("reading the kernel library", total=None, pace="")

        def on_progress(item: PrewarmItem, done: int, total: int) -> None:
            colour = {"failed": "red", "compiled": "cyan", "compiling": "cyan"}.get(item.status, "green")
            name = output.escape(f"{item.kernel} {parameters_text(item.variant)} {item.arch}")
            told = pace.told(item, done, total)
            display.update(
                task, completed=done, total=total, pace=told, description=f"[{colour}]{item.status}[/] {name}"
            )
            if item.status == "failed":
                display.console.print(f"[red]failed[/] {name}")

        yield on_progress, on_progress


class _Pace:
    """The rate of compiles per minute, and the time left at this rate."""

    def __init__(self) -> None:
        self._started = 0.0
        self._compiled = 0

    def told(self, item: PrewarmItem, done: int, total: int) -> str:
        """Count an item and return the pace as text; empty until two programs are compiled."""
        now = time.monotonic()
        if not self._started:
            self._started = now - item.seconds
        self._compiled += item.status in {"compiled", "failed"}
        if self._compiled < 2 or done >= total or now <= self._started:
            return ""
        rate = self._compiled / (now - self._started)
        return f"{rate * 60:.0f}/min, {output.seconds((total - done) / rate)} left"


def _print_item(item: PrewarmItem, done: int, total: int, pace: str) -> None:
    if item.status in {"compiled", "failed"}:
        what = f"{item.kernel} {parameters_text(item.variant)} for {item.arch}"
        click.echo(
            f"[{done:>{len(str(total))}}/{total}] {item.status} {what} in {output.seconds(item.seconds)}"
            + (f"; {pace}" if pace else ""),
            err=True,
        )


def write_junit(path: Path, report: PrewarmReport) -> None:
    """Write a JUnit report with one case per program; a program missing in a dry run is a failure."""
    from cuda_progcache.service import junit

    cases = []
    for item in report.items:
        failure = {"failed": str(item.error), "missing": "; ".join(item.reasons)}.get(item.status, "")
        skipped = str(item.error) if item.status == "skipped" else ""
        name = f"{item.kernel} {parameters_text(item.variant)} {item.arch}"
        cases.append(junit.Case(item.kernel, name, item.seconds, failure, skipped))
    junit.write(path, "cuda-progcache prewarm", cases)


def print_report(session: Session, report: PrewarmReport) -> None:
    """Print the summary: one row per kernel, a total, failures with their reasons, and the time saved by hits."""
    rows: dict[str, list[PrewarmItem]] = defaultdict(list)
    for item in report.items:
        rows[item.kernel].append(item)
    rare = tuple(
        status for status in ("missing", "failed", "skipped") if any(item.status == status for item in report.items)
    )
    numbers = ("variants", "archs", "compiled", "hits", *rare, "compile time", "size")
    made = output.table(("kernel", *numbers), right=numbers)
    for kernel, items in rows.items():
        made.add_row(output.text(kernel), *_figures(items, rare))
    if len(rows) > 1:
        made.add_section()
        made.add_row(
            output.text("all", "bold"),
            *(output.text(f, "bold") for f in _figures(report.items, rare)),
        )
    output.show(made)
    for item in report.items:
        if item.status == "failed":
            output.show(output.text(f"failed: {item.kernel} {parameters_text(item.variant)} for {item.arch}", "red"))
            output.show(output.text(str(item.error).rstrip()))
        elif item.status == "missing":
            about = f"missing: {item.kernel} {parameters_text(item.variant)} for {item.arch}"
            output.line(f"{about}: {'; '.join(item.reasons)}")
    output.show(_verdict(report))
    output.show(output.text(f"entries: {session.root() / 'entries'}"))
    if report.call is not None:
        output.line(f"recorded: {session.command('provenance')} {report.call[:12]}")


def _figures(items: Sequence[PrewarmItem], rare: Sequence[str]) -> tuple[str, ...]:
    """Return one row's numbers; the compile time of a hit is that of its original compile."""
    status = [item.status for item in items]
    took = sum(item.saved if item.status == "hit" else item.seconds for item in items)
    return (
        str(len({_variant(item) for item in items})),
        str(len({item.arch for item in items})),
        str(status.count("compiled")),
        str(status.count("hit")),
        *(str(status.count(each)) for each in rare),
        output.seconds(took),
        output.size(sum(item.size for item in items)),
    )


def _verdict(report: PrewarmReport) -> str:
    total = len(report.items) - report.skipped
    wall = output.seconds(report.seconds)
    if not total:
        return "nothing to compile: every kernel needs a later architecture"
    programs = output.plural(total, "program")
    if report.hits == total:
        saved = output.seconds(report.saved_seconds)
        return f"100% hits: {programs} from the cache in {wall}, which saved {saved} of compile time."
    parts = [f"{report.compiled:,} compiled in {wall} ({output.seconds(report.compile_seconds)} of compile time)"]
    if report.hits:
        saved = output.seconds(report.saved_seconds)
        parts.append(f"{output.plural(report.hits, 'hit')} ({100 * report.hits // total}%), which saved {saved}")
    if report.missing:
        parts.append(f"{report.missing:,} missing, which would be compiled")
    if report.failed:
        parts.append(f"{report.failed:,} failed")
    if not report.compiled:
        del parts[0]
    return f"{programs}: {', '.join(parts)}."


def print_next(session: Session, report: PrewarmReport) -> None:
    """Print suggestions for the next commands, with a digest from this run."""
    kept = [item for item in report.items if item.digest]
    if not kept:
        return
    largest = max(kept, key=lambda item: item.size)
    prefix = str(largest.digest)[: output.prefix_length(str(item.digest) for item in kept)]
    show = session.command("show")
    steps = [
        (f"show the origin and the resources of {largest.kernel} for {largest.arch}", f"{show} {prefix}"),
        ("disassemble it, straight from the cache", f"{cuobjdump()} -sass $({show} --path {prefix})"),
        ("list all programs for this architecture", f"{session.command('list')} --arch {largest.arch}"),
        ("write a report on the cache, with plots", f"{session.command('report')} -o report.html"),
    ]
    if report.hits < len(report.items) - report.skipped:
        again = "make demo" if os.environ.get("MAKELEVEL") else session.command("demo")
        steps.append(("run it again: now everything is a hit", again))
    # Printed by click, since rich would fold a command, which then couldn't be copied.
    output.line("next:")
    for remark, command in steps:
        output.line(click.style(f"  # {remark}", dim=True))
        output.line(click.style(f"  {command}", bold=True))

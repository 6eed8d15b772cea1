# SPDX-License-Identifier: Apache-2.0
"""``lock`` and ``check``: write a lockfile of the programs that a deployment needs, and check that they are there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.app import ExitCode
from cuda_progcache.cli.session import (
    OutputFile,
    Session,
    archs_option,
    common_options,
    include_option,
    kernels_option,
    library_at,
    library_option,
    manifest_option,
)

if TYPE_CHECKING:
    from cuda_progcache.service.proof import Proof
    from cuda_progcache.store.base import ProgramCacheResource

#: The maximum number of table rows, and of rows for unused entries among them; --json has all.
_ROWS, _UNUSED = 40, 10

lock_option = click.option(
    "--lock",
    "lock_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Use the programs of this lockfile.",
)
junit_option = click.option("--junit", type=OutputFile(), metavar="FILE", help="Also write a JUnit report.")

LOCK_JSON = """
--json: {"path": str, "programs": int, "unlocked": int (locked without a key, since they aren't in the cache),
"toolchain": [{"name", "build"}]}
"""


@click.command("lock", short_help="Write a lockfile of the programs that a deployment needs.", epilog=LOCK_JSON)
@manifest_option
@archs_option("Lock the library's variants for this architecture; repeatable.")
@kernels_option("Lock only this kernel of the library; repeatable.")
@click.option(
    "--from",
    "recordings",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="RUN",
    help="Lock the programs of a run recorded with CUDA_PROGCACHE_RECORD=RUN; repeatable.",
)
@click.option(
    "-o",
    "--output",
    "target",
    type=OutputFile(),
    metavar="FILE",
    default="progcache.lock",
    show_default=True,
    help="The lockfile to write.",
)
@include_option
@common_options
@click.pass_obj
def lock_command(
    session: Session,
    manifest: Path | None,
    archs: tuple[str, ...],
    kernels: tuple[str, ...],
    recordings: tuple[Path, ...],
    target: Path,
    include_paths: tuple[str, ...],
) -> None:
    """Write a lockfile of the programs that recorded runs used, the variants of a kernel library, or both.

    The lockfile has one program per line, and the same programs give the same bytes. Nothing is compiled.
    """
    if not archs and not recordings:
        raise click.UsageError("give --from RUN for a recorded run, --arch for the library's variants, or both")
    library = library_at(manifest)
    service = session.service(library, include_paths, make=False)
    lock = service.lock(recordings, archs=archs, kernels=kernels or None)
    lock.write(target)
    unlocked = [program for program in lock.programs if not program.key]
    if session.json:
        builds = [{"name": name, "build": build} for name, build in lock.toolchain]
        told = {"path": target, "programs": len(lock.programs), "unlocked": len(unlocked), "toolchain": builds}
        output.emit(told)
        return
    if unlocked:
        are = "isn't" if len(unlocked) == 1 else "aren't"
        output.note_line(
            f"{output.plural(len(unlocked), 'program')} {are} in {session.root()} yet and locked without a key; "
            f"to add the keys, compile with prewarm --lock {target}, then run lock again"
        )
    output.line(f"{output.plural(len(lock.programs), 'program')} in {target}")


CHECK_JSON = """
--json: {"path": str, "archs": [str] (checked architectures; empty if there is no device: all pass), "usable": int,
"entries": [{"digest", "name", "target_type", "arch", "usable" (null: can't be determined), "reasons"}]}

With --lock or --manifest: {"path": str, "ok": bool, "counts": {"hit", "missing", "stale", "failed", "skipped",
"unused"}, "programs": [{"title", "kernel", "parameters", "arch", "target", "status", "reasons", "command",
"digest"}], "unused": [{"digest", "name", "arch", "target", "size"}]}

Exit code 1: some programs can't be used here; with --lock or --manifest, some are missing, stale or failed.
"""


@click.command("check", short_help="Check which programs are usable here, and which are missing.", epilog=CHECK_JSON)
@click.argument("path", required=False, type=click.Path(exists=True, path_type=Path))
@lock_option
@library_option("Check the variants of this kernel library (a folder); with --lock, the library of its kernels.")
@archs_option("Check for this architecture instead of this machine's devices; repeatable.")
@kernels_option("With --manifest: check only this kernel; repeatable.")
@include_option
@junit_option
@common_options
@click.pass_obj
def check_command(
    session: Session,
    path: Path | None,
    lock_file: Path | None,
    manifest: Path | None,
    archs: tuple[str, ...],
    kernels: tuple[str, ...],
    include_paths: tuple[str, ...],
    junit: Path | None,
) -> int:
    """Check which programs in PATH can be used on this machine. PATH is a bundle or a cache; default: the cache.

    A program can be used if it runs on the device and would have the same key on this machine: the same compiler,
    headers and environment variables, and the same paths if the binary contains paths. -I gives the folders of the
    programs' own headers.

    With --lock or --manifest, check that the needed programs are in PATH; for each that is missing or stale, the reason
    is shown, as in a frozen run. Entries that aren't needed are listed as unused, which isn't a failure.
    """
    if lock_file is None and manifest is None:
        if junit is not None:
            raise click.UsageError("--junit needs --lock or --manifest")
        return _check_host(session, path, archs, include_paths)
    if lock_file is None and not archs:
        raise click.UsageError("--manifest needs --arch: give the architectures to check")
    from cuda_progcache.service.compile_service import CompileService

    with _cache_at(session, path) as cache:
        service = CompileService(cache, library=library_at(manifest), include_path=include_paths)
        proof = service.check(lock_file, archs=archs, kernels=kernels or None)
        where = f"{path or session.root()}{' and its tiers' if getattr(cache, 'tiers', ()) else ''}"
    if junit is not None:
        _write_junit(junit, proof)
    if session.json:
        output.emit({"path": path or session.root(), **proof.to_dict()})
    else:
        _print_proof(proof, where)
    return ExitCode.OK if proof.ok else ExitCode.FAILED


@contextmanager
def _cache_at(session: Session, path: Path | None) -> Iterator[ProgramCacheResource]:
    """Open what is checked: the cache, a directory (read-only) or a bundle (unpacked)."""
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.readonly import ReadOnlyProgramCache

    if path is None:
        yield session.looked_at()
    elif path.is_dir():
        with ReadOnlyProgramCache(path) as cache:
            yield cache
    else:
        from cuda_progcache._util.scratch import ScratchFolder

        with ScratchFolder("progcache-check-") as folder:
            unpacked = FileStreamProgramCache(folder, durability="none", mode="rw")
            unpacked.import_(path)
            yield unpacked


def _print_proof(proof: Proof, where: str) -> None:
    wrong = [program for program in proof.programs if program.status not in {"hit", "skipped"}]
    made = output.table(("status", "program", "why"))
    for program in wrong[:_ROWS]:
        colour = "yellow" if program.status == "stale" else "red"
        made.add_row(
            output.text(program.status, colour), output.text(program.title), output.text("; ".join(program.reasons))
        )
    for entry in proof.unused[: max(0, min(_UNUSED, _ROWS - len(wrong)))]:
        about = f"{entry.name} {entry.target} {entry.arch}  {entry.digest[:12]}  {output.size(entry.size)}"
        made.add_row(output.text("unused", "dim"), output.text(about), output.text(""))
    if wrong or proof.unused:
        output.show(made)
    if (more := len(wrong) + len(proof.unused) - made.row_count) > 0:
        output.line(f"and {more:,} more (--json has all)")
    if commands := dict.fromkeys(program.command for program in wrong if program.command):
        output.line("to fix it:")
        for command in list(commands)[:5]:
            output.line(f"  {command}")
    counts = Counter(program.status for program in proof.programs)
    counts["unused"] = len(proof.unused)
    rest = ("missing", "stale", "failed", "unused")
    told = ", ".join(f"{counts[status]:,} {status}" for status in rest if counts[status])
    needed = len(proof.programs) - counts["skipped"]
    output.line(
        f"{counts['hit']:,} of {output.plural(needed, 'program')} {'is' if needed == 1 else 'are'} in {where}"
        + (f"; {told}" if told else "")
    )


def _write_junit(path: Path, proof: Proof) -> None:
    from cuda_progcache.service import junit

    cases = []
    for program in proof.programs:
        why = f"{program.status}: {'; '.join(program.reasons)}\n{program.command}"
        skipped = program.reasons[0] if program.status == "skipped" else ""
        failed = "" if program.status in {"hit", "skipped"} else why
        cases.append(junit.Case(program.kernel, program.title, failure=failed, skipped=skipped))
    junit.write(path, "cuda-progcache check", cases)


def _check_host(session: Session, path: Path | None, archs: tuple[str, ...], include_paths: tuple[str, ...]) -> int:
    from cuda_progcache.service.host import check, device_archs

    where = session.root() if path is None else path
    asked = archs or device_archs()
    checked = (
        ()
        if path is None and session.existing_cache() is None
        else check(where, archs=asked, include_path=include_paths)
    )
    usable = sum(entry.usable is True for entry in checked)
    if session.json:
        output.emit({"path": where, "archs": asked, "usable": usable, "entries": [e._asdict() for e in checked]})
    else:
        if not asked and checked:
            output.note_line("no CUDA device found: architectures aren't checked; give --arch, such as --arch sm_90")
        reasons = Counter(reason for entry in checked for reason in entry.reasons)
        for reason, count in reasons.most_common():
            output.line(f"{count:,}: {reason}")
        output.line(f"{usable:,} of {output.plural(len(checked), 'entry')} can be used here")
    return ExitCode.OK if all(entry.usable is not False for entry in checked) else ExitCode.FAILED

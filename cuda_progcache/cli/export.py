# SPDX-License-Identifier: Apache-2.0
"""``export``: write programs for another machine, as a bundle, an image or a wheel."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.completion import names
from cuda_progcache.cli.maintenance import arch_option, parse_time
from cuda_progcache.cli.proof import lock_option
from cuda_progcache.cli.session import OutputFile, Session, common_options, include_option, library_at, library_option
from cuda_progcache.service.selection import fits

if TYPE_CHECKING:
    from cuda_progcache.store.base import EntryInfo

EXPORT_JSON = """
--json: {"root": str, "path": str, "entries": int, "bytes": int (size of the bundle; for an image or a wheel, of its
entries), "damaged": int (entries left out)}

A bundle is a tar archive: tar -tf lists it, and tar -xf BUNDLE -C DIR extracts it as a cache directory.

Exit code 1: a program of --lock or --manifest isn't in the cache; nothing was written.
"""


@click.command("export", short_help="Write programs to a bundle, an image or a wheel.", epilog=EXPORT_JSON)
@click.argument("bundle", required=False, type=OutputFile())
@lock_option
@library_option("Only the variants of this library for each --arch; with --lock, the library of its kernels.")
@arch_option
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="NAME",
    shell_complete=names,
    help="Only programs of this name (may contain * and ?); repeatable.",
)
@click.option(
    "--since",
    metavar="WHEN",
    help="Only programs stored since a time (12h, 30d, 2026-01-31, 2026-01-31T12:00), or not in an older lockfile.",
)
@click.option("--oci", type=click.Path(path_type=Path), metavar="DIR", help="Write an OCI image layout to DIR.")
@click.option("--wheel", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write a wheel to DIR.")
@click.option("--name", metavar="NAME", help="The wheel's name, such as my-kernels-sm90.")
@click.option("--wheel-version", default="1.0", show_default=True, metavar="VERSION", help="The wheel's version.")
@include_option
@common_options
@click.pass_obj
def export_command(
    session: Session,
    bundle: Path | None,
    lock_file: Path | None,
    manifest: Path | None,
    archs: tuple[str, ...],
    kernels: tuple[str, ...],
    since: str | None,
    oci: Path | None,
    wheel: Path | None,
    name: str | None,
    wheel_version: str,
    include_paths: tuple[str, ...],
) -> None:
    """Write the cache, or a part of it, to the file BUNDLE, an OCI image or a wheel.

    The same programs give the same bytes. An image (--oci) has one layer, which is a cache directory: mount it, and
    set CUDA_PROGCACHE_DIR. Once a wheel (--wheel, --name) is installed, the default cache finds its programs without
    any configuration.
    """
    from cuda_progcache.cli.app import NoEntryError

    if sum(way is not None for way in (bundle, oci, wheel)) != 1:
        raise click.UsageError("give one of BUNDLE, --oci DIR and --wheel DIR")
    if (wheel is None) != (name is None):
        raise click.UsageError("--wheel DIR and --name NAME must be given together")
    if manifest is not None and lock_file is None and not archs:
        raise click.UsageError("--manifest needs --arch: give the architectures to export")
    cache = session.existing_cache()
    if cache is None:
        raise NoEntryError(f"nothing to export: there is no cache at {session.root()}")
    entries = list(cache.entries())
    if lock_file is not None or manifest is not None:
        from cuda_progcache.service.compile_service import CompileService
        from cuda_progcache.service.export import needed

        service = CompileService(session.looked_at(), library=library_at(manifest), include_path=include_paths)
        asked = service.check(lock_file, archs=archs, kernels=kernels or None)
        wanted = needed(asked, cache)
        entries = [entry for entry in entries if entry.digest in wanted]
        if lock_file is not None:
            entries = _of_archs(entries, archs)
    else:
        entries = _of_archs(_of_names(entries, kernels), archs)
    chosen = {entry.digest for entry in (entries if since is None else _since(entries, since))}
    if not chosen:
        raise NoEntryError(f"nothing to export: no program in {session.root()} matches")

    def fits(entry: EntryInfo) -> bool:
        return entry.digest in chosen

    damaged = 0
    if bundle is not None:
        report = cache.export(bundle, filter=fits)
        path, count, size, damaged = report
    else:
        from cuda_progcache.service.export import write_oci, write_wheel

        if oci is not None:
            path, count, size = write_oci(cache, oci, fits)
        else:
            path, count, size = write_wheel(cache, str(wheel), fits, name=str(name), version=wheel_version)
        damaged = len(chosen) - count
    if session.json:
        output.emit({"root": session.root(), "path": path, "entries": count, "bytes": size, "damaged": damaged})
        return
    if damaged:
        output.note_line(f"{output.plural(damaged, 'damaged entry')} left out; run verify for details")
    output.line(f"{output.plural(count, 'entry')} in {path} ({output.size(size)})")


def _since(entries: Sequence[EntryInfo], when: str) -> list[EntryInfo]:
    """Return the programs that were published since a time, or that an older lockfile doesn't list."""
    if Path(when).is_file():
        from cuda_progcache.service.lock import Lock

        before = {program.key for program in Lock.read(when).programs}
        return [entry for entry in entries if entry.digest not in before]
    try:
        moment = datetime.fromisoformat(when).timestamp()
    except ValueError:
        try:
            moment = time.time() - (parse_time(None, None, when) or 0.0)
        except click.BadParameter:
            raise click.BadParameter(
                f"{when!r} is neither a time (12h, 30d, 2026-01-31T12:00) nor a lockfile", param_hint="--since"
            ) from None
    return [entry for entry in entries if entry.created >= moment]


def _of_names(entries: Sequence[EntryInfo], patterns: Sequence[str]) -> list[EntryInfo]:
    """Return the programs of these names; raise NoEntryError if no program has one of them (it may be misspelt)."""
    from cuda_progcache._util.suggest import did_you_mean
    from cuda_progcache.cli.app import NoEntryError

    names = {entry.about.title for entry in entries}
    for pattern in patterns:
        if not any(fits(name, pattern) for name in names):
            raise NoEntryError(f"no program is called {pattern!r}{did_you_mean(pattern, names, listing='there are')}")
    return [entry for entry in entries if not patterns or any(fits(entry.about.title, pattern) for pattern in patterns)]


def _of_archs(entries: Sequence[EntryInfo], archs: Sequence[str]) -> list[EntryInfo]:
    """Return the programs for these architectures; raise NoEntryError if there is none for one of them."""
    from cuda_progcache._util.suggest import did_you_mean
    from cuda_progcache.cli.app import NoEntryError

    there = {entry.about.arch for entry in entries} - {""}
    for arch in archs:
        if arch not in there:
            raise NoEntryError(f"no matching program is for {arch}{did_you_mean(arch, there, listing='there are')}")
    return [entry for entry in entries if not archs or entry.about.arch in archs]

# SPDX-License-Identifier: Apache-2.0
"""``verify``, ``prune``, ``pin`` and ``import``: commands that maintain a cache."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.app import ExitCode
from cuda_progcache.cli.completion import programs
from cuda_progcache.cli.entries import find_entry
from cuda_progcache.cli.session import Session, archs_option, common_options
from cuda_progcache.store.default_cap import parse_size as in_bytes

if TYPE_CHECKING:
    from cuda_progcache.store.file_stream import FileStreamProgramCache

arch_option = archs_option("Only programs for this architecture, such as sm_90; repeatable.")


_TIMES = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(_ctx: click.Context, _param: click.Parameter, value: str | None) -> int | None:
    """Parse ``500MB``, ``2GiB`` or ``0`` as bytes."""
    if value is None:
        return None
    try:
        return in_bytes(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def parse_time(_ctx: click.Context | None, _param: click.Parameter | None, value: str | None) -> float | None:
    """Parse ``90min``, ``12h`` or ``30d`` as seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r} isn't a duration such as 90min, 12h or 30d")
    return float(match[1]) * _TIMES[match[2]]


VERIFY_JSON = """
--json: {"root": str, "ok": bool (no problem is left), "whole": int (intact entries), "bytes": int (size of the intact
entries), "findings": [{"kind", "path", "digest" (or null), "size" (bytes), "advice", "repaired": bool}]}; kinds:
corrupt, damaged-record, no-record, no-entry, unreadable, foreign, stale-staging

Exit code 1: there are problems that weren't repaired.
"""


@click.command("verify", short_help="Check every byte of the cache.", epilog=VERIFY_JSON)
@click.option(
    "--repair", is_flag=True, help="Move damaged files to the quarantine, and remove the leftovers of killed writers."
)
@common_options
@click.pass_obj
def verify_command(session: Session, *, repair: bool) -> int:
    """Check every entry against its checksum, and look for files that don't belong in the cache.

    Even without this command, a damaged entry is never a hit.
    """
    cache = session.existing_cache(looking=not repair)
    seen = None if cache is None else cache.verify(repair=repair)
    findings = () if seen is None else seen.findings
    ok, size = (0, 0) if seen is None else (seen.ok, seen.bytes)
    clean = seen is None or seen.clean
    if session.json:
        output.emit(
            {
                "root": session.root(),
                "ok": clean,
                "whole": ok,
                "bytes": size,
                "findings": [{**finding._asdict(), "advice": finding.advice} for finding in findings],
            }
        )
    else:
        for finding in findings:
            done = " (repaired)" if finding.repaired else ""
            output.line(f"{finding.kind}{done}: {finding.path} ({output.size(finding.size)})")
        for kind, count in sorted(Counter(f.kind for f in findings if not f.repaired).items()):
            advice = next(f.advice for f in findings if f.kind == kind)
            output.line(f"{count:,} {kind}: {advice}")
        output.line(f"{output.plural(ok, 'entry')} intact ({output.size(size)}), {_wrong(len(findings))}")
        if not clean and not repair:
            output.line(f"to repair: {session.command('verify')} --repair")
    return ExitCode.OK if clean else ExitCode.FAILED


def _wrong(count: int) -> str:
    return "no problems" if not count else f"{output.plural(count, 'problem')} found"


PRUNE_JSON = """
--json: {"root": str, "dry_run": bool, "removed": int, "bytes": int (freed), "left": int, "left_bytes": int, "pinned":
int (pinned entries)}; with --dry-run: what would be removed, freed and left
"""


@click.command("prune", short_help="Remove the least recently used entries.", epilog=PRUNE_JSON)
@click.option(
    "--max-size",
    callback=parse_size,
    metavar="SIZE",
    help="Remove entries until the cache is no larger than this, such as 500MB or 2GiB.",
)
@click.option(
    "--older-than",
    callback=parse_time,
    metavar="TIME",
    help="Remove entries that haven't been used for this long, such as 90min, 12h or 30d.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing; show what would be removed.")
@common_options
@click.pass_obj
def prune_command(session: Session, max_size: int | None, older_than: float | None, *, dry_run: bool) -> None:
    """Remove entries, the least recently used first. Pinned entries stay.

    Reported sizes are those of the entries, as in stats. --max-size and the size cap also count long records.
    """
    if max_size is None and older_than is None:
        raise click.UsageError("give --max-size, --older-than or both")
    cache = session.existing_cache(looking=dry_run)
    report = {"removed": 0, "bytes": 0, "left": 0, "left_bytes": 0, "pinned": 0}
    if cache is not None:
        report = cache.prune(max_size_bytes=max_size, older_than=older_than, dry_run=dry_run)._asdict()
        if report["removed"] and not dry_run and (session.root() / "steps").is_dir():
            from cuda_progcache.provenance.programs import program_cache

            program_cache(cache).gc()  # remove the recorded calls of removed entries
    if session.json:
        output.emit({"root": session.root(), "dry_run": dry_run, **report})
        return
    spared = f", {report['pinned']:,} of them pinned" if report["pinned"] else ""
    done = "would remove" if dry_run else "removed"
    output.line(
        f"{done} {output.plural(report['removed'], 'entry')} ({output.size(report['bytes'])}); "
        f"{output.plural(report['left'], 'entry')} left ({output.size(report['left_bytes'])}{spared})"
    )


PIN_JSON = """
--json: {"root": str, "pins": [{"digest", "name" (null: the entry is gone, but would be pinned if stored again),
"arch", "size"}]}: everything that is pinned after the command
"""


@click.command("pin", short_help="Protect programs from eviction and pruning.", epilog=PIN_JSON)
@click.argument("keys", nargs=-1, metavar="[KEY]...", shell_complete=programs)
@click.option("--unpin", is_flag=True, help="Unpin the programs.")
@click.option("--list", "listing", is_flag=True, help="List the pinned programs.")
@common_options
@click.pass_obj
def pin_command(session: Session, keys: tuple[str, ...], *, unpin: bool, listing: bool) -> None:
    """Pin programs, so that neither the size cap nor prune removes them.

    KEY is a digest prefix, as list prints it, or a name that matches one program. clear still removes pinned programs,
    and a write can still replace one.
    """
    if bool(keys) == listing or (unpin and listing):
        raise click.UsageError("give KEY, with or without --unpin, or --list")
    pinned: frozenset[str] = frozenset()
    if listing:
        cache = session.existing_cache()
    else:
        digests = [_pinned_or_there(session, key, unpin=unpin) for key in keys]
        cache = session.cache()
        for digest in digests:
            try:
                (cache.unpin if unpin else cache.pin)(digest)
            except KeyError:
                output.note_line(f"{digest[:12]} wasn't pinned" if unpin else f"{digest[:12]} is gone")
    if cache is not None:
        pinned = cache.pins()
    rows = [_pin_json(cache, digest) for digest in sorted(pinned)]
    if session.json:
        output.emit({"root": session.root(), "pins": rows})
    elif listing:
        for row in rows:
            size = "not in the cache now" if row["size"] is None else output.size(row["size"])
            output.line(f"{row['digest']}  {row['name'] or '-'}  {row['arch'] or '-'}  {size}")
    else:
        output.line(f"{output.plural(len(rows), 'entry')} pinned in {session.root()}")


def _pinned_or_there(session: Session, key: str, *, unpin: bool) -> str:
    """Resolve a key: with ``unpin``, first among the pins, which may have no entry; otherwise among the entries."""
    cache = session.existing_cache() if unpin else None
    if cache is not None:
        matches = [digest for digest in cache.pins() if len(key) >= 4 and digest.startswith(key.lower())]
        if len(matches) == 1:
            return matches[0]
    return find_entry(session, key).digest


def _pin_json(cache: FileStreamProgramCache | None, digest: str) -> dict[str, Any]:
    try:
        entry = None if cache is None else cache.info(digest)
    except KeyError:
        entry = None
    if entry is None:
        return {"digest": digest, "name": None, "arch": None, "size": None}
    return {
        "digest": digest,
        "name": entry.about.title,
        "arch": entry.about.arch or None,
        "size": entry.size,
    }


IMPORT_JSON = """
--json: {"root": str, "imported": int, "bytes": int, "present": int (already in the cache), "filtered": int (other
architectures), "refused": int (larger than the size cap), "differing": int (those of "present" whose bytes differ)}

Exit code 1: the file is damaged or not a bundle; nothing was imported.

Checksums detect damage, but don't show who made a bundle: import only bundles that you trust.
"""


@click.command("import", short_help="Add a bundle's programs to the cache.", epilog=IMPORT_JSON)
@click.argument("bundle", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@arch_option
@common_options
@click.pass_obj
def import_command(session: Session, bundle: Path, archs: tuple[str, ...]) -> None:
    """Add the programs in the file BUNDLE to the cache. Programs that are already in the cache aren't changed."""
    report = session.cache().import_(bundle, archs=archs or None)
    if session.json:
        output.emit({"root": session.root(), **report._asdict()})
        return
    rest = [
        f"{count:,} {what}"
        for count, what in (
            (report.present, "already in the cache"),
            (report.differing, "of these with bytes that differ from the bundle's"),
            (report.filtered, "for other architectures"),
            (report.refused, "larger than the size cap"),
        )
        if count
    ]
    output.line(
        f"imported {output.plural(report.imported, 'entry')} ({output.size(report.bytes)})"
        + (f"; {', '.join(rest)}" if rest else "")
    )

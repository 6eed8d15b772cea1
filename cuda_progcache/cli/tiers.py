# SPDX-License-Identifier: Apache-2.0
"""``tiers``, ``sync`` and ``gc``: commands on the tiers, the stores that machines share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.maintenance import parse_time
from cuda_progcache.cli.progress import progress
from cuda_progcache.cli.proof import lock_option
from cuda_progcache.cli.session import Session, common_options
from cuda_progcache.errors import LockError

if TYPE_CHECKING:
    from cuda_progcache.service.lock import Lock
    from cuda_progcache.store.tiers.tally import TierTotals
    from cuda_progcache.store.tiers.upkeep import Health

TIERS_JSON = """
--json: {"source": str (where the tiers are configured; empty if they are given as arguments), "tiers": [{"url",
"mode", "trust", "ok": bool, "trouble": str, "latency": seconds or null, "objects", "bytes": int or null (--count),
"breaker": "closed" or "open", "all_time": {"hits", "misses", "corrupt", "untrusted", "errors", "timeouts", "stored",
"dropped", "bytes_in", "bytes_out", "calls"} (totals of all processes on this cache)}]}
"""


@click.command("tiers", short_help="Check the tiers and show their traffic.", epilog=TIERS_JSON)
@click.argument("urls", nargs=-1, metavar="[TIER]...")
@click.option("--count", is_flag=True, help="Count the programs in each tier, which may take long.")
@common_options
@click.pass_obj
def tiers_command(session: Session, *, urls: tuple[str, ...], count: bool) -> None:
    """Check that the configured tiers, or the given ones, work, and show their traffic.

    Hits, bytes and errors are totals of all processes on this cache. Each process stops using a failing tier for 30
    seconds, and for longer each time; "breaker" is "open" if the tier fails now. Exit code 1: a tier doesn't work.
    """
    from cuda_progcache.store.tiers.configuration import configured
    from cuda_progcache.store.tiers.sides import settings_of
    from cuda_progcache.store.tiers.upkeep import health

    known = configured()
    tiers = [settings_of(url) for url in urls] if urls else known.tiers
    found = [(health(one, count=count), _counted(session, one.url)) for one in tiers]
    if session.json:
        told = [
            {**one._asdict(), "breaker": "closed" if one.ok else "open", "all_time": all_time._asdict()}
            for one, all_time in found
        ]
        output.emit({"source": "" if urls else known.source, "tiers": told})
    elif not found:
        output.line("no tiers are configured; set CUDA_PROGCACHE_TIERS, or tiers in cuda_progcache.toml")
    else:
        _show(found)
    if not all(one.ok for one, _ in found):
        click.get_current_context().exit(1)


def _counted(session: Session, url: str) -> TierTotals:
    from cuda_progcache.store.root import Root
    from cuda_progcache.store.tiers.tally import TierTotals, counted

    root = session.root()
    return counted(Root(str(root), shared=False), url) if root.exists() else TierTotals()


def _show(found: list[tuple[Health, TierTotals]]) -> None:
    columns = (
        "tier",
        "mode",
        "trust",
        "health",
        "latency",
        "lookups",
        "hits",
        "read",
        "written",
        "dropped",
        "trouble",
    )
    made = output.table(columns, right=columns[4:])
    for one, counted in found:
        lookups = counted.hits + counted.misses
        made.add_row(
            output.text(one.url),
            one.mode,
            one.trust,
            output.text("ok" if one.ok else "failed"),
            "-" if one.latency is None else output.seconds(one.latency),
            f"{lookups:,}",
            f"{counted.hits / lookups:.0%}" if lookups else "-",
            output.size(counted.bytes_in),
            output.size(counted.bytes_out),
            f"{counted.dropped:,}",
            f"{counted.errors + counted.corrupt + counted.untrusted:,}",
        )
    output.show(made)
    for one, counted in found:
        if one.trouble:
            output.fail_line(f"{one.url}: {one.trouble}")
        kinds = {
            "timeout": counted.timeouts,
            "error": counted.errors - counted.timeouts,
            "damaged object": counted.corrupt,
            "untrusted object": counted.untrusted,
        }
        if any(kinds.values()):
            listed = ", ".join(output.plural(many, kind) for kind, many in kinds.items() if many)
            output.line(f"{output.printable(one.url)} has had {listed} (all time)")
        if one.objects is not None:
            held = f"{output.plural(one.objects, 'program')}, {output.size(one.bytes or 0)}"
            output.line(f"{output.printable(one.url)} holds {held}")


SYNC_JSON = """
--json: {"source", "target", "dry_run": bool, "copied": int, "bytes": int, "there": int (already in the target),
"missing": int (requested, but not in the source), "unusable": int (damaged, or without a trusted signature),
"refused": int (too large for the target), "manifests": int, "packed": int (programs in the pack; 0: none written)}
"""


@click.command("sync", short_help="Copy programs between caches and tiers.", epilog=SYNC_JSON)
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@lock_option
@click.option(
    "--pack",
    is_flag=True,
    help="Also write the lockfile's programs as one object, which prewarm --lock fetches in one request.",
)
@click.option("--dry-run", is_flag=True, help="Copy nothing; show what would be copied.")
@common_options
@click.pass_obj
def sync_command(
    session: Session, *, source: str, target: str, lock_file: Path | None, pack: bool, dry_run: bool
) -> None:
    """Copy the programs that SRC has and DST lacks, with the header manifests that lead to them. Nothing is removed.

    SRC and DST are each a cache directory or a tier's URL. The URL of a configured tier needs no options. A sync that
    was stopped continues when it is run again. Exit code 1: a program of the lockfile isn't in SRC, or a program can't
    be used.
    """
    from cuda_progcache.store.tiers.sides import is_url
    from cuda_progcache.store.tiers.upkeep import sync

    if pack and (lock_file is None or not is_url(target)):
        raise click.UsageError("--pack needs --lock and the URL of a tier as DST")
    only = None if lock_file is None else locked(lock_file)
    with progress("copying") as told:
        report = sync(
            source,
            target,
            digests=None if only is None else only.keys,
            pack=only.digest if only is not None and pack else None,
            dry_run=dry_run,
            on_progress=told,
        )
    names = {"source": _shown(source), "target": _shown(target)}
    if session.json:
        output.emit({**names, "dry_run": dry_run, **report._asdict()})
    else:
        verb = "would be copied" if dry_run else "copied"
        output.line(
            f"{output.plural(report.copied, 'program')} {verb} ({output.size(report.bytes)}), {report.there:,} already "
            f"there, {output.plural(report.manifests, 'header manifest')}"
        )
        if report.packed:
            output.line(f"{output.plural(report.packed, 'program')} in the lockfile's pack")
        for many, why in (
            (report.missing, f"not in {names['source']}"),
            (report.unusable, "left out: damaged or without a trusted signature"),
            (report.refused, f"too large for {names['target']}"),
        ):
            if many:
                output.fail_line(f"{output.plural(many, 'program')} {why}")
    if report.missing or report.unusable:
        click.get_current_context().exit(1)


GC_JSON = """
--json: {"tier", "dry_run": bool, "removed": int, "bytes": int, "kept": int, "pinned": int (old, but in a lockfile),
"undated": int (of unknown age), "manifests": int, "packs": int}; needs --yes or --dry-run, since it can't ask
"""


@click.command("gc", short_help="Remove old programs from a tier.", epilog=GC_JSON)
@click.argument("tier", metavar="TIER")
@click.option(
    "--older-than",
    required=True,
    callback=parse_time,
    metavar="TIME",
    help="Remove programs written longer ago than this (on Redis: last used), such as 12h or 90d.",
)
@click.option(
    "--keep-lock",
    "locks",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keep the programs and the pack of this lockfile, and all header manifests; repeatable.",
)
@click.option("--dry-run", is_flag=True, help="Remove nothing; show what would be removed.")
@click.option("-y", "--yes", is_flag=True, help="Don't ask for confirmation.")
@common_options
@click.pass_obj
def gc_command(
    session: Session, *, tier: str, older_than: float, locks: tuple[Path, ...], dry_run: bool, yes: bool
) -> None:
    """Remove old programs, header manifests and packs from a tier. TIER is its URL.

    The command shows what it would remove and asks for confirmation, unless --yes is given. The tier is listed; no
    object is read.
    """
    from cuda_progcache.store.tiers.upkeep import collect

    if session.json and not (yes or dry_run):
        raise click.UsageError("gc --json needs --yes or --dry-run, since it can't ask")
    kept = [locked(lock) for lock in locks]
    keep, packs = {key for one in kept for key in one.keys}, {one.digest for one in kept}
    found = collect(tier, older_than=older_than, keep=keep, keep_packs=packs)
    name = _shown(tier)
    if not session.json:
        manifests = output.plural(found.manifests, "header manifest")
        output.line(
            f"{name}: {output.plural(found.removed, 'program')} ({output.size(found.bytes)}), {manifests} and "
            f"{output.plural(found.packs, 'pack')} are older than {output.age(older_than)}; {found.kept:,} stay"
        )
        if found.pinned:
            output.line(f"{output.plural(found.pinned, 'program')} as old, kept because of a lockfile")
        if found.undated:
            output.note_line(f"{name} doesn't report the age of {output.plural(found.undated, 'program')}: kept")
    todo = found.removed + found.manifests + found.packs
    if todo and not dry_run:
        if not yes:
            output.confirm("Remove them?")
        with progress("removing") as told:
            found = collect(
                tier,
                older_than=older_than,
                keep=keep,
                keep_packs=packs,
                dry_run=False,
                on_progress=lambda done, total: told(done, total, 0),
            )
        if not session.json:
            output.line(f"removed {output.plural(found.removed, 'program')} ({output.size(found.bytes)})")
    if session.json:
        output.emit({"tier": name, "dry_run": dry_run, **found._asdict()})


def locked(path: Path) -> Lock:
    """Read a lockfile; raise LockError if it lacks a program's key, since sync would skip and gc remove the program."""
    from cuda_progcache.service.lock import Lock

    lock = Lock.read(path)
    unknown = [one for one in lock.programs if not one.key]
    if unknown:
        raise LockError(
            f"{path}: {output.plural(len(unknown), 'program')} of {len(lock.programs):,} weren't compiled when it was "
            "written, so their keys aren't known: prewarm, then write it again (cuda-progcache lock)"
        )
    return lock


def _shown(place: str) -> str:
    from cuda_progcache.store.tiers.sides import is_url, settings_of

    return settings_of(place).url if is_url(place) else place

# SPDX-License-Identifier: Apache-2.0
"""``stats`` and ``clear``: commands on the cache as a whole."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.session import Session, common_options
from cuda_progcache.errors import StoreError
from cuda_progcache.store.census import Census
from cuda_progcache.store.stats import Totals

if TYPE_CHECKING:
    from cuda_progcache.store.file_stream import FileStreamProgramCache

STATS_JSON = """
--json: {"root": str, "entries": int, "bytes": int, "compile_seconds": float (compile time of all entries),
"by_target": {target: count}, "by_arch": {arch: count}, "pinned": int, "all_time": {"hits", "misses", "corrupt",
"evicted", "dropped", "refused", "read_errors", "stored", "unkeyed"} (totals of all processes on this cache),
"unkept": {kind of reason: number of programs compiled but not kept; list --unkept lists them}, "templates":
{"directory": str or null (off), "file_count", "total_bytes", "refused": str or null} (the compiled kernel templates)}
"""


@click.command("stats", short_help="Show the size, hit rate and compile time of the cache.", epilog=STATS_JSON)
@common_options
@click.pass_obj
def stats_command(session: Session) -> None:
    """Show the number of programs in the cache, their size, their total compile time, and the hit rate."""
    from cuda_progcache.compile.unkept import by_kind, listed

    cache = session.existing_cache(looking=True)
    held = cache.census() if cache is not None else Census(0, 0, 0.0, Counter(), Counter())
    counted = cache.all_time() if cache is not None else Totals()
    unkept = {} if cache is None else by_kind(listed(cache))
    pinned = 0 if cache is None else len(cache.pins())
    templates = _compiled_templates()
    if session.json:
        output.emit(
            {
                "root": session.root(),
                "entries": held.entries,
                "bytes": held.bytes,
                "compile_seconds": held.seconds,
                "by_target": dict(held.targets.most_common()),
                "by_arch": dict(held.archs.most_common()),
                "pinned": pinned,
                "all_time": counted._asdict(),
                "unkept": unkept,
                "templates": templates,
            }
        )
        return
    lines = [
        ("cache", str(session.root())),
        ("entries", f"{held.entries:,}"),
        ("size", output.size(held.bytes)),
    ]
    if held.entries:
        lines.append(("compile time", f"{output.seconds(held.seconds)} in all"))
        lines.append(("targets", _numbered(held.targets.most_common())))
        lines.append(("archs", _numbered(sorted(held.archs.items()))))
    if pinned:
        lines.append(("pinned", f"{pinned:,}"))
    lookups = counted.hits + counted.misses
    if lookups:
        hits = f"{output.plural(counted.hits, 'hit')} ({counted.hits / lookups:.1%})"
        lines.append(("lookups", f"{lookups:,}, {hits}, all time"))
    others = [(getattr(counted, name), name.replace("_", " ")) for name in counted._fields[2:]]
    if any(count for count, _ in others):
        lines.append(("programs", ", ".join(f"{count:,} {name}" for count, name in others if count) + ", all time"))
    if unkept:
        kinds = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in unkept.items())
        lines.append(("not kept", f"{kinds} ({session.command('list')} --unkept says why)"))
    if templates["refused"]:
        lines.append(("templates", f"not kept: {templates['refused']}"))
    elif templates["file_count"]:
        kept = f"{templates['file_count']:,} compiled, {output.size(templates['total_bytes'])}"
        lines.append(("templates", f"{kept} in {templates['directory']}"))
    for name, value in lines:
        output.line(f"{name:<14}{value}")


def _numbered(counts: Iterable[tuple[str, int]]) -> str:
    """Format the counts; entries without a record have neither target nor arch."""
    return ", ".join(f"{count:,} {'without a record' if name == 'unknown' else name}" for name, count in counts)


def _compiled_templates() -> dict[str, Any]:
    """Count the compiled kernel templates, without creating their directory."""
    from cuda_progcache.templates.bytecode_cache import BytecodeCache, default_directory

    directory = default_directory()
    found: dict[str, Any] = {"directory": directory, "file_count": 0, "total_bytes": 0, "refused": None}
    if directory is not None and os.path.exists(directory):
        try:
            found |= BytecodeCache(directory).stats()
        except StoreError as error:
            found["refused"] = f"{error.strerror}: {directory}"
    return found


CLEAR_JSON = """
--json: {"root": str, "removed": int, "bytes": int}; needs --yes, since it can't ask
"""


@click.command("clear", short_help="Remove every entry.", epilog=CLEAR_JSON)
@click.option("-y", "--yes", is_flag=True, help="Don't ask for confirmation.")
@click.option("--keep-pinned", is_flag=True, help="Keep pinned entries.")
@common_options
@click.pass_obj
def clear_command(session: Session, *, yes: bool, keep_pinned: bool) -> None:
    """Remove every entry, including pinned ones unless --keep-pinned is given. Ask first, unless --yes is given."""
    if session.json and not yes:
        raise click.UsageError("clear --json needs --yes, since it can't ask")
    cache = session.existing_cache()
    removed = total = 0
    if cache is not None:
        held = cache.stats()  # from directory listings alone; no record is read
        pinned, pinned_size = _pinned(cache)
        removed, total = held.entries, held.bytes
        if keep_pinned:
            removed, total, pinned = removed - pinned, total - pinned_size, 0
        if removed and not yes:
            among = f", {pinned:,} of them pinned," if pinned else ""
            output.confirm(
                f"Remove {output.plural(removed, 'entry')} ({output.size(total)}){among} from {session.root()}?"
            )
        cache.clear(pinned=not keep_pinned)
    if session.json:
        output.emit({"root": session.root(), "removed": removed, "bytes": total})
    else:
        click.echo(f"removed {output.plural(removed, 'entry')} ({output.size(total)}) from {session.root()}")


def _pinned(cache: FileStreamProgramCache) -> tuple[int, int]:
    """Return the number of pinned entries and their total size in bytes."""
    sizes = []
    for digest in cache.pins():
        with contextlib.suppress(KeyError):  # pinned, but not in the cache
            sizes.append(cache.info(digest).size)
    return len(sizes), sum(sizes)

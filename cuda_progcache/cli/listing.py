# SPDX-License-Identifier: Apache-2.0
"""``list``: list the programs in the cache."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.completion import archs, names
from cuda_progcache.cli.entries import entry_json, iso, note_nothing
from cuda_progcache.cli.session import Session, common_options
from cuda_progcache.service.described import all_described, described
from cuda_progcache.service.selection import Selection, fits

if TYPE_CHECKING:
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache

_SORTS: dict[str, Callable[[EntryInfo], Any]] = {
    "used": lambda entry: -entry.last_used,
    "created": lambda entry: -entry.created,
    "age": lambda entry: -entry.created,
    "cost": lambda entry: -entry.about.seconds,
    "size": lambda entry: -entry.size,
    "name": lambda entry: ((about := entry.about).title, about.variant, about.arch),
}
#: Sort orders whose first few entries the store finds without reading every record.
_FIRST = {"used": "used", "age": "created", "created": "created", "size": "size"}
_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}


class _Filter(NamedTuple):
    kernel: Selection | None
    arch: str | None
    target: str | None
    since: float | None

    def includes(self, entry: EntryInfo) -> bool:
        about = entry.about
        if self.since is not None and entry.created < self.since:
            return False
        if self.arch is not None and about.arch != self.arch:
            return False
        if self.target is not None and about.target_type != self.target:
            return False
        return self.kernel is None or self.kernel.includes(about)


def parse_since(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Parse ``90min``, ``12h``, ``2026-01-31`` or ``2026-01-31T12:00`` (local, unless it has a time zone) as a time."""
    if value is None:
        return None
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d|w)", value.strip().lower())
    if ago is not None:
        return time.time() - float(ago[1]) * _UNITS[ago[2]]
    try:
        return datetime.fromisoformat(value.strip()).timestamp()
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is neither an age (90min, 12h, 3d) nor a time (2026-01-31T12:00)"
        ) from None


def _selection(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Selection | None:
    try:
        return None if value is None else Selection.parse(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


LIST_JSON = """
--json: {"root": str, "entries": [{"digest", "name", "kernel" (null for a program that isn't a library kernel),
"parameters", "names" (name expressions), "options", "variant" (a summary in one line), "code_type", "target_type",
"arch", "size" (bytes), "seconds" (compile time), "created", "last_used" (ISO 8601, UTC), "made_by" ({"at", "host",
"pid", "command"}; null if unknown), "path"}]}; compare accepts this output

With --unkept: {"root": str, "unkept": [{"digest" (the one it would have), "name", "code_type", "target_type",
"arch", "kind", "reason", "when", "advice"}]}
"""


@click.command("list", short_help="List the programs in the cache.", epilog=LIST_JSON)
@click.option(
    "--kernel",
    metavar="NAME",
    shell_complete=names,
    callback=_selection,
    help="Only programs of this name (may contain * and ?), or 'kernel?param=value,param=value@arch'.",
)
@click.option(
    "--arch", metavar="ARCH", shell_complete=archs, help="Only programs for this architecture, such as sm_90."
)
@click.option("--target", type=click.Choice(["cubin", "ptx", "ltoir"]), help="Only binaries of this type.")
@click.option(
    "--since",
    metavar="TIME",
    callback=parse_since,
    help="Only programs compiled since a time, such as 90min (ago), 12h or 2026-01-31T12:00.",
)
@click.option("--sort", type=click.Choice(list(_SORTS)), default="used", show_default=True, help="The sort order.")
@click.option("--reverse", is_flag=True, help="Reverse the order.")
@click.option("-q", "--quiet", is_flag=True, help="Print only the digests, for scripts.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Show at most N programs.")
@click.option("--unkept", is_flag=True, help="List programs that were compiled but not kept, and why.")
@common_options
@click.pass_obj
def list_command(
    session: Session,
    kernel: Selection | None,
    arch: str | None,
    target: str | None,
    since: float | None,
    *,
    sort: str,
    reverse: bool,
    quiet: bool,
    limit: int | None,
    unkept: bool,
) -> None:
    """List the programs in the cache, most recently used first, with their sizes and compile times."""
    from cuda_progcache.compile.history import Makers

    cache = session.existing_cache(looking=True)
    wanted = _Filter(kernel, arch, target, since)
    if unkept:
        _list_unkept(session, cache, wanted, limit)
        return
    shown = [] if cache is None else _chosen(cache, wanted, sort=sort, reverse=reverse, limit=limit)
    if session.json:
        makers = Makers(cache)
        entries = [entry_json(entry, makers.of(entry)) for entry in shown]
        output.emit({"root": session.root(), "entries": entries})
        return
    if quiet:
        output.write("".join(f"{entry.digest}\n" for entry in shown))
        return
    if not shown:
        note_nothing(session, cache, None if kernel is None else kernel.name)
        return
    digits = output.prefix_length(() if cache is None else cache.digests())
    now = time.time()
    rows = []
    for entry in shown:
        about = entry.about
        rows.append(
            (
                entry.digest[:digits],
                about.title,
                about.variant,
                about.target_type or "-",
                about.arch or "-",
                output.size(entry.size),
                "-" if about.duration is None else output.seconds(about.duration),
                output.age(now - entry.created),
                output.age(now - entry.last_used),
            )
        )
    columns = ("digest", "name", "variant", "target", "arch", "size", "cost", "age", "last used")
    output.show_rows(columns, rows, right=columns[5:])


def _chosen(
    cache: FileStreamProgramCache, wanted: _Filter, *, sort: str, reverse: bool, limit: int | None
) -> list[EntryInfo]:
    if limit is not None and sort in _FIRST and not reverse:
        first = cache.first(limit, by=_FIRST[sort], matches=lambda entry: wanted.includes(described(entry)))
        return [described(entry) for entry in first]
    return sorted(filter(wanted.includes, all_described(cache.entries())), key=_SORTS[sort], reverse=reverse)[:limit]


def _list_unkept(session: Session, cache: FileStreamProgramCache | None, wanted: _Filter, limit: int | None) -> None:
    from cuda_progcache.compile.unkept import listed

    kernel, arch, target, since = wanted
    shown = [
        one
        for one in (() if cache is None else listed(cache))
        if (kernel is None or fits(one.name, kernel.name))
        and arch in {None, one.arch}
        and target in {None, one.target_type}
        and (since is None or one.when >= since)
    ][:limit]
    if session.json:
        found = [{**one._asdict(), "when": iso(one.when), "advice": one.advice} for one in shown]
        output.emit({"root": session.root(), "unkept": found})
        return
    if not shown:
        if cache is None:
            return
        output.note_line("nothing to list: every program compiled with this cache was kept")
        return
    now = time.time()
    made = output.table(("name", "target", "arch", "age", "why it isn't kept"), right=("age",))
    for one in shown:
        made.add_row(
            output.text(one.name), one.target_type, one.arch, output.age(now - one.when), output.text(one.reason)
        )
    output.show(made)
    for advice in dict.fromkeys(one.advice for one in shown):
        output.line(advice)

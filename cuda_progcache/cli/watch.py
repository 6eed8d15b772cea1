# SPDX-License-Identifier: Apache-2.0
"""``watch``: show live what other processes do with the cache."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING

import click

from cuda_progcache._util import modes
from cuda_progcache.cli import output
from cuda_progcache.cli.app import Terminated
from cuda_progcache.cli.entries import entry_json, iso
from cuda_progcache.cli.maintenance import parse_time
from cuda_progcache.cli.session import Session, common_options

if TYPE_CHECKING:
    from cuda_progcache.compile.unkept import Unkept
    from cuda_progcache.service.watch import Seen, Stored, Watch
    from cuda_progcache.store.stats import Totals

WATCH_JSON = """
--json: {"at": str (ISO 8601, UTC), "event": str, ...}, one object per line

\b
Events:
  stored   the fields that list gives for an entry, and "reasons" (why it was compiled)
  unkept   the fields that list --unkept gives
  counted  the fields of "all_time" that stats gives, as increases since the last such line

Programs are shown as they are stored. Lookups are shown when a process writes its counters: every five seconds while
it uses the cache, and when it ends. A process in mode ro or frozen, or without permission to write, isn't counted.
"""


@click.command("watch", short_help="Show live what other processes do with the cache.", epilog=WATCH_JSON)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="The time between checks.",
)
@click.option(
    "--for", "duration", callback=parse_time, metavar="TIME", help="Stop after this long, such as 30s or 10min."
)
@common_options
@click.pass_obj
def watch_command(session: Session, interval: float, duration: float | None) -> None:
    """Show the programs that other processes store, why they compiled them, and their hit rate. Ctrl-C ends it."""
    if modes.current() == "off":
        raise click.UsageError(f"nothing to watch: the cache is off ({modes.VARIABLE}, --mode)")
    end = None if duration is None else time.monotonic() + duration
    if not session.root().exists():
        output.note_line(f"there is no cache at {session.root()} yet; waiting for one")
    watch: Watch | None = None
    try:
        while True:
            left = interval if end is None else end - time.monotonic()
            if watch is None:
                watch = _begin(session)
            else:
                _tell(session, watch.look(last=left <= 0))
            if left <= 0:
                return
            time.sleep(min(interval, left))
    except Terminated:
        raise
    except KeyboardInterrupt:
        return  # the usual way to end


def _begin(session: Session) -> Watch | None:
    """Start to watch the cache, if it exists."""
    from cuda_progcache.service.watch import Watch

    cache = session.existing_cache(looking=True) if session.root().exists() else None
    if cache is None:
        return None
    watch = Watch(cache)
    output.note_line(f"watching {session.root()}; Ctrl-C ends it")
    return watch


def _tell(session: Session, seen: Seen) -> None:
    for one in seen.stored:
        _tell_stored(session, one)
    for unkept in seen.unkept:
        _tell_unkept(session, unkept)
    if any(seen.counted):
        _tell_counted(session, seen.counted)
    sys.stdout.flush()


def _tell_stored(session: Session, one: Stored) -> None:
    entry, about = one.entry, one.entry.about
    if session.json:
        fields = {**entry_json(entry, one.made_by), "reasons": one.reasons}
        output.write(output.json_line({"at": iso(entry.created), "event": "stored", **fields}))
        return
    told = " ".join(filter(None, [about.title, about.variant]))
    about_it = f"{entry.digest[:12]} {told} ({about.target_type or '-'}, {about.arch or '-'})"
    if one.made_by is None:
        _line(entry.created, "stored", f"{about_it}, {output.size(entry.size)}")
        return
    in_time = "" if about.duration is None else f" in {output.seconds(about.duration)}"
    by = f" by process {one.made_by['pid']} on {one.made_by['host']}"
    _line(entry.created, "compiled", f"{about_it}{in_time}{by}: {'; '.join(one.reasons)}")


def _tell_unkept(session: Session, one: Unkept) -> None:
    if session.json:
        about = {**one._asdict(), "when": iso(one.when), "advice": one.advice}
        output.write(output.json_line({"at": iso(one.when), "event": "unkept", **about}))
        return
    _line(one.when, "not kept", f"{one.name} ({one.target_type}, {one.arch}): {one.reason}")


def _tell_counted(session: Session, counted: Totals) -> None:
    now = time.time()
    if session.json:
        output.write(output.json_line({"at": iso(now), "event": "counted", **counted._asdict()}))
        return
    lookups = counted.hits + counted.misses
    parts = []
    if lookups:
        parts.append(f"{output.plural(counted.hits, 'hit')}, {_misses(counted.misses)} ({counted.hits / lookups:.1%})")
    parts += [
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in counted._asdict().items()
        if count and name not in _LOOKUPS
    ]
    _line(now, "counted", ", ".join(parts))


_LOOKUPS = {"hits", "misses"}


def _misses(count: int) -> str:
    return "1 miss" if count == 1 else f"{count:,} misses"


def _line(moment: float, what: str, told: str) -> None:
    at = datetime.fromtimestamp(moment).astimezone().strftime("%H:%M:%S")
    output.line(f"{at}  {what:<8}  {output.one_line(told)}")

# SPDX-License-Identifier: Apache-2.0
"""``explain``: say why a program had to be compiled."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.completion import programs
from cuda_progcache.cli.entries import entry_json, find_entry
from cuda_progcache.cli.session import Session, common_options

if TYPE_CHECKING:
    from cuda_progcache.compile.unkept import Unkept
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache

EXPLAIN_JSON = """
--json: the fields that list gives for the entry, and "reasons": [one sentence per difference from the nearest earlier
compile, or "first compile of this program"]; for a program that wasn't kept, the fields that list --unkept gives, and
"reasons": [why it wasn't kept]

With CUDA_PROGCACHE_LOG=explain, a running program prints the reasons for each miss as it happens.
"""


@click.command("explain", short_help="Explain why a program had to be compiled.", epilog=EXPLAIN_JSON)
@click.argument("key", required=False, shell_complete=programs)
@click.option("--last", is_flag=True, help="Explain the program compiled last.")
@common_options
@click.pass_obj
def explain_command(session: Session, key: str | None, *, last: bool) -> None:
    """Explain why a program was compiled: how it differs from the nearest earlier compile.

    The differences are in headers, options, source or compiler. KEY is a prefix of the digest, as list prints it, or a
    name such as softmax, 'softmax?dtype=float16@sm_90' or scale.cu. If several programs match a name, the one compiled
    last is explained. For a program that was compiled but not kept, the reason is shown.
    """
    from cuda_progcache.cli.app import NoEntryError
    from cuda_progcache.compile.history import Makers, explain_entry
    from cuda_progcache.compile.unkept import listed

    if (key is None) == (not last):
        raise click.UsageError("give a digest prefix, a name, or --last")
    cache = session.existing_cache(looking=True)
    unkept = [] if cache is None else listed(cache)
    if key is None:
        entry = _last(cache)
        if unkept and (entry is None or unkept[0].when > entry.created):
            _tell_unkept(session, unkept[0])
            return
        if entry is None:
            raise NoEntryError(f"no program has been compiled into {session.root()} yet")
    else:
        fitting = [one for one in unkept if len(key) >= 4 and one.digest.startswith(key.strip().lower())]
        if len(fitting) == 1:
            _tell_unkept(session, fitting[0])
            return
        entry = find_entry(session, key, newest=True, looking=True)
    try:
        reasons = explain_entry(cache, entry.digest)
    except KeyError:
        raise NoEntryError(
            f"{entry.digest[:12]} has no record to compare: it was stored by cuda.core or by hand"
        ) from None
    who = Makers(cache).of(entry)
    if session.json:
        output.emit({**entry_json(entry, who), "reasons": reasons})
        return
    about = entry.about
    told = " ".join(filter(None, [about.title, about.variant]))
    program = output.one_line(f"{told} ({about.target_type or '-'}, {about.arch or '-'})")
    took = "" if about.duration is None else f" in {output.seconds(about.duration)}"
    output.line(f"{entry.digest[:12]} {program} was compiled{took}:")
    for reason in reasons:
        output.line(f"  {output.one_line(reason)}")
    if who:
        output.line(f"compiled by {output.made_by(who)}")


def _last(cache: FileStreamProgramCache | None) -> EntryInfo | None:
    """Return the program compiled last; prefer programs that aren't dated in the future by a wrong clock."""
    from cuda_progcache.compile.history import is_compiled

    now = time.time() + 1
    for matches in (lambda entry: is_compiled(entry) and entry.created <= now, is_compiled):
        found = [] if cache is None else cache.first(1, by="created", matches=matches)
        if found:
            return found[0]
    return None


def _tell_unkept(session: Session, one: Unkept) -> None:
    """Print why a program wasn't kept."""
    if session.json:
        output.emit({**one._asdict(), "reasons": [one.reason], "advice": one.advice})
        return
    output.line(f"{one.digest[:12]} {one.name} ({one.target_type}, {one.arch}) was compiled but not kept:")
    output.line(f"  {one.reason}")
    output.line(f"  {one.advice}")

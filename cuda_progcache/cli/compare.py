# SPDX-License-Identifier: Apache-2.0
"""``compare``: the differences between two caches, their causes, their cost, and who compiled the new programs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.entries import iso
from cuda_progcache.cli.session import Session, common_options

if TYPE_CHECKING:
    from cuda_progcache.service.two_caches import Held

COMPARE_JSON = """
--json: {"old": str, "new": str, "same": int, "seconds": float (compile time of what NEW has and OLD lacks), "causes":
[{"reason", "count", "seconds"}], "made_by": [{"host", "command", "count", "seconds"}], "changed": [{program,
"old_digest", "reasons"}], "added": [program], "gone": [program]}; each program has "digest", "name", "variant",
"target_type", "arch", "seconds", "made_by"

Exit code 1: the caches differ.
"""


@click.command("compare", short_help="Show what differs between two caches, and why.", epilog=COMPARE_JSON)
@click.argument("old", type=click.Path(exists=True, path_type=Path))
@click.argument("new", required=False, type=click.Path(exists=True, path_type=Path))
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    metavar="N",
    help="Show at most N changed, N added and N removed programs.",
)
@common_options
@click.pass_obj
def compare_command(session: Session, old: Path, new: Path | None, limit: int) -> int:
    """Compare two caches. Each is a cache directory, a bundle, or a file with the output of list --json.

    NEW defaults to the current cache. Programs are matched by kernel and parameters (or by name, options and name
    expressions), by code type, target and architecture. If the keys of a match differ, the reasons are shown.
    """
    from cuda_progcache.cli.app import ExitCode
    from cuda_progcache.service.two_caches import compare

    new = session.root() if new is None else new
    found = compare(old, new)
    differ = bool(found.changed or found.added or found.gone)
    if session.json:
        causes = [{"reason": text, "count": n, "seconds": took} for text, (n, took) in found.causes.items()]
        makers = [
            {"host": host, "command": command, "count": n, "seconds": took}
            for (host, command), (n, took) in found.makers.items()
        ]
        output.emit(
            {
                "old": old,
                "new": new,
                "same": found.same,
                "seconds": found.seconds,
                "causes": causes,
                "made_by": makers,
                "changed": [
                    {**_json(one.new), "old_digest": one.old_digest, "reasons": one.reasons} for one in found.changed
                ],
                "added": [_json(one) for one in found.added],
                "gone": [_json(one) for one in found.gone],
            }
        )
        return ExitCode.FAILED if differ else ExitCode.OK
    output.line(
        f"{found.same:,} the same, {len(found.changed):,} under another key, {len(found.added):,} only in "
        f"{output.one_line(str(new))}, {len(found.gone):,} only in {output.one_line(str(old))}"
    )
    for text, (count, took) in found.causes.items():
        output.line(f"{count:,} changed ({output.seconds(took)} of compile time): {output.one_line(text)}")
    for (host, command), (count, took) in found.makers.items():
        asked = output.one_line(f"{command} on {host}")
        output.line(f"{output.plural(count, 'program')} ({output.seconds(took)}) compiled by {asked}")
    if differ and limit:
        _show(found.changed, found.added, found.gone, limit)
    return ExitCode.FAILED if differ else ExitCode.OK


def _show(changed: Any, added: Any, gone: Any, limit: int) -> None:
    made = output.table(("", "digest", "name", "variant", "target", "arch", "cost"), right=("cost",))
    kinds = (("~", [one.new for one in changed]), ("+", added), ("-", gone))
    for sign, held in kinds:
        for one in held[:limit]:
            cells = (one.name, one.variant, one.target_type, one.arch)
            texts = [output.text(output.one_line(cell)) for cell in cells]
            made.add_row(sign, one.digest[:12], *texts, output.seconds(one.seconds))
        if len(held) > limit:
            made.add_row(sign, f"{len(held) - limit:,} more")
    output.show(made)


def _json(one: Held) -> dict[str, Any]:
    found = {name: value for name, value in one._asdict().items() if name != "about"}
    if one.made_by is not None and isinstance(one.made_by["at"], float):
        found["made_by"] = {**one.made_by, "at": iso(one.made_by["at"])}
    return found

# SPDX-License-Identifier: Apache-2.0
"""``diff --lock``: the changes between two lockfiles, for a terminal, a script or a pull request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.inspection import diff_json, spills_text

if TYPE_CHECKING:
    from cuda_progcache.cli.session import Session
    from cuda_progcache.inspect import KernelDiff
    from cuda_progcache.service.lock_diff import Change

#: The limit on machine code in a pull request's comment, in characters; GitHub accepts 65,536 in all.
_LONGEST = 40_000
_HEADINGS = {
    "code": "machine code changed",
    "bytes": "the file changed, but not its machine code",
    "key": "only the key changed; the binary is equal",
    "added": "added",
    "removed": "removed",
    "unknown": "changed; a binary isn't in the cache",
}


def tell(session: Session, before: Path, after: Path, *, markdown: Path | None, stat: bool, context: int) -> bool:
    """Print what differs between two lockfiles, and optionally write it as Markdown.

    Return whether machine code changed or may have changed, or programs were added or removed.
    """
    from cuda_progcache.service.lock import Lock
    from cuda_progcache.service.lock_diff import compare_locks

    changes = compare_locks(Lock.read(before), Lock.read(after), session.existing_cache(looking=True), context)
    if markdown is not None:
        markdown.write_text(as_markdown(changes), encoding="utf-8")
    if session.json:
        output.emit({"programs": [_change_json(change) for change in changes]})
    else:
        _print(session, changes, {"before": before, "after": after}, stat=stat)
    return any(change.status in {"code", "unknown", "added", "removed"} for change in changes)


def _change_json(change: Change) -> dict[str, Any]:
    return {
        "program": change.title,
        "status": change.status,
        "before": None if change.before is None else change.before.digest,
        "after": None if change.after is None else change.after.digest,
        "diff": None if change.diff is None else diff_json(change.diff),
    }


def _print(session: Session, changes: Sequence[Change], files: dict[str, Path], *, stat: bool) -> None:
    for status, heading in _HEADINGS.items():
        chosen = [change for change in changes if change.status == status]
        if chosen:
            output.line(click.style(f"{heading} ({len(chosen)})", bold=True))
        for change in chosen:
            output.line(f"  {output.printable(change.title)}")
            for line in _facts(change):
                output.line(f"    {output.printable(line)}")
            for side in change.missing:
                advice = session.command(f"prewarm --lock {output.here(str(files[side]))}")
                output.line(f"    the binary of {files[side]} isn't in the cache: {advice}")
            if change.status == "code" and not stat:
                for line in _code(change):
                    output.line(f"    {output.printable(line)}")
    output.line(summary(changes))


def summary(changes: Sequence[Change]) -> str:
    """Summarize the changes in one line."""
    if not changes:
        return "no program changed"
    counts = Counter(change.status for change in changes)
    return ", ".join(f"{counts[status]} {_SHORT[status]}" for status in _HEADINGS if counts[status])


_SHORT = {
    "code": "with changed machine code",
    "bytes": "with a changed file but equal machine code",
    "key": "with only a changed key",
    "added": "added",
    "removed": "removed",
    "unknown": "not in the cache",
}


def _facts(change: Change) -> list[str]:
    """Return why a program changed, and how its kernels' resources changed."""
    if change.diff is None:
        return []
    facts = list(change.diff.key)
    for kernel in change.diff.binary.kernels:
        deltas = ", ".join(
            f"{name.replace('_', ' ')} {_figure(old)} → {_figure(new)}" for name, (old, new) in kernel.deltas.items()
        )
        if kernel.kind != "same":
            facts.append(f"{kernel.name}: {deltas or kernel.kind}")
    return facts


def _code(change: Change) -> list[str]:
    if change.diff is None:
        return []
    binary = change.diff.binary
    return [*(line for kernel in binary.kernels for line in kernel.lines), *binary.lines]


def _figure(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def as_markdown(changes: Sequence[Change]) -> str:
    """Format the changes as Markdown for a pull request: a table, and the machine code in collapsed sections."""
    parts = ["### Compiled kernels", "", f"{summary(changes)[:1].upper()}{summary(changes)[1:]}.", ""]
    rows = [row for change in changes for row in _rows(change)]
    if rows:
        parts += [
            "| program | kernel | registers | spills | shared | code | why |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    left = _LONGEST
    for change in changes:
        if change.status != "code":
            continue
        code = "\n".join(_code(change))
        if len(code) > left:
            parts.append(f"The machine code of {_cell(change.title)} is left out: {len(code):,} characters.\n")
            continue
        left -= len(code)
        parts += [
            f"<details><summary>{_cell(change.title)}</summary>",
            "",
            "```diff",
            code.replace("```", "'''"),
            "```",
        ]
        parts += ["", "</details>", ""]
    return "\n".join(parts).rstrip() + "\n"


def _rows(change: Change) -> list[str]:
    why = "; ".join(change.diff.key) if change.diff is not None and change.diff.key else _HEADINGS[change.status]
    kernels = [] if change.diff is None else [one for one in change.diff.binary.kernels if one.kind != "same"]
    if not kernels:
        return [f"| {_cell(change.title)} | | | | | | {_cell(why)} |"]
    return [f"| {_cell(change.title)} | {_cell(one.name)} | {_figures(one)} | {_cell(why)} |" for one in kernels]


def _figures(one: KernelDiff) -> str:
    def pair(old: object, new: object) -> str:
        return f"{new}" if old == new else f"{old} → **{new}**"

    if one.before is None or one.after is None:
        return f"{one.kind} | | | "
    old, new = one.before, one.after
    return " | ".join(
        (
            pair(old.registers, new.registers),
            pair(spills_text(old), spills_text(new)),
            pair(old.shared_bytes, new.shared_bytes),
            pair(old.code_bytes, new.code_bytes),
        )
    )


def _cell(text: str) -> str:
    """Escape text for a table cell, so that it neither ends the cell nor becomes markup."""
    safe = output.printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return safe.replace("`", "\\`").replace("*", "\\*").replace("_", "\\_").replace("\n", " ")

# SPDX-License-Identifier: Apache-2.0
"""``diff``: show what differs between two programs or two lockfiles."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.completion import programs
from cuda_progcache.cli.inspection import block_option, diff_json, limiters_text, program_at, shared_option
from cuda_progcache.cli.session import OutputFile, Session, common_options, manifest_option

if TYPE_CHECKING:
    from cuda_progcache.inspect import KernelDiff
    from cuda_progcache.service.comparison import ProgramDiff

DIFF_JSON = """
--json: {"equal": bool (the bytes), "same_code": bool, "key": [one sentence per difference in what they were compiled
from], "kernels": [{"name", "kind": "same", "changed", "added" or "removed", "deltas": {field: [before, after]},
"lines": [lines of a unified diff of the machine code]}], "lines": [lines of a unified diff of two PTX texts]}

With --lock: {"programs": [{"program", "status": "code" (the machine code differs), "bytes" (the file differs, but not
its machine code), "key" (only what it was compiled from differs), "added", "removed" or "unknown" (a binary isn't in
the cache), "before", "after" (digests, or null), "diff" (as above, or null)}]}
"""


@click.command("diff", short_help="Show what differs between two programs or two lockfiles.", epilog=DIFF_JSON)
@click.argument("before", shell_complete=programs)
@click.argument("after", shell_complete=programs)
@click.option("--lock", "locks", is_flag=True, help="BEFORE and AFTER are lockfiles.")
@click.option(
    "--markdown",
    type=OutputFile(),
    metavar="FILE",
    help="With --lock: also write Markdown for a pull request.",
)
@click.option("--stat", is_flag=True, help="Don't show the machine code.")
@click.option(
    "-U",
    "--unified",
    "context",
    type=click.IntRange(min=0),
    default=3,
    metavar="N",
    help="Show N lines of context. [default: 3]",
)
@block_option
@shared_option
@manifest_option
@common_options
@click.pass_obj
def diff_command(
    session: Session,
    before: str,
    after: str,
    *,
    locks: bool,
    markdown: Path | None,
    stat: bool,
    context: int,
    block_size: int | None,
    dynamic_shared: int,
    manifest: Path | None,
) -> None:
    """Compare two programs: what they were compiled from, the resources they use, and their machine code.

    BEFORE and AFTER are files, digests or names as for show, or library kernels such as 'softmax?dtype=float16@sm_90'.
    Machine code is compared kernel by kernel and without addresses, so code that only moved is equal. Comparing cubins
    needs nvdisasm. Exit code 1: the programs differ.

    With --lock, compare two lockfiles by the binaries in the cache, where prewarm --lock puts them. The result shows
    for which programs the machine code changed, and for which only the key. Exit code 1: machine code changed or can't
    be compared, or a program was added or removed.
    """
    from cuda_progcache.service.comparison import compare

    if locks:
        from cuda_progcache.cli.lock_diff import tell

        if tell(session, _lockfile(before), _lockfile(after), markdown=markdown, stat=stat, context=context):
            click.get_current_context().exit(1)
        return
    if markdown is not None:
        raise click.UsageError("--markdown needs --lock")
    old, new = (program_at(session, one, manifest) for one in (before, after))
    found = compare(old, new, context)
    if session.json:
        output.emit(diff_json(found))
    else:
        _tell(found, (old[0], new[0]), stat=stat, block_size=block_size, dynamic_shared=dynamic_shared)
    if not found.binary.equal or found.key:
        click.get_current_context().exit(1)


def _lockfile(path: str) -> Path:
    if not Path(path).is_file():
        raise click.BadParameter(f"there is no file {path}")
    return Path(path)


def _tell(
    found: ProgramDiff, binaries: tuple[bytes, bytes], *, stat: bool, block_size: int | None, dynamic_shared: int
) -> None:
    for reason in found.key:
        output.line(output.printable(reason))
    if found.binary.equal:
        output.line("the binaries are equal")
        return
    if found.binary.same_code:
        output.line("the machine code is equal; only other parts of the files differ")
        return
    for one in found.binary.kernels:
        output.line(click.style(f"{output.printable(one.name)}: {one.kind}{_counts(one)}", bold=one.kind != "same"))
        for field, (old, new) in one.deltas.items():
            output.line(f"  {field.replace('_', ' ')} {_figure(old)} → {_figure(new)}{_change(old, new)}")
        for line in _occupancies(one, binaries, block_size, dynamic_shared):
            output.line(f"  {line}")
        if not stat:
            _print_diff(one.lines)
    if not found.binary.kernels and not found.binary.lines:
        output.line("the bytes differ; only cubins and PTX can be compared further")
    if not stat:
        _print_diff(found.binary.lines)


def _counts(one: KernelDiff) -> str:
    gone, new = (sum(line.startswith(sign) for line in one.lines[2:]) for sign in "-+")
    return f" (instructions -{gone} +{new})" if one.lines else ""


def _figure(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _change(old: int | None, new: int | None) -> str:
    return "" if old is None or new is None else f" ({new - old:+,})"


def _occupancies(
    one: KernelDiff, binaries: tuple[bytes, bytes], block_size: int | None, dynamic_shared: int
) -> list[str]:
    """Return a line on how a kernel's occupancy changed; an empty list if it didn't."""
    from cuda_progcache.errors import InspectError
    from cuda_progcache.inspect import Cubin, occupancy

    if one.before is None or one.after is None or not one.deltas:
        return []
    threads = block_size or one.after.max_threads or one.before.max_threads or 256
    try:
        old, new = (
            occupancy(used, Cubin(data).arch, threads, dynamic_shared)
            for used, data in zip((one.before, one.after), binaries, strict=True)
        )
    except InspectError:
        return []
    if old.warps == new.warps:
        return []
    return [
        f"occupancy {old.ratio:.0%} → {new.ratio:.0%} (blocks of {threads} threads; {limiters_text(new)} limits it)"
    ]


def _print_diff(lines: Iterable[str]) -> None:
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in lines:
        output.line(click.style(output.printable(line), fg=colours.get(line[:1])))

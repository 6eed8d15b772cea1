# SPDX-License-Identifier: Apache-2.0
"""Output of the commands: one JSON object, or lines and tables with units, coloured only on a terminal.

``rich`` is imported only when a table is made.
"""

from __future__ import annotations

import functools
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache._util.amounts import plural as plural  # noqa: PLC0414 - commands import these from here
from cuda_progcache._util.amounts import seconds as seconds  # noqa: PLC0414
from cuda_progcache._util.amounts import size as size  # noqa: PLC0414
from cuda_progcache._util.json_values import json_value
from cuda_progcache._util.own_stack import on_own_stack
from cuda_progcache._util.printable import one_line as one_line  # noqa: PLC0414
from cuda_progcache._util.printable import printable as printable  # noqa: PLC0414

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text

_NAME = click.style("cuda-progcache: ", bold=True)
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
_WIDE = 10_000  # columns without a terminal: nothing is cut or folded in a pipe


def confirm(question: str) -> None:
    """Ask a question on the terminal, and return if the answer is yes.

    Raises
    ------
    click.Abort
        The answer is no, or the user pressed Ctrl-C.
    click.UsageError
        The input ended before an answer, as it does under cron.
    """
    try:
        click.confirm(question, abort=True)
    except click.Abort as answer:
        if isinstance(answer.__context__, EOFError):
            click.echo(err=True)  # end the question's line
            raise click.UsageError("can't ask, the input has ended; give --yes", click.get_current_context()) from None
        raise


def emit(data: Mapping[str, Any]) -> None:
    """Print the JSON object of a ``--json`` call."""
    write(json_text(data) + "\n")


def json_line(data: Mapping[str, Any]) -> str:
    """Return an object as one line of JSON, for output with one object per line."""
    return json.dumps(json.loads(json_text(data))) + "\n"


def json_text(data: Mapping[str, Any]) -> str:
    """Return the text that ``--json`` prints: indented, unless a record in it is nested too deeply."""
    try:
        return json.dumps(data, indent=2, default=_plain, allow_nan=False)
    except RecursionError:
        return on_own_stack(functools.partial(json.dumps, default=_plain, allow_nan=False), data)
    except ValueError:
        return json.dumps(json_value(data), indent=2, default=_plain)


def write(text_or_bytes: str | bytes) -> None:
    """Write everything to stdout, or raise.

    With ``PYTHONUNBUFFERED``, Python's stdout writes what one system call accepts and silently drops the rest.
    """
    data = text_or_bytes.encode("utf-8", "replace") if isinstance(text_or_bytes, str) else text_or_bytes
    sys.stdout.flush()
    stream, rest = sys.stdout.buffer, memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]
    stream.flush()


def _plain(value: object) -> object:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (tuple, set, frozenset)):
        return list(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def show(*renderables: RenderableType) -> None:
    """Print tables and texts on stdout: coloured on a terminal (unless NO_COLOR is set), plain and uncut in a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        console.print(*(_fitted(one, console) for one in renderables), sep="\n")
        return
    write(printable(plain(*renderables)))  # not printed by rich, which exits by itself if the pipe is closed


def _fitted(renderable: RenderableType, console: Console) -> RenderableType:
    """Return a renderable that fits the terminal without cutting words; a table too wide becomes a list of fields."""
    from rich.table import Table

    if not isinstance(renderable, Table) or not renderable.show_header or _fits(renderable, console):
        return renderable
    rows = list(zip(*(column.cells for column in renderable.columns), strict=True))
    for column in renderable.columns:
        heading = str(column.header)
        words = [heading.split(), *([f"{cell}"] if column.no_wrap else f"{cell}".split() for cell in column.cells)]
        column.min_width = max((_width(word) for each in words for word in each), default=0)
        if column.no_wrap:
            column.header = "\n".join(heading.split())
    renderable.box, renderable.padding, renderable.pad_edge = None, (0, 1, 0, 0), False
    if _fits(renderable, console, least=True):
        return renderable
    made = fields()
    for n, row in enumerate(rows):
        if n:
            made.add_row("", "")
        for column, cell in zip(renderable.columns, row, strict=True):
            if f"{cell}":
                made.add_row(" ".join(str(column.header).split()), cell)
    return made


def _fits(made: Table, console: Console, *, least: bool = False) -> bool:
    """Return whether a table fits the terminal, with one line per row or, with ``least``, at its minimum width."""
    found = console.measure(made, options=console.options.update(max_width=_WIDE))
    return (found.minimum if least else found.maximum) <= console.width


def plain(*renderables: RenderableType) -> str:
    """Return tables and texts as they are printed to a pipe: without colours, padding or cuts."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=_WIDE, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(*renderables, sep="\n")
    return "".join(f"{row.rstrip()}\n" for row in captured.get().splitlines())


def table(columns: Sequence[str], *, right: Iterable[str] = (), title: str | None = None) -> Table:
    """Return an empty table.

    Parameters
    ----------
    columns : sequence of str
        The headings.
    right : iterable of str
        The headings of right-aligned columns (numbers).
    title : str, optional
        A line above the table.
    """
    from rich import box

    plain = not sys.stdout.isatty()
    made = _table_class()(
        title=title,
        title_justify="left",
        title_style="bold",
        box=None if plain else box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=not plain,
        padding=(0, 2, 0, 0) if plain else (0, 1),
    )
    numbers = set(right)
    for column in columns:
        made.add_column(
            column, justify="right" if column in numbers else "left", no_wrap=column in numbers or column == "digest"
        )
    return made


@functools.cache
def _table_class() -> type[Table]:
    from rich.table import Table

    class PlainTable(Table):
        """A table that prints its cells literally: brackets aren't markup, and control characters are escaped."""

        def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
            super().add_row(*(text(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    return PlainTable


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """Print a table of any length, one line per row.

    In a pipe, a thousand rows take a few milliseconds; ``rich`` takes 2 s.

    Parameters
    ----------
    columns : sequence of str
        The headings.
    rows : sequence of sequence of str
        The cells of each row, as many as there are columns.
    right : iterable of str
        The headings of right-aligned columns (numbers).
    """
    if sys.stdout.isatty():
        made = table(columns, right=right)
        for row in rows:
            made.add_row(*map(text, row))
        show(made)
        return
    numbers = set(right)
    cells = [[*columns], *([one_line(cell) for cell in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = []
        for column, cell, width in zip(columns, row, widths, strict=True):
            space = " " * (width - _width(cell))
            padded.append(space + cell if column in numbers else cell + space)
        lines.append("  ".join(padded).rstrip())
    write("".join(f"{line}\n" for line in lines))


def _width(cell: str) -> int:
    """Return the width of a text in terminal columns."""
    if cell.isascii():
        return len(cell)
    from rich.cells import cell_len

    return cell_len(cell)


def fields() -> Table:
    """Return an empty two-column table of names and values, without lines."""
    made = _table_class().grid(padding=(0, 2, 0, 0))
    made.add_column(style="cyan", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def text(value: str, style: str = "") -> Text:
    """Return a text that is printed literally: brackets aren't markup, and control characters are escaped."""
    from rich.text import Text

    return Text(printable(value), style=style)


def made_by(who: Mapping[str, Any]) -> str:
    """Format who compiled a program: process, host, time and command line."""
    from datetime import datetime

    when = datetime.fromtimestamp(who["at"]).astimezone().isoformat(" ", "seconds")
    return one_line(f"process {who['pid']} on {who['host']}, {when}: {who['command']}")


def escape(value: str) -> str:
    """Escape text for use in rich markup."""
    from rich.markup import escape

    return escape(value)


def line(message: str, *, err: bool = False) -> None:
    """Print a line with control characters escaped; colours are kept on a terminal unless NO_COLOR is set."""
    # Every second part is a colour code.
    safe = "".join(part if n % 2 else printable(part) for n, part in enumerate(_COLOUR.split(message)))
    click.echo(safe, err=err, color=False if os.environ.get("NO_COLOR") else None)


def fail_line(message: str) -> None:
    """Print on stderr why the command failed."""
    line(_NAME + click.style("error: ", fg="red", bold=True) + message, err=True)


def warning_line(message: str) -> None:
    """Print a warning on stderr that the user should act on."""
    line(_NAME + click.style("warning: ", fg="yellow") + message, err=True)


def note_line(message: str) -> None:
    """Print a note on stderr."""
    line(_NAME + message, err=True)


def own_command() -> str:
    """Return ``cuda-progcache`` as it can be typed: its name if it is on PATH, otherwise the way it was called."""
    import shutil

    if shutil.which("cuda-progcache"):
        return "cuda-progcache"
    called = sys.argv[0]
    return here(called) if os.path.basename(called) == "cuda-progcache" else "python -m cuda_progcache"


def here(path: str) -> str:
    """Return a path relative to the working directory if it is inside it, otherwise unchanged."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def age(value: float) -> str:
    """Format an age in seconds: ``now``, ``40 s``, ``3 min``, ``5 h``, ``12 d``."""
    if value < 1:
        return "now"
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if value < limit:
            return f"{value / length:.0f} {unit}"
    return f"{value / 86400:.0f} d"


def ago(value: float) -> str:
    """Format an age in seconds as a time in the past: ``just now``, ``3 min ago``."""
    return "just now" if value < 1 else f"{age(value)} ago"


def prefix_length(digests: Iterable[str]) -> int:
    """Return the number of leading digits that makes these digests unique, at least 8."""
    shared = (len(os.path.commonprefix(pair)) for pair in pairwise(sorted(digests)))  # noqa: RUF071 - of strings
    return min(max(8, 1 + max(shared, default=0)), 64)

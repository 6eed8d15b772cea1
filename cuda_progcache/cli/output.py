# SPDX-License-Identifier: Apache-2.0
"""How commands speak: one JSON object, or lines and tables for people; units; colours only on a terminal.

``rich`` is imported when a table is made.
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

from cuda_progcache._util.amounts import plural as plural  # noqa: PLC0414 - the commands take them from here
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
_WIDE = 10_000  # columns where no terminal limits them: nothing is cut or folded in a pipe


def confirm(question: str) -> None:
    """Ask a question on the terminal, and go on if the answer is yes.

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
            click.echo(err=True)  # ends the question's line
            raise click.UsageError("there is no one to ask; give --yes", click.get_current_context()) from None
        raise


def emit(data: Mapping[str, Any]) -> None:
    """Print the one JSON object of a ``--json`` call."""
    write(json_text(data) + "\n")


def json_line(data: Mapping[str, Any]) -> str:
    """Write an object as one line, of several."""
    return json.dumps(json.loads(json_text(data))) + "\n"


def json_text(data: Mapping[str, Any]) -> str:
    """What ``--json`` prints: in lines, unless a record that is printed nests too deeply for that."""
    try:
        return json.dumps(data, indent=2, default=_plain, allow_nan=False)
    except RecursionError:
        return on_own_stack(functools.partial(json.dumps, default=_plain, allow_nan=False), data)
    except ValueError:
        return json.dumps(json_value(data), indent=2, default=_plain)


def write(text_or_bytes: str | bytes) -> None:
    """Write all of it to stdout, or raise.

    With ``PYTHONUNBUFFERED`` Python's stdout takes what one system call takes, and silently drops the rest.
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
    """Print tables and texts on stdout: coloured on a terminal (rich heeds NO_COLOR), plain and never cut in a pipe."""
    if sys.stdout.isatty():
        from rich.console import Console

        console = Console(highlight=False)
        console.print(*(_fitted(one, console) for one in renderables), sep="\n")
        return
    write(printable(plain(*renderables)))  # not by rich, which answers a reader that left by exiting on its own


def _fitted(renderable: RenderableType, console: Console) -> RenderableType:
    """What a terminal shows without cutting a word: a table that is too wide becomes a list, field by field."""
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
    """Whether a terminal has room for a table, on one line per row or at its least width."""
    found = console.measure(made, options=console.options.update(max_width=_WIDE))
    return (found.minimum if least else found.maximum) <= console.width


def plain(*renderables: RenderableType) -> str:
    """Give tables and texts as they are printed in a pipe: without colours, padding or cuts."""
    from rich.console import Console

    console = Console(file=io.StringIO(), width=_WIDE, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(*renderables, sep="\n")
    return "".join(f"{row.rstrip()}\n" for row in captured.get().splitlines())


def table(columns: Sequence[str], *, right: Iterable[str] = (), title: str | None = None) -> Table:
    """Make an empty table.

    Parameters
    ----------
    columns : sequence of str
        The headings.
    right : iterable of str
        The headings of right-aligned columns (numbers).
    title : str, optional
        A line above it.
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
        """A table that prints its cells as they are: brackets in them are no markup, and controls are escaped."""

        def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
            super().add_row(*(text(cell) if isinstance(cell, str) else cell for cell in cells), **options)

    return PlainTable


def show_rows(columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Iterable[str] = ()) -> None:
    """Print a table of any length, a line per row: in a pipe in a few milliseconds per thousand, which takes rich 2 s.

    Parameters
    ----------
    columns : sequence of str
        The headings.
    rows : sequence of sequence of str
        As many cells in each.
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
    """Columns of a terminal that a text takes."""
    if cell.isascii():
        return len(cell)
    from rich.cells import cell_len

    return cell_len(cell)


def fields() -> Table:
    """Make a two-column table of names and values, without lines."""
    made = _table_class().grid(padding=(0, 2, 0, 0))
    made.add_column(style="cyan", no_wrap=True)
    made.add_column(overflow="fold")
    return made


def text(value: str, style: str = "") -> Text:
    """Make a piece of text that is printed as it is: brackets in it are no markup, controls are escaped."""
    from rich.text import Text

    return Text(printable(value), style=style)


def made_by(who: Mapping[str, Any]) -> str:
    """Write who compiled something: time, process, host and command line."""
    from datetime import datetime

    when = datetime.fromtimestamp(who["at"]).astimezone().isoformat(" ", "seconds")
    return one_line(f"process {who['pid']} on {who['host']}, {when}: {who['command']}")


def escape(value: str) -> str:
    """Make text safe inside rich markup."""
    from rich.markup import escape

    return escape(value)


def line(message: str, *, err: bool = False) -> None:
    """Print a line, escaped but for its colours: these only on a terminal, and not where NO_COLOR asks for none."""
    # Every second part is a colour.
    safe = "".join(part if n % 2 else printable(part) for n, part in enumerate(_COLOUR.split(message)))
    click.echo(safe, err=err, color=False if os.environ.get("NO_COLOR") else None)


def fail_line(message: str) -> None:
    """Say on stderr why the command failed."""
    line(_NAME + click.style("error: ", fg="red", bold=True) + message, err=True)


def warning_line(message: str) -> None:
    """Say something on stderr that the user should act on."""
    line(_NAME + click.style("warning: ", fg="yellow") + message, err=True)


def note_line(message: str) -> None:
    """Say something on stderr that is good to know."""
    line(_NAME + message, err=True)


def own_command() -> str:
    """Give ``cuda-progcache`` as it can be typed here: by name where it is on PATH, else as it was called."""
    import shutil

    if shutil.which("cuda-progcache"):
        return "cuda-progcache"
    called = sys.argv[0]
    return here(called) if os.path.basename(called) == "cuda-progcache" else "python -m cuda_progcache"


def here(path: str) -> str:
    """Write a path from the working directory where it lies under it."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def age(value: float) -> str:
    """Write how long ago something was: ``now``, ``40 s``, ``3 min``, ``5 h``, ``12 d``."""
    if value < 1:
        return "now"
    for limit, unit, length in ((120, "s", 1), (7200, "min", 60), (172800, "h", 3600)):
        if value < limit:
            return f"{value / length:.0f} {unit}"
    return f"{value / 86400:.0f} d"


def ago(value: float) -> str:
    """Write when something was: ``just now``, ``3 min ago``."""
    return "just now" if value < 1 else f"{age(value)} ago"


def prefix_length(digests: Iterable[str]) -> int:
    """Give how many digits tell these digests apart, 8 at least."""
    shared = (len(os.path.commonprefix(pair)) for pair in pairwise(sorted(digests)))  # noqa: RUF071 - of texts
    return min(max(8, 1 + max(shared, default=0)), 64)

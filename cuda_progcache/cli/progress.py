# SPDX-License-Identifier: Apache-2.0
"""Progress of long operations, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cuda_progcache.cli import output

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.upkeep import Progress


@contextmanager
def progress(doing: str) -> Iterator[Progress]:
    """Show progress on stderr: a bar on a terminal, otherwise an occasional line.

    Parameters
    ----------
    doing : str
        The operation, such as "copying".

    Yields
    ------
    callable
        A function to call with the number of items done, their total number, and the size of the items done in bytes
        (0 to show no size).
    """
    if not sys.stderr.isatty():
        yield _lines(doing)
        return
    from rich import progress as bars
    from rich.console import Console

    columns: tuple[Any, ...] = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=20),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[size]}"),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True, highlight=False), transient=True) as display:
        task = display.add_task(doing, total=None, size="")

        def show(done: int, total: int, size: int) -> None:
            display.update(task, completed=done, total=total, size=output.size(size) if size else "")

        yield show


def _lines(doing: str) -> Callable[[int, int, int], None]:
    said = 0

    def show(done: int, total: int, size: int) -> None:
        nonlocal said
        if total and done and (done == total or done >= said + max(total // 10, 1000)):
            said = done
            output.line(f"{doing}: {done:,} of {total:,}{f', {output.size(size)}' if size else ''}", err=True)

    return show

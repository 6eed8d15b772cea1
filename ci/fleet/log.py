# SPDX-License-Identifier: Apache-2.0
"""The log of a simulated fleet: its events, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Happened(NamedTuple):
    """A line of the log: an event of a program in a process of a host.

    ``what`` is ``begin``, ``there`` or ``away`` (a compile begins: the tier lacks the program, has it, or doesn't
    answer), ``end`` (the host's directory has it), ``landed`` (the tier has it, or can't be written), ``got``,
    ``wrong``, or ``killed``.
    """

    what: str
    key: int
    host: int
    process: int


class Log:
    """The log, one event per line; every line is whole, even if its writer is killed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)  # forked children inherit it

    def add(self, what: str, key: int, host: int, process: int | None = None) -> None:
        """Append a line."""
        os.write(self._descriptor, f"{what} {key} {host} {process or os.getpid()}\n".encode())

    def news(self) -> Iterator[Happened]:
        """Return the lines that were added since the last call."""
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # a line across a page of the file is seen in two steps
        self._read += len(whole)
        return _lines(whole)

    def all(self) -> list[Happened]:
        """Return every line."""
        return list(_lines(self._path.read_bytes()))

    def close(self) -> None:
        """Close the file; it can still be read."""
        os.close(self._descriptor)


def _lines(text: bytes) -> Iterator[Happened]:
    for line in text.decode().splitlines():
        what, *numbers = line.split()
        yield Happened(what, *map(int, numbers))

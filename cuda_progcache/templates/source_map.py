# SPDX-License-Identifier: Apache-2.0
"""Source maps: the template line that each generated line came from."""

from __future__ import annotations

from cuda_progcache._util.fields import dataclass


@dataclass(frozen=True)
class Location:
    """A line of a template.

    Parameters
    ----------
    template : str
        The template's name, or ``"<string>"`` for a template made from a string.
    line : int
        The line's number, from 1.
    caller : Location, optional
        The location of the macro call or the ``{% include %}`` that put out the text.
    """

    template: str
    line: int
    caller: Location | None = None

    def __str__(self) -> str:
        return f"{self.template}:{self.line}"


@dataclass(frozen=True)
class SourceMap:
    """A map from the lines of a rendered text to the template lines that they came from.

    A blank line has no location. If the map can't be made, it is empty and has a reason: no location is better than a
    wrong one. A line made of several pieces has the location of its first visible character.

    Parameters
    ----------
    text : str
        The rendered text.
    lines : tuple of Location or None
        The location of each line; item 0 is for generated line 1.
    reason : str
        The reason why the map is empty, or an empty string.
    pieces : tuple of tuple of (int, Location)
        For each line, the columns (from 0) at which its pieces start, and the pieces' locations.
    """

    text: str
    lines: tuple[Location | None, ...] = ()
    reason: str = ""
    pieces: tuple[tuple[tuple[int, Location], ...], ...] = ()

    def lookup(self, line: int, column: int | None = None) -> Location | None:
        """Return the origin of generated line `line` (from 1), or None if the origin is unknown.

        With a `column`, in characters from 0, return the origin of the piece at that column.
        """
        if not 1 <= line <= len(self.lines):
            return None
        found = self.lines[line - 1]
        if column is None or not self.pieces:
            return found
        before = [place for start, place in self.pieces[line - 1] if start <= column]
        return before[-1] if before else found

    def after(self, head: str) -> SourceMap:
        """Return the map of the text with the lines of `head`, which have no origin, before it."""
        more = head.count("\n")
        pieces = ((),) * more + self.pieces if self.pieces else ()
        return SourceMap(head + self.text, (None,) * more + self.lines, self.reason, pieces)

    def __len__(self) -> int:
        return len(self.lines)

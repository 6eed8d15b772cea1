# SPDX-License-Identifier: Apache-2.0
"""Where each generated line came from."""

from __future__ import annotations

from cuda_progcache._util.fields import dataclass


@dataclass(frozen=True)
class Location:
    """A line of a template.

    Parameters
    ----------
    template : str
        The template's name, ``"<string>"`` for one made from a string.
    line : int
        From 1.
    caller : Location, optional
        Where the text was asked for, if elsewhere: the macro's call or the ``{% include %}``.
    """

    template: str
    line: int
    caller: Location | None = None

    def __str__(self) -> str:
        return f"{self.template}:{self.line}"


@dataclass(frozen=True)
class SourceMap:
    """Generated lines and the template lines that made them.

    Lines of nothing but blanks have no location, nor has any line of a map that could not be made: not known is honest,
    wrong is not. A line made of several pieces has the location of its first visible character.

    Parameters
    ----------
    text : str
        The rendered text that this is the map of.
    lines : tuple of Location or None
        Item 0 is generated line 1.
    reason : str
        Why the map is empty, if it is.
    pieces : tuple of tuple of (int, Location)
        For each line, the columns (from 0) at which its pieces begin, and where those come from.
    """

    text: str
    lines: tuple[Location | None, ...] = ()
    reason: str = ""
    pieces: tuple[tuple[tuple[int, Location], ...], ...] = ()

    def lookup(self, line: int, column: int | None = None) -> Location | None:
        """Return the origin of generated line `line`, from 1; None where it isn't known.

        With a `column`, in characters from 0, the origin of the piece that stands there.
        """
        if not 1 <= line <= len(self.lines):
            return None
        found = self.lines[line - 1]
        if column is None or not self.pieces:
            return found
        before = [place for start, place in self.pieces[line - 1] if start <= column]
        return before[-1] if before else found

    def after(self, head: str) -> SourceMap:
        """Return the map of the text with lines of no template before it."""
        more = head.count("\n")
        pieces = ((),) * more + self.pieces if self.pieces else ()
        return SourceMap(head + self.text, (None,) * more + self.lines, self.reason, pieces)

    def __len__(self) -> int:
        return len(self.lines)

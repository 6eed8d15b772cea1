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
    """

    text: str
    lines: tuple[Location | None, ...] = ()
    reason: str = ""

    def lookup(self, line: int) -> Location | None:
        """Return the origin of generated line `line`, from 1; None where it isn't known."""
        return self.lines[line - 1] if 1 <= line <= len(self.lines) else None

    def after(self, head: str) -> SourceMap:
        """Return the map of the text with lines of no template before it."""
        return SourceMap(head + self.text, (None,) * head.count("\n") + self.lines, self.reason)

    def __len__(self) -> int:
        return len(self.lines)

# SPDX-License-Identifier: Apache-2.0
"""``#line`` directives, so that the compiler, ``-lineinfo`` and with it profilers name the template's lines.

A directive stands only where the preprocessor takes one for what it is: not inside of a comment, a raw string, a
continued line, or parentheses, which may be those of a macro's call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuda_progcache.templates.source_map import Location, SourceMap

# What changes where the scan is: comments, string and character literals, parentheses. The rest of a line is text.
_TOKEN = re.compile(
    r"""//.*|/\*|(?:\b(?:u8|[uUL])?R"(?P<raw>[^()\\\s]{0,16})\()|"(?:[^"\\]|\\.)*"|(?<![0-9A-Za-z_])'(?:[^'\\]|\\.)*'|[()]"""
)

_CONDITIONAL = re.compile(r"\s*#\s*(if|ifdef|ifndef|elif|elifdef|elifndef|else|endif)\b")


def with_line_directives(found: SourceMap) -> SourceMap:
    """Return a source map whose text has ``#line`` before each line that isn't the template's next one.

    Lines whose origin isn't known count on from the one before. A map that could not be made stays as it is.

    Parameters
    ----------
    found : SourceMap
        Of C++ source.

    Returns
    -------
    SourceMap
        The directives themselves have no origin.
    """
    from cuda_progcache.templates.source_map import SourceMap

    written: list[str] = []
    places: list[Location | None] = []
    pieces: list[tuple[tuple[int, Location], ...]] = []
    expected: tuple[str, int] | None = None
    lines = found.text.split("\n")
    for index, (line, opens) in enumerate(zip(lines, _openings(lines), strict=True)):
        place = found.lookup(index + 1)
        if place is not None and opens and expected != (place.template, place.line):
            written.append(f"#line {place.line} {json.dumps(place.template, ensure_ascii=False)}")
            places.append(None)
            pieces.append(())
            expected = place.template, place.line
        written.append(line)
        places.append(place)
        pieces.append(found.pieces[index] if found.pieces else ())
        if expected is not None:
            expected = expected[0], expected[1] + 1
    if not found.lines:
        return SourceMap("\n".join(written), reason=found.reason)
    return SourceMap("\n".join(written), tuple(places), found.reason, tuple(pieces) if found.pieces else ())


def _openings(lines: list[str]) -> Iterator[bool]:
    """Tell for each line whether a directive may stand before it."""
    until: str | None = None  # what ends the comment or the raw string that is open
    depth = 0
    branches: list[int] = []  # how deep the parentheses are where each open #if stands
    continued = False
    for line in lines:
        yield until is None and depth <= 0 and not continued
        conditional = _CONDITIONAL.match(line) if until is None and not continued else None
        if conditional is not None:
            if conditional[1].startswith("if"):
                branches.append(depth)
            elif branches and conditional[1] == "endif":
                branches.pop()
            elif branches:  # each branch begins with the parentheses that were open at the #if
                depth = branches[-1]
        at = 0
        while True:
            if until is not None:
                end = line.find(until, at)
                if end < 0:
                    break
                at = end + len(until)
                until = None
            match = _TOKEN.search(line, at)
            if match is None:
                break
            at = match.end()
            piece = match[0]
            if piece == "/*":
                until = "*/"
            elif match["raw"] is not None:
                until = f'){match["raw"]}"'
            elif piece in "()":
                depth += 1 if piece == "(" else -1
        continued = line.endswith("\\")

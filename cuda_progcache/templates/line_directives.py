# SPDX-License-Identifier: Apache-2.0
"""``#line`` directives: they make the compiler, ``-lineinfo`` and profilers name the template's lines.

Directives are written only where the preprocessor recognizes them: not inside a comment, a raw string or a continued
line, and not inside parentheses, which may be those of a macro call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cuda_progcache.templates.source_map import Location, SourceMap

# The tokens that change the state of the scan: comments, string and character literals, and parentheses.
_TOKEN = re.compile(
    r"""//.*|/\*|(?:\b(?:u8|[uUL])?R"(?P<raw>[^()\\\s]{0,16})\()|"(?:[^"\\]|\\.)*"|(?<![0-9A-Za-z_])'(?:[^'\\]|\\.)*'|[()]"""
)

_CONDITIONAL = re.compile(r"\s*#\s*(if|ifdef|ifndef|elif|elifdef|elifndef|else|endif)\b")


def with_line_directives(found: SourceMap) -> SourceMap:
    """Return a source map with a ``#line`` directive before each line that doesn't follow its predecessor's origin.

    A line of unknown origin is numbered as the line after the previous one. The text of an empty map isn't changed.

    Parameters
    ----------
    found : SourceMap
        The map of a C++ source.

    Returns
    -------
    SourceMap
        The map of the text with directives; the directives themselves have no origin.
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
    """Yield, for each line, whether a directive may be written before it."""
    until: str | None = None  # the text that ends the open comment or raw string
    depth = 0
    branches: list[int] = []  # the depth of parentheses at each open #if
    continued = False
    for line in lines:
        yield until is None and depth <= 0 and not continued
        conditional = _CONDITIONAL.match(line) if until is None and not continued else None
        if conditional is not None:
            if conditional[1].startswith("if"):
                branches.append(depth)
            elif branches and conditional[1] == "endif":
                branches.pop()
            elif branches:  # each branch starts at the depth of the #if
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

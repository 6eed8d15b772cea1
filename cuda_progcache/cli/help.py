# SPDX-License-Identifier: Apache-2.0
"""The look of ``--help``: commands in groups, and lines that are folded, not cut, by the terminal's width."""

from __future__ import annotations

import re
import textwrap

import click

GROUPS: dict[str, tuple[str, ...]] = {
    "Compile": ("compile", "render", "kernels", "prewarm", "demo"),
    "What is in the cache": ("list", "show", "top", "stats", "report", "watch"),
    "Why, and from what": ("explain", "compare", "provenance", "affected"),
    "Inside a binary": ("resources", "sass", "diff"),
    "Deploy": ("lock", "check", "export", "import"),
    "Stores that machines share": ("tiers", "sync", "gc"),
    "Upkeep": ("verify", "prune", "pin", "clear"),
    "This machine": ("doctor", "config"),
}
"""The groups of commands, in the order of the help."""

# The first column of a list's line, with the spaces that end it.
_FIRST = re.compile(r"\s*\S+\s{2,}(?=\S)")


class HelpFormatter(click.HelpFormatter):
    r"""Folds the lists in paragraphs that begin with ``\b``, too, which click leaves to the terminal."""

    def write_text(self, text: str) -> None:
        """Write paragraphs."""
        width = self.width - self.current_indent
        folded = [
            "\n".join(_folded(line, width) for line in each.splitlines()) if each[:1] == "\b" else each
            for each in re.split(r"\n\s*\n", text)
        ]
        super().write_text("\n\n".join(folded))


def _folded(line: str, width: int) -> str:
    """A line whose second column goes on under itself; any other, a command perhaps, stays as it is."""
    first = _FIRST.match(line)
    if first is None or len(line) <= width:
        return line
    return textwrap.fill(line, width, subsequent_indent=" " * len(first[0]), break_on_hyphens=False)


class Context(click.Context):
    """A command's context, whose help is written by :class:`HelpFormatter`."""

    formatter_class = HelpFormatter

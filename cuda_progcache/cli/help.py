# SPDX-License-Identifier: Apache-2.0
"""The layout of ``--help``: the groups of commands, and lists folded to the terminal's width."""

from __future__ import annotations

import re
import textwrap

import click

GROUPS: dict[str, tuple[str, ...]] = {
    "Compile": ("compile", "render", "kernels", "prewarm", "demo"),
    "Look into the cache": ("list", "show", "top", "stats", "report", "watch"),
    "Find causes and origins": ("explain", "compare", "provenance", "affected"),
    "Inspect machine code": ("resources", "sass", "diff"),
    "Deploy": ("lock", "check", "export", "import"),
    "Share between machines": ("tiers", "sync", "gc"),
    "Maintain the cache": ("verify", "prune", "pin", "clear"),
    "Check this machine": ("doctor", "config"),
}
"""The groups of commands, in the order of the help."""

# The first column of a list item and the spaces after it.
_FIRST = re.compile(r"\s*\S+\s{2,}(?=\S)")


class HelpFormatter(click.HelpFormatter):
    r"""A formatter that also folds lists in paragraphs that begin with ``\b``; click writes these unfolded."""

    def write_text(self, text: str) -> None:
        """Write the paragraphs of a text."""
        width = self.width - self.current_indent
        folded = [
            "\n".join(_folded(line, width) for line in each.splitlines()) if each[:1] == "\b" else each
            for each in re.split(r"\n\s*\n", text)
        ]
        super().write_text("\n\n".join(folded))


def _folded(line: str, width: int) -> str:
    """Fold a list item, indenting its second column; return any other line, such as a command, unchanged."""
    first = _FIRST.match(line)
    if first is None or len(line) <= width:
        return line
    return textwrap.fill(line, width, subsequent_indent=" " * len(first[0]), break_on_hyphens=False)


class Context(click.Context):
    """A command's context; :class:`HelpFormatter` writes its help."""

    formatter_class = HelpFormatter

# SPDX-License-Identifier: Apache-2.0
"""A directive for the documentation: ``{settings}``, the table of environment variables as the package has it."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from cuda_progcache.service.settings import SETTINGS

_HEADINGS = ("variable", "meaning", "default")


class Settings(SphinxDirective):
    """The table of environment variables."""

    def run(self) -> list[nodes.Node]:
        """Make the table."""
        group = nodes.tgroup(cols=len(_HEADINGS))
        group += [nodes.colspec(colwidth=width) for width in (34, 40, 26)]
        group += nodes.thead("", _row(*(nodes.Text(heading) for heading in _HEADINGS)))
        body = nodes.tbody()
        for one in SETTINGS:
            body += _row(nodes.literal(text=one.name), nodes.Text(one.meaning), nodes.Text(one.default))
        group += body
        return [nodes.table("", group)]


def _row(*cells: nodes.Node) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def setup(app: Any) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("settings", Settings)
    return {"parallel_read_safe": True}

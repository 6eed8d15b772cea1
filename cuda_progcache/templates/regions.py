# SPDX-License-Identifier: Apache-2.0
"""The statements that Jinja2 doesn't have: ``{% region %}``, ``{% globals %}``, ``{% imports %}``, as nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.ext import Extension

if TYPE_CHECKING:
    from jinja2.parser import Parser


def _statement(name: str, fields: tuple[str, ...], doc: str) -> Any:
    """Make a node type; Jinja2 lets nobody but itself write one as a class."""
    members = {
        "__doc__": doc,
        "__module__": __name__,
        "fields": fields,
        "attributes": nodes.Stmt.attributes,
        "abstract": False,
    }
    made: Any = type.__new__(nodes.NodeType, name, (nodes.Stmt,), members)
    return made


Region = _statement("Region", ("name", "args", "defaults", "body"), "A block with parameters.")
Globals = _statement("Globals", ("body",), "Statements that set up names for the template and for its blocks.")


class RegionExtension(Extension):
    """Parses regions and what sets up names for single blocks.

    ``{% region name(a, b=1) %}…{% endregion %}``
        A block with parameters. It puts out nothing where it stands: the template calls it as ``name(…)``, and
        `Template.render_block` renders it by itself, with the parameters as variables. Its body sees the parameters and
        the render's variables, not the locals of the place where it stands.
    ``{% globals %}…{% endglobals %}``, ``{% imports %}…{% endimports %}``
        Assignments, macros and imports that are done before anything else, in a render and before `render_block`, so
        that a block rendered by itself finds their names. What they would put out is dropped.
    """

    priority = -(2**31)  # a user's tag of such a name wins
    tags = {"region", "globals", "imports"}  # noqa: RUF012  (Jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        """Build the node."""
        token = next(parser.stream)
        if token.value == "region":
            region = Region(lineno=token.lineno)
            region.name = parser.parse_assign_target(name_only=True).name
            region.args, region.defaults = [], []
            if parser.stream.current.type == "lparen":
                parser.parse_signature(region)
            region.body = parser.parse_statements(("name:endregion",), drop_needle=True)
            node: nodes.Node = region
        else:
            node = Globals(parser.parse_statements((f"name:end{token.value}",), drop_needle=True), lineno=token.lineno)
        return node

# SPDX-License-Identifier: Apache-2.0
"""Nodes and parsers of statements that Jinja2 doesn't have: ``{% region %}``, ``{% globals %}``, ``{% imports %}``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.parser import Parser

if TYPE_CHECKING:
    from jinja2 import Environment


def _statement(name: str, fields: tuple[str, ...], doc: str) -> Any:
    """Return a new node type; Jinja2's metaclass refuses class statements of other packages."""
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


def region(parser: Parser) -> nodes.Node:
    """Parse ``{% region name(a, b=1) %}…{% endregion %}``, a block with parameters.

    The statement itself puts out nothing. The template calls a region as ``name(…)``, and `Template.render_block`
    renders it alone, with the parameters as variables. The body sees the parameters and the render's variables, but not
    the local variables of the place where the region is defined.
    """
    made = Region(lineno=next(parser.stream).lineno)
    made.name = parser.parse_assign_target(name_only=True).name
    made.args, made.defaults = [], []
    if parser.stream.current.type == "lparen":
        parser.parse_signature(made)
    made.body = parser.parse_statements(("name:endregion",), drop_needle=True)
    parsed: nodes.Node = made
    return parsed


def set_up(parser: Parser) -> nodes.Node:
    """Parse ``{% globals %}…{% endglobals %}`` or ``{% imports %}…{% endimports %}``.

    The body (assignments, macros and imports) is executed first in each render and in `render_block`, so that a block
    rendered alone finds its names. Output of the body is discarded.
    """
    token = next(parser.stream)
    made: nodes.Node = Globals(
        parser.parse_statements((f"name:end{token.value}",), drop_needle=True), lineno=token.lineno
    )
    return made


TAGS = {"region": region, "globals": set_up, "imports": set_up}


def parse(environment: Environment, source: str, name: str | None, filename: str | None) -> nodes.Template:
    """Parse a template that may have these tags; an extension's tag of the same name overrides ours."""
    parser = Parser(environment, source, name, filename)
    parser.extensions = {**TAGS, **parser.extensions}
    return parser.parse()

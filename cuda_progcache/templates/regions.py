# SPDX-License-Identifier: Apache-2.0
"""The statements that Jinja2 doesn't have: ``{% region %}``, ``{% globals %}``, ``{% imports %}``, as nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.parser import Parser

if TYPE_CHECKING:
    from jinja2 import Environment


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


def region(parser: Parser) -> nodes.Node:
    """Parse ``{% region name(a, b=1) %}…{% endregion %}``, a block with parameters.

    It puts out nothing where it stands: the template calls it as ``name(…)``, and `Template.render_block` renders it by
    itself, with the parameters as variables. Its body sees the parameters and the render's variables, not the locals of
    the place where it stands.
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

    These are assignments, macros and imports that are done before anything else, in a render and before `render_block`,
    so that a block rendered by itself finds their names. What they would put out is dropped.
    """
    token = next(parser.stream)
    made: nodes.Node = Globals(
        parser.parse_statements((f"name:end{token.value}",), drop_needle=True), lineno=token.lineno
    )
    return made


TAGS = {"region": region, "globals": set_up, "imports": set_up}


def parse(environment: Environment, source: str, name: str | None, filename: str | None) -> nodes.Template:
    """Parse a template that may have these tags; an extension's own tag of such a name wins."""
    parser = Parser(environment, source, name, filename)
    parser.extensions = {**TAGS, **parser.extensions}
    return parser.parse()

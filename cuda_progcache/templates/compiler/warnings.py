# SPDX-License-Identifier: Apache-2.0
"""Warnings of likely mistakes in a template."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jinja2 import nodes

from cuda_progcache.templates.compiler.scopes import SET

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler.analysis import Analysis


@dataclass(frozen=True, slots=True)
class CompilerWarning:
    """A likely mistake in a template.

    Parameters
    ----------
    code : str
        The kind of mistake, for machines: ``"lost-assignment"``, ``"dropped-output"`` or ``"static-assigned"``.
    message : str
        The description, for people.
    line : int
        The line of the template.
    suggestion : str
        A suggested correction; may be empty.
    """

    code: str
    message: str
    line: int
    suggestion: str = ""


def warnings_of(node: nodes.Template, analysis: Analysis, static: Iterable[str]) -> list[CompilerWarning]:
    """Return the warnings of an analysed template, sorted by line; `static` has the names of the static context."""
    found = []
    for name in sorted(analysis.assigned.intersection(static)):
        message = (
            f"{name!r} is in the static context, but the template also sets it, so it is looked up on every render"
        )
        found.append(CompilerWarning("static-assigned", message, node.lineno or 1, "rename one of them"))
    for scope, name, line in analysis.set_in_loops:
        around = scope.parent.owner(name) if scope.parent is not None else None
        if around is not None and around.notes[name] & SET:
            message = (
                f"the value that the loop's body assigns to {name!r} is lost after each iteration; "
                "the outer variable doesn't change"
            )
            suggestion = f"{{% set ns = namespace({name}=…) %}} before the loop, {{% set ns.{name} = … %}} in it"
            found.append(CompilerWarning("lost-assignment", message, line, suggestion))
    for line in _dropped_lines(node):
        message = "text outside the blocks of a template that extends another is never rendered"
        found.append(CompilerWarning("dropped-output", message, line, "move it into a block"))
    return sorted(found, key=lambda warning: warning.line)


def _dropped_lines(template: nodes.Template) -> list[int]:
    """Return the lines of visible text after a top-level ``{% extends %}`` and outside of blocks."""
    lines: list[int] = []
    extends = False
    for node in template.body:
        if isinstance(node, nodes.Extends):
            extends = True
        elif extends and isinstance(node, nodes.Output):
            for child in node.nodes:
                if isinstance(child, nodes.TemplateData) and child.data.strip():
                    before = child.data[: len(child.data) - len(child.data.lstrip())]
                    lines.append(child.lineno + before.count("\n"))
    return lines

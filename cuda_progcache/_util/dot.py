# SPDX-License-Identifier: Apache-2.0
"""Output in DOT, Graphviz's language."""

from __future__ import annotations

from collections.abc import Iterable

from cuda_progcache._util.printable import printable


def digraph(nodes: Iterable[tuple[str, str, str]], edges: Iterable[tuple[str, str, str]]) -> str:
    """Write a graph: nodes as (id, label, shape), edges as (from, to, label), where ``from`` depends on ``to``."""
    lines = ["digraph provenance {", "  rankdir=RL;", '  node [fontname="Helvetica", fontsize=10];']
    lines += [f"  {_quoted(name)} [label={_quoted(label)}, shape={shape}];" for name, label, shape in nodes]
    lines += [f"  {_quoted(source)} -> {_quoted(target)} [label={_quoted(label)}];" for source, target, label in edges]
    return "\n".join([*lines, "}", ""])


def _quoted(text: str) -> str:
    """Write text as a DOT string; a newline in it is a line break."""
    escaped = printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'

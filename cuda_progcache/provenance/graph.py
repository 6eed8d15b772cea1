# SPDX-License-Identifier: Apache-2.0
"""Where things came from, as a graph: things, the steps that used and made them, and what depends on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

#: Kinds of node that are steps; every other kind is a thing.
STEPS = frozenset({"render", "compile", "link", "call", "analysis", "prewarm", "gone"})


@dataclass(frozen=True)
class Node:
    """A thing or a step.

    Attributes
    ----------
    id : str
        Unique in its graph: the kind and the digest or name.
    kind : str
        ``binary``, ``source``, ``header``, ``template``, ``tool``, ``input``, ``file``, ``value``; or a step:
        ``render``, ``compile``, ``link``, ``analysis``, ``prewarm``, ``call``, or ``gone``: its record isn't here.
    label : str
        What people call it.
    digest : str or None
        Of its content: 64 hex digits are SHA-256, anything else names its kind (``build-id:...``).
    detail : mapping
        What else is known, as JSON values.
    """

    id: str
    kind: str
    label: str
    digest: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, name: str, label: str, digest: str | None = None, **detail: Any) -> Self:
        """The node of a kind that ``name`` tells from others of its kind."""
        return cls(f"{kind}:{name}", kind, label, digest, detail)

    @property
    def is_step(self) -> bool:
        """Whether something happened here, rather than is."""
        return self.kind in STEPS


class Edge(NamedTuple):
    """``source`` depends on ``target``: it ``used`` it, was ``made by`` it, or (a step) was ``called by`` it."""

    source: str
    target: str
    relation: str


@dataclass
class Graph:
    """Things and steps, and what depends on what.

    Attributes
    ----------
    root : str
        The node that was asked about; empty: none.
    nodes : dict
        By id, in the order in which a walk from the root meets them.
    edges : list of Edge
        Each once.
    """

    root: str = ""
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list, init=False)
    _out: dict[str, dict[Edge, None]] = field(default_factory=dict, init=False, repr=False)

    def add(self, node: Node) -> str:
        """Add a node, unless there is one of its id; returns the id."""
        self.nodes.setdefault(node.id, node)
        return node.id

    def link(self, source: str, target: str | Node, relation: str) -> str:
        """Add an edge, once, and the node that it leads to; returns that node's id."""
        edge = Edge(source, target if isinstance(target, str) else self.add(target), relation)
        leading = self._out.setdefault(source, {})
        if edge not in leading:
            leading[edge] = None
            self.edges.append(edge)
        return edge.target

    def targets(self, source: str, relation: str | None = None) -> list[Node]:
        """What a node depends on directly, in any way or in this one."""
        return [self.nodes[edge.target] for edge in self._out.get(source, ()) if relation in {None, edge.relation}]

    def sources(self, target: str) -> list[Node]:
        """What depends on a node directly."""
        return [self.nodes[edge.source] for edge in self.edges if edge.target == target]

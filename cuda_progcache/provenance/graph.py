# SPDX-License-Identifier: Apache-2.0
"""The provenance graph: things, the steps that used and made them, and the dependencies between them."""

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
        Identifier, unique in the graph: the kind, and the digest or name.
    kind : str
        ``binary``, ``source``, ``header``, ``template``, ``tool``, ``input``, ``file`` or ``value``; for a step,
        ``render``, ``compile``, ``link``, ``analysis``, ``prewarm``, ``call``, or ``gone`` if the step's record is
        missing.
    label : str
        Name for display.
    digest : str or None
        Digest of the content: 64 hex digits are SHA-256, anything else names its kind (``build-id:...``).
    detail : mapping
        Further facts, as JSON values.
    """

    id: str
    kind: str
    label: str
    digest: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, name: str, label: str, digest: str | None = None, **detail: Any) -> Self:
        """Return a node of a kind; ``name`` distinguishes it from others of the same kind."""
        return cls(f"{kind}:{name}", kind, label, digest, detail)

    @property
    def is_step(self) -> bool:
        """Whether the node is a step rather than a thing."""
        return self.kind in STEPS


class Edge(NamedTuple):
    """A dependency of ``source`` on ``target``: it ``used`` or was ``made by`` it, or (a step) was ``called by`` it."""

    source: str
    target: str
    relation: str


@dataclass
class Graph:
    """A provenance graph.

    Attributes
    ----------
    root : str
        Id of the node that was asked about; empty if there is none.
    nodes : dict
        The nodes by id, in the order in which a walk from the root meets them.
    edges : list of Edge
        The edges, each once.
    """

    root: str = ""
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list, init=False)
    _out: dict[str, dict[Edge, None]] = field(default_factory=dict, init=False, repr=False)

    def add(self, node: Node) -> str:
        """Add a node, unless the graph has one with the same id; return the id."""
        self.nodes.setdefault(node.id, node)
        return node.id

    def link(self, source: str, target: str | Node, relation: str) -> str:
        """Add an edge, unless the graph has it, and its target node; return the target's id."""
        edge = Edge(source, target if isinstance(target, str) else self.add(target), relation)
        leading = self._out.setdefault(source, {})
        if edge not in leading:
            leading[edge] = None
            self.edges.append(edge)
        return edge.target

    def targets(self, source: str, relation: str | None = None) -> list[Node]:
        """Return the direct dependencies of a node, of any relation or of the one given."""
        return [self.nodes[edge.target] for edge in self._out.get(source, ()) if relation in {None, edge.relation}]

    def sources(self, target: str) -> list[Node]:
        """Return the nodes that depend directly on a node."""
        return [self.nodes[edge.source] for edge in self.edges if edge.target == target]

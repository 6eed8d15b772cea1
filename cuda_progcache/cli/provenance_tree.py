# SPDX-License-Identifier: Apache-2.0
"""A provenance graph as a text tree: a result's inputs, the calls that requested it, and the results that used it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cuda_progcache.cli import output
from cuda_progcache.cli.entries import parameters_text
from cuda_progcache.provenance.export import short

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

    from cuda_progcache.provenance.graph import Graph, Node

#: The maximum number of files of a kind, or results of a call, that are listed without ``everything``.
FEW = 6
_WIDE = 12  # width of the labels at the start of lines
_HEADINGS = {"header": "headers", "tool": "compiler", "template": "templates", "binary": "programs"}


def tree_of(graph: Graph, *, everything: bool = False) -> Tree:
    """Return a graph as a tree.

    Parameters
    ----------
    graph : Graph
        A graph with a root.
    everything : bool
        Whether to list every file; otherwise a line summarizes a kind with many files.
    """
    from rich.tree import Tree

    root = graph.nodes[graph.root]
    made = Tree(_root_line(root), guide_style="dim")
    grown = _Grower(graph, root, everything=everything)
    grown.grow(made, root)
    grown.add_made_of(made, root)
    return made


class _Grower:
    def __init__(self, graph: Graph, root: Node, *, everything: bool) -> None:
        self.graph = graph
        self.everything = everything
        self.shown = {root.id}
        self._groups: set[frozenset[str]] = set()
        # The callers of the root also called its other steps; they are shown only at the root.
        steps = [root, *graph.targets(root.id, "made by")]
        self._asked = {caller.id: step.id for step in steps for caller in graph.targets(step.id, "called by")}

    def grow(self, tree: Tree, node: Node) -> None:
        """Add the dependencies of ``node``; a node that several nodes depend on is expanded only the first time."""
        _add_facts(tree, node)
        used = self.graph.targets(node.id, "used")
        if node.kind == "link":
            used = self._own(used)
        for kind, members in groupby(used, key=lambda target: target.kind):
            group = list(members)
            if kind in {"header", "tool", "template"} or (len(group) > FEW and kind == "binary"):
                self._add_group(tree, kind, group)
            else:
                for target in group:
                    self._add(tree, target)
        for target in self.graph.targets(node.id, "made by"):
            self._add(tree, target)
        for target in self.graph.targets(node.id, "called by"):
            if self._asked.get(target.id, node.id) == node.id and target.id not in self.shown:
                self._add(tree, target, caller=True)

    def _own(self, used: Sequence[Node]) -> list[Node]:
        """Return the inputs of a link that its parts don't have as inputs."""
        steps = [step for part in used for step in self.graph.targets(part.id, "made by")]
        told = {node.id for step in steps for node in self.graph.targets(step.id, "used")}
        return [node for node in used if node.id not in told]

    def _add(self, tree: Tree, node: Node, *, caller: bool = False) -> None:
        # A link whose parts are gone has an edge to its rendering, which didn't request the link.
        line = _row(("requested by ", "cyan"), _line(node)) if caller and node.kind != "render" else _line(node)
        if node.id in self.shown and self.graph.targets(node.id):
            tree.add(_row(line, _remark("(as above)")))
            return
        self.shown.add(node.id)
        branch = tree.add(line)
        if not (caller and node.kind == "prewarm"):  # a prewarm's other programs aren't related to this one
            self.grow(branch, node)

    def _add_group(self, tree: Tree, kind: str, nodes: Sequence[Node]) -> None:
        """Add nodes of a kind: each of them, or their number by directory or architecture."""
        heading = _HEADINGS[kind]
        ids = frozenset(node.id for node in nodes)
        if ids in self._groups and len(nodes) > 1:
            names = ", ".join(node.label for node in nodes) if len(nodes) <= FEW else f"{len(nodes):,}"
            tree.add(_labelled(heading, names, "(as above)"))
            return
        self._groups.add(ids)
        if len(nodes) > FEW and not self.everything:
            word = "for" if kind == "binary" else "in"
            places = ", ".join(f"{count:,} {word} {place}" for place, count in _by_place(nodes, kind))
            tree.add(_labelled(heading, f"{len(nodes):,}: {places}", "--all lists them"))
            return
        width = max(len(node.label) for node in nodes)
        label: str | None = "compiler" if kind == "tool" else kind
        if len(nodes) > FEW:
            tree, label = tree.add(_row((f"{len(nodes):,} {heading}", "cyan"))), None
        for node in nodes:
            tree.add(_labelled(label, f"{node.label:<{width}}", _digest_of(node)))

    def add_made_of(self, tree: Tree, root: Node) -> None:
        """Add the results and calls that used the root."""
        users = [node for node in self.graph.sources(root.id) if node.id not in self.shown]
        if not users:
            return
        branch = tree.add(_row(("used by", "bold")))
        shown = users if self.everything else users[: 2 * FEW]
        for user in shown:
            results = [node for node in self.graph.sources(user.id) if node.kind == "binary"]
            for result in results:
                branch.add(_line(result))
            if not results:
                _add_facts(branch.add(_line(user)), user)
        if len(users) > len(shown):
            branch.add(_row((f"and {len(users) - len(shown):,} more; --all lists them", "dim")))


def _add_facts(tree: Tree, node: Node) -> None:
    about = node.detail
    facts: list[tuple[str, str]] = []
    if node.kind in {"compile", "link"}:
        facts = [("options", " ".join(about["options"])), ("names", ", ".join(about["name_expressions"]))]
    elif node.kind == "render":
        facts = [("parameters", parameters_text(about["parameters"]))]
    elif node.kind == "analysis" and isinstance(about["result"], dict):
        facts = [("kernel", f"{kernel}  {_usage(usage)}") for kernel, usage in about["result"].items()]
    for label, what in facts:
        if what:
            tree.add(_labelled(label, what))


# Lines


def _row(*parts: str | tuple[str, str] | Text) -> Text:
    """Join texts, each keeping its own style; ``+`` would give the first one's style to all of them."""
    made = output.text("")
    for part in parts:
        styled = (part,) if isinstance(part, str) else part
        made.append_text(output.text(*styled) if isinstance(styled, tuple) else styled)
    return made


def _labelled(label: str | None, what: str | Text, remark: str = "") -> Text:
    return _row(("" if label is None else f"{label:<{_WIDE}}", "cyan"), what, _remark(remark))


def _remark(what: str) -> tuple[str, str]:
    return (f"  {what}" if what else "", "dim")


def _happened(what: str, node: Node, remark: str = "", *, timed: bool = True) -> Text:
    """Return a line on a step: what happened, how long it took, when it ended, and a remark."""
    about = node.detail
    took = f" in {output.seconds(about['duration'])}" if timed and about.get("duration") is not None else ""
    ended = about.get("ended") if timed else None
    when = f", {datetime.fromisoformat(ended).astimezone():%Y-%m-%d %H:%M:%S}" if ended else ""
    return _row((what, "green"), took, (when, "dim"), _remark(remark))


def _root_line(node: Node) -> Text:
    if node.kind == "binary":
        about = node.detail
        digests = f"entry {about['entry'][:12]}  sha256 {short(node.digest) or '?'}"
        return _row((node.label, "bold"), _remark(f"{output.size(about['size'])}  {digests}"))
    return _row((node.label, "bold")) if node.kind == "value" else _line(node)


def _line(node: Node) -> Text:
    """Return a node as a line: its kind, its name and its digest."""
    about = node.detail
    call = f"call {str(about.get('key'))[:12]}"
    if node.kind == "binary":
        return _labelled("program", node.label, f"{output.size(about['size'])}  entry {about['entry'][:12]}")
    if node.kind in {"compile", "link"}:
        return _happened(node.label.replace(node.kind, f"{node.kind.removesuffix('e')}ed", 1), node)
    if node.kind == "render":
        what = f"rendered from kernel {about['kernel']}" + (f", module {about['module']}" if about["module"] else "")
        return _happened(what, node, call if about["recorded"] else "its own record is gone", timed=about["recorded"])
    if node.kind == "call":
        return _happened(f"call of {node.label}", node, call)
    if node.kind == "prewarm":
        kernels, counts = about["kernels"], about["result"] or {}
        what = output.plural(len(kernels), "kernel") if kernels else "the whole library"
        told = ", ".join(f"{counts[name]:,} {name}" for name in ("compiled", "hits", "failed") if counts.get(name))
        remark = f"{told}; {call}" if told else call
        return _happened(f"prewarm of {what} for {', '.join(about['archs'])}", node, remark)
    if node.kind == "analysis":
        size = about.get("bytes")
        return _happened(node.label + (f" of {output.size(size)}" if size else ""), node, call)
    if node.kind == "gone":
        return _row(f"{node.label}, {call}", (" (record missing: removed, or in another directory)", "yellow"))
    if node.kind == "input":
        gone = " (entry removed)" if about.get("entry") else " (record missing)"
        what = gone if about.get("gone") else " (passed in as bytes)"
        return _labelled("input", _row(node.label, (what, "yellow")), _digest_of(node))
    return _labelled(node.kind, node.label, _digest_of(node))


def _digest_of(node: Node) -> str:
    """Return a short form of a node's digest; for a build id, only the id and not the file's length after it."""
    if node.digest is None:
        return "didn't exist" if node.kind == "file" else ""
    kind, _, rest = node.digest.partition(":")
    if not rest:
        return short(node.digest)
    return f"build {rest[:12]}" if kind == "build-id" else f"{kind} {rest[:12]}"


def _by_place(nodes: Iterable[Node], kind: str) -> list[tuple[str, int]]:
    """Count the nodes by directory (programs: by architecture), the largest counts first."""
    places = (str(node.detail.get("arch")) if kind == "binary" else _place(node.label) for node in nodes)
    ordered = sorted(Counter(places).items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[FEW:])
    return ordered[:FEW] + ([("other directories", rest)] if rest else [])


def _place(label: str) -> str:
    parts = [part for part in label.rpartition("/")[0].split("/") if part not in {"", ".", ".."}]
    return f"{parts[0]}/" if parts else "no directory"


def _usage(usage: Mapping[str, Any]) -> str:
    words = {
        "registers": "registers",
        "spill_store_bytes": "B spill stores",
        "spill_load_bytes": "B spill loads",
        "shared_bytes": "B shared",
        "stack_bytes": "B stack",
        "local_bytes": "B local",
    }
    told = [f"{usage[name]} {word}" for name, word in words.items() if usage.get(name)]
    return ", ".join(told) or "nothing"

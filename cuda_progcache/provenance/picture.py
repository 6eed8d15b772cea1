# SPDX-License-Identifier: Apache-2.0
"""Drawing of provenance graphs, from five nodes to thousands, as SVG.

The graph is drawn in layers (Sugiyama, Tagawa and Toda, 1981): the root is on
the right, its dependencies are to the left of it, one layer per step. An edge
that crosses a layer gets a slot in that layer, so no edge runs behind a box;
edges to the same target share the slot and are drawn as one. Files used by the
same steps, such as 400 headers of one compile or the files of its compiler,
share a box and one edge. Text isn't scaled: a large graph is a large picture
to be scrolled or zoomed.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias
from xml.sax import saxutils

from cuda_progcache._util.amounts import seconds
from cuda_progcache._util.printable import printable
from cuda_progcache.provenance.export import short

if TYPE_CHECKING:
    from cuda_progcache.provenance.graph import Graph, Node

#: Sizes in pixels. A monospaced glyph is 0.6 em wide (7.2); GLYPH allows for slightly wider fonts.
FONT = 12
GLYPH = 7.4
LINE = 16
PAD = 8
GAP_X = 72
GAP_Y = 14
MARGIN = 24
#: Characters of a label to show; the tooltip of the box has the full label.
LONGEST = 44
#: More files than this that are used by the same steps share a box; the box's width over its height.
CROWD = 8
ASPECT = 1.5
#: A box of more files than this shows only how many are below each topmost directory.
NAMED = 60
_SWEEPS = 8

COLOURS = {
    **dict.fromkeys(("binary", "value"), "#d7e8ff"),
    **dict.fromkeys(("source", "template"), "#e2f4dd"),
    **dict.fromkeys(("header", "file"), "#f2f2f2"),
    **dict.fromkeys(("input", "gone"), "#f7d9d9"),
    "tool": "#ffe9d0",
}
STEP_COLOUR = "#fff7c8"
_PLURALS = {"binary": "binaries", "tool": "compiler files"}

Route: TypeAlias = "tuple[list[Box], str]"


class Row(NamedTuple):
    """A line in a box."""

    text: str
    tooltip: str
    faint: bool = False


@dataclass(eq=False)
class Box:
    """An item in a layer: a node, a group of nodes, or (without columns) an edge that crosses the layer."""

    kind: str = ""
    ids: Sequence[str] = ()
    columns: Sequence[Sequence[Row]] = ()
    heading: str = ""
    is_step: bool = False
    is_root: bool = False
    layer: int = 0
    column: float = 0.0
    """The left end of the layer; boxes are flush right, so a narrow box begins further right."""
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 4.0
    left: list[Box] = field(default_factory=list)
    """The box's dependencies: its neighbours in the next layer to the left."""
    right: list[Box] = field(default_factory=list)

    @property
    def middle(self) -> float:
        """The vertical position, from the top, where edges meet the box."""
        return self.y + self.height / 2


def to_svg(graph: Graph, title: str = "provenance") -> str:
    """Draw a graph.

    Parameters
    ----------
    graph : Graph
        A graph of any size; it may have cycles.
    title : str
        The picture's accessible name.

    Returns
    -------
    str
        A complete SVG document, sized in pixels so that text is 12 px.
    """
    return _write(title, *arrange(graph))


def arrange(graph: Graph) -> tuple[list[Box], list[Route], float, float]:
    """Lay out a graph: return the boxes, the edges as the boxes they run through, and width and height in pixels."""
    boxes = _boxes(graph)
    edges = _edges(graph, boxes)
    unique = list(dict.fromkeys(boxes.values()))
    back = _assign_layers(unique, edges)
    layers, routes = _route(unique, edges, back)
    _order(layers)
    width, height = _place(layers)
    return unique, routes, width, height


def _boxes(graph: Graph) -> dict[str, Box]:
    """Return the box of each node, by the node's id."""
    used_by: dict[str, set[tuple[str, str]]] = defaultdict(set)
    has_target = {edge.source for edge in graph.edges}
    for edge in graph.edges:
        used_by[edge.target].add((edge.source, edge.relation))
    crowds: dict[object, list[Node]] = defaultdict(list)
    for node in graph.nodes.values():
        alone = node.id in has_target or node.is_step or node.id == graph.root or not used_by[node.id]
        crowds[node.id if alone else (node.kind, frozenset(used_by[node.id]))].append(node)
    boxes: dict[str, Box] = {}
    for members in crowds.values():
        together = len(members) > CROWD or members[0].kind in {"tool", "template"}
        for group in [members] if together else [[node] for node in members]:
            box = _crowd(group) if len(group) > CROWD else _listed(group)
            box.is_root = graph.root in box.ids
            boxes.update((node.id, box) for node in group)
    return boxes


def _listed(nodes: Sequence[Node]) -> Box:
    """Return a box that lists a few nodes below each other: the label and short facts of each."""
    rows = []
    for node in nodes:
        lines = [node.label, *_facts(node)]
        digest = f" {node.digest}" if node.digest else ""
        rows += [Row(elided(line), f"{node.kind}: {line}{digest}", faint=index > 0) for index, line in enumerate(lines)]
    return _sized(Box(nodes[0].kind, [node.id for node in nodes], [rows], is_step=nodes[0].is_step))


def _facts(node: Node) -> Iterator[str]:
    about = node.detail
    if node.kind == "render":
        yield from (f"{name} = {value}" for name, value in (about.get("parameters") or {}).items())
    elif node.kind == "prewarm":
        kernels = about.get("kernels")
        yield f"{len(kernels)} kernel{'s' * (len(kernels) > 1)}" if kernels else "the whole library"
        yield ", ".join(about.get("archs") or ())
    elif node.kind == "gone":
        yield "record missing"
    elif node.digest:
        yield short(node.digest)
    elif about.get("gone"):
        yield "gone"
    if node.is_step and about.get("duration") is not None:
        yield seconds(about["duration"])


def _folded(nodes: Iterable[Node]) -> list[Row]:
    """Return a row for each topmost directory: the number of files below it; the tooltip lists them with digests."""
    below: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        top, slash, _ = node.label.lstrip("/").partition("/")
        below[f"{top}/" if slash else "in no directory"].append(
            f"{node.kind}: {node.label} {node.digest or ''}".rstrip()
        )
    rows = sorted(below.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Row(elided(f"{len(named):,}  {top}"), "\n".join(named)) for top, named in rows]


def _crowd(members: Iterable[Node]) -> Box:
    """Return a box of many files: names in columns, by directory; half as wide again as high, like a screen."""
    nodes = sorted(members, key=lambda node: os.path.split(node.label))
    kind = nodes[0].kind
    heading = f"{len(nodes):,} {_PLURALS.get(kind, f'{kind}s')}"
    if len(nodes) > NAMED:
        return _sized(Box(kind, [node.id for node in nodes], [_folded(nodes)], heading=heading))
    rows: list[Row] = []
    above = ""
    for node in nodes:
        directory, name = os.path.split(node.label)
        if directory != above:
            rows.append(Row(elided(f"{directory}/"), directory, faint=True))
            above = directory
        shown = f"  {name}" if directory else name
        rows.append(Row(elided(shown), f"{node.kind}: {node.label} {node.digest or ''}".rstrip()))
    widest = max(text_width(row.text) for row in rows) + 2 * PAD
    count = max(1, round(math.sqrt(ASPECT * len(rows) * LINE / widest)))
    tall = math.ceil(len(rows) / count)
    columns = [rows[start : start + tall] for start in range(0, len(rows), tall)]
    return _sized(Box(kind, [node.id for node in nodes], columns, heading=heading))


def _sized(box: Box) -> Box:
    widths = [max(text_width(row.text) for row in column) for column in box.columns]
    box.width = max(sum(widths) + PAD * 2 * len(widths), text_width(box.heading) + PAD * 2)
    box.height = LINE * (max(len(column) for column in box.columns) + bool(box.heading)) + PAD
    return box


def elided(text: str) -> str:
    """Shorten text in its middle, since the end of a path says more than its middle."""
    if len(text) <= LONGEST:
        return text
    head = LONGEST // 3
    return f"{text[:head]}…{text[len(text) - (LONGEST - head - 1) :]}"


def text_width(text: str) -> float:
    """Return the width of a line in a monospaced font, in pixels."""
    return GLYPH * sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)


_BoxEdge = tuple[Box, Box, str]


def _edges(graph: Graph, boxes: dict[str, Box]) -> list[_BoxEdge]:
    """Return the edges between boxes, each once."""
    seen = dict.fromkeys((boxes[e.source], boxes[e.target], e.relation) for e in graph.edges)
    return [edge for edge in seen if edge[0] is not edge[1]]


def _assign_layers(boxes: Sequence[Box], edges: Sequence[_BoxEdge]) -> set[_BoxEdge]:
    """Number the layers from the right, each box after its dependents; return the edges that close cycles."""
    out: dict[Box, list[_BoxEdge]] = defaultdict(list)
    for edge in edges:
        out[edge[0]].append(edge)
    back: set[_BoxEdge] = set()
    finished: list[Box] = []  # each box after its dependencies
    # Whether the walk is still inside a box. The walk isn't recursive since graphs may be deep.
    inside: dict[Box, bool] = {}
    for start in boxes:
        walk = [] if start in inside else [(start, iter(out[start]))]
        while walk:
            box, rest = walk[-1]
            inside[box] = True
            following = next(rest, None)
            if following is None:
                inside[box] = False
                finished.append(box)
                walk.pop()
            elif following[1] not in inside:
                walk.append((following[1], iter(out[following[1]])))
            elif inside[following[1]]:
                back.add(following)
    for box in reversed(finished):
        for edge in out[box]:
            if edge not in back:
                edge[1].layer = max(edge[1].layer, box.layer + 1)
    return back


def _route(boxes: Sequence[Box], edges: Sequence[_BoxEdge], back: set[_BoxEdge]) -> tuple[list[list[Box]], list[Route]]:
    """Return the layers, with a slot for each edge that crosses one, and each edge as the boxes it runs through."""
    layers: list[list[Box]] = [[] for _ in range(max((box.layer for box in boxes), default=-1) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    routes = []
    ways: dict[tuple[Box, str, int], Box] = {}
    for edge in edges:
        source, target, relation = edge if edge not in back else (edge[1], edge[0], edge[2])
        path = [source]
        for layer in range(source.layer + 1, target.layer):
            passing = ways.get((target, relation, layer))
            if passing is None:
                passing = ways[target, relation, layer] = Box(layer=layer)
                layers[layer].append(passing)
            path.append(passing)
        path.append(target)
        for one, other in pairwise(path):
            if other not in one.left:
                one.left.append(other)
                other.right.append(one)
        routes.append((path, relation))
    return layers, routes


def _order(layers: list[list[Box]]) -> None:
    """Sort the boxes of each layer by the average position of their neighbours, in sweeps (barycentres)."""
    for sweep in range(_SWEEPS):
        rightwards = sweep % 2 == 0
        for layer in layers if rightwards else reversed(layers):
            layer.sort(key=lambda box: _pull(box, attrgetter("y"), rightwards=rightwards))
            for index, box in enumerate(layer):
                box.y = float(index)


def _pull(box: Box, where: Callable[[Box], float], *, rightwards: bool) -> float:
    """Return the weighted mean position of a box's neighbours on a side.

    A neighbour with many neighbours of its own, such as a compiler, has little weight.
    """
    weight = total = 0.0
    for other in box.right if rightwards else box.left:
        share = len(other.left if rightwards else other.right) ** -2
        weight += share
        total += share * where(other)
    return total / weight if weight else where(box)


def _place(layers: list[list[Box]]) -> tuple[float, float]:
    """Set the position of each box; return the picture's width and height."""
    x = float(MARGIN)
    for layer in reversed(layers):
        width = max(box.width for box in layer)
        for box in layer:
            if not box.columns:
                box.width = width  # an edge runs straight past the widest box
            box.column = x
            box.x = x + width - box.width  # flush right: edges to the next step are short
        x += width + GAP_X
        _stack(layer, [0.0] * len(layer))
        half = (layer[-1].y + layer[-1].height) / 2
        for box in layer:
            box.y -= half
    for _ in range(_SWEEPS):
        for layer in layers:
            _settle(layer, rightwards=True)
        for layer in reversed(layers):
            _settle(layer, rightwards=False)
    top = min((layer[0].y for layer in layers), default=0.0) - MARGIN
    for layer in layers:
        for box in layer:
            box.y -= top
    bottom = max((layer[-1].y + layer[-1].height for layer in layers), default=0.0)
    return x - GAP_X + MARGIN if layers else 2.0 * MARGIN, bottom + MARGIN


def _settle(layer: list[Box], *, rightwards: bool) -> None:
    """Move the boxes of a layer toward their neighbours on a side; keep their order and don't let them overlap."""
    wanted = [_pull(box, attrgetter("middle"), rightwards=rightwards) - box.height / 2 for box in layer]
    _stack(layer, wanted)
    down = [box.y for box in layer]
    # Stack from below, too; the mean of the two keeps the order and the gaps.
    limit = math.inf
    for index in range(len(layer) - 1, -1, -1):
        box = layer[index]
        box.y = min(wanted[index], limit - box.height)
        limit = box.y - GAP_Y
    for box, y in zip(layer, down, strict=True):
        box.y = (box.y + y) / 2


def _stack(layer: list[Box], wanted: Sequence[float]) -> None:
    limit = -math.inf
    for box, y in zip(layer, wanted, strict=True):
        box.y = max(y, limit)
        limit = box.y + box.height + GAP_Y


def _write(title: str, boxes: Sequence[Box], routes: Sequence[Route], width: float, height: float) -> str:
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    font = f'font-family="ui-monospace, DejaVu Sans Mono, Consolas, monospace" font-size="{FONT}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={_quoted(title)} {font}>',
        f"<title>{_escaped(title)}</title>",
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        '<g fill="none" stroke="#7a7a7a" stroke-width="1.2">',
        *_curves(routes),
        "</g>",
    ]
    for box in boxes:
        parts += _drawn(box)
    return "\n".join([*parts, "</svg>", ""])


def _curves(routes: Iterable[Route]) -> Iterator[str]:
    """Return the edges as curves from box to box; edges that run together are drawn once."""
    drawn: dict[tuple[Box, Box, str], None] = {}
    for path, relation in routes:
        drawn.update(((one, other, relation), None) for one, other in pairwise(path))
    for one, other, relation in drawn:
        x, y, to_x, to_y = one.column, one.middle, other.x + other.width, other.middle
        bend = (x - to_x) / 2
        line = f"M{one.x:.1f} {y:.1f}H{x:.1f}C{x - bend:.1f} {y:.1f} {to_x + bend:.1f} {to_y:.1f} {to_x:.1f} {to_y:.1f}"
        if not other.columns:
            line += f"H{other.x:.1f}"
        dashed = ' stroke-dasharray="4 3"' if relation == "called by" else ""
        yield f'<path d="{line}"{dashed}><title>{_escaped(relation)}</title></path>'


def _drawn(box: Box) -> list[str]:
    fill = COLOURS.get(box.kind, STEP_COLOUR if box.is_step else "#ffffff")
    radius = LINE if box.is_step else 3
    stroke = 2.2 if box.is_root else 1
    place = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"'
    style = f'rx="{radius}" fill="{fill}" stroke="#444444" stroke-width="{stroke}"'
    parts = [f"<rect class={_quoted(box.kind)} {place} {style}/>"]
    y = box.y + LINE - 1
    if box.heading:
        parts.append(f'<text x="{box.x + PAD:.1f}" y="{y:.1f}" font-weight="bold">{_escaped(box.heading)}</text>')
        y += LINE
    x = box.x + PAD
    for column in box.columns:
        for index, row in enumerate(column):
            colour = ' fill="#666666"' if row.faint else ""
            parts.append(
                f'<text x="{x:.1f}" y="{y + LINE * index:.1f}"{colour} xml:space="preserve">{_escaped(row.text)}'
                f"<title>{_escaped(row.tooltip)}</title></text>"
            )
        x += max(text_width(row.text) for row in column) + PAD * 2
    return parts


def _escaped(text: str) -> str:
    """Return text escaped for an element; control and invisible characters are shown as escapes."""
    return saxutils.escape(printable(text))


def _quoted(text: str) -> str:
    """Return text as an attribute value, with its quotes."""
    return saxutils.quoteattr(printable(text))

# SPDX-License-Identifier: Apache-2.0
"""The call tree drawn with matplotlib, laid out as :mod:`~cuda_progcache.memo.graph_svg` lays out pictures."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from cuda_progcache.memo.call_tree import Node, to_graph
from cuda_progcache.memo.graph_svg import FONT, arrange

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: By state: the face of a box and its text.
COLOURS = {
    "fresh": ("#1d3557", "#ffffff"),
    "stale": ("#fbbc04", "#000000"),
    "gone": ("#f1f3f5", "#000000"),
    "file": ("#e8f0fe", "#000000"),
}
_LONGEST = 60_000  # pixels: what matplotlib's rasterizer takes


def plot(nodes: Mapping[str, Node], stale: Collection[str], output: str | os.PathLike[str] | None = None) -> Figure:
    """Draw calls and the files they depend on.

    Parameters
    ----------
    nodes : mapping
        Of the call tree.
    stale : collection of str
        Ids of calls with a file that changed since.
    output : path-like, optional
        Save it there too, in the format of its suffix.

    Raises
    ------
    ImportError
        matplotlib isn't installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch
    except ImportError as error:
        raise ImportError(f"plot_cache_graph needs matplotlib: pip install 'cuda-progcache[plot]' ({error})") from error
    boxes, routes, width, height = arrange(to_graph(nodes))
    dpi = float(mpl.rcParams["figure.dpi"])
    size = (min(max(width, 240.0), _LONGEST) / dpi, min(max(height, 80.0), _LONGEST) / dpi)
    figure = Figure(figsize=size)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, size[0] * dpi), ylim=(size[1] * dpi, 0))
    axes.set_axis_off()
    points = FONT * 72 / dpi * 0.8
    if not nodes:
        axes.text(24, 40, "no cached call has been made yet", fontsize=points)
    for path, _ in routes:
        line = [(path[0].x, path[0].middle)]
        for box in path[1:]:
            line += [(box.x + box.width, box.middle), (box.x, box.middle)]
        xs, ys = zip(*line[:-1], strict=True)
        axes.plot(xs, ys, color="#9aa0a6", linewidth=1, zorder=1)
    for box in boxes:
        name = box.ids[0].removeprefix("call:")
        face, ink = COLOURS["file" if box.kind == "file" else _state(nodes[name], name, stale)]
        shape = FancyBboxPatch(
            (box.x, box.y), box.width, box.height, boxstyle="round,pad=0,rounding_size=4", facecolor=face, zorder=2
        )
        axes.add_patch(shape)
        column_x = box.x + box.width / 2 / len(box.columns)
        for column in box.columns:
            text = "\n".join(([box.heading] if box.heading else []) + [row.text for row in column])
            style = {"ha": "center", "va": "center", "family": "monospace", "fontsize": points, "color": ink}
            axes.text(column_x, box.middle, text, zorder=3, **style)
            column_x += box.width / len(box.columns)
    if output is not None:
        figure.savefig(output)
    return figure


def _state(node: Node, name: str, stale: Collection[str]) -> str:
    if name in stale:
        return "stale"
    return "fresh" if node["outfile"] is not None and node["outfile"].exists() else "gone"

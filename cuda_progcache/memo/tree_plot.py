# SPDX-License-Identifier: Apache-2.0
"""A plot of the call tree with matplotlib: callers on the left, the calls and files they used to their right."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from cuda_progcache.memo.call_tree import cache_tree_changed_files, cache_tree_nodes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: By state: the colours of a box and of its text.
COLOURS = {
    "fresh": ("#1d3557", "#ffffff"),
    "stale": ("#fbbc04", "#000000"),
    "gone": ("#f1f3f5", "#000000"),
    "file": ("#e8f0fe", "#000000"),
}
#: Inches: a column's width, a row's height, and the longest side that matplotlib can rasterize at 100 dots per inch.
_COLUMN, _ROW, _LONGEST = 2.6, 0.55, 600.0


def plot_cache_graph(output: str | os.PathLike[str] | None = None, highlight_stale: bool = True) -> Figure:  # noqa: FBT001, FBT002
    """Draw the call tree with matplotlib.

    Parameters
    ----------
    output : path-like, optional
        Save the figure to this file, in the format of its suffix.
    highlight_stale : bool
        Whether calls that depend on a changed file are drawn in amber; if not, the files aren't read.

    Returns
    -------
    matplotlib.figure.Figure
        Navy: the result is saved. Amber: a file has changed. Grey: the saved result is gone. Light blue: a file.

    Raises
    ------
    ImportError
        matplotlib isn't installed (extra: ``plot``).
    """
    try:
        import matplotlib as mpl  # noqa: F401 - if missing, the error names matplotlib itself
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch
    except ImportError as error:
        raise ImportError(f"plot_cache_graph needs matplotlib: pip install 'cuda-progcache[plot]' ({error})") from error
    nodes = cache_tree_nodes()
    stale = cache_tree_changed_files() if highlight_stale else {}
    edges = [(name, child) for name, node in nodes.items() for child in node["children"] if child in nodes]
    edges += [(name, path) for name, node in nodes.items() for path in node["file_hashes"]]
    places = _places(nodes, edges)
    columns = 1 + max((column for column, _ in places.values()), default=0)
    rows = 1 + max((row for _, row in places.values()), default=0)
    figure = Figure(figsize=(min(columns * _COLUMN, _LONGEST), min((rows + 0.5) * _ROW, _LONGEST)))
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, columns), ylim=(rows, -0.5))
    axes.set_axis_off()
    if not nodes:
        axes.text(0.1, 0, "no cached call has been recorded yet")
    for source, target in edges:
        (x, y), (to_x, to_y) = places[source], places[target]
        axes.plot([x + 0.9, to_x + 0.1], [y, to_y], color="#9aa0a6", linewidth=1, zorder=1)
    for name, (x, y) in places.items():
        state = _state(nodes[name], name, stale) if name in nodes else "file"
        face, ink = COLOURS[state]
        axes.add_patch(FancyBboxPatch((x + 0.1, y - 0.3), 0.8, 0.6, boxstyle="round,pad=0", facecolor=face, zorder=2))
        label = f"{nodes[name]['fname']}\n{nodes[name]['hash'][:12]}" if name in nodes else os.path.basename(name)
        axes.text(x + 0.5, y, label, ha="center", va="center", fontsize=8, color=ink, zorder=3)
    if output is not None:
        figure.savefig(output)
    return figure


def _places(nodes: Mapping[str, Any], edges: Collection[tuple[str, str]]) -> dict[str, tuple[int, int]]:
    """Return the column and row of each call and file; a call is to the right of its callers, except in a cycle."""
    waiting = dict.fromkeys([*nodes, *(target for _, target in edges)], 0)
    below: dict[str, list[str]] = {name: [] for name in waiting}
    for source, target in edges:
        waiting[target] += 1
        below[source].append(target)
    column = dict.fromkeys(waiting, 0)
    ready = [name for name, count in waiting.items() if not count]
    while waiting:
        name = ready.pop() if ready else next(iter(waiting))  # only cycles are left: start anywhere
        if waiting.pop(name, None) is None:
            continue
        for target in below[name]:
            if target in waiting:
                column[target] = max(column[target], column[name] + 1)
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)
    filled: dict[int, int] = {}
    places = {}
    for name, place in column.items():
        places[name] = (place, filled.get(place, 0))
        filled[place] = filled.get(place, 0) + 1
    return places


def _state(node: Mapping[str, Any], name: str, stale: Collection[str]) -> str:
    if name in stale:
        return "stale"
    return "fresh" if node["outfile"] is not None and node["outfile"].exists() else "gone"

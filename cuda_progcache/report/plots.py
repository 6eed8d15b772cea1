# SPDX-License-Identifier: Apache-2.0
"""The plots of a report: SVG by matplotlib, with text and axes in the text colour of the page."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.errors import ProgCacheError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cuda_progcache.report.data import Report

#: A placeholder for the page's text colour until the SVG is written.
_INK = "#010203"
#: Okabe and Ito's palette without black: distinct for the colour-blind, on light and dark backgrounds.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00")
_KERNELS = 12


class Plot(NamedTuple):
    """A plot, its title, and a summary for screen readers."""

    title: str
    svg: str
    summary: str


def plots(report: Report) -> list[Plot]:
    """Draw the plots of a report; plots without data are left out.

    Raises
    ------
    ProgCacheError
        matplotlib isn't installed; the message names the extra to install.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ProgCacheError(
            f"the report's plots need matplotlib: pip install 'cuda-progcache[plot]', or use --no-plots ({error})"
        ) from error
    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": "cuda-progcache", "font.family": "sans-serif", "font.size": 10,
        "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
        "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "text.parse_math": False,
        "patch.force_edgecolor": True, "patch.edgecolor": _INK, "patch.linewidth": 0.6,
    }  # fmt: skip
    with mpl.rc_context(style):
        return [one for one in (_lookups(report), _work(report), _cost(report), _why(report)) if one is not None]


def _draw(title: str, height: float, draw: Callable[[Axes], str]) -> Plot:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height), layout="constrained")
    summary = draw(figure.add_subplot())
    written = io.StringIO()
    metadata: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(written, format="svg", transparent=True, metadata=metadata)
    return Plot(title, _inline(written.getvalue(), re.sub(r"\W+", "-", title.lower())), summary)


def _inline(svg: str, prefix: str) -> str:
    """Return an SVG document for embedding in a page: unique ids, the page's text colour, no XML namespaces."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\1{prefix}-", svg)
    svg = svg.replace("xlink:href", "href").replace(_INK, "currentColor")
    head = re.sub(r'\s(?:xmlns(?::\w+)?|width|height|version)="[^"]*"', "", svg[: svg.index(">")])
    return f'{head} aria-hidden="true" focusable="false"{svg[svg.index(">") :]}'


def _lookups(report: Report) -> Plot | None:
    dated = [one for one in report.lookups if one.seconds]
    if not dated:
        return None

    def draw(axes: Axes) -> str:
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        starts: list[Any] = [datetime.fromtimestamp(one.start, UTC) for one in dated]
        width: Any = timedelta(seconds=dated[0].seconds)
        hits, misses = ([getattr(one, kind) for one in dated] for kind in ("hits", "misses"))
        axes.bar(starts, hits, width, align="edge", color=_COLOURS[4], label="hits")
        axes.bar(starts, misses, width, hits, align="edge", color=_COLOURS[1], label="misses")
        axes.set_ylabel("lookups")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        rate = axes.twinx()
        middles: list[Any] = [start + width / 2 for start in starts]
        rate.plot(middles, [one.hit_rate for one in dated], "o-", color=_INK, markersize=3, label="hit rate")
        rate.set_ylim(0, 1.05)
        rate.yaxis.set_major_formatter(PercentFormatter(1.0))
        rate.spines["right"].set_visible(True)
        _dates(axes)
        if axes.figure is not None:
            axes.figure.legend(loc="outside upper center", fontsize="small", ncols=3)
        lowest = min(dated, key=lambda one: one.hit_rate)
        when = datetime.fromtimestamp(lowest.start, UTC)
        return f"The lowest hit rate is {lowest.hit_rate:.1%}, from {when:%Y-%m-%d %H:%M} UTC; the table has them all."

    return _draw("Hit rate over time", 2.8, draw)


def _dates(axes: Axes) -> None:
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(maxticks=6)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]


def _work(report: Report) -> Plot | None:
    if not report.periods:
        return None

    def draw(axes: Axes) -> str:
        starts: list[Any] = [datetime.fromtimestamp(one.start, UTC) for one in report.periods]
        total = list(accumulate(one.seconds for one in report.periods))
        axes.fill_between(starts, total, step="post", color=_COLOURS[0], alpha=0.35, linewidth=0)
        axes.step(starts, total, where="post", color=_COLOURS[0])
        axes.set_ylim(bottom=0)
        axes.set_ylabel("total seconds of compiling")
        _dates(axes)
        return f"The programs kept since {starts[0]:%Y-%m-%d %H:%M} UTC took {total[-1]:,.1f} seconds to compile."

    return _draw("Compile work kept, over time", 2.8, draw)


def _cost(report: Report) -> Plot | None:
    by_name: dict[str, float] = defaultdict(float)
    for one in report.costs:
        by_name[one.name] += one.seconds
    names = sorted(by_name, key=lambda name: -by_name[name])[:_KERNELS]
    if not names:
        return None

    def draw(axes: Axes) -> str:
        archs = sorted({one.arch for one in report.costs}, key=lambda arch: (len(arch), arch))
        seconds = {(one.name, one.arch): one.seconds for one in report.costs}
        left = [0.0] * len(names)
        rows = range(len(names))
        for at, arch in enumerate(archs):
            widths = [seconds.get((name, arch), 0.0) for name in names]
            hatch = None if at < len(_COLOURS) else "//"
            axes.barh(rows, widths, 0.7, left, color=_COLOURS[at % len(_COLOURS)], label=arch, hatch=hatch)
            left = [before + more for before, more in zip(left, widths, strict=True)]
        _label(axes, names)
        axes.set_xlabel("seconds of compiling")
        if axes.figure is not None:
            axes.figure.legend(loc="outside upper center", fontsize="small", ncols=6)
        return f"The costliest is {names[0]} with {by_name[names[0]]:,.1f} seconds; the table has them all."

    return _draw("Cost by kernel and architecture", 1.4 + 0.32 * len(names), draw)


def _why(report: Report) -> Plot | None:
    words = list(report.why)[:_KERNELS]
    if not words:
        return None

    def draw(axes: Axes) -> str:
        from matplotlib.ticker import MaxNLocator

        axes.barh(range(len(words)), [report.why[word] for word in words], 0.7, color=_COLOURS[0])
        _label(axes, words)
        axes.set_xlabel("programs")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return "; ".join(f"{word}: {report.why[word]:,}" for word in words)

    return _draw("Misses by what had changed", 1.2 + 0.32 * len(words), draw)


def _label(axes: Axes, names: list[str]) -> None:
    cut = [name if len(name) <= 26 else f"{name[:25]}…" for name in names]
    axes.set_yticks(range(len(cut)), cut)
    axes.invert_yaxis()

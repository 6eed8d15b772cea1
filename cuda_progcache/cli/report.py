# SPDX-License-Identifier: Apache-2.0
"""``report``: write a report on the cache as one HTML file."""

from __future__ import annotations

from pathlib import Path

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.app import NoEntryError
from cuda_progcache.cli.progress import progress
from cuda_progcache.cli.session import OutputFile, Session, common_options, library_at, manifest_option

REPORT_JSON = """
--json: {"root": str, "path": str, "bytes": int (of the file), "programs": int, "listings": int}
"""


@click.command("report", short_help="Write a report on the cache as one HTML file.", epilog=REPORT_JSON)
@click.option(
    "-o",
    "--output",
    "out",
    type=OutputFile(),
    metavar="FILE",
    default="report.html",
    show_default=True,
    help="The HTML file to write.",
)
@click.option(
    "--listings",
    "listed",
    type=click.IntRange(min=0),
    default=20,
    show_default=True,
    metavar="N",
    help="Include machine code, source and provenance of the N most recently used programs.",
)
@click.option("--no-plots", is_flag=True, help="Leave out the plots, which need matplotlib.")
@manifest_option
@common_options
@click.pass_obj
def report_command(session: Session, out: Path, listed: int, *, no_plots: bool, manifest: Path | None) -> None:
    """Write a report on the cache as one HTML file, which a browser shows without network access.

    It contains totals, the hit rate over time, the cost by kernel and architecture, the reasons for compiles, the
    resources of each variant on each architecture, a table of all programs that can be searched and sorted, and a page
    for each program. Machine code needs nvdisasm.
    """
    from cuda_progcache import __version__
    from cuda_progcache.report import data, listings, page, plots

    cache = session.existing_cache()
    if cache is None:
        raise NoEntryError(f"nothing to report: there is no readable cache at {session.root()}")
    found = data.collect(cache, _cap(session))
    drawn = [] if no_plots else plots.plots(found)
    last = sorted(found.programs, key=lambda one: -one.last_used)[:listed]
    made = []
    with progress("reading machine code") as told:
        told(0, len(last), 0)
        for listing in listings.listings(cache, [one.digest for one in last], library_at(manifest).path):
            made.append(listing)
            told(len(made), len(last), 0)
    text = page.write(found, made, drawn, __version__).encode("utf-8")
    out.write_bytes(text)
    if session.json:
        output.emit({
            "root": session.root(), "path": str(out), "bytes": len(text), "programs": len(found.programs),
            "listings": len(made),
        })  # fmt: skip
    else:
        output.note_line(f"{out}: {output.plural(len(found.programs), 'program')}, {output.size(len(text))}")


def _cap(session: Session) -> int | None:
    """Return the size cap of the default cache; None for another cache, whose cap isn't recorded."""
    from cuda_progcache.store.default_cap import default_max_size

    return default_max_size() if session.cache_dir is None else None

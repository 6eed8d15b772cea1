# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file: a template, its CSS and JavaScript, and the data in compressed chunks.

The file loads nothing: its content security policy allows only its own script, by digest, and embedded pictures. The
rows of the table and the pages of entries are JSON, compressed with gzip and encoded in base64; only the summary shows
text from the cache directly, escaped. A chunk is decompressed when it is first needed.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cuda_progcache._util.amounts import seconds, size

if TYPE_CHECKING:
    from cuda_progcache.report.data import Program, Report
    from cuda_progcache.report.plots import Plot

#: The number of programs per chunk of records.
CHUNK = 200
#: The most bytes that all listings may take in the file; a listing that no longer fits is left out.
LISTINGS_LIMIT = 12_000_000
#: The most rows of a table in the summary.
_ROWS = 15


def write(
    report: Report,
    listings: Iterable[tuple[str, dict[str, Any]]] = (),
    plots: Sequence[Plot] = (),
    version: str = "",
) -> str:
    """Write a report.

    Parameters
    ----------
    report : Report
    listings : iterable of (str, dict)
        Digests and listings, as :func:`cuda_progcache.report.listings.listings` yields them.
    plots : sequence of Plot
    version : str
        The version of cuda_progcache.

    Returns
    -------
    str
        The HTML.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    here = files(__package__)
    script = here.joinpath("page.js").read_text("utf-8")
    environment = Environment(
        loader=PackageLoader("cuda_progcache.report", ""), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(size=size, seconds=seconds, moment=moment)
    listed = _within(listings)
    return environment.get_template("page.html.j2").render(
        report=report,
        plots=plots,
        version=version,
        rows=_ROWS,
        css=here.joinpath("page.css").read_text("utf-8"),
        script=script,
        script_digest=base64.b64encode(sha256(script.encode()).digest()).decode(),
        table=packed(_table(report, [digest for digest, _ in listed])),
        chunks=[
            packed(_chunk(report.programs[start : start + CHUNK])) for start in range(0, len(report.programs), CHUNK)
        ],
        listings=listed,
    )


def packed(value: object) -> str:
    """Return a value as JSON, compressed and encoded in base64."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode("ascii"), 6, mtime=0)).decode("ascii")


def _within(listings: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, str]]:
    """Return the listings that fit into the file, packed."""
    kept: list[tuple[str, str]] = []
    room = LISTINGS_LIMIT
    for digest, listing in listings:
        text = packed(listing)
        if len(text) <= room:
            kept.append((digest, text))
            room -= len(text)
    return kept


class _Strings:
    """A table of unique strings; a call returns the index of a string."""

    def __init__(self) -> None:
        self.all: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.all.setdefault(text, len(self.all))


def _table(report: Report, listed: Sequence[str]) -> dict[str, Any]:
    """Return a row for each program and each kernel; strings are given as indices into ``strings``."""
    number = _Strings()
    rows, kernels = [], []
    for at, one in enumerate(report.programs):
        rows.append([
            one.digest, number(one.name), number(one.parameters), number(one.target), number(one.arch), one.size,
            round(one.created), round(one.last_used), None if one.seconds is None else round(one.seconds, 4),
            number(", ".join(one.why)),
        ])  # fmt: skip
        kernels += [
            [at, number(k.name), k.registers, k.spill_store_bytes, k.spill_load_bytes, k.stack_bytes, k.shared_bytes,
             k.code_bytes, k.block_size, None if k.occupancy is None else round(k.occupancy, 4),
             number(", ".join(k.limiters).replace("_", " "))]
            for k in one.kernels
        ]  # fmt: skip
    return {
        "made": report.made,
        "chunk": CHUNK,
        "strings": list(number.all),
        "rows": rows,
        "kernels": kernels,
        "listed": listed,
    }


def _chunk(programs: Iterable[Program]) -> dict[str, Any]:
    """Return what the pages of programs show beyond their rows; pairs are indices into ``pairs``, as most recur."""
    pairs: dict[tuple[str, str], int] = {}

    def numbers(found: Iterable[tuple[str, str]]) -> list[int]:
        return [pairs.setdefault(one, len(pairs)) for one in found]

    records = [
        {
            "reasons": one.reasons,
            "components": numbers(one.components),
            "headers": numbers(one.headers),
            "toolchain": numbers(one.toolchain),
            "symbols": numbers(one.symbols),
            "log": one.log,
        }
        for one in programs
    ]
    return {"pairs": list(pairs), "records": records}


def moment(value: float) -> str:
    """Format a time: ``2026-01-02 03:04 UTC``."""
    return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M} UTC"

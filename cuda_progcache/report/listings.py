# SPDX-License-Identifier: Apache-2.0
"""Listings of single entries for their pages in a report: machine code, PTX, source and provenance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuda_progcache.errors import InspectError
from cuda_progcache.report.data import visible

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cuda_progcache.inspect import Instruction
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.compile_record import CompileRecord
    from cuda_progcache.store.file_stream import FileStreamProgramCache

#: The most instructions of a kernel, and lines of PTX or of a source, to show.
LONGEST = 5000
_WORKERS = 4


def listings(
    cache: FileStreamProgramCache, digests: Iterable[str], library: Path | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the listings of entries, in the order given; entries that no longer exist are skipped.

    Parameters
    ----------
    cache : FileStreamProgramCache
    digests : iterable of str
    library : Path, optional
        The directory with the templates of kernels.

    Yields
    ------
    (str, dict)
        The digest and the listing, as JSON values: ``kernels`` (name to ``code``, a list of ``[offset, labels, text,
        live, file, line]``, and ``lines``, the code normalised for comparison), ``sources`` (name to lines), ``ptx``
        (lines or None), ``notes`` (what is missing, and why) and ``provenance`` (``svg`` and ``steps``, or None).
    """

    def made(digest: str) -> dict[str, Any] | None:
        try:
            entry = cache.info(digest)
        except KeyError:
            return None
        return _listing(cache, entry, library)

    wanted = list(digests)
    with ThreadPoolExecutor(_WORKERS) as workers:  # threads, since they only wait for nvdisasm
        for digest, found in zip(wanted, workers.map(made, wanted), strict=True):
            if found is not None:
                yield digest, found


def _listing(cache: FileStreamProgramCache, entry: EntryInfo, library: Path | None) -> dict[str, Any]:
    from cuda_progcache.service.comparison import binary_of

    found: dict[str, Any] = {"kernels": {}, "sources": {}, "ptx": None, "notes": [], "provenance": None}
    about = entry.about
    try:
        data = binary_of(entry)
        if data.startswith(b"\x7fELF"):
            _add_machine_code(found, data, about, library)
        elif about.target_type == "ptx":
            found["ptx"] = _cut(found, "PTX", data.rstrip(b"\0").decode("utf-8", "replace").splitlines())
        else:
            found["notes"].append(f"No listing is available for a {visible(about.target_type or 'unknown')} binary.")
    except InspectError as error:
        found["notes"].append(visible(error))
    if found["ptx"] is None:
        found["notes"].append("The PTX isn't kept: this program was compiled straight to a binary. Compile it to ptx.")
    found["provenance"] = _provenance(cache, entry.digest)
    return found


def _add_machine_code(found: dict[str, Any], data: bytes, about: CompileRecord, library: Path | None) -> None:
    from cuda_progcache.inspect import instructions, normalised

    asked = about.expressions
    files: dict[str, None] = {}
    for symbol, code in instructions(data).items():
        files.update(dict.fromkeys(one.source.file for one in code if one.source is not None))
        listed = [_instruction(one) for one in code[:LONGEST]]
        if len(code) > LONGEST:
            found["notes"].append(f"{visible(symbol)}: only the first {LONGEST:,} of {len(code):,} instructions shown.")
        lines = [visible(line) for line in normalised(code)[:LONGEST]]
        found["kernels"][visible(asked.get(symbol, symbol))] = {"code": listed, "lines": lines}
    if not files:
        found["notes"].append("The binary has no line information, so no source is shown: compile with lineinfo.")
    templates = {} if about.kernel is None else dict(about.kernel.templates)
    absent = []
    for file in files:
        source = _source(Path(file).name, templates, library)
        if source is None:
            absent.append(visible(Path(file).name))
        else:
            found["sources"][visible(file)] = _cut(found, visible(file), source)
    if absent:
        found["notes"].append(
            f"The source of {', '.join(absent)} isn't available: the cache keeps no sources, and a template is shown "
            "only if its file is unchanged."
        )


def _instruction(one: Instruction) -> list[Any]:
    labels = [visible(label) for label in one.labels if not label.startswith(".text.")]
    file, line = one.source or (None, None)
    return [one.offset, labels, visible(one.text), one.live, None if file is None else visible(file), line]


def _source(name: str, templates: Mapping[str, str], library: Path | None) -> list[str] | None:
    """Return the lines of a template; None unless the library has it with the content that was compiled."""
    if library is None or name not in templates:
        return None
    try:
        data = (library / name).read_bytes()
    except OSError:
        return None
    return data.decode("utf-8", "replace").splitlines() if sha256(data).hexdigest() == templates[name] else None


def _cut(found: dict[str, Any], what: str, lines: list[str]) -> list[str]:
    if len(lines) > LONGEST:
        found["notes"].append(f"{what}: only the first {LONGEST:,} of {len(lines):,} lines shown.")
    return [visible(line, lines=True) for line in lines[:LONGEST]]


def _provenance(cache: FileStreamProgramCache, digest: str) -> dict[str, Any] | None:
    """Return the provenance graph of an entry: a picture, and each dependency in words."""
    from cuda_progcache.provenance.picture import to_svg
    from cuda_progcache.provenance.walk import walk

    try:
        graph = walk(digest, cache)
    except KeyError:
        return None
    nodes = graph.nodes
    steps = [
        [f"{nodes[edge.source].kind} {visible(nodes[edge.source].label)}", visible(edge.relation),
         f"{nodes[edge.target].kind} {visible(nodes[edge.target].label)}"]
        for edge in graph.edges[:400]
    ]  # fmt: skip
    return {"svg": to_svg(graph, visible(nodes[graph.root or digest].label)), "steps": steps}

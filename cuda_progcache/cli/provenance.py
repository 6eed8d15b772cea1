# SPDX-License-Identifier: Apache-2.0
"""``provenance`` and ``affected``: trace a result to its inputs, and a file to the results that depend on it."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cuda_progcache._util.digest import is_digest_prefix
from cuda_progcache.cli import output
from cuda_progcache.cli.app import NoEntryError
from cuda_progcache.cli.completion import programs
from cuda_progcache.cli.entries import entry_json, find_entry
from cuda_progcache.cli.session import OutputFile, Session, common_options

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import BaseCache
    from cuda_progcache.provenance.affected import Affected
    from cuda_progcache.provenance.graph import Graph
    from cuda_progcache.store.base import ProgramCacheResource

PROVENANCE_JSON = """
--json: {"format": 1, "start": id, "nodes": [{"id", "kind", "label", "digest", and fields that depend on the kind}],
"edges": [{"from", "to", "relation": "used", "made by" or "called by"}]}, as with --format json; an edge points to the
dependency. Kinds of nodes: binary, source, template, header, tool, file, value, input; and the steps render, compile,
link, analysis, prewarm, call, gone (its record is missing)

\b
Formats:
  text   a tree
  json   the graph as JSON
  dot    for Graphviz: cuda-progcache provenance 3f2a91c0 --format dot | dot -Tpdf > graph.pdf
  svg    a picture; needs no Graphviz
  prov   W3C PROV-JSON
  slsa   an in-toto Statement v1 with SLSA Provenance v1; with --sign, in a DSSE envelope
"""
_FORMATS = ("text", "json", "dot", "svg", "prov", "slsa")


_calls_option = click.option(
    "--calls",
    "directories",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Also search DIR, where memoize or cache_file keeps results; repeatable. --cache-dir may also be such a "
    "directory.",
)


@click.command("provenance", short_help="Trace a program or another result to its inputs.", epilog=PROVENANCE_JSON)
@click.argument("key", shell_complete=programs)
@click.option("--format", "form", type=click.Choice(_FORMATS), help="The output format. [default: text]")
@click.option(
    "--sign",
    "key_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="KEY.PEM",
    help="Sign the statement with this private key (only with --format slsa; needs cuda-progcache[sign]).",
)
@click.option("-o", "--output", "out", type=OutputFile(), metavar="FILE", help="Write to this file.")
@click.option(
    "--all", "everything", is_flag=True, help="List every header; for a prewarm run, also trace each of its programs."
)
@_calls_option
@common_options
@click.pass_obj
def provenance_command(
    session: Session,
    key: str,
    form: str | None,
    key_file: Path | None,
    out: Path | None,
    directories: tuple[Path, ...],
    *,
    everything: bool,
) -> None:
    """Trace a result to its source, template, parameters, headers and compiler files, with their digests.

    KEY is a prefix of a program's digest (four digits or more, as list prints them), a name such as
    'softmax?dtype=float16@sm_90', or a prefix of a call's key, as this command prints it. A call is a rendering, an
    analysis, a prewarm run or a call of a memoized function.
    """
    if session.json:
        if form not in {None, "json"}:
            raise click.UsageError(f"--json means --format json and can't be combined with --format {form}")
        form = "json"
    if key_file is not None and form != "slsa":
        raise click.UsageError("--sign needs --format slsa")
    graph, store = _walk(session, key, directories, whole=everything)
    text = _written(graph, store, form or "text", key_file, everything=everything, to_file=out is not None)
    if text is None:
        return
    if out is None:
        output.write(text)
    else:
        out.write_text(text, encoding="utf-8")


def _walk(
    session: Session, key: str, directories: tuple[Path, ...], *, whole: bool
) -> tuple[Graph, ProgramCacheResource | None]:
    """Return the graph of the result that a key refers to, and the store of its programs.

    Raises
    ------
    NoEntryError
        No program or call matches.
    AmbiguousDigestError
        More than one matches.
    """
    from cuda_progcache.provenance.walk import walk

    wanted = key.strip().lower()
    store, calls = _places(session, directories)
    if not is_digest_prefix(wanted):
        if store is None:
            raise click.BadParameter(f"{key!r} isn't a digest prefix (four or more hex digits)", param_hint="KEY")
        wanted = find_entry(session, key, newest=True, looking=True).digest
    try:
        return walk(wanted, store, calls, whole=whole), store
    except KeyError:
        where = " or ".join(str(place) for place in dict.fromkeys([session.root(), *directories]))
        raise NoEntryError(
            f"no program or call has a digest that starts with {wanted} in {where}; cuda-progcache list shows the "
            f"programs, and --calls DIR adds a directory of memoized calls"
        ) from None


def _places(session: Session, directories: tuple[Path, ...]) -> tuple[ProgramCacheResource | None, list[BaseCache]]:
    """Return the store of programs, if any, and the other places where calls are recorded."""
    from cuda_progcache.provenance.places import holds_programs, memoized_calls, recorded_calls

    root = session.root()
    calls = memoized_calls(root)
    # A directory that has only memoized calls isn't opened as a store: that would create a store in it.
    store = None if calls and not holds_programs(root) else session.existing_cache(looking=True)
    for directory in directories:
        calls += recorded_calls(directory)
    return store, calls


def _written(
    graph: Graph, store: ProgramCacheResource | None, form: str, key_file: Path | None, *, everything: bool,
    to_file: bool,
) -> str | None:  # fmt: skip
    """Return the graph in a format; None if it has been printed."""
    from cuda_progcache._util import dsse
    from cuda_progcache.provenance import export

    root = graph.nodes[graph.root]
    if form == "slsa":
        if root.kind != "binary" or store is None:
            raise click.UsageError(f"--format slsa needs a program; this is a {root.kind}: {root.label}")
        statement = export.to_slsa(store, store.info(root.detail["entry"]))
        signed = statement if key_file is None else dsse.sign(statement, dsse.signer_from_pem(str(key_file)))
        return json.dumps(signed, indent=2) + "\n"
    if form == "dot":
        return export.to_dot(graph)
    if form == "svg":
        from cuda_progcache.provenance.picture import to_svg

        return to_svg(graph, f"{root.label} {str(root.detail.get('entry') or root.detail.get('key') or '')[:12]}")
    if form == "text":
        from cuda_progcache.cli.provenance_tree import tree_of

        made = tree_of(graph, everything=everything)
        if to_file:
            return output.plain(made)
        output.show(made)
        return None
    document = export.to_prov(graph) if form == "prov" else export.to_json(graph)
    return json.dumps(document, indent=2) + "\n"


AFFECTED_JSON = """
--json: {"file": path, "affected": [the fields that list gives for an entry, and "as" ("header", "template", "tool",
"source", or "input": through a linked binary), "named" (the file's name in the record), "current" (bool: whether it was
compiled with the file's current content, so that an edit invalidates it)], "calls": [{"key", "name", "as" ("file", or
"call": through a program or call whose result it used), "named", "current"}]}
"""


@click.command("affected", short_help="List the programs and calls that depend on a file.", epilog=AFFECTED_JSON)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Print only the digests, for scripts.")
@_calls_option
@common_options
@click.pass_obj
def affected_command(session: Session, file: Path, directories: tuple[Path, ...], *, quiet: bool) -> None:
    """List the programs and memoized calls that depend on FILE, and that an edit of FILE would invalidate.

    FILE is a header, a template, a source or a compiler file. The list has the programs made from FILE, the programs
    that they were linked into, and the memoized calls that read FILE or used such a program. The column "content" shows
    whether FILE still has the content that was used. If FILE no longer exists, programs are matched by its name alone.
    """
    from cuda_progcache.provenance.affected import affected

    store, calls = _places(session, directories)
    found = affected(store, file, calls)
    if session.json:
        output.emit(_affected_json(file, found))
    elif quiet:
        output.write("".join(f"{hit.key}\n" for hit in found))
    elif not found and store is None and not calls:
        return  # existing_cache has already printed that there is no cache
    elif not found:
        output.note_line(f"no program or call in {session.root()} depends on {file}")
    else:
        _show_affected(file, found)


def _affected_json(file: Path, found: Sequence[Affected]) -> dict[str, object]:
    programs: list[dict[str, object]] = []
    calls: list[dict[str, object]] = []
    for hit in found:
        about = {"as": hit.kind, "named": hit.name, "current": hit.current}
        if hit.entry is None:
            calls.append({"key": hit.key, "name": hit.label, **about})
        else:
            programs.append({**entry_json(hit.entry), **about})
    return {"file": os.path.abspath(file), "affected": programs, "calls": calls}


def _show_affected(file: Path, found: Sequence[Affected]) -> None:
    digits = output.prefix_length(hit.key for hit in found)
    made = output.table(("digest", "name", "target", "arch", "as", "named", "content"))
    for hit in found:
        about = None if hit.entry is None else hit.entry.about
        target, arch = ("call", "-") if about is None else (about.target_type or "-", about.arch or "-")
        content = "current" if hit.current else output.text("different", "yellow")
        key, name, named = hit.key[:digits], output.text(hit.label), output.text(hit.name)
        made.add_row(key, name, target, arch, hit.kind, named, content)
    output.show(made)
    kinds = Counter(hit.current and ("call" if hit.entry is None else "program") for hit in found)
    calls = f" and {output.plural(kinds['call'], 'memoized call')}" if kinds["call"] else ""
    others = f"; {kinds[False]:,} used different content under this name" if kinds[False] else ""
    output.note_line(f"editing {file} invalidates {output.plural(kinds['program'], 'program')}{calls}{others}")

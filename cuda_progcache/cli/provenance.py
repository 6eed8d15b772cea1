# SPDX-License-Identifier: Apache-2.0
"""``provenance`` and ``affected``: from a result to all it came from, and from a file to all that came from it."""

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
--json: {"format": 1, "start": id, "nodes": [{"id", "kind", "label", "digest", and what is known of its kind}],
"edges": [{"from", "to", "relation": "used", "made by" or "called by"}]}, as --format json; an edge points at what is
depended on. Kinds: binary, source, template, header, tool, file, value, input; and steps: render, compile, link,
analysis, prewarm, call, gone (its record isn't here)

\b
Formats:
  text   a tree, for people
  json   the graph
  dot    for Graphviz: cuda-progcache provenance 3f2a91c0 --format dot | dot -Tpdf > graph.pdf
  svg    a picture, drawn here
  prov   W3C PROV-JSON
  slsa   in-toto Statement v1 with SLSA Provenance v1; with --sign a DSSE envelope around it
"""
_FORMATS = ("text", "json", "dot", "svg", "prov", "slsa")


_calls_option = click.option(
    "--calls",
    "directories",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="A directory where memoize or cache_file keeps results; repeatable. --cache-dir may be one, too.",
)


@click.command(
    "provenance", short_help="Everything that a program or another result was made from.", epilog=PROVENANCE_JSON
)
@click.argument("key", shell_complete=programs)
@click.option("--format", "form", type=click.Choice(_FORMATS), help="What to print. [default: text]")
@click.option(
    "--sign",
    "key_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="KEY.PEM",
    help="Sign the statement with this private key (only for slsa; needs cuda-progcache[sign]).",
)
@click.option("-o", "--output", "out", type=OutputFile(), metavar="FILE", help="Write to this file.")
@click.option(
    "--all", "everything", is_flag=True, help="List every header; for a prewarm run, go on from each program."
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
    """Walk from a result to its source, template, parameters, headers and compiler files, with their digests.

    KEY is the start of a program's digest, as list prints it (four digits or more), or its name, such as
    'softmax?dtype=float16@sm_90'; or the start of the key of another call that this command prints: a rendering, an
    analysis, a prewarm run, or a call of a memoized function.
    """
    if session.json:
        if form not in {None, "json"}:
            raise click.UsageError(f"--json is --format json; it doesn't go with --format {form}")
        form = "json"
    if key_file is not None and form != "slsa":
        raise click.UsageError("--sign goes with --format slsa")
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
    """Find what a key begins, and walk from there.

    Raises
    ------
    NoEntryError
        There is nothing.
    AmbiguousDigestError
        There is more than one.
    """
    from cuda_progcache.provenance.walk import walk

    wanted = key.strip().lower()
    store, calls = _places(session, directories)
    if not is_digest_prefix(wanted):
        if store is None:
            raise click.BadParameter(f"{key!r} isn't the start of a digest: four or more hex digits", param_hint="KEY")
        wanted = find_entry(session, key, newest=True, looking=True).digest
    try:
        return walk(wanted, store, calls, whole=whole), store
    except KeyError:
        where = " or ".join(str(place) for place in dict.fromkeys([session.root(), *directories]))
        raise NoEntryError(
            f"no program and no call starts with {wanted} in {where}; cuda-progcache list prints the programs, and "
            f"--calls DIR adds a directory of memoized calls"
        ) from None


def _places(session: Session, directories: tuple[Path, ...]) -> tuple[ProgramCacheResource | None, list[BaseCache]]:
    """The programs, and where else calls are recorded."""
    from cuda_progcache.provenance.places import holds_programs, memoized_calls, recorded_calls

    root = session.root()
    calls = memoized_calls(root)
    # A directory of memoized calls alone: opening it as a store would make one of it.
    store = None if calls and not holds_programs(root) else session.existing_cache(looking=True)
    for directory in directories:
        calls += recorded_calls(directory)
    return store, calls


def _written(
    graph: Graph, store: ProgramCacheResource | None, form: str, key_file: Path | None, *, everything: bool,
    to_file: bool,
) -> str | None:  # fmt: skip
    """A graph in a format; None: it has been shown."""
    from cuda_progcache._util import dsse
    from cuda_progcache.provenance import export

    root = graph.nodes[graph.root]
    if form == "slsa":
        if root.kind != "binary" or store is None:
            raise click.UsageError(f"--format slsa is about a program; this is a {root.kind}: {root.label}")
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
--json: {"file": path, "affected": [the fields that list gives of an entry, and "as" ("header", "template", "tool",
"source", or "input": through a binary that was linked in), "named" (as its record calls it), "current" (bool: it was
compiled with what the file holds now, so that an edit invalidates it)], "calls": [{"key", "name", "as" ("file", or
"call": through a program or call whose result it used), "named", "current"}]}
"""


@click.command(
    "affected", short_help="The programs and calls that an edit of a file would invalidate.", epilog=AFFECTED_JSON
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Print the digests alone, for scripts.")
@_calls_option
@common_options
@click.pass_obj
def affected_command(session: Session, file: Path, directories: tuple[Path, ...], *, quiet: bool) -> None:
    """List what an edit of FILE would invalidate; FILE is a header, a template, a source, or a file of a compiler.

    Listed are the programs that were made from it, those that they were linked into, and the memoized calls that read
    FILE or used such a program. If FILE doesn't exist any more, its name alone decides.
    """
    from cuda_progcache.provenance.affected import affected

    store, calls = _places(session, directories)
    found = affected(store, file, calls)
    if session.json:
        output.emit(_affected_json(file, found))
    elif quiet:
        output.write("".join(f"{hit.key}\n" for hit in found))
    elif not found and store is None and not calls:
        return  # that there is no cache has been said
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
        content = "as it is" if hit.current else output.text("another", "yellow")
        key, name, named = hit.key[:digits], output.text(hit.label), output.text(hit.name)
        made.add_row(key, name, target, arch, hit.kind, named, content)
    output.show(made)
    kinds = Counter(hit.current and ("call" if hit.entry is None else "program") for hit in found)
    calls = f" and {output.plural(kinds['call'], 'memoized call')}" if kinds["call"] else ""
    others = f"; {kinds[False]:,} had other content under this name" if kinds[False] else ""
    output.note_line(f"an edit of {file} invalidates {output.plural(kinds['program'], 'program')}{calls}{others}")

# SPDX-License-Identifier: Apache-2.0
"""``provenance`` and ``affected``: from a program to all it came from, and from a file to all that came from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.entries import entry_json, find_entry, parameters_text, program_name
from cuda_progcache.cli.session import Session, common_options

if TYPE_CHECKING:
    from rich.tree import Tree

    from cuda_progcache.memo.provenance import Graph, Node
    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource

PROVENANCE_JSON = """\b
--json: {"format": 1, "root": id, "nodes": [{"id", "kind", "label", "digest", and what is known of its kind}],
"edges": [{"from", "to", "relation": "used", "made by" or "called by"}]}, as --format json; an edge points at what is
depended on

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


@click.command("provenance", short_help="All that a program came from.", epilog=PROVENANCE_JSON)
@click.argument("key")
@click.option("--format", "form", type=click.Choice(_FORMATS), help="What to print. [default: text]")
@click.option(
    "--sign",
    "key_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="KEY.PEM",
    help="Sign the statement with this private key (slsa alone; needs the extra: sign).",
)
@click.option("-o", "--output", "out", type=click.Path(path_type=Path), metavar="OUT", help="Write to this file.")
@common_options
@click.pass_obj
def provenance_command(session: Session, key: str, form: str | None, key_file: Path | None, out: Path | None) -> None:
    """Walk from a program to its source, template, parameters, headers and compiler files, with their digests.

    KEY is the start of its digest, as list prints it.
    """
    if session.json:
        if form not in {None, "json"}:
            raise click.UsageError(f"--json is --format json; it doesn't go with --format {form}")
        form = "json"
    if key_file is not None and form != "slsa":
        raise click.UsageError("--sign goes with --format slsa")
    entry = find_entry(session, key)
    cache = session.existing_cache()
    assert cache is not None  # noqa: S101 - find_entry found something in it
    if form in {None, "text"} and out is None:
        output.show(_tree(cache, entry))
        return
    text = _written(cache, entry, form or "text", key_file)
    if out is None:
        output.write(text)
    else:
        out.write_text(text, encoding="utf-8")


def _written(cache: ProgramCacheResource, entry: EntryInfo, form: str, key_file: Path | None) -> str:
    from cuda_progcache.memo import export
    from cuda_progcache.memo.provenance import program_graph

    if form == "slsa":
        statement = export.to_slsa(cache, entry)
        signed = statement if key_file is None else export.to_dsse(statement, export.signer_from_pem(str(key_file)))
        return json.dumps(signed, indent=2) + "\n"
    graph = program_graph(cache, entry.digest)
    if form == "dot":
        return export.to_dot(graph)
    if form == "svg":
        from cuda_progcache.memo.graph_svg import to_svg

        return to_svg(graph, f"{program_name(entry.record)} {entry.digest[:12]}")
    if form == "text":
        return output.plain(_tree(cache, entry))
    document = export.to_prov(graph) if form == "prov" else export.to_json(graph)
    return json.dumps(document, indent=2) + "\n"


def _tree(cache: ProgramCacheResource, entry: EntryInfo) -> Tree:
    from rich.tree import Tree

    from cuda_progcache.memo.provenance import program_graph

    graph = program_graph(cache, entry.digest)
    assert graph.root is not None  # noqa: S101 - a program's graph has one
    root = graph.nodes[graph.root]
    tree = Tree(output.text(_line(root), "bold"), guide_style="dim")
    _grow(tree, graph, root, {root.id})
    return tree


def _grow(tree: Tree, graph: Graph, node: Node, shown: set[str]) -> None:
    """Add what ``node`` depends on; what hangs under two nodes is spelled out under the first."""
    for option in node.detail.get("options") or ():
        tree.add(output.text(f"option    {option}"))
    for expression in node.detail.get("name_expressions") or ():
        tree.add(output.text(f"name      {expression}"))
    for target in graph.targets(node.id):
        again = target.id in shown and bool(graph.targets(target.id))
        branch = tree.add(output.text(_line(target) + (" (as above)" if again else "")))
        if not again:
            shown.add(target.id)
            _grow(branch, graph, target, shown)


def _line(node: Node) -> str:
    """A node as a line: what it is, its name, its digest."""
    from cuda_progcache.memo.export import short

    about = node.detail
    if node.kind == "binary":
        digests = f"entry {about['entry'][:12]}, sha256 {short(node.digest) or '?'}"
        return f"{node.label}  {digests}, {output.size(about['size'])}"
    if node.kind == "render":
        return f"rendered  kernel {about['kernel']}: {parameters_text(about['parameters'])}"
    if node.is_step:
        done = {"compile": "compiled", "link": "linked"}.get(node.kind, node.kind)
        took = f" in {output.seconds(about['duration'])}" if about.get("duration") is not None else ""
        when = f", {about['ended']}" if about.get("ended") else ""
        return f"{done}{took}{when}"
    if node.kind == "input":
        return f"linked    {node.label}" + (", whose entry is gone" if about.get("gone") else ", handed in as bytes")
    return f"{node.kind:<9} {node.label}  {short(node.digest)}".rstrip()


AFFECTED_JSON = """\b
--json: {"file": path, "affected": [what list gives of an entry, and "as" ("header", "template", "tool", "source", or
"input": through a binary that was linked in), "named" (as its record calls it), "current" (bool: it was compiled with
what the file holds now, so that an edit invalidates it)]}
"""


@click.command("affected", short_help="The programs that an edit of a file would invalidate.", epilog=AFFECTED_JSON)
@click.argument("file", type=click.Path(path_type=Path))
@click.option("-q", "--quiet", is_flag=True, help="Print the digests alone, for scripts.")
@common_options
@click.pass_obj
def affected_command(session: Session, file: Path, *, quiet: bool) -> None:
    """List every program whose record names FILE: a header, a template, a source, or a file of a compiler.

    Ask before an edit or an upgrade. FILE needn't be there any more; then its name decides alone.
    """
    from cuda_progcache.memo.provenance import affected

    cache = session.existing_cache()
    found = [] if cache is None else affected(cache, file)
    if session.json:
        listed = [{**entry_json(hit.entry), "as": hit.kind, "named": hit.name, "current": hit.current} for hit in found]
        output.emit({"file": os.path.abspath(file), "affected": listed})
        return
    if quiet:
        output.write("".join(f"{hit.entry.digest}\n" for hit in found))
        return
    if not found:
        output.note_line(f"no program in {session.root()} names {file}")
        return
    digits = output.prefix_length(hit.entry.digest for hit in found)
    made = output.table(("digest", "name", "target", "arch", "as", "named", "content"))
    for hit in found:
        record = hit.entry.record
        made.add_row(
            hit.entry.digest[:digits],
            output.text(program_name(record)),
            str(record.get("target_type", "-")),
            str(record.get("arch") or "-"),
            hit.kind,
            output.text(hit.name),
            "as it is" if hit.current else output.text("another", "yellow"),
        )
    output.show(made)
    current = sum(hit.current for hit in found)
    others = len(found) - current
    output.note_line(
        f"an edit of {file} invalidates {output.plural(current, 'program')}"
        + (f"; {output.plural(others, 'program')} had other content under this name" if others else "")
    )

# SPDX-License-Identifier: Apache-2.0
"""Export of provenance graphs: JSON, Graphviz DOT, W3C PROV-JSON, in-toto Statement with SLSA Provenance.

Sources of the formats:

* PROV-JSON: W3C Member Submission "The PROV-JSON Serialization" (2013), over PROV-DM.
* in-toto Attestation Framework, Statement v1 (``https://in-toto.io/Statement/v1``).
* SLSA Provenance v1 (``https://slsa.dev/spec/v1.0/provenance``).

This module needs no third-party library. :mod:`cuda_progcache._util.dsse` signs statements.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from collections.abc import Iterator
from hashlib import file_digest
from typing import TYPE_CHECKING, Any

from cuda_progcache._util import dsse
from cuda_progcache._util.dot import digraph
from cuda_progcache.errors import ProgCacheError, ToolchainError
from cuda_progcache.keys import toolchain
from cuda_progcache.provenance.nodes import Part, content_digest, parts_of, times

if TYPE_CHECKING:
    from cuda_progcache.provenance.graph import Graph, Node
    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource
    from cuda_progcache.store.compile_record import CompileRecord

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
#: The namespace of the names in a PROV document: the package URL of this package.
NAMESPACE = "pkg:pypi/cuda-progcache#"
FORMAT = 1


def to_json(graph: Graph) -> dict[str, Any]:
    """Return a graph as a JSON object with ``format``, ``start`` (the root's id), ``nodes`` and ``edges``."""
    return {
        "format": FORMAT,
        "start": graph.root,
        "nodes": [
            {"id": node.id, "kind": node.kind, "label": node.label, "digest": node.digest, **dict(node.detail)}
            for node in graph.nodes.values()
        ],
        "edges": [{"from": edge.source, "to": edge.target, "relation": edge.relation} for edge in graph.edges],
    }


_SHAPES = dict.fromkeys(("source", "header", "template", "file"), "note") | {"binary": "box3d", "tool": "component"}
_SHAPES |= {"gone": "ellipse"}


def to_dot(graph: Graph) -> str:
    """Return a graph in Graphviz's DOT language; an edge points from a node to its dependency."""
    nodes = (
        (
            node.id,
            f"{node.label}\n{short(node.digest)}" if node.digest else node.label,
            "ellipse" if node.is_step else _SHAPES.get(node.kind, "box"),
        )
        for node in graph.nodes.values()
    )
    return digraph(nodes, graph.edges)


def short(digest: str | None) -> str:
    """Shorten a digest for display; its kind, as in ``build-id:``, is kept."""
    return ":".join(part[:12] for part in (digest or "").split(":"))


def to_prov(graph: Graph) -> dict[str, Any]:
    """Return a graph as W3C PROV-JSON: things are entities, steps are activities, the package is their agent."""
    from cuda_progcache import __version__

    agent = "pc:agent"
    names = {node_id: f"pc:n{index}" for index, node_id in enumerate(graph.nodes)}
    things: dict[str, dict[str, Any]] = {"entity": {}, "activity": {}}
    relations: dict[str, list[dict[str, str]]] = defaultdict(list)
    for node in graph.nodes.values():
        things["activity" if node.is_step else "entity"][names[node.id]] = _prov_attributes(node)
        if node.is_step:
            relations["wasAssociatedWith"].append({"prov:activity": names[node.id], "prov:agent": agent})
    for edge in graph.edges:
        source, target = names[edge.source], names[edge.target]
        if edge.relation == "used" and not graph.nodes[edge.target].is_step:
            relations["used"].append({"prov:activity": source, "prov:entity": target})
        elif edge.relation == "made by":
            relations["wasGeneratedBy"].append({"prov:entity": source, "prov:activity": target})
        else:
            relations["wasInformedBy"].append({"prov:informed": source, "prov:informant": target})
    about_us = {
        "prov:type": {"$": "prov:SoftwareAgent", "type": "prov:QUALIFIED_NAME"},
        "prov:label": f"cuda_progcache {__version__}",
    }
    return {
        "prefix": {"pc": NAMESPACE},
        **{kind: nodes for kind, nodes in things.items() if nodes},
        "agent": {agent: about_us},
        **{name: {f"_:{name}{index}": ends for index, ends in enumerate(rows)} for name, rows in relations.items()},
    }


def _prov_attributes(node: Node) -> dict[str, Any]:
    attributes: dict[str, Any] = {"prov:label": node.label, "pc:kind": node.kind}
    if node.digest:
        attributes["pc:digest"] = node.digest
    for name, value in node.detail.items():
        if value is None or value == []:
            continue
        if node.is_step and name in {"started", "ended"}:
            attributes["prov:startTime" if name == "started" else "prov:endTime"] = value
        else:
            attributes[f"pc:{name}"] = value if isinstance(value, str | int | float) else json.dumps(value)
    return attributes


def to_slsa(cache: ProgramCacheResource, entry: EntryInfo) -> dict[str, Any]:
    """Return an in-toto Statement v1 with SLSA Provenance v1 about a compiled program.

    Parameters
    ----------
    cache : store
        The store that holds the program and the binaries that it was linked from.
    entry : EntryInfo
        The program.

    Returns
    -------
    dict
        The statement. Its subject is the SHA-256 of the binary. ``resolvedDependencies`` lists the source or the linked
        binaries, and every template, header and compiler file, with digests. A compiler's file that is recorded by its
        build id also gets its SHA-256 if the same build is installed on this machine.

    Raises
    ------
    ProgCacheError
        The entry was stored by hand, or its bytes can't be read.
    """
    from cuda_progcache import __version__

    about = entry.about
    subject = content_digest(entry)
    if subject is None:
        raise ProgCacheError(f"can't attest {entry.digest[:12]}: its bytes can't be read")
    if not about.is_compile:
        raise ProgCacheError(f"can't attest {entry.digest[:12]}: it was stored by hand, and how it was made is unknown")
    external = {
        **{name: getattr(about, name) or None for name in ("name", "code_type", "target_type", "arch")},
        "options": about.labelled("option"),
        "name_expressions": sorted(about.symbol_mapping),
    }
    if (kernel := about.rendered) is not None:
        external["kernel"] = {"name": kernel.name, "parameters": dict(kernel.parameters)}
    clock = times(about)
    metadata = {"invocationId": about.key, "startedOn": clock.get("started"), "finishedOn": clock.get("ended")}
    name = f"{about.title}.{about.arch or '-'}.{about.target_type or '-'}"
    return {
        "_type": dsse.STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": subject}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": f"{NAMESPACE}{'link' if about.code_type == 'link' else 'compile'}/v1",
                "externalParameters": external,
                "internalParameters": {"entry": entry.digest},
                "resolvedDependencies": list(_dependencies(cache, about)),
            },
            "runDetails": {
                "builder": {"id": NAMESPACE.rstrip("#"), "version": {"cuda-progcache": __version__}},
                "metadata": {name: value for name, value in metadata.items() if value},
            },
        },
    }


def _dependencies(cache: ProgramCacheResource, about: CompileRecord) -> Iterator[dict[str, Any]]:
    """Return the dependencies of a program, each once; for a linked program, also the dependencies of its parts."""
    told: set[Part] = set()
    pending = [about]
    seen: set[str] = set()
    while pending:
        made = pending.pop(0)
        parts = []
        for linked in made.inputs:
            entry = _entry(cache, linked.digest)
            content = linked.sha256 or (entry and content_digest(entry))
            parts.append(Part("linked binary", f"{linked.name}.{linked.target_type}", content))
            if entry is not None and entry.digest not in seen:
                seen.add(entry.digest)
                pending.append(entry.about)
        parts += [part for part in parts_of(made) if part.digest]
        yield from (_resource(part) for part in dict.fromkeys(parts) if part not in told)
        told.update(parts)


def _entry(cache: ProgramCacheResource, digest: str | None) -> EntryInfo | None:
    try:
        return None if digest is None else cache.info(digest)
    except KeyError:
        return None  # evicted in the meantime


def _resource(part: Part) -> dict[str, Any]:
    """Return a ResourceDescriptor, without a digest if none is known."""
    digests = {"digest": _digest_set(part.name, part.digest)} if part.digest else {}
    role = "compiler" if part.kind == "tool" else part.kind
    return {"name": part.name, **digests, "annotations": {"role": role}}


def _digest_set(name: str, digest: str) -> dict[str, str]:
    """Return an in-toto DigestSet. A build id, which identifies a build of a library, becomes ``gnuBuildId``."""
    kind, colon, rest = digest.partition(":")
    if not colon:
        return {"sha256": digest}
    if kind != "build-id":
        return {kind: rest}
    found = {"gnuBuildId": rest.partition(":")[0]}
    try:
        return {"sha256": _content_of_tool(name, digest), **found}
    except LookupError:
        return found


@functools.cache
def _content_of_tool(name: str, identity: str) -> str:
    """Return the SHA-256 of a compiler's file; raise LookupError if this machine doesn't have the same build."""
    for code_type in toolchain.LIBRARY_OF:
        try:
            tools = toolchain.toolchain(code_type, libdevice=code_type == "nvvm")
        except ToolchainError:
            continue  # not installed on this machine
        for tool in tools:
            if (tool.name, tool.identity) == (name, identity):
                with open(tool.path, "rb") as file:
                    return file_digest(file, "sha256").hexdigest()
    raise LookupError(identity)

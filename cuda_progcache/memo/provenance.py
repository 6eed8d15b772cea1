# SPDX-License-Identifier: Apache-2.0
"""Where a result came from, as a graph; and what depends on a file.

A :class:`Graph` has things (a binary, a source, a header, a template, a
compiler file) and the steps that used and made them (a render, a compile, a
link, a call). It is read from the records beside the entries, so it says what
was, not what a compile of today would read. :mod:`cuda_progcache.memo.export`
writes it down in the formats of others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.keys import toolchain

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import BaseCache
    from cuda_progcache.memo.call import DigestedCall
    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource

#: Kinds of node that are steps; every other kind is a thing.
STEPS = frozenset({"render", "compile", "link", "call"})


@dataclass(frozen=True)
class Node:
    """A thing or a step.

    Attributes
    ----------
    id : str
        Unique in its graph: the kind and the digest or name.
    kind : str
        ``binary``, ``source``, ``header``, ``template``, ``tool``, ``input``, ``file``, ``value``; or a step:
        ``render``, ``compile``, ``link``, ``call``.
    label : str
        What people call it.
    digest : str or None
        Of its content: 64 hex digits are SHA-256, anything else names its kind (``build-id:...``).
    detail : mapping
        What else is known, as JSON values.
    """

    id: str
    kind: str
    label: str
    digest: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_step(self) -> bool:
        """Whether something happened here, rather than is."""
        return self.kind in STEPS


class Edge(NamedTuple):
    """``source`` depends on ``target``: it ``used`` it, was ``made by`` it, or (a step) was ``called by`` it."""

    source: str
    target: str
    relation: str


@dataclass
class Graph:
    """Things and steps, and what depends on what.

    Attributes
    ----------
    root : str or None
        The node that was asked about.
    nodes : dict
        By id, in the order in which a walk from the root meets them.
    edges : list of Edge
        Each once.
    """

    root: str | None = None
    nodes: dict[str, Node] = field(default_factory=dict)
    edges: list[Edge] = field(default_factory=list, init=False)
    _out: dict[str, dict[Edge, None]] = field(default_factory=dict, init=False, repr=False)

    def add(self, node: Node) -> str:
        """Add a node, unless there is one of its id; returns the id."""
        self.nodes.setdefault(node.id, node)
        return node.id

    def link(self, source: str, target: str, relation: str) -> None:
        """Add an edge, once."""
        edge = Edge(source, target, relation)
        leading = self._out.setdefault(source, {})
        if edge not in leading:
            leading[edge] = None
            self.edges.append(edge)

    def targets(self, source: str) -> list[Node]:
        """What a node depends on directly."""
        return [self.nodes[edge.target] for edge in self._out.get(source, ())]


def program_graph(cache: ProgramCacheResource, digest: str) -> Graph:
    """Walk from a compiled program to all it came from.

    Parameters
    ----------
    cache : store
        Where it lies. Of a linked program, the parts are followed as far as they are still there.
    digest : str
        The entry's, 64 hex digits.

    Raises
    ------
    KeyError
        There is no such entry.
    """
    graph = Graph()
    graph.root = _add_program(graph, cache, cache.info(digest))
    return graph


def content_digest(entry: EntryInfo) -> str | None:
    """SHA-256 (hex) of an entry's bytes; None in a store without files, or where the file is gone."""
    if entry.path is None:
        return None
    try:
        with open(entry.path, "rb") as file:
            return _sha256_of(file)
    except OSError:
        return None


def _sha256_of(file: Any) -> str:
    from hashlib import file_digest

    return file_digest(file, "sha256").hexdigest()


def display_name(record: Mapping[str, Any]) -> str:
    """What people know a program by: the library kernel's name, else the program's."""
    kernel = record.get("kernel") or {}
    return str(kernel.get("name") or record.get("name") or "-")


def _add_program(graph: Graph, cache: ProgramCacheResource, entry: EntryInfo) -> str:
    record = entry.record
    binary = f"binary:{entry.digest}"
    if binary in graph.nodes:
        return binary
    target, arch = record.get("target_type"), record.get("arch")
    detail = {"entry": entry.digest, "target_type": target, "arch": arch, "size": entry.size}
    graph.add(Node(binary, "binary", f"{display_name(record)} ({target}, {arch})", content_digest(entry), detail))
    if not record.get("components"):
        return binary  # put there by hand: nothing is known of how it was made
    linked = record.get("code_type") == "link"
    step = graph.add(_step(record, entry, "link" if linked else "compile"))
    graph.link(binary, step, "made by")
    if linked:
        _add_inputs(graph, cache, record, step)
        if record.get("kernel"):
            # The parts were compiled from what this kernel's templates gave; their own records don't know it.
            render = _add_render(graph, record, entry)
            made = [each for part in graph.targets(step) for each in graph.targets(part.id)]
            used = [node for each in made for node in graph.targets(each.id)]
            sources = [node.id for node in used if node.kind == "source" and not graph.targets(node.id)]
            for source in sources or [step]:
                graph.link(source, render, "made by" if sources else "called by")
    else:
        source = graph.add(_source(record, entry))
        graph.link(step, source, "used")
        if record.get("kernel"):
            graph.link(source, _add_render(graph, record, entry), "made by")
    for kind in ("header", "tool"):
        for part in record.get("headers" if kind == "header" else "toolchain") or ():
            graph.link(step, _add_file(graph, kind, part), "used")
    return binary


def _step(record: Mapping[str, Any], entry: EntryInfo, kind: str) -> Node:
    parts = record["components"]
    detail: dict[str, Any] = {
        "key": record.get("key"),
        "options": [value for label, value in parts if label == "option"],
        "name_expressions": sorted(record.get("symbol_mapping") or {}),
        "duration": record.get("duration"),
        **times(record),
    }
    tool = next((t["name"] for t in record.get("toolchain") or ()), "?")
    return Node(f"{kind}:{entry.digest}", kind, f"{kind} with {tool}", None, detail)


def times(record: Mapping[str, Any]) -> dict[str, str]:
    """When a compile started and ended, RFC 3339 in UTC; empty where its record doesn't say."""
    try:
        ended = datetime.fromisoformat(str(record.get("created")))
    except ValueError:
        return {}
    started = ended - timedelta(seconds=float(record.get("duration") or 0.0))
    return {"started": _utc(started), "ended": _utc(ended)}


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _source(record: Mapping[str, Any], entry: EntryInfo) -> Node:
    digest = source_digest(record)
    return Node(f"source:{digest or entry.digest}", "source", str(record.get("name") or "source"), digest)


def source_digest(record: Mapping[str, Any]) -> str | None:
    """SHA-256 (hex) of the source that a program was compiled from; None where its record doesn't say."""
    code = next((value for label, value in record.get("components") or () if label == "code"), None)
    if code is None:
        return None
    _, found, digest = str(code).rpartition("sha256:")
    return digest if found else sha256(str(code).encode(), usedforsecurity=False).hexdigest()


def _add_render(graph: Graph, record: Mapping[str, Any], entry: EntryInfo) -> str:
    kernel = record["kernel"]
    detail = {"kernel": kernel.get("name"), "parameters": dict(kernel.get("parameters") or {})}
    step = graph.add(Node(f"render:{entry.digest}", "render", f"render {kernel.get('name')}", None, detail))
    for part in kernel.get("templates") or ():
        graph.link(step, _add_file(graph, "template", part), "used")
    return step


def _add_file(graph: Graph, kind: str, part: Mapping[str, Any]) -> str:
    name, digest = str(part["name"]), str(part["digest"])
    return graph.add(Node(f"{kind}:{name}:{digest}", kind, name, digest))


def _add_inputs(graph: Graph, cache: ProgramCacheResource, record: Mapping[str, Any], step: str) -> None:
    for index, part in enumerate(record.get("inputs") or ()):
        digest = part.get("digest")
        try:
            if digest is None:
                raise KeyError(digest)
            node = _add_program(graph, cache, cache.info(digest))
        except KeyError:
            label = f"{part.get('name')} ({part.get('target_type')})"
            # Its entry's digest is the key's, not the content's: that went with the entry.
            detail = {"entry": digest, "target_type": part.get("target_type"), "gone": digest is not None}
            node = graph.add(Node(f"input:{digest or f'{step}:{index}'}", "input", label, None, detail))
        graph.link(step, node, "used")


def call_graph(cache: BaseCache, key: str) -> Graph:
    """Walk from the result of a memoized call to its arguments, and to the results of the calls that it made.

    Parameters
    ----------
    cache : BaseCache
        Where the calls are recorded. A call that is gone is a result that nothing is known of.
    key : str
        The call's, or its first digits.

    Raises
    ------
    KeyError
        There is no such call.
    """
    graph = Graph()
    start = cache.expand(key)
    graph.root = _add_call(graph, cache.load(start).detach())
    pending = [start]
    while pending:
        asking = pending.pop()
        step = f"call:{asking}"
        for child in graph.nodes[step].detail["children"]:
            known = f"call:{child}" in graph.nodes
            try:
                result = _add_call(graph, cache.load(child).detach())
            except KeyError:
                result = graph.add(Node(f"input:{child}", "input", f"call {child[:12]}", None, {"gone": True}))
            else:
                if not known:
                    pending.append(child)
            graph.link(step, result, "used")
    return graph


def _add_call(graph: Graph, call: DigestedCall) -> str:
    key = call.to_lookup_key()
    runtime, links = call.metadata.get("runtime") or {}, call.metadata.get("links") or {}
    started: float | None = runtime.get("timestart")
    detail: dict[str, Any] = {
        "key": key,
        "module": call.module,
        "version": call.version,
        "code": call.code_digest,
        "duration": runtime.get("duration"),
        "children": list(links.get("children") or ()),
    }
    if started is not None:
        detail["started"] = _utc(datetime.fromtimestamp(started, UTC))
        detail["ended"] = _utc(datetime.fromtimestamp(runtime.get("timestop") or started, UTC))
    step = graph.add(Node(f"call:{key}", "call", call.name, None, detail))
    for name, value in call.arguments.items():
        graph.link(step, graph.add(Node(f"value:{value}", "value", name, str(value))), "used")
    # By its call and not by its digest: equal values of two calls have two origins.
    result = graph.add(Node(f"result:{key}", "value", f"result of {call.name}", call.result and str(call.result)))
    graph.link(result, step, "made by")
    return result


class Affected(NamedTuple):
    """An entry that depends on a file.

    Attributes
    ----------
    entry : EntryInfo
    kind : {"header", "template", "tool", "source", "input"}
        As what; ``input``: through a binary that was linked in.
    name : str
        The name that its record has for the file, or for the binary linked in.
    current : bool
        Whether what it was compiled with is what the file holds now: editing the file then invalidates the entry.
        False: the file was edited since, or another one of this name was meant; the entry is no answer to a compile
        that reads this file.
    """

    entry: EntryInfo
    kind: str
    name: str
    current: bool


def affected(cache: ProgramCacheResource, path: str | os.PathLike[str]) -> list[Affected]:
    """Every entry whose record names a file: what an edit of it invalidates, before it happens.

    Parameters
    ----------
    cache : store
    path : path-like
        A header, a template, a source or a compiler's file. It needn't be there any more.

    Returns
    -------
    list of Affected
        One per entry; those that an edit would invalidate first, then by name and digest.

    Notes
    -----
    Records name headers relative to the directory that they were found in, so ``path`` fits a record whose name is the
    tail of it; the digest then says whether it is that file.
    """
    full = os.path.abspath(os.fspath(path))
    digests = _digests(full)
    found: dict[str, Affected] = {}
    linked: list[EntryInfo] = []
    for entry in cache.entries():
        matches = [
            Affected(entry, kind, name, digest is not None and digest in digests)
            for kind, name, digest in _named_files(entry.record)
            if _is_tail(name, full) or (kind == "tool" and (_is_tool(name, full) or digest in digests))
        ]
        if matches:
            found[entry.digest] = max(matches, key=lambda match: match.current)
        if entry.record.get("inputs"):
            linked.append(entry)
    for entry in linked:
        parts = [found[part["digest"]] for part in entry.record["inputs"] if part.get("digest") in found]
        if parts and not (entry.digest in found and found[entry.digest].current):
            through = max(parts, key=lambda part: part.current)
            found[entry.digest] = Affected(entry, "input", display_name(through.entry.record), through.current)
    return sorted(found.values(), key=lambda a: (not a.current, display_name(a.entry.record), a.entry.digest))


def _named_files(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str | None]]:
    for part in record.get("headers") or ():
        yield "header", str(part["name"]), part["digest"]
    for part in (record.get("kernel") or {}).get("templates") or ():
        yield "template", str(part["name"]), part["digest"]
    for part in record.get("toolchain") or ():
        yield "tool", str(part["name"]), part["digest"]
    if record.get("name") and not record.get("kernel") and record.get("code_type") != "link":
        yield "source", str(record["name"]), source_digest(record)


def _digests(path: str) -> set[str]:
    """What records may call the content of a file; empty if it can't be read."""
    try:
        with open(path, "rb") as file:
            return {_sha256_of(file), toolchain.identity(path)}
    except OSError:
        return set()


def _is_tail(name: str, path: str) -> bool:
    wanted = [part for part in os.path.normpath(name).split(os.sep) if part not in {"", os.curdir, os.pardir}]
    return bool(wanted) and path.split(os.sep)[-len(wanted) :] == wanted


def _is_tool(name: str, path: str) -> bool:
    return _stem(name) == _stem(os.path.basename(path))


def _stem(name: str) -> str:
    """``nvrtc`` of ``libnvrtc.so.13``."""
    return name.removeprefix("lib").split(".")[0]

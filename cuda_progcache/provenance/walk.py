# SPDX-License-Identifier: Apache-2.0
"""The walk from a result to everything it came from, and one step on to what was made from it.

The walk reads the records beside the results, so it tells what happened, not what a compile would read now. It leads:

* from a program to the compile or link that made it, the source, the rendering that gave the source, its parameters and
  templates, every header and compiler file with its digest, and the prewarm run or memoized call that asked for it;
* from a rendering, an analysis, a prewarm run or a memoized call to the same things, as far as they apply;
* one step in the other direction, to what was made from the result.

A call or program that was evicted, or is recorded elsewhere, appears in the graph as a node of kind ``gone``, or as an
``input`` with ``gone`` in its detail. :mod:`cuda_progcache.provenance.export` converts graphs to other formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cuda_progcache.errors import AmbiguousDigestError
from cuda_progcache.provenance.graph import Graph, Node
from cuda_progcache.provenance.nodes import (
    abridged,
    binary_node,
    call_node,
    callers,
    making_node,
    parts_of,
    times_of_call,
)
from cuda_progcache.provenance.steps import PREWARM, RESOURCE_USAGE, SASS, kind_of, render_key, rendering_of
from cuda_progcache.store.compile_record import File, Kernel

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import BaseCache
    from cuda_progcache.memo.call import DigestedCall
    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource
    from cuda_progcache.store.compile_record import Caller, CompileRecord


def walk(
    key: str, store: ProgramCacheResource | None = None, calls: Sequence[BaseCache] = (), *, whole: bool = False
) -> Graph:
    """Walk from a result to everything it came from, and one step on to what was made from it.

    Parameters
    ----------
    key : str
        Key of a program, a rendering, an analysis, a prewarm run or a memoized call, or its first 4 or more digits.
    store : store, optional
        The store that holds the programs and the calls around them.
    calls : sequence of BaseCache
        Other caches that record calls.
    whole : bool
        For a prewarm run, also walk from each program that it asked for.

    Returns
    -------
    Graph
        The graph. Its root is the result: a binary, a source or the value of a call. For a prewarm run or an analysis,
        the root is the step.

    Raises
    ------
    KeyError
        No program or call has this key.
    AmbiguousDigestError
        Several keys start with these digits.
    """
    return _Walk(store, calls).start(key, whole=whole)


def resolve(key: str, places: Iterable[BaseCache]) -> str:
    """Return the only key of a recorded call with this prefix; raise KeyError or AmbiguousDigestError."""
    from cuda_progcache.memo.caches.cache import Cache

    found: set[str] = set()
    for place in places:
        calls = place.calls if isinstance(place, Cache) else place  # leave out the digests of values
        try:
            full = calls.expand(key)
        except KeyError:
            continue
        if calls.contains(full):
            found.add(full)
    if len(found) > 1:
        raise AmbiguousDigestError(key, sorted(found))
    if not found:
        raise KeyError(key)
    return str(found.pop())  # a plain str: in a query, a Digest would stand for a value


class _Walk:
    """A walk in progress: the places it reads and the graph built so far."""

    def __init__(self, store: ProgramCacheResource | None, calls: Sequence[BaseCache]) -> None:
        from cuda_progcache.provenance.programs import program_cache

        self.store = store
        self.own = None if store is None else program_cache(store)
        self.others = tuple(calls)
        self.places: tuple[BaseCache, ...] = (*(() if self.own is None else (self.own,)), *self.others)
        self.graph = Graph()
        #: Nodes of calls whose children the walk adds; a "called by" edge back to them would be redundant.
        self._asking: set[str] = set()

    def start(self, key: str, *, whole: bool) -> Graph:
        full = resolve(key, self.places)
        self.graph.root = self.add(full, whole=whole)
        self._add_made_of(full, self.graph.root)
        return self.graph

    def entry(self, key: str | None) -> EntryInfo | None:
        if self.store is None or key is None:
            return None
        try:
            return self.store.info(key)
        except KeyError:
            return None

    def call(self, key: str) -> DigestedCall | None:
        for place in self.places:
            try:
                return place.load(key).detach()
            except KeyError:
                continue
        return None

    def add(self, key: str, *, whole: bool = True) -> str:
        """Add a call and everything it came from; return the node of its result."""
        entry = self.entry(key)
        if entry is not None:
            return self._add_program(entry)
        call = self.call(key)
        if call is None:
            return self.graph.add(Node.of("input", key, f"call {key[:12]}", key=key, gone=True))
        kind = kind_of(call)
        if kind is None:
            return self._add_memoized(call)
        if kind == "render":
            return self._add_rendered(call)
        return self._add_step(call, whole=whole)

    # Programs

    def _add_program(self, entry: EntryInfo) -> str:
        graph, about = self.graph, entry.about
        known = self._known(entry.digest)
        if known is not None:
            return known
        binary = graph.add(binary_node(entry))
        if not about.is_compile:
            return binary  # stored by hand: how it was made is unknown
        step = graph.link(binary, making_node(entry), "made by")
        if about.code_type == "link":
            self._add_inputs(about, step)
            if about.kernel is not None:
                self._add_render_of_parts(about.kernel, step)
        rendering = rendering_of(about)
        for kind, name, digest in parts_of(about):
            if kind == "source":
                source = graph.link(step, Node.of(kind, digest or entry.digest, name, digest), "used")
                if rendering is not None:
                    graph.link(source, self._add_render(rendering), "made by")
            elif kind != "template":  # templates belong to the rendering
                graph.link(step, Node.of(kind, f"{name}:{digest}", name, digest), "used")
        self._add_callers(step, about.parents)
        return binary

    def _add_inputs(self, about: CompileRecord, step: str) -> None:
        for index, (name, target, digest, content) in enumerate(about.inputs):
            entry = self.entry(digest)
            if entry is not None:
                self.graph.link(step, self._add_program(entry), "used")
                continue
            # The digest is that of the key, not of the content, which is lost with the entry unless it is recorded.
            detail = {"entry": digest, "target_type": target, "gone": digest is not None}
            where = digest or content or f"{step}:{index}"
            self.graph.link(step, Node.of("input", where, f"{name} ({target})", content, **detail), "used")

    def _add_render_of_parts(self, kernel: Kernel, step: str) -> None:
        """Add the rendering of a linked kernel from the link's record, if its parts are gone or don't record it."""
        graph = self.graph
        made = [each for part in graph.targets(step, "used") for each in graph.targets(part.id, "made by")]
        sources = [node.id for each in made for node in graph.targets(each.id, "used") if node.kind == "source"]
        unknown = [source for source in sources if not graph.targets(source)]
        if sources and not unknown:
            return
        render = self._add_render(kernel)
        for source in unknown or [step]:
            graph.link(source, render, "made by" if unknown else "called by")

    def _add_render(self, rendering: Kernel) -> str:
        """Add a rendering from the record of its compile, and from its own record if there is one."""
        key = render_key(rendering)
        if f"render:{key}" in self.graph.nodes:
            return f"render:{key}"
        call = self.call(key)
        about: dict[str, Any] = {
            "key": key,
            "kernel": rendering.name,
            "module": rendering.module,
            "parameters": dict(rendering.parameters),
            "recorded": call is not None,
        }
        if call is not None:
            known = call.metadata.get("render") or {}
            about |= times_of_call(call) | {name: known.get(name) for name in ("template", "lines", "bytes")}
        step = self.graph.add(Node.of("render", key, f"render {rendering.name}", **about))
        for name, digest in rendering.templates:
            self.graph.link(step, Node.of("template", f"{name}:{digest}", name, digest), "used")
        if call is not None:
            self._add_callers(step, callers(call))
        return step

    # Calls that made no program

    def _add_rendered(self, call: DigestedCall) -> str:
        arguments = call.recorded_arguments()
        files = tuple(File(*file) for file in (arguments.get("files") or {}).items())
        module, parameters = arguments.get("module"), arguments.get("parameters") or {}
        rendering = Kernel(arguments["template"], module, parameters, files)
        digest = (call.metadata.get("render") or {}).get("sha256")
        source = self.graph.add(Node.of("source", str(digest), module or rendering.name, digest))
        self.graph.link(source, self._add_render(rendering), "made by")
        return source

    def _add_step(self, call: DigestedCall, *, whole: bool) -> str:
        """Add a prewarm run or an analysis, and the programs it worked on."""
        step = self.graph.add(call_node(call))
        prewarm = kind_of(call) == "prewarm"
        if prewarm:
            self._asking.add(step)
        programs = call.links("children") if prewarm else [call.recorded_arguments()["program"]]
        for key in programs:
            entry = self.entry(key)
            if entry is None:
                gone = Node.of("input", key, f"program {key[:12]}", entry=key, gone=True)
                self.graph.link(step, gone, "used")
            else:
                used = binary_node(entry) if prewarm and not whole else self._add_program(entry)
                self.graph.link(step, used, "used")
        self._add_callers(step, [caller for caller in callers(call) if caller.key not in programs])
        return step

    def _add_memoized(self, call: DigestedCall) -> str:
        """Add a memoized call and the calls that it made; not recursive, since calls may be deeply nested."""
        result = self._add_call(call)
        pending = [call]
        while pending:
            asking = pending.pop()
            step = f"call:{asking.to_lookup_key()}"
            for key in asking.links("children"):
                known = f"call:{key}" in self.graph.nodes
                child = None if self.entry(key) is not None else self.call(key)
                if child is None or kind_of(child) is not None:
                    self.graph.link(step, self.add(key), "used")
                    continue
                self.graph.link(step, self._add_call(child), "used")
                if not known:
                    pending.append(child)
        return result

    def _add_call(self, call: DigestedCall) -> str:
        graph = self.graph
        step = graph.add(call_node(call))
        self._asking.add(step)
        known = call.recorded_arguments()
        for name, value in call.arguments.items():
            label = f"{name} = {abridged(known[name])}" if name in known else name
            graph.link(step, Node.of("value", f"{name}:{value}", label, str(value)), "used")
        for path, file in (call.metadata.get("files") or {}).items():
            digest = file.get("digest") and f"{file.get('algo')}:{file['digest']}"
            graph.link(step, Node.of("file", f"{path}:{digest}", path, digest), "used")
        # The node is named by the call, not by the value's digest: equal values of two calls have two origins.
        digest = None if call.result is None else str(call.result)
        result = graph.add(Node(f"result:{call.to_lookup_key()}", "value", f"result of {call.name}", digest))
        graph.link(result, step, "made by")
        self._add_callers(step, callers(call))
        return result

    # Callers, and what was made from the root

    def _add_callers(self, step: str, asking: Iterable[Caller]) -> None:
        graph = self.graph
        for key, name in asking:
            known = self._known(key)
            call = None if known is not None else self.call(key)
            if known is not None:
                if known not in self._asking:
                    graph.link(step, known, "called by")
            elif call is None:
                gone = Node.of("gone", key, name or f"call {key[:12]}", key=key, gone=True)
                graph.link(step, gone, "called by")
            else:
                self._add_callers(graph.link(step, call_node(call), "called by"), callers(call))

    def _add_made_of(self, key: str, root: str) -> None:
        """Add what was made from the root (links, analyses, compiles of a source) and the calls that asked for it."""
        graph = self.graph
        for call in self._users_of(key, graph.nodes[root]):
            user = call.to_lookup_key()
            if self._known(user) is not None:
                continue
            entry = self.entry(user) if "record" in call.metadata else None
            if entry is None:
                step = graph.add(call_node(call))
            else:
                step = graph.link(graph.add(binary_node(entry)), making_node(entry), "made by")
            graph.link(step, root, "used")

    def _known(self, key: str) -> str | None:
        """Return the node of a program or call; None if it isn't in the graph yet."""
        names = (f"{kind}:{key}" for kind in ("binary", "call", "prewarm", "analysis", "gone"))
        return next((name for name in names if name in self.graph.nodes), None)

    def _users_of(self, key: str, root: Node) -> Iterator[DigestedCall]:
        """Yield the calls whose links have ``key``; query each place only for calls that can have it."""
        asked: list[tuple[BaseCache, dict[str, Any], str]] = []
        if self.own is not None and root.kind == "binary":
            asked += [
                (self.own, {"name": RESOURCE_USAGE[0], "arguments": {"program": key}}, "parents"),
                (self.own, {"name": SASS[0], "arguments": {"program": key}}, "parents"),
                (self.own, {"arguments": {"code_type": "link"}}, "children"),
                (self.own, {"name": PREWARM[0], "module": PREWARM[1]}, "children"),
            ]
        if self.own is not None and root.kind == "source":
            arguments = self.own.load(key).detach().recorded_arguments()
            which = "part_of" if "module" in arguments else "kernel"
            asked.append((self.own, {"arguments": {which: arguments["template"]}}, "parents"))
        asked += [(place, {}, "children") for place in self.others]
        for place, pattern, relation in asked:
            for call in place.query(**pattern):
                if key in call.links(relation):
                    yield call.detach()

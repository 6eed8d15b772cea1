# SPDX-License-Identifier: Apache-2.0
"""The call tree: which cached call called which others, and which files each call read.

The tree of the current process is kept in memory. On disk there are only the
records in the cache entries, which :func:`cache_tree_sync` reads; a call
writes nothing else for the tree. The running call is tracked per thread and
per async task, so concurrent calls aren't mistaken for parent and child.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuda_progcache._util.dot import digraph
from cuda_progcache._util.files import put_in_place
from cuda_progcache._util.running import running, under_way
from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo.files import Watched, shared
from cuda_progcache.memo.frames import Frame, _under_way, enter

if TYPE_CHECKING:
    from cuda_progcache.memo.call import DigestedCall

#: The most calls that the tree keeps; the oldest are dropped first.
MOST_NODES = 100_000


class _CallStack:
    """The tree's calls that run in this thread or task, innermost last; programs may push calls of their own."""

    def _frames(self) -> list[Frame]:
        return [call for call in under_way() if isinstance(call, Frame) and call.node is not None][::-1]

    def append(self, node: str) -> None:
        enter(Frame(node, node, running.get(), node))

    def pop(self) -> str:
        frame = self._frames()[-1]
        running.set(frame.parent)
        _under_way.pop(id(frame), None)
        return str(frame.node)

    def clear(self) -> None:
        while self._frames():
            self.pop()

    def __len__(self) -> int:
        return len(self._frames())

    def __iter__(self) -> Iterator[str]:
        return (str(frame.node) for frame in self._frames())


Node = dict[str, Any]
"""``id``, ``fname``, ``hash``, ``outfile`` (Path or None), ``parents``, ``children`` (ids), ``files`` (Paths),
``file_hashes`` (by path), ``created`` (seconds since the epoch); ``patterns`` and ``algo`` of the hashes."""

graph: dict[str, Node] = {}
stack = _CallStack()
_lock = threading.RLock()


def register(node: str, fname: str, hash_: str, outfile: str | Path | None, algo: str = "xxhash64") -> Node:
    """Add a call to the tree as a child of the call that runs in this thread or task; return its node."""
    with _lock:
        found = graph.get(node)
        if found is None:
            found = _new(node, fname, hash_, outfile, algo)
            graph[node] = found
            while len(graph) > MOST_NODES:
                del graph[next(iter(graph))]
        above = node_here()
        if above is not None and above != node:
            _connect(above, node)
        return found


def node_here() -> str | None:
    """Return the id of the innermost call of the tree that runs in this thread or task; None if there is none."""
    return next((node for call in under_way() if (node := getattr(call, "node", None)) is not None), None)


def algo_of(node: str | None) -> str:
    """Return the name of the hash used for a call's files."""
    return str(graph.get(node or "", {}).get("algo") or "xxhash64")


def _new(node: str, fname: str, hash_: str, outfile: str | Path | None, algo: str) -> Node:
    place = None if outfile is None else Path(outfile)
    return {
        "id": node, "fname": fname, "hash": hash_, "outfile": place, "parents": [], "children": [], "files": [],
        "file_hashes": {}, "patterns": {}, "algo": algo, "created": time.time(),
    }  # fmt: skip


def _connect(parent: str, child: str) -> None:
    for node, side, other in ((parent, "children", child), (child, "parents", parent)):
        if node in graph and other not in graph[node][side]:
            graph[node][side].append(other)


def forget(node: str) -> None:
    """Remove a call that failed from the tree."""
    with _lock:
        gone = graph.pop(node, None)
        for side, back in (("parents", "children"), ("children", "parents")):
            for other in gone[side] if gone is not None else ():
                if other in graph and node in graph[other][back]:
                    graph[other][back].remove(node)


def add_files(node: str, watched: Iterable[Watched]) -> None:
    """Record the files that a call depends on."""
    with _lock:
        found = graph.get(node)
        if found is None:
            return
        for item in watched:
            if item.path not in found["file_hashes"]:
                found["files"].append(Path(item.path))
            found["file_hashes"][item.path] = item.digest
            if item.pattern is not None:
                found["patterns"][item.path] = item.pattern


def restore(call: DigestedCall, hash_: str, outfile: Path) -> None:
    """Merge a call's record from disk into the tree."""
    with _lock:
        node = f"{call.name}:{hash_}"
        files = call.metadata.get("files") or {}
        algo = next((about["algo"] for about in files.values()), "xxhash64")
        found = graph.setdefault(node, _new(node, call.name, hash_, outfile, algo))
        found["created"] = call.runtime.get("timestart") or found["created"]
        found["key"] = str(call.to_lookup_key())
        found["links"] = call.metadata.get("links") or {}
        add_files(
            node, [Watched(path, about["algo"], about.get("pattern"), about["digest"]) for path, about in files.items()]
        )


def complete() -> None:
    """Turn the links in records, which are keys of calls, into edges between nodes, at both ends of each edge."""
    with _lock:
        known = {node["key"]: name for name, node in graph.items() if "key" in node}
        for name, node in list(graph.items()):
            links = node.pop("links", {})
            for child in links.get("children", ()):
                if child in known:
                    _connect(name, known[child])
            for parent in links.get("parents", ()):
                if parent in known:
                    _connect(known[parent], name)
        for node in graph.values():
            node.pop("key", None)


def cache_tree_nodes() -> dict[str, Node]:
    """Return a copy of the tree's calls, by id; later calls don't change it."""
    with _lock:
        return {
            name: {k: v.copy() if isinstance(v, list | dict) else v for k, v in n.items()} for name, n in graph.items()
        }


def cache_tree_reset() -> None:
    """Forget the tree of this process, and the calls that run in this thread or task."""
    with _lock:
        graph.clear()
        stack.clear()


def cache_tree_changed_files() -> dict[str, dict[str, Any]]:
    """Find the calls of the tree that depend on a file that has changed or disappeared since.

    Returns
    -------
    dict
        By id of the call: ``node``, and ``changed_files``, a list of Path.
    """
    found = {}
    for name, node in cache_tree_nodes().items():
        changed = [
            Path(path)
            for path, digest in node["file_hashes"].items()
            if shared.of_path(path, node.get("algo") or "xxhash64", node.get("patterns", {}).get(path)) != digest
        ]
        if changed:
            found[name] = {"node": node, "changed_files": changed}
    return found


def cache_tree_for_file(path: str | os.PathLike[str]) -> dict[str, Node]:
    """Return the calls that depend on a file, by id."""
    wanted = os.path.realpath(path)
    return {name: node for name, node in cache_tree_nodes().items() if wanted in node["file_hashes"]}


def cache_tree_files() -> dict[str, list[str]]:
    """Return every file that a call depends on, with the ids of the calls that depend on it."""
    found: dict[str, list[str]] = {}
    for name, node in cache_tree_nodes().items():
        for path in node["file_hashes"]:
            found.setdefault(path, []).append(name)
    return found


def cache_tree_summary() -> dict[str, Any]:
    """Count the tree's calls, edges and files, and the calls of each function.

    The keys are ``n_nodes``, ``n_edges``, ``n_files`` and ``functions``, a count by name.
    """
    nodes = cache_tree_nodes()
    functions: dict[str, int] = {}
    for node in nodes.values():
        functions[node["fname"]] = functions.get(node["fname"], 0) + 1
    return {
        "n_nodes": len(nodes),
        "n_edges": sum(len(node["children"]) for node in nodes.values()),
        "n_files": len({path for node in nodes.values() for path in node["file_hashes"]}),
        "functions": functions,
    }


def cache_tree_to_json(path: str | os.PathLike[str] | None = None) -> str:
    """Return the tree as JSON; write it to ``path`` if given."""
    return _out(json.dumps({name: _plain(node) for name, node in cache_tree_nodes().items()}, indent=2) + "\n", path)


def cache_tree_to_dot(path: str | os.PathLike[str] | None = None) -> str:
    """Return the tree in Graphviz's DOT language; write it to ``path`` if given."""
    nodes = cache_tree_nodes()
    files = {path: hashed for node in nodes.values() for path, hashed in node["file_hashes"].items()}
    boxes = [(f"call:{name}", node["fname"], "ellipse") for name, node in nodes.items()]
    boxes += [
        (f"file:{path}", f"{os.path.basename(path) or path}\n{(hashed or '')[:12]}", "note")
        for path, hashed in files.items()
    ]
    edges = []
    for name, node in nodes.items():
        used = [f"call:{child}" for child in node["children"] if child in nodes]
        used += [f"file:{path}" for path in node["file_hashes"]]
        edges += [(f"call:{name}", other, "used") for other in used]
    return _out(digraph(boxes, edges), path)


def _out(text: str, path: str | os.PathLike[str] | None) -> str:
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text


def _plain(node: Node) -> Node:
    return {
        **node,
        "outfile": None if node["outfile"] is None else str(node["outfile"]),
        "files": [str(path) for path in node["files"]],
        "patterns": {path: getattr(pattern, "pattern", pattern) for path, pattern in node["patterns"].items()},
    }


def cache_tree_save(path: str | os.PathLike[str]) -> Path:
    """Write the tree to a file of pickled plain values, for :func:`cache_tree_load`; return its path."""
    data = pickle.dumps({name: _plain(node) for name, node in cache_tree_nodes().items()}, protocol=4)
    target = os.fspath(path)
    put_in_place(target, data, staged=f"{target}.tmp.{os.getpid()}.{threading.get_ident()}", mode=0o644)
    return Path(target)


class _PlainUnpickler(pickle.Unpickler):  # noqa: S301 - loads nothing that could run code
    """An unpickler that loads no class except paths, so that a graph file can't run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return ``Path`` for :mod:`pathlib`'s paths; refuse every other class."""
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return Path
        raise pickle.UnpicklingError(f"a saved graph can't contain {module}.{name}")


def cache_tree_load(path: str | os.PathLike[str]) -> None:
    """Replace the tree with the tree in a file.

    Raises
    ------
    ProgCacheError
        The file doesn't contain a saved tree.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        loaded = _PlainUnpickler(io.BytesIO(content)).load()
        nodes = {str(name): _revived(node) for name, node in loaded.items()}
    except Exception as error:  # unpickling may raise anything
        raise ProgCacheError(f"{os.fspath(path)} is not a saved call tree: {error}") from error
    with _lock:
        graph.clear()
        graph.update(nodes)


def _revived(node: Mapping[str, Any]) -> Node:
    fresh = _new(str(node["id"]), str(node["fname"]), str(node["hash"]), None, str(node.get("algo") or "xxhash64"))
    outfile = node.get("outfile")
    return {
        **fresh,
        **{key: node[key] for key in ("parents", "children", "file_hashes", "patterns", "created") if key in node},
        "outfile": None if outfile is None else Path(outfile),
        "files": [Path(path) for path in node.get("files") or ()],
    }

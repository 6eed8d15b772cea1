# SPDX-License-Identifier: Apache-2.0
"""Which cached call called which, and which files each of them read.

The tree of this process is in memory; what lies on disk are the records in the
entries themselves, and :func:`cache_tree_sync` reads them. Nothing is written
for the tree's sake when a call is made. Which call is under way is known per
thread and per async task, so that calls side by side aren't taken for parent
and child.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util.running import Running, note_child, running
from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo import cache_dir
from cuda_progcache.memo.call import DigestedCall
from cuda_progcache.memo.digest import Digest, digest

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.memo.files import Pattern

#: Calls that are remembered; the oldest go first.
MOST_NODES = 100_000


class Watched(NamedTuple):
    """A file or directory that a call depends on, and its hash when it was looked at.

    Attributes
    ----------
    path : str
        Absolute, without links.
    algo : str
    pattern : str or None
        Which files of a directory count.
    digest : str or None
        None: it wasn't there.
    """

    path: str
    algo: str
    pattern: Pattern
    digest: str | None


class Frame:
    """A call that is under way.

    Attributes
    ----------
    node : str
        Its id in the tree.
    watched : dict
        What it depends on besides what is in its key, by path: files it tracked, and what its calls depend on.
    children : dict
        Ids of the calls it made.
    environment : dict
        Variables that its calls depend on.
    running : Running
        The same for those who know nothing of this tree: programs and memoized calls, whose keys it gets as children.
    """

    def __init__(self, node: str) -> None:
        self.node = node
        self.running = Running(hash_of(node), node.rpartition(".")[0], running.get())
        self.watched: dict[str, Watched] = {}
        self.children: dict[str, None] = {}
        self.environment: dict[str, str | None] = {}


class _CallStack:
    """The calls under way in this thread or task, the innermost last."""

    def __init__(self) -> None:
        self._frames: ContextVar[tuple[Frame, ...]] = ContextVar("cuda_progcache_calls", default=())

    def frames(self) -> tuple[Frame, ...]:
        return self._frames.get()

    def push(self, frame: Frame) -> None:
        self._frames.set((*self._frames.get(), frame))
        running.set(frame.running)

    def append(self, node: str) -> None:
        self.push(Frame(node))

    def pop(self) -> str:
        frames = self._frames.get()
        self._frames.set(frames[:-1])
        running.set(frames[-1].running.parent)
        return frames[-1].node

    def clear(self) -> None:
        for frame in self._frames.get()[:1]:
            running.set(frame.running.parent)
        self._frames.set(())

    def __len__(self) -> int:
        return len(self._frames.get())

    def __iter__(self) -> Iterator[str]:
        return (frame.node for frame in self._frames.get())


Node = dict[str, Any]
"""``id``, ``fname``, ``hash``, ``outfile`` (Path or None), ``parents``, ``children`` (ids), ``files`` (Paths),
``file_hashes`` (by path), ``created`` (seconds since the epoch); ``patterns`` and ``algo`` of the hashes."""

graph: dict[str, Node] = {}
stack = _CallStack()
_lock = threading.RLock()


def register(node: str, fname: str, hash_: str, outfile: str | Path | None, algo: str = "xxhash64") -> Node:
    """Add a call to the tree, as a child of the call that is under way here; returns its node."""
    with _lock:
        found = graph.get(node)
        if found is None:
            found = _new(node, fname, hash_, outfile, algo)
            graph[node] = found
            while len(graph) > MOST_NODES:
                del graph[next(iter(graph))]
        note_child(hash_)
        frames = stack.frames()
        if frames and frames[-1].node != node:
            frames[-1].children[node] = None
            _connect(frames[-1].node, node)
        return found


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
    """Take a call out of the tree again: it failed."""
    with _lock:
        gone = graph.pop(node, None)
        for side, back in (("parents", "children"), ("children", "parents")):
            for other in gone[side] if gone is not None else ():
                if other in graph and node in graph[other][back]:
                    graph[other][back].remove(node)
        for frame in stack.frames():
            frame.children.pop(node, None)


def add_files(node: str, watched: Iterable[Watched]) -> None:
    """Note which files a call depends on."""
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


def restore(node: Mapping[str, Any], outfile: Path | None) -> None:
    """Merge a call's record from disk into the tree."""
    with _lock:
        found = graph.setdefault(
            node["id"], _new(node["id"], node["fname"], node["hash"], outfile, node.get("algo") or "xxhash64")
        )
        found["created"] = node.get("created") or found["created"]
        add_files(node["id"], (Watched(*item) for item in node.get("watched") or ()))
        for side in ("parents", "children"):
            for other in node.get(side) or ():
                if other not in found[side]:
                    found[side].append(other)


def complete() -> None:
    """Note edges that only one end knows of at the other, too."""
    with _lock:
        for name, node in graph.items():
            for child in node["children"]:
                _connect(name, child)
            for parent in node["parents"]:
                _connect(parent, name)


def cache_tree_nodes() -> dict[str, Node]:
    """The calls of the tree, by id; a copy, that stays as it is."""
    with _lock:
        return {
            name: {k: v.copy() if isinstance(v, list | dict) else v for k, v in n.items()} for name, n in graph.items()
        }


def cache_tree_reset() -> None:
    """Forget the tree of this process, and which call is under way here."""
    with _lock:
        graph.clear()
        stack.clear()


def cache_tree_for_file(path: str | os.PathLike[str]) -> dict[str, Node]:
    """The calls that depend on a file."""
    wanted = os.path.realpath(path)
    return {name: node for name, node in cache_tree_nodes().items() if wanted in node["file_hashes"]}


def cache_tree_files() -> dict[str, list[str]]:
    """Every file that a call depends on, with the ids of those calls."""
    found: dict[str, list[str]] = {}
    for name, node in cache_tree_nodes().items():
        for path in node["file_hashes"]:
            found.setdefault(path, []).append(name)
    return found


def cache_tree_summary() -> dict[str, Any]:
    """How many calls, edges, files and functions the tree has: ``n_nodes``, ``n_edges``, ``n_files``, ``functions``."""
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
    """The tree as JSON, written to ``path`` if one is given."""
    return _out(json.dumps({name: _plain(node) for name, node in cache_tree_nodes().items()}, indent=2) + "\n", path)


def cache_tree_to_dot(path: str | os.PathLike[str] | None = None) -> str:
    """The tree in Graphviz's language, written to ``path`` if one is given."""
    lines = ["digraph provenance {", "  rankdir=RL;", '  node [fontname="Helvetica", fontsize=10];']
    nodes = cache_tree_nodes()
    files: dict[str, str | None] = {}
    for name, node in nodes.items():
        lines.append(f"  {_quoted(f'call:{name}')} [label={_quoted(node['fname'])}, shape=ellipse];")
        files.update(node["file_hashes"])
    for file, hashed in files.items():
        label = f"{os.path.basename(file) or file}\n{(hashed or '')[:12]}"
        lines.append(f"  {_quoted(f'file:{file}')} [label={_quoted(label)}, shape=note];")
    for name, node in nodes.items():
        used = [f"call:{child}" for child in node["children"] if child in nodes]
        used += [f"file:{path}" for path in node["file_hashes"]]
        lines += [f'  {_quoted(f"call:{name}")} -> {_quoted(other)} [label="used"];' for other in used]
    return _out("\n".join([*lines, "}", ""]), path)


def _quoted(text: str) -> str:
    """Write text as a DOT string; a newline in it is a line break."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


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


def cache_tree_save(path: str | os.PathLike[str]) -> None:
    """Write the tree to a file of pickled plain values, for :func:`cache_tree_load`."""
    data = pickle.dumps({name: _plain(node) for name, node in cache_tree_nodes().items()}, protocol=4)
    target = os.fspath(path)
    staged = f"{target}.tmp.{os.getpid()}.{threading.get_ident()}"
    with open(staged, "wb") as file:
        file.write(data)
    os.replace(staged, target)


class _PlainUnpickler(pickle.Unpickler):  # noqa: S301 - this one lets nothing in that could run
    """Lets in paths and nothing else that has a class: a graph file can't run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse all but :mod:`pathlib`'s paths."""
        if module.partition(".")[0] == "pathlib" and name.endswith("Path"):
            return Path
        raise pickle.UnpicklingError(f"a graph holds no {module}.{name}")


def cache_tree_load(path: str | os.PathLike[str]) -> None:
    """Replace the tree by that of a file.

    Raises
    ------
    ProgCacheError
        It is no tree.
    """
    with open(path, "rb") as file:
        content = file.read()
    try:
        loaded = _PlainUnpickler(io.BytesIO(content)).load()
        nodes = {str(name): _revived(node) for name, node in loaded.items()}
    except Exception as error:  # unpickling may raise anything
        raise ProgCacheError(f"{os.fspath(path)} is no saved call tree: {error}") from error
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


def saved_calls(directory: str | os.PathLike[str]) -> Cache:
    """The calls whose results :func:`~cuda_progcache.memo.cache_file.cache_file` keeps in a directory, as a cache.

    Their keys are the hashes in the files' names. The results aren't in it, and what the directory holds later isn't
    either.

    Parameters
    ----------
    directory : path-like
    """
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.memo.storage import CallMemory, ValueMemory
    from cuda_progcache.memo.storage.codecs import encode_json

    found: dict[Digest, DigestedCall] = {}
    for row in cache_dir.rows(os.fspath(directory)):
        try:
            record = cache_dir.read_record(row.path)
        except OSError:
            continue  # gone meanwhile
        key = Digest(record.get("hash") or row.hash)
        arguments = {name: _literal(text) for name, text in (record.get("call") or {}).items()}
        digests = {name: digest(value) for name, value in arguments.items()}
        created, duration = float(record.get("created") or row.status.st_mtime), record.get("duration")
        links = {side: [hash_of(node) for node in record.get(side) or ()] for side in ("parents", "children")}
        links["children"] = list(dict.fromkeys([*links["children"], *(record.get("used") or ())]))
        metadata: dict[str, dict[str, Any]] = {
            "runtime": {"timestart": created, "timestop": created + (duration or 0.0), "duration": duration},
            "links": {side: keys for side, keys in links.items() if keys},
            "files": {
                path: {"algo": algo, "pattern": pattern, "digest": found_digest}
                for path, algo, pattern, found_digest in record.get("watched") or ()
            },
        }
        inline = {digests[name]: encode_json(value) for name, value in arguments.items()}
        name = record.get("fname") or row.fname
        found[key] = DigestedCall(name, digests, None, metadata, record.get("module"), key=key, inline=inline)
    return Cache(ValueMemory({}), CallMemory(found))


def _literal(text: str) -> str | int | float | bool | None:
    """An argument from what its record shows of it."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if value is None or isinstance(value, str | int | float) else text


def hash_of(node: str) -> str:
    """The hash in a call's id."""
    return node.rpartition(".")[2]

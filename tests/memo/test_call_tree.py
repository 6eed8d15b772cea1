# SPDX-License-Identifier: Apache-2.0
"""The tree of cached calls: its edges, its files and stale calls; saving, loading, reading from disk, drawing."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import threading
from pathlib import Path

import pytest

from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo import cache_file as module
from cuda_progcache.memo.cache_file import (
    cache_file,
    cache_tree_changed_files,
    cache_tree_files,
    cache_tree_for_file,
    cache_tree_load,
    cache_tree_nodes,
    cache_tree_reset,
    cache_tree_save,
    cache_tree_summary,
    cache_tree_sync,
    cache_tree_to_dot,
    cache_tree_to_json,
    plot_cache_graph,
    track_file,
)


@pytest.fixture(autouse=True)
def _fresh():
    cache_tree_reset()
    module._file_state_cache.clear()
    yield
    cache_tree_reset()
    module._file_state_cache.clear()


@pytest.fixture
def pipeline(tmp_path):
    """A diamond of calls: report calls left and right, and both call load. load tracks a file."""
    store, data = tmp_path / "store", tmp_path / "data.txt"
    data.write_text("1 2 3")

    @cache_file(store)
    def load(scale):
        return [int(x) * scale for x in track_file(data).read_text().split()]

    @cache_file(store)
    def left():
        return sum(load(2))

    @cache_file(store)
    def right():
        return max(load(2))

    @cache_file(store)
    def report():
        return left(), right()

    return report, store, data


def edges():
    nodes = cache_tree_nodes()
    made = {(node["fname"], nodes[child]["fname"]) for node in nodes.values() for child in node["children"]}
    back = {(nodes[parent]["fname"], node["fname"]) for node in nodes.values() for parent in node["parents"]}
    assert made == back
    return made


DIAMOND = {("report", "left"), ("report", "right"), ("left", "load"), ("right", "load")}


def test_edges_and_files(pipeline):
    report, store, data = pipeline
    assert report() == (12, 6)
    assert edges() == DIAMOND
    (node,) = (node for node in cache_tree_nodes().values() if node["fname"] == "load")
    assert node["files"] == [data.resolve()]
    assert node["file_hashes"] == {str(data.resolve()): module.fast_file_hash(data)}
    assert node["outfile"].exists()
    assert {n["fname"] for n in cache_tree_for_file(data).values()} == {"load", "left", "right", "report"}
    assert cache_tree_for_file(store) == {}
    assert list(cache_tree_files()) == [str(data.resolve())]
    assert cache_tree_summary() == {
        "n_nodes": 4, "n_edges": 4, "n_files": 1, "functions": {"report": 1, "left": 1, "load": 1, "right": 1},
    }  # fmt: skip


def test_hits_give_the_same_edges(pipeline):
    report, _, _ = pipeline
    report()
    cache_tree_reset()
    report(_force=True)
    assert edges() == {("report", "left"), ("report", "right")}  # the calls below are known only on disk
    cache_tree_sync(pipeline[1])
    assert edges() == DIAMOND


def test_what_changed(pipeline):
    report, _, data = pipeline
    report()
    assert cache_tree_changed_files() == {}
    data.write_text("4")
    changed = cache_tree_changed_files()
    assert {found["node"]["fname"] for found in changed.values()} == {"load", "left", "right", "report"}
    assert all(found["changed_files"] == [data.resolve()] for found in changed.values())
    data.unlink()
    assert len(cache_tree_changed_files()) == 4


def test_a_call_that_fails_leaves_the_tree(tmp_path):
    @cache_file(tmp_path)
    def child(x):
        return x

    @cache_file(tmp_path)
    def fails(x):
        child(x)
        raise ValueError

    with pytest.raises(ValueError):
        fails(1)
    (node,) = cache_tree_nodes().values()
    assert (node["fname"], node["parents"]) == ("child", [])


def test_threads_and_tasks_arent_taken_for_children(tmp_path):
    started, go = threading.Event(), threading.Event()

    @cache_file(tmp_path)
    def other(x):
        return x

    @cache_file(tmp_path)
    def slow(x):
        started.set()
        assert go.wait(300)
        return x

    thread = threading.Thread(target=slow, args=(1,))
    thread.start()
    assert started.wait(300)
    other(1)
    go.set()
    thread.join(300)

    @cache_file(tmp_path)
    def parent(x):
        async def both():
            await asyncio.gather(*(asyncio.to_thread(other, n) for n in (2, 3)))

        asyncio.run(both())
        return x

    parent(1)
    names = {name: node["fname"] for name, node in cache_tree_nodes().items()}
    assert {(names[p], node["fname"]) for node in cache_tree_nodes().values() for p in node["parents"]} == {
        ("parent", "other")
    }
    (found,) = (node for node in cache_tree_nodes().values() if node["fname"] == "parent")
    assert len(found["children"]) == 2


def test_nothing_is_written_for_the_trees_sake(pipeline):
    report, store, _ = pipeline
    report()
    before = {path.name: path.stat().st_mtime_ns for path in store.iterdir()}
    report()
    assert {path.name: path.stat().st_mtime_ns for path in store.iterdir()} == before
    assert all(name.endswith(".pkl") and not name.startswith("graph") for name in before)


def test_save_and_load(pipeline, tmp_path):
    report, _, data = pipeline
    report()
    before = cache_tree_nodes()
    cache_tree_save(tmp_path / "graph.pkl")
    cache_tree_reset()
    assert cache_tree_nodes() == {}
    cache_tree_load(tmp_path / "graph.pkl")
    assert cache_tree_nodes() == before
    data.write_text("5")
    assert len(cache_tree_changed_files()) == 4
    (tmp_path / "graph.pkl").write_bytes(b"junk")
    with pytest.raises(ProgCacheError, match="is not a saved call tree"):
        cache_tree_load(tmp_path / "graph.pkl")
    assert len(cache_tree_nodes()) == 4


class Attack:
    def __reduce__(self):
        return (os.mkdir, ("attacked",))


def test_a_graph_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "graph.pkl"
    path.write_bytes(pickle.dumps({"n": Attack()}))
    with pytest.raises(ProgCacheError, match="can't contain"):
        cache_tree_load(path)
    assert not Path("attacked").exists()
    node = {"id": "n", "fname": "f", "hash": "h", "outfile": Path("/x.pkl"), "files": [Path("/d")], "created": 1.0}
    path.write_bytes(pickle.dumps({"n": node}))  # as another tool writes this format
    cache_tree_load(path)
    assert cache_tree_nodes()["n"]["files"] == [Path("/d")]


def test_json_and_dot(pipeline, tmp_path):
    pipeline[0]()
    loaded = json.loads(cache_tree_to_json(tmp_path / "tree.json"))
    assert loaded == json.loads((tmp_path / "tree.json").read_text())
    assert {node["fname"] for node in loaded.values()} == {"report", "left", "right", "load"}
    dot = cache_tree_to_dot(tmp_path / "tree.dot")
    assert dot.startswith("digraph")
    assert dot.count(" -> ") == 4 + 4  # the file is an input of all four calls
    assert (tmp_path / "tree.dot").read_text() == dot


def test_the_stack_as_programs_use_it():
    module._cache_tree_register_node("A", "a", "1", Path("/a.pkl"))
    module._cache_tree_call_stack.append("A")
    module._cache_tree_register_node("B", "b", "2", Path("/b.pkl"))
    assert list(module._cache_tree_call_stack) == ["A"]
    assert module._cache_tree_call_stack.pop() == "A"
    assert module._cache_tree_graph["A"]["children"] == ["B"]
    assert module._cache_tree_graph["B"]["parents"] == ["A"]


def test_plot(pipeline, tmp_path):
    pytest.importorskip("matplotlib")
    report, store, data = pipeline
    assert plot_cache_graph().savefig
    report()

    def faces(figure):
        return sorted(patch.get_facecolor()[:3] for patch in figure.axes[0].patches)

    fresh = plot_cache_graph(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").stat().st_size > 1000
    shown = "\n".join(text.get_text() for text in fresh.axes[0].texts)
    assert all(name in shown for name in ("report", "left", "right", "load", "data.txt"))
    assert len(fresh.axes[0].patches) == 5
    data.write_text("9")
    stale = plot_cache_graph()
    assert faces(stale) != faces(fresh) == faces(plot_cache_graph(highlight_stale=False))
    next(store.glob("left.*")).unlink()
    assert faces(plot_cache_graph(highlight_stale=False)) != faces(fresh)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install 'cuda-progcache\[plot\]'"):
        plot_cache_graph()

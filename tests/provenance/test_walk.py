# SPDX-License-Identifier: Apache-2.0
"""Walks from every kind of result to everything it came from, through programs and memoized calls."""

from __future__ import annotations

import hashlib
import shutil

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, InMemoryProgramCache, memoize
from cuda_progcache.errors import AmbiguousDigestError, ProgCacheError
from cuda_progcache.memo.caches import Cache
from cuda_progcache.memo.call import Call
from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.memoize import file_cache
from cuda_progcache.memo.storage import CallMemory, ValueMemory
from cuda_progcache.provenance import export
from cuda_progcache.provenance.places import memoized_calls, recorded_calls
from cuda_progcache.provenance.walk import resolve, walk


def key_of(world, name):
    return str(world.service.calls.query(name=name).any().to_lookup_key())


def reached(graph):
    """Return the ids of the nodes that can be reached from the root along the edges."""
    seen, pending = set(), [graph.root]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [node.id for node in graph.targets(name)]
    return seen


def kinds(graph, ids=None):
    return {node.kind for node in graph.nodes.values() if ids is None or node.id in ids}


def of_kind(graph, kind):
    return [node for node in graph.nodes.values() if node.kind == kind]


def labels(graph, kind):
    return {node.label for node in of_kind(graph, kind)}


# Programs


def test_from_a_kernel_up_and_down(world):
    graph = walk(world.add[:10], world.cache, [world.memo])
    names = reached(graph)
    assert kinds(graph, names) == {"binary", "compile", "source", "render", "template", "tool", "prewarm"}
    root = graph.nodes[graph.root]
    assert root.digest == hashlib.sha256(world.cache.info(world.add).path.read_bytes()).hexdigest()
    (compiled,) = graph.targets(root.id)
    assert compiled.kind == "compile" and "-arch=sm_80" in compiled.detail["options"]
    assert compiled.detail["started"] < compiled.detail["ended"]
    (source,) = (node for node in graph.targets(compiled.id) if node.kind == "source")
    (rendered,) = graph.targets(source.id)
    assert rendered.detail["parameters"] == {"by": 1}
    assert rendered.detail["recorded"] and rendered.detail["template"] == "add.cu.j2"
    assert labels(graph, "tool") == {"nvrtc", "nvrtc-builtins"}
    assert {node.label: node.digest for node in of_kind(graph, "template")} == {
        name: hashlib.sha256((world.library / name).read_bytes()).hexdigest() for name in ("add.cu.j2", "by.cuh.j2")
    }
    (run,) = of_kind(graph, "prewarm")
    assert run.detail["archs"] == ["sm_80"] and run.detail["kernels"] == ["add"]
    assert run.detail["result"]["compiled"] == run.detail["programs"] == 2
    below = {node.label.rpartition(".")[2] for node in graph.sources(graph.root)}
    assert below == {"resource usage", "registers"}


def test_from_a_linked_program_through_its_parts(world):
    graph = walk(world.linked, world.cache)
    two = f"{world.place / 'two.cu'} (cubin, sm_80)"
    assert labels(graph, "binary") == {"both (cubin, sm_80)", "one.cu (cubin, sm_80)", two}
    assert labels(graph, "header") == {"scale.h"} and labels(graph, "tool") >= {"nvJitLink", "nvrtc"}
    part = walk(world.one, world.cache)
    assert [node.kind for node in part.sources(part.root)] == ["link"]
    assert labels(part, "binary") == {"both (cubin, sm_80)", "one.cu (cubin, sm_80)"}


def test_from_a_kernel_of_two_modules(world):
    graph = walk(world.pair, world.cache)
    assert len(of_kind(graph, "binary")) == 3
    assert labels(graph, "template") == {"lto_pair_activation.cu.j2", "lto_pair_kernel.cu.j2"}
    assert reached(graph) == set(graph.nodes)


def test_a_part_that_is_gone_is_said_to_be(world, tmp_path):
    shutil.copytree(world.place / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("lock*"))
    with FileStreamProgramCache(tmp_path / "cache", durability="none") as cache:
        for part in cache.info(world.pair).record["inputs"]:
            cache.remove(part["digest"])
        graph = walk(world.pair, cache)
        assert len(of_kind(graph, "input")) == 2 and len(of_kind(graph, "template")) == 2
        statement = export.to_slsa(cache, cache.info(world.pair))
        dependencies = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
        linked = [part for part in dependencies if part["annotations"]["role"] == "linked binary"]
        assert [len(part["digest"]["sha256"]) for part in linked] == [64, 64]  # from the link's own record
        assert {"template", "compiler"} <= {part["annotations"]["role"] for part in dependencies}


def test_an_entry_put_there_by_hand(world):
    assert kinds(walk(world.hand, world.cache)) == {"binary"}
    with pytest.raises(ProgCacheError, match="stored by hand"):
        export.to_slsa(world.cache, world.cache.info(world.hand))


# Calls


def test_from_a_rendering(world):
    rendering = world.service.calls.load(world.add).metadata["links"]["parents"][0]
    graph = walk(rendering[:16], world.cache)
    root = graph.nodes[graph.root]
    assert root.kind == "source" and len(root.digest) == 64
    assert kinds(graph, reached(graph)) == {"source", "render", "template", "prewarm"}
    assert {node.kind for node in graph.sources(graph.root)} == {"compile"}
    (source,) = of_kind(walk(world.add, world.cache), "source")
    assert graph.root == source.id  # both walks give the source the same id


def test_from_a_prewarm_run(world):
    short, whole = (walk(key_of(world, "prewarm"), world.cache, whole=each) for each in (False, True))
    assert short.nodes[short.root].detail["programs"] == len(of_kind(short, "binary"))
    assert kinds(short) == {"prewarm", "binary"}
    assert kinds(whole) == {"prewarm", "binary", "compile", "source", "render", "template", "tool"}
    assert not [edge for edge in whole.edges if edge.relation == "called by"]  # the walk began at the caller


def test_from_an_analysis(world):
    graph = walk(key_of(world, "resource_usage"), world.cache, [world.memo])
    assert graph.nodes[graph.root].detail["result"]["add"]["registers"] > 0
    assert kinds(graph, reached(graph)) >= {"analysis", "binary", "template", "tool", "call"}


def test_from_a_memoized_call_through_its_programs(world):
    graph = walk(world.report[:12], world.cache, [world.memo])
    assert kinds(graph, reached(graph)) >= {
        "value", "call", "binary", "link", "compile", "header", "template", "tool", "prewarm", "analysis",
    }  # fmt: skip
    assert "kernel = 'add'" in labels(graph, "value")
    inner = walk(world.registers, world.cache, [world.memo])
    callers = [edge for edge in inner.edges if edge.relation == "called by"]
    assert any(inner.nodes[edge.target].label.endswith("report") for edge in callers)


def test_from_a_call_in_memory_through_the_calls_it_made():
    cache = Cache(ValueMemory({}), CallMemory({}))

    @memoize(cache)
    def inner(x):
        return x + 1

    @memoize(cache)
    def outer(x, y):
        return inner(x) * inner(y)

    assert outer(1, 2) == 6
    graph = walk(outer.digest(1, 2), calls=[cache])
    assert sorted(node.label.rpartition(".")[2] for node in of_kind(graph, "call")) == ["inner", "inner", "outer"]
    (top,) = graph.targets(graph.root)
    assert sorted(node.label.rpartition(".")[2] for node in graph.targets(top.id)) == ["inner", "inner", "x", "y"]
    cache.evict(inner.digest(2))
    assert len(of_kind(walk(outer.digest(1, 2), calls=[cache]), "input")) == 1


def test_what_is_elsewhere_or_gone_is_said(world, tmp_path, library):
    gone = of_kind(walk(world.report, None, [world.memo]), "input")
    assert len(gone) == 3 and all(node.detail["gone"] for node in gone)
    with FileStreamProgramCache(tmp_path / "cache", durability="none") as cache:
        service = CompileService(cache, library=library)

        @memoize(tmp_path / "memo")
        def outer(kernel):
            return service.kernel(kernel, arch="sm_80").digest

        digest = outer("add")
        (missing,) = of_kind(walk(digest, cache), "gone")
        assert missing.label.endswith("outer") and missing.detail["key"] == outer.digest("add")
        assert not of_kind(walk(digest, cache, [file_cache(tmp_path / "memo")]), "gone")
        for call in service.calls.query(name="render"):
            service.calls.evict(call.to_lookup_key())
        graph = walk(digest, cache)
        (render,) = of_kind(graph, "render")
        assert not render.detail["recorded"] and len(of_kind(graph, "template")) == 2
        usage = (
            service.kernel("add", arch="sm_80").resource_usage() and service.calls.query(name="resource_usage").only()
        )
        service.prewarm(archs=["sm_80"], kernels=["add"])
        run = service.calls.query(name="prewarm").only()
        cache.remove(digest)
        for step in (run, usage):
            assert labels(walk(step.to_lookup_key(), cache), "input") == {f"program {digest[:12]}"}


def test_unknown_and_ambiguous_keys(world, tmp_path):
    for key in ("0000", "00" * 32):
        with pytest.raises(KeyError):
            walk(key, world.cache, [world.memo])
    twice = [file_cache(world.place / "memo")] * 2
    assert walk(world.report, None, twice).root  # a call found in two caches isn't ambiguous
    with FileStreamProgramCache(tmp_path / "many", durability="none") as many:
        for key in (b"key 205", b"key 364"):  # their digests share the first four digits
            many[key] = b"x"
        one, other = sorted(entry.digest for entry in many.entries())
        assert one[:4] == other[:4]
        assert walk(one, many).root == f"binary:{one}"
        with pytest.raises(AmbiguousDigestError):
            walk(one[:4], many)


def test_the_start_of_values_is_no_key():
    """Prefixes of value digests aren't keys, and values don't make the prefix of a call's key ambiguous."""
    one, other = 399, 496
    assert digest(one)[:4] == digest(other)[:4]
    calls = CompileService(InMemoryProgramCache()).calls
    memory = Cache(ValueMemory({}), CallMemory({}))
    for cache in (calls, memory):
        keys = [cache.save(Call("f", {"x": n}, result=n)) for n in (one, other)]
        for start in (digest(one)[:4], digest(one)[:20]):
            with pytest.raises(KeyError):
                resolve(start, [cache])
        assert [resolve(key[:8], [cache]) for key in keys] == keys
    for n in (69338, 136797):  # their digests begin as the first call's key does
        assert digest(n)[:4] == keys[0][:4]
        memory.values.save(n)
        assert resolve(keys[0][:4], [memory]) == keys[0]


def test_directories_of_calls(world, tmp_path):
    with pytest.raises(ProgCacheError, match="no calls are recorded in"):
        recorded_calls(tmp_path)
    assert len(memoized_calls(world.place / "memo")) == 1 and memoized_calls(tmp_path / "none") == []
    (kept,) = world.kept
    call, weights = kept.query().only(), world.place / "weights.txt"
    assert call.arguments["path"] == str(weights) and set(call.metadata["files"]) == {str(weights.resolve())}
    graph = walk(call.to_lookup_key()[:8], None, [kept])
    assert kinds(graph) == {"value", "call", "file", "input"}  # the compile is in another store
    assert [node.digest.partition(":")[0] for node in of_kind(graph, "file")] == ["xxhash64"]
    (programs,) = recorded_calls(world.place / "cache")
    assert programs.contains(world.linked)

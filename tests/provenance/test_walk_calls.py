# SPDX-License-Identifier: Apache-2.0
"""The walk from every kind of call, through programs and memoized calls alike, in the formats of others."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ET

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, LinkerOptions, ProgramOptions, link, memoize
from cuda_progcache.errors import AmbiguousDigestError, ProgCacheError
from cuda_progcache.keys import toolchain
from cuda_progcache.memo.cache_file import cache_file, track_file
from cuda_progcache.memo.memoize import file_cache
from cuda_progcache.provenance import export, picture
from cuda_progcache.provenance.affected import affected
from cuda_progcache.provenance.places import memoized_calls, recorded_calls
from cuda_progcache.provenance.walk import walk


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A prewarm run, a link of two programs with headers, analyses, memoized calls that used them; really made."""
    place = tmp_path_factory.mktemp("calls")
    (place / "include").mkdir()
    (place / "include" / "scale.h").write_text("#define SCALE 3\n")
    (place / "weights.txt").write_text("1 2 3")
    with FileStreamProgramCache(place / "cache") as cache:
        service = CompileService(cache)
        service.prewarm(archs=["sm_80"], kernels=["softmax"])

        def compiled(name, text):
            options = ProgramOptions(
                arch="sm_80", name=f"{name}.cu", include_path=[str(place / "include")], relocatable_device_code=True
            )
            return service.compile('#include "scale.h"\n' + text, options=options)

        one = compiled("one", "__device__ int one() { return SCALE; }")
        two = compiled("two", '__device__ int one();\nextern "C" __global__ void two(int *a) { *a = one(); }')
        linked = link([one, two], LinkerOptions(arch="sm_80", name="both"), cache=cache)

        @memoize(place / "memo")
        def registers(kernel):
            return service.kernel(kernel, arch="sm_80").resource_usage()

        @memoize(place / "memo")
        def report(kernel):
            return {
                **registers(kernel),
                "linked": link([one, two], LinkerOptions(arch="sm_80", name="both"), cache=cache).hit,
            }

        report("softmax")

        @cache_file(place / "kept", file_args=["path"])
        def load(path):
            return compiled("one", "__device__ int one() { return SCALE; }").hit and track_file(path).read_text()

        load(str(place / "weights.txt"))
        yield {
            "place": place, "cache": cache, "service": service, "one": one.digest, "two": two.digest,
            "linked": linked.digest, "softmax": service.kernel("softmax", arch="sm_80").digest,
            "memo": file_cache(place / "memo"), "report": report.digest("softmax"),
            "registers": registers.digest("softmax"),
        }  # fmt: skip


def key_of(world, name, **arguments):
    return str(world["service"].calls.query(name=name, arguments=arguments or None).any().to_lookup_key())


def reached(graph):
    """What a walk along the edges from the root meets."""
    seen, pending = set(), [graph.root]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += [node.id for node in graph.targets(name)]
    return {graph.nodes[name].kind for name in seen}, seen


def labels(graph, kind):
    return {node.label for node in graph.nodes.values() if node.kind == kind}


def test_from_a_program_up_and_down(world):
    graph = walk(world["softmax"][:10], world["cache"], [world["memo"]])
    kinds, names = reached(graph)
    assert kinds == {"binary", "compile", "source", "render", "template", "tool", "prewarm"}
    (run,) = (node for node in graph.nodes.values() if node.kind == "prewarm")
    assert run.detail["archs"] == ["sm_80"] and run.detail["kernels"] == ["softmax"]
    assert run.detail["result"]["compiled"] == run.detail["programs"] > 1
    (render,) = (node for node in graph.nodes.values() if node.kind == "render")
    assert render.detail["recorded"] and render.detail["template"] == "softmax.cu.j2"
    below = {node.label.rpartition(".")[2] for node in graph.sources(graph.root)}
    assert below == {"resource usage", "registers"} and graph.root not in names - {graph.root}


def test_from_a_linked_program_to_its_programs_headers(world):
    graph = walk(world["linked"], world["cache"])
    assert labels(graph, "binary") == {"both (cubin, sm_80)", "one.cu (cubin, sm_80)", "two.cu (cubin, sm_80)"}
    assert labels(graph, "header") == {"scale.h"} and labels(graph, "tool") >= {"nvJitLink", "nvrtc"}
    part = walk(world["one"], world["cache"])
    assert [node.kind for node in part.sources(part.root)] == ["link"]
    assert labels(part, "binary") == {"both (cubin, sm_80)", "one.cu (cubin, sm_80)"}


def test_from_a_rendering(world):
    graph = walk(key_of(world, "render")[:16], world["cache"])
    root = graph.nodes[graph.root]
    assert root.kind == "source" and len(root.digest) == 64
    kinds, _ = reached(graph)
    assert kinds == {"source", "render", "template", "prewarm"}
    assert {node.kind for node in graph.sources(graph.root)} == {"compile"}
    of_program = walk(world["softmax"], world["cache"])
    rendering = world["service"].calls.load(world["softmax"]).metadata["links"]["parents"][0]
    (source,) = labels_of(of_program, "source")
    assert walk(rendering, world["cache"]).root == source.id  # the same source, from either side


def test_from_a_prewarm_run(world):
    key = key_of(world, "prewarm")
    short, whole = (walk(key, world["cache"], whole=each) for each in (False, True))
    assert short.nodes[short.root].detail["programs"] == len(labels_of(short, "binary"))
    assert {node.kind for node in short.nodes.values()} == {"prewarm", "binary"}
    assert {node.kind for node in whole.nodes.values()} == {
        "prewarm", "binary", "compile", "source", "render", "template", "tool", "header",
    }  # fmt: skip
    assert not [edge for edge in whole.edges if edge.relation == "called by"]  # it is where the walk began


def labels_of(graph, kind):
    return [node for node in graph.nodes.values() if node.kind == kind]


def test_from_an_analysis(world):
    graph = walk(key_of(world, "resource_usage"), world["cache"], [world["memo"]])
    assert graph.nodes[graph.root].detail["result"]["softmax"]["registers"] > 0
    kinds, _ = reached(graph)
    assert kinds >= {"analysis", "binary", "template", "tool", "call"}


def test_from_a_memoized_call_through_its_programs(world):
    graph = walk(world["report"][:12], world["cache"], [world["memo"]])
    kinds, _ = reached(graph)
    assert kinds >= {"value", "call", "binary", "link", "compile", "header", "template", "tool", "prewarm", "analysis"}
    assert "kernel = 'softmax'" in labels(graph, "value")
    inner = walk(world["registers"], world["cache"], [world["memo"]])
    callers = [edge for edge in inner.edges if edge.relation == "called by"]
    assert any(inner.nodes[edge.target].label.endswith("report") for edge in callers)


def test_what_is_elsewhere_or_gone_is_said(world, tmp_path):
    alone = walk(world["report"], None, [world["memo"]])
    gone = [node for node in alone.nodes.values() if node.kind == "input"]
    assert len(gone) == 3 and all(node.detail["gone"] for node in gone)
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        service = CompileService(cache)

        @memoize(tmp_path / "memo")
        def outer(kernel):
            return service.kernel(kernel, arch="sm_80").digest

        digest = outer("softmax")
        (missing,) = (node for node in walk(digest, cache).nodes.values() if node.kind == "gone")
        assert missing.label.endswith("outer") and missing.detail["key"] == outer.digest("softmax")
        assert "gone" not in {node.kind for node in walk(digest, cache, [file_cache(tmp_path / "memo")]).nodes.values()}
        for call in service.calls.query(name="render"):
            service.calls.evict(call.to_lookup_key())
        graph = walk(digest, cache)
        (render,) = (node for node in graph.nodes.values() if node.kind == "render")
        assert not render.detail["recorded"] and len(labels(graph, "template")) == 3
        service.prewarm(archs=["sm_80"], kernels=["softmax"])
        run = service.calls.query(name="prewarm").only()
        cache.remove(digest)
        graph = walk(run.to_lookup_key(), cache)
        assert [node.label for node in graph.nodes.values() if node.kind == "input"] == [f"program {digest[:12]}"]


def test_unknown_and_ambiguous_keys(world):
    for key in ("0000", "00" * 32):
        with pytest.raises(KeyError):
            walk(key, world["cache"], [world["memo"]])
    others = [file_cache(world["place"] / "memo")]
    assert walk(world["report"], None, [*others, *others]).root  # one call in two places is one
    copies = FileStreamProgramCache(world["place"] / "many")
    digests = []
    for n in range(40):
        copies[f"key {n}"] = b"x"
    digests = sorted(entry.digest for entry in copies.entries())
    assert walk(digests[0], copies).root == f"binary:{digests[0]}"
    with pytest.raises((AmbiguousDigestError, KeyError)):
        walk(digests[0][:2], copies)


# What depends on a file


def told(found):
    return {(hit.label.rpartition(".")[2] if hit.entry is None else hit.label, hit.kind, hit.current) for hit in found}


def test_affected_through_links_and_calls(world):
    header = world["place"] / "include" / "scale.h"
    found = affected(world["cache"], header, [world["memo"], *recorded_calls(world["place"] / "kept")])
    assert told(found) == {
        ("one.cu", "header", True), ("two.cu", "header", True), ("both", "input", True), ("report", "call", True),
        ("load", "call", True),
    }  # fmt: skip
    assert [hit.entry is None for hit in found] == [False, False, False, True, True]
    assert told(affected(None, header, [world["memo"]])) == set()
    try:
        header.write_text("#define SCALE 5\n")
        assert {hit.current for hit in affected(world["cache"], header, [world["memo"]])} == {False}
    finally:
        header.write_text("#define SCALE 3\n")


def test_affected_by_a_file_that_a_call_read(world):
    weights, calls = world["place"] / "weights.txt", recorded_calls(world["place"] / "kept")
    assert told(affected(world["cache"], weights, calls)) == {("load", "file", True)}
    content = weights.read_text()
    try:
        weights.write_text("4 5 6")
        assert told(affected(world["cache"], weights, calls)) == {("load", "file", False)}
    finally:
        weights.write_text(content)
    assert affected(world["cache"], world["place"] / "other.txt", calls) == []


def test_a_call_kept_beside_the_programs_it_used(tmp_path):
    (tmp_path / "a.h").write_text("#define A 1\n")
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        service = CompileService(cache)

        @memoize(service.calls)
        def size(name):
            options = ProgramOptions(arch="sm_80", name=name, include_path=[str(tmp_path)])
            return len(service.compile('#include "a.h"\n__device__ int a = A;', options=options).data)

        assert size("k.cu") == size("k.cu") and size.counters == {"hits": 1, "misses": 1}
        assert told(affected(cache, tmp_path / "a.h")) == {("k.cu", "header", True), ("size", "call", True)}
        program = service.calls.query(name="k.cu").only().to_lookup_key()
        (above,) = (node for node in walk(program, cache).nodes.values() if node.kind == "call")
        assert above.detail["key"] == size.digest("k.cu")
        assert service.calls.gc() == set() and size.contains("k.cu")


def test_affected_by_a_template_reaches_memoized_calls(world):
    template = world["service"].library.path / "softmax.cu.j2"
    found = told(affected(world["cache"], template, [world["memo"]]))
    assert {("registers", "call", True), ("report", "call", True), ("softmax", "template", True)} <= found


def test_directories_of_calls(world, tmp_path):
    with pytest.raises(ProgCacheError, match="no calls are recorded in"):
        recorded_calls(tmp_path)
    assert len(memoized_calls(world["place"] / "memo")) == 1 and memoized_calls(tmp_path / "none") == []
    (kept,) = recorded_calls(world["place"] / "kept")
    call = kept.query().only()
    assert call.arguments["path"] == str(world["place"] / "weights.txt")
    assert set(call.metadata["files"]) == {str((world["place"] / "weights.txt").resolve())}
    graph = walk(call.to_lookup_key()[:8], None, [kept])
    assert {node.kind for node in graph.nodes.values()} == {
        "value",
        "call",
        "file",
        "input",
    }  # its compile is elsewhere
    assert any(node.kind == "file" and node.digest.startswith("xxhash64:") for node in graph.nodes.values())
    (programs,) = recorded_calls(world["place"] / "cache")
    assert programs.contains(world["linked"])


# Formats


@pytest.mark.parametrize("which", ["softmax", "linked", "report", "render", "prewarm", "resource_usage"])
def test_every_walk_in_every_format(world, which):
    model = pytest.importorskip("prov.model")
    key = world[which] if which in world else key_of(world, which)
    graph = walk(key, world["cache"], [world["memo"]], whole=True)
    document = model.ProvDocument.deserialize(content=json.dumps(export.to_prov(graph)), format="json")
    steps = {name for name, node in graph.nodes.items() if node.is_step}
    records = document.get_records()
    counted = {kind: sum(type(record) is kind for record in records) for kind in {type(r) for r in records}}
    assert counted[model.ProvActivity] == len(steps)
    assert counted[model.ProvEntity] == len(graph.nodes) - len(steps)
    used = [edge for edge in graph.edges if edge.relation == "used"]
    assert counted[model.ProvUsage] == sum(edge.target not in steps for edge in used)
    for edge in graph.edges:
        assert edge.source in steps or (edge.relation == "made by" and edge.target in steps), edge
    activities = {record.identifier for record in records if isinstance(record, model.ProvActivity)}
    for record in records:
        if isinstance(record, model.ProvUsage):
            assert record.args[0] in activities and record.args[1] not in activities
        if isinstance(record, model.ProvGeneration):
            assert record.args[0] not in activities and record.args[1] in activities
        if isinstance(record, model.ProvCommunication):
            assert {record.args[0], record.args[1]} <= activities
    assert len(json.loads(json.dumps(export.to_json(graph)))["nodes"]) == len(graph.nodes)
    assert export.to_dot(graph).count(" -> ") == len(graph.edges)
    drawn = ET.fromstring(picture.to_svg(graph))
    shown = " ".join(text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text"))
    for node in graph.nodes.values():
        assert picture.elided(node.label).rpartition("/")[2] in shown


def test_slsa_of_a_linked_program_has_all_that_its_parts_were_made_of(world):
    cache = world["cache"]
    made = export.to_slsa(cache, cache.info(world["linked"]))
    by_role = {}
    for part in made["predicate"]["buildDefinition"]["resolvedDependencies"]:
        by_role.setdefault(part["annotations"]["role"], {})[part["name"]] = part.get("digest", {})
    assert set(by_role) == {"linked binary", "source", "header", "compiler"}
    for name in ("one", "two"):
        content = hashlib.sha256(cache.info(world[name]).path.read_bytes()).hexdigest()
        assert by_role["linked binary"][f"{name}.cu.cubin"] == {"sha256": content}
    assert set(by_role["source"]) == {"one.cu", "two.cu"}
    assert by_role["header"] == {
        "scale.h": {"sha256": hashlib.sha256((world["place"] / "include" / "scale.h").read_bytes()).hexdigest()}
    }
    linker, compiler = toolchain.toolchain("ptx")[0], toolchain.toolchain("c++")[0]
    for tool in (linker, compiler):
        with open(tool.path, "rb") as file:
            assert by_role["compiler"][tool.name]["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()

# SPDX-License-Identifier: Apache-2.0
"""From a program to all it came from, from a file to all that came from it; and the formats it is told in."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, InMemoryProgramCache, KernelLibrary, ProgramOptions
from cuda_progcache._util import dsse
from cuda_progcache.errors import ProgCacheError
from cuda_progcache.keys import toolchain
from cuda_progcache.provenance import export, picture
from cuda_progcache.provenance.affected import affected
from cuda_progcache.provenance.graph import Graph, Node
from cuda_progcache.provenance.walk import walk


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A program with a header of ours, a kernel, a linked one, and an entry put by hand; really compiled."""
    place = tmp_path_factory.mktemp("provenance")
    (place / "include").mkdir()
    (place / "include" / "scale.h").write_text("#define SCALE 3\n")
    source = place / "own.cu"
    source.write_text('#include "scale.h"\nextern "C" __global__ void own(int *a) { *a *= SCALE; }\n')
    kernels = place / "kernels"
    shutil.copytree(KernelLibrary().path, kernels)
    with FileStreamProgramCache(place / "cache") as cache:
        service = CompileService(cache, library=KernelLibrary(kernels))
        own = service.compile(
            source.read_text(),
            options=ProgramOptions(arch="sm_80", name=str(source), include_path=[str(place / "include")]),
        ).digest
        softmax = service.kernel("softmax", arch="sm_80", dtype="float16").digest
        linked = service.kernel("lto_pair", arch="sm_80").digest
        cache["by hand"] = b"x"
        hand = next(entry.digest for entry in cache.entries() if not entry.record)
        yield {
            "cache": cache,
            "place": place,
            "kernels": kernels,
            "own": own,
            "softmax": softmax,
            "linked": linked,
            "hand": hand,
        }


def kinds(graph):
    found = {}
    for node in graph.nodes.values():
        found.setdefault(node.kind, set()).add(node.label)
    return found


def test_the_walk_from_a_kernel(world):
    cache = world["cache"]
    graph = walk(world["softmax"], cache)
    found = kinds(graph)
    assert found["header"] == {"cuda_fp16.h"}
    assert found["tool"] == {"nvrtc", "nvrtc-builtins"}
    assert found["template"] == {"packs.cuh.j2", "row_reduce.cuh.j2", "softmax.cu.j2"}
    for node in graph.nodes.values():
        if node.kind == "template":
            assert node.digest == hashlib.sha256((world["kernels"] / node.label).read_bytes()).hexdigest()
    root = graph.nodes[graph.root]
    assert root.digest == hashlib.sha256(cache.info(world["softmax"]).path.read_bytes()).hexdigest()
    (compiled,) = graph.targets(root.id)
    assert compiled.kind == "compile"
    assert "-arch=sm_80" in compiled.detail["options"]
    assert compiled.detail["started"] < compiled.detail["ended"]
    (source,) = (node for node in graph.targets(compiled.id) if node.kind == "source")
    (rendered,) = graph.targets(source.id)
    assert rendered.detail["parameters"]["dtype"] == "float16"
    assert {node.kind for node in graph.targets(rendered.id)} == {"template"}


def test_the_walk_from_a_linked_program_goes_through_its_parts(world):
    graph = walk(world["linked"], world["cache"])
    found = kinds(graph)
    assert len(found["binary"]) == 3
    assert found["template"] == {"lto_pair_activation.cu.j2", "lto_pair_kernel.cu.j2"}
    assert found["tool"] >= {"nvJitLink", "nvrtc"}
    reached, pending = set(), [graph.root]
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            pending += [node.id for node in graph.targets(name)]
    assert reached == set(graph.nodes)


def test_a_part_that_is_gone_is_said_to_be(world, tmp_path):
    shutil.copytree(world["place"] / "cache", tmp_path / "cache", ignore=shutil.ignore_patterns("lock*"))
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        for part in cache.info(world["linked"]).record["inputs"]:
            cache.remove(part["digest"])
        graph = walk(world["linked"], cache)
        assert len(kinds(graph)["input"]) == 2
        statement = export.to_slsa(cache, cache.info(world["linked"]))
        linked = [d for d in dependencies(statement) if d["annotations"]["role"] == "linked binary"]
        assert len(linked) == 2
        assert all(len(part["digest"]["sha256"]) == 64 for part in linked)  # the link's own record has them
        assert {"template", "compiler"} <= {d["annotations"]["role"] for d in dependencies(statement)}


def test_unknown_and_handmade_entries(world):
    with pytest.raises(KeyError):
        walk("00" * 32, world["cache"])
    graph = walk(world["hand"], world["cache"])
    assert [node.kind for node in graph.nodes.values()] == ["binary"]
    with pytest.raises(ProgCacheError, match="put there by hand"):
        export.to_slsa(world["cache"], world["cache"].info(world["hand"]))
    memory = InMemoryProgramCache()
    memory.publish(b"k", b"data", {"name": "k", "components": [["code", "1"]]})
    with pytest.raises(ProgCacheError, match="can't be read"):
        export.to_slsa(memory, next(memory.entries()))


# What depends on a file


def names(found):
    return {(hit.kind, hit.name, hit.current) for hit in found}


def test_affected_by_a_header(world):
    header = world["place"] / "include" / "scale.h"
    before = affected(world["cache"], header)
    assert [hit.entry.digest for hit in before] == [world["own"]]
    assert names(before) == {("header", "scale.h", True)}
    content = header.read_text()
    try:
        header.write_text("#define SCALE 4\n")
        assert names(affected(world["cache"], header)) == {("header", "scale.h", False)}
        header.unlink()
        assert names(affected(world["cache"], header)) == {("header", "scale.h", False)}
    finally:
        header.write_text(content)
    assert names(affected(world["cache"], world["place"] / "other" / "scale.h")) == {("header", "scale.h", False)}
    assert affected(world["cache"], world["place"] / "include" / "upscale.h") == []


def test_affected_by_a_template_and_a_source(world):
    assert names(affected(world["cache"], world["kernels"] / "packs.cuh.j2")) == {("template", "packs.cuh.j2", True)}
    assert names(affected(world["cache"], world["place"] / "own.cu")) == {
        ("source", str(world["place"] / "own.cu"), True)
    }
    found = affected(world["cache"], world["kernels"] / "lto_pair_kernel.cu.j2")
    part = world["cache"].info(world["linked"]).record["inputs"][1]["digest"]  # the other one has another template
    assert {hit.key for hit in found} == {world["linked"], part}


def test_affected_by_a_compiler(world):
    (nvrtc, *_) = toolchain.toolchain("c++")
    assert {hit.entry.digest for hit in affected(world["cache"], nvrtc.path)} == {
        entry.digest for entry in world["cache"].entries() if entry.record
    }
    (linker, *_) = toolchain.toolchain("ptx")
    assert [hit.entry.digest for hit in affected(world["cache"], linker.path)] == [world["linked"]]


def test_affected_through_a_binary_that_was_linked_in(tmp_path):
    (tmp_path / "a.h").write_text("1")
    digest = hashlib.sha256(b"1").hexdigest()
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        cache.publish(b"part", b"p", {"name": "part.cu", "headers": [{"name": "a.h", "digest": digest}]})
        (part,) = cache.entries()
        cache.publish(b"whole", b"w", {"name": "whole", "inputs": [{"name": "part", "digest": part.digest}]})
        assert names(affected(cache, tmp_path / "a.h")) == {("header", "a.h", True), ("input", "part.cu", True)}


# Formats


def test_json_and_dot_have_every_node_and_edge(world):
    graph = walk(world["linked"], world["cache"])
    told = json.loads(json.dumps(export.to_json(graph)))
    assert (len(told["nodes"]), len(told["edges"])) == (len(graph.nodes), len(graph.edges))
    assert told["start"] == graph.root
    dot = export.to_dot(graph)
    assert dot.count(" -> ") == len(graph.edges)
    assert dot.count("[label=") == len(graph.nodes) + len(graph.edges)
    odd = Graph()
    odd.add(Node('a"b\\', "file", 'quote " backslash \\ end'))
    assert r'"a\"b\\" [label="quote \" backslash \\ end"' in export.to_dot(odd)


def test_prov(world):
    model = pytest.importorskip("prov.model")
    graph = walk(world["linked"], world["cache"])
    document = model.ProvDocument.deserialize(content=json.dumps(export.to_prov(graph)), format="json")
    records = document.get_records()
    counted = {kind: sum(isinstance(record, kind) for record in records) for kind in {type(r) for r in records}}
    steps = sum(node.is_step for node in graph.nodes.values())
    assert counted[model.ProvEntity] == len(graph.nodes) - steps
    assert counted[model.ProvActivity] == steps == counted[model.ProvAssociation]
    assert counted[model.ProvUsage] == sum(edge.relation == "used" for edge in graph.edges)
    assert counted[model.ProvGeneration] == sum(edge.relation == "made by" for edge in graph.edges)
    assert any(record.get_startTime() for record in records if isinstance(record, model.ProvActivity))


def dependencies(statement):
    return statement["predicate"]["buildDefinition"]["resolvedDependencies"]


@pytest.mark.parametrize("which", ["own", "softmax", "linked"])
def test_in_toto_statement(world, which):
    from google.protobuf import json_format

    pytest.importorskip("in_toto_attestation")
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    cache = world["cache"]
    entry = cache.info(world[which])
    made = export.to_slsa(cache, entry)
    parsed = json_format.ParseDict(made, statement_pb2.Statement())  # unknown fields are refused
    Statement.copy_from_pb(parsed).validate()
    predicate = json_format.ParseDict(made["predicate"], provenance_pb2.Provenance())
    for descriptor in predicate.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(descriptor).validate()
        assert len(descriptor.digest["sha256"]) == 64
    assert made["subject"][0]["digest"]["sha256"] == hashlib.sha256(entry.path.read_bytes()).hexdigest()
    roles = {d["annotations"]["role"] for d in dependencies(made)}
    expected = {
        "own": {"source", "header", "compiler"},
        "softmax": {"source", "template", "header", "compiler"},
        "linked": {"linked binary", "source", "template", "compiler"},
    }
    assert roles == expected[which]
    (nvrtc, *_) = toolchain.toolchain("c++")
    told = next(d for d in dependencies(made) if d["name"] == "nvrtc")
    with open(nvrtc.path, "rb") as file:
        assert told["digest"]["sha256"] == hashlib.file_digest(file, "sha256").hexdigest()
    assert told["digest"]["gnuBuildId"] in nvrtc.identity


def test_a_compiler_that_isnt_here_is_named_by_its_build_id(world):
    record = world["cache"].info(world["own"]).record
    gone = {"name": "nvrtc", "digest": "build-id:0011223344:5"}
    with FileStreamProgramCache(world["place"] / "other") as cache:
        cache.publish(
            b"k", b"data", {**record, "toolchain": [gone, {"name": "libdevice", "digest": "sha256:" + "7" * 64}]}
        )
        statement = export.to_slsa(cache, next(cache.entries()))
    told = {d["name"]: d["digest"] for d in dependencies(statement) if d["annotations"]["role"] == "compiler"}
    assert told == {"nvrtc": {"gnuBuildId": "0011223344"}, "libdevice": {"sha256": "7" * 64}}


def test_signed(world, tmp_path):
    pytest.importorskip("securesystemslib")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import VerificationError
    from securesystemslib.signer import SSlibKey

    key = Ed25519PrivateKey.generate()
    pem = tmp_path / "key.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    statement = export.to_slsa(world["cache"], world["cache"].info(world["own"]))
    signed = json.loads(json.dumps(dsse.sign(statement, dsse.signer_from_pem(str(pem)))))
    payload = base64.b64decode(signed["payload"])
    assert json.loads(payload) == statement
    encoded = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)  # DSSE's PAE
    key.public_key().verify(base64.b64decode(signed["signatures"][0]["sig"]), encoded)
    public = SSlibKey.from_crypto(key.public_key())
    assert Envelope.from_dict(json.loads(json.dumps(signed))).verify([public], 1)  # which takes its argument apart
    signed["payload"] = base64.b64encode(b'{"another": 1}').decode()
    with pytest.raises(VerificationError):
        Envelope.from_dict(signed).verify([public], 1)
    pem.write_text("no key")
    with pytest.raises(ProgCacheError, match="is no private key"):
        dsse.signer_from_pem(str(pem))


# Pictures

SVG = "{http://www.w3.org/2000/svg}"


def large(headers):
    graph = Graph(root="binary")
    graph.add(Node("binary", "binary", "block_sum (cubin, sm_90)", "ab" * 32))
    graph.link("binary", graph.add(Node("compile", "compile", "compile with nvrtc")), "made by")
    graph.link("compile", graph.add(Node("source", "source", "block_sum.cu", "cd" * 32)), "used")
    folders = ["", "cub", "cub/block", "cuda/std/__type_traits"]
    for index in range(headers):
        name = f"{folders[index % 4]}/header_{index}.cuh".lstrip("/")
        graph.link("compile", graph.add(Node(name, "header", name, "12" * 32)), "used")
    return graph


def calls(count):
    graph = Graph()
    for index in range(count):
        graph.add(Node(f"n{index}", "call" if index % 3 else "value", f"function_{index}", None))
    for index in range(1, count):
        graph.link(f"n{(index * 7) % index}", f"n{index}", "used")
        graph.link(f"n{index // 3}", f"n{index}", "used")
    graph.link(f"n{count - 1}", "n0", "called by")  # a cycle
    return graph


@pytest.mark.parametrize(
    "graph", [Graph(), large(2), large(497), calls(5), calls(500)], ids=["empty", "5", "500", "calls-5", "calls-500"]
)
def test_svg_is_readable(graph):
    drawn = ET.fromstring(picture.to_svg(graph, 'a "title" & more'))
    width, height = float(drawn.get("width")), float(drawn.get("height"))
    assert drawn.get("font-size") == "12"
    boxes = [
        tuple(float(rect.get(side)) for side in ("x", "y", "width", "height"))
        for rect in drawn.iter(f"{SVG}rect")
        if rect.get("class") is not None
    ]
    texts = [(text.text, float(text.get("x")), float(text.get("y"))) for text in drawn.iter(f"{SVG}text")]
    shown = " ".join(text for text, _, _ in texts)
    for node in graph.nodes.values():
        assert node.label.rpartition("/")[2] in shown
    for x, y, w, h in boxes:
        assert x >= 0 and y >= 0 and x + w <= width + 0.5 and y + h <= height + 0.5
    ordered = sorted(boxes)
    for index, (x, y, w, h) in enumerate(ordered):
        for other in ordered[index + 1 :]:
            apart = other[0] >= x + w - 0.5 or other[1] >= y + h - 0.5 or other[1] + other[3] <= y + 0.5
            assert apart, "two boxes overlap"
    rows = {}
    for text, x, y in texts:  # every text lies in one box, and ends before the next text of its row begins
        end = x + picture.text_width(text)
        assert any(bx <= x and end <= bx + bw and by <= y <= by + bh for bx, by, bw, bh in boxes), text
        rows.setdefault(y, []).append((x, end))
    for row in rows.values():
        row.sort()
        assert all(one[1] <= other[0] for one, other in pairwise(row))


def test_svg_of_many_headers_is_a_page_not_a_strip():
    drawn = ET.fromstring(picture.to_svg(large(497)))
    width, height = float(drawn.get("width")), float(drawn.get("height"))
    assert 0.5 < width / height < 3.5
    assert sum(1 for _ in drawn.iter(f"{SVG}path")) == 3  # the headers share an edge


def test_svg_edges_run_between_the_boxes(world):
    graph = walk(world["linked"], world["cache"])
    boxes, routes, _, _ = picture.arrange(graph)
    box_of = {name: box for box in boxes for name in box.ids}
    assert len(routes) == len({(box_of[edge.source], box_of[edge.target], edge.relation) for edge in graph.edges})
    for path, _ in routes:
        assert all(one.x > other.x + other.width for one, other in pairwise(path))
        for passing in path[1:-1]:  # an edge that passes a layer goes straight through it, where there is no box
            for box in (box for box in boxes if box.layer == passing.layer):
                assert passing.x <= box.x and box.x + box.width <= passing.x + passing.width
                assert box.y >= passing.y + passing.height or box.y + box.height <= passing.y


def many_compiles(count):
    """Programs whose sources come in another order than they, all compiled by one compiler."""
    graph = Graph(root="run")
    graph.add(Node("run", "prewarm", "prewarm", None, {"archs": ["sm_90"], "duration": 2.5}))
    for index in range(count):
        graph.link("run", graph.add(Node(f"binary {index}", "binary", f"k{index} (cubin, sm_90)")), "used")
        graph.link(f"binary {index}", graph.add(Node(f"compile {index}", "compile", "compile with nvrtc")), "made by")
        graph.link(f"compile {index}", graph.add(Node(f"source {index}", "source", f"k{index}.cu")), "used")
        for tool in ("nvrtc", "nvrtc-builtins"):
            graph.link(f"compile {index}", graph.add(Node(tool, "tool", tool, "build-id:12:3")), "used")
        for header in ("cuda_fp16.h", "mma.h")[: index % 3]:
            graph.link(f"compile {index}", graph.add(Node(header, "header", header, "12" * 32)), "used")
    for index in reversed(range(count)):
        graph.link(f"source {index}", graph.add(Node(f"render {index}", "render", f"render k{index}")), "made by")
    return graph


def test_svg_puts_what_belongs_together_side_by_side():
    graph = many_compiles(40)
    boxes, _, _, _ = picture.arrange(graph)
    box_of = {name: box for box in boxes for name in box.ids}
    assert box_of["nvrtc"] is box_of["nvrtc-builtins"]
    order = {kind: sorted(range(40), key=lambda n: box_of[f"{kind} {n}"].y) for kind in ("compile", "source", "render")}
    assert order["compile"] == order["source"] == order["render"]
    drawn = ET.fromstring(picture.to_svg(graph))
    assert {"sm_90", "2.5 s"} <= {text.text for text in drawn.iter(f"{SVG}text")}


def test_svg_draws_what_runs_together_once():
    graph = many_compiles(12)
    for index in range(12):  # a way around the compile, through its layer
        graph.link(f"binary {index}", "nvrtc", "used")
    _, routes, _, _ = picture.arrange(graph)
    assert len({tuple(path[1:-1]) for path, _ in routes if len(path) > 2}) == 1
    lines = [path.get("d") for path in ET.fromstring(picture.to_svg(graph)).iter(f"{SVG}path")]
    assert len(lines) == len(set(lines))


# Calls


def test_the_walk_from_a_memoized_call():
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.memo.memoize import memoize
    from cuda_progcache.memo.storage import CallMemory, ValueMemory

    cache = Cache(ValueMemory({}), CallMemory({}))

    @memoize(cache)
    def inner(x):
        return x + 1

    @memoize(cache)
    def outer(x, y):
        return inner(x) * inner(y)

    assert outer(1, 2) == 6
    graph = walk(outer.digest(1, 2), calls=[cache])
    found = kinds(graph)
    assert {label.rpartition(".")[2] for label in found["call"]} == {"inner", "outer"}
    assert sum(node.kind == "call" for node in graph.nodes.values()) == 3
    (top,) = graph.targets(graph.root)
    assert sorted(node.label.rpartition(".")[2] for node in graph.targets(top.id)) == ["inner", "inner", "x", "y"]
    cache.evict(inner.digest(2))
    assert len(kinds(walk(outer.digest(1, 2), calls=[cache]))["input"]) == 1
    with pytest.raises(KeyError):
        walk("0" * 64, calls=[cache])

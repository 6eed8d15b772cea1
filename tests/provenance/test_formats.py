# SPDX-License-Identifier: Apache-2.0
"""Graphs in standard formats, read by the formats' reference libraries, and as pictures."""

from __future__ import annotations

import base64
import hashlib
import json
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from cuda_progcache import FileStreamProgramCache, InMemoryProgramCache
from cuda_progcache._util import dsse
from cuda_progcache.errors import ProgCacheError
from cuda_progcache.keys import toolchain
from cuda_progcache.provenance import export, picture
from cuda_progcache.provenance.graph import Graph, Node
from cuda_progcache.provenance.walk import walk

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("which", ["add", "linked", "pair", "report", "render", "prewarm", "resource_usage"])
def test_every_walk_in_every_format(world, which):
    model = pytest.importorskip("prov.model")
    key = getattr(world, which, None) or world.service.calls.query(name=which).any().to_lookup_key()
    graph = walk(str(key), world.cache, [world.memo], whole=True)
    steps = {name for name, node in graph.nodes.items() if node.is_step}
    used = [edge for edge in graph.edges if edge.relation == "used"]
    for edge in graph.edges:
        assert edge.source in steps or (edge.relation == "made by" and edge.target in steps), edge

    document = model.ProvDocument.deserialize(content=json.dumps(export.to_prov(graph)), format="json")
    records = document.get_records()
    counted = {kind: sum(type(record) is kind for record in records) for kind in {type(r) for r in records}}
    assert counted[model.ProvActivity] == counted[model.ProvAssociation] == len(steps)
    assert counted[model.ProvEntity] == len(graph.nodes) - len(steps)
    assert counted[model.ProvUsage] == sum(edge.target not in steps for edge in used)
    assert counted.get(model.ProvGeneration, 0) == sum(edge.relation == "made by" for edge in graph.edges)
    activities = {record.identifier for record in records if isinstance(record, model.ProvActivity)}
    ends = {model.ProvUsage: (True, False), model.ProvGeneration: (False, True), model.ProvCommunication: (True, True)}
    for record in records:
        if type(record) in ends:
            assert tuple(end in activities for end in record.args[:2]) == ends[type(record)]
    assert any(record.get_startTime() for record in records if isinstance(record, model.ProvActivity))

    told = json.loads(json.dumps(export.to_json(graph)))
    assert (len(told["nodes"]), len(told["edges"])) == (len(graph.nodes), len(graph.edges))
    assert told["start"] == graph.root
    dot = export.to_dot(graph)
    assert dot.count(" -> ") == len(graph.edges)
    assert dot.count("[label=") == len(graph.nodes) + len(graph.edges)
    drawn = ET.fromstring(picture.to_svg(graph))
    shown = " ".join(text.text for text in drawn.iter(f"{SVG}text"))
    for node in graph.nodes.values():
        assert picture.elided(node.label).rpartition("/")[2] in shown


def test_names_in_dot():
    odd = Graph()
    odd.add(Node('a"b\\', "file", 'quote " backslash \\ end'))
    assert r'"a\"b\\" [label="quote \" backslash \\ end"' in export.to_dot(odd)


# Statements


def dependencies(statement):
    return statement["predicate"]["buildDefinition"]["resolvedDependencies"]


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize(
    ("which", "roles"),
    [
        ("two", {"source", "header", "compiler"}),
        ("add", {"source", "template", "compiler"}),
        ("pair", {"linked binary", "source", "template", "compiler"}),
        ("linked", {"linked binary", "source", "header", "compiler"}),
    ],
)
def test_in_toto_statement(world, which, roles):
    from google.protobuf import json_format

    pytest.importorskip("in_toto_attestation")
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    entry = world.cache.info(getattr(world, which))
    made = export.to_slsa(world.cache, entry)
    parsed = json_format.ParseDict(made, statement_pb2.Statement())  # raises if a field is unknown
    Statement.copy_from_pb(parsed).validate()
    predicate = json_format.ParseDict(made["predicate"], provenance_pb2.Provenance())
    for descriptor in predicate.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(descriptor).validate()
        assert len(descriptor.digest["sha256"]) == 64
    assert made["subject"][0]["digest"]["sha256"] == sha256(entry.path)
    assert {part["annotations"]["role"] for part in dependencies(made)} == roles
    (nvrtc, *_) = toolchain.toolchain("c++")
    told = next(part for part in dependencies(made) if part["name"] == "nvrtc")
    assert told["digest"]["sha256"] == sha256(nvrtc.path) and told["digest"]["gnuBuildId"] in nvrtc.identity


def test_a_linked_program_has_all_that_its_parts_were_made_of(world):
    by_role = {}
    for part in dependencies(export.to_slsa(world.cache, world.cache.info(world.linked))):
        by_role.setdefault(part["annotations"]["role"], {})[part["name"]] = part["digest"]
    sources = {"one.cu": world.one, str(world.place / "two.cu"): world.two}
    assert by_role["linked binary"] == {
        f"{name}.cubin": {"sha256": sha256(world.cache.info(key).path)} for name, key in sources.items()
    }
    assert set(by_role["source"]) == set(sources)
    assert by_role["header"] == {"scale.h": {"sha256": sha256(world.header)}}
    for tool in (toolchain.toolchain("ptx")[0], toolchain.toolchain("c++")[0]):
        assert by_role["compiler"][tool.name]["sha256"] == sha256(tool.path)


def test_a_program_without_files_has_no_statement():
    memory = InMemoryProgramCache()
    memory.publish(b"k", b"data", {"name": "k", "components": [["code", "1"]]})
    with pytest.raises(ProgCacheError, match="can't be read"):
        export.to_slsa(memory, next(memory.entries()))


def test_a_compiler_that_isnt_here_is_named_by_its_build_id(world, tmp_path):
    record = world.cache.info(world.two).record
    tools = [
        {"name": "nvrtc", "digest": "build-id:0011223344:5"},
        {"name": "libdevice", "digest": "sha256:" + "7" * 64},
    ]
    with FileStreamProgramCache(tmp_path / "other", durability="none") as cache:
        cache.publish(b"k", b"data", {**record, "toolchain": tools})
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
    statement = export.to_slsa(world.cache, world.cache.info(world.two))
    signed = json.loads(json.dumps(dsse.sign(statement, dsse.signer_from_pem(str(pem)))))
    payload = base64.b64decode(signed["payload"])
    assert json.loads(payload) == statement
    encoded = b"DSSEv1 28 application/vnd.in-toto+json %d %s" % (len(payload), payload)  # DSSE's PAE
    key.public_key().verify(base64.b64decode(signed["signatures"][0]["sig"]), encoded)
    public = SSlibKey.from_crypto(key.public_key())
    assert Envelope.from_dict(json.loads(json.dumps(signed))).verify([public], 1)  # from_dict modifies its argument
    signed["payload"] = base64.b64encode(b'{"another": 1}').decode()
    with pytest.raises(VerificationError):
        Envelope.from_dict(signed).verify([public], 1)
    pem.write_text("no key")
    with pytest.raises(ProgCacheError, match="isn't a supported private key"):
        dsse.signer_from_pem(str(pem))


# Pictures


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
    tips = " ".join(title.text for title in drawn.iter(f"{SVG}title"))
    crowd = len(graph.nodes) > picture.NAMED  # many headers are shown as directories, with their names in tooltips
    for node in graph.nodes.values():
        assert node.label.rpartition("/")[2] in (shown + tips if crowd and node.kind == "header" else shown)
    for x, y, w, h in boxes:
        assert x >= 0 and y >= 0 and x + w <= width + 0.5 and y + h <= height + 0.5
    ordered = sorted(boxes)
    for index, (x, y, w, h) in enumerate(ordered):
        for other in ordered[index + 1 :]:
            apart = other[0] >= x + w - 0.5 or other[1] >= y + h - 0.5 or other[1] + other[3] <= y + 0.5
            assert apart, "two boxes overlap"
    rows = {}
    for text, x, y in texts:  # each text lies in a box, and ends before the next text in its row begins
        end = x + picture.text_width(text)
        assert any(bx <= x and end <= bx + bw and by <= y <= by + bh for bx, by, bw, bh in boxes), text
        rows.setdefault(y, []).append((x, end))
    for row in rows.values():
        row.sort()
        assert all(one[1] <= other[0] for one, other in pairwise(row))


@pytest.mark.parametrize("count", [40, 497])
def test_svg_of_many_headers_fits_a_screen(count):
    drawn = ET.fromstring(picture.to_svg(large(count)))
    width, height = float(drawn.get("width")), float(drawn.get("height"))
    assert width < 1400
    assert height < 900
    assert sum(1 for _ in drawn.iter(f"{SVG}path")) == 3  # the headers share an edge


def test_svg_edges_run_between_the_boxes(world):
    graph = walk(world.pair, world.cache)
    boxes, routes, _, _ = picture.arrange(graph)
    box_of = {name: box for box in boxes for name in box.ids}
    assert len(routes) == len({(box_of[edge.source], box_of[edge.target], edge.relation) for edge in graph.edges})
    for path, _ in routes:
        assert all(one.x > other.x + other.width for one, other in pairwise(path))
        for passing in path[1:-1]:  # an edge crosses a layer in a straight line, where there is no box
            for box in (box for box in boxes if box.layer == passing.layer):
                assert passing.x <= box.x and box.x + box.width <= passing.x + passing.width
                assert box.y >= passing.y + passing.height or box.y + box.height <= passing.y


def many_compiles(count):
    """Return a graph of programs from one compiler, whose renderings are in the reverse order."""
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
    assert {"sm_90", "2.50 s"} <= {text.text for text in drawn.iter(f"{SVG}text")}


def test_svg_draws_what_runs_together_once():
    graph = many_compiles(12)
    for index in range(12):  # an edge that bypasses the compile and crosses its layer
        graph.link(f"binary {index}", "nvrtc", "used")
    _, routes, _, _ = picture.arrange(graph)
    assert len({tuple(path[1:-1]) for path, _ in routes if len(path) > 2}) == 1
    lines = [path.get("d") for path in ET.fromstring(picture.to_svg(graph)).iter(f"{SVG}path")]
    assert len(lines) == len(set(lines))

# SPDX-License-Identifier: Apache-2.0
"""The results that a file affects: programs, links and memoized calls."""

from __future__ import annotations

import contextlib
import hashlib

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, ProgramOptions, memoize
from cuda_progcache.keys import toolchain
from cuda_progcache.provenance.affected import affected
from cuda_progcache.provenance.walk import walk


def told(found):
    return {(hit.label.rpartition(".")[2] if hit.entry is None else hit.label, hit.kind, hit.current) for hit in found}


@contextlib.contextmanager
def edited(path, content):
    """Replace the file's content, or remove the file if `content` is None; restore it at the end."""
    before = path.read_text()
    try:
        path.unlink() if content is None else path.write_text(content)
        yield
    finally:
        path.write_text(before)


def test_a_header_through_links_and_calls(world):
    two, calls = str(world.place / "two.cu"), [world.memo, *world.kept]
    found = affected(world.cache, world.header, calls)
    assert told(found) == {
        ("one.cu", "header", True), (two, "header", True), ("both", "input", True), ("report", "call", True),
        ("load", "call", True),
    }  # fmt: skip
    assert [hit.entry is None for hit in found] == [False, False, False, True, True]
    assert {hit.name for hit in found if hit.kind == "header"} == {"scale.h"}
    assert told(affected(None, world.header, [world.memo])) == set()
    for content in ("#define SCALE 4\n", None):
        with edited(world.header, content):
            assert {hit.current for hit in affected(world.cache, world.header, calls)} == {False}
    elsewhere = affected(world.cache, world.place / "other" / "scale.h")
    assert told(elsewhere) == {("one.cu", "header", False), (two, "header", False), ("both", "input", False)}
    assert affected(world.cache, world.place / "include" / "upscale.h") == []


def test_a_template_and_a_source(world):
    shared = affected(world.cache, world.library / "by.cuh.j2", [world.memo])
    assert told(shared) == {
        ("add", "template", True), ("registers", "call", True), ("report", "call", True),
    }  # fmt: skip
    assert len(shared) == 4  # with the other variant of add
    source = world.place / "two.cu"
    assert told(affected(world.cache, source)) == {(str(source), "source", True), ("both", "input", True)}
    found = affected(world.cache, CompileService(None).library.path / "lto_pair_kernel.cu.j2")
    part = world.cache.info(world.pair).record["inputs"][1]["digest"]  # inputs[0] has another template
    assert {hit.key for hit in found} == {world.pair, part}


def test_a_compiler(world):
    (nvrtc, *_), (linker, *_) = toolchain.toolchain("c++"), toolchain.toolchain("ptx")
    everything = {entry.digest for entry in world.cache.entries() if entry.record}
    assert {hit.key for hit in affected(world.cache, nvrtc.path)} == everything
    assert {hit.key for hit in affected(world.cache, linker.path)} == {world.linked, world.pair}


def test_a_file_that_a_call_read(world):
    weights = world.place / "weights.txt"
    assert told(affected(world.cache, weights, world.kept)) == {("load", "file", True)}
    with edited(weights, "4 5 6"):
        assert told(affected(world.cache, weights, world.kept)) == {("load", "file", False)}
    assert affected(world.cache, world.place / "other.txt", world.kept) == []


@pytest.mark.parametrize("links", [1, 3])
def test_binaries_linked_into_binaries(tmp_path, links):
    (tmp_path / "a.h").write_text("1")
    digest = hashlib.sha256(b"1").hexdigest()
    with FileStreamProgramCache(tmp_path / "cache", durability="none") as cache:
        cache.publish(b"0", b"p", {"name": "link 0", "headers": [{"name": "a.h", "digest": digest}]})
        (part,) = cache.entries()
        for n in range(1, links + 1):
            cache.publish(b"%d" % n, b"w", {"name": f"link {n}", "inputs": [{"name": "p", "digest": part.digest}]})
            part = cache.info(hashlib.sha256(b"%d" % n).hexdigest())
        found = affected(cache, tmp_path / "a.h")
        assert {(hit.kind, hit.name, hit.current) for hit in found} == {
            ("header", "a.h", True), *(("input", f"link {n}", True) for n in range(links)),
        }  # fmt: skip


def test_a_call_kept_beside_the_programs_it_used(tmp_path):
    (tmp_path / "a.h").write_text("#define A 1\n")
    with FileStreamProgramCache(tmp_path / "cache", durability="none") as cache:
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

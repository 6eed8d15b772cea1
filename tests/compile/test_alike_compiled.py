# SPDX-License-Identifier: Apache-2.0
"""Edits of comments and white space: hits where neither the output nor the log can tell."""

from __future__ import annotations

import os
import random

import pytest

from cuda_progcache import FileStreamProgramCache, InMemoryProgramCache, Program, ProgramOptions, ReadOnlyProgramCache
from cuda_progcache.compile import manifests

HEADER = """\
#pragma once
// Squares, and the line that it stands in.
__device__ inline int square(int x) { return x * x + __LINE__; }  /* of a number */
"""
SOURCE = """\
#include <square.h>
/* A kernel. */
extern "C" __global__ void k(int *a) {
    a[threadIdx.x] = square(a[threadIdx.x]);  // in place
}
"""


def edited(text, seed):
    """The text with other comments and other white space, in the same lines."""
    rng = random.Random(seed)
    return "".join(_edited_line(line, rng) + "\n" for line in text.splitlines())


def _edited_line(line, rng):
    if "//" in line or "/*" in line:
        return line.replace("// ", f"// {rng.random()} ").replace("/* ", f"/* {rng.random()} ")
    if not line.startswith("#"):
        line = "  " * rng.randrange(3) + line.replace(" ", " " * rng.randrange(1, 4)) + "\t" * rng.randrange(2)
    return line + f"  // {rng.random()}" * rng.randrange(2)


def fresh(source, **options):
    return Program(source, "c++", ProgramOptions(**{"arch": "sm_80"} | options)).compiled("cubin")


def forget():
    """As in the next process."""
    manifests._manifests.clear()


@pytest.mark.parametrize("where", ["source", "header", "both"])
@pytest.mark.parametrize("seed", range(3))
def test_an_edit_of_comments_hits(compiled, project, where, seed):
    project("inc/square.h", HEADER)
    first = compiled(SOURCE, include_path="inc")
    source = edited(SOURCE, seed) if where != "header" else SOURCE
    if where != "source":
        project("inc/square.h", edited(HEADER, seed))
    for _ in range(2):
        again = compiled(source, include_path="inc")
        assert again.hit
        assert again.digest == first.digest
        assert again.data == first.data == fresh(source, include_path="inc").data
        forget()
    project("inc/square.h", HEADER.replace("x * x", "x + x"))
    assert not compiled(source, include_path="inc").hit


def test_without_headers(compiled, cache):
    source = SOURCE.replace("#include <square.h>", "__device__ int square(int x) { return x; }")
    first = compiled(source)
    assert compiled(edited(source, 1)).hit
    forget()
    assert compiled(edited(source, 2)).digest == first.digest
    assert not compiled(source.replace("[threadIdx.x]);", "[0]);")).hit
    counted = cache.stats()
    assert (counted.hits, counted.misses) == (2, 2), "a lookup is counted once"


def test_every_lookup_is_counted_once(compiled, cache, project):
    project("inc/square.h", HEADER)
    for seed in (0, 1, 1, 2):
        project("inc/square.h", edited(HEADER, seed))
        compiled(edited(SOURCE, seed), include_path="inc")
    counted = cache.stats()
    assert (counted.hits, counted.misses) == (3, 1)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        (SOURCE, {"lineinfo": True}),
        (SOURCE, {"debug": True}),
        (SOURCE, {"extra_flags": "-lineinfo"}),
        (SOURCE, {"extra_flags": ("--device-debug",)}),
        (SOURCE.replace("{\n", "{ int unused;\n", 1), {}),  # a warning quotes its line
        (SOURCE.replace("a[threadIdx.x] =", "a[threadIdx.x] = __builtin_COLUMN() +"), {}),
    ],
    ids=["lineinfo", "debug", "-lineinfo", "--device-debug", "a log", "columns"],
)
def test_what_can_tell_of_it_is_compiled_again(compiled, project, source, options):
    project("inc/square.h", HEADER)
    compiled(source, include_path="inc", **options)
    for seed in range(2):
        done = compiled(edited(source, seed), include_path="inc", **options)
        assert not done.hit
        alone = fresh(edited(source, seed), include_path="inc", **options)
        assert (done.data, done.log) == (alone.data, alone.log)


def test_a_moved_line_is_compiled_again(compiled, project):
    project("inc/square.h", HEADER)
    compiled(SOURCE, include_path="inc")
    project("inc/square.h", "// One more line.\n" + HEADER)
    done = compiled(SOURCE, include_path="inc")
    assert not done.hit
    assert done.data == fresh(SOURCE, include_path="inc").data


def test_a_shadowing_header_counts(compiled, project):
    project("inc/square.h", HEADER)
    os.mkdir(project.folder / "first")
    options = {"include_path": ["first", "inc"]}
    compiled(SOURCE, **options)
    project("first/square.h", HEADER.replace("x * x", "x - x"))
    done = compiled(edited(SOURCE, 1), **options)
    assert not done.hit
    assert done.data == fresh(SOURCE, **options).data


def test_in_memory_and_in_a_layer_that_is_only_read(project, tmp_path):
    project("inc/square.h", HEADER)
    options = ProgramOptions(arch="sm_80", include_path="inc")
    memory = InMemoryProgramCache()
    with FileStreamProgramCache(tmp_path / "layer", durability="none") as store:
        Program(SOURCE, "c++", options).compiled("cubin", cache=store)
    Program(SOURCE, "c++", options).compiled("cubin", cache=memory)
    assert Program(edited(SOURCE, 1), "c++", options).compiled("cubin", cache=memory).hit
    with ReadOnlyProgramCache(tmp_path / "layer") as layer:
        forget()
        assert Program(edited(SOURCE, 1), "c++", options).compiled("cubin", cache=layer).hit


def test_a_bundle_brings_it_along(cache, compiled, project, tmp_path):
    project("inc/square.h", HEADER)
    compiled(SOURCE, include_path="inc")
    cache.export(tmp_path / "bundle.tar")
    forget()
    with FileStreamProgramCache(tmp_path / "other", durability="none") as store:
        store.import_(tmp_path / "bundle.tar")
        assert compiled(edited(SOURCE, 1), include_path="inc", store=store).hit

# SPDX-License-Identifier: Apache-2.0
"""The resources of every kernel, and its compile without warnings: all variants, on the architectures of prewarm."""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Any

import ptxas_log
import pytest
from architectures import ARCHS, one_of

MANIFEST = tomllib.loads((Path(__file__).parents[2] / "kernels" / "manifest.toml").read_text())["kernels"]
# The shared memory that a block can request, in bytes (CUDA C++ Programming Guide, "Compute Capabilities").
MOST_SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "sm_120": 99 * 1024}
IN_LOCAL_MEMORY = ("spill_store_bytes", "spill_load_bytes", "stack_bytes", "local_bytes")


def variants(kernel: str, arch: str) -> list[dict[str, Any]]:
    """Return the variants to test on `arch`: the defaults on all, each other one on a single architecture in turn.

    The other variants of kernels that include CCCL are tested on sm_90.
    """
    first, *others = MANIFEST[kernel]["variants"]
    if "cccl" in MANIFEST[kernel].get("headers", ()):
        return [first, *others] if arch == "sm_90" else [first]
    return [first, *(one for number, one in enumerate(others) if arch in one_of(number + len(kernel)))]


def largest_block(source: str) -> int:
    """Return the number of threads in the largest block that the launch description in a kernel's source allows."""
    return max(math.prod(map(int, sizes)) for sizes in re.findall(r"block\s+\((\d+), (\d+), (\d+)\)", source))


def registers_for(threads: int) -> int:
    """Return how many registers a thread can have in a block of `threads`.

    A block has 64 Ki registers, allocated to warps in units of 256 (8 per thread); a thread has at most 255.
    """
    return min(255, 65536 // (-(-threads // 32) * 32) // 8 * 8)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", MANIFEST)
def test_compiles_clean_and_uses_what_ptxas_says(library: Any, compiled: Any, kernel: str, arch: str) -> None:
    assert not MANIFEST[kernel]["variants"][0], "the first variant is the defaults"
    for variant in variants(kernel, arch):
        rendered = library.render(kernel, **variant)
        program = compiled(kernel, arch, **variant)
        assert not ptxas_log.warnings(program.log), variant
        usage = program.resource_usage()
        assert not ptxas_log.differences(usage, program.log), variant
        names = {name.encode() for name in rendered.entry_points} | set(program.symbol_mapping.values())
        assert {name.encode() for name in usage} == names, variant
        threads = largest_block(rendered.modules[-1].source)
        dynamic = max(one.shared_bytes for one in library.launches(kernel, **variant).values())
        assert f"dynamic shared memory: {dynamic} bytes" in rendered.modules[-1].source, variant
        for function, used in usage.items():
            assert not any(used[name] for name in IN_LOCAL_MEMORY), (variant, function, used)
            assert used["registers"] <= registers_for(threads), (variant, function, used)
            assert used["shared_bytes"] + dynamic <= MOST_SHARED[arch], (variant, function, used)
            assert used["shared_bytes"] <= 48 * 1024, (variant, function, used)
        check_launch_bounds(library.launches(kernel, **variant), rendered.modules[-1].source, program.data, variant)


# A kernel's attribute in a cubin (form 4, number 5, 12 bytes): the block size that it was compiled for, as x, y, z.
MAX_THREADS = re.compile(rb"\x04\x05\x0c\x00(.{4})\x01\0\0\0\x01\0\0\0", re.DOTALL)
MIN_BLOCKS = re.compile(r"__launch_bounds__\((?:[^(),]|\([^(),]*\))+(?:, (\d+))?\)")


def check_launch_bounds(launches: dict[str, Any], source: str, cubin: bytes, variant: dict[str, Any]) -> None:
    """Check that the launch bounds in the manifest, the source and the cubin are the same."""
    threads = {int.from_bytes(found, "little") for found in MAX_THREADS.findall(cubin)}
    assert threads == {one.threads for one in launches.values()}, variant
    assert max(threads) == largest_block(source), variant
    least = {one.min_blocks for one in launches.values()}
    assert least == ({int(n or 0) for n in MIN_BLOCKS.findall(source)} or {0}), variant


# Parameters that the constraints barely allow: the most registers per thread, or more than ptxas allots by itself.
EDGES = (
    ("attention", {"head_dim": 128, "block_n": 64, "warps": 4, "causal": True}),
    ("attention", {"head_dim": 64, "block_n": 64, "warps": 8}),
    ("attention", {"head_dim": 256, "block_n": 64, "warps": 4, "causal": True, "strides": True, "lse": True}),
    ("attention", {"head_dim": 256, "block_n": 32, "warps": 1, "causal": True, "strides": True, "split_keys": True}),
    ("attention", {"head_dim": 64, "block_n": 128, "warps": 1, "causal": True, "strides": True, "split_keys": True}),
    ("attention_combine", {"dtype": "bfloat16", "head_dim": 256, "block": 1024, "strides": True, "lse": True}),
    ("hgemm_wmma", {"dtype": "bfloat16", "tile_m": 32, "tile_n": 64, "tile_k": 64, "warps_m": 2, "warps_n": 4}),
    ("hgemm_wmma", {"out_dtype": "float16", "tile_m": 128, "tile_n": 128, "tile_k": 32, "warps_m": 2, "warps_n": 4}),
    ("hgemm_wmma", {"dtype": "bfloat16", "tile_m": 64, "tile_n": 64, "warps_m": 2, "warps_n": 2, "stages": 3}),
    ("hgemm_wmma", {"stages": 4}),
    ("hgemm_wmma", {"dtype": "bfloat16", "tile_n": 256, "tile_k": 64, "warps_m": 2, "warps_n": 4, "stages": 4}),
    ("hgemm_wmma", {"tile_m": 256, "tile_n": 128, "tile_k": 32, "warps_m": 4, "warps_n": 2, "stages": 4}),
    ("reduce", {"op": "max", "block": 1024}),
    ("reduce", {"op": "sum", "dtype": "float64", "block": 1024, "rows_by": "warp"}),
    ("scan_lookback", {"dtype": "int32", "block": 1024, "items": 16}),
    ("scan_lookback", {"dtype": "float64", "block": 512, "items": 16}),
    ("scan", {"dtype": "int64", "block": 512, "items": 16}),
    ("scan", {"dtype": "int32", "block": 1024, "items": 16}),
    ("sgemm", {"dtype": "float64", "tile_m": 64, "tile_n": 64, "tile_k": 8, "vector": 2}),
    ("sgemm", {"tile_m": 64, "tile_n": 32, "tile_k": 16}),
    (
        "sgemm",
        {"dtype": "float64", "tile_m": 64, "tile_n": 64, "tile_k": 16, "thread_m": 4, "thread_n": 2, "vector": 2},
    ),
    ("softmax", {"dtype": "bfloat16", "block": 1024}),
    ("layernorm", {"dtype": "float16", "block": 1024, "save_statistics": True}),
    ("layernorm", {"dtype": "bfloat16", "block": 1024, "rows_by": "warp", "save_statistics": True}),
    ("stencil2d", {"dtype": "float64", "radius": 8, "tile_x": 64, "tile_y": 16}),
    ("transpose", {"dtype": "float16", "tile": 32, "block_rows": 4}),
    ("transpose", {"dtype": "bfloat16", "tile": 64, "block_rows": 4}),
)


@pytest.mark.parametrize("number", range(len(EDGES)), ids=[f"{k}-{i}" for i, (k, _) in enumerate(EDGES)])
def test_edges_of_the_constraints_spill_nothing(library: Any, compiled: Any, number: int) -> None:
    kernel, params = EDGES[number]
    threads = largest_block(library.render(kernel, **params).modules[-1].source)
    for arch in one_of(number):
        for function, used in compiled(kernel, arch, **params).resource_usage().items():
            assert not any(used[name] for name in IN_LOCAL_MEMORY), (arch, function, used)
            assert used["registers"] <= registers_for(threads), (arch, function, used)


def test_the_library_has_no_findings(library: Any) -> None:
    assert library.check() == []
    for spec in library:
        assert spec.description and spec.reference and spec.tolerance and len(spec.variants) >= 2, spec.name
        assert all(p.description for p in spec.parameters.values()), spec.name


def test_every_kernel_starts_with_how_to_launch_it(library: Any) -> None:
    for spec in library:
        text = library.render(spec.name).modules[-1].source
        head = text[: text.index("\n\n")] if "\n\n" in text else text
        for word in ("launch", "grid", "block", "dynamic shared memory", "args"):
            assert word in head, (spec.name, word)

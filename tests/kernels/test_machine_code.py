# SPDX-License-Identifier: Apache-2.0
"""The kernels' promises about their machine code, read from the disassembly: wide accesses, tensor cores, barriers."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from architectures import ARCHS, two_of

INSTRUCTION = re.compile(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", re.MULTILINE)

# For each kernel: the start of an instruction's name, and how many such instructions there are at least.
PROMISES: dict[str, dict[str, int]] = {
    "axpby": {"LDG.E.128": 2, "STG.E.128": 1},
    "reduce": {"LDG.E.128": 2 * 4, "BAR.SYNC": 2, "MEMBAR": 1},  # two kernels, each with four loads in flight
    "scan": {"LDG.E.128": 3, "STG.E.128": 3, "BAR.SYNC": 3},
    # Four packs are loaded and four are stored. Words that one block writes and another reads go through the L2 cache.
    # The barriers: for the drawn tile, the warps' sums, the tile's prefix and the last block.
    "scan_lookback": {
        "LDG.E.128": 4,
        "STG.E.128": 4,
        "LDG.E.64.STRONG.GPU": 1,
        "STG.E.64.STRONG.GPU": 2,
        "ATOMG.E.ADD.STRONG.GPU": 2,
        "MEMBAR": 2,
        "BAR.SYNC": 4,
    },
    "transpose": {"LDG.E": 4, "STG.E": 4, "STS": 4, "LDS": 4, "BAR.SYNC": 2},
    "histogram": {"LDG.E.128": 1, "ATOMS": 4, "BAR.SYNC": 2},
    "stencil2d": {"LDS": 5, "BAR.SYNC": 2},
    "saxpy_nvvm": {"LDG.E.CONSTANT": 1, "FFMA": 1},
    # A slice has eight k steps; in each, a thread does 8 x 8 multiply-adds from four wide loads. One barrier is before
    # the loop and one in it.
    "sgemm": {"FFMA": 8 * 8 * 8, "LDS.128": 4 * 8, "LDG.E.128": 2, "STG.E.128": 1, "BAR.SYNC": 2},
    # A slice has two k steps: 2 x 4 fragments, each in two halves of 8 columns.
    "hgemm_wmma": {
        "HMMA.16816.F32": 2 * 2 * 4 * 2,
        "LDSM": 2 * (2 + 4),
        "LDGSTS.E.BYPASS.128": 4,
        "STG.E.128": 1,
        "LDS.128": 1,
    },
    # 8 key and 8 head fragments, each over 4 steps of 16.
    "attention": {"HMMA.16816.F32": 8 * 4 * 2, "LDSM": 4 + 4 * 4 * 2, "LDGSTS.E.BYPASS.128": 4, "STG.E.128": 1},
    "attention_combine": {"LDG.E.64": 1, "STG.E": 1, "SHFL.BFLY": 5},
    "softmax": {"LDG.E.128": 2, "STG.E.128": 1, "BAR.SYNC": 2},
    "layernorm": {"LDG.E.128": 4, "STG.E.128": 1, "BAR.SYNC": 2},
    "rmsnorm": {"LDG.E.128": 3, "STG.E.128": 1, "BAR.SYNC": 2},
}


def instructions(program: Any) -> Counter[str]:
    """Count the occurrences of each instruction in a program."""
    return Counter(INSTRUCTION.findall(program.sass()))


def count(found: Counter[str], start: str) -> int:
    return sum(number for name, number in found.items() if f"{name}.".startswith(f"{start}."))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", PROMISES)
def test_instructions(compiled: Any, kernel: str, arch: str) -> None:
    found = instructions(compiled(kernel, arch))
    for start, least in PROMISES[kernel].items():
        assert count(found, start) >= least, f"{start}: expected at least {least}; found {sorted(found.items())}"
    assert not count(found, "STL") and not count(found, "LDL"), "registers are spilled"


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["softmax", "layernorm", "rmsnorm"])
def test_a_warp_that_takes_a_row_waits_for_no_other(compiled: Any, kernel: str, arch: str) -> None:
    found = instructions(compiled(kernel, arch, dtype="float16", rows_by="warp", block=128))
    assert count(found, "SHFL.BFLY") >= 5 and count(found, "LDG.E.128") >= PROMISES[kernel]["LDG.E.128"]
    assert not any(count(found, name) for name in ("BAR", "LDS", "STS", "STL", "LDL"))


@pytest.mark.parametrize("arch", two_of(2))
def test_a_large_tile_of_hgemm(compiled: Any, arch: str) -> None:
    tile = {"tile_n": 256, "warps_m": 2, "warps_n": 4, "stages": 3}
    found = instructions(compiled("hgemm_wmma", arch, **tile))
    # A warp has 4 x 4 fragments. Two slices are in flight before the loop and one in it, each 2 + 4 packs per thread.
    promised = {"HMMA.16816.F32": 2 * 4 * 4 * 2, "LDSM": 2 * (4 + 4), "LDGSTS.E.BYPASS.128": 2 * (2 + 4), "BAR.SYNC": 2}
    for start, least in promised.items():
        assert count(found, start) >= least, (start, sorted(found.items()))
    assert count(found, "BAR.SYNC") == 2, "one barrier a slice, one before the results"
    assert not count(found, "STL") and not count(found, "LDL"), "registers are spilled"


@pytest.mark.parametrize("arch", two_of(3))
def test_a_large_tile_of_attention(compiled: Any, arch: str) -> None:
    tile = {"head_dim": 128, "block_n": 128, "warps": 8, "causal": True, "strides": True, "lse": True}
    found = instructions(compiled("attention", arch, dtype="bfloat16", **tile))
    # 16 key and 16 head fragments, each over 8 steps of 16. The queries are copied once, the keys before the loop and
    # in it, and the values in the loop.
    promised = {"HMMA.16816.F32": 2 * 16 * 8, "LDSM": 8 + 2 * 8 * 8, "LDGSTS.E.BYPASS.128": 4 * 8, "STG.E.128": 8}
    for start, least in promised.items():
        assert count(found, start) >= least, (start, sorted(found.items()))
    assert count(found, "BAR.SYNC") == 5, "two for the queries, two a tile, one before the results"
    assert not count(found, "STL") and not count(found, "LDL"), "registers are spilled"


@pytest.mark.parametrize(
    ("params", "width"),
    [
        ({"vector_width": 2}, ".64"),
        ({"dtype": "float16"}, ".128"),
        ({"dtype": "float16", "vector_width": 2}, ""),
        ({"dtype": "float16", "vector_width": 1}, ".U16"),
    ],
    ids=str,
)
def test_axpby_moves_packs_of_the_width_that_was_asked_for(compiled: Any, params: dict[str, Any], width: str) -> None:
    found = instructions(compiled("axpby", "sm_90", **params))
    loads = {name.removesuffix(".CONSTANT") for name in found if name.startswith("LDG")}
    assert f"LDG.E{width}" in loads
    wider = {"": {"LDG.E.64", "LDG.E.128"}, ".64": {"LDG.E.128"}, ".U16": {"LDG.E", "LDG.E.64", "LDG.E.128"}}
    assert not loads & wider.get(width, set())


@pytest.mark.parametrize("arch", ARCHS)
def test_the_linker_inlines_the_other_module(library: Any, compiled: Any, arch: str) -> None:
    rendered = library.render("lto_pair", activation="relu")
    assert "activate(" in rendered.modules[0].source and "bias_activation" not in rendered.modules[0].source
    program = compiled("lto_pair", arch, activation="relu")
    assert list(program.resource_usage()) == ["bias_activation"]
    assert "activate" not in program.sass().replace("bias_activation", "")


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "float64"])
@pytest.mark.parametrize("tile", [16, 32, 64])
def test_a_column_of_the_transposed_tile_lies_in_different_banks(
    library: Any, compiled: Any, tile: int, dtype: str
) -> None:
    # The size of static shared memory gives the length of a row. A phase is what the hardware serves at once: 32 words
    # of 4 bytes.
    size = {"int8": 1, "float16": 2, "float32": 4, "float64": 8}[dtype]
    program = compiled("transpose", "sm_80", dtype=dtype, tile=tile, block_rows=16)
    row = program.resource_usage()["transpose"]["shared_bytes"] // tile
    assert row > tile * size
    words = max(size // 4, 1)
    phase = min(32 // words, tile)
    banks = [(lane * row // 4 + word) % 32 for lane in range(phase) for word in range(words)]
    assert len(set(banks)) == len(banks)


def test_the_account_of_ptxas_changes_no_code(service: Any, compiled: Any) -> None:
    assert compiled("axpby", "sm_90").sass() == service.kernel("axpby", arch="sm_90").sass()

# SPDX-License-Identifier: Apache-2.0
"""Listings: the binary's instructions, the source's lines, and a normal form that doesn't depend on the position."""

from __future__ import annotations

import json
import re

import pytest

from cuda_progcache.inspect import disassemble, instructions, live_peak, mix, normalised, resource_usage
from cuda_progcache.inspect.listing import _CLASSES, _class

BRANCHES = """
__device__ __noinline__ float f(float x) { return x * 2 + 1; }
__device__ __noinline__ float g(float x) { return f(x) + sqrtf(x) / 3.1f; }
template <class T> __global__ void branches(T *a, int n) {
  __shared__ T s[64];
  for (int i = threadIdx.x; i < n; i += blockDim.x) s[i % 64] += a[i] / g(a[i + 1]);
  __syncthreads();
  a[0] = s[n % 64];
}
"""
TWO = BRANCHES + "template __global__ void branches<float>(float *, int);"
NAME = "_Z8branchesIfEvPT_i"
#: A kernel to put before others, so that its labels and internal functions are numbered first.
BEFORE = """
extern "C" __global__ void first(double *a, float *b, int n) {
  while (n--) { a[n] = sqrt(a[n]) / b[n]; if (b[n] > 3) break; }
}
"""


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
def test_every_instruction_is_there(compiled, arch):
    data = compiled(TWO, arch=arch).data
    (code,) = instructions(data).values()
    (function,) = json.loads(disassemble(data, "-json"))[1]
    told = [one["opcode"] for one in function["sass-instructions"]]
    while told[-1] == "NOP":
        told.pop()
    assert [re.sub(r"^@\S+ ", "", one.text).split()[0] for one in code] == told
    assert [one.offset for one in code] == [16 * number for number in range(len(code))]
    assert sum(mix(code).values()) == len(code)
    assert {"float", "global", "shared", "special", "barrier", "control"} <= mix(code).keys()
    # ptxas needs two registers besides those that hold values.
    assert 0 < live_peak(code) <= resource_usage(data)[NAME].registers


def test_lines_are_those_that_the_source_names(compiled):
    code = '#line 40 "softmax.cu.j2"\nextern "C" __global__ void k(float *a) {\n  float x = a[1];\n  a[0] = x * x;\n}\n'
    (listed,) = instructions(compiled(code, lineinfo=True).data).values()
    places = {one.opcode: one.source for one in listed if one.source}
    assert all(place.file.endswith("softmax.cu.j2") for place in places.values())
    assert {name: places[name].line for name in ("LDG", "FMUL", "STG", "EXIT")} == {
        "LDG": 41,
        "FMUL": 42,
        "STG": 42,
        "EXIT": 43,
    }
    (without,) = instructions(compiled(code).data).values()
    assert all(one.source is None for one in without)
    assert normalised(without) == normalised(listed)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100"])
def test_what_only_moved_is_equal(compiled, arch):
    alone = normalised(instructions(compiled(TWO, arch=arch).data)[NAME])
    moved = normalised(instructions(compiled(BEFORE + TWO, arch=arch).data)[NAME])
    assert alone == moved
    assert not re.search(r"\.L_x_|/\*|__internal_\d", "\n".join(alone))
    assert sum("(return)" in line for line in alone) == sum("CALL" in line for line in alone) > 2
    # Longer code at the start moves all later addresses.
    longer = TWO.replace("  __shared__", "  if (n == 12345) a[9] = n;\n  __shared__")
    other = normalised(instructions(compiled(longer, arch=arch).data)[NAME])
    assert other != alone
    function = f"${NAME}$_Z1gf:"
    assert function in alone
    if arch == "sm_75":  # here the code that follows gets other registers
        return
    tails = [lines[lines.index(function) :] for lines in (alone, other)]
    opcodes = [[re.sub(r"\bU?[RP]\d+\b|\.L\d+", "_", line) for line in tail] for tail in tails]
    assert len(opcodes[0]) == len(opcodes[1])


def test_no_opcode_is_of_two_classes():
    listed = [opcode for opcodes in _CLASSES.values() for opcode in opcodes.split()]
    assert len(listed) == len(set(listed))
    assert [_class(opcode) for opcode in ("UIADD3", "VOTEU", "FFMA", "NEW")] == ["uniform", "uniform", "float", "other"]

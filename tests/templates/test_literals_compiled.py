# SPDX-License-Identifier: Apache-2.0
"""Literals in compiled code: NVRTC checks the bits and the type of each one in constant expressions."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest

from cuda_progcache.templates.cuda_filters import ctype
from cuda_progcache.templates.literals import cuda_literal

SAME = """
template <class A, class B> struct same { static constexpr bool value = false; };
template <class A> struct same<A, A> { static constexpr bool value = true; };
"""


@functools.cache
def include_folder():
    from cuda.pathfinder import find_nvidia_header_directory

    folder = find_nvidia_header_directory("cudart")
    assert folder, "install nvidia-cuda-runtime"
    return folder


def compile_source(source, *options):
    """Compile with NVRTC without suppressing warnings; return its log, which is empty if nothing is wrong."""
    from cuda.bindings import nvrtc

    flags = [b"--gpu-architecture=compute_80", b"--std=c++17", f"-I{include_folder()}".encode(), *options]
    _, program = nvrtc.nvrtcCreateProgram(source.encode(), b"literals.cu", 0, [], [])
    (code,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    text = log.decode().strip("\0 \n")
    return text or ("" if int(code) == 0 else f"NVRTC error {int(code)}")


def assert_literals(dtype, expected_bits, literals, header=""):
    """Check that each literal has the dtype's C type and the expected bits."""
    width, suffix = {1: ("unsigned char", "u"), 2: ("unsigned short", "u"), 4: ("unsigned int", "u")}.get(
        np.dtype(expected_bits.dtype).itemsize, ("unsigned long long", "ull")
    )
    lines = [header, SAME]
    for bits, literal in zip(expected_bits.tolist(), literals, strict=True):
        lines.append(f"static_assert(same<decltype({literal}), {ctype(dtype)}>::value, {literal!r});".replace("'", '"'))
        lines.append(f'static_assert(__builtin_bit_cast({width}, {literal}) == {bits}{suffix}, "{literal}");')
    log = compile_source("\n".join(lines))
    assert log == "", log[:2000]


EDGES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.1,
    1 / 3,
    1e-3,
    65504.0,
    -65504.0,
    6e-8,
    2.0**-14,
    2.0**-24,
    float("inf"),
    -float("inf"),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float_literals_have_the_exact_bits(dtype):
    unsigned = np.dtype(f"u{np.dtype(dtype).itemsize}")
    info = np.finfo(dtype)
    edges = [*EDGES, *(float(x) for x in (info.max, info.min, info.tiny, info.smallest_subnormal, info.eps))]
    edges += [16777217.0, 16777219.0, 1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, 8.5e37, 9007199254740993.0]
    random = np.random.default_rng(7).integers(0, np.iinfo(unsigned).max, 300, dtype=unsigned).view(dtype)
    values = [*edges, *(float(x) for x in random if np.isfinite(x))]
    expected = np.array(values, dtype=dtype).view(unsigned)
    assert_literals(dtype, expected, [cuda_literal(value, dtype) for value in values])


def test_an_integer_is_rounded_once():
    # Converted to a double first, 2**60 + 2**36 + 1 would lose its last bit and then be a tie.
    value = 2**60 + 2**36 + 1
    assert float(np.float32(float(value))) == 2.0**60
    assert cuda_literal(value, "float32") == cuda_literal(2**60 + 2**37, "float32")
    assert_literals("float32", np.array([2**60 + 2**37], dtype="float32").view("u4"), [cuda_literal(value, "float32")])


def test_nan_is_the_quiet_one():
    quiet = [0x7FC00000]
    assert_literals("float32", np.array(quiet, dtype="u4"), [cuda_literal(float("nan"), "float32")])
    assert_literals("float64", np.array([0x7FF8000000000000], dtype="u8"), [cuda_literal(-np.float64("nan"))])


def test_half_literals_have_the_exact_bits():
    random = np.random.default_rng(8).integers(0, 2**16, 200, dtype="u2").view("float16")
    values = [*EDGES, 65519.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, *(float(x) for x in random if np.isfinite(x))]
    expected = np.array(values, dtype="float16").view("u2")
    literals = [cuda_literal(value, "float16") for value in values]
    assert_literals("float16", expected, literals, "#include <cuda_fp16.h>")


def test_bfloat16_literals_have_the_exact_bits():
    values = np.random.default_rng(9).integers(0, 2**32, 200, dtype="u4").view("float32")
    values = values[np.isfinite(values) & (np.abs(values) > 1e-37) & (np.abs(values) < 3e38)]
    bits = values.view("u4").astype("u8")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("u2")  # round to nearest, ties to even
    literals = [cuda_literal(value, "bfloat16") for value in values]
    assert_literals("bfloat16", rounded, literals, "#include <cuda_bf16.h>")


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_integer_literals_have_type_and_bits(dtype):
    info = np.iinfo(dtype)
    values = [info.min, info.min + 1, 0, 1, info.max - 1, info.max] + ([-1, -7] if info.min else [])
    expected = np.array(values, dtype=dtype).view(f"u{np.dtype(dtype).itemsize}")
    assert_literals(dtype, expected, [cuda_literal(value, dtype) for value in values])


def test_bool_and_complex_literals():
    assert_literals("bool", np.array([1, 0], dtype="u1"), ["true", "false"])
    literal = cuda_literal(0.1 - 2j, "complex64")
    cccl = os.path.join(include_folder(), "cccl")
    source = f"#include <cuda/std/complex>\nstatic_assert({literal}.real() == 0.1f && {literal}.imag() == -2.0f);"
    assert compile_source(source, f"-I{cccl}".encode()) == ""


def test_a_negative_literal_can_follow_an_operator():
    literals = [cuda_literal(-1), cuda_literal(-0.5, "float32"), cuda_literal(-(2**63))]
    source = "".join(f"static_assert(1-{literal} > 1);" for literal in literals[:2])
    assert compile_source(source + f"static_assert(-1-{literals[2]} > 0);") == ""


def test_every_vector_type_exists():
    from cuda_progcache.templates.cuda_filters import _VECTOR_BASES, vector_type

    lengths = {base: (2,) if short[0] == "_" else (1, 2, 3, 4) for base, short in _VECTOR_BASES.items()}
    names = {vector_type(base, n) for base in lengths for n in lengths[base]}
    names |= {vector_type(base, 4, align=32) for base in ("long", "ulong", "int64", "uint64", "double")}
    assert len(names) == 12 * 4 + 2 + 5
    source = "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"
    assert compile_source(source + "".join(f"__device__ {name} v_{name};\n" for name in sorted(names))) == ""

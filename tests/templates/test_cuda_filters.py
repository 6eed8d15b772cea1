# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from cuda_progcache.errors import ParameterError
from cuda_progcache.templates.cuda_filters import aligned, ctype, define, power_of_two, vector_type
from cuda_progcache.templates.dtypes import DTYPES, dtype_name
from cuda_progcache.templates.literals import cuda_literal


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bool", "bool"),
        ("int8", "signed char"),
        ("uint64", "unsigned long long"),
        ("float16", "__half"),
        ("bfloat16", "__nv_bfloat16"),
        ("<f4", "float"),
        ("|u1", "unsigned char"),
        ("double", "double"),
        ("complex64", "cuda::std::complex<float>"),
        (bool, "bool"),
        (int, "long long"),
        (float, "double"),
        (complex, "cuda::std::complex<double>"),
        (np.float16, "__half"),
        (np.dtype("int16"), "short"),
        (np.longlong, "long long"),
        (np.bool_, "bool"),
    ],
)
def test_ctype_takes_names_codes_python_types_and_numpy(dtype, expected):
    assert ctype(dtype) == expected


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"bfloat16"}))
def test_every_dtype_agrees_with_numpy(name):
    assert dtype_name(np.dtype(name)) == name
    assert dtype_name(np.dtype(name).str) == name


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ("flot32", "no CUDA C++ type for dtype 'flot32'; did you mean 'float32'?"),
        ("", "known: bfloat16, bool"),
        ("float", "dtype 'float' has different widths in C and NumPy; write float32 or float64"),
        (">f4", "dtype '>f4' is big-endian"),
        (np.dtype(">i8"), "dtype '>i8' is big-endian"),
        (np.dtype("U5"), "no CUDA C++ type for dtype 'str160'"),
        (3.5, "3.5 is not a dtype"),
    ],
)
def test_a_wrong_dtype_names_the_nearest(dtype, message):
    with pytest.raises(ParameterError) as caught:
        ctype(dtype)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (0.1, "float32", "0.1f"),
        (np.float32(0.1), None, "0.1f"),
        (0.1, None, "0.1"),
        (1, "float32", "1.0f"),
        (1e10, "float32", "1e+10f"),
        (1e-45, "float32", "1e-45f"),
        (-0.0, "float64", "(-0.0)"),
        (-(2**31), "int32", "(-2147483647 - 1)"),
        (-(2**63), None, "(-9223372036854775807ll - 1)"),
        (-7, "int64", "(-7ll)"),
        (2**31, None, "2147483648ll"),
        (2**63, None, "9223372036854775808ull"),
        (7, "uint32", "7u"),
        (5, "int16", "static_cast<short>(5)"),
        (-128, "int8", "static_cast<signed char>(-128)"),
        (2.0, "int32", "2"),
        (True, None, "true"),
        (0, "bool", "false"),
        (np.bool_(1), None, "true"),
        (1, "float16", "__half(__half_raw{0x3c00u})"),
        (1.5, "bfloat16", "__nv_bfloat16(__nv_bfloat16_raw{0x3fc0u})"),
        (1 - 2j, "complex64", "cuda::std::complex<float>(1.0f, (-2.0f))"),
        (float("inf"), "float32", "__builtin_bit_cast(float, 0x7f800000u)"),
    ],
)
def test_literals_read_well(value, dtype, expected):
    assert cuda_literal(value, dtype) == expected


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (256, "uint8", "256 does not fit uint8 (0 to 255)"),
        (-1, "uint64", "-1 does not fit uint64"),
        (2**64, None, "does not fit uint64"),
        (0.5, "int32", "0.5 is not an integer, as int32 needs"),
        (float("nan"), "int32", "nan is not an integer"),
        (2, "bool", "2 is not a bool"),
        (1j, "float32", "complex 1j is not a float32"),
        (1e39, "float32", "1e+39 is infinite as float32; the value is lost"),
        (65520, "float16", "65520 is infinite as float16"),
        (1e-8, "float16", "1e-08 is zero as float16; the value is lost"),
        ("1", "int32", "cuda_literal needs a number, not '1' (str)"),
        (np.zeros(3), "float32", "cuda_literal needs a number, not array"),
        (np.longdouble(1), "float32", "no CUDA C++ type for dtype 'longdouble'"),
        (1, "flaot32", "did you mean 'float32'?"),
    ],
)
def test_a_literal_that_would_lie_is_refused(value, dtype, message):
    with pytest.raises(ParameterError) as caught:
        cuda_literal(value, dtype)
    assert message in str(caught.value) or "float128" in str(caught.value)


@pytest.mark.parametrize(
    ("base", "length", "expected"),
    [
        ("float", 4, "float4"),
        ("float32", 2, "float2"),
        ("unsigned int", 4, "uint4"),
        ("unsigned  char", 3, "uchar3"),
        ("long long", 2, "longlong2"),
        ("uint8", 4, "uchar4"),
        ("<i2", 4, "short4"),
        ("ulonglong", 1, "ulonglong1"),
        ("float16", 2, "__half2"),
        ("__nv_bfloat16", 2, "__nv_bfloat162"),
        (np.float64, 2, "double2"),
        ("double", 4, "double4_16a"),
        ("f8", 4, "double4_16a"),
    ],
)
def test_vector_type(base, length, expected):
    assert vector_type(base, length) == expected


@pytest.mark.parametrize(
    ("base", "length", "message"),
    [
        ("float", 8, "no vector of 8 elements of 'float'; valid: 1, 2, 3, 4"),
        ("float", True, "no vector of True elements"),
        ("float16", 4, "no vector of 4 elements of 'float16'; valid: 2"),
        ("flaot", 4, "no vectors of 'flaot'; did you mean 'float'?"),
        ("complex64", 2, "no vectors of 'complex64'"),
    ],
)
def test_vectors_that_cuda_has_not(base, length, message):
    with pytest.raises(ParameterError) as caught:
        vector_type(base, length)
    assert message in str(caught.value)


def test_four_64_bit_elements_come_in_two_alignments():
    assert vector_type("double", 4, align=32) == "double4_32a"
    with pytest.raises(ParameterError, match="double4 takes align=16 or align=32, not 8"):
        vector_type("double", 4, align=8)
    with pytest.raises(ParameterError, match="only vectors of four 64-bit elements take align, not 4 of 'float'"):
        vector_type("float", 4, align=32)


def test_define():
    assert define(256, "BLOCK") == "#define BLOCK 256"
    assert define(True, "FLAG") == "#define FLAG 1"
    assert define(0.5, "SCALE") == "#define SCALE 0.5"
    assert define(-1, "AXIS") == "#define AXIS (-1)"
    assert define(None, "GUARD") == "#define GUARD"
    assert define("a\n+ b\n", "SUM") == "#define SUM a \\\n    + b"
    with pytest.raises(ParameterError, match="'2D' is not a C identifier"):
        define(1, "2D")


def test_power_of_two_and_aligned():
    assert [n for n in range(-2, 10) if power_of_two(n)] == [1, 2, 4, 8]
    assert not power_of_two(True)
    assert not power_of_two(4.0)
    assert power_of_two(np.int32(64))
    assert aligned(96, 32)
    assert not aligned(100, 32)
    assert not aligned("96", 32)
    with pytest.raises(ParameterError, match="aligned takes a positive integer, not 0"):
        aligned(1, 0)


def test_neither_numpy_nor_jinja2_is_imported_for_the_filters():
    code = (
        "import sys; from cuda_progcache.templates import KernelEnvironment, cuda_filters as f;"
        "KernelEnvironment('.'); f.ctype('float16'); f.cuda_literal(0.1, 'float32'); f.vector_type('float', 4);"
        "sys.exit(sorted({'numpy', 'jinja2', 'difflib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

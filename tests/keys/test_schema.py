# SPDX-License-Identifier: Apache-2.0
"""What is in a key and what isn't, what is refused, and how two keys differ in words."""

from __future__ import annotations

import cuda.core
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cuda_progcache import ProgramOptions
from cuda_progcache.errors import ArchError, OptionError, UncacheableError
from cuda_progcache.keys.headers import NO_HEADERS, Header, HeaderSet
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.schema import Component, base_key, digest

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


def inputs(code=SOURCE, code_type="c++", target_type="cubin", names=(), extra=None, options=None, **fields):
    return normalize(
        code=code,
        code_type=code_type,
        options=options or ProgramOptions(**{"arch": "sm_90"} | fields),
        target_type=target_type,
        name_expressions=names,
        extra_digest=extra,
    )


def key(*arguments, headers=NO_HEADERS, **given_):
    return base_key(inputs(*arguments, **given_)).with_headers(headers)


def test_equal_inputs_equal_keys():
    assert key().digest == key().digest
    assert len(key().digest) == 32


@pytest.mark.parametrize(
    "change",
    [
        {"code": SOURCE + " "},
        {"target_type": "ptx"},
        {"target_type": "ltoir"},
        {"arch": "sm_80"},
        {"name": "other"},
        {"fma": False},
        {"fma": True},
        {"debug": True},
        {"lineinfo": True},
        {"define_macro": "X"},
        {"ptxas_options": ["-v", "-O2"]},
        {"ptxas_options": ["-O2", "-v"]},
        {"max_register_count": 32},
        {"names": ("k",)},
        {"names": (b"k",)},
        {"names": ("k", "l")},
        {"extra": b"x"},
        {"extra": b"y"},
        {"headers": HeaderSet(headers=(Header(("I", 0, "a.h"), "00"),))},
        {"headers": HeaderSet(headers=(Header(("I", 0, "a.h"), "01"),))},
    ],
    ids=str,
)
def test_what_changes_the_output_changes_the_key(change):
    every = [
        {},
        {"ptxas_options": "-v"},
        {"names": ("l",)},
        {"headers": HeaderSet(headers=(Header(("I", 0, "b.h"), "00"),))},
    ]
    assert key(**change).digest not in {key(**other).digest for other in every}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"debug": False}, {}),
        ({"ptxas_options": "-v"}, {"ptxas_options": ["-v"]}),
        ({"names": ("a", "b")}, {"names": ("b", "a")}),
        ({"names": ()}, {"names": []}),
        ({"include_path": ["/here"]}, {"include_path": ["/there", "/where"]}),
        ({"code_type": "C++", "target_type": "CUBIN"}, {}),
        ({"headers": HeaderSet(absent=(("I", 0, "x"),), present=(("I", 0, "y"),))}, {}),
    ],
    ids=str,
)
def test_what_does_not_reach_the_compiler_is_not_in_the_key(one, other):
    assert key(**one).digest == key(**other).digest


def test_ptx_input_reads_linker_options_alone():
    ptx = {"code": ".version 8.0\n.target sm_90\n.address_size 64\n", "code_type": "ptx"}
    assert key(**ptx, std="c++20", include_path="x", frandom_seed="s", names=("k",)).digest == key(**ptx).digest
    assert key(**ptx, max_register_count=32).digest != key(**ptx).digest


def test_nvvm_extra_sources_and_order():
    nvvm = {"code": b"; ir", "code_type": "nvvm", "target_type": "ptx"}
    one = key(**nvvm, extra_sources=[("a", "x"), ("b", "y")])
    assert one.digest == key(**nvvm, extra_sources=[("a", b"x"), ("b", bytearray(b"y"))]).digest
    assert one.digest != key(**nvvm, extra_sources=[("b", "y"), ("a", "x")]).digest
    assert one.digest != key(**nvvm).digest
    assert key(**nvvm, use_libdevice=True).digest != key(**nvvm, use_libdevice=False).digest == key(**nvvm).digest
    assert [tool.name for tool in key(**nvvm, use_libdevice=True).toolchain] == ["nvvm", "libdevice"]


def test_cuda_cores_options_give_the_same_key():
    given_ = {"arch": "sm_90", "fma": False, "define_macro": ["A", ("B", "2")], "std": "c++20", "lineinfo": True}
    assert key(options=cuda.core.ProgramOptions(**given_)).digest == key(options=ProgramOptions(**given_)).digest


def test_paths_are_keyed_only_where_they_reach_the_output(tmp_path, monkeypatch):
    def in_two_places(**given_):
        digests = []
        for place in ("one", "two"):
            (tmp_path / place).mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / place)
            digests.append(key(include_path=[str(tmp_path / place)], **given_).digest)
        return digests

    same, other = in_two_places()
    assert same == other
    for given_ in (
        {"lineinfo": True},
        {"debug": True},
        {"target_type": "ltoir"},
        {"define_macro": ("F", "__FILE__")},
        {"headers": HeaderSet(headers=(Header(("I", 0, "a.h"), "0"),), paths=(("I", 0),))},
    ):
        same, other = in_two_places(**given_)
        assert same != other, given_


@pytest.mark.parametrize(
    ("given_", "error", "words"),
    [
        ({"code_type": "opencl"}, ValueError, "'c\\+\\+', 'ptx' or 'nvvm'"),
        ({"code_type": 3}, ValueError, "code_type: 3 is not a valid SourceCodeType"),
        ({"target_type": "fatbin"}, ValueError, "'ptx', 'cubin' or 'ltoir'"),
        ({"code_type": "nvvm", "target_type": "cubin"}, ValueError, "compiles to 'ptx' or 'ltoir'"),
        ({"code_type": "ptx", "target_type": "ltoir"}, ValueError, "compiles to 'cubin' or 'ptx'"),
        ({"code": b"x"}, TypeError, "bytes are for 'nvvm' only"),
        ({"code": 3}, TypeError, "got int"),
        ({"names": (bytearray(b"k"),)}, TypeError, "got bytearray"),
        ({"names": (3,)}, TypeError, "got int"),
        ({"extra": 0}, TypeError, "non-empty bytes or None, got 0"),
        ({"extra": True}, TypeError, "got True"),
        ({"extra": b""}, TypeError, "got b''"),
        ({"extra": bytearray(b"x")}, TypeError, "got bytearray"),
        ({"extra_sources": [("a", "b")]}, ValueError, "code_type='nvvm' only"),
        ({"arch": None}, ArchError, "not an architecture"),
        ({"code_type": "nvvm", "target_type": "ptx", "std": "c++17"}, OptionError, "std"),
    ],
    ids=str,
)
def test_wrong_input_is_refused_with_the_reason(given_, error, words):
    with pytest.raises(error, match=words):
        inputs(**given_)


@pytest.mark.parametrize("option", ["create_pch", "time", "fdevice_time_trace"])
def test_what_writes_a_file_is_refused(option):
    with pytest.raises(UncacheableError, match=option.replace("_", "-")):
        key(**{option: "x"})


def test_a_precompiled_header_can_be_vouched_for():
    assert key(pch=True, extra=b"its digest").digest != key(pch=True, extra=b"another").digest


@pytest.mark.parametrize("macro", ["__DATE__", "__TIME__", "__TIMESTAMP__"])
def test_time_macros_are_noticed(macro):
    assert macro in inputs(code=f"{SOURCE} __device__ const char *now = {macro};").unrepeatable
    assert inputs(code=f"{SOURCE} // {macro}").unrepeatable is None
    assert macro in inputs(define_macro=("NOW", macro)).unrepeatable
    assert inputs().unrepeatable is None
    assert inputs(code=f"; {macro}", code_type="nvvm", target_type="ptx").unrepeatable is None


components = st.lists(st.tuples(st.text(max_size=4), st.binary(max_size=8)).map(lambda c: Component(*c)), max_size=5)


@given(components, components)
def test_no_two_component_lists_share_a_stream_by_moving_bytes(one, other):
    # Payloads are length-prefixed; labels here are arbitrary, in the schema they are fixed words.
    if [(c.label, c.payload) for c in one] == [(c.label, c.payload) for c in other]:
        assert digest(one) == digest(other)
    elif [c.label for c in one] == [c.label for c in other]:
        assert digest(one) != digest(other)


def test_components_print_without_their_bulk():
    printable = dict(key(code=SOURCE + "x" * 1000).printable())
    assert printable["code"].endswith("bytes, sha256:" + printable["code"][-64:])
    assert printable["name"] == "default_program"
    assert Component("c", b"\xff\xfe").printable == "fffe"


@pytest.mark.parametrize(("code_type", "code", "target"), [("ptx", ".version 7.0", "cubin"), ("nvvm", b"BC", "ptx")])
def test_name_expressions_are_looked_at_where_the_compiler_does(code_type, code, target):
    program = {"code": code, "code_type": code_type, "target_type": target}
    assert key(**program, names=(123, None)).digest == key(**program).digest
    with pytest.raises(TypeError, match="name_expressions must be str or bytes, got int"):
        inputs(names=("k", 123))


@pytest.mark.parametrize("nothing", [None, False, [], (), range(0)])
def test_a_pre_include_that_the_compiler_ignores_reads_no_header(nothing):
    assert not inputs(pre_include=nothing).reads_headers
    assert inputs(pre_include="a.h").reads_headers
    assert inputs(pre_include=["a.h"]).reads_headers


@pytest.mark.parametrize("option", ["create_pch", "time", "fdevice_time_trace"])
def test_a_side_effect_is_refused_by_that_name(option):
    with pytest.raises(UncacheableError, match="side effect"):
        key(**{option: "file"})

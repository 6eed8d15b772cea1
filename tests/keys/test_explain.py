# SPDX-License-Identifier: Apache-2.0
"""For every kind of component: change it, read the sentence."""

from __future__ import annotations

import pytest

from cuda_progcache import ProgramOptions
from cuda_progcache.keys.explain import differing, explain
from cuda_progcache.keys.headers import NO_HEADERS, Header, HeaderSet
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.schema import base_key

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


def key(code=SOURCE, code_type="c++", target_type="cubin", names=(), extra=None, headers=NO_HEADERS, **options):
    inputs = normalize(
        code=code,
        code_type=code_type,
        options=ProgramOptions(**{"arch": "sm_90"} | options),
        target_type=target_type,
        name_expressions=names,
        extra_digest=extra,
    )
    return base_key(inputs).with_headers(headers)


def headers(**digests):
    return HeaderSet(headers=tuple(Header(("I", 0, f"{name}.cuh"), digest) for name, digest in digests.items()))


MANY = {f"h{n}": "0" for n in range(418)}


@pytest.mark.parametrize(
    ("new", "old", "sentences"),
    [
        ({}, {}, []),
        ({"code": SOURCE + " "}, {}, ["the source differs"]),
        ({"target_type": "ptx"}, {}, ["target_type cubin → ptx"]),
        ({"name": "gemm.cu"}, {}, ["name default_program → gemm.cu"]),
        ({"arch": "sm_80"}, {}, ["option arch sm_90 → sm_80"]),
        ({"max_register_count": 32}, {"max_register_count": 64}, ["option max_register_count 64 → 32"]),
        ({"debug": True}, {}, ["option debug unset → on"]),
        ({}, {"debug": True}, ["option debug on → unset"]),
        ({"fma": False}, {"fma": True}, ["option fma true → false"]),
        ({"define_macro": ["A", ("B", "2")]}, {"define_macro": "A"}, ["option define_macro A → A, B=2"]),
        (
            {"ptxas_options": ["-v", "-O2"]},
            {"ptxas_options": ["-O2", "-v"]},
            ["option ptxas_options -O2, -v → -v, -O2"],
        ),
        ({"names": ("k<int>",)}, {}, ["name_expression unset → k<int>"]),
        ({"names": (b"k<int>",)}, {"names": ("k<int>", "s:a")}, ["name_expression k<int>, s:a → b'k<int>'"]),
        ({"extra": b"x"}, {"extra": b"y"}, ["extra_digest y → x"]),
        (
            {"headers": headers(cfg="1", **MANY)},
            {"headers": headers(cfg="0", **MANY)},
            ["header cfg.cuh changed (1 of 419 headers differ)"],
        ),
        (
            {"headers": headers(a="1", b="1")},
            {"headers": headers(a="0", c="1")},
            ["header a.cuh changed; header b.cuh is read now; header c.cuh is no longer read (3 of 3 headers differ)"],
        ),
        ({"headers": headers(a="1", b="1")}, {"headers": headers(b="1", a="1")}, ["headers: the order differs"]),
    ],
    ids=str,
)
def test_sentences(new, old, sentences):
    assert key(**new).explain(key(**old)) == sentences


def test_nvvm_and_ptx():
    nvvm = {"code": "; ir", "code_type": "nvvm", "target_type": "ptx"}
    assert key(**nvvm, ftz=True).explain(key(**nvvm)) == ["option ftz unset → 1"]
    assert key(**nvvm, use_libdevice=True).explain(key(**nvvm)) == ["libdevice is used now"]
    assert key(**nvvm).explain(key(**nvvm, use_libdevice=True)) == ["libdevice is no longer used"]
    one, other = (key(**nvvm, extra_sources=[("m", text)]) for text in "ab")
    assert one.explain(other) == ["an extra source differs"]
    ptx = {"code": ".version 8.0", "code_type": "ptx"}
    assert key(**ptx, split_compile=2).explain(key(**ptx)) == ["option split_compile unset → 2"]


def test_ready_inputs_of_a_link():
    one, other, third = (["input", text] for text in "abc")
    assert explain([one, other], [other, one], {}, {}) == ["input: order or count differs"]
    assert explain([one, other], [one, third], {}, {}) == ["an input of the link differs"]


def test_surroundings():
    assert explain([["environment", "A=1"]], [], {}, {}) == ["environment unset → A=1"]
    (said,) = explain([["pwd", "/a"]], [], {}, {})
    assert "$PWD" in said
    probes = [["has_include", "<b.h> in c.h: there"]], [["has_include", "<b.h> in c.h: missing"]]
    assert explain(*probes, {}, {}) == ["__has_include(<b.h>) in c.h: missing → there"]


def explain_tool(new, old, versions):
    ((_, told),) = differing(new, old, {}, {}, versions)
    return told


def test_compilers_and_paths():
    new, old = ("tool nvrtc", "build-id:1:2"), ("tool nvrtc", "build-id:2:2")
    for versions, told in (
        ({}, "build 2 → build 1"),
        ({("nvrtc", new[1]): "13.5.37", ("nvrtc", old[1]): "13.4.9"}, "13.4.9 → 13.5.37"),
        ({("nvrtc", new[1]): "13.5.37"}, "build 2 → 13.5.37 (build 1)"),
        (dict.fromkeys([("nvrtc", new[1]), ("nvrtc", old[1])], "13.5"), "13.5 (build 2) → 13.5 (build 1)"),
    ):
        assert differing([new], [old], {}, {}, versions) == [("tool nvrtc", f"nvrtc build differs: {told}")]
    two = ("tool nvrtc", "build-id:3:2")
    known = {("nvrtc", new[1]): "13.5", ("nvrtc", old[1]): "12.9", ("nvrtc", two[1]): "12.9"}
    assert explain_tool([new], [old, two], known) == "nvrtc build differs: 12.9 → 13.5"
    assert explain([["cwd", "/a"]], [["cwd", "/b"]], {}, {}) == [
        "the working directory differs, and reaches the output"
    ]
    assert explain([["include_path", "/a"]], [], {}, {}) == ["the include directories differ, and reach the output"]


@pytest.mark.parametrize("label", ["bundled_headers", "pre_include", "source_folder", "name_path", "path"])
def test_every_path_of_a_key_has_its_sentence(label):
    (said,) = explain([[label, "/a"]], [[label, "/b"]], {}, {})
    assert said.endswith("differs, and reaches the output")
    option = ["option", "--generate-line-info"]
    assert explain([option, [label, "/a"]], [], {}, {}) == ["option lineinfo unset → on"], "no second cause"


def test_hermetic_compiles():
    assert explain([["hermetic", ""]], [], {}, {}) == ["it is compiled hermetically now"]
    assert explain([], [["hermetic", ""]], {}, {}) == ["it is no longer compiled hermetically"]


def test_inputs_of_a_link():
    new = [["input 0 code", "1"], ["input 1 option", "--fmad=false"], ["input 1 tool nvrtc", "1"]]
    old = [["input 0 code", "2"], ["input 1 option", "--fmad=true"], ["input 1 tool nvrtc", "2"]]
    assert explain(new, old, {}, {}) == [
        "input 0: the source differs", "input 1: option fma true → false",
        "input 1: nvrtc build differs: build 2 → build 1",
    ]  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""Kernels of NVVM IR that a link would drop, and are warned of."""

from __future__ import annotations

import warnings

import pytest

from cuda_progcache import CompileService, InMemoryProgramCache, LinkerOptions, Program, ProgramOptions, link
from cuda_progcache.compile.nvvm_ir import kernels_without_use

HEAD = (
    'target triple = "nvptx64-nvidia-cuda"\n'
    'target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64'
    '-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"\n'
    "!nvvmir.version = !{!9}\n!9 = !{i32 2, i32 0}\n"
)
BODY = "(i32* %p) {\n  store i32 7, i32* %p\n  ret void\n}\n"
ANNOTATED = f'define void @k{BODY}!nvvm.annotations = !{{!0}}\n!0 = !{{void (i32*)* @k, !"kernel", i32 1}}\n'
CONVENTION = f"define ptx_kernel void @k{BODY}"
KEEP = '@llvm.{}used = appending global [1 x i8*] [i8* bitcast (void (i32*)* @k to i8*)], section "llvm.metadata"\n'


def compiled(text, target_type="ltoir", cache=None, **options):
    return Program(HEAD + text, "nvvm", ProgramOptions(arch="sm_80", name="k.ll", **options)).compiled(
        target_type, cache=cache
    )


@pytest.mark.parametrize("kernel", [ANNOTATED, CONVENTION], ids=["annotation", "calling convention"])
@pytest.mark.parametrize("keep", ["", "compiler."])
def test_the_warning_is_true(kernel, keep, cache):
    """What is warned of is dropped, and what isn't is there."""
    with pytest.warns(RuntimeWarning, match=r"k\.ll: a link of this LTO-IR will drop k"):
        dropped = compiled(kernel)
    assert "k" not in link([dropped], LinkerOptions(arch="sm_80")).resource_usage()
    kept = compiled(kernel + KEEP.format(keep))
    assert "k" in link([kept], LinkerOptions(arch="sm_80")).resource_usage()


def test_on_a_hit_too(cache):
    for hit in (False, True):
        with pytest.warns(RuntimeWarning, match="drop k"):
            assert compiled(ANNOTATED, cache=cache).hit is hit


def by_compile(tmp_path):
    Program(HEAD + ANNOTATED, "nvvm", ProgramOptions(arch="sm_80", name="k.ll")).compile("ltoir")


def by_compiled(tmp_path):
    Program(HEAD + ANNOTATED, "nvvm", ProgramOptions(arch="sm_80", name="k.ll")).compiled("ltoir")


def by_service(tmp_path):
    options = ProgramOptions(arch="sm_80", name="k.ll")
    CompileService(InMemoryProgramCache()).compile(HEAD + ANNOTATED, "nvvm", options=options, target_type="ltoir")


def library(tmp_path):
    (tmp_path / "manifest.toml").write_text(
        'format = 1\n[kernels.k]\ntemplate = "k.ll.j2"\ncode_type = "nvvm"\nentry_points = ["k"]\n'
    )
    (tmp_path / "k.ll.j2").write_text(HEAD + ANNOTATED)
    return CompileService(InMemoryProgramCache(), library=tmp_path)


def by_kernel(tmp_path):
    library(tmp_path).kernel("k", arch="sm_80", target_type="ltoir")


def by_kernels_in_threads(tmp_path):
    library(tmp_path).kernel("k", arch=["sm_80", "sm_90"], target_type="ltoir")


@pytest.mark.parametrize("ask", [by_compile, by_compiled, by_service, by_kernel, by_kernels_in_threads])
def test_the_warning_points_at_the_callers_line(ask, tmp_path):
    with pytest.warns(RuntimeWarning, match="drop k") as caught:
        ask(tmp_path)
    first = ask.__code__.co_firstlineno
    lines = range(first, first + 6)
    assert all(warning.filename == __file__ and warning.lineno in lines for warning in caught)


def test_not_for_ptx():
    assert b".entry k" in compiled(ANNOTATED, "ptx").data


def test_used_in_another_module():
    other = HEAD + "declare void @k(i32*)\n" + KEEP.format("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = compiled(ANNOTATED, extra_sources=[("other", other)])
    assert "k" in link([made], LinkerOptions(arch="sm_80")).resource_usage()


def test_which_kernels():
    two = ANNOTATED + CONVENTION.replace("@k", '@"k 2"') + KEEP.format("")
    assert kernels_without_use(two.encode()) == ("k 2",)
    assert kernels_without_use(b'!0 = !{ptr @a, !"kernel", i32 1}\n!1 = !{ptr @b, !"maxntidx", i32 1}') == ("a",)
    assert kernels_without_use(b"define void @device_function() { ret void }") == ()
    assert kernels_without_use(ANNOTATED.encode(), b"BC\xc0\xde\x00") == ()


def test_nvjitlink_does_not_chat():
    made = link([compiled(ANNOTATED + KEEP.format(""))], LinkerOptions(arch="sm_80"))
    assert made.log == ""

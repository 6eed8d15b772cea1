# SPDX-License-Identifier: Apache-2.0
"""What callers may hand to Program, link and Linker, and what they are told about the rest."""

from __future__ import annotations

import pickle
import re

import cuda.core
import pytest

from cuda_progcache import (
    FileStreamProgramCache,
    InMemoryProgramCache,
    Linker,
    Program,
    ProgramOptions,
    link,
    make_program_cache_key,
)
from cuda_progcache.errors import ArchError, CompileError, UncacheableError
from cuda_progcache.store.base import entry_digest

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


@pytest.mark.parametrize("options", [{"pch": True}, {"pch_dir": "."}, {"extra_flags": ("-pch",)}])
def test_with_a_precompiled_header_it_is_compiled_and_not_kept(cache, project, options):
    program = Program('#include "h.h"\n' + SOURCE, "c++", ProgramOptions(arch="sm_80", **options))
    project("h.h", "#define N 3\n")
    for _ in range(2):
        made = program.compiled("cubin", cache=cache)
        assert made.data
        assert not made.hit
        assert "hides which headers" in made.reason
        assert (program.pch_status is None) == ("pch_dir" in options)
    assert len(cache) == 0
    with pytest.raises(UncacheableError, match="extra_digest"):
        make_program_cache_key(
            code=SOURCE, code_type="c++", options=ProgramOptions(arch="sm_80", **options), target_type="cubin"
        )


@pytest.mark.parametrize("names", [None, (), [], iter(())])
def test_no_name_expressions(compiled, names):
    assert compiled(names=names).symbol_mapping == {}


@pytest.mark.parametrize("name", ["k<int>", b"k<int>"])
def test_a_single_name_expression(compiled, name):
    source = "template <class T> __global__ void k(T *a) { *a = 1; }"
    first = compiled(source, names=name)
    assert list(first.symbol_mapping) == [name]
    assert compiled(source, names=[name]).hit


@pytest.mark.parametrize("names", [3, bytearray(b"k<int>"), [None], {"k<int>": 1}.items()])
def test_what_is_no_name_expression(compiled, names):
    with pytest.raises(TypeError, match="name_expressions must be"):
        compiled(names=names)


@pytest.mark.parametrize("make", [iter, lambda names: (name for name in names), dict.fromkeys, set])
def test_name_expressions_from_anything_that_can_be_iterated_over(compiled, make):
    source = "template <class T> __global__ void k(T *a) { *a = 1; }"
    names = ["k<int>", b"k<float>"]
    first, again = (compiled(source, names=make(names)) for _ in range(2))
    assert first.symbol_mapping.keys() == set(names)
    assert again.hit
    assert again.symbol_mapping == first.symbol_mapping
    key = make_program_cache_key(
        *(), code=source, code_type="c++", options=ProgramOptions(arch="sm_80"), target_type="cubin",
        name_expressions=make(names),
    )  # fmt: skip
    assert entry_digest(key) == first.digest


@pytest.mark.parametrize("cache", [{}, "x", 3, object(), [], FileStreamProgramCache])
def test_what_is_no_cache_is_refused_before_any_work(cache, compiler_runs):
    for run in (
        lambda: Program(SOURCE, "c++", {"arch": "sm_80"}).compiled("cubin", cache=cache),
        lambda: link([(b"x", "cubin")], {"arch": "sm_80"}, cache=cache),
        lambda: Linker(cuda.core.ObjectCode.from_cubin(b"x"), options={"arch": "sm_80"}).link("cubin", cache=cache),
    ):
        with pytest.raises(TypeError, match="cache must be"):
            run()
    assert compiler_runs == []
    assert cache == {} or not isinstance(cache, dict)


class TestArchitectures:
    @pytest.mark.parametrize("spelled", ["sm_80 ", " sm_80", "sm_80\t", "\nsm_80"])
    def test_white_space_around_one_is_none(self, compiled, spelled):
        assert compiled().hit is False
        again = compiled(arch=spelled)
        assert again.hit
        assert again.arch == "sm_80"
        theirs = Program(SOURCE, "c++", cuda.core.ProgramOptions(arch=spelled)).compiled("cubin")
        assert theirs.data == again.data

    @pytest.mark.parametrize("code_type", ["c++", "ptx"])
    @pytest.mark.parametrize("arch", ["sm_91", "SM_80", "80", "sm80", "foo", "sm_90f"])
    def test_an_unknown_one_is_an_arch_error(self, compiled, arch, code_type):
        source = SOURCE if code_type == "c++" else compiled(target_type="ptx").data.decode()
        with pytest.raises(ArchError, match=re.escape(repr(arch))) as caught:
            compiled(
                source, code_type, "ptx" if arch.startswith("compute") and code_type == "c++" else "cubin", arch=arch
            )
        assert isinstance(caught.value, CompileError) or arch.startswith("compute")
        again = pickle.loads(pickle.dumps(caught.value))
        assert isinstance(again, ArchError)
        assert str(again) == str(caught.value)

    def test_the_nearest_is_named(self, compiled):
        for arch in ("80", "SM_80", "sm80", "sm_800"):
            with pytest.raises(ArchError, match="did you mean 'sm_80'"):
                compiled(arch=arch)

    @pytest.mark.parametrize("arch", [None, "", " ", 80])
    def test_none(self, arch):
        options = ProgramOptions(arch=arch)
        with pytest.raises(ArchError, match="architecture"):
            make_program_cache_key(code=SOURCE, code_type="c++", options=options, target_type="cubin")

    @pytest.mark.parametrize("code_type", ["c++", "ptx"])
    def test_no_machine_code_for_a_virtual_one(self, compiled, compiler_runs, code_type):
        for store in (None, InMemoryProgramCache()):
            with pytest.raises(ArchError, match=r"compute_80 is a virtual architecture.*arch='sm_80'"):
                compiled(SOURCE, code_type, store=store, arch="compute_80")
        with pytest.raises(ArchError, match="virtual"):
            link([(b"x", "cubin")], {"arch": "compute_80a"})
        assert compiler_runs == []
        assert compiled(target_type="ptx", arch="compute_80").data.startswith(b"//")
        assert compiled(target_type="ltoir", arch="compute_80").data

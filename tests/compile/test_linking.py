# SPDX-License-Identifier: Apache-2.0
"""nvJitLink through the cache."""

from __future__ import annotations

import cuda.core
import pytest

from cuda_progcache import Linker, LinkerOptions, Program, ProgramOptions, link
from cuda_progcache.compile.linking import LinkInput, look_up_linked, obtain_linked
from cuda_progcache.errors import ArchError, CompileError, OptionError
from cuda_progcache.keys.inputs import normalize

CALLEE = "__device__ float f(float x) { return x * 3.f; }"
CALLER = (
    'extern __device__ float f(float);\nextern "C" __global__ void k(float *a) { a[threadIdx.x] = f(a[threadIdx.x]); }'
)
SM80 = {"arch": "sm_80"}


def part(source, target_type, name):
    options = ProgramOptions(**SM80, name=name, relocatable_device_code=True)
    return Program(source, "c++", options).compiled(target_type)


@pytest.fixture(scope="module")
def parts():
    return {t: [part(CALLEE, t, "callee"), part(CALLER, t, "caller")] for t in ("ltoir", "cubin", "ptx")}


@pytest.mark.parametrize("kind", ["ltoir", "cubin", "ptx"])
def test_several_inputs_to_a_cubin(cache, parts, compiler_runs, kind):
    first, again = (link(parts[kind], LinkerOptions(**SM80), cache=cache) for _ in range(2))
    assert (first.hit, again.hit) == (False, True)
    assert compiler_runs == ["link"]
    assert first.data == again.data
    assert "k" in first.resource_usage()


def test_to_ptx(cache, parts):
    made = link(parts["ltoir"], LinkerOptions(**SM80), "ptx", cache=cache)
    assert b".visible .entry k" in made.data
    assert link(parts["ltoir"], LinkerOptions(**SM80), "ptx", cache=cache).hit


def test_linked_as_cuda_core_links(parts):
    codes = [p.to_object_code() for p in parts["ltoir"]]
    theirs = cuda.core.Linker(*codes, options=cuda.core.LinkerOptions(**SM80, link_time_optimization=True)).link(
        "cubin"
    )
    assert link(parts["ltoir"], LinkerOptions(**SM80)).data == bytes(theirs.code)
    assert link(codes, cuda.core.LinkerOptions(**SM80)).data == bytes(theirs.code)
    assert link([(p.data, "ltoir") for p in parts["ltoir"]], LinkerOptions(**SM80)).data == bytes(theirs.code)


def test_what_is_linked_and_how_is_the_key(cache, parts):
    link(parts["ltoir"], LinkerOptions(**SM80), cache=cache)
    other = part(CALLEE.replace("3", "4"), "ltoir", "callee")
    for inputs, options in (
        ([other, parts["ltoir"][1]], {}),
        (parts["ltoir"][::-1], {}),
        (parts["ltoir"], {"fma": False}),
        (parts["ltoir"], {"name": "x"}),
        (parts["cubin"], {}),
    ):
        assert not link(inputs, LinkerOptions(**SM80 | options), cache=cache).hit
    assert link(parts["ltoir"], LinkerOptions(**SM80), cache=cache).hit


def compile_input(source, name, **options):
    given = ProgramOptions(**SM80, name=name, relocatable_device_code=True, **options)
    return LinkInput(name, "ltoir", compile=normalize(code=source, code_type="c++", options=given, target_type="ltoir"))


LTO = LinkerOptions(**SM80, name="pair", link_time_optimization=True)


def test_staged_compiles(cache, compiler_runs):
    inputs = [compile_input(CALLEE, "callee"), compile_input(CALLER, "caller")]
    assert look_up_linked(inputs, LTO, "cubin", cache) is None
    made = obtain_linked(inputs, LTO, "cubin", cache)
    assert compiler_runs == ["compile_cpp", "compile_cpp", "link"]
    assert obtain_linked(inputs, LTO, "cubin", cache).hit
    assert look_up_linked(inputs, LTO, "cubin", cache).data == made.data
    changed = [compile_input(CALLEE.replace("3", "4"), "callee"), inputs[1]]
    obtain_linked(changed, LTO, "cubin", cache)
    assert compiler_runs[3:] == ["compile_cpp", "link"], "the unchanged half is taken from the cache"
    assert made.record["duration"] > 0
    assert [i["name"] for i in made.record["inputs"]] == ["callee", "caller"]


def test_a_staged_link_is_shared_between_directories(cache, tmp_path, monkeypatch):
    """LTO-IR carries the working directory; the cubin linked from it doesn't, unless with line information."""
    made = []
    for place in ("one", "another-name"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        made.append(obtain_linked([compile_input(CALLEE, "a"), compile_input(CALLER, "b")], LTO, "cubin", cache))
    assert [m.hit for m in made] == [False, True]
    fresh = obtain_linked([compile_input(CALLEE, "a"), compile_input(CALLER, "b")], LTO, "cubin")
    assert made[0].data == made[1].data == fresh.data


def test_a_staged_link_sees_its_headers(cache, project):
    source = '#include "scale.h"\n__device__ float f(float x) { return x * SCALE; }'
    results = []
    for scale in (1, 2, 2, 1):
        project("scale.h", f"#define SCALE {scale}.f")
        results.append(obtain_linked([compile_input(source, "a"), compile_input(CALLER, "b")], LTO, "cubin", cache))
    assert [r.hit for r in results] == [False, False, True, True]
    assert results[0].data == results[3].data != results[1].data == results[2].data
    assert [h["name"] for h in results[0].record["headers"]] == ["scale.h"]


def test_what_cannot_be_keyed_is_linked_all_the_same(cache):
    made = obtain_linked(
        [compile_input(CALLEE + "__device__ const char *now = __TIME__;", "a"), compile_input(CALLER, "b")],
        LTO,
        "cubin",
        cache,
    )
    assert made.data
    assert made.digest is None
    assert "__TIME__" in made.reason


def test_errors(cache, parts):
    with pytest.raises(OptionError, match="nothing to link"):
        link([], LinkerOptions(**SM80))
    with pytest.raises(OptionError, match="not 'ltoir'"):
        link(parts["ltoir"], LinkerOptions(**SM80), "ltoir")
    with pytest.raises(OptionError, match="can't link 'sass' input"):
        link([(b"x", "sass")], LinkerOptions(**SM80))
    with pytest.raises(TypeError, match=r"input 0 can't be linked.*got str"):
        link(["x"], LinkerOptions(**SM80))
    with pytest.raises(CompileError, match="link -> cubin failed") as caught:
        link([parts["ltoir"][1]], LinkerOptions(**SM80, name="half"), cache=cache)
    assert "f" in caught.value.log


@pytest.mark.parametrize("kind", ["ltoir", "ptx"])
def test_an_unknown_architecture_is_an_error_and_not_the_end_of_the_process(parts, kind):
    with pytest.raises(ArchError, match="did you mean 'sm_90'"):
        link(parts[kind], LinkerOptions(arch="sm_91"))
    with pytest.raises(ArchError, match="did you mean 'sm_90'"):
        Program(parts["ptx"][0].data.decode(), "ptx", ProgramOptions(arch="sm_91")).compiled("cubin")


def test_floating_point_options_reach_link_time_optimization(parts):
    for name in ("ftz", "prec_div", "prec_sqrt", "fma"):
        for value in (True, False):
            assert link(parts["ltoir"], LinkerOptions(**SM80, **{name: value})).data


@pytest.mark.parametrize("kind", ["cubin", "ptx", "ltoir"])
def test_object_codes_that_are_files(cache, parts, tmp_path, kind):
    """As cuda.core takes them: by their content, which may change."""
    paths = [tmp_path / f"{index}.{kind}" for index in range(2)]
    for path, made in zip(paths, parts[kind], strict=True):
        path.write_bytes(made.data)
    codes = [getattr(cuda.core.ObjectCode, f"from_{kind}")(str(path)) for path in paths]
    options = LinkerOptions(**SM80)
    first, again = (link(codes, options, cache=cache) for _ in range(2))
    assert (first.hit, again.hit) == (False, True)
    assert first.data == link(parts[kind], options).data
    paths[0].write_bytes(part(CALLEE.replace("3", "4"), kind, "callee").data)
    changed = link(codes, options, cache=cache)
    assert not changed.hit
    assert changed.data != first.data
    paths[0].unlink()
    with pytest.raises(FileNotFoundError):
        link(codes, options, cache=cache)


def test_types_in_any_case_and_bytes_of_any_kind(cache, parts):
    plain = [(p.data, "cubin") for p in parts["cubin"]]
    assert not link(plain, LinkerOptions(**SM80), cache=cache).hit
    for wrap in (bytes, bytearray, memoryview):
        shouted = [(wrap(data), kind.upper()) for data, kind in plain]
        assert link(shouted, LinkerOptions(**SM80), "CUBIN", cache=cache).hit
    assert link(iter(plain), dict(SM80), cache=cache).hit, "any iterable, and a mapping of fields"
    assert link(plain, {"arch": "sm_80 "}, cache=cache).hit


@pytest.mark.parametrize("options", [3, "x", ProgramOptions(**SM80), {"arch": "sm_80", "nope": 1}])
def test_options_of_a_wrong_type(parts, compiler_runs, options):
    for run in (lambda: link(parts["cubin"], options), lambda: Linker(*parts["cubin"], options=options)):
        with pytest.raises(TypeError, match=r"must be LinkerOptions|unexpected argument 'nope'"):
            run()
    assert compiler_runs == []


@pytest.mark.parametrize("target", ["ltoir", "fatbin", None, b"cubin", 3])
def test_targets_that_are_not_made(parts, compiler_runs, target):
    with pytest.raises(OptionError, match="makes cubin or ptx"):
        link(parts["cubin"], LinkerOptions(**SM80), target)
    assert compiler_runs == []

# SPDX-License-Identifier: Apache-2.0
"""``compile``, with real compilers."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

SAXPY = 'extern "C" __global__ void saxpy(float a, float* x, int n) { int i = threadIdx.x; if (i < n) x[i] *= a; }\n'
TEMPLATED = "template <typename T> __global__ void scale(T* x, T a) { x[threadIdx.x] *= a; }\n"
PTX = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry nothing()\n{\n    ret;\n}\n"
LAYOUT = (
    "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64-"
    "v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
)
NVVM = """\
target datalayout = "LAYOUT"
target triple = "nvptx64-nvidia-cuda"
define void @nothing() {
  ret void
}
!nvvm.annotations = !{!0}
!0 = !{void ()* @nothing, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0, i32 3, i32 1}
""".replace("LAYOUT", LAYOUT)


@pytest.fixture
def saxpy(tmp_path):
    path = tmp_path / "saxpy.cu"
    path.write_text(SAXPY)
    return path


def test_the_second_compile_is_a_hit(cli, cli_json, saxpy):
    first = cli_json("compile", saxpy, "--arch", "sm_90")
    assert " ".join(first) == (
        "name kernel code_type target_type arch hit digest reason path size seconds compile_seconds symbol_mapping log "
        "output"
    )
    assert (first["hit"], first["target_type"], first["arch"]) == (False, "cubin", "sm_90")
    assert Path(first["path"]).read_bytes()[:4] == b"\x7fELF"
    second = cli_json("compile", saxpy, "--arch", "sm_90")
    assert second["hit"]
    assert second["digest"] == first["digest"]
    text = cli("compile", saxpy, "--arch", "sm_90").stdout
    assert text.startswith("hit ")
    assert "which saved" in text
    assert re.search(rf"next +.* show {first['digest'][:12]}\n", text)


def test_an_edit_is_a_miss_and_a_touch_is_none(cli_json, saxpy):
    first = cli_json("compile", saxpy, "--arch", "sm_90")
    saxpy.touch()
    assert cli_json("compile", saxpy, "--arch", "sm_90")["hit"]
    saxpy.write_text(SAXPY.replace("*=", "+="))
    edited = cli_json("compile", saxpy, "--arch", "sm_90")
    assert not edited["hit"]
    assert edited["digest"] != first["digest"]


def test_a_header_beside_the_file_is_found_and_its_edit_is_a_miss(cli_json, tmp_path):
    (tmp_path / "factor.cuh").write_text("#define FACTOR 2\n")
    source = tmp_path / "twice.cu"
    source.write_text('#include "factor.cuh"\nextern "C" __global__ void twice(int* x) { *x *= FACTOR; }\n')
    run = lambda: cli_json("compile", source, "--arch", "sm_90")["hit"]  # noqa: E731
    assert [run(), run()] == [False, True]
    (tmp_path / "factor.cuh").write_text("#define FACTOR 3\n")
    assert [run(), run()] == [False, True]


def test_output_files_and_stdout(cli, process, saxpy, tmp_path):
    target = tmp_path / "saxpy.cubin"
    assert str(target) in cli("compile", saxpy, "--arch", "sm_90", "-o", target).stdout
    done = process("compile", saxpy, "--arch", "sm_90", "-o", "-", text=False)
    assert done.stdout == target.read_bytes()
    assert done.stdout[:4] == b"\x7fELF"
    assert b"hit" in done.stderr
    assert "both write to stdout" in cli("compile", saxpy, "--json", "-o", "-", code=2).stderr


def test_output_that_can_not_be_written_is_a_failure(cli, saxpy, tmp_path):
    assert "nowhere" in cli("compile", saxpy, "--arch", "sm_90", "-o", tmp_path / "nowhere" / "x", code=2).stderr
    assert "No space left" in cli("compile", saxpy, "--arch", "sm_90", "-o", "/dev/full", code=1).stderr


def test_stdin_needs_its_code_type(cli, cli_json):
    assert "--code-type" in cli("compile", "-", "--arch", "sm_90", code=2, stdin=SAXPY).stderr
    result = cli_json("compile", "-", "--code-type", "c++", "--arch", "sm_90", stdin=SAXPY)
    assert result["size"] > 0


@pytest.mark.parametrize(
    ("name", "text", "code_type", "target"),
    [
        ("k.cpp", SAXPY, "c++", "ptx"),
        ("k.cu", SAXPY, "c++", "ltoir"),
        ("k.ptx", PTX, "ptx", "cubin"),
        ("k.ll", NVVM, "nvvm", "ptx"),
    ],
)
def test_the_suffix_gives_the_code_type(cli_json, tmp_path, name, text, code_type, target):
    (tmp_path / name).write_text(text)
    result = cli_json("compile", tmp_path / name, "--arch", "sm_90", "--target", target)
    assert (result["code_type"], result["target_type"]) == (code_type, target)
    if target == "ptx":
        assert b".entry" in Path(result["path"]).read_bytes()


def test_an_unknown_suffix_is_usage(cli, tmp_path):
    (tmp_path / "k.txt").write_text(SAXPY)
    assert "--code-type" in cli("compile", tmp_path / "k.txt", "--arch", "sm_90", code=2).stderr
    cli("compile", tmp_path / "k.txt", "--arch", "sm_90", "--code-type", "c++")


def test_macros_includes_dialect_and_name_expressions_reach_the_compiler(cli_json, tmp_path):
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "value.cuh").write_text("constexpr int value = 7;\n")
    source = tmp_path / "k.cu"
    source.write_text(
        "#include <value.cuh>\n"
        '#if !defined(PLAIN) || TILE != 32 || __cplusplus < 202002L\n#error "missing"\n#endif\n'
        "static_assert(value == 7);\n" + TEMPLATED
    )
    result = cli_json(
        "compile", source, "--arch", "sm_90", "-D", "PLAIN", "-D", "TILE=32", "-I", tmp_path / "headers",
        "--std", "c++20", "--name-expression", "scale<float>", "--name-expression", "scale<double>",
    )  # fmt: skip
    assert set(result["symbol_mapping"]) == {"scale<float>", "scale<double>"}
    assert result["symbol_mapping"]["scale<float>"].startswith("_Z5scaleIf")


def test_any_option_field(cli, cli_json, saxpy):
    fields = [
        "-O",
        "max_register_count=32",
        "-O",
        "use-fast-math",
        "-O",
        "ftz=false",
        "-O",
        "diag_suppress=177",
        "-O",
        "diag_suppress=550",
    ]
    assert cli_json("compile", saxpy, "--arch", "sm_90", *fields)["size"] > 0


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("max_register_cuont=32", "did you mean 'max_register_count'?"),
        ("max_register_count=many", "isn't an integer"),
        ("max_register_count", "needs a value"),
        ("use_fast_math=perhaps", "isn't true or false"),
        ("extra_sources=x", "Python API"),
    ],
)
def test_a_wrong_option_field_is_usage(cli, saxpy, field, says):
    assert says in cli("compile", saxpy, "--arch", "sm_90", "-O", field, code=2).stderr


def test_an_option_given_twice_is_usage(cli, saxpy):
    fields = ["-O", "max_register_count=32", "-O", "max_register_count=64"]
    assert "given twice" in cli("compile", saxpy, "--arch", "sm_90", *fields, code=2).stderr


@pytest.mark.parametrize(("own", "field"), [(["--std", "c++17"], "std=c++20"), (["--arch", "sm_80"], "arch=sm_90")])
def test_an_option_given_in_both_ways_is_usage(cli, saxpy, root, own, field):
    said = cli("compile", saxpy, *own, "-O", field, code=2).stderr
    assert "given twice" in said
    assert own[0] in said
    assert not root.exists()


def test_lists_given_in_both_ways_add_up(cli, cli_json, tmp_path):
    source = tmp_path / "n.cu"
    source.write_text('#if !defined A || !defined B\n#error one is missing\n#endif\nextern "C" __global__ void k() {}')
    assert not cli_json("compile", source, "--arch", "sm_80", "-D", "A", "-O", "define_macro=B")["hit"]
    flags = ["-O", "extra_flags=-DA", "-O", "extra_flags=-DB"]
    assert not cli_json("compile", source, "--arch", "sm_80", *flags)["hit"]
    both = ["--std", "c++17", "-O", "extra_flags=-std=c++20"]
    assert "is given twice with different values" in cli("compile", source, "--arch", "sm_80", *both, code=2).stderr


def test_a_compile_error_shows_the_log_once(process, cli_json, tmp_path):
    source = tmp_path / "bad.cu"
    source.write_text('extern "C" __global__ void bad() {\n    int x = nothing_of_this_name;\n}\n')
    done = process("compile", source, "--arch", "sm_90")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("cuda-progcache: error: ")
    assert "bad.cu(2): error" in done.stderr
    assert done.stderr.count('identifier "nothing_of_this_name" is undefined') == 1
    assert "Traceback" not in done.stderr
    error = cli_json("compile", source, "--arch", "sm_90", code=1)["error"]
    assert error["type"] == "CompileError"
    assert "nothing_of_this_name" in error["log"]


def test_an_unknown_architecture_names_the_nearest(cli, saxpy):
    assert "sm_90" in cli("compile", saxpy, "--arch", "sm_91", code=2).stderr


def test_a_warning_is_shown_again_on_a_hit(cli, tmp_path):
    source = tmp_path / "warned.cu"
    source.write_text('extern "C" __global__ void warned(int* x) { int unused; *x = 1; }\n')
    for _ in range(2):
        assert "unused" in cli("compile", source, "--arch", "sm_90").stderr


def test_a_library_kernel(cli, cli_json, library):
    arguments = ["compile", "--kernel", "scale", "--manifest", library, "-p", "dtype=float64", "--arch", "sm_90"]
    first, second = cli_json(*arguments), cli_json(*arguments)
    assert (first["kernel"], first["hit"], second["hit"]) == ("scale", False, True)
    shown = cli_json("show", first["digest"])["record"]
    assert shown["kernel"]["parameters"]["dtype"] == "float64"
    assert "dtype=float64" in cli("show", first["digest"]).stdout


def test_a_broken_kernel_names_the_template_and_line(cli, broken_library):
    error = cli("compile", "--kernel", "fill", "--manifest", broken_library, "--arch", "sm_90", code=1).stderr
    assert "fill.cu.j2" in error
    assert "fill.cu.j2:2" in error or "fill.cu.j2(2)" in error
    assert "nothing_of_this_name" in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give either FILE or --kernel"),
        (["FILE", "--kernel", "scale"], "give either FILE or --kernel"),
        (["FILE", "-p", "block=64"], "-p and --manifest need --kernel"),
        (["--kernel", "axpby", "-D", "X"], "the manifest sets a library kernel's options"),
        (["--kernel", "axpbi", "--arch", "sm_90"], "axpby"),
        (["nothing.cu"], "does not exist"),
        (["FILE", "--target", "sass"], "cubin"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_calls_are_usage(cli, saxpy, arguments, says):
    arguments = [str(saxpy) if each == "FILE" else each for each in arguments]
    assert says in cli("compile", *arguments, code=2).stderr


def test_text_that_is_no_text_is_usage(cli, tmp_path):
    (tmp_path / "k.cu").write_bytes(b"\xff\xfe\x00")
    assert "isn't UTF-8" in cli("compile", tmp_path / "k.cu", "--arch", "sm_90", code=2).stderr


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_full_disk_does_not_cost_the_binary(cli, saxpy, tmp_path, monkeypatch):
    """The fault is injected where the store puts an entry in its place; the compile is done and handed over."""
    replace = os.replace

    def full(source, target, **more):
        if "/entries/" in str(target):
            raise OSError(28, "No space left on device", target)
        replace(source, target, **more)

    monkeypatch.setattr("os.replace", full)
    target = tmp_path / "out.cubin"
    done = cli("compile", saxpy, "--arch", "sm_90", "-o", target)
    assert target.read_bytes()[:4] == b"\x7fELF"
    assert "not cached: " in done.stdout
    assert "No space left on device" in done.stderr
    assert "cuda-progcache: warning: " in done.stderr
    assert json.loads(cli("list", "--json").stdout)["entries"] == []


@pytest.mark.filterwarnings("default::RuntimeWarning")
def test_a_default_root_that_can_not_be_written_is_said(cli, cli_json, saxpy, monkeypatch):
    """For root every directory can be written, so the answer to "can it?" is injected."""
    monkeypatch.setattr("cuda_progcache.store.root.Root.writable", lambda _: False)
    done = cli("compile", saxpy, "--arch", "sm_90")
    assert re.search(r"not cached: .* can't be written", done.stdout)
    assert "cuda-progcache: warning: " in done.stderr
    assert cli_json("compile", saxpy, "--arch", "sm_90")["path"] is None


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--arch", "sm_80", "--arch", "sm_90"], "--arch"),
        (["--arch=sm_80", "--target", "ptx", "--target=cubin"], "--target"),
        (["--arch", "sm_80", "-o", "a", "-o", "b"], "-o"),
    ],
)
def test_an_option_that_takes_one_value_is_not_taken_twice(cli, saxpy, root, arguments, option):
    said = cli("compile", saxpy, *arguments, code=2).stderr
    assert option in said
    assert "given more than once" in said
    assert not root.exists()


def test_options_that_take_many_are(cli, saxpy):
    cli("compile", saxpy, "--arch", "sm_80", "-D", "A=1", "-D", "B=2", "-v", "-v")


@pytest.mark.parametrize("options", [[], ["-O", "relocatable_device_code=true"]])
def test_a_cubin_without_a_kernel_is_hinted_at(cli, tmp_path, options):
    path = tmp_path / "scale.cu"
    path.write_text(TEMPLATED)
    for _ in range(2):  # compiled, and a hit
        said = cli("compile", path, "--arch", "sm_80", *options).stderr
        assert "the binary has no kernel" in said
        assert "--name-expression" in said
    done = cli("compile", path, "--arch", "sm_80", "--name-expression", "scale<float>", *options)
    assert "no kernel" not in done.stderr


LIBRARY = """
format = 1
[kernels.level]
template = "level.cu.j2"
entry_points = ["level"]
[kernels.level.parameters]
hi = { type = "float", default = 1.0 }
[[kernels.level.variants]]
[[kernels.level.variants]]
hi = inf
[[kernels.level.variants]]
hi = -inf
[[kernels.level.variants]]
hi = nan
"""
LEVEL = """
#include "level.cuh"
// {{ hi }}
extern "C" __global__ void level(float *a) { *a = LEVEL + {{ hi | cuda_literal('float32') }}; }
"""


@pytest.fixture
def levels(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "manifest.toml").write_text(LIBRARY)
    (folder / "level.cu.j2").write_text(LEVEL)
    (tmp_path / "inc").mkdir()
    (tmp_path / "inc" / "level.cuh").write_text("#define LEVEL 1.0f\n")
    return folder


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_infinities_and_nan_are_parameters_like_others(cli, cli_json, levels, tmp_path, value):
    arguments = ["compile", "--kernel", "level", "--manifest", levels, "-I", tmp_path / "inc", "--arch", "sm_80"]
    made = cli_json(*arguments, "-p", f"hi={value}")
    assert made["digest"]
    assert cli_json(*arguments, "-p", f"hi={value}")["hit"]
    assert cli_json("show", made["digest"])["record"]["kernel"]["parameters"] == {"hi": value}
    assert f"hi={value}" in cli("show", made["digest"]).stdout
    assert "render" in cli("provenance", made["digest"]).stdout


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_prewarm_of_infinities(cli, levels, tmp_path):
    prewarm = ["prewarm", "--manifest", levels, "-I", tmp_path / "inc", "--arch", "sm_80", "--json"]
    for counted in ("compiled", "hits"):
        report = strict(cli(*prewarm).stdout)
        assert report[counted] == 4
        assert [item["variant"] for item in report["items"]] == [{}, {"hi": "inf"}, {"hi": "-inf"}, {"hi": "nan"}]


def test_headers_of_a_library_kernel_may_be_named(cli, cli_json, levels, tmp_path):
    arguments = ["compile", "--kernel", "level", "--manifest", levels, "--arch", "sm_80"]
    assert "level.cuh" in cli(*arguments, code=1).stderr
    made = cli_json(*arguments, "-I", tmp_path / "inc")
    assert cli_json(*arguments, "-I", tmp_path / "inc")["digest"] == made["digest"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--lineinfo"], "there is no option --lineinfo; to set it for the compiler, use -O lineinfo=true"),
        (["--max-register-count", "32"], "to set it for the compiler, use -O max_register_count=VALUE"),
        (["--nonsense"], "No such option '--nonsense'"),
    ],
)
def test_an_option_of_the_compilers_is_answered_with_how_to_give_it(cli, tmp_path, arguments, told):
    source = tmp_path / "k.cu"
    source.write_text("__global__ void k() {}")
    assert told in cli("compile", source, "--arch", "sm_90", *arguments, code=2).stderr


def test_an_include_directory_that_is_missing_is_told_with_the_header(cli, tmp_path):
    source = tmp_path / "k.cu"
    source.write_text('#include "missing.h"\n__global__ void k() {}')
    (tmp_path / "there").mkdir()
    given = ["-I", tmp_path / "incc", "-I", tmp_path / "there"]
    told = cli("compile", source, "--arch", "sm_90", *given, code=1).stderr
    assert f"include directory {tmp_path / 'incc'} doesn't exist" in told
    assert "there doesn't exist" not in told

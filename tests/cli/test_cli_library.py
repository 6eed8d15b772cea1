# SPDX-License-Identifier: Apache-2.0
"""``render`` and ``kernels``."""

from __future__ import annotations

import re

import pytest


def test_render_prints_the_source(cli, library):
    source = cli("render", "scale", "--manifest", library, "-p", "dtype=float64", "-p", "block=0x40").stdout
    assert "__launch_bounds__(64) scale(double* x, double a, int n)" in source
    assert source.startswith("// scales a vector\n")
    assert source.endswith("}\n")
    assert not source.endswith("\n\n")


@pytest.mark.parametrize(
    ("text", "bounded"), [("true", False), ("YES", False), ("1", False), ("off", True), ("0", True)]
)
def test_render_reads_bools(cli, library, text, bounded):
    source = cli("render", "scale", "--manifest", library / "manifest.toml", "-p", f"fast={text}").stdout
    assert ("if (i < n)" in source) is bounded


def test_render_writes_a_file(cli, library, tmp_path):
    target = tmp_path / "scale.cu"
    assert cli("render", "scale", "--manifest", library, "-o", target).stdout == ""
    assert "scale(float* x" in target.read_text()


def test_render_json(cli_json, library):
    rendered = cli_json("render", "scale", "--manifest", library, "-p", "block=64")
    assert set(rendered) == {"kernel", "parameters", "modules", "entry_points", "name_expressions", "templates"}
    assert rendered["parameters"] == {"dtype": "float32", "block": 64, "fast": False}
    assert rendered["entry_points"] == ["scale"]
    assert rendered["modules"][0]["template"] == "scale.cu.j2"
    assert re.fullmatch("[0-9a-f]{64}", rendered["templates"]["scale.cu.j2"])


def test_list_parameters(cli, cli_json, library):
    text = cli("render", "scale", "--manifest", library, "--list-parameters").stdout
    assert re.search(r"dtype +dtype +float32 +float32 \| float64 +element type", text)
    assert re.search(r"block +int +256 +32 \.\. 1024 +threads per block", text)
    listed = cli_json("render", "scale", "--manifest", library, "--list-parameters")
    assert listed["parameters"][1] == {
        "name": "block", "type": "int", "values": None, "default": 256, "min": 32, "max": 1024,
        "description": "threads per block",
    }  # fmt: skip
    assert "no parameters" in cli("render", "fill", "--manifest", library, "--list-parameters").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["scael"], "scale"),
        (["scale", "-p", "blok=64"], "block"),
        (["scale", "-p", "dtype=float23"], "float32"),
        (["scale", "-p", "block=many"], "isn't an integer"),
        (["scale", "-p", "fast=maybe"], "isn't true or false"),
        (["scale", "-p", "block"], "isn't KEY=VALUE"),
        (["scale", "-p", "block=16"], "32"),
        (["scale", "-p", "block=48"], "multiple of the warp size"),
        (["scale", "--module", "other"], "has no module 'other'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_usage_and_named(cli, library, arguments, says):
    assert says in cli("render", "--manifest", library, *arguments, code=2).stderr


def test_a_bad_manifest_is_usage(cli, tmp_path):
    (tmp_path / "manifest.toml").write_text("format = 1\n[kernels.x]\ntemplat = 'x.cu.j2'\n")
    assert "template" in cli("kernels", "--manifest", tmp_path, code=2).stderr


def test_kernels_check_says_what_is_wrong_with_a_library(cli, cli_json, tmp_path):
    (tmp_path / "k.cu.j2").write_text('extern "C" __global__ void k(int* x) { *x = {{ n }}; }\n')
    manifest = 'format = 1\n[kernels.k]\ntemplate = "k.cu.j2"\nentry_points = ["{}"]\noptions = {{ {} }}\n'
    manifest += '[kernels.k.parameters]\nn = {{ type = "int", default = 1 }}\n'

    def write(entry, option):
        (tmp_path / "manifest.toml").write_text(manifest.format(entry, option))

    write("k", "ftz = true")
    assert "no mistakes" in cli("kernels", "--manifest", tmp_path, "--check").stdout
    assert cli_json("kernels", "--manifest", tmp_path, "--check") == {"problems": []}
    write("kk", "ftz = true")
    said = "k: the defaults: the source has no entry point 'kk'"
    assert said in cli("kernels", "--manifest", tmp_path, "--check", code=1).stdout
    assert cli_json("kernels", "--manifest", tmp_path, "--check", code=1) == {"problems": [said]}
    for option, message in (("ftzz = true", "did you mean 'ftz'?"), ("ftz = 'yes'", "'ftz' must be a bool")):
        write("k", option)
        for command in (["kernels", "--check"], ["compile", "--kernel", "k"], ["render", "k"]):
            assert message in cli(*command, "--manifest", tmp_path, code=2).stderr


def test_kernels_lists_the_bundled_library(cli, cli_json):
    from cuda_progcache import KernelLibrary

    names = list(KernelLibrary().names)
    listed = cli_json("kernels")["kernels"]
    assert [kernel["name"] for kernel in listed] == names
    assert len(names) >= 10
    text = cli("kernels").stdout
    for kernel in listed:
        assert re.search(rf"^{kernel['name']} ", text, re.MULTILINE)
        assert kernel["description"]


def test_kernels_with_names_gives_their_parameters(cli, library):
    text = cli("kernels", "--manifest", library, "scale", "fill").stdout
    assert "threads per block" in text
    assert "fill  x = value" in text
    assert "did you mean" in cli("kernels", "--manifest", library, "scal", code=2).stderr.lower()


def test_every_bundled_kernel_renders(cli_json):
    for kernel in cli_json("kernels")["kernels"]:
        rendered = cli_json("render", kernel["name"])
        assert all(module["source"].strip() for module in rendered["modules"])
        assert rendered["entry_points"] or rendered["name_expressions"]


def test_a_kernel_of_several_modules(cli, cli_json, tmp_path):
    several = [k["name"] for k in cli_json("kernels")["kernels"] if len(k["templates"]) > 1]
    assert several, "the bundled library has a pair of LTO modules"
    modules = cli_json("render", several[0])["modules"]
    text = cli("render", several[0]).stdout
    for module in modules:
        assert f"==== module {module['name']}, from {module['template']}" in text
        assert cli("render", several[0], "--module", module["name"]).stdout == module["source"]
    assert "--module" in cli("render", several[0], "-o", tmp_path / "out.cu", code=2).stderr

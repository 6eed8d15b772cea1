# SPDX-License-Identifier: Apache-2.0
"""Options, each from the command line and from the ini file; modes; fixtures."""

from __future__ import annotations

import json
import os

import pytest

COMPILE = r"""
import cuda_progcache

def test_compile(program_cache):
    source = 'extern "C" __global__ void k(int *out) { *out = 1; }'
    program = cuda_progcache.Program(source, "c++", cuda_progcache.ProgramOptions(arch="sm_90", name="k.cu"))
    program.compiled("cubin", cache=program_cache)
"""

SETTINGS = r"""
import os

def test_settings(program_cache, kernel):
    assert program_cache.settings["max_size_bytes"] == 2_000_000
    assert program_cache.path.name == "programs"
    assert kernel("axpby").arch == "sm_80"
    assert os.environ["CUDA_PROGCACHE"] == "rw"
"""


def variables():
    return {name: value for name, value in os.environ.items() if name.startswith("CUDA_PROGCACHE")}


@pytest.mark.parametrize("given", ["options", "ini"])
def test_every_option_from_either_place(pytester, in_process, given):
    settings = {
        "progcache": "rw",
        "progcache-dir": "programs",
        "progcache-max-size": "2MB",
        "progcache-record": "out/run.jsonl",
        "progcache-report": "out/report.json",
        "progcache-arch": "sm_80",
    }
    (pytester.path / "out").mkdir()
    pytester.makepyfile(SETTINGS)
    if given == "ini":
        lines = [f"{name.replace('-', '_')} = {value}" for name, value in settings.items()]
        pytester.makeini("\n".join(["[pytest]", *lines]))
        settings = {}
    before = variables()
    run = in_process(*(f"--{name}={value}" for name, value in settings.items()), passed=1)
    assert run.counts == (0, 1, 0)
    assert run.line["path"] == str(pytester.path / "programs")
    (line,) = [json.loads(line) for line in (pytester.path / "out" / "run.jsonl").read_text().split("\n") if line]
    assert (line["kernel"], line["arch"], line["outcome"]) == ("axpby", "sm_80", "compiled")
    report = json.loads((pytester.path / "out" / "report.json").read_text())
    assert (report["format"], report["mode"], report["misses"], report["exit_status"]) == (1, "rw", 1, 0)
    assert report["misses_by_reason"] == {"first compile of this program": 1}
    assert report["cache"]["path"] == str(pytester.path / "programs")
    assert [one["name"] for one in report["compiles"]] == ["axpby.cu"]
    assert variables() == before, "a run puts back what it set"


def test_the_command_line_wins_over_the_ini(pytester, in_process):
    pytester.makeini("[pytest]\nprogcache_dir = ini\nprogcache = frozen\n")
    pytester.makepyfile(COMPILE)
    run = in_process("--progcache-dir=option", "--progcache=rw", passed=1)
    assert (run.counts, run.line["path"]) == ((0, 1, 0), str(pytester.path / "option"))


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--progcache=wr", "*--progcache=wr isn't a mode of the cache (rw, ro, off, frozen)*"),
        ("--progcache-max-size=big", "*--progcache-max-size: 'big' isn't a size such as 500MB, 2GiB or 0*"),
    ],
)
def test_what_is_no_value_is_refused_before_any_test(pytester, in_process, argument, told):
    pytester.makepyfile(COMPILE)
    result = in_process(argument).result
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([told])


@pytest.mark.parametrize(("variable", "cap"), [(None, 5_000_000_000), ("1GB", 1_000_000_000), ("0", None)])
def test_the_size_cap_by_default_and_from_the_environment(pytester, in_process, monkeypatch, variable, cap):
    if variable is not None:
        monkeypatch.setenv("CUDA_PROGCACHE_MAX_SIZE", variable)
    pytester.makepyfile(f"def test_cap(program_cache):\n    assert program_cache.settings['max_size_bytes'] == {cap}\n")
    in_process("--progcache-dir=programs", passed=1)


def test_the_modes(pytester, in_process):
    """``off`` and ``ro`` compile and keep nothing; ``frozen`` serves what is there and fails over what isn't."""
    pytester.makepyfile(COMPILE)
    for mode, told in (("off", "the cache is off"), ("ro", "(mode ro)")):
        run = in_process(f"--progcache={mode}", "--progcache-dir=programs", passed=1)
        assert told in run.text
        assert not (pytester.path / "programs").exists()
    frozen = in_process("--progcache=frozen", "--progcache-dir=programs", failed=1)
    assert "the cache is frozen, and k.cu (cubin, sm_90) isn't in " in frozen.text
    assert "missed: 1 × first compile of this program" in frozen.text
    assert "compiled 1" not in frozen.text
    in_process("--progcache-dir=programs", passed=1)
    for mode in ("ro", "frozen"):
        run = in_process(f"--progcache={mode}", "--progcache-dir=programs", passed=1)
        assert (run.counts, run.line["note"]) == ((1, 0, 0), f" (mode {mode})")


FIXTURES = r"""
import cuda_progcache
import pytest

def test_kernel(kernel, compile_service, program_cache):
    assert isinstance(compile_service, cuda_progcache.CompileService)
    assert compile_service.cache is program_cache
    first = kernel("softmax", dtype="float16")
    assert (first.hit, first.target_type, first.data[:4]) == (False, "cubin", b"\x7fELF")
    assert compile_service.kernel("softmax", dtype="float16", arch=first.arch).hit
    assert kernel("axpby", arch="sm_80", target_type="ptx").target_type == "ptx"

def test_mistakes_are_told(kernel):
    with pytest.raises(cuda_progcache.KernelNotFoundError, match="softmax"):
        kernel("sofmax")
    with pytest.raises(cuda_progcache.ParameterError, match="dtype"):
        kernel("softmax", dtyp="float16")
"""


def test_the_fixtures(pytester, in_process):
    pytester.makepyfile(FIXTURES)
    assert in_process("--progcache-dir=programs", passed=2).counts == (1, 2, 0)


def test_help_tells_of_options_defaults_fixtures_and_the_marker(in_process):
    text = in_process("--help").text
    for option in ("progcache=MODE", "progcache-dir=DIR", "progcache-max-size=SIZE", "progcache-record=FILE"):
        assert f"--{option}" in text
    assert "5GB" in text
    assert "progcache_report" in text, "the ini's names"
    fixtures = in_process("--fixtures").text
    for name in ("program_cache", "compile_service", "kernel"):
        assert f"\n{name} [session scope]" in fixtures
    assert "@pytest.mark.no_compile: the test fails if a program is compiled" in in_process("--markers").text

# SPDX-License-Identifier: Apache-2.0
"""The tools that watch a compiler: which options it doesn't forget, which variables it asks for."""

from __future__ import annotations

import shutil

import pytest

from ci import compiler_environment, lasting_options
from ci.fresh_compiler import KERNELS, Toolchain, run
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.lasting import FORGOTTEN


@pytest.fixture(scope="module")
def tools():
    return Toolchain.here()


def test_options_that_last_are_found(tools):
    """In NVRTC, and in nvJitLink; and the table in the package says the same."""

    def cpp(*flags):
        return tools.compile(KERNELS["aliases"], "ptx", "sm_80", *flags)

    sets = [["--restrict"], ["--fmad=false"], ["--no-such-option"]]
    found = lasting_options.scan("nvrtc", sets, {"aliases": cpp}, [cpp])
    part = run([tools.compile(KERNELS["by_value"], "ltoir", "sm_90")])[0]["made"]["data"]

    def link(*flags):
        return tools.link(part, "ltoir", "cubin", "sm_90", *flags)

    found += lasting_options.scan("nvJitLink", [["-g"], ["-fma=0"]], {"by_value": link}, [link])
    assert [(one.verdict, one.serves) for one in found] == [
        ("lasts", True),
        ("forgotten", None),
        ("refused", None),
        ("lasts", True),
        ("forgotten", None),
    ]
    assert [one.expected for one in found] == ["lasts", "forgotten", "lasts", "lasts", "forgotten"]


def test_each_option_that_is_forgotten_is_scanned():
    """Those that the tool doesn't try name files or headers, or say what is made."""
    for library, sets in (("nvrtc", lasting_options.NVRTC), ("nvJitLink", lasting_options.NVJITLINK)):
        tried = {flag.partition("=")[0] for flags in sets for flag in flags}
        rest = FORGOTTEN[library] - tried
        assert rest <= {
            *("-arch", "-lto", "-ptx", "--time", "--fdevice-time-trace"),
            *("--include-path", "--pre-include", "--use-bundled-headers"),
        }


@pytest.fixture(scope="module")
def asked(tools):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the watcher with: install gcc")
    return compiler_environment.watch(tools, compiler_environment.jobs(tools, few=True))


def test_each_variable_in_the_key_is_asked_for(asked):
    assert set(toolchain.VARIABLES) <= set(asked)
    assert asked["NV_NVVM_VERSION"] == ("nvJitLink", "nvrtc", "nvvm")


def test_a_variable_that_shows_is_found(tools):
    job = tools.compile(KERNELS["aliases"], "ptx", "sm_80")
    names = ["NV_NVVM_VERSION", "LLVM_OVERRIDE_PRODUCER"]
    assert compiler_environment.shows(names, [job], ["nvvm-latest"]) == {names[0]: ("nvvm-latest",), names[1]: ()}


def test_what_is_handed_on_without_being_in_the_key_does_not_show(tools):
    found = compiler_environment.look(tools, few=True)
    assert [one for one in found if not one.right] == []
    assert not compiler_environment.Variable("PATH", (), ("1",), "handed on").right

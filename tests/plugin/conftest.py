# SPDX-License-Identifier: Apache-2.0
"""Test runs inside the tests: in a process of their own where that is the point, else in this one."""

from __future__ import annotations

import functools
import re

import pytest

LINE = re.compile(
    r"^progcache: (?P<hits>\d+) hits?, (?P<misses>\d+) miss(es)?, (?P<dropped>\d+) dropped(, (?P<unkept>\d+) not kept)?"
    r"( \((?P<share>\d+)% hits\))?, (?P<size>[\d.]+ k?B) at (?P<path>\S+)(?P<note> \(.*\))?$",
    re.MULTILINE,
)


class Run:
    """What a test run printed, and the parts of its summary line."""

    def __init__(self, result):
        self.result = result
        self.text = result.stdout.str()
        lines = [match.groupdict() for match in LINE.finditer(self.text)]
        assert len(lines) <= 1, "the line is printed once, not by each worker"
        self.line = lines[0] if lines else None

    @property
    def counts(self):
        assert self.line is not None, self.text
        return tuple(int(self.line[name]) for name in ("hits", "misses", "dropped"))


@pytest.fixture(scope="module")
def warm():
    """Have what a compile needs imported, and its compiler process started: runs in this process share them."""
    import cuda_progcache

    options = cuda_progcache.ProgramOptions(arch="sm_90")
    program = cuda_progcache.Program("__global__ void warm() {}", "c++", options)
    program.compiled("cubin", cache=cuda_progcache.InMemoryProgramCache())


@pytest.fixture
def in_process(pytester, warm):
    """Run the tests in this process: a run takes little more than its tests."""
    return functools.partial(_run, pytester, pytester.runpytest_inprocess)


@pytest.fixture
def in_own_process(pytester):
    """Run the tests as a user does."""
    return functools.partial(_run, pytester, pytester.runpytest_subprocess)


def _run(pytester, run, *arguments, **outcomes):
    """Run without the plugins that aren't looked at, which take longer to load than all else."""
    plugins = ["-p", "cuda_progcache.pytest_plugin", *(["-p", "xdist.plugin"] if "-n" in arguments else [])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        result = run("-p", "no:cacheprovider", *plugins, *arguments)
    if outcomes:
        result.assert_outcomes(**outcomes)
    return Run(result)

# SPDX-License-Identifier: Apache-2.0
"""What the plugin costs where nobody uses it: nothing when it is turned off, and few imports else."""

from __future__ import annotations

import json
import subprocess
import sys

IMPORTED = r"""
import json, sys
def test_imported():
    found = sorted(name for name in sys.modules if name.split(".")[0] in {"cuda_progcache", "cuda"})
    print("imported: " + json.dumps([found, [repr(one) for one in sys.meta_path]]))
"""


def imported(pytester, *arguments):
    pytester.makepyfile(IMPORTED)
    result = pytester.runpytest_subprocess("-s", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", *arguments)
    result.assert_outcomes(passed=1)
    (line,) = [line for line in result.outlines if "imported: " in line]
    return json.loads(line.split("imported: ")[1])


def test_turned_off_it_is_not_imported(pytester):
    modules, finders = imported(pytester, "-p", "no:progcache")
    assert modules == []
    assert not any("cuda_progcache" in finder for finder in finders)


def test_loaded_it_imports_little(pytester):
    modules, finders = imported(pytester)
    assert set(modules) == {
        "cuda_progcache",
        "cuda_progcache._util",
        "cuda_progcache._util.fields",
        "cuda_progcache._util.lazy",
        "cuda_progcache.compile",
        "cuda_progcache.compile.cuda_core",
        "cuda_progcache.events",
        "cuda_progcache.pytest_plugin",
    }
    assert sum("cuda_progcache" in finder for finder in finders) == 1


WATCHED = r"""
import importlib, pickle, sys
from cuda_progcache.compile.cuda_core import watch
early = "early" in sys.argv
if early:
    import cuda.core
watch()
watch()
import cuda.core, cuda.core._program
theirs = cuda.core.Program.__mro__[1]
assert cuda.core.Program is cuda.core._program.Program
assert (cuda.core.Program.__name__, cuda.core.Program.__module__) == ("Program", "cuda.core._program")
assert cuda.core.Program.__doc__ == theirs.__doc__ and cuda.core.Program.compile.__doc__ == theirs.compile.__doc__
assert type(cuda.core._program.__loader__).__module__ == "_frozen_importlib_external"
assert sum(type(one).__module__ == "cuda_progcache.compile.cuda_core" for one in sys.meta_path) == 1
program = cuda.core.Program('extern "C" __global__ void k() {}', "c++", cuda.core.ProgramOptions(arch="sm_90"))
assert isinstance(program, theirs) and len(program.compile("cubin").code)
"""


def test_cuda_core_is_what_it_was():
    """Where nobody listens, and whether it was imported before or not."""
    for when in ("early", "late"):
        subprocess.run([sys.executable, "-c", WATCHED, when], check=True, timeout=600)


FREED = r"""
import gc, sys, weakref
import cuda_progcache
from cuda_progcache.compile.cuda_core import watch
heard = []
cuda_progcache.subscribe(heard.append)
watch()
import cuda.core
gc.disable()
with cuda_progcache.FileStreamProgramCache(sys.argv[1]) as cache:
    for given in ({}, {"cache": cache}):
        program = cuda.core.Program("garbage", "c++", cuda.core.ProgramOptions(arch="sm_90"))
        freed, error = weakref.ref(program), None
        try:
            program.compile("cubin", **given)
        except Exception as raised:
            error = raised
        del program
        assert type(error).__name__ == "NVRTCError" and freed() is None
assert [event.kind for event in heard] == ["refused", "refused"]
"""


def test_a_program_that_is_refused_is_freed_without_the_collector(tmp_path):
    """cuda.core 1.2.2 fails in the one that the collector frees, in the middle of whatever runs then."""
    subprocess.run([sys.executable, "-c", FREED, str(tmp_path / "cache")], check=True, timeout=600)

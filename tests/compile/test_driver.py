# SPDX-License-Identifier: Apache-2.0
"""What is said of PTX that the driver here can't load: what ``cuda.core`` says, and at each compile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

# A driver that only knows its version: what can't be had on a machine without a GPU.
STUB = """
#include <stdlib.h>
#include <string.h>
int cuDriverGetVersion(int *version) { *version = atoi(getenv("STUB_DRIVER")); return 0; }
int cuInit(unsigned flags) { return 100; }
int cuGetProcAddress_v2(const char *name, void **function, int version, unsigned long long flags, int *status)
{
    *function = !strcmp(name, "cuDriverGetVersion") ? (void *)cuDriverGetVersion
              : !strcmp(name, "cuInit") ? (void *)cuInit : 0;
    if (status) *status = *function ? 0 : 1;
    return *function ? 0 : 500;
}
int cuGetProcAddress(const char *name, void **function, int version, unsigned long long flags)
{ return cuGetProcAddress_v2(name, function, version, flags, 0); }
"""
SCRIPT = """
import json, sys, warnings
from cuda_progcache import InMemoryProgramCache, Program

side, target = sys.argv[1:]
if side == "cuda.core":
    from cuda.core import Program
    from cuda.core.utils import InMemoryProgramCache
options = {"arch": "sm_80"}
if side == "cuda.core":
    from cuda.core import ProgramOptions

    options = ProgramOptions(**options)
source, cache = 'extern "C" __global__ void k(int *a) { *a = 1; }', InMemoryProgramCache()
said = []
for _ in range(2):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        program = Program(source, "c++", options)
        program.compile(target, cache=cache)
    said.append([(w.category.__name__, str(w.message), w.filename) for w in caught])
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make a driver with")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "stub.c").write_text(STUB)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libcuda.so.1", folder / "stub.c"], check=True)
    (folder / "script.py").write_text(SCRIPT)
    return folder


def said(folder, side, target, version):
    """The warnings of a compile, and of another that hits."""
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "STUB_DRIVER": str(version)}
    command = [sys.executable, "-I", folder / "script.py", side, target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("version", "too_old"), [(12080, True), (99990, False)])
def test_as_cuda_core_on_a_hit_as_well(stub, version, too_old):
    theirs, ours = (said(stub, side, "ptx", version) for side in ("cuda.core", "ours"))
    for mine, wanted in zip(ours, theirs, strict=True):
        assert len(mine) == len(wanted) == too_old
        for (category, message, file), (their_category, their_message, _) in zip(mine, wanted, strict=True):
            assert category == their_category
            assert message.startswith(their_message.rstrip("."))
            assert "of CUDA 12.8, the ptx of 1" in message
            assert file == str(stub / "script.py"), "at the caller's line"


def test_cubins_and_machines_without_a_driver(stub, compiled, recwarn):
    assert said(stub, "ours", "cubin", 12080) == [[], []]
    compiled(target_type="ptx")
    assert not [w for w in recwarn if "driver" in str(w.message)] or shutil.which("nvidia-smi")

# SPDX-License-Identifier: Apache-2.0
"""A hit in a new process: what it must not import, since each of these takes longer than the lookup itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

# Milliseconds: inspect 12 (with dataclasses), msgspec 12, jinja2 60, cuda.core 300; typing, enum, re, pathlib, tomllib
# and hashlib (OpenSSL) 2 to 4 each; logging, json, random, datetime and uuid 1 to 2.
HEAVY = {
    *("ast", "asyncio", "cuda", "dataclasses", "datetime", "decimal", "enum", "hashlib", "importlib.metadata"),
    *("inspect", "jinja2", "json", "logging", "msgspec", "multiprocessing", "numpy", "pathlib", "pickle"),
    *("platformdirs", "random", "re", "socket", "subprocess", "tempfile", "tomllib", "typing", "urllib.parse", "uuid"),
}
# Of our own: what only a miss needs.
MISSES = {
    *(
        "compile.miss",
        "compile.compilers",
        "compile.own_process",
        "compile.diagnostics",
        "compile.single_flight",
        "compile.history",
    ),
    *("memo", "provenance.steps", "memo.storage"),
}

PROGRAM = """
import sys
before = set(sys.modules)
from cuda_progcache import CompileService, FileStreamProgramCache, Program, ProgramOptions
source = 'extern "C" __global__ void k(int *a) { *a = 1; }'
done = CompileService().compile(source, options=ProgramOptions(arch="sm_80"))
"""
KERNEL = """
import sys
before = set(sys.modules)
from cuda_progcache import CompileService
done = CompileService().kernel("axpby", arch="sm_80")
"""
OPENED = """
import sys
before = set(sys.modules)
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
source = 'extern "C" __global__ void k(int *a) { *a = 1; }'
with FileStreamProgramCache(sys.argv[1] + "/programs") as cache:
    done = Program(source, "c++", ProgramOptions(arch="sm_80")).compiled("cubin", cache=cache)
"""
TELL = """
import atexit
@atexit.register  # the last to run: what is imported at the end of the process counts, too
def tell():
    late = set(sys.modules) - before
    import json
    print(json.dumps([done.hit, len(done.data), sorted(late)]))
"""


@pytest.fixture
def run(tmp_path):
    environment = {
        **os.environ,
        "CUDA_PROGCACHE_DIR": str(tmp_path / "programs"),
        "CUDA_PROGCACHE_TEMPLATES": str(tmp_path / "templates"),
    }
    environment.pop("CUDA_PROGCACHE_LOG", None)

    def run(code):
        first, rest = code.lstrip().split("\n", 1)
        command = [sys.executable, "-c", f"{first}\n{TELL}\n{rest}", str(tmp_path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        hit, size, imported = json.loads(done.stdout)
        assert size > 0
        return hit, set(imported)

    return run


@pytest.mark.parametrize("code", [PROGRAM, KERNEL, OPENED], ids=["program", "kernel", "opened"])
def test_a_hit_imports_nothing_heavy(run, code):
    hit, imported = run(code)
    assert not hit
    assert {"cuda_progcache.compile.miss", "re", "typing"} <= imported  # so this test sees what there is
    hit, imported = run(code)
    assert hit
    assert imported & HEAVY == set()
    assert imported & {f"cuda_progcache.{module}" for module in MISSES} == set()


def test_a_hit_with_headers_imports_what_it_reads_them_with(run):
    code = PROGRAM.replace("source = '", "source = '#include <cuda_fp16.h>\\\\n' '").replace(
        'arch="sm_80"', 'arch="sm_80", include_path=[header_root("cuda")]'
    )
    code = code.replace("\nsource", "\nfrom cuda_progcache.keys.toolchain import header_root\nsource")
    assert not run(code)[0]
    hit, imported = run(code)
    assert hit
    assert imported & (HEAVY - {"json", "re", "enum", "hashlib"}) == set()

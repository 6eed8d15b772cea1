# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a cache with a few compiled programs, and report data on 10,000 copies of them."""

from __future__ import annotations

from hashlib import sha256

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.report import data

SAXPY = """\
extern "C" __global__ void saxpy(float a, const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
"""
#: Text that a foreign bundle might contain as a name or a log.
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m\u202egnp.exe\x00"


@pytest.fixture
def hostile():
    """The name of the program from a foreign bundle."""
    return HOSTILE


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Five programs: a source, an edit of it, its PTX, another architecture, and one as if from a foreign bundle."""
    cache = FileStreamProgramCache(tmp_path_factory.mktemp("small"), max_size_bytes=10**8)
    edited = SAXPY.replace("a * x[i]", "2.0f * a * x[i]")
    for source, target, arch in (
        (SAXPY, "cubin", "sm_90"),
        (edited, "cubin", "sm_90"),
        (SAXPY, "ptx", "sm_90"),
        (SAXPY, "cubin", "sm_80"),
        (SAXPY, "cubin", "sm_80"),  # a hit
    ):
        options = ProgramOptions(arch=arch, name="saxpy.cu", lineinfo=True)
        Program(source, "c++", options).compile(target, cache=cache)
    any_record = next(cache.entries()).record
    components = [["schema", "4"], ["code", HOSTILE]]
    elsewhere = {**any_record, "name": HOSTILE, "log": HOSTILE, "target_type": "ltoir", "arch": HOSTILE, "kernel": None}
    cache.publish(b"hostile", b"no binary", {**elsewhere, "components": components, "duration": 0.5})
    yield cache
    cache.close()


@pytest.fixture(scope="session")
def large(small):
    """Report data on 10,000 programs: copies of the small ones with other names, parameters and headers."""
    found = data.collect(small)
    kept = [one for one in found.programs if one.size > 1000]
    headers = tuple((f"cub/header_{number}.cuh", sha256(b"%d" % number).hexdigest()) for number in range(40))
    programs = tuple(
        kept[number % len(kept)]._replace(
            digest=sha256(b"program %d" % number).hexdigest(),
            name=f"kernel_{number % 100}",
            parameters=f"block={32 * (1 + number // 400)} dtype=float16",
            created=found.made - 60 * number,
            headers=headers[number % 10 : number % 40],
        )
        for number in range(10_000)
    )
    return found._replace(programs=programs, costs=data._costs(programs), headers=data._headers(programs))

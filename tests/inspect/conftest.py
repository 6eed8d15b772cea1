# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the inspection tests: a cache, and real compiles through it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:  # ptxas_log.py is shared with tests/kernels
    sys.path.insert(0, HERE)

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


@pytest.fixture
def cache(tmp_path):
    with FileStreamProgramCache(tmp_path / "cache", durability="none") as store:
        yield store


@pytest.fixture
def compiled(cache):
    """``compiled(source, target_type=, **options)`` compiles through the cache and returns a CompiledProgram."""

    def run(code=SOURCE, target_type="cubin", **options):
        return Program(code, "c++", ProgramOptions(**{"arch": "sm_80"} | options)).compiled(target_type, cache=cache)

    return run

# SPDX-License-Identifier: Apache-2.0
"""Compile tests: real compilers, a cache per test, and whether it was a hit."""

from __future__ import annotations

import os

import pytest

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.compile import compilers

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


@pytest.fixture
def cache(tmp_path):
    with FileStreamProgramCache(tmp_path / "cache", durability="none") as store:
        yield store


@pytest.fixture
def compiled(cache):
    """Compile through the cache: ``compiled(source, target_type=, names=, **options)`` gives a CompiledProgram."""

    def run(code=SOURCE, code_type="c++", target_type="cubin", names=(), logs=None, store=cache, **options):
        program = Program(code, code_type, ProgramOptions(**{"arch": "sm_80"} | options))
        return program.compiled(target_type, names, logs, cache=store)

    return run


@pytest.fixture
def compiler_runs(monkeypatch):
    """A list that grows by one at each run of a compiler."""
    runs = []
    for name in ("compile_cpp", "link", "compile_nvvm"):
        original = getattr(compilers, name)

        def counted(*arguments, _original=original, **given):
            runs.append(_original.__name__)
            return _original(*arguments, **given)

        monkeypatch.setattr(compilers, name, counted)
    return runs


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to work in: ``project("a.h", text)`` writes an old file there and returns its path."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def write(name, text, *, old=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if old:
            os.utime(path, (1, 1))
        return str(path)

    write.folder = folder
    return write

# SPDX-License-Identifier: Apache-2.0
"""Whole processes: imports, and the way to the bytes of a cached kernel. Wall time, interpreter start included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, PEER, Benchmark, Side, Sides, at_most, over
from ci.bench.programs import ARCH, ONE_KB

BARE = "pass"

OUR_SOURCE = f"""
from cuda_progcache import CompileService, ProgramOptions
program = CompileService().compile({ONE_KB!r}, options=ProgramOptions(arch={ARCH!r}))
assert program.data
"""
OUR_KERNEL = f"""
from cuda_progcache import CompileService
program = CompileService().kernel("axpby", arch={ARCH!r})
assert program.data
"""
OUR_CUB_KERNEL = OUR_KERNEL.replace("axpby", "block_sum_cub")
PEER_SOURCE = f"""
import os
from cuda.core import Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache
cache = FileStreamProgramCache(os.environ["PEER_CACHE"])
assert Program({ONE_KB!r}, "c++", ProgramOptions(arch={ARCH!r})).compile("cubin", cache=cache).code
"""


def _python(code: str, directory: Path) -> Side:
    return _process([sys.executable, "-c", code], directory)


def _process(command: list[str], directory: Path) -> Side:
    environment = {
        # Installed packages have bytecode, the peer's too; a checkout that may not write any would be compiled by each
        # process.
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "CUDA_PROGCACHE_DIR": str(directory / "ours"),
        "PEER_CACHE": str(directory / "peer"),
    }

    def run() -> None:
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)

    return run


def _scripts(ours: str, peer: str | None) -> Callable[[Path], Any]:
    @contextmanager
    def sides(directory: Path) -> Iterator[Sides]:
        made = {OURS: _python(ours, directory), "bare Python": _python(BARE, directory)}
        if peer is not None:
            made[PEER] = _python(peer, directory)
        yield made

    return sides


@contextmanager
def _stats(directory: Path) -> Iterator[Sides]:
    _python(OUR_SOURCE, directory)()
    command = [str(Path(sys.executable).with_name("cuda-progcache")), "stats", "--json"]
    yield {OURS: _process(command, directory), "bare Python": _python(BARE, directory)}


BENCHMARKS = (
    Benchmark(
        "process.import",
        "import cuda_progcache; the peer: import cuda.core.utils",
        over("bare Python", 30e-3),
        _scripts("import cuda_progcache", "import cuda.core.utils"),
        rounds=15,
        calls=1,
    ),
    Benchmark(
        "process.cached_program",
        "new process to the bytes of a cached program",
        at_most(60e-3),
        _scripts(OUR_SOURCE, PEER_SOURCE),
        rounds=15,
        calls=1,
    ),
    Benchmark(
        "process.cached_kernel",
        "the same by kernel name: manifest, template, key, bytes",
        at_most(60e-3),
        _scripts(OUR_KERNEL, PEER_SOURCE),
        rounds=15,
        calls=1,
    ),
    Benchmark(
        "process.cached_cub_kernel",
        "the same of a kernel over cub, with 420 headers to look at",
        at_most(60e-3),
        _scripts(OUR_CUB_KERNEL, None),
        rounds=15,
        calls=1,
    ),
    Benchmark("process.stats", "cuda-progcache stats", at_most(150e-3), _stats, rounds=15, calls=1),
)

# SPDX-License-Identifier: Apache-2.0
"""Many misses: a batch over shared headers, and many processes that want the same program."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ci.bench.harness import OURS, PEER, Benchmark, Side, Sides, ratio
from ci.bench.programs import ARCH, headers

SERIAL, ALONE = "serial loop", "one process"
VARIANTS = 64
PROCESSES = 8

CUB = """#include <cub/block/block_reduce.cuh>
extern "C" __global__ void block_sum(const {{ dtype }}* __restrict__ x, {{ dtype }}* __restrict__ out) {
    using Reduce = cub::BlockReduce<{{ dtype }}, {{ block }}>;
    __shared__ typename Reduce::TempStorage storage;
    {{ dtype }} sum = Reduce(storage).Sum(x[blockIdx.x * {{ block }} + threadIdx.x]);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
"""
MANIFEST = """format = 1
[kernels.block_sum]
template = "block_sum.cu.j2"
entry_points = ["block_sum"]
options = {{ include_path = {include} }}
[kernels.block_sum.parameters]
dtype = {{ type = "str", values = ["float", "double", "int", "long long"], default = "float" }}
block = {{ type = "int", min = 32, max = 1024, default = 128 }}
"""


def _prewarm(directory: Path, effort: float) -> dict[str, list[float]]:
    """Time a prewarm of a library of cub variants, and a loop over some of them, scaled up to all."""
    import cuda.core

    from cuda_progcache import CompileService

    count = max(6, round(VARIANTS * min(effort, 1.0)))
    dtypes = ("float", "double", "int", "long long")
    variants = [(dtypes[n % 4], 32 * (n // 4 + 1)) for n in range(count)]
    library = directory / "library"
    library.mkdir()
    (library / "block_sum.cu.j2").write_text(CUB)
    listed = "".join(
        f'[[kernels.block_sum.variants]]\ndtype = "{dtype}"\nblock = {block}\n' for dtype, block in variants
    )
    (library / "manifest.toml").write_text(MANIFEST.format(include=headers()) + listed)

    def loop(some: list[tuple[str, int]]) -> float:
        start = time.perf_counter()
        for dtype, block in some:
            source = CUB.replace("{{ dtype }}", dtype).replace("{{ block }}", str(block))
            options = cuda.core.ProgramOptions(arch=ARCH, include_path=headers())
            cuda.core.Program(source, "c++", options).compile("cubin")
        return (time.perf_counter() - start) / len(some) * count

    shown = min(count, 8)
    loop(variants[:1])
    before = loop(variants[:shown])
    start = time.perf_counter()
    report = CompileService(directory / "cache", library=library).prewarm(archs=[ARCH])
    taken = time.perf_counter() - start
    assert report.compiled == count, report.items
    return {OURS: [taken], SERIAL: [before, loop(variants[-shown:])]}


# A program that takes 0.4 s to compile without headers: the peer's cache refuses headers.
BUSY = "".join(
    f'extern "C" __global__ void k{k}(float* a) {{\n#pragma unroll\n'
    f"for (int i = 0; i < 16; ++i) a[i] = sinf(a[i] * {k}.5f) + expf(a[15 - i]) / a[(i * 7 + {k}) % 16];\n}}\n"
    for k in range(2)
)
_OURS_WORKER = f"""
import sys
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.compile import compilers
compilers.supported_archs()
cache = FileStreamProgramCache(sys.argv[1])
for line in sys.stdin:
    source = {BUSY!r} + "__device__ int fresh_" + "_".join(line.split()) + ";"  # a comment alone would be a hit
    Program(source, "c++", ProgramOptions(arch={ARCH!r})).compiled("cubin", cache=cache)
    print("done", flush=True)
"""
_PEER_WORKER = f"""
import sys
from cuda.core import Program, ProgramOptions
from cuda.core.utils import FileStreamProgramCache
cache = FileStreamProgramCache(sys.argv[1])
for line in sys.stdin:
    source = {BUSY!r} + "__device__ int fresh_" + "_".join(line.split()) + ";"  # a comment alone would be a hit
    Program(source, "c++", ProgramOptions(arch={ARCH!r})).compile("cubin", cache=cache)
    print("done", flush=True)
"""


@contextmanager
def _workers(code: str, cache: Path, count: int) -> Iterator[Side]:
    """Yield a call that makes ``count`` running processes compile one new program."""
    with ExitStack() as stack:
        workers = []
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(cache)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(process)  # closes its input at the end, which makes it exit
            workers.append(process)
        programs = iter(range(10**9))

        def call() -> None:
            number = next(programs)
            pipes = [(worker.stdin, worker.stdout) for worker in workers]
            for request, _ in pipes:
                assert request is not None
                request.write(f"{count} {number}\n")
                request.flush()
            for _, answer in pipes:
                assert answer is not None
                assert answer.readline() == "done\n"

        yield call


@contextmanager
def _one_key(directory: Path) -> Iterator[Sides]:
    with (
        _workers(_OURS_WORKER, directory / "ours", PROCESSES) as ours,
        _workers(_OURS_WORKER, directory / "alone", 1) as alone,
        _workers(_PEER_WORKER, directory / "peer", PROCESSES) as peer,
    ):
        yield {OURS: ours, ALONE: alone, PEER: peer}


BENCHMARKS = (
    Benchmark(
        "batch.64_cub_variants",
        f"prewarm of {VARIANTS} variants over cub block_reduce",
        ratio(0.25, SERIAL),
        samples=_prewarm,
    ),
    Benchmark(
        "batch.8_processes_one_key",
        f"{PROCESSES} processes want the same new program",
        ratio(1.3, ALONE),
        _one_key,
        rounds=5,
        calls=1,
    ),
)

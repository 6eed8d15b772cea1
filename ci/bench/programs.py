# SPDX-License-Identifier: Apache-2.0
"""The keys, hits and misses of whole programs."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, PEER, Benchmark, Refused, Side, Sides, at_most, over, ratio

ARCH = "sm_90"

SMALL = (
    'extern "C" __global__ void saxpy(float a, const float* __restrict__ x, float* __restrict__ y, int n) {\n'
    "    int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
    "    if (i < n) y[i] = a * x[i] + y[i];\n"
    "}\n"
)
ONE_KB = SMALL + "// " + "x" * (1000 - len(SMALL) - 4) + "\n"
LARGE = ONE_KB * 200

TEMPLATED = (
    "template <typename T> __global__ void saxpy(T a, const T* __restrict__ x, T* __restrict__ y, int n) {\n"
    "    int i = blockIdx.x * blockDim.x + threadIdx.x;\n"
    "    if (i < n) y[i] = a * x[i] + y[i];\n"
    "}\n"
)
EXPRESSIONS = ("saxpy<float>", "saxpy<double>")

BLOCK_REDUCE = (
    "#include <cub/block/block_reduce.cuh>\n"
    'extern "C" __global__ void block_sum(const float* __restrict__ x, float* __restrict__ out) {\n'
    "    using Reduce = cub::BlockReduce<float, 128>;\n"
    "    __shared__ typename Reduce::TempStorage storage;\n"
    "    float sum = Reduce(storage).Sum(x[blockIdx.x * 128 + threadIdx.x]);\n"
    "    if (threadIdx.x == 0) out[blockIdx.x] = sum;\n"
    "}\n"
)


def headers() -> list[str]:
    """Find the include folders of the CCCL, runtime and crt wheels."""
    folders: set[str] = set()
    wanted = {
        "nvidia-cuda-cccl": "cub/version.cuh",
        "nvidia-cuda-runtime": "cuda_runtime.h",
        "nvidia-cuda-crt": "crt/host_config.h",
    }
    for package, header in wanted.items():
        files = importlib.metadata.files(package) or []
        found = next((file for file in files if str(file).endswith(f"/{header}")), None)
        if found is None:
            raise FileNotFoundError(f"{package} carries no {header}; install cuda-progcache[headers]")
        folders.add(str(found.locate())[: -len(header) - 1])
    return sorted(folders)


@contextmanager
def _key(source: str, *, new: bool = False) -> Iterator[Sides]:
    """Make keys of one source or, with ``new``, of a new source each time; both sides pay for making its text."""
    from cuda.core import ProgramOptions as PeerOptions
    from cuda.core.utils import make_program_cache_key as peer_key

    from cuda_progcache import ProgramOptions, make_program_cache_key

    ours, peer = ProgramOptions(arch=ARCH), PeerOptions(arch=ARCH)
    numbers = itertools.count()

    def text() -> str:
        return f"{source}// {next(numbers)}" if new else source

    yield {
        OURS: lambda: make_program_cache_key(code=text(), code_type="c++", options=ours, target_type="cubin"),
        PEER: lambda: peer_key(code=text(), code_type="c++", options=peer, target_type="cubin"),
    }


@contextmanager
def _programs(directory: Path) -> Iterator[tuple[Callable[..., Side], Callable[..., Side]]]:
    """Yield functions that make a side, ours and the peer's: ``compiler(source, name_expressions=(), **options)``."""
    import cuda.core
    from cuda.core.utils import FileStreamProgramCache as PeerStore

    import cuda_progcache
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    with FileStreamProgramCache(directory / "ours") as ours, PeerStore(directory / "peer") as peer:

        def our_side(source: str, expressions: tuple[str, ...] = (), **fields: Any) -> Side:
            options = cuda_progcache.ProgramOptions(arch=ARCH, **fields)
            return lambda: cuda_progcache.Program(source, "c++", options).compile(
                "cubin", name_expressions=expressions, cache=ours
            )

        def peer_side(source: str, expressions: tuple[str, ...] = (), **fields: Any) -> Side:
            options = cuda.core.ProgramOptions(arch=ARCH, **fields)
            return lambda: cuda.core.Program(source, "c++", options).compile(
                "cubin", name_expressions=expressions, cache=peer
            )

        yield our_side, peer_side


@contextmanager
def _hit(directory: Path) -> Iterator[Sides]:
    with _programs(directory) as (ours, peer):
        yield {OURS: ours(ONE_KB), PEER: peer(ONE_KB)}


@contextmanager
def _hit_with_headers(directory: Path) -> Iterator[Sides]:
    with _programs(directory) as (ours, peer):
        include = headers()
        yield {
            OURS: ours(BLOCK_REDUCE, include_path=include),
            PEER: Refused(peer(BLOCK_REDUCE, include_path=include), ValueError),
        }


@contextmanager
def _hit_trusting_headers(directory: Path) -> Iterator[Sides]:
    """Compile a program many times within the interval in which its headers count as unchanged."""
    from cuda_progcache import HeaderPolicy, Program, ProgramOptions
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    options = ProgramOptions(arch=ARCH, include_path=headers())
    with FileStreamProgramCache(directory / "ours") as cache:
        program = Program(BLOCK_REDUCE, "c++", options, header_policy=HeaderPolicy(recheck_after=3600))
        yield {OURS: lambda: program.compile("cubin", cache=cache)}


@contextmanager
def _hit_with_name_expressions(directory: Path) -> Iterator[Sides]:
    with _programs(directory) as (ours, peer):
        yield {
            OURS: ours(TEMPLATED, EXPRESSIONS),
            PEER: Refused(peer(TEMPLATED, EXPRESSIONS), ValueError, NotImplementedError),
            "plain hit": ours(ONE_KB),
        }


def _miss(source: str, *, with_headers: bool = False) -> Callable[[Path], Any]:
    @contextmanager
    def sides(directory: Path) -> Iterator[Sides]:
        import cuda.core

        with _programs(directory) as (ours, peer):
            fields: dict[str, Any] = {"include_path": headers()} if with_headers else {}
            numbers = itertools.count()

            def fresh() -> str:
                return f"{source}__device__ int fresh_{next(numbers)};\n"  # a comment alone would be a hit

            def bare() -> object:
                options = cuda.core.ProgramOptions(arch=ARCH, **fields)
                return cuda.core.Program(fresh(), "c++", options).compile("cubin")

            def our_miss() -> object:
                return ours(fresh(), **fields)()

            def peer_miss() -> object:
                return peer(fresh())()

            made: dict[str, Side | Refused] = {OURS: our_miss, "bare compile": bare}
            if not with_headers:
                made[PEER] = peer_miss
            yield made

    return sides


BENCHMARKS = (
    Benchmark("key.1kB", "the key alone, 1 kB of source", ratio(1.0), lambda _: _key(ONE_KB), rounds=200),
    Benchmark("key.200kB", "the key alone, 200 kB of source", ratio(1.0), lambda _: _key(LARGE), rounds=60, calls=20),
    Benchmark(
        "key.1kB_new", "the same, 1 kB, a source not seen before", ratio(1.0), lambda _: _key(ONE_KB, new=True), 200
    ),
    Benchmark(
        "key.200kB_new", "the same, 200 kB, not seen before", ratio(1.0), lambda _: _key(LARGE, new=True), 60, 20
    ),
    Benchmark("program.hit", "Program(...).compile(cache=), 1 kB of source", ratio(0.6), _hit, rounds=200),
    Benchmark(
        "program.hit_headers", "a hit of cub block_reduce, headers verified", at_most(2e-3), _hit_with_headers, 60, 20
    ),
    Benchmark(
        "program.hit_headers_trusted",
        "the same, its headers looked at less than recheck_after ago",
        at_most(1e-4),
        _hit_trusting_headers,
        60,
        20,
    ),
    Benchmark(
        "program.hit_name_expressions",
        "a hit with two name expressions",
        over("plain hit", 10e-6),
        _hit_with_name_expressions,
        200,
    ),
    Benchmark("program.miss", "a new 300-byte program", over("bare compile", 3e-3), _miss(SMALL), rounds=20, calls=3),
    Benchmark(
        "program.miss_headers",
        "a new program over cub block_reduce",
        over("bare compile", 3e-3, share=0.03),
        _miss(BLOCK_REDUCE, with_headers=True),
        rounds=7,
        calls=1,
    ),
)

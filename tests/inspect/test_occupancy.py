# SPDX-License-Identifier: Apache-2.0
"""Occupancy: it equals that of NVIDIA's own calculator, for every architecture and any kernel and launch."""

from __future__ import annotations

import ctypes
import itertools
import os
import random
import shutil
import subprocess

import pytest

from cuda_progcache.errors import InspectError
from cuda_progcache.inspect import Resources, multiprocessor, occupancy
from cuda_progcache.inspect.occupancy_calculator import _ARCHS

#: Two C functions over NVIDIA's rules and CCCL's table of the hardware.
REFERENCE = r"""
#include <climits>
#include <cuda_occupancy.h>
#include <cuda/__device/arch_traits.h>

extern "C" const char *cudaGetErrorString(cudaError_t) { return "no runtime here"; }
static cuda::arch_traits_t traits(int arch) { return cuda::arch_traits_for(cuda::compute_capability{arch}); }

extern "C" int known(int arch, int *out) {
  try {
    auto t = traits(arch);
    out[0] = t.max_warps_per_multiprocessor;
    out[1] = t.max_blocks_per_multiprocessor;
    out[2] = t.max_registers_per_multiprocessor;
    out[3] = t.max_registers_per_block;
    out[4] = (int)t.max_shared_memory_per_multiprocessor;
    out[5] = (int)(t.max_shared_memory_per_block_optin + t.reserved_shared_memory_per_block);
    out[6] = (int)t.reserved_shared_memory_per_block;
  } catch (...) { return 1; }
  return 0;
}

// has: as from known(); kernel: registers, static shared bytes, barriers, block size, dynamic shared bytes.
extern "C" int blocks(int arch, const int *has, const int *kernel, int *limiters) {
  cudaOccDeviceProp device;
  device.computeMajor = arch / 10;
  device.computeMinor = arch % 10;
  device.maxThreadsPerBlock = 1024;
  device.maxThreadsPerMultiprocessor = has[0] * 32;
  device.regsPerBlock = has[3];
  device.regsPerMultiprocessor = has[2];
  device.warpSize = 32;
  device.sharedMemPerBlock = 48 * 1024;
  device.sharedMemPerMultiprocessor = has[4];
  device.numSms = 1;
  device.sharedMemPerBlockOptin = has[5] - has[6];
  device.reservedSharedMemPerBlock = has[6];
  cudaOccFuncAttributes attributes;
  attributes.maxThreadsPerBlock = 1024;
  attributes.numRegs = kernel[0];
  attributes.sharedSizeBytes = kernel[1];
  attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  attributes.maxDynamicSharedSizeBytes = kernel[4];
  attributes.numBlockBarriers = kernel[2];
  cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &attributes, &state, kernel[3], kernel[4])) return -1;
  *limiters = result.limitingFactors;
  return result.activeBlocksPerMultiprocessor;
}
"""
BITS = {1: "warps", 2: "registers", 4: "shared_bytes", 8: "blocks", 16: "barriers"}
#: Not in CCCL's table: sm_101 is the older name of sm_110; the programming guide lists sm_72 together with sm_70.
UNLISTED = {72, 101}


def kernel(registers=32, shared=0, barriers=1, max_threads=None):
    return Resources(registers, 0, 0, 0, shared, 0, 0, 0, barriers, max_threads, 0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    from cuda.pathfinder import find_nvidia_header_directory

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    headers = find_nvidia_header_directory("cudart")
    cccl = find_nvidia_header_directory("cccl")
    if compiler is None or headers is None or cccl is None:
        pytest.skip("takes a C++ compiler and the headers of cudart and CCCL")
    folder = tmp_path_factory.mktemp("reference")
    source, library = folder / "reference.cpp", folder / "reference.so"
    source.write_text(REFERENCE)
    subprocess.run(
        [compiler, "-std=c++17", "-shared", "-fPIC", "-w", "-I", headers, "-I", cccl, source, "-o", library], check=True
    )
    return ctypes.CDLL(str(library))


def has(arch):
    one = multiprocessor(arch)
    return [
        one.warps,
        one.blocks,
        one.registers,
        one.registers_per_block,
        one.shared_bytes,
        one.shared_bytes_per_block,
        one.reserved_shared_bytes,
    ]


def theirs(reference, arch, used, block_size, dynamic):
    limiters = ctypes.c_int()
    given = [used.registers, used.shared_bytes, used.barriers, block_size, dynamic]
    figures = (ctypes.c_int * 7)(*has(arch))
    blocks = reference.blocks(arch, figures, (ctypes.c_int * 5)(*given), ctypes.byref(limiters))
    return blocks, {name for bit, name in BITS.items() if limiters.value & bit}


@pytest.mark.parametrize("arch", sorted(_ARCHS.keys() - UNLISTED))
def test_the_hardware_is_as_cccl_has_it(reference, arch):
    found = (ctypes.c_int * 7)()
    assert reference.known(arch, found) == 0
    assert list(found) == has(arch)


def test_every_architecture_of_the_compiler_is_known():
    from cuda.bindings import nvrtc

    error, archs = nvrtc.nvrtcGetSupportedArchs()
    assert error == nvrtc.nvrtcResult.NVRTC_SUCCESS
    assert set(archs) <= _ARCHS.keys()


def shapes(arch):
    """Generate kernels and launches: those at the limits of each resource, then random ones."""
    one, draw = multiprocessor(arch), random.Random(arch)
    edges = [0, 1, 128, 129, 1024, one.shared_bytes_per_block // 2, 47 << 10, 48 << 10, (48 << 10) + 1]
    last = one.shared_bytes_per_block - one.reserved_shared_bytes
    edges += [last - 128, last, last + 1]
    for block_size, size in itertools.product((1, 31, 32, 33, 96, 128, 160, 256, 992, 1024, 1025), edges):
        yield kernel(), block_size, size
    for registers in range(257):
        yield kernel(registers=registers), draw.choice((32, 64, 128, 192, 256, 384, 512, 1024)), 0
    for barriers in range(17):
        yield kernel(barriers=barriers), 32, 0
    for _ in range(3000):
        used = kernel(draw.randint(0, 255), draw.randint(0, 48 << 10) * draw.randint(0, 1), draw.randint(0, 16))
        yield used, draw.randint(1, 1024), draw.randint(0, last) * draw.randint(0, 1)


@pytest.mark.parametrize("arch", sorted(_ARCHS))
def test_blocks_are_those_of_nvidias_calculator(reference, arch):
    for used, block_size, dynamic in shapes(arch):
        found = occupancy(used, arch, block_size, dynamic)
        blocks, limiters = theirs(reference, arch, used, block_size, dynamic)
        if block_size > 1024:
            assert (found.blocks, blocks) == (0, 0)
            continue
        case = f"{used} {block_size} {dynamic}"
        assert found.blocks == blocks, case
        if "barriers" in found.limiters:  # NVIDIA's also names what would limit without barriers
            assert set(found.limiters) <= limiters, case
        else:
            assert set(found.limiters) == limiters, case


def with_fewer(resource, fewer, used, arch, block_size, dynamic):
    if resource == "registers":
        return occupancy(used._replace(registers=used.registers - fewer), arch, block_size, dynamic)
    return occupancy(used._replace(shared_bytes=used.shared_bytes + dynamic - fewer), arch, block_size, 0)


@pytest.mark.parametrize("arch", [60, 75, 80, 86, 90, 107, 120])
def test_a_cliff_is_the_least_that_helps(arch):
    draw = random.Random(7 + arch)
    seen = 0
    for _ in range(400):
        used = kernel(draw.randint(1, 255), draw.randint(0, 48 << 10) * draw.randint(0, 1))
        block_size, dynamic = draw.randint(1, 1024), draw.randint(0, 64 << 10) * draw.randint(0, 1)
        now = occupancy(used, arch, block_size, dynamic)
        told = {one.resource: one for one in now.cliffs}
        for name in ("registers", "shared_bytes"):
            have = used.registers if name == "registers" else used.shared_bytes + dynamic
            one = told.get(name)
            if one is None:
                assert with_fewer(name, have, used, arch, block_size, dynamic).warps == now.warps
            else:
                there = with_fewer(name, one.fewer, used, arch, block_size, dynamic)
                before = with_fewer(name, one.fewer - 1, used, arch, block_size, dynamic)
                assert one.warps == there.warps > now.warps == before.warps
                seen += 1
    assert seen > 20


def test_what_is_told_of_a_launch():
    found = occupancy(kernel(registers=40), "sm_90", 256)
    assert (found.blocks, found.warps, found.most_warps, found.ratio) == (6, 48, 64, 0.75)
    assert found.limiters == ("registers",)
    assert [(one.resource, one.fewer, one.warps) for one in found.cliffs] == [("registers", 8, 64)]
    none = occupancy(kernel(max_threads=128), "sm_90a", 256)
    assert (none.blocks, none.warps, none.limiters, none.cliffs) == (0, 0, ("threads",), ())


@pytest.mark.parametrize(
    ("arch", "block_size", "dynamic", "words"),
    [
        ("sm_90", 0, 0, "block_size = 0"),
        ("sm_90", 32, -1, "dynamic_shared_bytes = -1"),
        ("sm_35", 32, 0, "'sm_35'"),
        ("gfx90", 32, 0, "'gfx90'"),
    ],
)
def test_what_cannot_be_told_is_refused(arch, block_size, dynamic, words):
    with pytest.raises(InspectError, match=words):
        occupancy(kernel(), arch, block_size, dynamic)


def test_of_a_program(compiled):
    code = """
    extern "C" __global__ void __launch_bounds__(256) k(float *a) { __shared__ float s[2048];
      s[threadIdx.x] = a[threadIdx.x]; __syncthreads(); a[threadIdx.x] = s[255 - threadIdx.x]; }
    """
    program = compiled(code, arch="sm_90")
    found = program.occupancy(256)["k"]
    used = Resources(**program.resource_usage()["k"])
    assert (used.shared_bytes, found) == (8192, occupancy(used, "sm_90", 256))
    assert program.occupancy(512)["k"].limiters == ("threads",)
    assert program.occupancy(256, 100_000)["k"].blocks == 2

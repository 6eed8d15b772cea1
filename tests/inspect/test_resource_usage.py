# SPDX-License-Identifier: Apache-2.0
"""Resource usage: the figures read from a cubin equal those that ``ptxas -v`` printed when it compiled the cubin."""

from __future__ import annotations

import itertools
import json
import random
import re
import struct
import subprocess
import sys
from pathlib import Path

import ptxas_log
import pytest

from cuda_progcache.errors import InspectError
from cuda_progcache.inspect import Cubin, disassemble, find_tool, resource_usage, spills
from cuda_progcache.inspect.spilling import _marked

ARCHS = ("sm_75", "sm_80", "sm_90", "sm_100", "sm_120")

MIX = """
template <class T, int N> __device__ __forceinline__ T mix(const T *a, int n, T x) {
  T v[N];
  #pragma unroll
  for (int i = 0; i < N; ++i) v[i] = a[i * n + threadIdx.x];
  #pragma unroll
  for (int r = 0; r < 2; ++r)
    #pragma unroll
    for (int i = 0; i < N; ++i) v[i] = v[i] * v[(i * 7 + 1) % N] + v[(i + 3) % N];
  #pragma unroll
  for (int i = 0; i < N; ++i) x += v[i] * v[(i * 3) % N];
  return x;
}
"""

PRESSURE = (
    MIX
    + """
#define TIGHT __launch_bounds__(1024, 2)  // 32 registers a thread, from sm_80 on 64 on some
extern "C" __global__ void TIGHT singles(float *a, int n) { *a = mix<float, 70>(a, n, 1); }
extern "C" __global__ void TIGHT doubles(double *a, int n) { *a = mix<double, 50>(a, n, 1); }
extern "C" __global__ void TIGHT array(float *a, int n) {
  volatile float v[64];  // indexed at run time: local memory, which is no spill
  for (int i = 0; i < 64; ++i) v[i] = a[i * n];
  a[1] = v[n & 63];
}
extern "C" __global__ void plain(int *a) { *a = 1; }
__device__ __noinline__ float callee(const float *a, int n) { return mix<float, 80>(a, n, 2); }
extern "C" __global__ void TIGHT calling(float *a, int n) { *a = callee(a, n) + callee(a + 1, n); }
"""
)

CALLS = (
    MIX
    + """
typedef float (*function)(float, const float *, int);
__device__ __noinline__ float small(float x, const float *a, int n) { return mix<float, 4>(a, n, x); }
__device__ __noinline__ float large(float x, const float *a, int n) { return mix<float, 60>(a, n, x); }
__device__ __noinline__ float array(float x, const float *a, int n) {
  volatile float v[3];
  v[0] = x; v[1] = a[n]; v[2] = v[0] + v[1];
  return v[2] * v[0];
}
__device__ function table[3] = {small, large, array};
__device__ __noinline__ float itself(float x, const float *a, int n) {
  if (n < 2) return table[n](x, a, n);
  double d = x * 1.5;
  int w[10];
  for (int i = 0; i < 10; ++i) w[i] = n * i;
  float y = itself(x * 2, a, n - 1);
  if (n == 7) return y + d;
  return y + d * itself(x + a[n], a, n - 2) * w[n % 10];
}
extern "C" __global__ void pointer(float *a, int n) {
  float x = a[5], y = a[6];
  *a = table[n](x, a, n) + table[2](y, a, 3);
}
extern "C" __global__ void recursive(float *a, int n) { *a = itself(a[1], a, n); }
extern "C" __global__ void __launch_bounds__(1024, 2) all(float *a, int n) {
  *a = itself(a[1], a, n) + table[n](a[4], a, n) + large(a[2], a, n);
}
"""
)

VARIOUS = """
__constant__ int constants[100];
extern "C" __global__ void barriers(int *a) {
  extern __shared__ int dynamic[];
  dynamic[threadIdx.x] = constants[a[0]];
  asm volatile("bar.sync 3, 64;");
  asm volatile("bar.sync 5;");
  a[1] = dynamic[3];
}
extern "C" __global__ void literals(double *a) { *a = *a * 1.2345678901234567 + sin(a[2]); }
extern "C" __global__ void __launch_bounds__(96) bounded(int *a) { *a = 1; }
extern "C" __global__ void __launch_bounds__(1024) largest(int *a, int b, double c) { *a = b + c; }
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void __block_size__((128, 2, 1)) sized(int *a) { *a = 1; }
extern "C" __global__ void __cluster_dims__(2) clustered(int *a) {
  __shared__ int s[33];
  s[threadIdx.x & 31] = a[1];
  asm volatile("barrier.cluster.arrive; barrier.cluster.wait;");
  *a = s[3];
}
#endif
template <class T> __global__ void generic(T *a) { *a = 1; }
template __global__ void generic<float>(float *);
"""


def shared_kernels() -> str:
    """Return kernels with static shared memory of many sizes and alignments, with and without dynamic memory."""
    every = list(itertools.product((0, 1, 17, 1000, 1024, 20000), (1, 16, 128, 1024), (0, 16, 1024)))
    made = []
    for number, (size, alignment, dynamic) in enumerate(every):
        body = ""
        if size:
            body += f"__shared__ __align__({alignment}) char s[{size}]; s[n % {size}] = a[n]; __syncthreads();"
            body += f" a[0] += s[threadIdx.x % {size}];"
        if dynamic:
            body += f"extern __shared__ __align__({dynamic}) char d{number}[]; d{number}[threadIdx.x] = a[1];"
            body += f" __syncthreads(); a[2] += d{number}[n];"
        made.append(f'extern "C" __global__ void k{number}(char *a, int n) {{ {body} }}')
    return "\n".join(made)


SOURCES = {"pressure": PRESSURE, "calls": CALLS, "various": VARIOUS, "shared": shared_kernels()}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", SOURCES)
def test_every_figure_is_that_of_ptxas(compiled, name, arch):
    made = compiled(SOURCES[name], arch=arch, ptxas_options=["-v"])
    usage = made.resource_usage()
    wrong = ptxas_log.differences(usage, made.log)
    for kernel in ("recursive", "all"):  # ptxas gives only the frame; the cubin marks the stack as unknown
        assert wrong.get(kernel, {}).pop("stack_bytes", (None, 0))[0] is None
    assert not {kernel: differing for kernel, differing in wrong.items() if differing}
    assert made.record["resource_usage"] == usage
    if name == "pressure":
        assert all(usage[kernel]["spill_store_bytes"] > 0 for kernel in ("singles", "doubles", "calling"))
        assert (usage["array"]["spill_store_bytes"], usage["array"]["stack_bytes"]) == (0, 256)
    if name == "various":
        bounds = {kernel: used["max_threads"] for kernel, used in usage.items()}
        assert bounds["bounded"] == 96 and bounds["largest"] == 1024 and bounds["barriers"] is None
        assert bounds.get("sized", 256) == 256
        assert "_Z7genericIfEvPT_" in usage


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("name", ["various", "shared"])
def test_before_linking_too(compiled, name, arch):
    made = compiled(SOURCES[name], arch=arch, relocatable_device_code=True, ptxas_options=["-v"])
    assert not Cubin(made.data).linked
    assert not ptxas_log.differences(made.resource_usage(), made.log, linked=False)


def test_spills_to_shared_memory_are_listed_and_not_counted(compiled):
    tight = 'extern "C" __global__ void __launch_bounds__(512, 4) k(float *a, int n) {'
    tight += 'asm volatile(".pragma \\"enable_smem_spilling\\";"); *a = mix<float, 60>(a, n, 1); }'
    made = compiled(MIX + tight, arch="sm_90", ptxas_options=["-v"])
    assert not ptxas_log.differences(made.resource_usage(), made.log)
    cubin = Cubin(made.data)
    found = spills(cubin, cubin.kernels()[0])
    assert {spill.memory for spill in found} == {"local", "shared"}
    assert {spill.is_store for spill in found if spill.memory == "shared"} == {True, False}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_spills_are_those_that_nvdisasm_marks(compiled, arch):
    data = compiled(PRESSURE, arch=arch).data
    cubin = Cubin(data)
    ours, theirs = set(), set()
    for kernel in cubin.kernels():
        for spill in spills(cubin, kernel):
            ours.add((kernel.name, spill.offset, spill.is_store, spill.size))
    for function in json.loads(disassemble(data, "-json", "-annotate"))[1]:
        name = function["function-name"]
        for number, instruction in enumerate(function["sass-instructions"]):
            if any(note["info"] == "SpillRefill" for note in instruction.get("annotations", ())):
                opcode, *modifiers = instruction["opcode"].split(".")
                size = next((int(m) // 8 for m in modifiers if m.isdigit()), 4)
                theirs.add((name, function["start"] + 16 * number, opcode == "STL", size))
    assert ours == theirs and len(ours) > 500
    calling = next(kernel for kernel in cubin.kernels() if kernel.name == "calling")
    assert {spill.function for spill in spills(cubin, calling)} == {"calling", "_Z6calleePKfi"}


def test_notes_of_other_kinds_are_passed_over():
    words = struct.pack
    spill, about_code = words("<II", 1, 0x40), words("<III5s3x", 2, 0x50, 5, b"hello")
    about_function = words("<II4s", 3, 4, b"text")
    for order in itertools.permutations((spill, about_code, about_function, words("<II", 1, 0x90))):
        assert sorted(_marked(b"".join(order))) == [0x40, 0x90]
    with pytest.raises(ValueError, match="kind 9"):
        _marked(spill + words("<II", 9, 0))


def patched(data: bytes, number: int, change) -> bytes:
    """Return a copy of a cubin after ``change(buffer, offset)`` for each attribute with that number."""
    made, cubin = bytearray(data), Cubin(data)
    for section in cubin.sections.values():
        if section.name.startswith(".nv.info."):
            at = section.offset
            while at < section.offset + section.size:
                form, found, size = struct.unpack_from("<BBH", data, at)
                if found == number:
                    change(made, at)
                at += 4 + (size if form == 4 else 0)
    return bytes(made)


def test_unmarked_spills_are_unknown_and_not_zero(compiled):
    """Spills are unknown, not zero, for a cubin like CUDA 12.5's: without notes, and of a version that wrote none."""

    def unmark(made, at):
        made[at + 1] = 0x56

    def older(made, at):
        struct.pack_into("<I", made, at + 4, 125)

    data = compiled(PRESSURE).data
    usage = resource_usage(patched(patched(data, 0x55, unmark), 0x37, older))
    told = {name: (used.spill_store_bytes, used.spill_load_bytes) for name, used in usage.items()}
    assert told["singles"] == told["calling"] == told["array"] == (None, None)
    assert told["plain"] == (0, 0), "no local memory, so nothing is spilled"
    before = resource_usage(data)
    assert all(used.registers == before[name].registers for name, used in usage.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_resource_usage_is_what_cuobjdump_prints(tmp_path, compiled, arch):
    made = compiled(PRESSURE + CALLS.removeprefix(MIX).replace("array", "other"), arch=arch)
    file = tmp_path / "program.cubin"
    file.write_bytes(made.data)
    done = subprocess.run(
        [find_tool("cuobjdump"), "--dump-resource-usage", str(file)], capture_output=True, text=True, check=True
    )
    functions = dict(re.findall(r"Function (\S+):\s*\n\s*(REG.*)", done.stdout))
    usage = made.resource_usage()
    assert set(usage) == {"singles", "doubles", "array", "plain", "calling", "pointer", "recursive", "all"}
    for name, used in usage.items():
        theirs = {key: int(value) for key, value in re.findall(r"([A-Z]+(?:\[\d\])?):(\d+)", functions[name])}
        assert used["registers"] == theirs["REG"]
        assert used["stack_bytes"] == theirs.get("STACK"), "cuobjdump says STACK:UNKNOWN of a recursive one"
        assert used["local_bytes"] == theirs["LOCAL"]
        assert used["constant_bytes"] == theirs["CONSTANT[0]"]
        assert used["literal_bytes"] == theirs.get("CONSTANT[2]", 0)
        assert used["shared_bytes"] == max(theirs["SHARED"] - (1024 if int(arch[3:]) >= 90 else 0), 0)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "it is empty"),
        (b"text", "4 bytes starting b'text'"),
        (b"\x7fELF\x02\x01", "corrupt"),
        (b"\x7fELF\x02\x01" + b"\xff" * 100, "machine 65535"),
        (b"\x7fELF\x01\x01" + b"\0" * 100, "not a 64-bit"),
        (b"BC\xc0\xde" + b"\0" * 100, "NVVM bitcode; compile it"),
        (b"\x50\xed\x55\xba" + b"\0" * 100, "a fatbin; extract"),
    ],
)
def test_what_is_no_cubin(data, words):
    for read in (resource_usage, Cubin):
        with pytest.raises(InspectError, match="cubin") as caught:
            read(data)
        assert words in str(caught.value)


def test_a_program_of_the_host_is_no_cubin():
    with pytest.raises(InspectError, match="not a cubin: an ELF file for machine"):
        resource_usage(Path(sys.executable).resolve().read_bytes())


@pytest.mark.parametrize(("target_type", "words"), [("ptx", "PTX, which is text"), ("ltoir", "LTO-IR; link it")])
def test_other_targets_are_refused_by_name(compiled, target_type, words):
    made = compiled(target_type=target_type)
    for read in (made.resource_usage, made.sass):
        with pytest.raises(InspectError, match=f"not a cubin: this is {words}"):
            read()


def test_a_damaged_cubin_is_an_error_and_no_crash(compiled):
    data = compiled(PRESSURE).data
    chance = random.Random(0)
    tables = [Cubin(data).sections[name] for name in (".nv.info", ".nv.info.singles", ".symtab", ".text.singles")]
    places = [chance.randrange(section.offset, section.offset + section.size) for section in tables for _ in range(40)]
    places += [*range(64), *range(0, len(data), 997)]
    refused = 0
    for at in places:
        garbage = chance.randbytes(8)
        for bad in (data[:at], data[:at] + garbage + data[at + 8 :]):
            try:
                resource_usage(bad)
            except InspectError:
                refused += 1
    assert refused > len(places), "what is cut off is missed"

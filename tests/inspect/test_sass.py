# SPDX-License-Identifier: Apache-2.0
"""cuobjdump and nvdisasm over binaries and over entries as they lie."""

from __future__ import annotations

import re
import subprocess

import pytest

from cuda_progcache.compile import inspect
from cuda_progcache.compile.cubin import resource_usage
from cuda_progcache.errors import InspectError

SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) k(float *a, int n) {
  __shared__ float tile[256];
  volatile float v[64];  // indexed at run time: it can't be in registers
  for (int i = 0; i < 64; ++i) v[i] = a[i * n + threadIdx.x];
  tile[threadIdx.x & 255] = v[n & 63];
  __syncthreads();
  a[threadIdx.x] = tile[255 - (threadIdx.x & 255)] + v[(n + 1) & 63];
}
extern "C" __global__ void second(int *a) { *a = 1; }
"""


RECURSIVE = """
__constant__ int table[100];
__device__ __noinline__ int f(int n, int *a) {
  int v[8];
  for (int i = 0; i < 8; ++i) v[i] = a[n * i];
  return n < 2 ? v[n & 7] : f(n - 1, a) + v[a[0] & 7];
}
extern "C" __global__ void third(int *a) {
  extern __shared__ int s[];
  s[0] = table[*a];
  *a = f(*a, a) + s[0];
}
"""


def test_resource_usage(compiled):
    usage = compiled(SPILLS).resource_usage()
    assert set(usage) == {"k", "second"}
    assert usage["k"]["shared_bytes"] == 1024
    assert usage["k"]["stack_bytes"] >= 256
    assert usage["second"]["stack_bytes"] == usage["second"]["shared_bytes"] == 0
    assert 0 < usage["second"]["registers"] <= 32
    assert usage["k"]["constant_bytes"] > 0


def test_sass(compiled):
    assert "EXIT" in compiled().sass()


def test_an_entry_can_be_opened_as_it_lies(cache, compiled):
    path = cache.info(compiled().digest).path
    assert "/entries/" in str(path)
    for tool, arguments, words in (
        ("cuobjdump", ["--dump-resource-usage"], "Function k"),
        ("cuobjdump", ["-sass"], "EXIT"),
        ("nvdisasm", [], ".text.k"),
    ):
        done = subprocess.run(
            [inspect.find_tool(tool), *arguments, str(path)], capture_output=True, text=True, check=True
        )
        assert words in done.stdout


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
def test_resource_usage_is_what_cuobjdump_prints(cache, compiled, arch):
    made = compiled(SPILLS + RECURSIVE, arch=arch)
    path = cache.info(made.digest).path
    done = subprocess.run(
        [inspect.find_tool("cuobjdump"), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    )
    functions = re.findall(r"Function (\S+):\s*\n\s*(REG.*)", done.stdout)
    usage = made.resource_usage()
    assert set(usage) <= {name for name, _ in functions}
    for name, line in functions:
        theirs = {key: int(value) for key, value in re.findall(r"([A-Z]+(?:\[0\])?):(\d+)", line)}
        if name in usage:  # with recursion cuobjdump says STACK:UNKNOWN
            assert usage[name] == {
                "registers": theirs["REG"],
                "stack_bytes": theirs.get("STACK", usage[name]["stack_bytes"]),
                "shared_bytes": theirs["SHARED"],
                "local_bytes": theirs["LOCAL"],
                "constant_bytes": theirs["CONSTANT[0]"],
            }, name
    assert {"k", "second", "third"} <= set(usage)
    assert made.record["resource_usage"] == usage


@pytest.mark.parametrize("damage", [b"", b"text", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 100])
def test_what_is_no_cubin(damage):
    with pytest.raises(InspectError, match="cubin"):
        resource_usage(damage)


def test_a_damaged_cubin_is_an_error_and_no_crash(compiled):
    data = compiled(SPILLS).data
    for cut in range(0, len(data), 97):
        for bad in (data[:cut], data[:cut] + b"\xff" * 8 + data[cut + 8 :]):
            try:
                resource_usage(bad)
            except InspectError:
                continue


@pytest.mark.parametrize(("target_type", "words"), [("ptx", "text: print it"), ("ltoir", "link it to a cubin first")])
def test_what_the_tools_cannot_read(compiled, target_type, words):
    made = compiled(target_type=target_type)
    with pytest.raises(InspectError, match=words):
        made.sass()
    with pytest.raises(InspectError, match="not a cubin"):
        made.resource_usage()


def test_a_file_that_is_no_cubin():
    with pytest.raises(InspectError, match="nvdisasm failed"):
        inspect.sass(b"nonsense", "cubin")


def test_a_missing_tool_names_its_wheel(monkeypatch, compiled):
    import cuda.pathfinder

    monkeypatch.setattr(cuda.pathfinder, "find_nvidia_binary_utility", lambda name: None)
    monkeypatch.setenv("PATH", "")
    inspect.find_tool.cache_clear()
    try:
        with pytest.raises(InspectError, match="pip install nvidia-cuda-nvdisasm"):
            compiled().sass()
    finally:
        inspect.find_tool.cache_clear()

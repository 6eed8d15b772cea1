# SPDX-License-Identifier: Apache-2.0
"""The driver's linker in nvJitLink's place. Instead of a driver a stand-in answers, and its calls are read."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from cuda.bindings import driver

from cuda_progcache import CompileError, LinkerOptions, Program, ProgramOptions, link
from cuda_progcache.compile import driver_linker
from cuda_progcache.errors import OptionError, ToolchainError
from cuda_progcache.keys import toolchain

PTX = (
    Program('extern "C" __global__ void k(int *a) { *a = 1; }', "c++", {"arch": "sm_80"}).compiled("ptx").data.decode()
)
CUBIN = b"\x7fELF what the driver made"
OK, FAILED = driver.CUresult.CUDA_SUCCESS, driver.CUresult.CUDA_ERROR_INVALID_PTX


class StandIn:
    """Answers as cuda.bindings.driver does; with its types."""

    def __init__(self, *, context=0, link_status=OK, init_status=OK):
        for name in ("CUresult", "CUjit_option", "CUjit_target", "CUjit_cacheMode", "CUjitInputType"):
            setattr(self, name, getattr(driver, name))
        self.calls = []
        self.options = {}
        self._context = context
        self._statuses = {"cuInit": init_status, "cuLinkComplete": link_status}
        self._cubin = ctypes.create_string_buffer(CUBIN, len(CUBIN))
        self._answers = {
            "cuCtxGetCurrent": (context,),
            "cuDeviceGet": (0,),
            "cuDevicePrimaryCtxRetain": ("primary",),
            "cuLinkCreate": ("state",),
            "cuLinkComplete": (ctypes.addressof(self._cubin), len(CUBIN)),
        }

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append(name)
            if name == "cuLinkCreate":
                self.options = {option.name: value for option, value in zip(*arguments[1:], strict=True)}
            elif name == "cuLinkAddData":
                self.added = arguments
            elif name == "cuLinkComplete" and self._statuses[name] is not OK:
                self.options["CU_JIT_ERROR_LOG_BUFFER"][:9] = b"bad line\n"
            return (self._statuses.get(name, OK), *self._answers.get(name, ()))

        return call


@pytest.fixture
def without_nvjitlink(monkeypatch, tmp_path):
    """nvJitLink isn't installed; returns a function that installs a driver."""

    def missing(name):
        if name == "nvJitLink":
            raise ToolchainError(
                "the compiler library nvJitLink was not found: install it with `pip install nvidia-nvjitlink`"
            )
        return original(name)

    original = toolchain.locate
    monkeypatch.setattr(toolchain, "locate", missing)
    monkeypatch.setattr(toolchain, "_known", {})
    monkeypatch.setattr(toolchain, "_absent", {})
    located = {name: path for name, path in toolchain._located.items() if name != "nvJitLink"}
    monkeypatch.setattr(toolchain, "_located", located)
    monkeypatch.setattr(toolchain, "_driver", lambda: None)

    def install(**given):
        for name in ("libcuda.so.1", "libnvidia-ptxjitcompiler.so.1"):
            (tmp_path / name).write_text(f"{name} 580")
        stand_in = StandIn(**given)
        monkeypatch.setattr(toolchain, "_driver", lambda: str(tmp_path / "libcuda.so.1"))
        monkeypatch.setattr(driver_linker, "_bindings", lambda: stand_in)
        return stand_in

    install.folder = tmp_path
    return install


def compile_ptx(cache=None, **options):
    return Program(PTX, "ptx", ProgramOptions(**{"arch": "sm_90"} | options)).compiled("cubin", cache=cache)


def test_neither(without_nvjitlink):
    with pytest.raises(ToolchainError, match=r"pip install nvidia-nvjitlink.*no CUDA driver either"):
        compile_ptx()


def test_linked_by_the_driver(without_nvjitlink):
    stand_in = without_nvjitlink()
    made = compile_ptx(max_register_count=32, lineinfo=True, debug=True, no_cache=True, ftz=True, name="k.ptx")
    assert made.data == CUBIN
    del stand_in.options["CU_JIT_INFO_LOG_BUFFER"], stand_in.options["CU_JIT_ERROR_LOG_BUFFER"]
    assert stand_in.options == {
        "CU_JIT_TARGET": driver.CUjit_target.CU_TARGET_COMPUTE_90,
        "CU_JIT_MAX_REGISTERS": 32,
        "CU_JIT_GENERATE_LINE_INFO": 1,
        "CU_JIT_GENERATE_DEBUG_INFO": 1,
        "CU_JIT_CACHE_MODE": driver.CUjit_cacheMode.CU_JIT_CACHE_OPTION_NONE,
        "CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES": 65536,
        "CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES": 65536,
    }
    ptx = PTX.rstrip("\0").encode() + b"\0"
    assert stand_in.added[1:5] == (driver.CUjitInputType.CU_JIT_INPUT_PTX, ptx, len(ptx), b"k.ptx")
    assert stand_in.calls == [
        "cuInit", "cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent",
        "cuLinkCreate", "cuLinkAddData", "cuLinkComplete", "cuLinkDestroy",
        "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease",
    ]  # fmt: skip


def test_in_the_callers_context(without_nvjitlink):
    stand_in = without_nvjitlink(context=7)
    compile_ptx()
    assert stand_in.calls == [
        "cuInit", "cuCtxGetCurrent", "cuLinkCreate", "cuLinkAddData", "cuLinkComplete", "cuLinkDestroy",
    ]  # fmt: skip


def test_the_driver_is_in_the_key(without_nvjitlink, cache, monkeypatch):
    stand_in = without_nvjitlink()
    first = compile_ptx(cache)
    assert [tool["name"] for tool in first.record["toolchain"]] == ["driver", "driver's PTX compiler"]
    assert compile_ptx(cache).hit
    assert stand_in.calls.count("cuLinkComplete") == 1
    (without_nvjitlink.folder / "libnvidia-ptxjitcompiler.so.1").write_text("another build")
    monkeypatch.setattr(toolchain, "_known", {})  # as in the next process
    assert not compile_ptx(cache).hit


def test_and_nowhere_else(cache):
    for made in (compile_ptx(cache), Program("", "c++", {"arch": "sm_80"}).compiled("cubin", cache=cache)):
        assert not any("driver" in tool["name"] for tool in made.record["toolchain"])


def test_refused(without_nvjitlink):
    stand_in = without_nvjitlink(link_status=FAILED)
    with pytest.raises(CompileError, match=r"ptx -> cubin failed \(CUDA_ERROR_INVALID_PTX\)") as caught:
        compile_ptx()
    assert caught.value.log == "bad line\n"
    assert stand_in.calls[-3:] == ["cuLinkDestroy", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]


def test_no_device(without_nvjitlink):
    without_nvjitlink(init_status=driver.CUresult.CUDA_ERROR_NO_DEVICE)
    with pytest.raises(ToolchainError, match=r"no CUDA device.*CUDA_ERROR_NO_DEVICE.*nvidia-nvjitlink"):
        compile_ptx()


@pytest.mark.parametrize(
    ("inputs", "options", "target_type", "words"),
    [
        ([(b"x", "ltoir")], {}, "cubin", "doesn't accept ltoir"),
        ([(b"x", "cubin")], {}, "ptx", "makes only cubins"),
        ([(b"x", "cubin")], {"ptxas_options": "-v"}, "cubin", "doesn't support -Xptxas=-v"),
        ([(b"x", "cubin")], {"time": True}, "cubin", "doesn't support -time"),
    ],
)
def test_what_only_nvjitlink_does(without_nvjitlink, inputs, options, target_type, words):
    without_nvjitlink()
    with pytest.raises(OptionError, match=f"{words}.*nvidia-nvjitlink"):
        link(inputs, LinkerOptions(arch="sm_90", **options), target_type)


def test_optimization_level_and_architecture_with_a_letter(without_nvjitlink):
    stand_in = without_nvjitlink()
    link([(b"x", "cubin"), (b"y", "ptx")], LinkerOptions(arch="sm_90a", optimization_level=2, verbose=True))
    assert stand_in.options["CU_JIT_TARGET"] is driver.CUjit_target.CU_TARGET_COMPUTE_90A
    assert (stand_in.options["CU_JIT_OPTIMIZATION_LEVEL"], stand_in.options["CU_JIT_LOG_VERBOSE"]) == (2, 1)
    assert stand_in.calls.count("cuLinkAddData") == 2


def test_where_the_driver_lies(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    monkeypatch.setattr(toolchain, "_mappings", lambda: ["/usr/lib/libc.so.6", "/usr/lib/libcuda.so.580.1"])
    assert toolchain._driver() == "/usr/lib/libcuda.so.580.1"


def test_no_driver_here_or_one_that_is_mapped():
    path = toolchain._driver()
    assert path is None or "libcuda" in path


REAL_CALLS = """
from cuda_progcache.compile.output import CompilerRefusal
from cuda_progcache.compile.driver_linker import link_by_driver
from cuda_progcache.compile.output import LinkerInput
inputs = [LinkerInput(b".version 8.0", "ptx", "k.ptx"), LinkerInput(b"\\x7fELF", "cubin", "more")]
flags = ["-arch=sm_90a", "-maxrregcount=32", "-O3", "-g", "-lineinfo", "-verbose", "-no-cache", "-ftz=1"]
try:
    print(link_by_driver(inputs, flags=flags, target_type="cubin")[:2], flush=True)
except CompilerRefusal as refusal:
    print((refusal.status, refusal.log), flush=True)
"""


@pytest.mark.skipif(
    shutil.which("cc") is None or sys.platform != "linux", reason="the stand-in is compiled C, for Linux"
)
@pytest.mark.parametrize("refuse", [False, True])
def test_what_the_driver_itself_is_handed(tmp_path, refuse):
    """Through cuda.bindings, to a library that writes it down: values in pointers, buffers, and how long they last."""
    library = tmp_path / "libcuda.so.1"
    source = os.path.join(os.path.dirname(__file__), "libcuda.c")
    subprocess.run(["cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)} | ({"REFUSE": "1"} if refuse else {})
    done = subprocess.run(
        [sys.executable, "-c", REAL_CALLS], env=environment, capture_output=True, text=True, check=True
    )
    made = ("CUDA_ERROR_INVALID_PTX", "line 7 isn't PTX") if refuse else (b"\x7fELF linked", "all is well")
    option = driver.CUjit_option
    assert done.stdout.splitlines() == [
        "cuInit",
        "push 0x77",
        f"option {int(option.CU_JIT_TARGET)} = {int(driver.CUjit_target.CU_TARGET_COMPUTE_90A)}",
        f"option {int(option.CU_JIT_MAX_REGISTERS)} = 32",
        f"option {int(option.CU_JIT_OPTIMIZATION_LEVEL)} = 3",
        f"option {int(option.CU_JIT_GENERATE_DEBUG_INFO)} = 1",
        f"option {int(option.CU_JIT_GENERATE_LINE_INFO)} = 1",
        f"option {int(option.CU_JIT_LOG_VERBOSE)} = 1",
        f"option {int(option.CU_JIT_CACHE_MODE)} = 0",
        f"option {int(option.CU_JIT_INFO_LOG_BUFFER_SIZE_BYTES)} = 65536",
        f"option {int(option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES)} = 65536",
        "add 0x99 kind 1, 13 bytes, the last 0, k.ptx, 0 options",
        "add 0x99 kind 0, 4 bytes, the last 70, more, 0 options",
        "destroy 0x99",
        "pop",
        "release",
        repr(made),
    ]

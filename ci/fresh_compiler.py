# SPDX-License-Identifier: Apache-2.0
"""Compilers in new processes with a known history, for the tools in ci that examine a toolchain.

A toolchain is given by its files, so any build can be examined, installed or not.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import marshal
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_progcache.compile.nvrtc import Nvrtc
from cuda_progcache.errors import ToolchainError
from cuda_progcache.keys import toolchain

_ROOT = Path(__file__).resolve().parent.parent
_CHILD = """
import marshal, os, sys
sys.path.append(sys.argv[1])
answers = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
from cuda_progcache.compile.compiler_process import perform
for job in marshal.load(sys.stdin.buffer):
    marshal.dump(perform(job), answers)
    answers.flush()
os._exit(0)
"""

# The working directory of all processes, since some outputs contain it; precompiled headers are left there.
_folder = tempfile.mkdtemp(prefix="progcache-")
atexit.register(shutil.rmtree, _folder, ignore_errors=True)

Job = dict[str, Any]
Answer = dict[str, Any]


def run(jobs: Sequence[Job], environment: Mapping[str, str] | None = None) -> list[Answer]:
    """Run jobs in a new process, one after the other.

    Parameters
    ----------
    jobs : sequence of dict
        Jobs for :func:`cuda_progcache.compile.compiler_process.perform`.
    environment : mapping, optional
        The environment variables of the process; it gets no others except ``LD_LIBRARY_PATH``.

    Returns
    -------
    list of dict
        An answer per job; if the process died, only the answers before that.
    """
    given = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    command = [sys.executable, "-I", "-S", "-c", _CHILD, str(_ROOT)]
    done = subprocess.run(
        command,
        input=marshal.dumps(list(jobs)),
        capture_output=True,
        check=False,
        env=given | dict(environment or {}),
        cwd=_folder,
    )
    found, answers = [], io.BytesIO(done.stdout)
    with contextlib.suppress(EOFError):
        while True:
            found.append(marshal.load(answers))  # noqa: S302 - written by our own child process
    return found


def run_each(
    sequences: Sequence[Sequence[Job]], environments: Sequence[Mapping[str, str]] | None = None
) -> list[list[Answer]]:
    """Run several sequences of jobs in parallel, each like :func:`run`."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(run, sequences, environments or [{}] * len(sequences)))


def outcome(answer: Answer) -> tuple[object, ...]:
    """Return the part of an answer that the user sees: the bytes and the log, or the error."""
    if "made" in answer:
        return ("made", answer["made"]["data"], answer["made"]["log"])
    return ("refused", *answer["refused"][:2]) if "refused" in answer else ("trouble", answer["trouble"])


@dataclass(frozen=True)
class Toolchain:
    """The libraries of one release; None for a missing library."""

    nvrtc: str
    nvjitlink: str | None
    nvvm: str | None

    @classmethod
    def here(cls) -> Toolchain:
        """Return the toolchain that compiles this environment's programs."""

        def find(name: str) -> str | None:
            try:
                return toolchain.locate(name)
            except ToolchainError:
                return None

        return cls(toolchain.locate("nvrtc"), find("nvJitLink"), find("nvvm"))

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """Add arguments for the files of a toolchain; the defaults are those of :meth:`here`."""
        here = Toolchain.here()
        parser.add_argument("--nvrtc", default=here.nvrtc, help="path of a libnvrtc")
        parser.add_argument("--nvjitlink", default=here.nvjitlink, help="path of a libnvJitLink, or empty")
        parser.add_argument("--nvvm", default=here.nvvm, help="path of a libnvvm, or empty")

    @classmethod
    def given(cls, arguments: argparse.Namespace) -> Toolchain:
        """Return the toolchain given on the command line."""
        nvrtc, *others = (
            os.path.abspath(path) if path else None for path in (arguments.nvrtc, arguments.nvjitlink, arguments.nvvm)
        )
        assert nvrtc is not None
        return cls(nvrtc, *others)

    def __str__(self) -> str:
        return f"NVRTC {self.version}: " + ", ".join(f"{name} {build}" for name, build in self.builds.items())

    @property
    def paths(self) -> dict[str, str]:
        """The paths of the available libraries, by name."""
        paths = {"nvrtc": self.nvrtc, "nvJitLink": self.nvjitlink, "nvvm": self.nvvm}
        return {name: path for name, path in paths.items() if path is not None}

    @property
    def archs(self) -> list[int]:
        """The architectures that NVRTC supports."""
        (answer,) = run([self._job("archs", {})])
        return list(answer["made"])

    @property
    def builds(self) -> dict[str, str]:
        """The identity of each library's file, by the library's name."""
        return {name: toolchain.identity(path) for name, path in self.paths.items()}

    @property
    def version(self) -> str:
        """The version number of NVRTC."""
        return ".".join(map(str, Nvrtc(self.nvrtc).version()))

    def compile(self, source: str, target_type: str, arch: str, *flags: str) -> Job:
        """Return a job for NVRTC."""
        lto = ["--dlink-time-opt"] if target_type == "ltoir" and "--dlink-time-opt" not in flags else []
        seed = [] if any(flag.startswith("--frandom-seed") for flag in flags) else ["--frandom-seed=1"]
        given = {
            "code": source.encode(),
            "name": b"k.cu",
            "flags": [flag.encode() for flag in (f"-arch={arch}", *lto, *seed, *flags)],
            "target_type": target_type,
        }
        return self._job("nvrtc", given)

    def link(self, data: bytes, kind: str, target_type: str, arch: str, *flags: str) -> Job:
        """Return a job for nvJitLink."""
        more = (("-lto",) if kind == "ltoir" else ()) + (("-ptx",) if target_type == "ptx" else ())
        flags = (f"-arch={arch}", *more, *flags)
        given = {"inputs": [(data, kind, "k")], "flags": list(flags), "target_type": target_type}
        return self._job("nvJitLink", given)

    def compile_ir(self, source: str, target_type: str, arch: str, *flags: str) -> Job:
        """Return a job for libNVVM."""
        flags = (f"-arch={arch.replace('sm_', 'compute_')}", *(("-gen-lto",) if target_type == "ltoir" else ()), *flags)
        given = {"modules": [("k", source.encode())], "flags": list(flags), "libdevice": None}
        return self._job("nvvm", given)

    def _job(self, call: str, given: dict[str, Any]) -> Job:
        library = {"nvJitLink": self.nvjitlink, "nvvm": self.nvvm}.get(call, self.nvrtc)
        beside = list(toolchain.builtins_beside(self.nvrtc)) if library == self.nvrtc else []
        return {"call": call, "library": library, "beside": beside, "given": given}


#: Kernels whose output changes with one more or one fewer optimization, check or warning.
KERNELS = {
    "aliases": 'extern "C" __global__ void k(int *a, const int *b) { a[0] = b[0] + 1; a[1] = b[0] * 2; }',
    "by_value": "struct S { float v[31]; int pad; float *p; };\n"
    'extern "C" __global__ void k(S s, float *o) { o[threadIdx.x] = s.p[threadIdx.x] + s.v[threadIdx.x & 15]; }',
    "floats": 'extern "C" __global__ void k(float *a, float b) { a[0] = sqrtf(a[1]) / b + a[2] * b + sinf(a[3]); }',
    "doubles": 'extern "C" __global__ void k(double *a, int n) {\n'
    "for (int i = 0; i < n; ++i) a[i] = a[i] / 3 + exp(a[i]); }",
    "loop": 'extern "C" __global__ void k(float *a, const float *b, int n) {\n'
    "#pragma unroll 4\nfor (int i = threadIdx.x; i < n; i += 32) a[i] += b[i] * b[i + 1]; }",
    "calls": "__device__ __noinline__ int f(int x, int n) { int s = 0;\n"
    "for (int i = 0; i < n; ++i) s += x ^ i; return s; }\n"
    "__device__ int twice(int x) { return f(x, 3) * 2; }\n"
    'extern "C" __global__ void k(int *a, int n) { a[threadIdx.x] = f(a[0], n) + twice(n); }',
    "shared": 'extern "C" __global__ void k(float *a) { __shared__ float s[64]; s[threadIdx.x] = a[threadIdx.x]; '
    "__syncthreads(); a[threadIdx.x] = s[63 - threadIdx.x]; }",
    "warns": 'extern "C" __global__ void k(int *a) { int unused; int x = 3.7; a[0] = x; a[1] = clock(); }',
    "spills": 'extern "C" __global__ void __launch_bounds__(1024, 2) k(float *a) { float v[48];\n'
    "#pragma unroll\nfor (int i = 0; i < 48; ++i) v[i] = a[i * 64 + threadIdx.x];\n"
    "#pragma unroll\nfor (int i = 0; i < 48; ++i) a[i] = v[(i * 5) % 48] * v[i] + v[47 - i]; }",
    "generic": "namespace { template <class T> __device__ __noinline__ T twice(T x) { return x + x; } }\n"
    'extern "C" __global__ void k(float *a, int *b) { a[0] = twice(a[1]); b[0] = twice(b[1]); }',
}

_IR = """target triple = "nvptx64-nvidia-cuda"
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64\
-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
declare float @llvm.nvvm.sqrt.f(float)
define void @k(float* %p, i32 %n) {
BODY
  ret void
}
!nvvm.annotations = !{!0}
!0 = !{void (float*, i32)* @k, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0}
"""
IR_KERNELS = {
    "floats": _IR.replace(
        "BODY",
        "  %l = load float, float* %p\n  %m = fmul float %l, %l\n  %y = fadd float %m, %l\n  %d = fdiv float %y, %l\n"
        "  %s = call float @llvm.nvvm.sqrt.f(float %d)\n  store float %s, float* %p",
    ),
    "branch": _IR.replace(
        "BODY",
        "entry:\n  %c = icmp sgt i32 %n, 4\n  br i1 %c, label %a, label %b\na:\n  store float 1.0, float* %p\n"
        "  br label %b\nb:",
    ),
}

# SPDX-License-Identifier: Apache-2.0
"""What surrounds a compile and reaches its output: variables, the working directory's name, the compiler's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from cuda_progcache import LinkerOptions, Program, ProgramOptions, link
from cuda_progcache.keys import toolchain

NVVM = """
target triple = "nvptx64-nvidia-cuda"
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64\
-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
define void @k(float* %p) {
  %l = load float, float* %p
  %y = fadd float %l, %l
  store float %y, float* %p
  ret void
}
!nvvm.annotations = !{!0}
!0 = !{void (float*)* @k, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0}
"""
COMPILE = """
import json, os, sys
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions, subscribe
given = json.loads(sys.argv[1])
why = []
subscribe(lambda event: why.extend(event.reasons) if event.kind == "miss" else None)
options = ProgramOptions(arch="sm_80", name="k.cu", **given.get("options", {}))
program = Program(given["source"], given["code_type"], options)
cache = FileStreamProgramCache(given["cache"], durability="none")
made, fresh = (program.compiled(given["target_type"], cache=store) for store in (cache, None))
print(json.dumps([made.hit, made.data == fresh.data, made.reason, why]))
"""
CPP = 'extern "C" __global__ void k(float *a, const float *b) { a[0] = b[0] + 1; }'


@pytest.fixture
def elsewhere(tmp_path):
    """Compile through the cache in a process with these variables: ``(hit, right, reason, why missed)``."""

    def run(variables, source=CPP, code_type="c++", target_type="ptx", cwd=None, **options):
        given = {
            "source": source,
            "code_type": code_type,
            "target_type": target_type,
            "cache": str(tmp_path / "cache"),
            "options": options,
        }
        plain = {name: value for name, value in os.environ.items() if name not in {"PWD", *toolchain._VARIABLES}}
        done = subprocess.run(
            [sys.executable, "-c", COMPILE, json.dumps(given)],
            env=plain | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.mark.parametrize(
    ("name", "value", "case"),
    [
        ("NV_NVVM_VERSION", "nvvm-latest", {}),
        ("NV_NVVM_VERSION", "nvvm-latest", {"target_type": "cubin"}),
        ("LIBNVVM_NVVM_VERSION", "nvvm-latest", {"source": NVVM, "code_type": "nvvm"}),
        ("LLVM_OVERRIDE_PRODUCER", "somebody", {"target_type": "ltoir"}),
        ("NVVM_IR_VER_CHK", "0", {"source": NVVM, "code_type": "nvvm"}),
    ],
)
def test_variables_that_compilers_read_are_in_the_key(elsewhere, name, value, case):
    assert elsewhere({}, **case) == [False, True, None, ["first compile of this program"]]
    assert elsewhere({name: value}, **case) == [False, True, None, [f"environment unset → {name}={value}"]]
    assert elsewhere({name: value}, **case)[:2] == [True, True]
    assert elsewhere({}, **case)[:2] == [True, True]


def test_variables_are_in_the_key_of_a_link(cache, monkeypatch):
    part = Program(CPP, "c++", ProgramOptions(arch="sm_80")).compiled("ltoir")
    options = LinkerOptions(arch="sm_80")
    link([part], options, cache=cache)
    assert link([part], options, cache=cache).hit
    monkeypatch.setenv("LLVM_OVERRIDE_PRODUCER", "somebody")
    assert not link([part], options, cache=cache).hit


def test_a_variable_that_is_changed_after_the_compiler_was_loaded(compiled, cache, monkeypatch):
    """NVRTC has read it by then: what it makes must not be kept for those that start with it."""
    assert compiled().reason is None
    monkeypatch.setenv("NV_NVVM_VERSION", "nvvm-latest")
    made = compiled()
    assert (made.hit, made.digest) == (False, None)
    assert made.reason == "the environment has other settings for nvrtc than when this process loaded it"
    assert len(cache) == 1


@pytest.mark.parametrize(
    "case", [{"lineinfo": True}, {"debug": True, "target_type": "cubin"}, {"target_type": "ltoir"}]
)
def test_the_working_directory_through_a_link(elsewhere, tmp_path, case):
    """NVRTC writes the name that $PWD gives it, and two names of one directory make two binaries."""
    real, other = tmp_path / "real", tmp_path / "other"
    real.mkdir()
    other.symlink_to(real)
    assert elsewhere({}, cwd=real, **case)[:2] == [False, True]
    assert elsewhere({"PWD": str(real)}, cwd=real, **case)[:2] == [True, True]
    said = "the working directory has another name ($PWD), which reaches the output"
    assert elsewhere({"PWD": str(other)}, cwd=other, **case) == [False, True, None, [said]]
    assert elsewhere({"PWD": str(tmp_path)}, cwd=real, **case)[:2] == [True, True], (
        "of another directory: not looked at"
    )


def test_the_name_of_the_working_directory_is_not_in_other_keys(elsewhere, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(tmp_path)
    assert elsewhere({}, cwd=tmp_path)[:2] == [False, True]
    assert elsewhere({"PWD": str(other)}, cwd=other)[:2] == [True, True]


REPLACED = """
import ctypes, os, shutil, sys
from cuda_progcache import FileStreamProgramCache, LinkerOptions, Program, ProgramOptions, link
from cuda_progcache.keys import toolchain
name, folder = sys.argv[1:]
installed = toolchain.locate(name)
for file in [installed, *toolchain._builtins.get(installed, ())]:
    shutil.copy(file, folder)
copy = os.path.join(folder, os.path.basename(installed))
ctypes.CDLL(copy)  # as a framework that brings its own
toolchain._located.clear()
cache = FileStreamProgramCache(os.path.join(folder, "cache"), durability="none")


def made(number):
    options = ProgramOptions(arch="sm_80", name=f"k{number}.cu")
    program = Program('extern "C" __global__ void k(int *a) { *a = %d; }' % number, "c++", options)
    if name == "nvrtc":
        return program.compiled("cubin", cache=cache)
    return link([program.compiled("ltoir")], LinkerOptions(arch="sm_80", name=f"k{number}"), cache=cache)


first = made(1)
assert first.reason is None and made(1).hit
assert toolchain.locate(name) == copy
os.rename(copy, copy + ".old")
shutil.copy(installed, copy)
with open(copy, "r+b") as file:  # another build id, as an upgrade brings
    file.truncate(os.path.getsize(copy) - 1)
second = made(2)
assert second.digest is None, "stored under the key of a compiler that didn't make it"
print(second.reason)
"""


@pytest.mark.parametrize("name", ["nvrtc", "nvJitLink"])
def test_a_compiler_that_is_replaced_on_disk_under_a_running_process(tmp_path, name):
    done = subprocess.run(
        [sys.executable, "-c", REPLACED, name, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{name} was replaced on disk since this process loaded it")

# SPDX-License-Identifier: Apache-2.0
"""What surrounds a compile and reaches its output: variables, the working directory's name, the compiler's files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from cuda_progcache import LinkerOptions, Program, ProgramOptions, link
from cuda_progcache.compile import own_process
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
        plain = {name: value for name, value in os.environ.items() if name not in {"PWD", *toolchain.VARIABLES}}
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
        ("FINALIZER_USE_LEGACY_ELF_BUILDER", "1", {"target_type": "cubin"}),
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


def test_a_variable_that_is_changed_after_the_compiler_was_loaded(compiled, monkeypatch):
    """A compiler process has read it by then: what is compiled with another value is another one's work."""
    before = compiled(target_type="ptx")
    monkeypatch.setenv("NV_NVVM_VERSION", "nvvm-latest")
    made = compiled(target_type="ptx")
    assert (made.hit, made.reason) == (False, None)
    assert made.data != before.data
    monkeypatch.delenv("NV_NVVM_VERSION")
    assert compiled(target_type="ptx").data == before.data


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


@pytest.mark.parametrize("name", ["nvrtc", "nvJitLink"])
def test_a_compiler_that_is_replaced_on_disk_under_a_running_process(cache, tmp_path, monkeypatch, name):
    """What comes next is the new one's work, and in the key of the new one."""
    installed = toolchain.toolchain("c++" if name == "nvrtc" else "ptx")
    folder = tmp_path / "lib"
    folder.mkdir()
    for tool in installed:
        shutil.copy(tool.path, folder)
    copy = folder / os.path.basename(installed[0].path)
    monkeypatch.setenv(f"CUDA_PROGCACHE_{name.upper()}", str(copy))

    def made(number):
        source = f'extern "C" __global__ void k(int *a) {{ *a = {number}; }}'
        program = Program(source, "c++", ProgramOptions(arch="sm_80", name=f"k{number}.cu"))
        if name == "nvrtc":
            return program.compiled("cubin", cache=cache)
        return link([program.compiled("ltoir")], LinkerOptions(arch="sm_80", name=f"k{number}"), cache=cache)

    first = made(1)
    assert first.reason is None
    assert made(1).hit
    os.rename(copy, f"{copy}.old")
    shutil.copy(installed[0].path, copy)
    with open(copy, "r+b") as file:  # another build, as an upgrade brings
        file.truncate(os.path.getsize(copy) - 1)
    second, again = made(2), made(1)
    assert (second.reason, again.reason, again.hit) == (None, None, False)
    assert again.data == first.data
    tools = {tool["name"]: tool["digest"] for tool in again.record["toolchain"]}
    assert tools[name] == toolchain.identity(str(copy)) != installed[0].identity


def test_a_compiler_that_is_replaced_while_it_compiles(compiled, cache, tmp_path, monkeypatch):
    folder = tmp_path / "lib"
    folder.mkdir()
    for tool in toolchain.toolchain("c++"):
        shutil.copy(tool.path, folder)
    copy = folder / os.path.basename(toolchain.locate("nvrtc"))
    monkeypatch.setenv("CUDA_PROGCACHE_NVRTC", str(copy))
    original = own_process._Process.ask

    def upgraded(process, job):
        answer = original(process, job)
        os.rename(copy, f"{copy}.old")
        shutil.copy(f"{copy}.old", copy)
        with open(copy, "r+b") as file:
            file.truncate(os.path.getsize(copy) - 1)
        return answer

    monkeypatch.setattr(own_process._Process, "ask", upgraded)
    assert compiled().reason == "the files of nvrtc were replaced while it was compiling"
    assert len(cache) == 0
    assert not any(str(copy) in process.builds for process in own_process._pool.idle), "which it has loaded isn't known"

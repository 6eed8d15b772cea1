# SPDX-License-Identifier: Apache-2.0
"""Which compiler files a key names, and by what."""

from __future__ import annotations

import mmap
import os
import shutil
import struct
import subprocess
import sys
from hashlib import sha256

import pytest

from cuda_progcache.errors import ToolchainError
from cuda_progcache.keys import toolchain


def test_found_where_it_will_be_loaded_from():
    for name in ("nvrtc", "nvJitLink", "nvvm"):
        assert os.path.realpath(toolchain.locate(name)) == os.path.realpath(toolchain.load(name))


@pytest.mark.parametrize("name", ["nvrtc", "nvJitLink", "nvvm"])
def test_a_setting_names_the_file(name, tmp_path, monkeypatch):
    code_type = {library: kind for kind, library in toolchain.LIBRARY_OF.items()}[name]
    before = toolchain.toolchain(code_type)
    copy = tmp_path / "another.so"
    copy.write_bytes(b"another")
    setting = f"CUDA_PROGCACHE_{name.upper()}"
    monkeypatch.setenv(setting, str(copy))
    assert toolchain.locate(name) == toolchain.toolchain(code_type)[0].path == str(copy)
    assert toolchain.build(code_type) != sha256(before[0].identity.encode()).hexdigest()
    monkeypatch.setenv(setting, str(tmp_path / "gone.so"))
    with pytest.raises(ToolchainError, match=rf"{setting} is not a file: .*gone\.so"):
        toolchain.locate(name)
    monkeypatch.delenv(setting)
    assert toolchain.toolchain(code_type) == before


def test_what_the_process_has_loaded_does_not_count(tmp_path):
    """The key of a program would depend on who imported what before."""
    code = (
        "import ctypes, sys\n"
        "from cuda_progcache.keys import toolchain as t\n"
        "ctypes.CDLL(sys.argv[1], ctypes.RTLD_GLOBAL)\n"
        "print(t.locate('nvrtc'))\n"
    )
    copy = shutil.copy(next(t.path for t in toolchain.toolchain("c++") if t.name == "nvrtc-builtins"), tmp_path)
    copy = shutil.move(copy, tmp_path / "libnvrtc.so.13")
    done = subprocess.run([sys.executable, "-c", code, copy], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == toolchain.locate("nvrtc")


def test_locating_loads_nothing():
    code = (
        "from cuda_progcache.keys import toolchain as t\n"
        "tools = t.toolchain('c++') + t.toolchain('ptx') + t.toolchain('nvvm', libdevice=True)\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libnvrtc' not in maps and 'libnvvm' not in maps and 'libnvJitLink' not in maps, maps\n"
        "import sys; assert 'cuda.pathfinder' not in sys.modules\n"
        "print(*(tool.name for tool in tools))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["nvrtc", "nvrtc-builtins", "nvJitLink", "nvvm", "libdevice"]


def test_build_id_is_what_the_file_says():
    path = toolchain.locate("nvrtc")
    kind, build_id, size = toolchain.identity(path).split(":")
    assert kind == "build-id"
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        note = struct.pack("<III", 4, 20, 3) + b"GNU\0" + bytes.fromhex(build_id)
        assert content.find(note) > 0
    assert int(size) == os.path.getsize(path)


@pytest.mark.parametrize(
    "content", [b"", b"plain", b"\x7fELF\x02\x01" + b"\0" * 20, b"\x7fELF\x02\x01" + b"\xff" * 200]
)
def test_a_file_without_build_id_is_known_by_its_content(tmp_path, content):
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    assert toolchain.identity(str(path)) == f"sha256:{sha256(content).hexdigest()}"


def test_same_version_another_build_is_another_compiler(tmp_path):
    """A patch release: same name, same version number, one byte of the build id changed."""
    path = tmp_path / "libnvrtc-builtins.so.13.5"
    original = next(t.path for t in toolchain.toolchain("c++") if t.name == "nvrtc-builtins")
    shutil.copy(original, path)
    before = toolchain.identity(str(path))
    assert before == toolchain.identity(original)
    build_id = bytes.fromhex(before.split(":")[1])
    content = path.read_bytes().replace(build_id, build_id[:-1] + bytes([build_id[-1] ^ 1]))
    path.write_bytes(content)
    assert toolchain.identity(str(path)) != before


def test_the_builtins_library_counts(tmp_path, monkeypatch):
    for name in ("libnvrtc.so.13", "libnvrtc-builtins.so.13.5"):
        (tmp_path / name).write_bytes(b"one")
    monkeypatch.setattr(toolchain, "_located", {"nvrtc": str(tmp_path / "libnvrtc.so.13")})
    monkeypatch.setattr(toolchain, "_known", {})
    before = toolchain.toolchain("c++")
    assert toolchain.toolchain("c++") is before
    written = os.stat(tmp_path / "libnvrtc-builtins.so.13.5").st_mtime_ns
    while os.stat(tmp_path / "libnvrtc-builtins.so.13.5").st_mtime_ns == written:  # a tick of its clock is some ms
        (tmp_path / "libnvrtc-builtins.so.13.5").write_bytes(b"two")
    after = toolchain.toolchain("c++", thorough=True)
    assert before[0] == after[0]
    assert before[1].identity != after[1].identity
    (tmp_path / "libnvrtc-builtins.so.13.5").write_bytes(b"three")
    monkeypatch.setattr(toolchain, "_LOOK_INTERVAL", 0)
    assert toolchain.toolchain("c++")[1] not in {before[1], after[1]}
    (tmp_path / "libnvrtc.so.13").write_bytes(b"another")
    monkeypatch.setattr(toolchain, "_LOOK_INTERVAL", 60)
    assert toolchain.toolchain("c++")[0].identity != before[0].identity, "the library itself is looked at each time"


def test_header_roots_hold_the_headers():
    assert os.path.isfile(os.path.join(toolchain.header_root("cuda"), "cuda_fp16.h"))
    assert os.path.isfile(os.path.join(toolchain.header_root("cccl"), "cub", "cub.cuh"))


def test_header_roots_without_wheels(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "package_dirs", list)
    for name in ("CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "_by_pathfinder", lambda *_: None)
    with pytest.raises(ToolchainError, match=r"cuda-progcache\[headers\]"):
        toolchain.header_root("cccl")
    probe = tmp_path / "include/cccl/cub/version.cuh"
    probe.parent.mkdir(parents=True)
    probe.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolchain.header_root("cccl") == str(tmp_path / "include/cccl")


WITHOUT_WHEELS = """
import site
site.getsitepackages = lambda *_: []
site.ENABLE_USER_SITE = False
from cuda_progcache.keys.toolchain import header_root
print(header_root("cuda"), header_root("cccl"))
"""


@pytest.mark.parametrize("cccl", ["cccl/", ""])
def test_a_toolkit_that_only_the_loader_knows(tmp_path, cccl):
    """No wheels, no variable: the toolkit's library folder is one that the system's loader looks into."""
    toolkit = tmp_path / "cuda"
    lib = toolkit / "lib64"
    for header in ("cuda_fp16.h", "cuda_runtime.h", f"{cccl}cub/version.cuh", f"{cccl}cuda/std/version"):
        path = toolkit / "include" / header
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    lib.mkdir(parents=True)
    cudart = os.path.join(os.path.dirname(toolchain.locate("nvrtc")), "libcudart.so.13")
    shutil.copy(cudart, lib)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "CONDA_"))}
    environment["LD_LIBRARY_PATH"] = str(lib)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_WHEELS], env=environment, capture_output=True, text=True, check=True
    )
    found = [os.path.realpath(folder) for folder in done.stdout.split()]
    assert found == [str(toolkit / "include"), str(toolkit / "include" / cccl).rstrip("/")]


def test_what_is_not_found_is_told_with_the_places(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "package_dirs", lambda: ["/some/site-packages"])
    monkeypatch.setattr(toolchain, "_by_pathfinder", lambda *_: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(ToolchainError) as raised:
        toolchain.header_root("cuda")
    for place in ("cuda_fp16.h", "/some/site-packages", f"CUDA_HOME ({tmp_path})", "CUDA_PATH (not set)"):
        assert place in str(raised.value)


def test_unreadable_compiler_file(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "_located", {})
    monkeypatch.setattr(toolchain, "_known", {})
    monkeypatch.setattr(toolchain, "identity", lambda path: open(path + "gone"))  # noqa: SIM115
    with pytest.raises(ToolchainError, match="can't be read"):
        toolchain.toolchain("ptx")


def test_a_library_that_moved_is_found_again(tmp_path, monkeypatch):
    tool = toolchain.ToolFile("nvJitLink", str(tmp_path / "gone.so"), "x")
    monkeypatch.setattr(toolchain, "_located", {"nvJitLink": tool.path})
    monkeypatch.setattr(toolchain, "_known", {("ptx", False, None): toolchain._Known((tool,), ((0, 0, 0, 0),))})
    assert toolchain.toolchain("ptx")[0].path == toolchain.locate("nvJitLink")

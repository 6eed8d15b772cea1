# SPDX-License-Identifier: Apache-2.0
"""A machine without any compiler uses what was compiled for it elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    InMemoryProgramCache,
    LinkerOptions,
    ProgCacheWarning,
    Program,
    ProgramOptions,
    link,
)
from cuda_progcache.compile import toolchains
from cuda_progcache.keys import toolchain

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'
#: No wheel is found, neither by us nor by cuda.pathfinder; CUDA_HOME has headers alone.
HIDE = """
import site
site.getsitepackages = lambda *_: []
site.ENABLE_USER_SITE = False
"""
MANIFEST = """
format = 1
[kernels.plain]
template = "plain.cu.j2"
entry_points = ["plain"]
[kernels.half]
template = "half.cu.j2"
headers = ["cuda"]
name_expressions = ["half_of<float>"]
[kernels.pair]
templates = ["callee.cu.j2", "caller.cu.j2"]
entry_points = ["pair"]
"""
TEMPLATES = {
    "plain.cu.j2": 'extern "C" __global__ void plain(int *a) { *a = 1; }',
    "half.cu.j2": "#include <cuda_fp16.h>\ntemplate <class T> __global__ void half_of(T *a) { *a = *a / T(2); }\n",
    "callee.cu.j2": "__device__ float twice(float x) { return x + x; }\n",
    "caller.cu.j2": (
        'extern __device__ float twice(float);\nextern "C" __global__ void pair(float *a) { *a = twice(*a); }\n'
    ),
}
KERNELS = ("plain", "half", "pair")
#: What a host does that only runs: every kernel, then one that isn't there.
RUN = """
import json, sys
from cuda_progcache import CompileService
from cuda_progcache.errors import ToolchainError
from cuda_progcache.keys.toolchain import NotInstalledError, toolchain
try:
    toolchain("c++")
except NotInstalledError:
    pass
else:
    raise SystemExit("this host has a compiler")
cache, library = sys.argv[1:3]
if sys.argv[3:] == ["layer"]:
    from cuda_progcache import InMemoryProgramCache, ProgramCacheStack, ReadOnlyProgramCache
    cache = ProgramCacheStack([InMemoryProgramCache(), ReadOnlyProgramCache(cache)])
service = CompileService(cache, library=library)
hits = {name: service.kernel(name, arch="sm_80").hit for name in ("plain", "half", "pair")}
try:
    service.kernel("plain", arch="sm_90")
    said = ""
except ToolchainError as error:
    said = str(error)
stats = service.cache.stats()
print(json.dumps([hits, said, stats.hits, stats.misses]))
"""


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "manifest.toml").write_text(MANIFEST)
    for name, text in TEMPLATES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def prewarmed(tmp_path, library):
    cache = FileStreamProgramCache(tmp_path / "cache", durability="none")
    assert CompileService(cache, library=library).prewarm(archs=["sm_80"], jobs=1).ok
    cache.close()
    return cache


@pytest.fixture
def host(tmp_path, library):
    """A process on a machine with no compiler: ``host(cache directory, ...)`` gives what RUN prints."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE)
    headers = tmp_path / "headers"
    headers.mkdir()
    (headers / "include").symlink_to(toolchain.header_root("cuda"))
    environment = {**os.environ, "PYTHONPATH": str(hidden), "CUDA_HOME": str(headers)}

    def run(cache, *arguments, **more):
        command = [sys.executable, "-c", RUN, str(cache), str(library), *arguments]
        done = subprocess.run(
            command, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


ALL_HIT = dict.fromkeys(KERNELS, True)


@pytest.mark.parametrize("transport", ["as it is", "copy", "bundle", "read-only layer", "without toolchains/"])
def test_a_host_without_a_compiler_has_hits(prewarmed, host, tmp_path, transport):
    root, arguments = prewarmed.path, ()
    if transport != "as it is":
        there = tmp_path / "there"
        if transport == "bundle":
            prewarmed.export(tmp_path / "bundle")
            with FileStreamProgramCache(there) as cache:
                cache.import_(tmp_path / "bundle")
        else:
            shutil.copytree(root, there)
            shutil.rmtree(root)
        if transport == "without toolchains/":
            shutil.rmtree(there / "toolchains")
        if transport == "read-only layer":
            arguments = ("layer",)
        root = there
    for _ in range(2):
        hits, said, counted, missed = host(root, *arguments)
        assert hits == ALL_HIT
        assert "nvidia-cuda-nvrtc" in said, "a miss says what is missing"
        assert "plain.cu for sm_90 isn't in the cache" in said
        assert (counted, missed) == (3, 1)


def test_of_several_builds_the_right_one_is_found(prewarmed, host):
    """Of each library, as a cache has after an upgrade or two; the latest is tried first."""
    files = sorted((prewarmed.path / "toolchains").iterdir())
    assert len(files) == 2  # NVRTC and nvJitLink
    for file in files:
        for build in "ab":
            content = json.loads(file.read_text())
            content["tools"][0][1] = f"build-id:{build}:1"
            file.with_name(f"{build}{file.name[1:]}").write_text(json.dumps(content))
        os.utime(file, (1, 1))
    assert host(prewarmed.path)[0] == ALL_HIT


@pytest.mark.parametrize("named", ["file", "cache"])
def test_a_setting_names_the_toolchain(prewarmed, host, tmp_path, named, library):
    """For a cache that is filled later, say a remote tier's; it goes before what the cache says."""
    lock = tmp_path / "lock"
    if named == "cache":
        shutil.copytree(prewarmed.path / "toolchains", lock / "toolchains")
    else:
        merged = [
            tool for f in (prewarmed.path / "toolchains").iterdir() for tool in json.loads(f.read_text())["tools"]
        ]
        lock.write_text(json.dumps({"format": 1, "tools": merged}))
    for file in (prewarmed.path / "toolchains").iterdir():
        file.write_text(json.dumps({"format": 1, "tools": [["nvrtc", "another"]]}))
    assert host(prewarmed.path, CUDA_PROGCACHE_TOOLCHAIN=str(lock))[0] == ALL_HIT


def test_where_a_compiler_is_installed_nothing_stands_in_for_it(cache, compiled, monkeypatch):
    compiled()
    (file,) = (cache.path / "toolchains").iterdir()
    real = file.read_text()
    file.write_text(real.replace("build-id:", "build-id:0"))
    monkeypatch.setattr(toolchains, "made_for", lambda _: pytest.fail("asked"))
    assert compiled().hit
    assert not compiled(fma=False).hit


def test_what_is_remembered_goes_with_the_entries_and_comes_back(cache, compiled):
    compiled()
    cache.clear()
    assert not (cache.path / "toolchains").exists()
    compiled()
    assert len(list((cache.path / "toolchains").iterdir())) == 1
    assert cache.verify().clean


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b'{"format": 1, "tools": [1]}'])
def test_damaged_files_say_nothing(cache, compiled, content):
    compiled()
    (file,) = (cache.path / "toolchains").iterdir()
    before = toolchains.made_for(cache)
    file.write_bytes(content)
    assert toolchains.made_for(cache) == before, "the records say it"


def test_a_store_in_memory_says_it_by_its_records(compiled):
    store = InMemoryProgramCache()
    compiled(store=store)
    linked = Program(SOURCE, "c++", ProgramOptions(arch="sm_80", relocatable_device_code=True)).compiled("cubin")
    link([linked], LinkerOptions(arch="sm_80"), cache=store)
    assert toolchains.made_for(store) == {
        (kind, False): [tuple(tool._replace(path="") for tool in toolchain.toolchain(kind))] for kind in ("c++", "ptx")
    }


@pytest.mark.parametrize("made_up", [5, "nvrtc", [1], [{"name": "nvrtc"}], {"name": "nvrtc"}])
def test_a_made_up_record_says_nothing(compiled, made_up):
    store = InMemoryProgramCache()
    compiled(store=store)
    before = toolchains.made_for(store)
    assert store.publish(b"k", b"v", {"toolchain": made_up})
    assert toolchains.made_for(store) == before != {}


def test_an_error_of_the_store_is_no_store_without_a_list():
    """An AttributeError in its own code, that is."""

    class Wrong(InMemoryProgramCache):
        def entries(self):
            return self.missing

    with pytest.raises(AttributeError, match="missing"):
        toolchains.made_for(Wrong())


class Unreadable(InMemoryProgramCache):
    def entries(self):
        raise PermissionError(13, "Permission denied", "records")


def test_records_that_cannot_be_read_are_told_of():
    with pytest.warns(ProgCacheWarning, match="records of .* can't be read.*Permission denied"):
        assert toolchains.made_for(Unreadable()) == {}

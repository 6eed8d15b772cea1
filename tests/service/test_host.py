# SPDX-License-Identifier: Apache-2.0
"""check(): what of a cache or a bundle a machine could use, and why not the rest."""

from __future__ import annotations

import contextlib
import os
import shutil

import pytest

from cuda_progcache import FileStreamProgramCache, ProgramOptions, ReadOnlyProgramCache
from cuda_progcache.compile.pipeline import find, obtain
from cuda_progcache.errors import ArchError, BundleError
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.toolchain import header_root
from cuda_progcache.service.host import Host, check, check_record, device_archs, runs_on, this_host


@pytest.mark.parametrize(
    ("arch", "target", "device", "runs"),
    [
        ("sm_90", "cubin", "sm_90", True),
        ("sm_80", "cubin", "sm_86", True),
        ("sm_86", "cubin", "sm_80", False),
        ("sm_80", "cubin", "sm_90", False),
        ("sm_100", "cubin", "sm_103", True),
        ("sm_100", "cubin", "sm_120", False),
        ("sm_90a", "cubin", "sm_90", True),
        ("sm_100a", "cubin", "sm_103", False),
        ("sm_100f", "cubin", "sm_103", True),
        ("sm_100f", "cubin", "sm_120", False),
        ("sm_86", "cubin", "sm_87", False),  # integrated
        ("sm_87", "cubin", "sm_87", True),
        ("sm_80", "ptx", "sm_90", True),
        ("compute_80", "ptx", "sm_120", True),
        ("compute_90", "ptx", "sm_80", False),
        ("compute_90a", "ptx", "sm_100", False),
        ("compute_100f", "ptx", "sm_103", True),
        ("sm_80", "ltoir", "sm_90", True),
        ("sm_90", "ltoir", "sm_80", False),
        ("", "cubin", "sm_90", False),
        ("gfx90a", "cubin", "sm_90", False),
    ],
)
def test_what_runs_on_what(arch, target, device, runs):
    assert runs_on(arch, target, device) is runs


HOST = Host(("sm_90",), {"nvrtc": frozenset({"build-id:1"}), "nvrtc-builtins": frozenset({"b:1", "b:2"})}, "1")
RECORD = {
    "name": "k",
    "target_type": "cubin",
    "arch": "sm_90",
    "components": [["schema", "1"], ["tool nvrtc", "build-id:1"], ["tool nvrtc-builtins", "b:2"], ["code", "..."]],
}


def test_reasons():
    assert check_record("d", RECORD, HOST) == ("d", "k", "cubin", "sm_90", True, ())
    unlike = {
        **RECORD,
        "arch": "sm_100",
        "components": [["schema", "0"], ["tool nvrtc", "build-id:2"], ["tool nvJitLink", "x"]],
        "kernel": {"name": "softmax"},
    }
    checked = check_record("d", unlike, HOST)
    assert (checked.usable, checked.name) == (False, "softmax")
    assert checked.reasons == (
        "cubin for sm_100 doesn't run on sm_90",
        "its key is of schema 0, and this version makes schema 1",
        "compiled by another nvrtc (build-id:2) than the one on this machine (build-id:1)",
    )
    assert check_record("d", unlike, HOST._replace(archs=("sm_90", "sm_103"))).reasons[0].startswith("its key")
    assert check_record("d", RECORD, HOST._replace(archs=())).usable is True
    assert check_record("d", {}, HOST).usable is None


def test_programs_compiled_here_can_be_used_here(tmp_path):
    from cuda_progcache import CompileService, LinkerOptions, Program, ProgramOptions, link

    cache = FileStreamProgramCache(tmp_path / "cache")
    source = 'extern "C" __global__ void k(int* a) { *a = 1; }'
    service = CompileService(cache)
    service.compile(source, options=ProgramOptions(arch="sm_80"))
    service.compile(source, options=ProgramOptions(arch="sm_90"))
    service.compile(source, target_type="ptx", options=ProgramOptions(arch="sm_90"))
    module = Program(source, "c++", ProgramOptions(arch="sm_90", relocatable_device_code=True)).compiled(
        "ltoir", cache=cache
    )
    link([module], LinkerOptions(arch="sm_90"), cache=cache)
    cache[b"plain"] = b"bytes"
    cache.export(tmp_path / "bundle")
    for path in (tmp_path / "bundle", cache.path):
        checked = check(path, archs=["sm_90"])
        assert [entry.digest for entry in checked] == sorted(entry.digest for entry in checked)
        found = {(entry.target_type, entry.arch): (entry.usable, entry.reasons) for entry in checked}
        for target in ("cubin", "ptx", "ltoir"):
            assert found[target, "sm_90"] == (True, ())
        assert len(checked) == 6
        assert found["cubin", "sm_80"] == (False, ("cubin for sm_80 doesn't run on sm_90",))
        assert found["", ""][0] is None
    assert all(entry.usable is not False for entry in check(cache.path, archs=[]))


# What check says is so: each program is looked up after each change, and is a hit just where it said so.

PROGRAMS = {
    "plain": ("", {}),
    "lineinfo": ("", {"lineinfo": True}),
    "vendor's header": ("#include <cuda_fp16.h>\n", {"include_path": ["CUDA"]}),
    "own header": ("#include <own.h>\n", {"include_path": ["inc"]}),
    "path of own header": ("#include <file.h>\n__device__ const char *where = path;\n", {"include_path": ["inc"]}),
    "header beside it": ('#include "beside.h"\n', {}),
    "own and vendor's": ("#include <own.h>\n#include <cuda_fp16.h>\n", {"include_path": ["inc", "CUDA"]}),
    "has_include": ("#if __has_include(<later.h>)\n#define A\n#endif\n#include <own.h>\n", {"include_path": ["inc"]}),
}
CHANGES = {
    "nothing": lambda project: None,
    "another folder": lambda project: os.chdir(project.parent / "elsewhere"),
    "own header edited": lambda project: (project / "inc/own.h").write_text("#define OWN 2\n"),
    "header beside it edited": lambda project: (project / "beside.h").write_text("#define BESIDE 2\n"),
    "a header comes": lambda project: (project / "inc/later.h").write_text("#define LATER\n"),
    "a variable": lambda project: os.environ.__setitem__("NV_NVVM_VERSION", "2.0"),
}


def inputs_of(name, project):
    text, options = PROGRAMS[name]
    folders = [header_root("cuda") if f == "CUDA" else str(project / f) for f in options.get("include_path", ())]
    given = {**options, "include_path": folders} if folders else options
    return normalize(
        code=text + 'extern "C" __global__ void k(int *a) { *a = 1; }',
        code_type="c++",
        options=ProgramOptions(arch="sm_90", name=f"{name}.cu", **given),
        target_type="cubin",
    )


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """Every program, compiled in a project's folder; the cache is exported, too."""
    folder = tmp_path_factory.mktemp("check")
    project = folder / "project"
    (project / "inc").mkdir(parents=True)
    (folder / "elsewhere").mkdir()
    (project / "inc/own.h").write_text("#define OWN 1\n")
    (project / "inc/file.h").write_text("__device__ const char path[] = __FILE__;\n")
    (project / "beside.h").write_text("#define BESIDE 1\n")
    with contextlib.chdir(project), FileStreamProgramCache(folder / "cache", durability="none") as cache:
        digests = {name: obtain(inputs_of(name, project), cache).digest for name in PROGRAMS}
        cache.export(folder / "bundle")
    return project, digests


@pytest.mark.parametrize("change", CHANGES)
def test_what_check_says_is_so(compiled_once, monkeypatch, change):
    project, digests = compiled_once
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    monkeypatch.delenv("NV_NVVM_VERSION", raising=False)
    monkeypatch.chdir(project)
    try:
        CHANGES[change](project)
        with ReadOnlyProgramCache(project.parent / "cache") as cache:
            found = {name: find(inputs_of(name, project), cache) for name in PROGRAMS}
        for path in (project.parent / "cache", project.parent / "bundle"):
            checked = {entry.digest: entry for entry in check(path, archs=["sm_90"], include_path=[project / "inc"])}
            for name, digest in digests.items():
                entry = checked[digest]
                if change == "another folder" and name == "header beside it":
                    assert entry.usable is None, "the program may be there, too"
                else:
                    hit = found[name] is not None and found[name].digest == digest
                    assert entry.usable is hit, (name, entry.reasons)
                assert entry.usable or entry.reasons
    finally:
        os.environ.pop("NV_NVVM_VERSION", None)
        for file in [path for path in project.rglob("*") if path.is_file() and path not in before]:
            file.unlink()
        for file, content in before.items():
            file.write_bytes(content)


def test_a_changed_compiler_header_is_told_by_its_name(compiled_once, tmp_path):
    project, digests = compiled_once
    vendor = tmp_path / "vendor"
    shutil.copytree(header_root("cuda"), vendor, symlinks=True)
    with (vendor / "cuda_fp16.h").open("a") as file:
        file.write("\n#define EDITED\n")
    host = this_host(["sm_90"])
    host = host._replace(include_path=(str(vendor),), cwd=str(project))
    with ReadOnlyProgramCache(project.parent / "cache") as cache:
        record = cache.info(digests["vendor's header"]).record
    checked = check_record(digests["vendor's header"], record, host)
    assert checked.usable is False
    assert checked.reasons[0].startswith("1 of its ")
    assert checked.reasons[0].endswith(" headers differs on this machine: cuda_fp16.h")
    assert check_record("d", record, host._replace(include_path=())).usable is None


def test_looking_leaves_no_trace(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o700)
    assert check(tmp_path / "cache", archs=["sm_90"]) == ()
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_cannot_be_checked(tmp_path):
    with pytest.raises(ArchError, match="sm90"):
        check(tmp_path, archs=["sm90"])
    with pytest.raises(FileNotFoundError):
        check(tmp_path / "none", archs=["sm_90"])
    (tmp_path / "text").write_text("x" * 2000)
    with pytest.raises(BundleError, match="text"):
        check(tmp_path / "text", archs=["sm_90"])


def test_this_host_knows_its_compilers():
    host = this_host(["sm_90"])
    assert {"nvrtc", "nvrtc-builtins", "nvJitLink", "nvvm", "libdevice"} <= set(host.tools)
    assert this_host().archs == device_archs()


@pytest.mark.gpu
def test_the_devices_are_those_that_cuda_core_sees():
    from cuda.core import Device

    assert f"sm_{Device().arch}" in device_archs()

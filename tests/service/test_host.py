# SPDX-License-Identifier: Apache-2.0
"""check(): what of a cache or a bundle a machine could use, and why not the rest."""

from __future__ import annotations

import pytest

from cuda_progcache import FileStreamProgramCache
from cuda_progcache.errors import ArchError, BundleError
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
    "components": [["schema", "1"], ["source", "..."]],
    "toolchain": [{"name": "nvrtc", "digest": "build-id:1"}, {"name": "nvrtc-builtins", "digest": "b:2"}],
}


def test_reasons():
    assert check_record("d", RECORD, HOST) == ("d", "k", "cubin", "sm_90", True, ())
    unlike = {
        **RECORD,
        "arch": "sm_100",
        "components": [["schema", "0"]],
        "toolchain": [{"name": "nvrtc", "digest": "build-id:2"}, {"name": "nvJitLink", "digest": "x"}],
        "kernel": {"name": "softmax"},
    }
    checked = check_record("d", unlike, HOST)
    assert (checked.usable, checked.name) == (False, "softmax")
    assert checked.reasons == (
        "cubin for sm_100 doesn't run on sm_90",
        "its key is of schema 0, and this version makes schema 1",
        "compiled by another nvrtc than the one installed here",
        "compiled by nvJitLink, which isn't installed here",
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

# SPDX-License-Identifier: Apache-2.0
"""Exports: the same programs give the same bytes. What they contain is tested in tests/cli/test_cli_export.py."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from cuda_progcache import FileStreamProgramCache
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.derived import manifest_path, write_beside

#: Exports a cache twice: at once, which imports all that it takes; then as another user, on another day.
EXPORT = """
import os, sys, time
from cuda_progcache import FileStreamProgramCache
from cuda_progcache.service.export import write_oci, write_wheel

cache, target, user, days, umask = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])

def export(folder):
    with FileStreamProgramCache(cache, mode="ro") as opened:
        write_oci(opened, os.path.join(folder, "image"), lambda info: True, tag="v1")
        write_wheel(opened, os.path.join(folder, "wheel"), lambda info: True, name="kernels")

os.makedirs(os.path.join(target, "own"))
export(target)
os.chown(os.path.join(target, "own"), user, user)
os.umask(umask)
if user != os.geteuid():
    os.setgroups([]); os.setgid(user); os.setuid(user)
clock, clock_ns = time.time, time.time_ns
time.time = lambda: clock() + days * 86400
time.time_ns = lambda: clock_ns() + days * 86400 * 10**9
export(os.path.join(target, "own"))
"""


@pytest.fixture
def open_folder():
    """pytest's own directories are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def _fill(cache):
    """Programs of two names, with compilers and header manifests."""
    for number, name in enumerate(("fill.cu", "fill.cu", *["other.cu"] * 6)):
        record = {
            "name": name,
            "components": [["source", f"{number}"], ["option", "-arch=sm_90"]],
            "toolchain": [{"name": "libnvrtc.so.13", "digest": f"build-id:{number // 2}"}],
        }
        assert cache.publish(b"%d" % number, bytes(1000) + b"%d" % number, record)
        content = b'{"format":4,"sets":[{"entry":"%b"}]}' % entry_digest(b"%d" % number).encode()
        write_beside(cache.path, manifest_path(cache.path, f"{number:064x}"), content)


def _files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_programs_give_the_same_bytes_on_another_day_and_for_another_user(open_folder):
    with FileStreamProgramCache(open_folder / "cache", durability="none") as cache:
        _fill(cache)
    shutil.copytree(open_folder / "cache", open_folder / "copy", copy_function=shutil.copyfile)
    for folder, folders, names in os.walk(open_folder):
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            os.chmod(path, 0o755 if os.path.isdir(path) else 0o644)
            os.utime(path, (1_000_000_000, 1_000_000_000) if "copy" in path else None)
    made = []
    for cache, user, days, umask, zone in (("cache", 0, 0, 0o022, "UTC"), ("copy", 12345, 40, 0o077, "Asia/Tokyo")):
        target = open_folder / f"for-{user}"
        given = [open_folder / cache, target, user if os.geteuid() == 0 else os.geteuid(), days, umask]
        environment = {**os.environ, "TZ": zone, "PYTHONHASHSEED": str(user), "HOME": str(target)}
        subprocess.run([sys.executable, "-c", EXPORT, *map(str, given)], env=environment, cwd=open_folder, check=True)
        made += [_files(target / "image"), _files(target / "own" / "image")]
        made += [_files(target / "wheel"), _files(target / "own" / "wheel")]
    images, wheels = [*made[:2], *made[4:6]], [*made[2:4], *made[6:]]
    assert len(images[0]) == 5
    assert all(image == images[0] for image in images)
    assert all(wheel == wheels[0] for wheel in wheels)
    layer = max(images[0].values(), key=len)
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        names = tar.getnames()
    assert names == sorted(names)
    assert sum(name.count("/") == 2 for name in names) == 8 * 3, "entries, records and manifests"

# SPDX-License-Identifier: Apache-2.0
"""Power cuts, on a real ext4 in a loop-mounted file: what the disk holds at that moment is what a later mount finds.

The image is copied while it is mounted and dirty, without a sync, so the copy holds what had reached the disk.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess

import pytest
from faults_values import assert_works, check_lookups, publish, settle, value

from cuda_progcache.store import FileStreamProgramCache

MISSING = [tool for tool in ("mkfs.ext4", "e2fsck", "mount", "umount", "losetup") if shutil.which(tool) is None]


def why_not():
    if os.geteuid() != 0:
        return "needs root (mount)"
    if MISSING:
        return f"needs {', '.join(MISSING)}"
    if not os.path.exists("/dev/loop-control"):
        return "needs loop devices"
    return None


needs_disk = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


@contextlib.contextmanager
def mounted(image, at, options="loop"):
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", options, str(image), str(at)], check=True)
    try:
        yield at / "cache"
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.fixture
def disk(tmp_path):
    """A function that creates an empty file system and returns its image."""
    image = tmp_path / "disk.img"

    def make(*features):
        with image.open("wb") as file:
            file.truncate(12 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", *features, str(image)], check=True)
        return image

    return make


def cut(image, to):
    """Copy the image as it is now, and repair the copy with e2fsck."""
    subprocess.run(["cp", "--sparse=always", str(image), str(to)], check=True)
    checked = subprocess.run(["e2fsck", "-f", "-y", str(to)], capture_output=True, text=True, check=False)
    assert checked.returncode in {0, 1}, checked.stdout + checked.stderr  # 1: errors corrected
    return to


JOURNAL = {"journal": ("-J", "size=1"), "no journal": ("-O", "^has_journal")}


@needs_disk
@pytest.mark.parametrize("durability", ["full", "fsync", "none"])
@pytest.mark.parametrize("features", JOURNAL.values(), ids=JOURNAL)
def test_after_a_power_cut(tmp_path, disk, durability, features):
    """With "full", every acknowledged write is there; with any durability, what is there is right."""
    image = disk(*features)
    acknowledged = {}
    keys = [b"key%d" % i for i in range(24)]
    found = 0
    with mounted(image, tmp_path / "mount", "loop,commit=600" if "-J" in features else "loop") as root:
        store = FileStreamProgramCache(root, durability=durability, max_size_bytes=10_000_000)
        for turn in range(3):
            for who, key in enumerate(keys[: 8 * (turn + 1)]):
                assert publish(store, key, who, turn)
                acknowledged[key] = value(key, who, turn)
            after = cut(image, tmp_path / f"cut{turn}.img")
            with mounted(after, tmp_path / "mount after") as root_after:
                if durability == "full":
                    assert root_after.is_dir()
                later = FileStreamProgramCache(root_after, durability="none")
                for key in keys:
                    hits = check_lookups(later, key)
                    found += hits
                    if durability == "full" and key in acknowledged:
                        assert later.get(key) == acknowledged[key]
                        assert hits == 2
                list(later.entries()), len(later)
                assert_works(root_after)
                for who, key in enumerate(keys):
                    assert publish(later, key, who, 9)
                    assert check_lookups(later, key) == 2
            after.unlink()
    if durability == "full":
        assert found == 2 * (8 + 16 + 24)


def test_full_durability_syncs_every_name_it_makes(tmp_path, monkeypatch):
    """A new directory's name must be synced in its parent; the power cuts simulated in this file don't show that."""
    events = []
    real = {name: getattr(os, name) for name in ("mkdir", "replace", "open", "fsync", "close")}
    opened = {}

    def mkdir(path, *args, **kwargs):
        real["mkdir"](path, *args, **kwargs)
        events.append(("name", os.path.normpath(path)))

    def replace(source, target):
        real["replace"](source, target)
        events.append(("name", target))

    def open_(path, flags, *args, **kwargs):
        fd = real["open"](path, flags, *args, **kwargs)
        opened[fd] = os.path.normpath(path)
        if flags & os.O_CREAT and "/tmp/" not in str(path).removeprefix(str(tmp_path)):
            events.append(("name", opened[fd]))
        return fd

    def fsync(fd):
        kind = "directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
        events.append((kind, opened[fd]))
        real["fsync"](fd)

    for name, function in (("mkdir", mkdir), ("replace", replace), ("open", open_), ("fsync", fsync)):
        monkeypatch.setattr(os, name, function)
    store = FileStreamProgramCache(tmp_path / "a" / "cache", durability="full")
    for turn in (1, 2):
        assert publish(store, b"k", 1, turn)
        for at, (kind, path) in enumerate(events):
            under = os.path.relpath(path, tmp_path / "a" / "cache").split(os.sep)[0]
            if kind == "name" and under in {".", "entries", "records"} and not path.endswith("CACHEDIR.TAG"):
                assert ("directory", os.path.dirname(path)) in events[at:], f"the name {path} is not synced"
        events.clear()
    settle()
    assert publish(store, b"k", 1, 3)
    events.clear()
    assert publish(store, b"k", 1, 4)
    assert len([1 for kind, _ in events if kind == "directory"]) == 2, "where nothing is new, nothing more than needed"

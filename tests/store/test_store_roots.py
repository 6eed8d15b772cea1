# SPDX-License-Identifier: Apache-2.0
"""Cache roots: where they are, which permissions are accepted, and what happens when they can't be written."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from cuda_progcache._util import files
from cuda_progcache._util.files import SHARING_DELAYS
from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache.errors import ProgCacheError, ProgCacheWarning, ReadOnlyError, StoreError, UnsafeRootError
from cuda_progcache.store import FileStreamProgramCache, entry_digest, pairs
from cuda_progcache.store.derived import write_beside

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def open_umask():
    before = os.umask(0o002)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_the_tree_is_ours_alone(tmp_path, open_umask):
    root = tmp_path / "a" / "b"
    store = FileStreamProgramCache(root)
    store[b"k"] = b"v"
    assert store.path == root
    assert mode(root) == 0o700
    for path in root.rglob("*"):
        if path.name != "CACHEDIR.TAG":
            assert mode(path) == (0o700 if path.is_dir() else 0o600)
    assert (root / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")


def test_a_shared_tree_follows_the_umask(tmp_path, open_umask):
    root = tmp_path / "shared"
    store = FileStreamProgramCache(root, shared=True)
    store[b"k"] = b"v"
    assert mode(root) == 0o775
    digest = entry_digest(b"k")
    for tree in ("entries", "records"):
        assert mode(root / tree / digest[:2]) == 0o775
        assert mode(root / tree / digest[:2] / digest[2:]) == 0o664
    assert mode(root / "tmp") == 0o1775, "sticky: nobody swaps what another user stages"


@pytest.mark.parametrize("bits", [0o707, 0o702, 0o777, 0o1777, 0o2707])
def test_a_root_that_others_write_to_is_refused(tmp_path, bits):
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(bits)
    with pytest.raises(UnsafeRootError, match="chmod go-w") as excinfo:
        FileStreamProgramCache(root)
    assert excinfo.value.filename == str(root)
    assert "shared=True" in str(excinfo.value)
    assert list(root.iterdir()) == [], "nothing was made there"
    FileStreamProgramCache(root, shared=True)[b"k"] = b"v"


@pytest.fixture
def narrow_umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.parametrize("bits", [0o770, 0o775, 0o2770, 0o2775, 0o2755, 0o3770, 0o2777])
def test_a_root_that_its_mode_says_a_group_shares(tmp_path, narrow_umask, bits):
    """Entries follow the umask; directories get the root's group permissions."""
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(bits)
    store = FileStreamProgramCache(root, max_size_bytes=10_000)
    store[b"k"] = b"v"
    store.pin(b"k")
    store.close()
    assert mode(root) == bits
    opened = 0o007 if bits & 0o002 else 0
    digest = entry_digest(b"k")
    for tree in ("entries", "records"):
        for path in (root / tree, root / tree / digest[:2]):
            assert mode(path) == 0o2750 | bits & 0o070 | opened
        assert mode(root / tree / digest[:2] / digest[2:]) == 0o640
    assert mode(root / "tmp") == 0o3750 | bits & 0o070 | opened, "sticky: nobody swaps what another user stages"
    for other in ("pins",):
        assert mode(root / other) == 0o2750 | bits & 0o070 | opened
    assert list((root / "tmp").iterdir()) == []
    assert store.settings["shared"] is False, "another process looks for itself"


def test_a_private_root_below_a_setgid_directory(tmp_path, open_umask):
    """A directory inherits setgid from its parent. Without group permissions it doesn't make a root shared."""
    tmp_path.chmod(0o2755)
    root = tmp_path / "cache"
    store = FileStreamProgramCache(root)
    store[b"k"] = b"v"
    FileStreamProgramCache(root)[b"l"] = b"v"
    assert mode(root) & 0o777 == 0o700
    for path in root.rglob("*"):
        if path.name != "CACHEDIR.TAG":
            assert mode(path) & 0o777 == (0o700 if path.is_dir() else 0o600)


@pytest.mark.parametrize("bits", [0o2775, 0o770])
def test_a_group_root_that_is_removed_is_made_again_for_the_group(tmp_path, narrow_umask, bits):
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(bits)
    if os.geteuid() == 0:
        os.chown(root, 0, 12345)
    group = root.stat().st_gid
    store = FileStreamProgramCache(root)
    store[b"k"] = b"v"
    shutil.rmtree(root)
    store[b"k"] = b"w"
    assert mode(root) == bits | 0o2000
    digest = entry_digest(b"k")
    for path in (root, root / "tmp", root / "records" / digest[:2], root / "entries" / digest[:2] / digest[2:]):
        assert path.stat().st_gid == group
    assert FileStreamProgramCache(root)[b"k"] == b"w"


def test_a_root_that_is_removed_and_made_private_stays_private(tmp_path, open_umask):
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(0o2775)
    store = FileStreamProgramCache(root)
    shutil.rmtree(root)
    root.mkdir(mode=0o700)
    store[b"k"] = b"v"
    assert mode(root) & 0o777 == 0o700
    digest = entry_digest(b"k")
    assert mode(root / "entries" / digest[:2] / digest[2:]) == 0o600


def test_a_directory_left_in_staging_is_reclaimed(tmp_path):
    """A shared root's directories are created in tmp/. The process that created this one was killed."""
    root = tmp_path / "cache"
    FileStreamProgramCache(root)
    me = current_owner()
    (root / "tmp" / f"{me._replace(start=me.start + 1)}-1").mkdir()
    (root / "tmp" / f"{me}-7").mkdir()
    FileStreamProgramCache(root, max_size_bytes=1000)
    assert [path.name for path in (root / "tmp").iterdir()] == [f"{me}-7"]


def test_others_may_read_the_root(tmp_path):
    root = tmp_path / "cache"
    root.mkdir(mode=0o755)
    FileStreamProgramCache(root)[b"k"] = b"v"


@needs_root
def test_a_root_of_another_user_is_refused(tmp_path):
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    with pytest.raises(UnsafeRootError, match="user id 12345"):
        FileStreamProgramCache(root)
    FileStreamProgramCache(root, shared=True)[b"k"] = b"v"


def test_only_the_root_itself_is_judged(tmp_path):
    parent = tmp_path / "like tmp"
    parent.mkdir()
    parent.chmod(0o1777)
    FileStreamProgramCache(parent / "cache")[b"k"] = b"v"


def test_a_root_that_became_unsafe_is_not_written_again(tmp_path):
    """The root is removed, and another user creates it again before the next write."""
    root = tmp_path / "cache"
    store = FileStreamProgramCache(root)
    shutil.rmtree(root)
    root.mkdir()
    root.chmod(0o777)
    with pytest.warns(ProgCacheWarning, match="everyone can write"):
        store[b"k"] = b"v"
    assert store.publish(b"k", b"v", {}) is False
    assert list(root.iterdir()) == []
    with pytest.raises(UnsafeRootError):
        FileStreamProgramCache(root, strict=True)


def test_the_default_root(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "chosen"))
    assert FileStreamProgramCache().path == tmp_path / "chosen"
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "other"))  # read when a store is created
    assert FileStreamProgramCache().path == tmp_path / "other"
    monkeypatch.delenv("CUDA_PROGCACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = FileStreamProgramCache().path
    assert path.name == "cuda-progcache"
    assert path.is_relative_to(tmp_path)


def test_a_relative_root_survives_chdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = FileStreamProgramCache("cache")
    store[b"k"] = b"v"
    monkeypatch.chdir("/")
    assert store[b"k"] == b"v"
    assert store.path == tmp_path / "cache"


def test_a_default_root_that_cannot_be_made_falls_back_to_memory(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.warns(ProgCacheWarning) as caught:
        store = FileStreamProgramCache()
    assert len(caught) == 1
    assert str(tmp_path / "file" / "cache") in str(caught[0].message)
    assert "CUDA_PROGCACHE_DIR" in str(caught[0].message)
    store[b"k"] = b"v"
    assert store[b"k"] == b"v"


def test_a_path_that_was_asked_for_is_an_error(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(StoreError) as excinfo:
            FileStreamProgramCache(path)
        assert excinfo.value.errno == errno.ENOTDIR
        assert str(path) in str(excinfo.value)
        assert isinstance(excinfo.value, ProgCacheError)
        assert isinstance(excinfo.value, NotADirectoryError), "as open() would have said"


@pytest.mark.parametrize("durability", ["fsync", "full", "none"])
def test_durability(tmp_path, monkeypatch, durability):
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd)), fsync(fd)))
    store = FileStreamProgramCache(tmp_path / "cache", durability=durability)
    store[b"k"] = b"value"
    files_synced = [status.st_size for status in synced if stat.S_ISREG(status.st_mode)]
    directories = [status for status in synced if stat.S_ISDIR(status.st_mode)]
    assert (5 in files_synced) == (durability != "none")
    # "full" syncs the two directories with new names and, the first time, entries/, records/, the root and its parent.
    assert (len(files_synced), len(directories)) == {"fsync": (1, 0), "full": (2, 6), "none": (0, 0)}[durability]
    assert store[b"k"] == b"value"


@pytest.mark.parametrize("default", [False, True])
@pytest.mark.parametrize(
    ("option", "error", "told"),
    [
        ({"durability": "maybe"}, ValueError, "fsync, full, none"),
        ({"max_size_bytes": -1}, ValueError, "max_size_bytes"),
        ({"durabilty": "none"}, TypeError, "durabilty"),
        ({"strict": True, "size": 1}, TypeError, "size"),
    ],
)
def test_a_wrong_option_makes_nothing(tmp_path, monkeypatch, default, option, error, told):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "cache"))
    for mode in (None, "ro") if error is TypeError else (None,):
        with pytest.raises(error, match=told):
            FileStreamProgramCache(None if default else tmp_path / "cache", mode=mode, **option)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def readable_tmp_path():
    """A temporary directory that other users can enter; pytest's own are closed to them at every level."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


READ_ONLY = """
import hashlib, json, os, sys, warnings  # a store imports these when it needs them, and couldn't find them then
sys.path[:0] = {path!r}
from cuda_progcache.errors import StoreError
from cuda_progcache.store import FileStreamProgramCache
os.setgroups([]), os.setgid(12345), os.setuid(12345)  # now: the interpreter may lie where this user can't read
store = FileStreamProgramCache({root!r}, shared=True, max_size_bytes={cap})
assert store.get(b"k") == b"v" and store.load(b"k") == (b"v", {{"n": 1}})
assert store.get(b"k") == b"v" and len(store) == 1 and store.get(b"x") is None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert store.publish(b"x", b"y", {{}}) is False
    assert store.publish(b"x", b"y", {{}}) is False
    store[b"x"] = b"y"
    del store[b"k"]
    store.clear()
assert len(caught) == 1, caught
assert store.get(b"k") == b"v" and store.get(b"x") is None
assert (store.stats().dropped, store.stats().failed) == (3, 2)
store = FileStreamProgramCache({root!r}, shared=True, max_size_bytes={cap}, strict=True)
for action in (lambda: store.__setitem__(b"x", b"y"), store.clear, lambda: store.__delitem__(b"k")):
    try:
        action()
    except StoreError as exc:
        assert {root!r} in str(exc), exc
        assert isinstance(exc, PermissionError) and exc.errno == 13, exc
    else:
        sys.exit("no error")
assert (store.stats().dropped, store.stats().failed) == (1, 2)
print("ok")
"""


@needs_root
@pytest.mark.parametrize("cap", [None, 10_000])
@pytest.mark.parametrize("staging", ["readable", "private", "gone"])
def test_a_user_who_may_only_read(readable_tmp_path, staging, cap):
    tmp_path = readable_tmp_path
    before = os.umask(0o022)
    try:
        root = tmp_path / "cache"
        FileStreamProgramCache(root, shared=True).publish(b"k", b"v", {"n": 1})
    finally:
        os.umask(before)
    if staging == "gone":
        shutil.rmtree(root / "tmp")
    elif staging == "private":
        (root / "tmp").chmod(0o700)
    script = READ_ONLY.format(path=sys.path, root=str(root), cap=cap)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert (done.stdout, done.stderr) == ("ok\n", "")


@needs_root
def test_a_full_disk(tmp_path):
    """A full disk drops a write with one warning, or raises in strict mode. No staging file is left; space heals it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(disk)], check=True)
    try:
        store = FileStreamProgramCache(disk / "cache")
        store[b"small"] = b"s" * 1000
        big = os.urandom(2_000_000)
        with pytest.warns(ProgCacheWarning, match="No space left") as caught:
            assert store.publish(b"big", big, {}) is False
            assert store.publish(b"big", big, {}) is False
            store[b"big"] = big
            store.update({b"big": big})
        assert len(caught) == 1
        assert store.stats().dropped == 4
        store = FileStreamProgramCache(disk / "cache", strict=True)
        with pytest.warns(ProgCacheWarning, match="No space left"):
            assert store.publish(b"big", big, {}) is False
        with pytest.raises(StoreError, match="No space left") as excinfo:
            store[b"big"] = big
        assert excinfo.value.errno == errno.ENOSPC
        assert str(disk) in str(excinfo.value)
        assert store.stats().dropped == 2
        assert store[b"small"] == b"s" * 1000
        assert store.get(b"big") is None
        assert list((disk / "cache" / "tmp").iterdir()) == []
        filler = disk / "filler"
        with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with pytest.raises(StoreError):
            store[b"another"] = b"a" * 10_000
        assert store.get(b"another") is None
        assert store[b"small"] == b"s" * 1000
        filler.unlink()
        store[b"another"] = b"a" * 10_000
        assert store[b"another"] == b"a" * 10_000
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def reads_a_read_only_default(root):
    """Check a read-only ``CUDA_PROGCACHE_DIR`` that holds "k": its entries are hits, and new ones stay in memory."""
    with pytest.warns(ProgCacheWarning) as caught:
        store = FileStreamProgramCache()
        for _ in range(2):
            assert store[b"k"] == b"v"
            assert store.load(b"k") == (b"v", {"n": 1})
            assert store.get(b"x") is None
        store[b"x"] = b"y"
        assert store.publish(b"z", b"w", {"n": 2})
    assert len(caught) == 1
    assert str(root) in str(caught[0].message)
    assert "CUDA_PROGCACHE_DIR" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert (store[b"x"], store.load(b"z"), len(store)) == (b"y", (b"w", {"n": 2}), 3)
    stats = store.stats()
    assert (stats.entries, stats.stored, stats.dropped) == (3, 2, 0)
    assert [level.hits for level in stats.levels] == [5, 1], "the first from the disk, then from memory"
    assert (store.settings, store.path) == (None, root)
    store.clear()
    assert store[b"k"] == b"v", "what lies on the disk stays"
    store.clear()
    with pytest.raises(ReadOnlyError):
        del store[b"k"]
    store.close()


@needs_root
def test_a_read_only_file_system(tmp_path, monkeypatch):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(disk)], check=True)
    try:
        FileStreamProgramCache(disk / "cache").publish(b"k", b"v", {"n": 1})
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        store = FileStreamProgramCache(disk / "cache", max_size_bytes=1000)
        assert store[b"k"] == b"v"
        assert store.load(b"k").record == {"n": 1}
        with pytest.warns(ProgCacheWarning, match="Read-only") as caught:
            assert store.publish(b"x", b"y", {}) is False
            store[b"x"] = b"y"
        assert len(caught) == 1
        with pytest.raises(StoreError, match="Read-only"):
            FileStreamProgramCache(disk / "cache", strict=True)[b"x"] = b"y"
        monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(disk / "cache"))
        reads_a_read_only_default(disk / "cache")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("code", [errno.EACCES, errno.ESTALE, errno.EIO])
def test_a_read_that_fails_is_a_miss(tmp_path, monkeypatch, code):
    store = FileStreamProgramCache(tmp_path / "cache")
    store[b"k"] = b"v"

    def fail(path, **_):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr("cuda_progcache.store.judge.read_regular", fail)
    assert store.get(b"k") is None
    assert store.load(b"k") is None
    stats = store.stats()
    assert (stats.misses, stats.read_errors, stats.corrupt) == (2, 2, 0)
    monkeypatch.undo()
    assert store.get(b"k") == b"v", "left where it is"


def test_a_vanished_root_is_made_again(tmp_path):
    store = FileStreamProgramCache(tmp_path / "cache")
    store[b"a"] = b"1"
    shutil.rmtree(tmp_path / "cache")
    assert store.get(b"a") is None
    assert (len(store), list(store.entries()), store.stats().bytes) == (0, [], 0)
    store.clear()
    assert store.publish(b"a", b"2", {})
    assert store[b"a"] == b"2"
    assert mode(tmp_path / "cache") == 0o700


# Windows


def sharing_violation(winerror):
    exc = PermissionError(errno.EACCES, "injected")
    exc.winerror = winerror
    return exc


@pytest.fixture
def windows(monkeypatch):
    slept = []
    monkeypatch.setattr(files, "WINDOWS", True)
    # Patch only this module's name: other threads (of single flights) sleep too.
    monkeypatch.setattr(files, "time", SimpleNamespace(**(vars(time) | {"sleep": slept.append})))
    return slept


@pytest.mark.parametrize("winerror", [5, 32, 33, None])
def test_a_replace_waits_for_a_sharing_violation_to_pass(tmp_path, monkeypatch, windows, winerror):
    store = FileStreamProgramCache(tmp_path / "cache")
    replace, calls = os.replace, []

    def busy(source, target):
        calls.append(target)
        if len(calls) < 4:
            raise sharing_violation(winerror)
        replace(source, target)

    monkeypatch.setattr(os, "replace", busy)
    store[b"k"] = b"v"
    monkeypatch.undo()
    assert store[b"k"] == b"v"
    assert sum(windows) == sum(SHARING_DELAYS[:4])


@pytest.mark.parametrize("winerror", [5, 32, 33, None])
def test_a_put_is_dropped_when_the_violation_stays(tmp_path, monkeypatch, windows, winerror):
    store = FileStreamProgramCache(tmp_path / "cache")

    def busy(source, target):
        raise sharing_violation(winerror)

    monkeypatch.setattr(os, "replace", busy)
    with pytest.warns(ProgCacheWarning) as caught:
        store[b"k"] = b"v"
        assert store.publish(b"k", b"v", {}) is False
    assert len(caught) == 1
    assert store.stats().dropped == 2
    assert sum(windows) == pytest.approx(2 * 0.185)
    assert store.get(b"k") is None
    assert list((tmp_path / "cache" / "tmp").iterdir()) == []


def test_another_windows_error_is_raised_at_once(tmp_path, monkeypatch, windows):
    store = FileStreamProgramCache(tmp_path / "cache", strict=True)

    def fail(source, target):
        raise sharing_violation(1224)  # user-mapped file

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(StoreError, match="injected"):
        store[b"k"] = b"v"
    assert windows == []


@pytest.mark.parametrize("failures", [3, 99])
def test_a_read_waits_for_a_sharing_violation_to_pass(tmp_path, monkeypatch, windows, failures):
    store = FileStreamProgramCache(tmp_path / "cache")
    store[b"k"] = b"v"
    real, calls = os.open, []

    def busy(path, *args, **kwargs):
        if "entries" in str(path):
            calls.append(path)
            if len(calls) <= failures:
                raise sharing_violation(32)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", busy)
    assert store.get(b"k") == (b"v" if failures == 3 else None)


def test_an_unlink_that_stays_busy_is_left_for_later(tmp_path, monkeypatch, windows):
    store = FileStreamProgramCache(tmp_path / "cache", max_size_bytes=250)
    store[b"a"] = b"a" * 200

    def busy(path, **kwargs):
        raise sharing_violation(32)

    monkeypatch.setattr(os, "unlink", busy)
    store[b"b"] = b"b" * 200
    assert store.stats().evicted == 0
    monkeypatch.undo()
    store[b"c"] = b"c" * 200
    assert store.stats().evicted == 2


# Owners of staging files


def test_an_owner_is_read_back():
    owner = current_owner()
    assert Owner.parse(str(owner)) == owner
    assert owner.is_alive() is True
    for text in ("", "a-b", "a-b-c-d", "a-b-1-", "entry-young", "x" * 100):
        assert Owner.parse(text) is None


def test_owners_that_are_dead_or_unknown():
    owner = current_owner()
    assert owner._replace(start=owner.start + 1).is_alive() is False, "the process id was used again"
    assert owner._replace(pid=2**22 + 1).is_alive() is False, "no such process id on Linux"
    assert owner._replace(boot="0123456789ab").is_alive() is False, "a boot before this one"
    assert owner._replace(host="0123456789ab").is_alive() is None, "another machine, or another container"


def test_a_zombie_is_dead():
    child = subprocess.Popen(
        [sys.executable, "-c", "from cuda_progcache._util.liveness import *; print(current_owner())"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with child.stdout:
        owner = Owner.parse(child.stdout.read().strip())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner.is_alive() is False
    child.wait()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_another_owner():
    parent = current_owner()
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.write(write, str(current_owner()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    with open(read, "rb") as file:
        owner = Owner.parse(file.read().decode())
    assert (owner.host, owner.boot, owner.pid) == (parent.host, parent.boot, child)
    assert owner.is_alive() is False
    assert current_owner() == parent


@pytest.mark.parametrize("when", ["open", "clear", "evict"])
def test_staging_files_of_dead_writers_are_reclaimed(tmp_path, when):
    root = tmp_path / "cache"
    store = FileStreamProgramCache(root, max_size_bytes=1000)
    me, hour_ago = current_owner(), files.time.time() - 3700
    staged = {
        "mine": f"{me}-1",
        "dead": f"{me._replace(start=me.start + 1)}-1",
        "elsewhere": f"{me._replace(host='0' * 12)}-1",
        "elsewhere, old": f"{me._replace(host='0' * 12)}-2",
        "foreign": "entry-young",
        "foreign, old": "entry-ancient",
        "mine, old": f"{me}-2",
    }
    for what, name in staged.items():
        path = root / "tmp" / name
        path.write_bytes(b"x")
        if "old" in what:
            os.utime(path, (hour_ago, hour_ago))
    if when == "open":
        FileStreamProgramCache(root)
    elif when == "clear":
        store.clear()
    else:
        store[b"k"] = b"v"
    left = {path.name for path in (root / "tmp").iterdir()}
    assert {what for what, name in staged.items() if name in left} == {"mine", "elsewhere", "foreign", "mine, old"}


def test_staging_files_of_live_writers_count_towards_the_cap(tmp_path):
    root = tmp_path / "cache"
    store = FileStreamProgramCache(root, max_size_bytes=4000)
    store[b"a"] = b"a" * 1500
    store[b"b"] = b"b" * 1500
    (root / "tmp" / f"{current_owner()}-999999").write_bytes(b"x" * 2500)
    fresh = FileStreamProgramCache(root, max_size_bytes=4000)
    fresh[b"c"] = b"c" * 200
    assert fresh.get(b"a") is None
    assert fresh.get(b"c") is not None


def test_a_write_gives_up_in_the_end(tmp_path, monkeypatch):
    """A write into a tree that keeps being removed ends with an error, not with an endless loop."""
    store = FileStreamProgramCache(tmp_path / "cache", strict=True)
    real = pairs.write_new

    def gone(path, data, **options):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        return real(path, data, **options)

    monkeypatch.setattr(pairs, "write_new", gone)
    monkeypatch.setattr(pairs, "time", SimpleNamespace(**(vars(time) | {"sleep": lambda _: None})))
    with pytest.raises(StoreError, match="No such file"):
        store[b"k"] = b"v"


def test_no_warning_where_nothing_is_wrong(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with FileStreamProgramCache(tmp_path / "cache", max_size_bytes=100) as store:
            for i in range(20):
                store[str(i)] = b"x" * 30


OTHER = 65534


@needs_root
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("bits", [0o2770, 0o2777, 0o700])
def test_files_of_other_rooms_are_as_open_as_the_entries(bits):
    """Every user of a shared root can read and replace its leases, manifests and histories."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o711)
        root = os.path.join(folder, "cache")
        os.mkdir(root)
        os.chown(root, 0, OTHER)
        os.chmod(root, bits)
        FileStreamProgramCache(root).close()
        paths = [os.path.join(root, "leases", "flight"), os.path.join(root, "manifests", "ab", "cdef")]
        for path in paths:
            write_beside(root, path, b"root's", new=True)
            with pytest.raises(FileExistsError):
                write_beside(root, path, b"another's", new=True)

        def as_other():
            for path in paths:
                if bits == 0o700:
                    with pytest.raises(PermissionError):
                        write_beside(root, path, b"other's")
                else:
                    write_beside(root, path, b"other's")
                    write_beside(root, path + " beside", b"other's", new=True)

        child = os.fork()
        if not child:
            status = 1
            try:
                os.setgroups([])
                os.setresgid(OTHER, OTHER, OTHER)
                os.setresuid(OTHER, OTHER, OTHER)
                as_other()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        for path in paths:
            with open(path, "rb") as file:
                assert file.read() == (b"root's" if bits == 0o700 else b"other's")
            assert {name.split()[0] for name in os.listdir(os.path.dirname(path))} == {os.path.basename(path)}

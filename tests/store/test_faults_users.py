# SPDX-License-Identifier: Apache-2.0
"""Several users on one directory, and directories that turn read-only; with real user ids and mounts, as root."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import stat
import subprocess
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest
from faults_values import assert_works, check_lookups, entry_path, publish, settle, staged

from cuda_progcache.errors import ProgCacheWarning, StoreError, UnsafeRootError
from cuda_progcache.store import FileStreamProgramCache

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root (user ids, mount)"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

ANNA, BERT, GROUP = 20001, 20002, 20000


@pytest.fixture
def place():
    """A temporary directory that other users can enter; pytest's own are closed to them at every level."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        yield Path(directory)


def as_user(user, action, *, umask=0o022, group=GROUP, groups=()):
    """Run ``action`` in a child process as ``user``; fail with the child's traceback."""
    start_as_user(user, action, umask=umask, group=group, groups=groups)()


def start_as_user(user, action, *, umask=0o022, group=GROUP, groups=()):
    """Start ``action`` as :func:`as_user` does; return a function that waits for its end."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(300)
            os.close(read)
            os.setgroups(groups)
            os.setgid(group)
            os.setuid(user)
            os.umask(umask)
            warnings.simplefilter("error")
            action()
            status = 0
        except BaseException:  # noqa: BLE001 - the test must see whatever it is
            os.write(write, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(status)
    os.close(write)

    def wait():
        with open(read, "rb") as said:
            errors = said.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0, errors

    return wait


def shared_place(place, mode):
    root = place / "cache"
    root.mkdir()
    os.chown(root, 0, GROUP)
    root.chmod(mode)
    return root


@pytest.mark.parametrize("cap", [None, 50_000])
def test_a_shared_setgid_directory(place, cap):
    """Two users with umask 002 can open, read, replace, remove, evict and clear each other's entries."""
    root = shared_place(place, 0o2770)
    keys = [b"key%d" % i for i in range(4)]

    def work(who, turn, hits):
        store = FileStreamProgramCache(root, shared=True, durability="none", max_size_bytes=cap)
        assert sum(check_lookups(store, key) for key in keys) == hits
        for key in keys:
            assert publish(store, key, who, turn)
            assert check_lookups(store, key) == 2
        for i in range(20):
            assert publish(store, b"more-%d" % i, who, turn * 100 + i)
        for key in keys:
            assert publish(store, key, who, turn)
        stats = store.stats()
        assert (stats.dropped, stats.read_errors, stats.corrupt) == (0, 0, 0)
        assert cap is None or stats.bytes <= cap

    for turn in range(1, 4):
        as_user(ANNA, functools.partial(work, 1, turn, 0 if turn == 1 else 8), umask=0o002)
        as_user(BERT, functools.partial(work, 2, turn, 8), umask=0o002)
    digest_owner = entry_path(root, keys[0]).stat()
    assert (digest_owner.st_uid, digest_owner.st_gid) == (BERT, GROUP)

    def remove():
        store = FileStreamProgramCache(root, shared=True)
        del store[keys[0]]
        os.truncate(entry_path(root, keys[1]), 3)
        assert check_lookups(store, keys[1]) == 0, "damaged, and moved away by another user than its writer"
        assert not entry_path(root, keys[1]).exists()
        store.clear()
        assert len(store) == 0

    as_user(ANNA, remove, umask=0o002)
    as_user(BERT, lambda: work(2, 5, 0), umask=0o002)


#: Anna and Bert each have their own group and share one. Carla is in neither.
CARLA = 20003
ANNA_IN_GROUP = {"group": ANNA, "groups": [GROUP]}
BERT_IN_GROUP = {"group": BERT, "groups": [GROUP]}


@pytest.mark.parametrize("cap", [None, 50_000])
@pytest.mark.parametrize("bits", [0o770, 0o2770, 0o2775])
@pytest.mark.parametrize("owner", [0, ANNA])
def test_a_directory_that_its_mode_says_a_group_shares(place, owner, bits, cap):
    """Both group members can do everything, without ``shared=True`` and with the usual umask; strangers can't write."""
    root = shared_place(place, bits)
    os.chown(root, owner, GROUP)
    root.chmod(bits)
    keys = [b"key%d" % i for i in range(4)]

    def work(who, turn, hits):
        store = FileStreamProgramCache(root, durability="none", max_size_bytes=cap)
        assert sum(check_lookups(store, key) for key in keys) == hits
        for key in keys:
            assert publish(store, key, who, turn)
            assert check_lookups(store, key) == 2
        for i in range(20):
            assert publish(store, b"more-%d" % i, who, turn * 100 + i)
        for key in keys:
            assert publish(store, key, who, turn)
        del store[keys[0]]
        store[keys[0]] = b"new"
        assert store.pin(keys[0])
        store.unpin(keys[0])
        assert publish(store, keys[0], who, turn)
        stats = store.stats()
        assert (stats.dropped, stats.read_errors, stats.corrupt) == (0, 0, 0)
        assert cap is None or stats.bytes <= cap
        store.close()

    for turn in range(1, 3):
        as_user(ANNA, functools.partial(work, 1, turn, 0 if turn == 1 else 8), **ANNA_IN_GROUP)
        as_user(BERT, functools.partial(work, 2, turn, 8), **BERT_IN_GROUP)
    status = entry_path(root, keys[0]).stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (BERT, GROUP, 0o644)
    assert all(path.stat().st_gid == GROUP for path in root.rglob("*") if path.name != "CACHEDIR.TAG")

    def stranger():
        if owner != 0:
            with pytest.raises(UnsafeRootError, match=f"user id {owner}"):
                FileStreamProgramCache(root)
        elif bits & 0o005:  # root owns it, as a machine-wide cache: strangers can read but not write
            store = FileStreamProgramCache(root)
            assert sum(check_lookups(store, key) for key in keys) == 8
            with pytest.warns(ProgCacheWarning, match="Permission denied"):
                store[keys[0]] = b"mine"
            with pytest.raises(PermissionError):
                FileStreamProgramCache(root, strict=True)[keys[0]] = b"mine"

    as_user(CARLA, stranger, group=CARLA)

    def clear():
        store = FileStreamProgramCache(root)
        store.clear()
        assert len(store) == 0

    as_user(ANNA, clear, **ANNA_IN_GROUP)
    as_user(BERT, lambda: work(2, 5, 0), **BERT_IN_GROUP)


@pytest.mark.parametrize("bits", [0o770, 0o2770])
def test_two_users_fill_a_shared_directory_at_once(place, bits):
    """Neither user meets a directory that the other has created but not yet opened to the group."""
    root = shared_place(place, bits)
    as_user(ANNA, lambda: FileStreamProgramCache(root), **ANNA_IN_GROUP)

    def work(who):
        store = FileStreamProgramCache(root, durability="none")
        for i in range(300):
            assert publish(store, b"key%d" % i, who, i)
        stats = store.stats()
        assert (stats.stored, stats.dropped, stats.read_errors, stats.corrupt) == (300, 0, 0, 0)
        store.close()

    for wait in [
        start_as_user(ANNA, lambda: work(1), **ANNA_IN_GROUP),
        start_as_user(BERT, lambda: work(2), **BERT_IN_GROUP),
    ]:
        wait()
    as_user(BERT, lambda: _all_hit(root, 300), **BERT_IN_GROUP)
    assert staged(root) == []


def _all_hit(root, count):
    store = FileStreamProgramCache(root)
    assert sum(check_lookups(store, b"key%d" % i) for i in range(count)) == 2 * count


@pytest.mark.parametrize("owner", [0, ANNA])
def test_a_directory_that_everyone_can_write_to_is_refused(place, owner):
    """A directory that everyone can write to is refused unless it is setgid; sticky (as /tmp is) isn't enough."""
    root = shared_place(place, 0o777)
    os.chown(root, owner, GROUP)

    def refused():
        with pytest.raises(UnsafeRootError, match=r"everyone can write|user id") as excinfo:
            FileStreamProgramCache(root)
        assert excinfo.value.filename == str(root)
        assert isinstance(excinfo.value, PermissionError)

    for bits in (0o777, 0o1777, 0o707):
        root.chmod(bits)
        for user in (ANNA, BERT, CARLA):
            as_user(user, refused)
    root.chmod(0o1777)
    as_user(BERT, lambda: publish(FileStreamProgramCache(root, shared=True), b"k", 1, 1))


def test_a_setgid_directory_that_everyone_can_write_to_is_shared_with_everyone(place):
    root = shared_place(place, 0o2777)

    def use(who):
        store = FileStreamProgramCache(root, max_size_bytes=1_000_000)
        for i in range(40):
            check_lookups(store, b"key%d" % i)
            assert publish(store, b"key%d" % i, who, 1)
        store.close()

    for who, user in enumerate((ANNA, BERT, CARLA)):
        as_user(user, lambda who=who: use(who), umask=0o022)
        as_user(BERT, lambda: _all_hit(root, 40))


def test_a_default_directory_that_another_user_fills(place, monkeypatch):
    """If root owns a readable default directory, its entries are hits; new ones stay in memory, with one warning."""
    root = shared_place(place, 0o755)
    writer = FileStreamProgramCache(root, shared=True)
    assert publish(writer, b"k", 1, 1)
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(root))

    def reads():
        with pytest.warns(ProgCacheWarning, match="CUDA_PROGCACHE_DIR") as caught:
            store = FileStreamProgramCache()
            for _ in range(2):
                assert check_lookups(store, b"k") == 2
                assert check_lookups(store, b"mine") == 0
            assert publish(store, b"mine", 2, 2)
            assert check_lookups(store, b"mine") == 2
        assert len(caught) == 1
        assert str(root) in str(caught[0].message)
        assert len(store) == 2
        store.close()

    as_user(BERT, reads)
    assert check_lookups(writer, b"mine") == 0
    (root / "entries").chmod(0o700)

    def keeps_in_memory():
        with pytest.warns(ProgCacheWarning, match="kept in memory only") as caught:
            store = FileStreamProgramCache()
            assert publish(store, b"k", 2, 2)
            assert check_lookups(store, b"k") == 2
        assert len(caught) == 1

    as_user(BERT, keeps_in_memory)


def test_the_umask_of_another_user(place):
    """Umask 077, 022 or 027 shuts other users out of new files: they get misses, dropped writes and a warning."""
    root = shared_place(place, 0o2770)
    keys = [b"key%d" % i for i in range(6)]
    as_user(ANNA, lambda: FileStreamProgramCache(root, shared=True), umask=0o002)

    def write(who):
        store = FileStreamProgramCache(root, shared=True)
        for key in keys[:3]:
            assert publish(store, key, who, 1)
            assert check_lookups(store, key) == 2

    def meet(who):
        store = FileStreamProgramCache(root, shared=True, max_size_bytes=20_000)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for key in keys:
                check_lookups(store, key)
                kept = publish(store, key, who, 2)
                assert check_lookups(store, key) in ({2} if kept else {0, 2})
            for key in keys:
                with contextlib.suppress(StoreError, KeyError):
                    del store[key]
            with contextlib.suppress(StoreError):
                store.clear()
            store.stats(), list(store.entries()), len(store)
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == len(set(texts)) <= 2, texts

    for umask in (0o077, 0o022, 0o027):
        as_user(ANNA, lambda: write(1), umask=umask)
        as_user(BERT, lambda: meet(2), umask=0o002)
        as_user(ANNA, lambda: FileStreamProgramCache(root, shared=True).clear(), umask=umask)


def test_a_private_directory_of_another_user_is_refused(place):
    place.chmod(0o777)
    root = place / "cache"
    as_user(ANNA, lambda: publish(FileStreamProgramCache(root), b"k", 1, 1))
    assert stat.S_IMODE(root.stat().st_mode) == 0o700

    def refused(expected, **options):
        with pytest.raises(expected) as excinfo:
            FileStreamProgramCache(root, **options)
        assert str(root) in str(excinfo.value)

    as_user(BERT, lambda: refused(UnsafeRootError))
    os.chmod(root, 0o755)  # others may read, but Anna owns it, and her entries would run on Bert's GPU
    as_user(BERT, lambda: refused(UnsafeRootError))
    os.chmod(root, 0o777)
    as_user(ANNA, lambda: refused(UnsafeRootError))
    as_user(BERT, lambda: refused(UnsafeRootError))

    def planted():
        os.environ["CUDA_PROGCACHE_DIR"] = str(root)
        with pytest.raises(UnsafeRootError):
            FileStreamProgramCache()

    as_user(BERT, planted)


def test_a_sticky_directory_like_tmp(place):
    """In a shared root of mode 1777 nobody can remove another user's staging file; it is left and does no harm."""
    root = shared_place(place, 0o1777)
    as_user(ANNA, lambda: publish(FileStreamProgramCache(root, shared=True), b"k", 1, 1), umask=0)
    assert stat.S_IMODE((root / "tmp").stat().st_mode) == 0o1777
    foreign = root / "tmp" / "000000000000-000000000000-1-1-1"
    foreign.write_bytes(b"x" * 100)
    os.chown(foreign, ANNA, GROUP)
    os.utime(foreign, (0, 0))  # old and without a live owner, so a user with permission removes it

    def bert():
        store = FileStreamProgramCache(root, shared=True, max_size_bytes=10_000)
        assert check_lookups(store, b"k") == 2
        assert publish(store, b"k", 2, 2)
        assert check_lookups(store, b"k") == 2
        with pytest.raises(PermissionError):
            foreign.unlink()
        with pytest.raises(PermissionError):
            foreign.rename(root / "tmp" / "mine")

    as_user(BERT, bert, umask=0)
    assert staged(root) == [foreign.name]
    as_user(ANNA, lambda: FileStreamProgramCache(root, shared=True), umask=0)
    assert staged(root) == []


@contextlib.contextmanager
def tmpfs(at):
    at.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "tmpfs", str(at)], check=True)
    try:
        yield at / "cache"
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


def refuses_writes(store, code):
    """Assert that reads still work and writes do nothing, with one warning in all; a strict store raises."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert check_lookups(store, b"k") == 2
            assert check_lookups(store, b"never") == 0
            assert publish(store, b"new", 1, 1) is False
            assert publish(store, b"k", 1, 2) is False
            store[b"new"] = b"v"
            del store[b"k"]
            store.clear()
    assert len(caught) == 1
    strict = FileStreamProgramCache(store.path, max_size_bytes=store._max_size_bytes, strict=True)
    for action in (lambda: strict.__setitem__(b"new", b"v"), lambda: strict.__delitem__(b"k"), strict.clear):
        with pytest.raises(StoreError) as excinfo:
            action()
        assert excinfo.value.errno == code
        assert str(store.path) in str(excinfo.value)
    assert check_lookups(store, b"k") == 2
    assert check_lookups(store, b"damaged") == 0
    assert len(store) >= 1
    assert list(store.entries())
    store.close()


def written(root):
    return {path: (path.lstat().st_ino, path.lstat().st_mtime_ns, path.lstat().st_ctime_ns) for path in root.rglob("*")}


@pytest.mark.parametrize("cap", [None, 3000])
def test_a_read_only_bind_mount(tmp_path, cap):
    with tmpfs(tmp_path / "disk") as root:
        writer = FileStreamProgramCache(root)
        assert publish(writer, b"k", 1, 1)
        assert publish(writer, b"damaged", 1, 1)
        os.truncate(entry_path(root, b"damaged"), 5)
        seen = tmp_path / "seen"
        seen.mkdir()
        subprocess.run(["mount", "--bind", str(root), str(seen)], check=True)
        try:
            subprocess.run(["mount", "-o", "remount,bind,ro", str(seen)], check=True)
            settle()
            before = written(root)
            store = FileStreamProgramCache(seen, max_size_bytes=cap)
            refuses_writes(store, errno.EROFS)
            assert written(root) == before
            assert publish(writer, b"k", 1, 3), "the other side still writes"
            assert check_lookups(store, b"k") == 2
        finally:
            subprocess.run(["umount", "-l", str(seen)], check=True)
        assert_works(root)


@pytest.mark.parametrize("cap", [None, 30_000])
def test_a_file_system_that_turns_read_only_and_back(tmp_path, cap):
    """ext4 remounts itself read-only at its first error."""
    with tmpfs(tmp_path / "disk") as root:
        store = FileStreamProgramCache(root, max_size_bytes=cap)
        assert publish(store, b"k", 1, 1)
        assert publish(store, b"damaged", 1, 1)
        os.truncate(entry_path(root, b"damaged"), 5)
        settle()
        assert check_lookups(store, b"k") == 2
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        try:
            refuses_writes(store, errno.EROFS)
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(tmp_path / "disk")], check=True)
        assert publish(store, b"new", 1, 4)
        assert check_lookups(store, b"new") == 2
        assert check_lookups(store, b"damaged") == 0
        assert publish(store, b"damaged", 1, 5)
        assert check_lookups(store, b"damaged") == 2
        assert staged(root) == []
        assert_works(root)

# SPDX-License-Identifier: Apache-2.0
"""Every removal of files from a store: del, clear, eviction, prune, quarantine and repair.

Between the check of a file and its removal, another process may put a new one in its place. So nothing is unlinked in
place: a file is renamed into ``removed/``, checked *there*, where nobody replaces it, and put back if it isn't the one
to remove. A record is removed after its entry, and only if there is no entry by then, neither in place nor moved aside
by a process that may put it back. After publishing, a writer checks that its record and entry are both there, and
otherwise writes them again (:func:`cuda_progcache.store.pairs.publish`). A process that puts an entry back checks that
a record vouches for it, and otherwise removes it after all. So no completed write is lost, and no entry stays without a
record that vouches for it.

If a process is killed, the next one that opens the store puts back what it had moved aside (:func:`reclaim`), if that
is intact and nothing has replaced it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat

from cuda_progcache._util import files
from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.files import Identity, identity, is_missing, is_sharing_violation
from cuda_progcache._util.liveness import current_owner, is_left_behind
from cuda_progcache._util.parallel import for_each
from cuda_progcache.store.judge import DAMAGE, NO_RECORD, look, lstat
from cuda_progcache.store.root import Root, is_shard, scan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

#: The number of damaged files kept for inspection; the oldest are removed first.
QUARANTINE_KEEP = 16
#: The quarantine's share of a store's size cap is one in this many.
QUARANTINE_SHARE = 16
_ENTRY, _RECORD = "e", "r"

_serial = itertools.count()
#: What threads of this process have moved aside and are working on; other files with our name were left by errors.
_under_way: set[str] = set()


def take_away(
    root: Root,
    digest: str,
    seen: Identity,
    *,
    keep: bool = False,
    keep_record: bool = True,
    unless_pinned: bool = False,
) -> bool:
    """Remove an entry and its record, if the entry is still the file that was checked.

    Parameters
    ----------
    seen : Identity
        The identity of the entry, or of whatever is in its place.
    keep, keep_record : bool
        Move it to the quarantine, with its record.
    unless_pinned : bool
        Keep it if it is pinned. This is checked after it was moved aside, so every pin completed before that holds.

    Returns
    -------
    bool
        Whether this call removed it. ``False`` if it was replaced or removed by others, is pinned, or is open in
        another process (Windows).

    Raises
    ------
    OSError
        The directory can't be written.
    """
    path = root.entry_path(digest)
    try:
        if root.read_only or identity(os.lstat(path)) != seen:
            return False
        aside = _move_aside(root, path, _ENTRY + digest)
    except OSError as exc:
        if is_missing(exc) or is_sharing_violation(exc):
            return False
        raise
    try:
        return _settle(root, digest, aside, seen, keep=keep, keep_record=keep_record, unless_pinned=unless_pinned)
    finally:
        _under_way.discard(aside)


def _settle(
    root: Root,
    digest: str,
    aside: str,
    seen: Identity,
    *,
    keep: bool,
    keep_record: bool,
    unless_pinned: bool,
) -> bool:
    """Check an entry that was moved aside, and remove it or put it back."""
    stays = True
    unvouched = DAMAGE
    try:
        if identity(os.lstat(aside)) == seen:
            stays = unless_pinned and root.is_pinned(digest)
        else:
            unvouched = DAMAGE | {NO_RECORD}
    except FileNotFoundError:
        return False  # the whole tree is being removed
    finally:
        if stays:  # also if its identity can't be determined
            _put_back_entry(root, digest, aside, unvouched)
    if stays:
        return False
    if not _dispose(root, aside, digest, keep=keep):
        _put_back_entry(root, digest, aside, frozenset())
        return False
    take_record(root, digest, keep=keep and keep_record)
    return True


def take_record(root: Root, digest: str, *, keep: bool = False) -> bool:
    """Remove the record of a missing entry; return whether it was removed.

    Raises
    ------
    OSError
        The directory can't be written.
    """
    entry, path = root.entry_path(digest), root.record_path(digest)
    if os.path.lexists(entry):
        return False
    try:
        aside = _move_aside(root, path, _RECORD + digest)
    except OSError as exc:
        if is_missing(exc) or is_sharing_violation(exc):
            return False
        raise
    try:
        if is_there(root, digest):
            _put_back(root, digest, aside, path)  # it is the entry's record; if not, its writer writes both again
            return False
        _dispose(root, aside, digest, keep=keep)
    finally:
        _under_way.discard(aside)
    return True


def is_there(root: Root, digest: str) -> bool:
    """Whether the entry is in place, or was moved aside by a process that may put it back."""
    # While it is put back, it is in both places, never in neither. So checking one, the other and the first again finds
    # it.
    path = root.entry_path(digest)
    return os.path.lexists(path) or _is_aside(root, _ENTRY + digest) or os.path.lexists(path)


def _is_aside(root: Root, about: str) -> bool:
    with contextlib.suppress(OSError):
        return any(name.endswith("." + about) for name in os.listdir(root.removed))
    return False


def set_aside(root: Root, path: str, seen: Identity) -> bool:
    """Move a file that belongs to no pair into the quarantine, if it is still the file that was ``seen``.

    Returns
    -------
    bool
        ``False`` if something else is there by now, or the directory can't be written.
    """
    try:
        if root.read_only or identity(os.lstat(path)) != seen:
            return False
        aside = _move_aside(root, path, "")
        try:
            if identity(os.lstat(aside)) != seen:
                try:
                    files.move_new(aside, path)
                except FileExistsError:
                    _discard(aside)
                return False
            _dispose(root, aside, os.path.basename(os.path.dirname(path)) + os.path.basename(path), keep=True)
        finally:
            _under_way.discard(aside)
    except OSError:
        return False
    return True


def _move_aside(root: Root, path: str, about: str) -> str:
    aside = root.aside_path() + (f".{about}" if about else "")
    _under_way.add(aside)
    try:
        try:
            files.replace(path, aside)
        except FileNotFoundError:
            if os.path.isdir(root.removed):
                raise
            root.mkdir(root.removed.rstrip(os.sep))
            files.replace(path, aside)
    except BaseException:
        _under_way.discard(aside)
        raise
    return aside


def _put_back_entry(root: Root, digest: str, aside: str, unvouched: frozenset[str]) -> None:
    """Put an entry back, and remove it after all if no record vouches for it (one of these verdicts).

    In that case it was replaced while it was aside, and the new entry is removed already or not in place yet.
    """
    if not _put_back(root, digest, aside, root.entry_path(digest)):
        return
    entry = None
    for _ in range(2):  # as in :func:`is_there`
        seen = look(root, digest, quietly=True, patient_with=frozenset())
        entry = seen.entry
        if seen.verdict not in unvouched or entry is None:
            return
        if _is_aside(root, _RECORD + digest):
            return  # whoever moved its record sees that the entry is there, or its writer sees that the record is gone
    if entry is not None:
        take_away(root, digest, identity(entry))


def _put_back(root: Root, digest: str, aside: str, path: str) -> bool:
    """Put a file back where it was. ``False`` if another one is there by now; then ours is removed."""
    for attempt in range(2):
        try:
            files.move_new(aside, path)
        except FileExistsError:
            break  # a newer one
        except FileNotFoundError:
            if attempt:
                break
            with contextlib.suppress(OSError):
                root.make_shard(digest)  # another process has removed the empty shard
        else:
            return True
    _discard(aside)
    return False


def _dispose(root: Root, aside: str, name: str, *, keep: bool) -> bool:
    """Remove or quarantine what was moved aside; ``False`` if another process has it open (Windows)."""
    if keep:
        target = f"{root.quarantine}{name}-{os.getpid()}-{next(_serial)}"
        for _ in range(2):
            try:
                files.replace(aside, target)
            except OSError:
                with contextlib.suppress(OSError):
                    if not os.path.isdir(root.quarantine):
                        files.unlink_quietly(root.quarantine.rstrip(os.sep))
                        root.mkdir(root.quarantine.rstrip(os.sep))
            else:
                trim_quarantine(root, keep=QUARANTINE_KEEP)
                return True
    try:
        files.unlink(aside)  # also if there is no quarantine: removing it is safe, too
    except OSError as exc:
        if is_sharing_violation(exc):
            return False
        _discard(aside)
    return True


def _discard(path: str) -> None:
    """Remove a file or a tree of ours; leave for later what can't be removed."""
    if not files.unlink_quietly(path):
        remove_tree(path)


def trim_quarantine(root: Root, *, keep: int = 0, at_most: int | None = None) -> int:
    """Remove all but the newest files in the quarantine.

    Parameters
    ----------
    keep : int
        The number of files to keep.
    at_most : int, optional
        The bytes that they may have in all.

    Returns
    -------
    int
        Bytes that are left.
    """
    found = []
    try:
        for item in scan(root.quarantine):
            with contextlib.suppress(FileNotFoundError):
                found.append((item.stat(follow_symlinks=False), item.path))
    except OSError:
        return 0  # not readable: a later process trims it
    found.sort(key=lambda one: -one[0].st_ctime_ns)  # the time when it was moved there
    left = 0
    for number, (status, path) in enumerate(found):
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        if number >= keep or (at_most is not None and left + size > at_most):
            _discard(path)
        else:
            left += size
    return left


def make_way(root: Root, digest: str) -> None:
    """Recreate the directories that a write of ``digest`` needs, and move what blocks it to the quarantine.

    For a write that met a concurrent ``rm -rf`` or ``clear()``, or a directory where a file should be.
    """
    shard = digest[:2]
    for directory in (root.staging, root.entries, root.records, root.entries + shard, root.records + shard):
        # A link to a directory is a user's choice of location; a dangling link is in the way.
        _clear_way(root, directory.rstrip(os.sep), blocks=lambda path, _: not os.path.isdir(path))
    root.rebuild(digest)
    for path in (root.entry_path(digest), root.record_path(digest)):
        _clear_way(root, path, blocks=lambda _, status: stat.S_ISDIR(status.st_mode))


def _clear_way(root: Root, path: str, *, blocks: Callable[[str, os.stat_result], bool]) -> None:
    try:
        status = os.lstat(path)
    except OSError:
        return  # nothing there
    if blocks(path, status):
        if path == root.staging.rstrip(os.sep):  # needed for moving anything aside
            os.unlink(path)
        else:
            set_aside(root, path, identity(status))


# What dead processes left behind


def reclaim(root: Root) -> int:
    """Put back or remove what dead processes left behind.

    Returns
    -------
    int
        Bytes of the files of live processes.
    """
    if root.read_only:
        return 0
    live = 0
    for path, status, dead in left_behind(root):
        about = path.rpartition(".")[2]
        if not dead:
            live += status.st_size if status.st_nlink == 1 else 0  # otherwise it is in its place as well
        elif is_digest(about[1:]) and about[:1] in {_ENTRY, _RECORD}:
            with contextlib.suppress(OSError):  # another user's
                _restore(root, about[1:], path, entry=about[0] == _ENTRY)
        elif files.unlink_quietly(path) or remove_tree(path):
            continue
        else:
            live += status.st_size
    return live


def left_behind(root: Root, *, leases: bool = True) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Staged files, files being removed, and leases: path, status, and whether the process is gone."""
    for directory in (root.staging, root.removed):
        try:
            items = scan(directory)
        except PermissionError:
            continue  # another user's cache, which we may only read
        for item in items:
            owner = item.name.partition(".")[0].rpartition("-")[0]
            try:
                status = item.stat(follow_symlinks=False)
            except OSError:
                continue  # its writer has just renamed it
            ours = directory is root.removed and owner == str(current_owner())
            dead = item.path not in _under_way if ours else is_left_behind(owner, status)
            yield item.path, status, dead
    if leases:
        yield from _leases(root)


def at_work(root: Root) -> set[str]:
    """The files that live processes have currently staged or moved aside."""
    return {path for path, _, dead in left_behind(root, leases=False) if not dead}


def _leases(root: Root) -> Iterator[tuple[str, os.stat_result, bool]]:
    """The leases of compiles under way; each names its holder."""
    with contextlib.suppress(OSError):
        for item in scan(os.path.join(root.path, "leases")):
            with contextlib.suppress(OSError):
                holder, status = files.read_regular(item.path)
                yield item.path, status, is_left_behind((holder or b"").decode("ascii", "replace"), status)


def _restore(root: Root, digest: str, aside: str, *, entry: bool) -> None:
    """Put back what a process had moved aside when it was killed, unless it was to be removed, or was replaced."""
    if entry:
        if not os.path.lexists(root.entry_path(digest)) and os.path.lexists(root.record_path(digest)):
            _put_back_entry(root, digest, aside, DAMAGE | {NO_RECORD})
    elif os.path.lexists(root.entry_path(digest)) and not os.path.lexists(root.record_path(digest)):
        _put_back(root, digest, aside, root.record_path(digest))
    _discard(aside)


# Clearing the store


def clear(root: Root, *, spared: frozenset[str] = frozenset()) -> None:
    """Remove the entries and records, except these digests and what is published meanwhile.

    Raises
    ------
    OSError
        The directory can't be written.
    """
    if not spared and _clear_at_once(root):
        return
    shards = root.shards()
    looked = itertools.chain.from_iterable(_look_at_shard(root, shard) for shard in shards)

    def take(item: tuple[str, str, os.stat_result | None]) -> None:
        path, digest, status = item
        if not is_digest(digest):
            if status is not None:
                set_aside(root, path, identity(status))
        elif digest not in spared:
            if status is None:
                take_record(root, digest)
            else:
                take_away(root, digest, identity(status), keep=stat.S_ISDIR(status.st_mode))

    for_each(looked, take)
    for tree, shard in itertools.product((root.entries, root.records), shards):
        with contextlib.suppress(OSError):  # not empty: something was just published there
            os.rmdir(tree + shard)


def _look_at_shard(root: Root, shard: str) -> Iterator[tuple[str, str, os.stat_result | None]]:
    """The files of a shard: path, digest, and the status of entries and of foreign files."""
    entries = root.names(root.entries, shard)
    for name in entries:
        path = root.entries + shard + os.sep + name
        yield path, shard + name, lstat(path)
    for name in root.names(root.records, shard) - entries:
        path = root.records + shard + os.sep + name
        yield path, shard + name, None if is_digest(shard + name) else lstat(path)


def _clear_at_once(root: Root) -> bool:
    """Replace both trees by empty ones, and remove the old ones; ``False`` if they can't be renamed."""
    asides = []
    # Records first: if an entry is published in between, its writer writes the record again, and both stay or go.
    for tree in (root.records.rstrip(os.sep), root.entries.rstrip(os.sep)):
        try:
            if not stat.S_ISDIR(os.lstat(tree).st_mode):
                break  # a link to another place
            asides.append(_move_aside(root, tree, ""))
        except FileNotFoundError:
            continue
        except OSError:
            break  # a mount, another user's, or open (Windows)
        root.mkdir(tree)
    else:
        return all([_remove_aside(aside) for aside in asides])  # noqa: C419 - all of them
    for aside in asides:
        _remove_aside(aside)
    return False


def _remove_aside(aside: str) -> bool:
    try:
        return remove_tree(aside)
    finally:
        _under_way.discard(aside)


def remove_tree(path: str) -> bool:
    """Remove a directory and everything in it, in parallel if that helps; return whether it is gone."""
    try:
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            return False
        inner = [item.path for item in scan(path) if item.is_dir(follow_symlinks=False)]
        if inner:
            for_each(inner, remove_tree)
        for item in scan(path):
            files.unlink_quietly(item.path)
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def foreign(root: Root) -> Iterable[tuple[str, Identity]]:
    """Files in ``entries`` and ``records`` whose names aren't those of shards, or of files in a shard."""
    for tree in (root.entries, root.records):
        for shard in sorted(root.names(tree, "")):
            status = lstat(tree + shard)
            if status is None:
                continue
            if not is_shard(shard) or not stat.S_ISDIR(status.st_mode):
                yield tree + shard, identity(status)
                continue
            for name in sorted(root.names(tree, shard)):
                path = tree + shard + os.sep + name
                inner = None if is_digest(shard + name) else lstat(path)
                if inner is not None:
                    yield path, identity(inner)

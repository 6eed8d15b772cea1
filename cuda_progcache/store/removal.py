# SPDX-License-Identifier: Apache-2.0
"""Whatever takes files away from a store: del, clear, eviction, prune, quarantine and repair.

Between a look at a file and its removal another process may put a new one there. So nothing is unlinked in place: it is
renamed into ``removed/``, looked at *there*, where nobody replaces it, and put back if it is not what was to go.
A record goes after its entry, and only if there is no entry by now, neither in its place nor moved aside by somebody
who may put it back. A writer looks afterwards whether its record lies beside its entry, and else writes both again
(:func:`cuda_progcache.store.pairs.publish`); who puts an entry back looks whether a record vouches for it, and else
takes it away after all. So no write that returned is lost, and no entry stays without a record that vouches for it.

What a process has moved aside when it is killed is put back by the next one that looks (:func:`reclaim`), if it is
whole and nothing else lies there.
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

#: Damaged files kept for a look at them; the oldest go first.
QUARANTINE_KEEP = 16
#: Of a store's size cap, what they may take.
QUARANTINE_SHARE = 16
_ENTRY, _RECORD = "e", "r"

_serial = itertools.count()
#: What threads of this process have moved aside and not yet dealt with; what else bears our name was left by trouble.
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
    """Remove an entry and its record, if the entry is still the one that was looked at.

    Parameters
    ----------
    seen : Identity
        Of the entry, or of what lies in its place.
    keep, keep_record : bool
        Move it to the quarantine, with its record.
    unless_pinned : bool
        Leave it if it is pinned; asked when it has been moved aside, so that a pin that returned before holds.

    Returns
    -------
    bool
        Whether it went by our hand. ``False``: another one lies there by now, or none, or it is pinned; or it is held
        open (Windows).

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
    """Look at an entry that was moved aside, and do away with it or put it back."""
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
        if stays:  # also where nobody can say what it is
            _put_back_entry(root, digest, aside, unvouched)
    if stays:
        return False
    if not _dispose(root, aside, digest, keep=keep):
        _put_back_entry(root, digest, aside, frozenset())
        return False
    take_record(root, digest, keep=keep and keep_record)
    return True


def take_record(root: Root, digest: str, *, keep: bool = False) -> bool:
    """Remove the record of an entry that isn't there; whether it went.

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
            _put_back(root, digest, aside, path)  # that entry's, or its writer writes both again
            return False
        _dispose(root, aside, digest, keep=keep)
    finally:
        _under_way.discard(aside)
    return True


def is_there(root: Root, digest: str) -> bool:
    """Whether the entry lies in its place, or somebody has moved it aside and may put it back."""
    # Put back, it is in both places for a moment, never in none: who looks at one, the other and the one, finds it.
    path = root.entry_path(digest)
    return os.path.lexists(path) or _is_aside(root, _ENTRY + digest) or os.path.lexists(path)


def _is_aside(root: Root, about: str) -> bool:
    with contextlib.suppress(OSError):
        return any(name.endswith("." + about) for name in os.listdir(root.removed))
    return False


def set_aside(root: Root, path: str, seen: Identity) -> bool:
    """Move what is no part of any pair into the quarantine, if it is still what was ``seen``.

    Returns
    -------
    bool
        ``False``: something else lies there by now, or the directory can't be written.
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
    """Put an entry back, and take it away after all if no record vouches for it (one of these verdicts).

    It was replaced then while it was aside, and that entry removed, or its writer is on the way.
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
            return  # who has moved its record sees that it is there; or its writer does, that its record went
    if entry is not None:
        take_away(root, digest, identity(entry))


def _put_back(root: Root, digest: str, aside: str, path: str) -> bool:
    """Put something back where it was. ``False`` if another one lies there by now; then ours is removed."""
    for attempt in range(2):
        try:
            files.move_new(aside, path)
        except FileExistsError:
            break  # a newer one
        except FileNotFoundError:
            if attempt:
                break
            with contextlib.suppress(OSError):
                root.make_shard(digest)  # it was empty, and somebody has removed it
        else:
            return True
    _discard(aside)
    return False


def _dispose(root: Root, aside: str, name: str, *, keep: bool) -> bool:
    """Do away with what was moved aside; ``False``: another process has it open (Windows)."""
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
        files.unlink(aside)  # also where no quarantine can be had: gone is safe, too
    except OSError as exc:
        if is_sharing_violation(exc):
            return False
        _discard(aside)
    return True


def _discard(path: str) -> None:
    """Remove a file or a tree of ours; what can't be removed is left for later."""
    if not files.unlink_quietly(path):
        remove_tree(path)


def trim_quarantine(root: Root, *, keep: int = 0, at_most: int | None = None) -> int:
    """Remove all but the youngest things in the quarantine.

    Parameters
    ----------
    keep : int
        How many may stay.
    at_most : int, optional
        How many bytes they may have.

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
        return 0  # closed to us, or in trouble: the next one trims it
    found.sort(key=lambda one: -one[0].st_ctime_ns)  # when it was moved there
    left = 0
    for number, (status, path) in enumerate(found):
        size = status.st_size if stat.S_ISREG(status.st_mode) else 0
        if number >= keep or (at_most is not None and left + size > at_most):
            _discard(path)
        else:
            left += size
    return left


def make_way(root: Root, digest: str) -> None:
    """Make everything again that a write of ``digest`` needs, and move what blocks it to the quarantine.

    For a write that ran into a ``rm -rf``, a ``clear()`` or a directory where a file should be.
    """
    shard = digest[:2]
    for directory in (root.staging, root.entries, root.records, root.entries + shard, root.records + shard):
        # A link to a directory is someone's choice of another place; one that leads nowhere is in the way.
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
        if path == root.staging.rstrip(os.sep):  # nothing can be moved aside without it
            os.unlink(path)
        else:
            set_aside(root, path, identity(status))


# What dead processes have left


def reclaim(root: Root) -> int:
    """Put back or remove what dead processes have left.

    Returns
    -------
    int
        Bytes of the files of live ones.
    """
    if root.read_only:
        return 0
    live = 0
    for path, status, dead in left_behind(root):
        about = path.rpartition(".")[2]
        if not dead:
            live += status.st_size if status.st_nlink == 1 else 0  # else it lies in its place as well
        elif is_digest(about[1:]) and about[:1] in {_ENTRY, _RECORD}:
            with contextlib.suppress(OSError):  # another user's
                _restore(root, about[1:], path, entry=about[0] == _ENTRY)
        elif files.unlink_quietly(path) or remove_tree(path):
            continue
        else:
            live += status.st_size
    return live


def left_behind(root: Root, *, leases: bool = True) -> Iterator[tuple[str, os.stat_result, bool]]:
    """What is staged, what is being removed, and leases: path, status, and whether its process is gone."""
    for directory in (root.staging, root.removed):
        try:
            items = scan(directory)
        except PermissionError:
            continue  # another user's cache, that we may only read
        for item in items:
            owner = item.name.partition(".")[0].rpartition("-")[0]
            try:
                status = item.stat(follow_symlinks=False)
            except OSError:
                continue  # its writer renamed it just now
            ours = directory is root.removed and owner == str(current_owner())
            dead = item.path not in _under_way if ours else is_left_behind(owner, status)
            yield item.path, status, dead
    if leases:
        yield from _leases(root)


def at_work(root: Root) -> set[str]:
    """What living processes have staged or moved aside just now."""
    return {path for path, _, dead in left_behind(root, leases=False) if not dead}


def _leases(root: Root) -> Iterator[tuple[str, os.stat_result, bool]]:
    """Those of compiles under way: each names its holder."""
    with contextlib.suppress(OSError):
        for item in scan(os.path.join(root.path, "leases")):
            with contextlib.suppress(OSError):
                holder, status = files.read_regular(item.path)
                yield item.path, status, is_left_behind((holder or b"").decode("ascii", "replace"), status)


def _restore(root: Root, digest: str, aside: str, *, entry: bool) -> None:
    """Put back what a process had moved aside when it was killed, unless it was to go, or there is another."""
    if entry:
        if not os.path.lexists(root.entry_path(digest)) and os.path.lexists(root.record_path(digest)):
            _put_back_entry(root, digest, aside, DAMAGE | {NO_RECORD})
    elif os.path.lexists(root.entry_path(digest)) and not os.path.lexists(root.record_path(digest)):
        _put_back(root, digest, aside, root.record_path(digest))
    _discard(aside)


# All of it


def clear(root: Root, *, spared: frozenset[str] = frozenset()) -> None:
    """Remove the entries and records, sparing these digests, and what is published meanwhile.

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
        with contextlib.suppress(OSError):  # not empty: a writer has just published there
            os.rmdir(tree + shard)


def _look_at_shard(root: Root, shard: str) -> Iterator[tuple[str, str, os.stat_result | None]]:
    """What lies in a shard: path, digest, and the status of entries and of what doesn't belong there."""
    entries = root.names(root.entries, shard)
    for name in entries:
        path = root.entries + shard + os.sep + name
        yield path, shard + name, lstat(path)
    for name in root.names(root.records, shard) - entries:
        path = root.records + shard + os.sep + name
        yield path, shard + name, None if is_digest(shard + name) else lstat(path)


def _clear_at_once(root: Root) -> bool:
    """Rename both trees, make empty ones in their place, remove the old; ``False`` where that can't be done."""
    asides = []
    # Records first: an entry that comes between has its record written again by its writer, and goes or stays with it.
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
    """Remove a directory and all in it, in parallel where that helps; whether it is gone."""
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
    """What lies in ``entries`` and ``records`` and bears no name of a shard, or in a shard and none of a file."""
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

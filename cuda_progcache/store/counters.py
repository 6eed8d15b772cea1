# SPDX-License-Identifier: Apache-2.0
"""Counters that outlive the process: what the store objects of all processes on one directory have counted.

A lookup counts in memory. What was counted since is written at ``close()``, at exit and every :data:`INTERVAL` of
writing, as a small new file under ``counters/``, by rename. In the same step a writer takes in its own file before and
those of dead processes, so that there are about as many files as processes at work. Exactly once, whoever dies when:

1. a file is taken by renaming it to a name of the taker's: one taker gets it;
2. the taker's new file has the sum, and the ids of the files it took;
3. then these are removed. Until then (a crash in between) whoever adds up leaves out a file that another one has taken.

Files of a process whose life can't be asked after (another machine's) are taken when they are a day old; it will find
its file gone and go on with a new one. Lost are the counts of a process that is killed, or ends by ``os._exit``, since
its last file; a lookup counts its hit or miss in one step, so that what is there adds up.
"""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
import time
import weakref

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.files import read_regular, replace, unlink_quietly, write_new
from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache.store.stats import Counters, Totals

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.store.root import Root

FORMAT = 1
#: Seconds of writing after which the counters are written down, too.
INTERVAL = 5.0
#: Age in seconds from which the file of a process that can't be asked after is taken in.
FORGOTTEN = 86_400.0
#: Looks at a directory in which others write and remove.
_LOOKS = 20

_serial = itertools.count()


class _File(NamedTuple):
    id: str  # its first name; a taker renames it
    totals: Totals
    taken: tuple[str, ...]  # ids of the files that are in its sum, and may still lie there


class _Watched(NamedTuple):
    store: weakref.ref[object]
    counters: Counters


class Tally:
    """What the store objects of this process on one directory have counted; from :meth:`of`."""

    def __init__(self, root: Root) -> None:
        self._root = root
        self._directory = os.path.join(root.path, "counters") + os.sep
        self._watched: list[_Watched] = []
        self._reset()

    def _reset(self) -> None:
        self._written: dict[int, Totals] = {}  # by id() of the counters: what of them is in a file, or of one gone
        self._left = Totals()  # by store objects that are gone
        self._io = threading.RLock()  # of this class alone, and made anew in a forked child: held while files are read
        self._flushing = False
        self._due = time.monotonic() + INTERVAL

    @classmethod
    def of(cls, root: Root, store: object, counters: Counters) -> Tally:
        """The tally of a directory, which from now on counts what ``store`` counts."""
        for path, other in list(_tallies.items()):
            if all(watched.store() is None for watched in other._watched):
                other.flush()
                _tallies.pop(path, None)
        tally = _tallies.setdefault(root.path, cls(root))
        with tally._io:
            tally._watched.append(_Watched(weakref.ref(store), counters))
        _flush_at_end_of_worker()
        return tally

    def flush_if_due(self) -> None:
        """After a write: write the counters down, if that is long ago."""
        if time.monotonic() >= self._due:
            self.flush(wait=False)

    def flush(self, *, wait: bool = True) -> None:
        """Write down what was counted. Where that can't be done, it is counted in memory, and tried again later."""
        if not self._io.acquire(blocking=wait):
            return
        try:
            if not self._flushing:  # by a signal handler, out of a flush
                self._flushing = True
                self._due = time.monotonic() + INTERVAL
                self._flush()
        except OSError:
            self._due = time.monotonic() + 12 * INTERVAL  # read-only, full or gone
        finally:
            self._flushing = False
            self._io.release()

    def all_time(self) -> Totals:
        """What every process has written down, and what this one has yet to."""
        with self._io:
            return persisted(self._root).plus(self._unwritten()[0])

    def _let_go(self) -> None:
        for watched in [w for w in self._watched if w.store() is None]:
            counted = watched.counters.totals()
            self._left = self._left.plus(counted.minus(self._written.pop(id(watched.counters), Totals())))
            self._watched.remove(watched)

    def _unwritten(self) -> tuple[Totals, dict[int, Totals]]:
        total, now = self._left, {}
        for watched in self._watched:
            counted = now[id(watched.counters)] = watched.counters.totals()
            total = total.plus(counted.minus(self._written.get(id(watched.counters), Totals())))
        return total, now

    def _flush(self) -> None:
        self._let_go()
        total, now = self._unwritten()
        if not any(total):
            return
        self._root.mkdir(self._directory)
        # In this order: a process that is dead before the files are read has left all that it ever will.
        owners = {name: Owner.parse(name.rpartition("-")[0]) for name in _names(self._directory)}
        free = [name for name, owner in owners.items() if self._is_free(name, owner)]
        present = _read_all(self._directory)
        counted_elsewhere = {taken for file in present.values() for taken in file.taken}
        claimed: dict[str, _File] = {}
        for name in free:
            if name in present:
                mine = _new_name()
                try:
                    os.rename(self._directory + name, self._directory + mine)
                except OSError:
                    continue  # another process was faster
                claimed[mine] = present[name]
                if present[name].id not in counted_elsewhere:
                    total = total.plus(present[name].totals)
        ids = {file.id for file in present.values()}
        taken = {file.id for file in claimed.values()} | {
            one for file in claimed.values() for one in file.taken if one in ids
        }
        self._write(_File(_new_name(), total, tuple(sorted(taken))))
        self._written, self._left = now, Totals()
        for name in claimed:
            unlink_quietly(self._directory + name)

    def _is_free(self, name: str, owner: Owner | None) -> bool:
        if owner is None:
            return False  # not ours: whatever it is, it stays
        if owner == current_owner():
            return True
        alive = owner.is_alive()
        if alive is None:
            try:
                return time.time() - os.lstat(self._directory + name).st_mtime > FORGOTTEN
            except OSError:
                return False
        return not alive

    def _write(self, file: _File) -> None:
        staged = self._root.stage_path()
        try:
            write_new(staged, _encode(file), mode=self._root.file_mode, sync=False)
            replace(staged, self._directory + file.id)
        except BaseException:
            unlink_quietly(staged)
            raise


def persisted(root: Root) -> Totals:
    """What the processes on a directory have written down."""
    directory = os.path.join(root.path, "counters") + os.sep
    present: dict[str, _File] = {}
    for _ in range(_LOOKS):
        before = _names(directory)
        present = _read_all(directory)
        if before == _names(directory):
            break  # nobody took one in meanwhile
    by_id = {file.id: file for file in present.values()}
    taken = {one for file in by_id.values() for one in file.taken}
    total = Totals()
    for file in by_id.values():
        if file.id not in taken:
            total = total.plus(file.totals)
    return total


def _new_name() -> str:
    return f"{current_owner()}-{next(_serial)}"


def _is_name(text: str) -> bool:
    return Owner.parse(text.rpartition("-")[0]) is not None and text.replace("-", "").isalnum()


def _names(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()


def _read_all(directory: str) -> dict[str, _File]:
    found = {}
    for name in _names(directory):
        file = _read(directory + name)
        if file is not None:
            found[name] = file
    return found


def _read(path: str) -> _File | None:
    """A file of counters; ``None`` for anything else that lies there."""
    try:
        raw, _ = read_regular(path)
        if raw and (file := _decode(raw)) is not None:
            return file
        import json

        content = json.loads(raw or b"")
        if content["format"] != FORMAT:
            return None
        counts = {name: int(content["counts"].get(name, 0)) for name in Totals._fields}
        file = _File(str(content["id"]), Totals(**counts), tuple(map(str, content["taken"])))
        return file if all(_is_name(name) for name in (file.id, *file.taken)) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# A file's JSON, without the json module: to import it takes longer than all else at the end of a short process.


def _encode(file: _File) -> bytes:
    counts = ", ".join([f'"{name}": {count}' for name, count in zip(Totals._fields, file.totals, strict=True)])
    taken = ", ".join([f'"{one}"' for one in file.taken])
    return f'{{"format": {FORMAT}, "id": "{file.id}", "counts": {{{counts}}}, "taken": [{taken}]}}'.encode()


def _decode(raw: bytes) -> _File | None:
    """A file just as :func:`_encode` writes it; ``None`` for what is written otherwise, another version's perhaps."""
    head, _, rest = raw.decode("utf-8", "replace").partition('"counts": {')
    counts, _, taken = rest.partition('}, "taken": [')
    try:
        totals = Totals(*[int(count.partition(": ")[2]) for count in counts.split(", ")])
        file = _File(head.split('"')[5], totals, tuple(taken.split('"')[1::2]))
    except (ValueError, TypeError, IndexError):
        return None
    return file if _encode(file) == raw else None


# The ends of processes, and their forks

_tallies: dict[str, Tally] = {}


def _flush_all() -> None:
    for tally in list(_tallies.values()):
        tally.flush()


def _start_at_zero() -> None:
    """In a forked child: what the parent has counted, the parent writes down."""
    for tally in _tallies.values():
        tally._reset()
        for watched in tally._watched:
            watched.counters.reset()
    _finalizers.clear()
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        # Its children end by os._exit, after its own finalizers, which it forgets as they start.
        util.register_after_fork(_start_at_zero, lambda _: _flush_at_end_of_worker())


_finalizers: list[object] = []


def _flush_at_end_of_worker() -> None:
    util = sys.modules.get("multiprocessing.util")
    if util is not None and not _finalizers:
        _finalizers.append(util.Finalize(None, _flush_all, exitpriority=0))


atexit.register(_flush_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_at_zero)

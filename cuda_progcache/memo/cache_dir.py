# SPDX-License-Identifier: Apache-2.0
r"""A directory of cached results as a cache, one file per result: ``<function>.<hash>.pkl``.

A file begins with a pickle of ``{"dat": value, "meta": {...}}``, as other tools
expect it, and continues where ``pickle.load`` stops::

    pickle | record | length of the pickle (8 bytes) | length of the record (8 bytes) | b"PROGMEM2"

The record is a checksum of the pickle and the record (8 hex digits) and the record of any call
(:mod:`~cuda_progcache.memo.storage.records`). Listing a directory reads the ends of files and unpickles nothing. A file
that another tool wrote has no record; only its name and its age are known.

Unpickling runs code, so a file is read only if nobody but the current user (or root) could have written it.

>>> from cuda_progcache.memo.cache_dir import directory_cache
>>> directory_cache("no such directory").query(name="load").count()
0
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import stat
import struct
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util import files, modes
from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache.errors import ProgCacheError
from cuda_progcache.memo.caches.base import Rejected
from cuda_progcache.memo.caches.cache import Cache
from cuda_progcache.memo.call import DigestedCall, Metadata, QueryCall, Unstored
from cuda_progcache.memo.storage import records
from cuda_progcache.memo.storage.base import CallMixin, StorageBackend, ValueMixin
from cuda_progcache.memo.storage.tree import is_private
from cuda_progcache.memo.tagged_json import SaveError, encode_json

if TYPE_CHECKING:
    from cuda_progcache.memo.digest import Digest

SUFFIX = ".pkl"
_FOOTER = struct.Struct(">QQ8s")
_MAGIC = b"PROGMEM2"
_ENTRY = re.compile(r"^(?P<fname>.+)\.(?P<hash>[0-9a-zA-Z_]+)\.pkl$")
_LEFTOVER = re.compile(r"\.pkl\.(?:(?P<kind>lock|computing|corrupt)(?:\.after-.*)?$|tmp\.(?P<owner>.*)$)")
SENTINEL = ".computing"
#: Marks the metadata of entries that have a record, so that an entry that lost it isn't taken for another tool's.
_RECORDED = "recorded"
#: The most bytes of JSON that an argument in the record may take; only the digest of a larger one is kept.
_SMALL = 1024


class RefusedError(ValueError):
    """A file can't be trusted, or is damaged; the message says why."""


class UntrustedError(RefusedError):
    """Others could have written a file, and unpickling it would run their code."""


class Entry(NamedTuple):
    """An entry as read from its file; ``call`` is None if another tool wrote the file."""

    value: Any
    meta: dict[str, Any]
    call: DigestedCall | None


def read(path: str) -> Entry:
    """Read an entry; RefusedError if it is damaged or others could have written it, OSError if it can't be read."""
    data, status = files.read_regular(path, largest=None)
    if data is None:
        raise RefusedError("it is not a regular file")
    if not (is_private(status) and is_private(os.stat(os.path.dirname(path) or "."))):
        raise UntrustedError("others can write it or its directory, and unpickling may run their code; run chmod go-w")
    call, length = _record_of(data)
    file = io.BytesIO(memoryview(data)[:length])
    try:
        found = pickle.load(file)  # noqa: S301 - written by this user or root
    except Exception as error:
        raise RefusedError(f"it can't be unpickled: {error}") from error
    known = isinstance(found, dict) and "dat" in found
    meta = found.get("meta") if known else {"legacy": True}
    meta = meta if isinstance(meta, dict) else {}
    if call is None and (file.tell() < length or _RECORDED in meta):
        raise RefusedError("it is truncated: its record is missing")
    return Entry(found["dat"] if known else found, meta, call)


def _record_of(data: bytes) -> tuple[DigestedCall | None, int]:
    """Return the record at the end of a file and the length of the pickle; None and the whole length without one."""
    if len(data) < _FOOTER.size or data[-8:] != _MAGIC:
        return None, len(data)
    length, size, _ = _FOOTER.unpack(data[-_FOOTER.size :])
    if length + size + _FOOTER.size != len(data):
        raise RefusedError("it is truncated")
    line = data[length : length + size]
    if not line.startswith(b"%08x" % zlib.crc32(line[8:], zlib.crc32(memoryview(data)[:length]))):
        raise RefusedError("its checksum doesn't match")
    try:
        return records.decode(line[8:]), length
    except records.DamagedRecordError as error:
        raise RefusedError(f"its record is damaged: {error}") from error


def read_record(path: str) -> DigestedCall | None:
    """Read an entry's record from the end of its file; None if there is none or it is damaged."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < _FOOTER.size:
            return None
        file.seek(size - _FOOTER.size)
        length, record, magic = _FOOTER.unpack(file.read(_FOOTER.size))
        if magic != _MAGIC or length + record + _FOOTER.size != size:
            return None
        file.seek(length + 8)
        try:
            return records.decode(file.read(record - 8))
        except records.DamagedRecordError:
            return None


def _write(path: str, data: bytes) -> None:
    """Write an entry atomically; OSError if the directory can't be written."""
    staged = f"{path}.tmp.{current_owner()}-{threading.get_ident()}"
    try:
        files.put_in_place(path, data, staged=staged, mode=0o644)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        files.put_in_place(path, data, staged=staged, mode=0o644)


class _Entries(StorageBackend):
    """The entries of a directory, by the keys in their records."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        # A record is valid as long as its file is the same: entries are replaced, never modified.
        self._known: dict[str, tuple[files.Identity, DigestedCall | None]] = {}
        self._paths: dict[Digest, str] = {}

    def put(self, value: Any, key: Digest) -> Digest:  # noqa: ARG002 - the backend's signature
        """Refuse to store a value alone, since an entry is a value with its call."""
        raise SaveError(f"can't store a value in {self.directory} without its call")

    def list(self) -> Iterable[Digest]:
        """Return the keys of the entries that have a record."""
        return tuple(self.calls())

    def calls(self) -> dict[Digest, DigestedCall]:
        """Return the calls by key; only new and changed files are opened."""
        found = {}
        known, self._known = self._known, {}
        paths = {}
        for row in rows(self.directory):
            identity = files.identity(row.status)
            before = known.get(row.path)
            try:
                call = before[1] if before is not None and before[0] == identity else read_record(row.path)
            except OSError:
                continue  # gone since
            self._known[row.path] = (identity, call)
            if call is not None:
                found[call.to_lookup_key()] = call
                paths[call.to_lookup_key()] = row.path
        self._paths = paths
        return found

    def path(self, key: Digest) -> str:
        """Return the path of a key's entry; KeyError if there is none."""
        path = self._paths.get(key, "")
        known = self._known.get(path)
        try:
            if known is not None and known[0] == files.identity(os.stat(path)):
                return path
        except OSError:
            pass  # gone or renamed; list the directory again
        self.calls()
        return self._paths[key]

    def _contains(self, key: Digest) -> bool:
        return key in self.calls()

    def _evict(self, key: Digest) -> None:
        if key in self.calls():
            files.unlink_quietly(self._paths[key])


class _Results(ValueMixin, _Entries):
    """The results in a directory, by the keys of their calls."""

    def get(self, key: Digest) -> Any:
        """Unpickle a result; KeyError if it is gone or damaged, or others could have written it."""
        try:
            return read(self.path(key)).value
        except (OSError, RefusedError):
            raise KeyError(key) from None


class _Calls(CallMixin, _Entries):
    """The records in a directory."""

    def get(self, key: Digest) -> DigestedCall:
        """Return the call of an entry."""
        return self.calls()[key]

    def query(self, template: QueryCall) -> Iterator[DigestedCall]:
        """Yield the calls that match a pattern; every record is compared."""
        yield from filter(template.matcher(), self.calls().values())

    def inline(self, value: Any) -> bytes | None:
        """Return an argument as JSON if it is small, otherwise None."""
        try:
            text = encode_json(value)
        except SaveError:
            return None
        return text if len(text) <= _SMALL else None


class DirectoryCache(Cache):
    """The calls whose results :func:`~cuda_progcache.memo.cache_file.cache_file` keeps in a directory.

    They can be queried, tabulated, transferred and evicted like any recorded call, and calls of other caches can be
    transferred to the directory. Each result belongs to one call, and its digest is the call's key. Only the digest of
    an argument that isn't small is kept.

    Parameters
    ----------
    directory : str
        The absolute path of the directory.
    fname : str, optional
        The function whose calls are looked up; without it, lookups read the records of all entries.
    algo : str
        The hash that file names are made with.
    """

    def __init__(self, directory: str, fname: str = "", algo: str = "xxhash64") -> None:
        super().__init__(_Results(directory), _Calls(directory))
        for name, value in (("directory", directory), ("fname", fname), ("algo", algo)):
            object.__setattr__(self, name, value)

    directory: str
    fname: str
    algo: str

    @property
    def leases(self) -> str:
        """The directory of lease files: the cache's own directory, in which they serve as sentinels."""
        return self.directory

    def short(self, key: Digest) -> str:
        """Return the digits of a key that file names contain; the record has the whole key."""
        return key if self.algo == "sha256" else key[:16]

    def stem(self, key: Digest, fname: str = "") -> str:
        """Return ``<function>.<hash>``, an entry's file name without its suffix."""
        return f"{file_safe(fname or self.fname)}.{self.short(key)}"

    def path(self, key: Digest, fname: str = "") -> str:
        """Return the path that a key's entry has or would have."""
        return os.path.join(self.directory, self.stem(key, fname) + SUFFIX)

    def find(self, key: Digest) -> tuple[Any, Metadata]:
        """Return the result and metadata of the call with this key; KeyError on a miss."""
        try:
            path = self.path(key) if self.fname else self.calls.path(key)  # type: ignore[attr-defined]
            entry = read(path)
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(key) from None
        except RefusedError as error:
            if not isinstance(error, UntrustedError):
                set_aside(path)
            raise RefusedError(f"{path} is ignored: {error}") from error
        if entry.call is None:
            return entry.value, {}  # another tool's entry, known by its name only
        if entry.call.to_lookup_key() != key:
            raise KeyError(key)  # two keys with the same short hash
        return entry.value, entry.call.metadata

    def _keep_argument(self, function: str, name: str, value: Any, key: Digest) -> Digest:  # noqa: ARG002
        return Unstored(key)

    def _file(self, call: DigestedCall, result: Any, *, live: bool = False) -> Digest:  # noqa: ARG002
        key = call.to_lookup_key()
        call = call.altered(result=key, key=key)
        meta = {**_pickled_metadata(call), "hash": self.short(key)}
        try:
            pickled = pickle.dumps({"dat": result, "meta": meta}, protocol=5)
        except Exception as error:
            raise Rejected(f"a result of type {type(result).__qualname__} can't be saved: {error}") from error
        record = records.encode(call, key)
        checksum = b"%08x" % zlib.crc32(record, zlib.crc32(pickled))
        text = checksum + record
        try:
            _write(self.path(key, call.name), b"".join((pickled, text, _FOOTER.pack(len(pickled), len(text), _MAGIC))))
        except OSError as error:
            raise Rejected(f"the result can't be saved in {self.directory}: {error}") from error
        return key

    def gc(self) -> set[Digest]:
        """Remove nothing, since every result belongs to a call."""
        return set()


def directory_cache(directory: str | os.PathLike[str]) -> DirectoryCache:
    """Return a cache of the results that ``cache_file`` keeps in a directory, which need not exist yet."""
    return DirectoryCache(os.path.abspath(os.fspath(directory)))


def _pickled_metadata(call: DigestedCall) -> dict[str, Any]:
    """Return the metadata that is pickled with the result for other tools."""
    inputs = call.metadata.get("inputs") or {}
    shown = {name: str(found)[:12] for name, found in call.arguments.items()} | call.recorded_arguments()
    return {
        "call": shown,
        "closure": call.code_digest,
        "dir_states": inputs.get("files") or {},
        "envs": {name: _unquoted(value) for name, value in (inputs.get("environment") or {}).items()},
        "version": call.version,
        "depends_on_files": inputs.get("depends_on_files") or {},
        "depends_on_vars": inputs.get("depends_on") or {},
        "pkgs": call.metadata.get("packages") or {},
        "host": (call.metadata.get("environment") or {}).get("host"),
        **_circumstances(call),
        _RECORDED: True,
    }


def _circumstances(call: DigestedCall) -> dict[str, Any]:
    return {
        "fname": call.name, "created": call.runtime.get("timestart"), "duration": call.runtime.get("duration"),
        "parents": call.links("parents"), "children": call.links("children"),
    }  # fmt: skip


def told(call: DigestedCall | None) -> dict[str, Any]:
    """Return a record as a dict for display; empty if there is no record."""
    if call is None:
        return {}
    return {
        **_circumstances(call), "module": call.module, "key": str(call.to_lookup_key()),
        "call": _argument_texts(call), "files": call.metadata.get("files") or {},
    }  # fmt: skip


def _unquoted(text: str) -> str | None:
    import ast

    value: str | None = ast.literal_eval(text)
    return value


def file_safe(name: str) -> str:
    """Return a function's name in a form that is safe in file names."""
    return "".join(char if char.isalnum() or char in "_-" else "_" for char in name)


def set_aside(path: str) -> None:
    """Rename a damaged entry, so that it is a miss and can be examined; does nothing unless the mode is ``rw``."""
    if modes.current() != "rw":
        return
    try:
        files.replace(path, path + ".corrupt")
    except OSError:
        return  # gone, or the directory can't be written; the entry is a miss either way


class Row(NamedTuple):
    """An entry in a listing."""

    path: str
    fname: str
    hash: str
    status: os.stat_result


def rows(directory: str) -> Iterator[Row]:
    """Yield the entries of a directory, sorted by name; none if it is missing. Only names and status are read."""
    try:
        found = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in found:
        match = _ENTRY.match(entry.name)
        if match is None or match["fname"] == "graph":
            continue
        try:
            status = entry.stat()
        except OSError:
            continue  # gone meanwhile
        if stat.S_ISREG(status.st_mode):
            yield Row(entry.path, match["fname"], match["hash"], status)


def recorded(directory: str) -> Iterator[tuple[Row, DigestedCall | None]]:
    """Yield the entries of a directory with their records; a file of another tool has None."""
    for row in rows(directory):
        with contextlib.suppress(OSError):  # gone meanwhile
            yield row, read_record(row.path)


def cache_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read one saved result.

    Returns
    -------
    dict
        ``value``, ``meta`` (``{"legacy": True}`` for a bare pickle of another tool), ``record`` and ``path``.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ProgCacheError
        The file is damaged, or others could have written it.
    """
    target = os.fspath(path)
    try:
        found = read(target)
    except RefusedError as error:
        raise ProgCacheError(f"can't read {target}: {error}") from error
    return {"value": found.value, "meta": found.meta, "record": told(found.call), "path": Path(target)}


def cache_list(cache_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """List saved results without loading them.

    Returns
    -------
    list of dict
        ``file``, ``fname``, ``hash``, ``created`` (datetime, UTC), ``size_bytes``, ``duration`` (s), ``call``
        (arguments as text), ``path``. Empty if there is no directory.
    """
    found = []
    for row, call in recorded(os.fspath(cache_dir)):
        about = {} if call is None else _circumstances(call)
        created = float(about.get("created") or row.status.st_mtime)
        found.append(
            {
                "file": os.path.basename(row.path),
                "fname": about.get("fname", row.fname),
                "hash": row.hash,
                "created": datetime.fromtimestamp(created, UTC),
                "size_bytes": row.status.st_size,
                "duration": about.get("duration"),
                "call": None if call is None else _argument_texts(call),
                "path": row.path,
            }
        )
    return found


def cache_stats(cache_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Return totals for a cache directory.

    Returns
    -------
    dict
        ``n_entries``, ``total_size_mb`` (of 2^20 bytes), ``oldest``, ``newest`` (seconds since the epoch, or None) and
        ``by_function``: a dict each of ``fname``, ``n_files``, ``total_size_mb``.

    Raises
    ------
    FileNotFoundError
        The directory doesn't exist.
    """
    if not os.path.isdir(cache_dir):
        raise FileNotFoundError(f"cache directory not found: {os.fspath(cache_dir)}")
    entries = cache_list(cache_dir)
    functions: dict[str, dict[str, Any]] = {}
    for entry in entries:
        group = functions.setdefault(entry["fname"], {"fname": entry["fname"], "n_files": 0, "total_size_mb": 0.0})
        group["n_files"] += 1
        group["total_size_mb"] += entry["size_bytes"] / (1 << 20)
    moments = [os.stat(entry["path"]).st_mtime for entry in entries]
    return {
        "n_entries": len(entries),
        "total_size_mb": sum(entry["size_bytes"] for entry in entries) / (1 << 20),
        "oldest": min(moments, default=None),
        "newest": max(moments, default=None),
        "by_function": sorted(functions.values(), key=lambda group: str(group["fname"])),
    }


def _argument_texts(call: DigestedCall) -> dict[str, str]:
    """Return the arguments as text: their repr if recorded, otherwise their digest."""
    known = {name: repr(value) for name, value in call.recorded_arguments().items()}
    return {name: f"<{str(found)[:12]}>" for name, found in call.arguments.items()} | known


def cache_prune(cache_dir: str | os.PathLike[str], days_old: float = 30) -> int:
    """Remove saved results that were written at least ``days_old`` days ago.

    Sentinels, locks and half-written files are removed too, unless the process that owns them is alive.

    Returns
    -------
    int
        The number of results removed.
    """
    directory = os.fspath(cache_dir)
    removed = 0
    limit = time.time() - days_old * 86400
    for row in list(rows(directory)):
        if row.status.st_mtime <= limit:
            removed += files.unlink_quietly(row.path)
    try:
        names = os.listdir(directory)
    except OSError:
        return removed
    for name in names:
        leftover = _LEFTOVER.search(name)
        path = os.path.join(directory, name)
        if leftover is not None and _may_go(path, leftover, limit):
            files.unlink_quietly(path)
    return removed


def _may_go(path: str, leftover: re.Match[str], limit: float) -> bool:
    """Return whether a sentinel, lock or staging file is abandoned: its owner is dead or, if unknown, it is old."""
    try:
        owner_name = leftover["owner"]
        if leftover["kind"] == "computing":
            data, _ = files.read_regular(path)
            owner_name = (data or b"").decode("ascii", "replace")
        status = os.stat(path)
    except OSError:
        return False
    # A staging file's owner is followed by its thread.
    owner = Owner.parse("-".join((owner_name or "").split("-")[:4])) if owner_name else None
    alive = None if owner is None else owner.is_alive()
    if alive is None and owner is not None:
        return status.st_mtime < min(limit, time.time() - 3600)  # on another machine, whose holder touches the file
    return status.st_mtime <= limit if alive is None else not alive

# SPDX-License-Identifier: Apache-2.0
r"""A directory of cached results: one file each, ``<function>.<hash>.pkl``.

A file begins with a pickle of ``{"dat": value, "meta": {...}}``, as other tools
expect it, and goes on where ``pickle.load`` stops::

    pickle | two lines of JSON | length of the pickle (8 bytes) | length of the lines (8 bytes) | b"PROGMEMO"

The lines are the entry's record: in the first what a hit is checked by (its
key, CRC-32, the files it tracked), in the second what people ask for. Listing a
directory reads the ends of files and unpickles nothing.
Files that another tool wrote have no record: they are taken for what their
name says, by age alone.

Unpickling runs code, so only files are read that nobody but this user (or root)
could have written.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import stat
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, BinaryIO, NamedTuple

from cuda_progcache._util import files
from cuda_progcache._util.liveness import Owner, current_owner

#: By backend name; what the files of older tools are called can be had, too. All hold the same.
SUFFIXES = {"pickle": ".pkl", "rds": ".rds", "qs": ".qs"}
_FOOTER = struct.Struct(">QQ8s")
_MAGIC = b"PROGMEMO"
_ENTRY = re.compile(r"^(?P<fname>.+)\.(?P<hash>[0-9a-zA-Z_]+)(?P<suffix>\.pkl|\.rds|\.qs)$")
_LEFTOVER = re.compile(r"\.(?:pkl|rds|qs)\.(?:(?P<kind>lock|computing|corrupt)$|tmp\.(?P<owner>.*)$)")
SENTINEL = ".computing"
#: How the first line of a record ends: CRC-32 of the pickle and of what comes before.
_CHECKSUM = b',"crc32":'
#: In the metadata of entries that have a record, so that one that lost it isn't taken for another tool's.
_RECORDED = "recorded"


class RefusedError(ValueError):
    """A file that can't be trusted or isn't whole; the message says why."""


class UntrustedError(RefusedError):
    """A file that others could have written: unpickling it would run what they wrote."""


class Loaded(NamedTuple):
    """An entry as it was read.

    Attributes
    ----------
    value : object
    meta : dict
        The pickled metadata.
    checks : dict
        The record's first line; empty for the file of another tool.
    """

    value: Any
    meta: dict[str, Any]
    checks: dict[str, Any]


def write(path: str, value: Any, meta: Mapping[str, Any], checks: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write an entry, whole or not at all.

    Parameters
    ----------
    path : str
    value : object
    meta : mapping
        Pickled with it.
    checks, record : mapping
        The record's lines, as JSON values.

    Raises
    ------
    OSError
        The directory can't be written.
    Exception
        Whatever pickling ``value`` raises.
    """
    pickled = pickle.dumps({"dat": value, "meta": {**meta, _RECORDED: True}}, protocol=5)
    first, second = (json.dumps(line, separators=(",", ":")).encode("ascii") for line in (checks, record))
    checksum = zlib.crc32(first[:-1], zlib.crc32(pickled))
    text = b"%b%b%d}\n%b\n" % (first[:-1], _CHECKSUM, checksum, second)
    data = b"".join((pickled, text, _FOOTER.pack(len(pickled), len(text), _MAGIC)))
    staged = f"{path}.tmp.{current_owner()}-{threading.get_ident()}"
    for attempt in range(2):
        try:
            files.write_new(staged, data, mode=0o644, sync=False)
            break
        except FileNotFoundError:
            if attempt:
                raise
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        except FileExistsError:
            files.unlink_quietly(staged)  # of an earlier process with our id and thread: its owner is us
            if attempt:
                raise
    try:
        files.replace(staged, path)
    except OSError:
        files.unlink_quietly(staged)
        raise


def read(path: str) -> Loaded:
    """Read an entry.

    Raises
    ------
    FileNotFoundError
        There is none.
    RefusedError
        It is damaged, or others could have written it.
    OSError
        It can't be read.
    """
    data, status = files.read_regular(path, largest=None)
    if data is None:
        raise RefusedError("it is no regular file")
    if not (is_private(status) and is_private(os.stat(os.path.dirname(path) or "."))):
        raise UntrustedError("others can write it or its directory, so unpickling may run what they wrote (chmod go-w)")
    checks, length = _checks_of(data)
    file = io.BytesIO(memoryview(data)[:length])
    try:
        found = pickle.load(file)  # noqa: S301 - written by this user or root
    except Exception as error:
        raise RefusedError(f"it can't be unpickled: {error}") from error
    known = isinstance(found, dict) and "dat" in found
    meta = found.get("meta") if known else {"legacy": True}
    meta = meta if isinstance(meta, dict) else {}
    if not checks and (file.tell() < length or _RECORDED in meta):
        raise RefusedError("it was cut short: its record is gone")
    return Loaded(found["dat"] if known else found, meta, checks)


def is_private(status: os.stat_result) -> bool:
    """Whether nobody but this user and root can have written a file or directory."""
    if not hasattr(os, "getuid"):
        return True  # Windows: a user's directories are theirs
    return status.st_uid in {os.getuid(), 0} and not status.st_mode & 0o022


def _checks_of(data: bytes) -> tuple[dict[str, Any], int]:
    """The first line of the record at the end of a file, and how long its pickle is: all of the file if it has none."""
    if len(data) < _FOOTER.size or data[-8:] != _MAGIC:
        return {}, len(data)
    length, size, _ = _FOOTER.unpack(data[-_FOOTER.size :])
    if length + size + _FOOTER.size != len(data):
        raise RefusedError("it was cut short")
    line = data[length : data.find(b"\n", length)]
    content, _, checksum = line.rpartition(_CHECKSUM)
    if checksum != b"%d}" % zlib.crc32(content, zlib.crc32(memoryview(data)[:length])):
        raise RefusedError("it doesn't have its checksum")
    return _json(line), length


def _json(text: bytes) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise RefusedError(f"its record is damaged: {error}") from error
    if not isinstance(record, dict):
        raise RefusedError("its record is no object")
    return record


def read_record(path: str) -> dict[str, Any]:
    """Read an entry's record from the end of its file; empty where there is none or it is damaged.

    Raises
    ------
    OSError
        The file can't be read.
    """
    with open(path, "rb") as file:
        try:
            return _tail(file)
        except RefusedError:
            return {}


def _tail(file: BinaryIO) -> dict[str, Any]:
    size = os.fstat(file.fileno()).st_size
    if size < _FOOTER.size:
        return {}
    file.seek(size - _FOOTER.size)
    length, record, magic = _FOOTER.unpack(file.read(_FOOTER.size))
    if magic != _MAGIC or length + record + _FOOTER.size != size:
        return {}
    file.seek(length)
    found: dict[str, Any] = {}
    for line in file.read(record).splitlines():
        found |= _json(line)
    return found


def set_aside(path: str) -> None:
    """Rename a damaged entry, so that it is a miss from now on and can be looked at."""
    try:
        files.replace(path, path + ".corrupt")
    except OSError:
        return  # gone, or a directory that can't be written: it stays a miss


class Row(NamedTuple):
    """An entry in a listing."""

    path: str
    fname: str
    hash: str
    status: os.stat_result


def rows(directory: str) -> Iterator[Row]:
    """The entries of a directory, by name; nothing where it is missing. Reads names and status alone."""
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


def listing(directory: str) -> list[dict[str, Any]]:
    """The entries of a directory as dicts: see :func:`~cuda_progcache.memo.cache_file.cache_list`."""
    found = []
    for row in rows(directory):
        try:
            record = read_record(row.path)
        except OSError:
            continue
        created = float(record.get("created") or row.status.st_mtime)
        found.append(
            {
                "file": os.path.basename(row.path),
                "fname": record.get("fname") or row.fname,
                "hash": row.hash,
                "created": datetime.fromtimestamp(created, UTC),
                "size_bytes": row.status.st_size,
                "duration": record.get("duration"),
                "call": record.get("call"),
                "path": row.path,
            }
        )
    return found


def prune(directory: str, days_old: float) -> int:
    """Remove old entries, and what processes that are gone have left: see :func:`cache_prune`."""
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
    """Whether nobody is at work on a sentinel, lock or staging file: not its owner if it is known, else by its age."""
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
        return status.st_mtime < min(limit, time.time() - 3600)  # another machine's: its holder touches it
    return status.st_mtime <= limit if alive is None else not alive

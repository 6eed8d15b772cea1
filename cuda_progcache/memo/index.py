# SPDX-License-Identifier: Apache-2.0
"""An SQLite index over the records of calls. It is derived from the records, disposable, and never on the call path.

Before it answers a query, the index compares the shard directories' mtimes with the last known ones. It lists the files
of changed shards, and reads the records that are new or were replaced. The database is stored beside the records; if it
can't be written, or stays locked for long, the index is built in memory. A database that is damaged or has another
version is removed and rebuilt.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from cuda_progcache._util import files
from cuda_progcache.memo.call import NONE, DigestedCall, QueryCall
from cuda_progcache.memo.digest import Digest, digest

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_VERSION = 2
_SCHEMA = """
CREATE TABLE calls (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, shard TEXT NOT NULL,
    inode INTEGER, mtime INTEGER, size INTEGER,
    name TEXT, module TEXT, code TEXT, result TEXT, record BLOB);
CREATE INDEX calls_by_name ON calls (name, module);
CREATE INDEX calls_by_shard ON calls (shard);
CREATE INDEX calls_by_result ON calls (result);
CREATE TABLE arguments (digest TEXT, name TEXT, call INTEGER, PRIMARY KEY (digest, name, call)) WITHOUT ROWID;
CREATE INDEX arguments_by_call ON arguments (call);
CREATE TABLE shards (name TEXT PRIMARY KEY, mtime INTEGER) WITHOUT ROWID;
"""
#: Seconds to wait while another process refreshes the index; rebuilding one of 100,000 calls takes less.
_PATIENCE = 60.0
_CHUNK = 500


class Source(Protocol):
    """The records that an index is made from."""

    def shards(self) -> Mapping[str, int]:
        """Return the shards, each with a number (an mtime in ns) that changes when something in the shard changes."""

    def scan(self, shard: str) -> Mapping[Digest, tuple[int, int, int]]:
        """Return a shard's keys, each with three numbers (63 bits) that change if the record is replaced."""

    def settled(self, mtime_ns: int) -> bool:
        """Return whether a shard's next change is certain to change its number."""

    def record(self, key: Digest) -> bytes | None:
        """Return a record; None if it is gone or isn't a record."""

    def decode(self, record: bytes) -> DigestedCall:
        """Return the call in a record."""


class Index:
    """An index of calls by name, module, code, result and arguments; in the database ``path``, or in memory (None)."""

    def __init__(self, source: Source, path: str | None) -> None:
        self._source = weakref.proxy(source)
        self.path = path
        self._where = path
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._connection: sqlite3.Connection | None = None
        self._opened = ""
        self._known: dict[str, int] = {}
        self._finalizer: weakref.finalize[Any, Any] | None = None

    # Queries

    def query(self, template: QueryCall) -> Iterator[DigestedCall]:
        """Yield the calls that match a pattern, from the records that existed when the query began."""
        where, parameters, rest = _conditions(template)
        statement = f"SELECT calls.id FROM calls{where}"  # noqa: S608 - built from placeholders above
        ids = self._ask(lambda connection: [int(row[0]) for row in connection.execute(statement, parameters)])
        matches = rest.matcher() if rest is not None else None
        for start in range(0, len(ids), _CHUNK):
            for record in self._records(ids[start : start + _CHUNK]):
                try:
                    call = self._source.decode(record)
                except ValueError:
                    continue  # damaged in the index only; its file is intact, and a rebuilt index will have it
                if matches is None or matches(call):
                    yield call

    def _records(self, ids: Sequence[int]) -> list[bytes]:
        marks = ",".join("?" * len(ids))
        statement = f"SELECT record FROM calls WHERE id IN ({marks})"  # noqa: S608 - as above
        return self._ask(lambda connection: [row[0] for row in connection.execute(statement, ids)], refresh=False)

    def inlined(self, value: Digest) -> bytes | None:
        """Return the JSON of a value that some record contains, by its digest; None if no record has it."""

        def find(connection: sqlite3.Connection) -> list[bytes]:
            rows = connection.execute(
                "SELECT record FROM calls WHERE result = ? UNION ALL SELECT record FROM calls "
                "JOIN arguments ON arguments.call = calls.id WHERE arguments.digest = ? LIMIT 8",
                (value, value),
            )
            return [row[0] for row in rows]

        for record in self._ask(find):
            text = self._source.decode(record).inline.get(value)
            if text is not None:
                return bytes(text)
        return None

    def values_with_prefix(self, prefix: str) -> list[Digest]:
        """Return the digests of results and arguments that begin with a prefix, at most two."""

        def find(connection: sqlite3.Connection) -> list[Digest]:
            after = prefix + "\x7f"
            rows = connection.execute(
                "SELECT result FROM calls WHERE result >= ? AND result < ? UNION "
                "SELECT digest FROM arguments WHERE digest >= ? AND digest < ? LIMIT 2",
                (prefix, after, prefix, after),
            )
            return [Digest(row[0]) for row in rows]

        return self._ask(find)

    def count(self) -> int:
        """Return the number of calls."""
        return self._ask(lambda connection: int(connection.execute("SELECT count(*) FROM calls").fetchone()[0]))

    # Maintenance

    def _ask(self, question: Callable[[sqlite3.Connection], T], *, refresh: bool = True) -> T:
        """Answer a question from an up-to-date index; rebuild the index if it is damaged."""
        if self._pid != os.getpid() and self._connection is not None:
            self._lock = threading.RLock()  # a thread of the parent may have held it when this process was forked
        with self._lock:
            for attempt in range(3):
                try:
                    connection = self._connected()
                    if refresh or attempt:
                        self._refresh(connection)
                    return question(connection)
                except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # damaged text can't be decoded
                    self.close()
                    if attempt == 2 or self._where is None:
                        raise
                    self._recover(error)
        raise AssertionError("not reached")

    def _recover(self, error: sqlite3.DatabaseError | UnicodeDecodeError) -> None:
        path = self._where
        if path is None:
            raise error
        if (
            isinstance(error, sqlite3.OperationalError)
            and "malformed" not in str(error)
            and "no such" not in str(error)
        ):
            # Not writable, locked for long, or no space: leave the database alone and build the index from the files.
            _logger.warning("can't use the index %s (%s); using one in memory instead", path, error)
            self._where = None
            return
        _logger.warning("the index %s is damaged (%s); rebuilding it", path, error)
        for name in (path, path + "-wal", path + "-shm"):
            files.unlink_quietly(name)

    def _connected(self) -> sqlite3.Connection:
        where = self._where
        if where is None or not os.path.isdir(os.path.dirname(where)):
            where = ":memory:"  # permanently, or until the first record creates the directory
        if self._connection is not None:
            if self._pid == os.getpid() and self._opened == where:
                return self._connection
            if self._pid != os.getpid():
                _inherited.append(self._connection)
                self._connection = None
            self.close()
        connection = sqlite3.connect(where, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            # No write-ahead log: its shared memory is a mapped file, and truncating a mapped file kills the process.
            connection.execute("PRAGMA mmap_size = 0")
            connection.execute("PRAGMA journal_mode = TRUNCATE")
            connection.execute("PRAGMA synchronous = OFF")  # a database that a power cut damages is rebuilt
            if connection.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                self._make(connection)
            self._known = dict(connection.execute("SELECT name, mtime FROM shards"))
        except BaseException:
            connection.close()
            raise
        self._connection, self._opened, self._pid = connection, where, os.getpid()
        self._finalizer = weakref.finalize(self, connection.close)
        return connection

    def _make(self, connection: sqlite3.Connection) -> None:
        with _transaction(connection):
            if connection.execute("PRAGMA user_version").fetchone()[0] == _VERSION:
                return  # another process was quicker
            for (name,) in list(connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")):
                connection.execute(f"DROP TABLE {name}")
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _refresh(self, connection: sqlite3.Connection) -> None:
        now = self._source.shards()
        moved = [shard for shard, mtime in now.items() if self._known.get(shard) != mtime]
        moved += [shard for shard in self._known if shard not in now]
        if not moved:
            return
        changed = 0
        with _transaction(connection):
            for shard in moved:
                mtime = now.get(shard)
                settled = mtime is not None and self._source.settled(mtime)  # must precede the scan
                changed += self._refresh_shard(connection, shard)
                if mtime is None:
                    self._known.pop(shard, None)
                    connection.execute("DELETE FROM shards WHERE name = ?", (shard,))
                elif settled:
                    self._known[shard] = mtime
                    connection.execute("INSERT OR REPLACE INTO shards VALUES (?, ?)", (shard, mtime))
                else:
                    self._known[shard] = -1  # may change again within the same mtime, so it is scanned next time too
                    connection.execute("INSERT OR REPLACE INTO shards VALUES (?, -1)", (shard,))
            if changed > 10 * _CHUNK:
                connection.execute("ANALYZE")

    def _refresh_shard(self, connection: sqlite3.Connection, shard: str) -> int:
        found = self._source.scan(shard)
        select = "SELECT key, id, inode, mtime, size FROM calls WHERE shard = ?"
        have = {row[0]: row for row in connection.execute(select, (shard,))}
        stale = [(row[1],) for key, row in have.items() if found.get(key) != row[2:]]
        connection.executemany("DELETE FROM arguments WHERE call = ?", stale)
        connection.executemany("DELETE FROM calls WHERE id = ?", stale)
        added = 0
        for key, signature in found.items():
            if key in have and have[key][2:] == signature:
                continue
            record = self._source.record(key)
            if record is not None:
                self._insert(connection, shard, key, signature, record)
                added += 1
        return added + len(stale)

    def _insert(
        self, connection: sqlite3.Connection, shard: str, key: Digest, signature: tuple[int, ...], record: bytes
    ) -> None:
        try:
            call = self._source.decode(record)
        except ValueError:
            return  # an unknown format
        cursor = connection.execute(
            "INSERT OR REPLACE INTO calls (key, shard, inode, mtime, size, name, module, code, result, record) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, shard, *signature, call.name, call.module, call.code_digest, call.result, record),
        )
        connection.executemany(
            "INSERT OR IGNORE INTO arguments VALUES (?, ?, ?)",
            [(str(value), name, cursor.lastrowid) for name, value in call.arguments.items()],
        )

    def close(self) -> None:
        """Close the database; the next query opens it again."""
        with self._lock:
            connection, self._connection = self._connection, None
            if self._finalizer is not None:
                self._finalizer.detach()
                self._finalizer = None
            if connection is not None and self._pid == os.getpid():
                connection.close()


#: Connections inherited by a fork; kept open, since closing one in the child would drop the parent's locks.
_inherited: list[sqlite3.Connection] = []


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # the original error is the one to raise
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _conditions(template: QueryCall) -> tuple[str, list[Any], QueryCall | None]:
    """Split a pattern into SQL clauses with their parameters, and the rest that SQL can't decide (None: no rest)."""
    joins: list[str] = []
    terms: list[str] = []
    joined: list[Any] = []
    compared: list[Any] = []
    rest = QueryCall()
    for field, column in (("name", "name"), ("module", "module"), ("code_digest", "code")):
        value = getattr(template, field)
        if value is None:
            continue
        if value is NONE:
            terms.append(f"calls.{column} IS NULL")
        elif isinstance(value, Digest) and field != "code_digest":
            setattr(rest, field, value)  # the digest of a name can only be compared with the records
        else:
            terms.append(f"calls.{column} = ?")
            compared.append(str(value))
    if template.result is not None:
        terms.append("calls.result = ?")
        compared.append(str(digest(template.result)))
    left: dict[str, None] = {}
    for name, value in (template.arguments or {}).items():
        if value is None:
            left[name] = None
            continue
        place = f"a{len(joins)}"
        joins.append(
            f" JOIN arguments AS {place} ON {place}.call = calls.id AND {place}.digest = ? AND {place}.name = ?"
        )
        joined += [str(digest(value)), name]
    if left or template.metadata or template.version is not None or rest.name or rest.module:
        rest = replace(rest, arguments=left or None, metadata=template.metadata, version=template.version)
    else:
        rest = None  # type: ignore[assignment]
    where = f" WHERE {' AND '.join(terms)}" if terms else ""
    return "".join(joins) + where, [*joined, *compared], rest

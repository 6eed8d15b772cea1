# SPDX-License-Identifier: Apache-2.0
"""A directory of :func:`~cuda_progcache.memo.cache_file.cache_file` as a cache of calls.

What ``cache_file`` keeps can so be queried, tabulated, transferred into another cache and evicted like any recorded
call. A call's key is that of its entry, its metadata holds ``runtime``, ``environment``, ``links`` and ``files`` (the
files it depends on, with digests). Arguments that are small and plain are in the record; others are their digests.

>>> from cuda_progcache.memo.storage.directory import directory_cache
>>> directory_cache("no such directory").query(name="load").count()
0
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from cuda_progcache._util import files
from cuda_progcache.memo import cache_dir as layout
from cuda_progcache.memo.call import DigestedCall, QueryCall, Unstored
from cuda_progcache.memo.digest import DIGEST_LENGTH, Digest, digest
from cuda_progcache.memo.storage import codecs
from cuda_progcache.memo.storage.base import CallMixin, SaveError, StorageBackend, ValueMixin

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import Cache


def directory_cache(directory: str | os.PathLike[str]) -> Cache:
    """The calls whose results ``cache_file`` has kept in a directory; it needn't be there yet."""
    from cuda_progcache.memo.caches import Cache

    return Cache(DirectoryValueStorage(directory), DirectoryCallStorage(directory))


class _Entries(StorageBackend):
    """Entries by the keys in their records.

    Parameters
    ----------
    directory : path-like
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
        # A record stays as it is while its file does: entries are replaced, never written into.
        self._known: dict[str, tuple[files.Identity, dict[str, Any]]] = {}
        self._paths: dict[str, str] = {}

    def put(self, value: Any, key: Digest) -> Digest:  # noqa: ARG002 - the backend's signature
        """Nothing can be put: an entry's name and record are made by ``cache_file`` from a real call."""
        raise SaveError(f"{self.directory} is written by cache_file alone")

    def list(self) -> Iterable[Digest]:
        """Keys of the entries that have a record."""
        return tuple(Digest(key) for key in self._records())

    def _records(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Path and record by key; only files that are new or changed are opened."""
        found = {}
        known, self._known = self._known, {}
        for row in layout.rows(self.directory):
            identity = files.identity(row.status)
            before = known.get(row.path)
            try:
                record = before[1] if before is not None and before[0] == identity else layout.read_record(row.path)
            except OSError:
                continue  # gone since
            self._known[row.path] = (identity, record)
            if len(str(record.get("key"))) == DIGEST_LENGTH:
                found[str(record["key"])] = (row.path, record)
        self._paths = {key: path for key, (path, _) in found.items()}
        return found

    def _entry(self, key: Digest) -> tuple[str, dict[str, Any]]:
        path = self._paths.get(str(key), "")
        known = self._known.get(path)
        try:
            if known is not None and known[0] == files.identity(os.stat(path)):
                return path, known[1]
        except OSError:
            pass  # gone, or moved: the directory says
        return self._records()[str(key)]

    def _contains(self, key: Digest) -> bool:
        return str(key) in self._records()

    def _evict(self, key: Digest) -> None:
        if key in self._records():
            files.unlink_quietly(self._entry(key)[0])


class DirectoryValueStorage(ValueMixin, _Entries):
    """The results in a directory, by the keys of their calls."""

    def get(self, key: Digest) -> Any:
        """Unpickle a result; KeyError where it is gone, damaged, or others could have written it."""
        path, _ = self._entry(key)
        try:
            return layout.read(path).value
        except (OSError, layout.RefusedError):
            raise KeyError(key) from None


class DirectoryCallStorage(CallMixin, _Entries):
    """The records in a directory as calls."""

    def get(self, key: Digest) -> DigestedCall:
        """The call of an entry."""
        return call_of(self._entry(key)[1])

    def query(self, template: QueryCall) -> Iterator[DigestedCall]:
        """Calls that fit a pattern, by looking at all of them once."""
        matches = template.matcher()
        for _, record in self._records().values():
            call = call_of(record)
            if matches(call):
                yield call


def call_of(record: dict[str, Any]) -> DigestedCall:
    """An entry's record as a call."""
    parts = record.get("parts") or {}
    inline: dict[Digest, bytes] = {}
    arguments: dict[str, Digest] = {}
    for name, known in (parts.get("arguments") or {}).items():
        try:
            value = ast.literal_eval((record.get("call") or {}).get(name, ""))
        except (ValueError, SyntaxError):
            value = None
        kept = digest(value)
        if kept == known:
            inline[kept] = codecs.encode_json(value)
        arguments[name] = kept if kept == known else Unstored(known)
    started, duration = float(record.get("created") or 0.0), float(record.get("duration") or 0.0)
    metadata = {
        "runtime": {"status": "done", "timestart": started, "timestop": started + duration, "duration": duration},
        "environment": {"host": record.get("host"), "python": record.get("python")},
        "links": {"parents": record.get("parents") or [], "children": record.get("children") or []},
        "files": {path: known for path, _, _, known in record.get("watched") or ()},
    }
    key = Digest(record["key"])
    return DigestedCall(
        str(record.get("fname")), arguments, key, metadata, record.get("module"), None,
        (parts.get("closure") or {}).get(""), key=key, inline=inline, sealed=key,
    )  # fmt: skip

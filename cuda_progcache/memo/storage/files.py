# SPDX-License-Identifier: Apache-2.0
"""Storages in files, with one file per value or call. The files are authoritative; indexes are derived from them.

A value's file is a JSON header line followed by the bytes that the codec made::

    {"format":1,"key":"<64 hex>","codec":"npy","length":928,"checksum":"<32 hex>"}
    ...928 bytes...

If the storage has a secret, the header also has a ``"signature"`` (HMAC-SHA256 over key, codec and bytes). A call's
file is described in :mod:`~cuda_progcache.memo.storage.records`. A damaged file is a miss; it is set aside and counted.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from xxhash import xxh3_128_hexdigest

from cuda_progcache._util import files as file_system
from cuda_progcache._util.liveness import Owner, current_owner
from cuda_progcache._util.warning import warn
from cuda_progcache.memo.call import Call, DigestedCall, QueryCall
from cuda_progcache.memo.digest import Digest
from cuda_progcache.memo.index import Index
from cuda_progcache.memo.storage import codecs, records
from cuda_progcache.memo.storage.base import (
    CallMixin,
    Intent,
    StorageBackend,
    ValueMixin,
)
from cuda_progcache.memo.storage.destructuring import DestructuringMixin
from cuda_progcache.memo.storage.locking import PerKeyLocks
from cuda_progcache.memo.storage.tree import FileTree, Signature
from cuda_progcache.memo.tagged_json import SaveError

FORMAT = 1
#: The most bytes of JSON that a value in the record of its call may take.
INLINE_LIMIT = 1024
#: How many records are cached, and how many bytes each may have.
_MOST_READ, _SMALL = 1000, 4096
_serial = itertools.count()


@dataclass(frozen=True)
class FileBackend(StorageBackend):
    """A backend that keeps files by digest below a directory.

    Attributes
    ----------
    root : str or path
        The directory; created for this user only, when the first file is written.
    secret : bytes, optional
        Signs the files that are written; files not signed with it aren't read.
    """

    root: str | os.PathLike[str]
    secret: bytes | None = field(default=None, repr=False)
    tree: FileTree = field(init=False, repr=False, compare=False)

    _suffix = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", os.path.abspath(os.fspath(self.root)))
        object.__setattr__(self, "tree", FileTree(str(self.root), self._suffix))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # derived attributes and the state of this process

    @property
    def counters(self) -> Counter[str]:
        """Counts of failures in this process: ``corrupt``, ``refused``, ``read_errors``, ``undecodable``."""
        return self.tree.counters

    def list(self) -> Iterable[Digest]:
        """Return every key."""
        return tuple(self.tree.keys())

    def _contains(self, key: Digest) -> bool:
        return self.tree.contains(key)

    def _evict(self, key: Digest) -> None:
        self.tree.remove(key)

    def _prefix_candidates(self, prefix: str) -> Iterable[Digest]:
        return self.tree.with_prefix(prefix)

    def _write(self, key: Digest, data: bytes, what: str) -> None:
        try:
            self.tree.write(key, data)
        except KeyError:
            raise SaveError(f"can't store {what} under {key!r}: not a digest of 64 letters and digits") from None
        except OSError as error:
            raise SaveError(f"can't store {what} in {self.root}: {error.strerror or error}") from error


@dataclass(frozen=True)
class FileValueStorage(PerKeyLocks, DestructuringMixin, ValueMixin, FileBackend):
    """A storage that keeps values in files.

    Attributes
    ----------
    root, secret
        See :class:`FileBackend`.
    remaining_depth : float
        An element less deep than this stays in its container (:class:`DestructuringMixin`). By default all do.
    codec : {"safe", "pickle"}
        With ``pickle``, values that no safe codec takes are pickled, and pickles are read if they are signed with
        ``secret`` or, without a secret, if nobody else can write to the directory.
    """

    remaining_depth: float = float("inf")
    codec: str = "safe"

    _suffix = ".value"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec not in {"safe", "pickle"}:
            raise ValueError(f"codec must be 'safe' or 'pickle', got {self.codec!r}")

    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Store a value under its digest or ``key``; SaveError if no codec takes it or it can't be written."""
        return super().save(value, key)

    def put(self, value: Any, key: Digest) -> Digest:
        """Write the file of a value."""
        codec, payload = codecs.encode(value, self.codec)
        head: dict[str, Any] = {
            "format": FORMAT, "key": key, "codec": codec, "length": len(payload),
            "checksum": xxh3_128_hexdigest(payload),
        }  # fmt: skip
        if self.secret is not None:
            head["signature"] = codecs.sign(self.secret, key, codec, payload)
        line = json.dumps(head, separators=(",", ":")).encode("ascii") + b"\n"
        self._write(key, line + payload, "a value")
        return key

    def get(self, key: Digest) -> Any:
        """Read the file of a value; KeyError if it is missing, damaged or not trusted."""
        data = self.tree.read(key)
        line, _, payload = data.partition(b"\n")
        try:
            head = json.loads(line)
            codec = head["codec"]
            if head["format"] != FORMAT or head["key"] != key or xxh3_128_hexdigest(payload) != head["checksum"]:
                raise ValueError("the header or checksum doesn't match")
        except (ValueError, KeyError, TypeError, RecursionError):
            self.tree.set_aside(key)
            raise KeyError(key) from None
        if not self._may_read(key, codec, payload, head.get("signature")):
            if not self.counters["refused"] and self.codec == "pickle" and self.secret is None:
                warn(
                    f"pickled values in {self.root} are ignored: others can write there, and unpickling may run their "
                    "code; run chmod go-w, or set a secret", RuntimeWarning,
                )  # fmt: skip
            self.counters["refused"] += 1
            raise KeyError(key)
        try:
            return codecs.decode(codec, payload)
        except Exception:  # noqa: BLE001 - unpickling may raise anything, for example if a class is gone
            self.counters["undecodable"] += 1
            raise KeyError(key) from None

    def _may_read(self, key: Digest, codec: str, payload: bytes, signature: object) -> bool:
        if self.secret is not None:
            signed = codecs.is_signed(self.secret, key, codec, payload, signature)
            return signed and (codec in codecs.SAFE or self.codec == "pickle")
        return codec in codecs.SAFE or (self.codec == "pickle" and self.tree.is_private(key))

    def pin(self, keys: Iterable[Digest]) -> Callable[[], object]:
        """Protect values from garbage collection by any process; return a function that ends the protection."""
        path = f"{self.root}/pins/{current_owner()}.{threading.get_ident()}-{next(_serial)}"
        content = "".join(f"{key}\n" for key in keys).encode()
        try:
            self.tree.make_root()
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            file_system.write_new(path, content, mode=0o644, sync=False)
        except OSError:
            return lambda: None  # read-only or full, so no value is stored either
        return functools.partial(file_system.unlink_quietly, path)

    def pinned(self) -> tuple[set[Digest], float | None]:
        """Return the values of calls in flight, and the time of the first pin.

        The time is in seconds since the epoch, or None if there are no pins. Pins of dead processes are removed.
        """
        found: set[Digest] = set()
        since: float | None = None
        directory = f"{self.root}/pins"
        try:
            names = os.listdir(directory)
        except OSError:
            return found, None
        for name in names:
            owner = Owner.parse(name.partition(".")[0])
            if owner is None or owner.is_alive() is False:
                file_system.unlink_quietly(f"{directory}/{name}")
                continue
            try:
                data, status = file_system.read_regular(f"{directory}/{name}")
            except OSError:
                continue  # just released, so its call has been recorded or abandoned
            found.update(map(Digest, (data or b"").decode("ascii", "replace").split()))
            since = status.st_mtime if since is None else min(since, status.st_mtime)
        return found, since

    def written_since(self, key: Digest, since: float) -> bool:
        """Return whether a value that was put away had been written after this time, give or take a second."""
        path = self.tree.path(key)
        try:
            return os.stat(f"{os.path.dirname(path)}/.{key}.away").st_mtime >= since - 1
        except OSError:
            return False

    def put_away(self, key: Digest) -> bool:
        """Hide a value, which :meth:`put_back` can undo; return False if there is no such value."""
        path = self.tree.path(key)
        try:
            file_system.replace(path, f"{os.path.dirname(path)}/.{key}.away")
        except OSError:
            return False
        return True

    def put_back(self, key: Digest) -> None:
        """Undo :meth:`put_away`."""
        path = self.tree.path(key)
        try:
            file_system.replace(f"{os.path.dirname(path)}/.{key}.away", path)
        except OSError:
            self.counters["read_errors"] += 1  # written again and swept by another process; a miss at worst

    def throw_away(self, key: Digest) -> None:
        """Remove a value that :meth:`put_away` has hidden."""
        file_system.unlink_quietly(f"{os.path.dirname(self.tree.path(key))}/.{key}.away")


@dataclass(frozen=True)
class FileCallStorage(PerKeyLocks, CallMixin, FileBackend):
    """A storage that keeps calls in files, with an index for queries.

    Attributes
    ----------
    root, secret
        See :class:`FileBackend`.
    inline_limit : int
        The most bytes of JSON that an argument or result in the record may take. A call with small values only is one
        file.
    index : Index
        Derived from the files; its database may be removed at any time.
    """

    inline_limit: int = INLINE_LIMIT
    index: Index = field(init=False, repr=False, compare=False)
    _read: dict[Digest, tuple[file_system.Signature, DigestedCall]] = field(init=False, repr=False, compare=False)

    _suffix = ".json"

    def __post_init__(self) -> None:
        super().__post_init__()
        # An index isn't signed. If records must be signed, it is kept in memory, where others can't change it.
        object.__setattr__(self, "_read", {})
        object.__setattr__(self, "index", Index(self, f"{self.root}/index.sqlite" if self.secret is None else None))

    def put(self, value: DigestedCall | Call, key: Digest) -> Digest:
        """Write the record of a call; live values are recorded by their digests only."""
        if isinstance(value, Call):
            value = value.digest()
        self._write(key, records.seal(records.encode(value, key), key, self.secret), f"the call of {value.name}")
        return key

    def get(self, key: Digest) -> DigestedCall:
        """Read the record of a call; KeyError if it is missing, damaged or not trusted."""
        record = self.record(key)
        if record is None:
            raise KeyError(key)
        return records.decode(record)

    def peek(self, key: Digest) -> DigestedCall:
        """Return the call under ``key``, for a caller that doesn't change it; cached while its file is unchanged."""
        try:
            status = os.lstat(self.tree.path(key))
        except FileNotFoundError:
            raise KeyError(key) from None
        except OSError:
            return self.get(key)
        signature = file_system.signature(status)
        known = self._read.get(key)
        if known is not None and known[0] == signature:
            return known[1]
        settled = file_system.is_settled(status, time.time_ns())  # must precede the read
        call = self.get(key)
        if settled and status.st_size <= _SMALL:
            if len(self._read) >= _MOST_READ:
                self._read.clear()
            self._read[key] = (signature, call)
        return call

    @property
    def leases(self) -> str:
        """The directory of leases, which the first lease creates; its parent is created at this access."""
        with contextlib.suppress(OSError):  # read-only or full, so there will be no leases
            self.tree.make_root()
        return f"{self.root}/leases"

    def record(self, key: Digest) -> bytes | None:
        """Return the JSON of a record; None if it is missing, damaged or not trusted."""
        try:
            data = self.tree.read(key)
        except KeyError:
            return None
        try:
            return records.unseal(data, key, self.secret)
        except records.DamagedRecordError:
            self.tree.set_aside(key)
        except records.RefusedRecordError:
            self.counters["refused"] += 1
        return None

    def query(self, template: QueryCall) -> Iterator[DigestedCall]:
        """Yield the calls that match a pattern, found through the index."""
        with self._operation_context("", intent=Intent.READ):
            yield from self.index.query(template)

    # The source of the index

    def shards(self) -> dict[str, int]:
        """Return the shard directories and their mtimes (ns)."""
        return self.tree.shards()

    def scan(self, shard: str) -> dict[Digest, Signature]:
        """Return the present records of a shard, each with its signature."""
        return self.tree.scan(shard)

    settled = staticmethod(FileTree.settled)
    decode = staticmethod(records.decode)

# SPDX-License-Identifier: Apache-2.0
"""Storages of files: the truth about values and calls, one file each.

A value's file is a line of JSON about it and the bytes that its codec made::

    {"format":1,"key":"<64 hex>","codec":"npy","length":928,"checksum":"<32 hex>"}
    ...928 bytes...

with ``"signature"`` (HMAC-SHA256 over key, codec and bytes) where the storage has a secret. A call's file is described
in :mod:`~cuda_progcache.memo.storage.records`. Damage of any kind is a miss, set aside and counted.
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
#: Bytes of JSON up to which a value goes into the record of its call.
INLINE_LIMIT = 1024
#: How many records are remembered, and how many bytes these may have.
_MOST_READ, _SMALL = 1000, 4096
_serial = itertools.count()


@dataclass(frozen=True)
class FileBackend(StorageBackend):
    """Files by digest below a directory.

    Attributes
    ----------
    root : str or path
        Made, for this user alone, when the first file is written.
    secret : bytes, optional
        Signs what is written; what isn't signed with it isn't read.
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
        self.__post_init__()  # what is derived, and this process's

    @property
    def counters(self) -> Counter[str]:
        """What went wrong in this process: ``corrupt``, ``refused``, ``read_errors``."""
        return self.tree.counters

    def list(self) -> Iterable[Digest]:
        """Every key."""
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
    """Values as files.

    Attributes
    ----------
    root, secret
        See :class:`FileBackend`.
    remaining_depth : float
        What is less deep than this stays in its container (:class:`DestructuringMixin`); as a rule everything.
    codec : {"safe", "pickle"}
        ``pickle`` takes what no safe codec takes. It is read only where this says so, and only if nobody else can
        write here or ``secret`` has signed it.
    """

    remaining_depth: float = float("inf")
    codec: str = "safe"

    _suffix = ".value"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec not in {"safe", "pickle"}:
            raise ValueError(f"codec must be 'safe' or 'pickle', got {self.codec!r}")

    def save(self, value: Any, key: Digest | None = None) -> Digest:
        """Keep a value, under its digest or under ``key``; SaveError where no codec takes it, or the disk is full."""
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
        """Read the file of a value; KeyError where it is missing, damaged or not to be trusted."""
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
                    f"pickled values in {self.root} are ignored: others can write there, and unpickling may run what "
                    "they wrote (chmod go-w, or set a secret)", RuntimeWarning,
                )  # fmt: skip
            self.counters["refused"] += 1
            raise KeyError(key)
        try:
            return codecs.decode(codec, payload)
        except Exception:  # noqa: BLE001 - unpickling may raise anything, as when a class is gone since: counted, a miss
            self.counters["undecodable"] += 1
            raise KeyError(key) from None

    def _may_read(self, key: Digest, codec: str, payload: bytes, signature: object) -> bool:
        if self.secret is not None:
            signed = codecs.is_signed(self.secret, key, codec, payload, signature)
            return signed and (codec in codecs.SAFE or self.codec == "pickle")
        return codec in codecs.SAFE or (self.codec == "pickle" and self.tree.is_private(key))

    def pin(self, keys: Iterable[Digest]) -> Callable[[], object]:
        """Keep values of a call in flight from garbage collection, in every process, until the result is called."""
        path = f"{self.root}/pins/{current_owner()}.{threading.get_ident()}-{next(_serial)}"
        content = "".join(f"{key}\n" for key in keys).encode()
        try:
            self.tree.make_root()
            os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
            file_system.write_new(path, content, mode=0o644, sync=False)
        except OSError:
            return lambda: None  # read-only or full: then no value is stored either
        return functools.partial(file_system.unlink_quietly, path)

    def pinned(self) -> tuple[set[Digest], float | None]:
        """Values of calls in flight, and when the first of them was pinned (seconds since the epoch; None: no call).

        Pins of processes that are known to be dead are removed.
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
                continue  # released just now: its record is there
            found.update(map(Digest, (data or b"").decode("ascii", "replace").split()))
            since = status.st_mtime if since is None else min(since, status.st_mtime)
        return found, since

    def written_since(self, key: Digest, since: float) -> bool:
        """Whether a value that was put away had been written after this time, to a second."""
        path = self.tree.path(key)
        try:
            return os.stat(f"{os.path.dirname(path)}/.{key}.away").st_mtime >= since - 1
        except OSError:
            return False

    def put_away(self, key: Digest) -> bool:
        """Take a value out, so that :meth:`put_back` can undo it; False if it isn't there."""
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
            self.counters["read_errors"] += 1  # written again meanwhile and swept by another: a miss at worst

    def throw_away(self, key: Digest) -> None:
        """Remove what :meth:`put_away` took out."""
        file_system.unlink_quietly(f"{os.path.dirname(self.tree.path(key))}/.{key}.away")


@dataclass(frozen=True)
class FileCallStorage(PerKeyLocks, CallMixin, FileBackend):
    """Calls as files, with an index over them for queries.

    Attributes
    ----------
    root, secret
        See :class:`FileBackend`.
    inline_limit : int
        Bytes of JSON up to which arguments and results go into the record; such a call is one file.
    index : Index
        Derived from the files; may be removed at any time.
    """

    inline_limit: int = INLINE_LIMIT
    index: Index = field(init=False, repr=False, compare=False)
    _read: dict[Digest, tuple[file_system.Signature, DigestedCall]] = field(init=False, repr=False, compare=False)

    _suffix = ".json"

    def __post_init__(self) -> None:
        super().__post_init__()
        # An index isn't signed: where records have to be, it is kept out of others' reach, in memory.
        object.__setattr__(self, "_read", {})
        object.__setattr__(self, "index", Index(self, f"{self.root}/index.sqlite" if self.secret is None else None))

    def put(self, value: DigestedCall | Call, key: Digest) -> Digest:
        """Write the record of a call; of one with live values their digests alone."""
        if isinstance(value, Call):
            value = value.digest()
        self._write(key, records.seal(records.encode(value, key), key, self.secret), f"the call of {value.name}")
        return key

    def get(self, key: Digest) -> DigestedCall:
        """Read the record of a call; KeyError where it is missing, damaged or not to be trusted."""
        record = self.record(key)
        if record is None:
            raise KeyError(key)
        return records.decode(record)

    def peek(self, key: Digest) -> DigestedCall:
        """The call under ``key``, for a caller who changes nothing of it; remembered while its file stays as it is."""
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
        settled = file_system.is_settled(status, time.time_ns())  # asked before it is read
        call = self.get(key)
        if settled and status.st_size <= _SMALL:
            if len(self._read) >= _MOST_READ:
                self._read.clear()
            self._read[key] = (signature, call)
        return call

    @property
    def leases(self) -> str:
        """Where processes agree who runs a call; made by who takes the first lease, but not its parent."""
        with contextlib.suppress(OSError):  # read-only or full: there will be no leases
            self.tree.make_root()
        return f"{self.root}/leases"

    def record(self, key: Digest) -> bytes | None:
        """The JSON of a record; None where it is missing, damaged or not to be trusted."""
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
        """Calls that fit a pattern, through the index."""
        with self._operation_context("", intent=Intent.READ):
            yield from self.index.query(template)

    # What the index reads

    def shards(self) -> dict[str, int]:
        """Shard directories and their mtimes (ns)."""
        return self.tree.shards()

    def scan(self, shard: str) -> dict[Digest, Signature]:
        """Records of a shard as they are now."""
        return self.tree.scan(shard)

    settled = staticmethod(FileTree.settled)
    decode = staticmethod(records.decode)

# SPDX-License-Identifier: Apache-2.0
"""A read-only store: a directory in a container image, a mount, someone else's cache."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from cuda_progcache._util import modes
from cuda_progcache.errors import ReadOnlyError
from cuda_progcache.store.base import Entry, EntryInfo, ProgramCacheResource, key_bytes
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.reader import Reader

if TYPE_CHECKING:
    from pathlib import Path

    from cuda_progcache.store.base import Key, Value
    from cuda_progcache.store.breaker import CircuitBreaker
    from cuda_progcache.store.stats import StoreStats


def look_into(path: str | os.PathLike[str]) -> FileStreamProgramCache:
    """Open a directory to list what it holds, whoever owns it; nothing is written there.

    This is for commands that display. Don't run what others may have put there.

    Raises
    ------
    StoreError
        There is no such directory, or it can't be read.
    """
    return Reader(path, shared=True, strict=True)


class ReadOnlyProgramCache(ProgramCacheResource):
    """A read-only view of another store.

    Reads leave no trace in a directory: last uses aren't updated, damaged entries aren't quarantined (they are misses),
    and no counters are written. Writes raise :class:`~cuda_progcache.errors.ReadOnlyError`, except :meth:`publish`,
    which the compile path calls: it returns ``False``, and the program is compiled but not kept. A
    :class:`~cuda_progcache.store.ProgramCacheStack` doesn't write to it.

    In mode ``off`` a directory isn't read, and in mode ``frozen`` a miss is an error, as for
    :class:`~cuda_progcache.store.FileStreamProgramCache`.

    Parameters
    ----------
    inner : ProgramCacheResource or path
        The store, which itself stays writable; or the directory of one, which must exist.
    shared : bool
        For a path: accept a directory that others own or can write to, and so choose what runs on your GPU.

    Raises
    ------
    StoreError
        There is no such directory.
    UnsafeRootError
        Others own the directory or can write to it; see :mod:`~cuda_progcache.store.sharing`.
    TypeError
        ``inner`` is neither a store nor a path.
    """

    def __init__(self, inner: ProgramCacheResource | str | os.PathLike[str], *, shared: bool = False) -> None:
        if isinstance(inner, (str, os.PathLike)):
            mode = modes.current() if self.mode is None else "rw"
            if mode != "off":
                reader = Reader(inner, shared=shared)  # raises if the directory doesn't exist, in any mode
            inner = FileStreamProgramCache(inner, shared=shared) if mode in {"off", "frozen"} else reader
        elif isinstance(inner, ReadOnlyProgramCache):
            inner = inner._inner
        elif type(inner) is FileStreamProgramCache:
            settings = inner.settings
            if settings is not None:
                reader = Reader(settings["path"], shared=settings["shared"])
                reader._stand_as(inner)
                inner = reader
        elif not isinstance(inner, ProgramCacheResource):
            raise TypeError(f"a store or the path of one is needed, got {type(inner).__name__}")
        self._inner: ProgramCacheResource = inner

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.name}>"

    @property
    def name(self) -> str:
        """The directory or the service that it reads, or the store's class."""
        inner = self._inner
        return str(getattr(inner, "path", None) or getattr(inner, "name", None) or type(inner).__name__)

    @property
    def is_remote(self) -> bool:  # type: ignore[override]
        """Whether the store it reads is on another machine."""
        return self._inner.is_remote

    @property
    def demands_signatures(self) -> bool:
        """Whether the store it reads does."""
        return self._inner.demands_signatures

    @property
    def reaches_beyond(self) -> bool:
        """Whether the store it reads, or one behind that, is on another machine."""
        return self._inner.reaches_beyond

    @property
    def breaker(self) -> CircuitBreaker | None:  # type: ignore[override]
        """The circuit breaker of the store it reads."""
        return self._inner.breaker

    @property
    def roots(self) -> tuple[Path, ...]:
        """The directories of the store it reads. There is no ``path``, which would mean a writable directory."""
        return self._inner.roots

    # Reads

    def __getitem__(self, key: Key) -> bytes:
        return self._inner[key]

    def load(self, key: Key) -> Entry | None:
        """The entry with its record; ``None`` on a miss."""
        return self._inner.load(key)

    def load_again(self, key: Key) -> Entry | None:
        """:meth:`load` for a caller whose miss has just been counted; see :meth:`ProgramCacheResource.load_again`."""
        return self._inner.load_again(key)

    def load_many(self, keys: Iterable[bytes]) -> Iterator[tuple[bytes, Entry]]:
        """Load many entries: those that exist, with their keys."""
        return self._inner.load_many(keys)

    def fetch(self, keys: Iterable[bytes]) -> int:
        """See :meth:`ProgramCacheResource.fetch`."""
        return self._inner.fetch(keys)

    def find_manifests(self, names: Iterable[str]) -> Mapping[str, bytes]:
        """Header manifests; see :meth:`ProgramCacheResource.find_manifests`."""
        return self._inner.find_manifests(names)

    def __len__(self) -> int:
        return len(self._inner)

    def entries(self) -> Iterator[EntryInfo]:
        """Every entry."""
        return self._inner.entries()

    def info(self, digest: str) -> EntryInfo:
        """One entry; :class:`KeyError` if there is none of that digest."""
        return self._inner.info(digest)

    def first(
        self, count: int, *, by: str = "used", matches: Callable[[EntryInfo], bool] = lambda _: True
    ) -> list[EntryInfo]:
        """The first entries in an order; see :meth:`ProgramCacheResource.first`."""
        return self._inner.first(count, by=by, matches=matches)

    def _digests(self, prefix: str) -> Iterable[str]:
        return self._inner._digests(prefix)

    def _sizes(self) -> Iterable[tuple[str, int, int]]:
        return self._inner._sizes()

    def stats(self) -> StoreStats:
        """The store's contents in numbers, and the counters of this object."""
        return self._inner.stats()

    def close(self) -> None:
        """Close the store it reads."""
        self._inner.close()

    # Writes

    def _refuse(self, what: str) -> NoReturn:
        raise ReadOnlyError(
            errno.EROFS, f"can't {what}: this store is read-only; put a writable level before it in a stack", self.name
        )

    def __setitem__(self, key: Key, value: Value) -> None:
        key_bytes(key)
        if modes.current() != "off":  # in mode off, cuda.core stores what it had to compile, since every lookup misses
            self._refuse("store a program")

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Keep nothing."""
        key_bytes(key)
        return False

    def __delitem__(self, key: Key) -> None:
        key_bytes(key)
        self._refuse("remove a program")

    def remove(self, digest: str) -> None:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("remove a program")

    def clear(self) -> None:
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("clear the program cache")

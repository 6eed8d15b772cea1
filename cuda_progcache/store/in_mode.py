# SPDX-License-Identifier: Apache-2.0
"""Stores in modes other than ``rw`` (:mod:`cuda_progcache._util.modes`), which write nothing anywhere.

A store on a directory is made as one of these (``FileStreamProgramCache(mode="ro")``, ``CUDA_PROGCACHE``). Any other
store that is passed to a compile is converted by :func:`in_mode`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from cuda_progcache.errors import ReadOnlyError
from cuda_progcache.store.base import (
    Entry,
    EntryInfo,
    ProgramCacheResource,
    entry_digest,
    frozen_miss,
    key_bytes,
    program_bytes,
)
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.reader import ReadRoot
from cuda_progcache.store.readonly import ReadOnlyProgramCache
from cuda_progcache.store.root import default_root
from cuda_progcache.store.stack import ProgramCacheStack
from cuda_progcache.store.stats import StoreStats

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path
    from typing import Self

    from cuda_progcache.store.base import Key, Value


class _Root(ReadRoot):
    """A read-only directory that may be missing; if so, it counts as empty."""

    def open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            super().open()


class _ReadOnly(FileStreamProgramCache):
    """Reads a directory; drops writes, and refuses maintenance that would change the directory."""

    _ROOT = _Root
    mode: str = "ro"

    def __new__(cls, path: str | os.PathLike[str] | None = None, *, shared: bool = False, **_: Any) -> Self:
        """Make a store on the directory; if none is known, on a path that can't exist."""
        made = object.__new__(cls)
        try:
            where = default_root() if path is None else os.path.abspath(os.fspath(path))
        except OSError:  # no home directory
            where = os.path.join(os.devnull, "cuda-progcache")
        made._root = cls._ROOT(where, shared=shared)
        return made

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        max_size_bytes: int | None = None,
        mode: str | None = None,  # noqa: ARG002 - the class has it
        tiers: Any = None,
        **how: Any,
    ) -> None:
        super().__init__(self._root.path, **how)  # no cap, so last uses aren't written
        self._told_cap = max_size_bytes
        self._stand_before(layers=path is None, tiers=tiers)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The constructor arguments for another process."""
        told = super().settings
        return None if told is None else {**told, "max_size_bytes": self._told_cap}

    # Writes by a compile are dropped

    def __setitem__(self, key: Key, value: Value) -> None:
        self._assign(key, value)

    def _assign(self, key: Key, value: Value) -> bool:
        key_bytes(key)
        program_bytes(value)
        return False

    def publish(self, key: Key, data: Value, record: Mapping[str, Any]) -> bool:  # noqa: ARG002
        """Keep nothing."""
        return self._assign(key, data)

    def keep_manifest(self, name: str, content: bytes) -> None:
        """Keep nothing."""

    # Maintenance is refused

    def _refuse(self, what: str) -> NoReturn:
        raise ReadOnlyError(
            errno.EROFS, f"can't {what} in mode {self.mode!r}; use CUDA_PROGCACHE=rw or mode='rw'", self._root.path
        )

    def __delitem__(self, key: Key) -> None:
        self.remove(entry_digest(key))

    def remove(self, digest: str) -> None:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("remove a program")

    def quarantine(self, digest: str) -> None:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("quarantine a program")

    def clear(self, *, pinned: bool = True) -> None:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("clear the program cache")

    def pin(self, key_or_digest: Key) -> str:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("pin a program")

    def unpin(self, key_or_digest: Key) -> str:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("unpin a program")

    def verify(self, *, repair: bool = False) -> Any:
        """Verify as in mode ``rw``; with ``repair``, raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        if repair:
            self._refuse("repair the cache")
        return super().verify()

    def prune(
        self, *, max_size_bytes: int | None = None, older_than: float | None = None, dry_run: bool = False
    ) -> Any:
        """With ``dry_run``, report as in mode ``rw``; else raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        if not dry_run:
            self._refuse("prune the cache")
        return super().prune(max_size_bytes=max_size_bytes, older_than=older_than, dry_run=True)

    def adopt(self, path: Any, key: Key, record: Mapping[str, Any] | None = None) -> NoReturn:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("adopt a program")

    def import_(self, path: Any, *, archs: Iterable[str] | None = None) -> NoReturn:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("import a bundle")


class _Off(_ReadOnly):
    """Holds nothing, and reads nothing."""

    mode = "off"

    class _ROOT(_Root):
        def open(self) -> None:
            """Don't touch the directory."""

    def get(self, key: Key, default: Any = None) -> Any:
        """``default``."""
        key_bytes(key)
        return default

    def __getitem__(self, key: Key) -> bytes:
        key_bytes(key)
        raise KeyError(key)

    def load(self, key: Key) -> Entry | None:
        """None."""
        key_bytes(key)
        return None

    load_again = load

    def __len__(self) -> int:
        return 0

    def entries(self) -> Iterator[EntryInfo]:
        """None."""
        return iter(())

    def first(self, *_: Any, **__: Any) -> list[EntryInfo]:
        """None."""
        return []

    def census(self) -> NoReturn:
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("look through the cache")

    def info(self, digest: str) -> EntryInfo:
        """Raise :class:`KeyError`."""
        raise KeyError(digest)

    def _digests(self, prefix: str) -> Iterable[str]:  # noqa: ARG002
        return ()

    def _sizes(self) -> Iterable[tuple[str, int, int]]:
        return ()

    def pins(self) -> frozenset[str]:
        """None."""
        return frozenset()

    @property
    def roots(self) -> tuple[Path, ...]:
        """None."""
        return ()

    @property
    def _stack(self) -> None:
        """None: there are no levels behind it."""

    def stats(self) -> StoreStats:
        """Statistics that are all zero."""
        counted: Any = dict.fromkeys(_COUNTED, 0)
        return StoreStats(**counted)

    def verify(self, *, repair: bool = False) -> NoReturn:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("verify the cache")

    def export(self, *_: Any, **__: Any) -> NoReturn:
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("export the cache")


class _Frozen(_ReadOnly):
    """Reads a directory; a miss is an error."""

    mode = "frozen"

    def get(self, key: Key, default: Any = None) -> Any:  # noqa: ARG002 - there is no use for it
        """The entry's bytes (FrozenMissError: there are none)."""
        return self[key]

    def __getitem__(self, key: Key) -> bytes:
        return found_in(self, key, super().get(key))


#: The fields of a store's statistics that are numbers.
_COUNTED = tuple(name for name in StoreStats._fields if StoreStats.__annotations__[name] == "int")
_CLASSES: Mapping[str, type[_ReadOnly]] = {"ro": _ReadOnly, "off": _Off, "frozen": _Frozen}


def blank(mode: str, path: str | os.PathLike[str] | None, *, shared: bool) -> FileStreamProgramCache:
    """The object that ``FileStreamProgramCache.__new__`` makes in modes other than ``rw``."""
    return _CLASSES[mode](path, shared=shared)


class FrozenProgramCache(ReadOnlyProgramCache):
    """A read-only view of another store in which a miss is an error, so that nothing is compiled.

    It can be used wherever a cache can, including ``cuda.core.Program.compile(cache=)``. There only the key of a
    missing program is known. With :class:`cuda_progcache.Program` and the service, the error says what differs from the
    nearest program in the store, and which command adds the missing one.

    Parameters
    ----------
    inner, shared
        As for :class:`~cuda_progcache.store.ReadOnlyProgramCache`.
    """

    mode = "frozen"

    def get(self, key: Key, default: Any = None) -> Any:  # noqa: ARG002 - there is no use for it
        """The entry's bytes (FrozenMissError: there are none)."""
        return self[key]

    def __getitem__(self, key: Key) -> bytes:
        return found_in(self, key, ReadOnlyProgramCache.get(self, key))


def found_in(cache: ProgramCacheResource, key: Key, data: bytes | None) -> bytes:
    """The data of a lookup in a frozen store (FrozenMissError if there is none)."""
    if data is not None:
        return data
    raise frozen_miss(getattr(cache, "name", None) or getattr(cache, "directory", None) or repr(cache), key)


def in_mode(cache: Any, mode: str) -> ReadOnlyProgramCache | None:
    """The view of a cache that a compile uses in a mode other than ``rw``.

    Parameters
    ----------
    cache : store or None
        Ours or ``cuda.core``'s.
    mode : str

    Returns
    -------
    ReadOnlyProgramCache or None
        It has no path, so that no derived data is written next to its entries. Its lookups return None on a miss, also
        in mode ``frozen``. None if nothing is to be looked up.
    """
    if cache is None or mode == "off":
        return None
    inner = cache._inner if isinstance(cache, ReadOnlyProgramCache) else cache
    if isinstance(inner, _Frozen):
        return _looked_at(inner)
    if isinstance(inner, ProgramCacheStack):  # a level would otherwise keep copies of the next one's entries
        return ReadOnlyProgramCache(ProgramCacheStack([_level(level, mode) for level in inner.levels]))
    if not isinstance(inner, ProgramCacheResource):
        inner = _Theirs(inner)
    return ReadOnlyProgramCache(inner)


def given_mode(cache: ProgramCacheResource, mode: str) -> ProgramCacheResource:
    """A view of a store that is always used in the given mode.

    Parameters
    ----------
    cache : store
        It isn't changed.
    mode : {"rw", "ro", "off", "frozen"}
    """
    if mode == "rw":
        return cache
    if mode == "frozen":
        return FrozenProgramCache(cache)
    made = in_mode(cache, mode) or FileStreamProgramCache(mode="off")
    made.mode = mode
    return made


def looked_at(cache: Any, mode: str) -> ReadOnlyProgramCache:
    """As :func:`in_mode`, but an empty store if nothing is to be looked up."""
    return in_mode(cache, mode) or ReadOnlyProgramCache(FileStreamProgramCache(mode="off"))


def _level(level: ProgramCacheResource, mode: str) -> ProgramCacheResource:
    return in_mode(level, mode) or level


def _looked_at(cache: FileStreamProgramCache) -> ReadOnlyProgramCache:
    """A view of the same directory whose misses are None. It is kept with the store, as are its verified checksums."""
    kept: ReadOnlyProgramCache | None = cache.__dict__.get("_looked_at")
    if kept is None:
        store = _ReadOnly(cache.directory, shared=cache._said_shared)
        store._stand_as(cache)
        kept = ReadOnlyProgramCache(store)
        cache.__dict__["_looked_at"] = kept
    return kept


class _Theirs(ProgramCacheResource):
    """A read-only adapter for a store of cuda.core."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __getitem__(self, key: Key) -> bytes:
        data: bytes | None = self._theirs.get(key_bytes(key))
        if data is None:
            raise KeyError(key)
        return data

    def __setitem__(self, key: Key, value: Value) -> None:
        """Drop the value."""

    def __delitem__(self, key: Key) -> None:
        """Do nothing."""

    def __len__(self) -> int:
        return len(self._theirs)

    def clear(self) -> None:
        """Do nothing."""

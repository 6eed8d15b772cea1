# SPDX-License-Identifier: Apache-2.0
"""Stores in another mode than ``rw`` (:mod:`cuda_progcache._util.modes`): nothing is written anywhere.

A store on a directory is one of these when it is made (``FileStreamProgramCache(mode="ro")``, ``CUDA_PROGCACHE``); what
a compile is handed is brought into its mode by :func:`in_mode`, whatever kind of store it is.
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
    """A directory that is looked at, and may not be there: then it holds nothing."""

    def open(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            super().open()


class _ReadOnly(FileStreamProgramCache):
    """Reads what lies in a directory; drops what it is given, and refuses what would change the directory."""

    _ROOT = _Root
    mode: str = "ro"

    def __new__(cls, path: str | os.PathLike[str] | None = None, *, shared: bool = False, **_: Any) -> Self:
        """Make a store on the directory, or where none is known, on one that can't be there."""
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
        super().__init__(self._root.path, **how)  # no cap: no bumped use
        self._told_cap = max_size_bytes
        self._stand_before(layers=path is None, tiers=tiers)

    @property
    def settings(self) -> dict[str, Any] | None:
        """What another process has to pass to the constructor."""
        told = super().settings
        return None if told is None else {**told, "max_size_bytes": self._told_cap}

    # What a compile does passes by

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

    # What its owner asks for is refused

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
        """As ever; with ``repair``, raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        if repair:
            self._refuse("repair the cache")
        return super().verify()

    def prune(
        self, *, max_size_bytes: int | None = None, older_than: float | None = None, dry_run: bool = False
    ) -> Any:
        """As ever with ``dry_run``; else raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
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
    """Holds nothing, and looks at nothing."""

    mode = "off"

    class _ROOT(_Root):
        def open(self) -> None:
            """Look at nothing."""

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
        """None: there is nothing behind it, either."""

    def stats(self) -> StoreStats:
        """All zero."""
        counted: Any = dict.fromkeys(_COUNTED, 0)
        return StoreStats(**counted)

    def verify(self, *, repair: bool = False) -> NoReturn:  # noqa: ARG002
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("verify the cache")

    def export(self, *_: Any, **__: Any) -> NoReturn:
        """Raise :class:`~cuda_progcache.errors.ReadOnlyError`."""
        self._refuse("export the cache")


class _Frozen(_ReadOnly):
    """Reads what lies in a directory; what doesn't is an error."""

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
    """What ``FileStreamProgramCache.__new__`` makes in another mode than ``rw``."""
    return _CLASSES[mode](path, shared=shared)


class FrozenProgramCache(ReadOnlyProgramCache):
    """What another store holds; what it doesn't hold is an error, and nothing is compiled.

    It works wherever a cache goes, under ``cuda.core.Program.compile(cache=)``, too. There the key is all that is known
    of a program; under :class:`cuda_progcache.Program` and the service the error says what differs from the nearest
    program that is there, and which command would mend it.

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
    """What a frozen store was asked for (FrozenMissError: it isn't there)."""
    if data is not None:
        return data
    raise frozen_miss(getattr(cache, "name", None) or getattr(cache, "directory", None) or repr(cache), key)


def in_mode(cache: Any, mode: str) -> ReadOnlyProgramCache | None:
    """A cache as a compile may use it in a mode other than ``rw``.

    Parameters
    ----------
    cache : store or None
        Ours or ``cuda.core``'s.
    mode : str

    Returns
    -------
    ReadOnlyProgramCache or None
        Without a path, so that nothing is derived beside its entries; its lookups give None on a miss, in mode
        ``frozen`` too. None where nothing is to be looked up.
    """
    if cache is None or mode == "off":
        return None
    inner = cache._inner if isinstance(cache, ReadOnlyProgramCache) else cache
    if isinstance(inner, _Frozen):
        return _looked_at(inner)
    if isinstance(inner, ProgramCacheStack):  # a level would take copies of what the next one has
        return ReadOnlyProgramCache(ProgramCacheStack([_level(level, mode) for level in inner.levels]))
    if not isinstance(inner, ProgramCacheResource):
        inner = _Theirs(inner)
    return ReadOnlyProgramCache(inner)


def given_mode(cache: ProgramCacheResource, mode: str) -> ProgramCacheResource:
    """A store that is used in a mode from now on, wherever it is handed to.

    Parameters
    ----------
    cache : store
        Stays as it is.
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
    """As :func:`in_mode`; an empty store where nothing is to be looked up."""
    return in_mode(cache, mode) or ReadOnlyProgramCache(FileStreamProgramCache(mode="off"))


def _level(level: ProgramCacheResource, mode: str) -> ProgramCacheResource:
    return in_mode(level, mode) or level


def _looked_at(cache: FileStreamProgramCache) -> ReadOnlyProgramCache:
    """The same directory, with misses that are None; kept, with what it has verified, as long as the store."""
    kept: ReadOnlyProgramCache | None = cache.__dict__.get("_looked_at")
    if kept is None:
        store = _ReadOnly(cache.directory, shared=cache._said_shared)
        store._stand_as(cache)
        kept = ReadOnlyProgramCache(store)
        cache.__dict__["_looked_at"] = kept
    return kept


class _Theirs(ProgramCacheResource):
    """A store of cuda.core's kind, read."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    def __getitem__(self, key: Key) -> bytes:
        data: bytes | None = self._theirs.get(key_bytes(key))
        if data is None:
            raise KeyError(key)
        return data

    def __setitem__(self, key: Key, value: Value) -> None:
        """Drop it."""

    def __delitem__(self, key: Key) -> None:
        """Leave it."""

    def __len__(self) -> int:
        return len(self._theirs)

    def clear(self) -> None:
        """Leave all."""

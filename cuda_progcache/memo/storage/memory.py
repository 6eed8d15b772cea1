# SPDX-License-Identifier: Apache-2.0
"""Storages in memory."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cuda_progcache.memo.digest import Digest
from cuda_progcache.memo.storage.base import CallMixin, StorageBackend, ValueMixin
from cuda_progcache.memo.storage.destructuring import DestructuringMixin
from cuda_progcache.memo.storage.locking import PerKeyLocks
from cuda_progcache.memo.tagged_json import SaveError

if TYPE_CHECKING:
    from cuda_progcache.memo.call import DigestedCall

_IMMUTABLE = frozenset({int, float, str, bytes, bool, type(None), complex, Digest})


@dataclass(frozen=True)
class MemoryBackend(StorageBackend):
    """A backend that keeps values in a dict; ``put`` and ``get`` copy them.

    Attributes
    ----------
    storage : dict
        Provided by the caller, who may share it between storages.
    """

    storage: dict[Digest, Any]

    # A storage is hashed by identity; the hash of a frozen dataclass would hash the dict.
    __hash__ = object.__hash__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__hash__" not in cls.__dict__:
            raise TypeError(
                f"{cls.__qualname__} needs `__hash__ = object.__hash__` in its body: @dataclass(frozen=True) derives "
                "__hash__ from the fields, and a dict isn't hashable"
            )

    def list(self) -> Iterable[Digest]:
        """Return every key."""
        return tuple(self.storage)

    def put(self, value: Any, key: Digest) -> Digest:
        """Store a copy of ``value``; SaveError if it can't be copied."""
        try:
            self.storage[key] = value if type(value) in _IMMUTABLE else deepcopy(value)
        except Exception as error:
            raise SaveError(f"can't copy a {type(value).__module__}.{type(value).__qualname__}: {error}") from error
        return key

    def get(self, key: Digest) -> Any:
        """Return a copy of the value under ``key``."""
        value = self.storage[key]
        return value if type(value) in _IMMUTABLE else deepcopy(value)

    def _contains(self, key: Digest) -> bool:
        return key in self.storage

    def _evict(self, key: Digest) -> None:
        self.storage.pop(key, None)


@dataclass(frozen=True)
class ValueMemory(PerKeyLocks, DestructuringMixin, ValueMixin, MemoryBackend):
    """A storage that keeps values in a dict: ``ValueMemory({})``."""

    __hash__ = object.__hash__


def _copied_call(call: DigestedCall) -> DigestedCall:
    return call.altered(arguments=dict(call.arguments), metadata=_copied(call.metadata), sealed=None)


def _copied(value: Any) -> Any:
    """Return a deep copy; for JSON values, as in most metadata, it takes a tenth of :func:`copy.deepcopy`'s time."""
    kind = type(value)
    if kind is dict:
        return {key: _copied(item) for key, item in value.items()}
    if kind is list:
        return [_copied(item) for item in value]
    return value if kind in _IMMUTABLE else deepcopy(value)


@dataclass(frozen=True)
class CallMemory(PerKeyLocks, CallMixin, MemoryBackend):
    """A storage that keeps calls in a dict: ``CallMemory({})``."""

    __hash__ = object.__hash__

    def put(self, value: DigestedCall, key: Digest) -> Digest:
        """Store a copy of a call."""
        self.storage[key] = _copied_call(value)
        return key

    def get(self, key: Digest) -> DigestedCall:
        """Return a copy of the call under ``key``."""
        return _copied_call(self.storage[key])

    def peek(self, key: Digest) -> DigestedCall:
        """Return the call under ``key`` without copying it, for a caller that doesn't change it."""
        call: DigestedCall = self.storage[key]
        return call

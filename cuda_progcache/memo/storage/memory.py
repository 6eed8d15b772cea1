# SPDX-License-Identifier: Apache-2.0
"""Storages in this process's memory."""

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
    """A dict; what is put in and what is got are copies.

    Attributes
    ----------
    storage : dict
        Made by the caller, who may share it between storages.
    """

    storage: dict[Digest, Any]

    # A storage is itself, not its content: frozen dataclasses would hash the dict.
    __hash__ = object.__hash__

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__hash__" not in cls.__dict__:
            raise TypeError(
                f"{cls.__qualname__} needs `__hash__ = object.__hash__` in its body: @dataclass(frozen=True) derives "
                "__hash__ from the fields, and a dict isn't hashable"
            )

    def list(self) -> Iterable[Digest]:
        """Every key."""
        return tuple(self.storage)

    def put(self, value: Any, key: Digest) -> Digest:
        """Keep a copy of ``value``; SaveError where it can't be copied."""
        try:
            self.storage[key] = value if type(value) in _IMMUTABLE else deepcopy(value)
        except Exception as error:
            raise SaveError(f"can't copy a {type(value).__module__}.{type(value).__qualname__}: {error}") from error
        return key

    def get(self, key: Digest) -> Any:
        """A copy of what is kept under ``key``."""
        value = self.storage[key]
        return value if type(value) in _IMMUTABLE else deepcopy(value)

    def _contains(self, key: Digest) -> bool:
        return key in self.storage

    def _evict(self, key: Digest) -> None:
        self.storage.pop(key, None)


@dataclass(frozen=True)
class ValueMemory(PerKeyLocks, DestructuringMixin, ValueMixin, MemoryBackend):
    """Values in a dict: ``ValueMemory({})``."""

    __hash__ = object.__hash__


def _copied_call(call: DigestedCall) -> DigestedCall:
    return call.altered(arguments=dict(call.arguments), metadata=_copied(call.metadata), sealed=None)


def _copied(value: Any) -> Any:
    """A deep copy; of JSON values, which metadata is as a rule, at a tenth of :func:`copy.deepcopy`'s time."""
    kind = type(value)
    if kind is dict:
        return {key: _copied(item) for key, item in value.items()}
    if kind is list:
        return [_copied(item) for item in value]
    return value if kind in _IMMUTABLE else deepcopy(value)


@dataclass(frozen=True)
class CallMemory(PerKeyLocks, CallMixin, MemoryBackend):
    """Calls in a dict: ``CallMemory({})``."""

    __hash__ = object.__hash__

    def put(self, value: DigestedCall, key: Digest) -> Digest:
        """Keep a copy of a call."""
        self.storage[key] = _copied_call(value)
        return key

    def get(self, key: Digest) -> DigestedCall:
        """A copy of the call under ``key``."""
        return _copied_call(self.storage[key])

    def peek(self, key: Digest) -> DigestedCall:
        """The call under ``key`` itself, for a caller who changes nothing of it."""
        call: DigestedCall = self.storage[key]
        return call

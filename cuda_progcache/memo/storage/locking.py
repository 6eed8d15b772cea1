# SPDX-License-Identifier: Apache-2.0
"""Mixins that serialize a storage's writers, per key or altogether.

They work between the threads of one process; between processes, files are safe because they are replaced atomically.
Locks aren't pickled with a storage, and a forked child gets new ones.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cuda_progcache._util import forks
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.memo.storage.base import Intent, OperationContext

if TYPE_CHECKING:
    from cuda_progcache.memo.digest import Digest


class KeyLocks:
    """A reentrant lock per key, which exists only while a thread holds it or waits for it."""

    def __init__(self) -> None:
        self._table = ForkSafeLock()
        self.renew()
        forks.in_child(self.renew)

    def renew(self) -> None:
        """Forget every lock, since no thread of a forked child holds one."""
        self._locks: dict[str, list[Any]] = {}

    def __reduce__(self) -> tuple[type[KeyLocks], tuple[()]]:
        return (type(self), ())

    def __deepcopy__(self, memo: object) -> KeyLocks:
        return type(self)()

    def acquire(self, key: str) -> None:
        """Wait for a key's lock and acquire it."""
        with self._table:
            entry = self._locks.get(key)
            if entry is None:
                entry = self._locks[key] = [threading.RLock(), 0]
            entry[1] += 1
        entry[0].acquire()

    def release(self, key: str) -> None:
        """Release a key's lock."""
        with self._table:
            entry = self._locks.get(key)
            if entry is None:
                return  # acquired in the parent, before a fork
            entry[1] -= 1
            if not entry[1]:
                del self._locks[key]
        entry[0].release()


def locks_of(owner: object) -> KeyLocks:
    """Return the locks of a storage or cache; they are in its ``__dict__``, but aren't fields of the dataclass."""
    found = owner.__dict__.get("_key_locks")
    if found is None:
        found = owner.__dict__.setdefault("_key_locks", KeyLocks())
    return found  # type: ignore[no-any-return]


class PerKeyLocks(OperationContext):
    """A mixin with a lock per key: writers of the same key wait for each other, readers never wait.

    List it before the storage in the bases: ``class Mine(PerKeyLockMixin, ValueMixin, Backend)``.
    """

    def _operation_context(
        self, key: Digest | str, *, intent: Intent = Intent.WRITE
    ) -> contextlib.AbstractContextManager[None]:
        around = super()._operation_context(key, intent=intent)
        return around if intent is Intent.READ else _Locked(locks_of(self), self._locked_name(key), around)

    def _locked_name(self, key: Digest | str) -> str:
        return str(key)


class PerKeyLockMixin(PerKeyLocks):
    """:class:`PerKeyLocks` under a name that can be listed before a storage that already derives from it."""


class _Locked:
    """A key's lock, held around another context; a class, since generators take twice as long to enter."""

    __slots__ = ("_inner", "_key", "_locks")

    def __init__(self, locks: KeyLocks, key: str, inner: contextlib.AbstractContextManager[None]) -> None:
        self._locks = locks
        self._key = key
        self._inner = inner

    def __enter__(self) -> None:
        self._locks.acquire(self._key)
        try:
            self._inner.__enter__()
        except BaseException:
            self._locks.release(self._key)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            return self._inner.__exit__(kind, error, traceback)
        finally:
            self._locks.release(self._key)


class SerializingMixin(PerKeyLocks):
    """A mixin with one lock for all keys: there is one writer at a time, readers never wait."""

    def _locked_name(self, key: Digest | str) -> str:  # noqa: ARG002 - one lock for all keys
        return ""

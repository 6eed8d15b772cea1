# SPDX-License-Identifier: Apache-2.0
"""The interface to a tier's service, which keeps named objects."""

from __future__ import annotations

import abc
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cuda_progcache._util.parallel import for_each
from cuda_progcache.errors import StoreError

#: Objects of one call for many, and their bytes where these are sent.
_OBJECTS, _BYTES = 100, 8 << 20
#: Bytes of the objects of one call for many, after which no more are asked for.
BATCH_BYTES = 256 << 20
#: Requests at once to a service without a call for many: at 5 ms to the server a thousand objects take 0.3 s.
MANY = 32


def reason(exc: Exception) -> str:
    """What went wrong, without the tier's name, which the message around it has."""
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else f"{type(exc).__name__}: {exc}"


class Listed(NamedTuple):
    """An object as a listing tells of it.

    Attributes
    ----------
    name : str
        Its name below the tier's prefix.
    size : int
        Bytes.
    modified : float
        When it was last written, in seconds since the epoch; 0.0 where the service doesn't say.
    """

    name: str
    size: int
    modified: float


class NotInstalledError(StoreError):
    """The client library of a service isn't installed, which no later call changes."""


class TooLargeError(StoreError):
    """An object is said to be larger than it may be; none of it was read."""


class Engine(abc.ABC):
    """Gets, puts and lists the objects of one service; knows nothing of programs, and trusts nothing it is sent.

    An engine makes one attempt, without retries, and never falls back on its client's defaults for time. Trouble is an
    ``OSError``: :class:`TimeoutError` where time ran out, :class:`~cuda_progcache.errors.StoreError` for all else, with
    a message without secrets and the tier's name as its ``filename``. An object that isn't there is no trouble.

    Threads share an engine. A client or connection that can't be used in a forked child is opened anew there, or, where
    even that can't be, the engine says so by :attr:`survives_fork`.

    Attributes
    ----------
    name : str
        The tier's URL without user, password and query.
    keeps_time : bool
        Whether each call ends by its ``until`` whatever the server does. Calls of the others are made on a thread that
        the caller leaves behind.
    survives_fork : bool
        Whether it can be used in a child of a process that has used it.
    threads : int
        On which many objects are asked for, or written.
    """

    name: str
    keeps_time: bool = False
    survives_fork: bool = True
    threads: int = 1

    def prepare(self) -> None:  # noqa: B027
        """Load all that a call needs, before its time runs (:class:`NotInstalledError`: that can't be had).

        Calls are made on threads of ours, too, which must import nothing: a process that is about to end can't any
        more, and a child that is forked while a thread imports a module waits for that module for ever.
        """

    @abc.abstractmethod
    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """The object of that name; ``None`` if there is none.

        Parameters
        ----------
        name : str
            Below the tier's prefix: ``v1/programs/ab/cdef...``.
        limit : int
            Bytes that it may have (:class:`TooLargeError`, before its body is read: it is larger).
        until : float
            The end of the caller's patience, as :func:`time.monotonic` counts.
        """

    def get_many(self, names: Sequence[str], *, limit: int, until: float) -> Mapping[str, bytes | None]:
        """Several objects; an engine with a call for many overrides this.

        Returns
        -------
        mapping
            ``None`` for one that isn't there, or is too large. Names are left out once :data:`BATCH_BYTES` have come;
            at least one is always answered.
        """
        found: dict[str, bytes | None] = {}
        sizes: list[int] = []

        def get(name: str) -> None:
            if sum(sizes) >= BATCH_BYTES:
                return
            try:
                data = self.get(name, limit=limit, until=until)
            except TooLargeError:
                data = None
            sizes.append(len(data or b""))
            found[name] = data

        for_each(names, get, self.threads)
        return found

    @abc.abstractmethod
    def put(self, name: str, data: bytes, *, until: float) -> None:
        """Write an object, whole or not at all as far as the service can; the last write wins."""

    def put_many(self, objects: Mapping[str, bytes], *, until: float) -> None:
        """Write several objects; an engine with a call for many overrides this."""
        for_each(objects.items(), lambda pair: self.put(*pair, until=until), self.threads)

    @abc.abstractmethod
    def delete(self, names: Iterable[str], *, until: float) -> None:
        """Remove objects; those that aren't there are skipped."""

    @abc.abstractmethod
    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """The objects whose names begin so; reads none of them.

        Parameters
        ----------
        prefix : str
            What their names begin with.
        until : float
            The end of the caller's patience with the whole listing; no page of it may take longer than a write.

        Raises
        ------
        TimeoutError
            It doesn't end in time.
        StoreError
            The service can't list.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close what is open; the engine can be used afterwards."""


def each_of(
    names: Iterable[str], ask: Callable[[Sequence[str]], Mapping[str, bytes | None]], where: str
) -> Iterator[tuple[str, bytes | None]]:
    """Get many objects, in as many calls as the engine wants: each name with its object, ``None`` where there is none.

    Parameters
    ----------
    names : iterable of str
    ask : callable
        Makes a call of :meth:`Engine.get_many`, which may leave some for the next.
    where : str
        The tier's name.

    Raises
    ------
    StoreError
        A call left all of them.
    """
    waiting = list(names)
    while waiting:
        batch, waiting = waiting[:_OBJECTS], waiting[_OBJECTS:]
        found = ask(batch)
        if not found:
            raise StoreError(errno.EPROTO, f"the server answered none of {len(batch)} requests", where)
        waiting = [name for name in batch if name not in found] + waiting
        yield from found.items()


def batches(names: Iterable[str], size: Callable[[str], int]) -> Iterator[list[str]]:
    """Group names so that the objects of each group fit one call.

    Parameters
    ----------
    names : iterable of str
    size : callable
        Gives the bytes that an object adds to a call.
    """
    batch: list[str] = []
    total = 0
    for name in names:
        if batch and (len(batch) >= _OBJECTS or total + size(name) > _BYTES):
            yield batch
            batch, total = [], 0
        batch.append(name)
        total += size(name)
    if batch:
        yield batch

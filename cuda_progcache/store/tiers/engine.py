# SPDX-License-Identifier: Apache-2.0
"""The interface to a tier's service, which stores named objects."""

from __future__ import annotations

import abc
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from cuda_progcache._util.parallel import for_each
from cuda_progcache.errors import StoreError

#: The maximum number of objects in a batch call, and of bytes in a batch that is sent.
_OBJECTS, _BYTES = 100, 8 << 20
#: After receiving this many bytes, a batch call requests no more objects.
BATCH_BYTES = 256 << 20
#: Concurrent requests to a service without batch calls: with a latency of 5 ms, a thousand objects take 0.3 s.
MANY = 32


def reason(exc: Exception) -> str:
    """What went wrong, without the tier's name, which the surrounding message has."""
    return exc.strerror if isinstance(exc, OSError) and exc.strerror else f"{type(exc).__name__}: {exc}"


class Listed(NamedTuple):
    """An object in a listing.

    Attributes
    ----------
    name : str
        Its name below the tier's prefix.
    size : int
        Bytes.
    modified : float
        When it was last written, in seconds since the epoch; 0.0 if the service doesn't report it.
    """

    name: str
    size: int
    modified: float


class NotInstalledError(StoreError):
    """The client library of a service isn't installed, so no later call can succeed either."""


class TooLargeError(StoreError):
    """An object is announced as larger than the limit; none of it was read."""


class Engine(abc.ABC):
    """Gets, puts and lists the objects of one service. It knows nothing about programs, and trusts no answer.

    An engine makes one attempt without retries, and never relies on its client's default time limits. Trouble is an
    ``OSError``: :class:`TimeoutError` for a time-out, :class:`~cuda_progcache.errors.StoreError` for everything else,
    with a message without secrets and the tier's name as its ``filename``. A missing object isn't trouble.

    Threads share an engine, and so do a process and its forked children: what a child can't use, such as the parent's
    connections, the engine opens anew there.

    Attributes
    ----------
    name : str
        The tier's URL without user, password and query.
    keeps_time : bool
        Whether each call ends by its ``until``, whatever the server does. Other engines are called on a thread that the
        caller can abandon.
    threads : int
        The number of threads that request or write many objects.
    """

    name: str
    keeps_time: bool = False
    threads: int = 1

    def prepare(self) -> None:  # noqa: B027
        """Import and load all that calls need, before their time limits start.

        Raises
        ------
        NotInstalledError
            The client library isn't installed.

        Notes
        -----
        Calls may run on our threads, which must not import anything: a process that is shutting down can't import any
        more, and a child that is forked while a thread imports a module waits for that module forever.
        """

    @abc.abstractmethod
    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """The object of that name; ``None`` if there is none.

        Parameters
        ----------
        name : str
            Below the tier's prefix: ``v1/programs/ab/cdef...``.
        limit : int
            The maximum size in bytes (:class:`TooLargeError`, before the body is read, if it is larger).
        until : float
            The deadline, on the clock of :func:`time.monotonic`.
        """

    def get_many(self, names: Sequence[str], *, limit: int, until: float) -> Mapping[str, bytes | None]:
        """Get several objects. An engine with a batch call overrides this.

        Returns
        -------
        mapping
            ``None`` for an object that is missing or too large. Once :data:`BATCH_BYTES` have been received, the
            remaining names are left out; there is always at least one.
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
        """Write an object, atomically if the service can; the last write wins."""

    def put_many(self, objects: Mapping[str, bytes], *, until: float) -> None:
        """Write several objects. An engine with a batch call overrides this."""
        for_each(objects.items(), lambda pair: self.put(*pair, until=until), self.threads)

    @abc.abstractmethod
    def delete(self, names: Iterable[str], *, until: float) -> None:
        """Remove objects; missing ones are skipped."""

    @abc.abstractmethod
    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """List the objects whose names start with a prefix, without reading them.

        Parameters
        ----------
        prefix : str
        until : float
            The deadline of the whole listing; no page of it may take longer than a write.

        Raises
        ------
        TimeoutError
            It took too long.
        StoreError
            The service can't list.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close what is open; the engine can be used afterwards."""


def each_of(
    names: Iterable[str], ask: Callable[[Sequence[str]], Mapping[str, bytes | None]], where: str
) -> Iterator[tuple[str, bytes | None]]:
    """Get many objects, in as many calls as necessary: each name with its object, or ``None`` if there is none.

    Parameters
    ----------
    names : iterable of str
    ask : callable
        Calls :meth:`Engine.get_many`, which may leave out some names.
    where : str
        The tier's name.

    Raises
    ------
    StoreError
        A call left out all names.
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
        Returns the bytes that an object adds to a call.
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

# SPDX-License-Identifier: Apache-2.0
"""Functions whose results are kept, with where they came from.

>>> from cuda_progcache.memo.memoize import memoize
>>> from cuda_progcache.memo.caches import Cache
>>> from cuda_progcache.memo.storage import CallMemory, ValueMemory
>>> @memoize(Cache(ValueMemory({}), CallMemory({})))
... def area(r: float) -> float:
...     return 3 * r * r
>>> area(2), area(r=2), area.contains(2), area.contains(3)
(12, 12, True, False)
>>> area.explain(3)
('argument r 2 → 3',)

The key is the digest of the function's name, module, version and code, and of its arguments, defaults filled in. One
thread, of one process where the cache lies in files, runs a call that several ask for; the others get its result.
What can't be digested, or stored, or any trouble in the cache, never fails a call and never loses a result: it is
counted, and warned of once per function.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import os
import platform
import sys
import time
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, ParamSpec, TypeVar, cast, overload

from cuda_progcache._util import modes
from cuda_progcache._util.running import Running, note_child, running
from cuda_progcache.compile.single_flight import fly
from cuda_progcache.memo.caches import BaseCache, Cache, RefreshingCache
from cuda_progcache.memo.call import Call, Metadata, PreparedCall, QueryCall, head_bytes, key_from_head
from cuda_progcache.memo.code import Closure, closure
from cuda_progcache.memo.digest import Digest, Indigestible, digest
from cuda_progcache.memo.signature import FunctionProfile, code_digest

if TYPE_CHECKING:
    from cuda_progcache.memo.query import QueryIterator

P = ParamSpec("P")
R = TypeVar("R")

_logger = logging.getLogger(__name__)


#: Seconds that a body has to have run for processes to wait for each other (threads always do), and for how many misses
#: such a run counts: a body that is quick as a rule may be slow once, on a busy machine.
WORTH_A_LEASE = 1e-3
_SLOW_FOR = 8


#: Set while a call is run again: memoized calls in it don't hit.
_refreshing: ContextVar[bool] = ContextVar("_refreshing", default=False)


def parents() -> tuple[Digest, ...]:
    """Keys of the memoized calls whose bodies run here, from the outermost to the innermost."""
    found = []
    around = running.get()
    while around is not None:
        found.append(around.key)
        around = around.parent
    return tuple(reversed(found))


def file_cache(path: str | os.PathLike[str], *, codec: str = "safe", secret: bytes | None = None) -> Cache:
    """A cache in files: ``values/`` and ``calls/`` below ``path``.

    Parameters
    ----------
    path : str or path
    codec : {"safe", "pickle"}
        See :class:`~cuda_progcache.memo.storage.FileValueStorage`.
    secret : bytes, optional
        Signs what is written; what isn't signed with it isn't read.
    """
    from cuda_progcache.memo.storage import FileCallStorage, FileValueStorage

    root = os.fspath(path)
    return Cache(
        FileValueStorage(os.path.join(root, "values"), secret, codec=codec),
        FileCallStorage(os.path.join(root, "calls"), secret),
    )


#: Whether code counts, or what digests it.
CodeDigest = bool | Callable[[Any], str]
CacheLike = BaseCache | str | os.PathLike[str] | Callable[[], BaseCache]


class _Identity(NamedTuple):
    """What of the key is the function's, and what tells whether it still is."""

    head: bytes
    code: Digest | None
    closure: Closure


class Memoized(Generic[P, R]):
    """A function whose results are kept; made by :func:`memoize`.

    Attributes
    ----------
    profile : FunctionProfile
        What is known of the function.
    counters : Counter
        ``hits``, ``misses``; ``uncached`` calls whose arguments have no digest or that leave out required ones;
        ``dropped`` results that could not be kept; ``trouble`` of the cache on looking up.
    """

    def __init__(
        self, function: Callable[P, R], cache: CacheLike, *, version: str | int | None, ignore: frozenset[str],
        require: frozenset[str], code: CodeDigest, module: bool, tags: Mapping[str, Any], single_flight: str,
    ) -> None:  # fmt: skip
        functools.update_wrapper(self, function)
        self.function = function
        self.profile = profile = FunctionProfile.of(function)
        for name in ignore | require:
            if name not in profile.signature.parameters:
                raise ValueError(f"{profile.qualname} has no parameter {name!r} to ignore or require")
        self._given = _cache_of(cache)
        self._ignored = ignore | profile.ignored
        self._required = require | profile.required
        self._bind = profile.binder(self._ignored)
        self._named = (
            profile.qualname,
            profile.module if module else None,
            profile.version if version is None else version,
        )
        self._code = code
        self._identity: _Identity | None = None
        self._tags = dict(tags)
        self._single_flight = single_flight
        self._async = inspect.iscoroutinefunction(function)
        self._under_way: dict[tuple[Any, Digest], asyncio.Future[Any]] = {}
        self._warned: set[str] = set()
        self._leases_left = 1  # misses for which a lease will be taken
        self.counters: Counter[str] = Counter()

    @property
    def cache(self) -> BaseCache:
        """Where results are kept."""
        given = self._given
        return given if isinstance(given, BaseCache) else given()

    def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result, from the cache or by running it."""
        if (mode := modes.current()) == "off":
            return self.function(*args, **kwargs)
        given = self._given
        cache = given if isinstance(given, BaseCache) else given()
        try:
            arguments = self._bind(args, kwargs)
            identity = self._now()
            key, digests = key_from_head(identity.head, arguments)
        except Exception as error:  # noqa: BLE001 - an argument's own code may raise anything; the body runs all the same
            return self._uncached(error, args, kwargs)
        if not _refreshing.get():
            try:
                result = cache.lookup(key)
            except KeyError:
                pass
            except Exception as error:  # noqa: BLE001 - a cache may be anyone's code, and must not fail a call
                self._trouble("trouble", f"looking up a call of {self._named[0]} failed: {error!r}")
            else:
                self.counters["hits"] += 1
                around = running.get()
                if around is not None:
                    around.children[key] = None
                return cast("R", _as_awaitable(result) if self._async else result)
        if mode != "rw":
            return self.function(*args, **kwargs)
        name, module, version = self._named
        call = Call(name, arguments, {}, module, version, identity.code, digests=digests, sealed=key)
        return self._miss(cache, call, key, args, kwargs)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind to an instance, whose digest is part of the key."""
        return self if instance is None else _Bound(self, instance)

    def __reduce__(self) -> str:
        return self.profile.qualname  # as a function: by name, since another process may have another cache

    def __digest__(self) -> Digest:
        """Of what it memoizes, and all that this refers to."""
        return digest((*self._named, code_digest(self.function)))

    def __cache_file__(self) -> tuple[Any, ...]:
        """What counts of the wrapper where a function refers to it, beside the function inside."""
        return self._named

    def _now(self) -> _Identity:
        """What of the key is the function's, taken anew when something it refers to has changed."""
        identity = self._identity
        if identity is not None and identity.closure.holds():
            return identity
        about = Closure("", {})
        code = None
        if self._code is True:
            about = closure(self.function)
            code = about.with_packages
        elif self._code is not False:
            with contextlib.suppress(Indigestible):  # then it is taken once
                about = closure(self.function)
            code = Digest(self._code(self.function))
        other = self._identity
        if other is not identity and other is not None and other.closure.holds():
            return other  # threads that come first at once agree, whatever one's run has changed meanwhile
        self._identity = made = _Identity(head_bytes(*self._named, code), code, about)
        return made

    # What else can be asked

    def call(self, /, *args: P.args, **kwargs: P.kwargs) -> Call:
        """The call with these arguments, as it would be recorded."""
        name, module, version = self._named
        return Call(name, self._bind(args, kwargs), {}, module, version, self._now().code)

    def digest(self, /, *args: P.args, **kwargs: P.kwargs) -> Digest:
        """The key of the call with these arguments; Indigestible where it has none."""
        return key_from_head(self._now().head, self._bind(args, kwargs))[0]

    def contains(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Whether the call with these arguments would hit."""
        return self.cache.contains(self.digest(*args, **kwargs))

    def load(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """The recorded result; KeyError on a miss. Nothing is run."""
        return cast("R", self.cache.load(self.digest(*args, **kwargs)).result)

    def query(self, /, *args: Any, metadata: Mapping[str, Any] | None = None, **kwargs: Any) -> QueryIterator:
        """Recorded calls with these arguments, of whatever version and code; arguments left out fit any."""
        given = {
            name: value for name, value in self.profile.bind_partial(args, kwargs).items() if name not in self._ignored
        }
        template = QueryCall(self.profile.qualname, given or None, dict(metadata) if metadata else None, self._named[1])
        return self.cache.query(template)

    def rerun(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the call, and memoized calls in it, whether recorded or not; the new results replace the old."""
        token = _refreshing.set(True)
        try:
            return self(*args, **kwargs)
        finally:
            _refreshing.reset(token)

    def explain(self, /, *args: P.args, **kwargs: P.kwargs) -> tuple[str, ...]:
        """What tells the call with these arguments from the nearest recorded one: why it would miss, or did."""
        from cuda_progcache.memo.explain import explain

        key = self.digest(*args, **kwargs)
        try:
            return explain(self.cache, self.cache.load(key))
        except KeyError:
            return explain(self.cache, self.call(*args, **kwargs))

    # A miss

    def _miss(self, cache: BaseCache, call: Call, key: Digest, args: Any, kwargs: Any) -> R:
        if self._required and (missing := [name for name in self._missing(args, kwargs) if name in self._required]):
            return self._uncached(f"it leaves out {', '.join(missing)}", args, kwargs)
        for value in call.arguments.values():
            if type(value) is Digest:
                return self._with_values(cache, args, kwargs)
        self.counters["misses"] += 1
        note_child(key)
        around = running.get()
        if self._async:
            return cast("R", self._run_async(cache, key, call, args, kwargs))
        if _refreshing.get() or isinstance(cache, RefreshingCache) or self._single_flight == "off":
            return self._run(cache, key, call, args, kwargs)
        if around is not None and around.runs(key):
            return self._run(cache, key, call, args, kwargs)  # it calls itself: waiting would be for ever

        ran: list[Digest] = []

        def find() -> tuple[R] | None:
            try:
                return (cache.lookup(key),)
            except Exception:  # noqa: BLE001 - trouble was told of by the first lookup: a miss
                return None

        def run() -> tuple[R]:
            ran.append(key)
            return (self._run(cache, key, call, args, kwargs),)

        def compute() -> tuple[R]:
            # A lease costs 60 µs and more: a function not seen to run long is run beside another process instead.
            wanted = self._single_flight == "processes" and self._leases_left > 0
            directory = cache.leases if wanted else None
            if directory is not None:
                return fly(key, directory, run, find, longest_wait=float("inf"))
            return find() or run()  # nobody has looked again since this thread's turn came

        # Threads first, whatever of processes: which of both is asked for may change from call to call.
        result = fly(f"{key}-{id(cache):x}", None, compute, find, longest_wait=float("inf"))[0]
        if not ran and isinstance(result, (Iterator, AsyncIterator, Awaitable)):
            return self._run(cache, key, call, args, kwargs)  # another thread's generator or coroutine: it has one use
        return result

    def _missing(self, args: Any, kwargs: Any) -> list[str]:
        given = self.profile.signature.bind(*args, **kwargs).arguments
        return [name for name in self.profile.signature.parameters if name not in given]

    def _with_values(self, cache: BaseCache, args: Any, kwargs: Any) -> R:
        """A digest was given in place of a value: the body gets the value."""

        def value(argument: Any) -> Any:
            return cache.load_value(argument) if type(argument) is Digest else argument

        return self(*map(value, args), **{name: value(argument) for name, argument in kwargs.items()})

    def _run(self, cache: BaseCache, key: Digest, call: Call, args: Any, kwargs: Any) -> R:
        prepared = self._prepare(cache, call)
        body = Running(key, self._named[0], running.get())
        token = running.set(body)
        started, clock = time.time(), time.perf_counter()
        try:
            result = self.function(*args, **kwargs)
        except BaseException:
            if prepared is not None:
                prepared.abandon()
            raise
        finally:
            running.reset(token)
        self._commit(prepared, result, body, started, time.perf_counter() - clock)
        return result

    async def _run_async(self, cache: BaseCache, key: Digest, call: Call, args: Any, kwargs: Any) -> Any:
        slot = (asyncio.get_running_loop(), key)
        future = slot[0].create_future()
        if not _refreshing.get():
            while (other := self._under_way.get(slot)) is not None:
                try:
                    return await asyncio.shield(other)
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if not other.cancelled() or (task is not None and task.cancelling()):
                        raise  # it is this task that is cancelled; otherwise the one that ran it was: next, please
                if slot not in self._under_way:
                    try:
                        return cache.lookup(key)
                    except Exception:  # noqa: BLE001 - trouble was told of by the first lookup: a miss
                        break
            self._under_way[slot] = future
        prepared = self._prepare(cache, call)
        body = Running(key, self._named[0], running.get())
        token = running.set(body)
        started, clock = time.time(), time.perf_counter()
        try:
            result = await cast("Awaitable[Any]", self.function(*args, **kwargs))
        except BaseException as error:
            if prepared is not None:
                prepared.abandon()
            if isinstance(error, Exception):
                future.set_exception(error)
                future.exception()  # it is looked at here: nobody else may be waiting
            elif not slot[0].is_closed():
                future.cancel()
            raise
        else:
            self._commit(prepared, result, body, started, time.perf_counter() - clock)
            future.set_result(result)
            return result
        finally:
            running.reset(token)
            if self._under_way.get(slot) is future:
                del self._under_way[slot]

    def _prepare(self, cache: BaseCache, call: Call) -> PreparedCall | None:
        try:
            return cache.prepare(call)
        except Exception as error:  # noqa: BLE001 - a cache may be anyone's code; the body runs all the same
            self._trouble("trouble", f"a call of {call.name} can't be prepared for the cache: {error}")
            return None

    def _commit(
        self, prepared: PreparedCall | None, result: Any, body: Running, started: float, seconds: float
    ) -> None:
        self._leases_left = _SLOW_FOR if seconds >= WORTH_A_LEASE else max(self._leases_left - 1, 0)
        if prepared is None:
            return
        metadata: Metadata = {
            "runtime": {"status": "done", "timestart": started, "timestop": started + seconds, "duration": seconds},
            "environment": _environment(),
        }
        links = {}
        if body.parent is not None:
            links["parents"] = [body.parent.key]
        if body.children:
            links["children"] = list(body.children)
        if links:
            metadata["links"] = links
        if self._tags:
            metadata["tags"] = self._tags
        try:
            prepared.commit(result, metadata)
        except Exception as error:  # noqa: BLE001 - what was computed is returned, whatever became of keeping it
            self._trouble("dropped", f"a result of {self._named[0]} is used but not kept: {error}")

    def _uncached(self, why: object, args: Any, kwargs: Any) -> R:
        if isinstance(why, TypeError) and not isinstance(why, Indigestible):
            self.profile.signature.bind(*args, **kwargs)  # the arguments don't fit: say so as Python does
        self._trouble("uncached", f"a call of {self._named[0]} isn't cached: {why}")
        return self.function(*args, **kwargs)

    def _trouble(self, counter: str, message: str) -> None:
        self.counters[counter] += 1
        if counter not in self._warned:
            self._warned.add(counter)
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        _logger.info("%s", message)


class _Bound:
    """A memoized method of an instance."""

    def __init__(self, memoized: Memoized[Any, Any], instance: object) -> None:
        self._memoized = memoized
        self._instance = instance
        functools.update_wrapper(self, memoized.function)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._memoized(self._instance, *args, **kwargs)

    def __cache_file__(self) -> tuple[Any, ...]:
        """What counts of it where a function refers to it, beside the function inside."""
        return (*self._memoized._named, self._instance)

    def __getattr__(self, name: str) -> Any:
        if name not in {"call", "digest", "contains", "load", "query", "rerun", "explain"}:
            raise AttributeError(f"{type(self._memoized).__name__} has no method {name!r}")
        return functools.partial(getattr(self._memoized, name), self._instance)


@overload
def memoize(
    cache: CacheLike, *, version: str | int | None = ..., ignore: str | Iterable[str] = ...,
    require: str | Iterable[str] = ..., code: CodeDigest = ..., module: bool = ...,
    tags: Mapping[str, Any] | None = ..., single_flight: str = ...,
) -> Callable[[Callable[P, R]], Memoized[P, R]]: ...  # fmt: skip
@overload
def memoize(
    cache: CacheLike, function: Callable[P, R], *, version: str | int | None = ..., ignore: str | Iterable[str] = ...,
    require: str | Iterable[str] = ..., code: CodeDigest = ..., module: bool = ...,
    tags: Mapping[str, Any] | None = ..., single_flight: str = ...,
) -> Memoized[P, R]: ...  # fmt: skip
def memoize(
    cache: CacheLike, function: Callable[..., Any] | None = None, *, version: str | int | None = None,
    ignore: str | Iterable[str] = (), require: str | Iterable[str] = (), code: CodeDigest = True, module: bool = True,
    tags: Mapping[str, Any] | None = None, single_flight: str = "processes",
) -> Any:  # fmt: skip
    """Keep the results of a function.

    Parameters
    ----------
    cache : BaseCache, path or callable
        Where; of a path a :func:`file_cache`, a callable is asked at each call.
    function : callable, optional
        ``memoize(cache, f)`` is ``memoize(cache)(f)``.
    version : str or int, optional
        Of the function, part of the key; default: its ``__version__``.
    ignore : str or iterable of str
        Parameters that have no part in the key; also those annotated ``Ignored``.
    require : str or iterable of str
        Parameters that a call must give itself to be cached; also those annotated ``Required``.
    code : bool or callable
        Whether a digest of the function's code and of all that it refers to (defaults, variables of the closure,
        globals, functions and classes among these again, versions of packages; see :mod:`~cuda_progcache.memo.code`) is
        part of the key; a callable takes the function and gives another digest. It is taken at the first call, and
        again when a name was bound anew or data changed in place. What the function itself changes, as a list that it
        appends to, is its state and doesn't count. Data that can change in place (a global dict, an array) is digested
        at each call: pass large data as an argument, or give ``code=False`` and a ``version``.
    module : bool
        Whether the name of the function's module is part of the key.
    tags : mapping, optional
        Kept in each record, under ``metadata["tags"]``.
    single_flight : {"processes", "threads", "off"}
        Who waits for whom when several ask for one call. Processes wait for the first call, and for others while one
        of the last eight runs took :data:`WORTH_A_LEASE` seconds: otherwise running it twice is cheaper.

    Returns
    -------
    Memoized, or a decorator that makes one

    Raises
    ------
    ValueError
        A parameter that the function doesn't have, or an unknown ``single_flight``.
    """
    if single_flight not in {"processes", "threads", "off"}:
        raise ValueError(f"single_flight must be 'processes', 'threads' or 'off', got {single_flight!r}")

    def decorate(plain: Callable[..., Any]) -> Memoized[Any, Any]:
        return Memoized(
            plain, cache, version=version, ignore=_names(ignore), require=_names(require), code=code, module=module,
            tags=tags or {}, single_flight=single_flight,
        )  # fmt: skip

    return decorate if function is None else decorate(function)


def _names(given: str | Iterable[str]) -> frozenset[str]:
    return frozenset((given,) if isinstance(given, str) else given)


def _cache_of(given: CacheLike) -> BaseCache | Callable[[], BaseCache]:
    if isinstance(given, (str, os.PathLike)):
        return file_cache(given)
    if isinstance(given, BaseCache) or callable(given):
        return given
    raise TypeError(f"memoize takes a cache, a path or a callable that gives a cache, got {type(given).__name__}")


async def _as_awaitable(result: Any) -> Any:
    return result


@functools.cache
def _environment() -> dict[str, str]:
    return {
        "host": platform.node(), "python": platform.python_version(), "implementation": sys.implementation.name,
        "platform": sys.platform, "machine": platform.machine(),
    }  # fmt: skip

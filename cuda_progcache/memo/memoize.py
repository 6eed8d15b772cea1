# SPDX-License-Identifier: Apache-2.0
"""Memoized functions: their results are kept, with their provenance.

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

The key is the digest of the function's name, module, version and code, and of its arguments, defaults filled in. Equal
dicts or equal sets are the same argument, whatever their order. If several threads make the same call at once, one of
them runs it and the others get its result; so do several processes if the cache is in files.

A value that can't be digested or stored, or an error in the cache, never fails a call and never loses a result: it is
counted, and a warning is issued once per function.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast, overload

from cuda_progcache._util.running import under_way
from cuda_progcache.memo.caches import BaseCache, Cache
from cuda_progcache.memo.call import Call, QueryCall
from cuda_progcache.memo.files import PathRule
from cuda_progcache.memo.frames import refreshing
from cuda_progcache.memo.runner import CodeDigest, Runner, Settings

if TYPE_CHECKING:
    from cuda_progcache.memo.digest import Digest
    from cuda_progcache.memo.query import QueryIterator

P = ParamSpec("P")
R = TypeVar("R")

CacheLike = BaseCache | str | os.PathLike[str] | Callable[[], BaseCache]


def parents() -> tuple[Digest, ...]:
    """Return the keys of the memoized calls that run in this thread or task, outermost first."""
    return tuple(call.key for call in under_way())[::-1]


def file_cache(path: str | os.PathLike[str], *, codec: str = "safe", secret: bytes | None = None) -> Cache:
    """Return a cache in files, in ``values/`` and ``calls/`` below ``path``.

    Parameters
    ----------
    path : str or path
    codec : {"safe", "pickle"}
        See :class:`~cuda_progcache.memo.storage.FileValueStorage`.
    secret : bytes, optional
        Signs the files that are written; files not signed with it aren't read.
    """
    from cuda_progcache.memo.storage import FileCallStorage, FileValueStorage

    root = os.fspath(path)
    return Cache(
        FileValueStorage(os.path.join(root, "values"), secret, codec=codec),
        FileCallStorage(os.path.join(root, "calls"), secret),
    )


class Memoized(Runner, Generic[P, R]):
    """A memoized function; made by :func:`memoize`."""

    if TYPE_CHECKING:

        def __call__(self, /, *args: P.args, **kwargs: P.kwargs) -> R: ...  # noqa: D102

    def call(self, /, *args: P.args, **kwargs: P.kwargs) -> Call:
        """Return the call with these arguments, as it would be recorded."""
        return self.call_of(self.key(args, kwargs))

    def digest(self, /, *args: P.args, **kwargs: P.kwargs) -> Digest:
        """Return the key of the call with these arguments; Indigestible if an argument can't be digested."""
        return self.key(args, kwargs).digest

    def contains(self, /, *args: P.args, **kwargs: P.kwargs) -> bool:
        """Return whether the cache has a result for these arguments."""
        return self.cache.contains(self.digest(*args, **kwargs))

    def load(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the recorded result without running anything; KeyError on a miss."""
        return cast("R", self.cache.load(self.digest(*args, **kwargs)).result)

    def query(self, /, *args: Any, metadata: Mapping[str, Any] | None = None, **kwargs: Any) -> QueryIterator:
        """Return the recorded calls with these arguments, of any version and code; an omitted argument matches any."""
        given = {
            name: value for name, value in self.profile.bind_partial(args, kwargs).items() if name not in self._ignored
        }
        template = QueryCall(self._named[0], given or None, dict(metadata) if metadata else None, self._named[1])
        return self.cache.query(template)

    def rerun(self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the call and the memoized calls in it even if they are recorded; the new results replace the old."""
        if self._async:
            return cast("R", self._rerun_async(args, kwargs))
        token = refreshing.set(True)
        try:
            return self(*args, **kwargs)
        finally:
            refreshing.reset(token)

    async def _rerun_async(self, args: Any, kwargs: Any) -> Any:
        token = refreshing.set(True)  # in the task that awaits the coroutine
        try:
            return await cast("Any", self(*args, **kwargs))
        finally:
            refreshing.reset(token)

    def explain(self, /, *args: P.args, **kwargs: P.kwargs) -> tuple[str, ...]:
        """Explain how the call differs from the nearest recorded one, which is why it would miss, or did."""
        from cuda_progcache.memo.explain import explain

        key = self.digest(*args, **kwargs)
        try:
            return explain(self.cache, self.cache.load(key))
        except KeyError:
            return explain(self.cache, self.call(*args, **kwargs))


_Names = str | Iterable[str]


@overload
def memoize(
    cache: CacheLike, *, version: str | int | None = ..., ignore: _Names = ..., require: _Names = ...,
    code: CodeDigest = ..., state: _Names = ..., files: _Names = ..., env: _Names = ..., module: bool = ...,
    tags: Mapping[str, Any] | None = ..., single_flight: str = ...,
) -> Callable[[Callable[P, R]], Memoized[P, R]]: ...  # fmt: skip
@overload
def memoize(
    cache: CacheLike, function: Callable[P, R], *, version: str | int | None = ..., ignore: _Names = ...,
    require: _Names = ..., code: CodeDigest = ..., state: _Names = ..., files: _Names = ..., env: _Names = ...,
    module: bool = ..., tags: Mapping[str, Any] | None = ..., single_flight: str = ...,
) -> Memoized[P, R]: ...  # fmt: skip
def memoize(
    cache: CacheLike, function: Callable[..., Any] | None = None, *, version: str | int | None = None,
    ignore: _Names = (), require: _Names = (), code: CodeDigest = True, state: _Names = (), files: _Names = (),
    env: _Names = (), module: bool = True, tags: Mapping[str, Any] | None = None, single_flight: str = "processes",
) -> Any:  # fmt: skip
    """Keep the results of a function.

    Parameters
    ----------
    cache : BaseCache, path or callable
        Where to keep the results; a path stands for its :func:`file_cache`, a callable is called at each call.
    function : callable, optional
        ``memoize(cache, f)`` is ``memoize(cache)(f)``.
    version : str or int, optional
        The function's version, part of the key; default: its ``__version__``.
    ignore : str or iterable of str
        Parameters that have no part in the key, like those annotated ``Ignored``.
    require : str or iterable of str
        Parameters that a call must pass explicitly to be cached, like those annotated ``Required``.
    code : bool or callable
        Whether the key contains a digest of the function's code and of everything that it refers to (defaults, closure
        variables, globals, the functions, classes and instances among these in turn, versions of packages, environment
        variables that are read by name; see :mod:`~cuda_progcache.memo.code`), with the code of the arguments' classes.
        A callable takes the function and returns another digest. The digest is computed at the first call; later calls
        check everything that can change in place. Large data (a global table or array) is better passed as an
        argument, or left out with ``code=False`` and a ``version``.
    state : str or iterable of str
        Global names and closure variables, as the function refers to them (``"stats"``, ``"module.table"``), that the
        function changes but doesn't take as input; they don't count. If a run changes anything else that counts, its
        result isn't kept, and a warning says so.
    files : str or iterable of str
        Parameters that are paths, or containers of paths; the contents of the files and directories count.
    env : str or iterable of str
        Environment variables that count in addition to those that the code reads by name.
    module : bool
        Whether the name of the function's module is part of the key.
    tags : mapping, optional
        Stored in each record, under ``metadata["tags"]``.
    single_flight : {"processes", "threads", "off"}
        Who waits if the same call is made several times at once. Processes wait for the first call, and for later
        calls while one of the last eight runs took at least :data:`~cuda_progcache.memo.runner.WORTH_A_LEASE` seconds;
        otherwise it is cheaper to run the call twice.

    Returns
    -------
    Memoized, or a decorator that makes one

    Raises
    ------
    TypeError
        ``cache`` isn't a cache; for example, ``@memoize`` is written without one.
    ValueError
        The function has no such parameter, or ``single_flight`` is unknown.
    """
    if single_flight not in {"processes", "threads", "off"}:
        raise ValueError(f"single_flight must be 'processes', 'threads' or 'off', got {single_flight!r}")
    given = _cache_of(cache)

    def decorate(*functions: Callable[..., Any]) -> Memoized[Any, Any]:
        if len(functions) != 1:  # a function without parameters may be meant as a callable that returns a cache
            raise TypeError(f"memoize takes a cache as its first argument: write @memoize(cache) above {cache!r}")
        (plain,) = functions
        if not callable(plain) and not isinstance(plain, classmethod):  # type: ignore[unreachable]
            raise TypeError(f"memoize(cache) decorates a function, got {type(plain).__name__}; write @memoize(cache)")
        paths = PathRule(_names(files)) if files else None
        return Memoized(plain, given, Settings(
            None, module, version, _names(ignore), _names(require), code, tuple(sorted(_names(state))), paths,
            tuple(sorted(_names(env))), None, dict(tags or {}), single_flight,
        ))  # fmt: skip

    return decorate if function is None else decorate(function)


def _names(given: _Names) -> frozenset[str]:
    return frozenset((given,) if isinstance(given, str) else given)


def _cache_of(given: CacheLike) -> BaseCache | Callable[[], BaseCache]:
    if isinstance(given, (str, os.PathLike)):
        return file_cache(given)
    if isinstance(given, BaseCache):
        return given
    if not callable(given):
        raise TypeError(f"memoize takes a cache, a path or a callable that returns a cache, got {type(given).__name__}")
    try:
        inspect.signature(given).bind()
    except TypeError:
        raise TypeError(f"memoize takes a cache as its first argument: write @memoize(cache) above {given!r}") from None
    except ValueError:
        pass  # a built-in function without a signature
    return given

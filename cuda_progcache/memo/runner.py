# SPDX-License-Identifier: Apache-2.0
"""The engine of memoized calls: compute the key, look it up, check the record's files, run, and store with provenance.

A call is a function, arguments, files and environment variables; its key is the digest of these, the function's code
and everything that the code refers to. Further inputs found while the body runs (files that it tracks, inputs of the
calls that it makes) are in the record, and are checked before the result is used again.

A call that works without this engine works with it: arguments that can't be bound or digested are passed straight to
the function, a result that can't be stored is returned all the same, and an error in the cache is a miss. Each of these
is counted, and a warning is issued once per function.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, NamedTuple

from cuda_progcache._util import modes
from cuda_progcache._util.running import running, under_way
from cuda_progcache._util.warning import warn
from cuda_progcache.compile.single_flight import fly
from cuda_progcache.memo import flights, frames
from cuda_progcache.memo.caches.base import BaseCache
from cuda_progcache.memo.call import Call, Metadata, PreparedCall, head_bytes, key_from_head
from cuda_progcache.memo.call_key import Identity, Key, closure_of_class
from cuda_progcache.memo.code import Closure, argument_digest, closure
from cuda_progcache.memo.digest import Digest, Indigestible, classes_met, digest, hash_tagged
from cuda_progcache.memo.files import PathRule, Watched, state_of
from cuda_progcache.memo.instances import package_of_class
from cuda_progcache.memo.signature import FunctionProfile
from cuda_progcache.memo.watching import ATOMS

_logger = logging.getLogger(__name__)

#: Processes wait for each other (threads always do) during the next ``_SLOW_FOR`` misses after a body ran for at least
#: this many seconds. The number is limited, since a body that is usually quick may be slow once on a busy machine.
WORTH_A_LEASE = 1e-3
_SLOW_FOR = 8

#: Whether code counts, or a function that digests it.
CodeDigest = bool | Callable[[Any], str]


_NOTHING: dict[str, Any] = {}

#: Types whose values are equal to another value of the type only if the digests are equal; not float: 0.0 == -0.0.
_EXACT = frozenset({int, str, bytes, bool, type(None)})
#: How many keys of calls with such arguments are cached, and how many bytes the arguments of each may take.
_MOST_RECENT, _SMALL = 512, 2000


class Settings(NamedTuple):
    """The options of a memoized function, except the cache; see :func:`~cuda_progcache.memo.memoize.memoize`."""

    name: str | None = None
    module: bool = True
    version: str | int | None = None
    ignore: frozenset[str] = frozenset()
    require: frozenset[str] = frozenset()
    code: CodeDigest = True
    state: tuple[str, ...] = ()
    paths: PathRule | None = None
    env: tuple[str, ...] = ()
    depends_on: Mapping[str, Any] | None = None
    tags: Mapping[str, Any] | None = None
    single_flight: str = "processes"


class Runner:
    """A memoized function.

    Attributes
    ----------
    function : callable
    profile : FunctionProfile
        The function's signature, name and markers.
    counters : Counter
        ``hits``; ``misses``; ``uncached``: calls that have no key or omit required arguments; ``changed``: runs that
        changed something that the key counts; ``modified``: runs during which a file was modified; ``dropped``: results
        that couldn't be kept; ``trouble``: errors of the cache on a lookup or before a run.
    """

    def __init__(
        self, function: Any, cache: BaseCache | Callable[[], BaseCache], settings: Settings, *,
        unknown_names: bool = False,
    ) -> None:  # fmt: skip
        self._of_class = isinstance(function, classmethod)
        self._bound = not isinstance(function, staticmethod)
        plain: Callable[..., Any] = function
        if isinstance(function, (classmethod, staticmethod)):
            plain = function.__func__
        functools.update_wrapper(self, plain)
        self.function = plain
        self.profile = profile = FunctionProfile.of(plain)
        for name in () if unknown_names else settings.ignore | settings.require:
            if name not in profile.signature.parameters:
                raise ValueError(f"{profile.qualname} has no parameter {name!r} to ignore or require")
        self._given = cache
        self.settings = settings
        self._ignored = settings.ignore | profile.ignored
        self._required = settings.require | profile.required
        self._bind = profile.binder(self._ignored)
        self._named = (
            settings.name or profile.qualname,
            profile.module if settings.module else None,
            profile.version if settings.version is None else settings.version,
        )
        self._plain = settings.paths is None and not settings.env and not settings.depends_on
        self._identity: Identity | None = None
        self._async = inspect.iscoroutinefunction(plain)
        self._warned: set[str] = set()
        self._verbose = False
        self._controls: dict[str, bool] = {}  # arguments that are for the wrapper, not the function, and their defaults
        self._recent: dict[tuple[Any, ...], tuple[Digest, dict[str, bytes]]] = {}  # keys of recent calls
        self._leases_left = 1  # misses for which a lease will be taken
        self.counters: Counter[str] = Counter()

    @property
    def cache(self) -> BaseCache:
        """The cache that keeps the results."""
        given = self._given
        return given if isinstance(given, BaseCache) else given()

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Return the function's result, from the cache or by running the function."""
        if (mode := modes.current()) == "off":
            return self.function(*args, **{name: value for name, value in kwargs.items() if name not in self._controls})
        given = self._given
        if self._verbose or (kwargs and not self._controls.keys().isdisjoint(kwargs)):
            return self._controlled(args, kwargs)
        try:
            cache = given if isinstance(given, BaseCache) else given()
            key = self.key(args, kwargs)
        except RecursionError:  # the stack has no room for more, or an argument contains itself
            self.counters["uncached"] += 1
            return self.function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - an argument's own code may raise anything; the body runs all the same
            self._uncached(error, args, kwargs)
            return self.function(*args, **kwargs)
        if not frames.refreshing.get():
            found = self._find(cache, key)
            if found is not None:
                return found[0] if not self._async else _as_awaitable(found[0])
        around = running.get()
        alone = mode != "rw" or self._async or self._required or Digest in map(type, key.arguments.values())
        if around is None or around.name is not self._named[0] or alone:
            return self._miss(cache, key, args, kwargs)
        self.counters["misses"] += 1
        # A recursive call. It runs in this frame, so that it can go nearly as deep as without a cache. It doesn't wait
        # for other threads or processes, since they may be waiting for the enclosing call.
        try:
            run = self._begin(cache, key, room=frames.SHORTEST_OVERHEAD)
        except RecursionError:
            return self.function(*args, **kwargs)
        try:
            result = self.function(*args, **kwargs)
        except BaseException:
            self._give_up(run)
            raise
        self._end(run, result)
        return result

    def _controlled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call with arguments for the wrapper itself; a subclass that sets ``_controls`` defines it.

        An override of ``__call__`` would add a stack frame to each call, so a recursion could only go half as deep.
        """
        raise NotImplementedError

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """Bind the function to an instance or class, whose digest becomes part of the key."""
        if not self._bound or (instance is None and not self._of_class):
            return self
        return BoundRunner(self, owner if self._of_class else instance)

    def __reduce__(self) -> str:
        return self.profile.qualname  # pickled by name, like a function: another process may have another cache

    def __digest__(self) -> Digest:
        """Return the digest of the function and of everything that it refers to."""
        return digest((*self._named, argument_digest(self.function)))

    def __counts__(self) -> tuple[Any, ...]:
        """Return the parts of the wrapper that count in the key of a function that refers to it."""
        settings = self.settings
        return (*self._named, self.function, dict(settings.depends_on or {}), settings.env)

    def __state__(self) -> tuple[Any, tuple[str, ...]]:
        """Return the function and the names that it declares as state, which don't count for its callers either."""
        return self.function, self.settings.state

    # The key

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
        """Return the key of a call made now. Raises Indigestible, or whatever an argument's own code raises."""
        arguments = self._bind(args, kwargs)
        identity = self._now()
        if self._plain:
            kinds = {*map(type, arguments.values())}
            if kinds <= _EXACT:
                made, digests = self._key_again(identity.head, arguments)
                return Key(made, arguments, digests, identity, _NOTHING, _NOTHING, ())
            if kinds <= ATOMS:
                made, digests = key_from_head(identity.head, arguments)
                return Key(made, arguments, digests, identity, _NOTHING, _NOTHING, ())
        watched: dict[str, Watched] = {}
        shown = arguments
        paths = self.settings.paths
        if paths is not None:
            shown = {name: paths.argument(name, value, watched) for name, value in arguments.items()}
            paths.add_others(watched)
        with classes_met() as met:
            made, digests = key_from_head(identity.head, shown, argument_digest)
        inputs: dict[str, dict[str, str]] = {}
        if watched and paths is not None:
            inputs["files"] = paths.inputs(watched)
        if self.settings.env:
            inputs["environment"] = {name: repr(value) for name, value in self._variables().items()}
        if self.settings.depends_on:
            inputs["depends_on"] = {name: str(argument_digest(v)) for name, v in self.settings.depends_on.items()}
        return self._with_inputs(made, arguments, digests, identity, inputs, watched, met)

    def _key_again(self, head: bytes, arguments: dict[str, Any]) -> tuple[Digest, dict[str, bytes]]:
        """Return the key of a call whose arguments are all of ``_EXACT`` types; recent keys are cached."""
        values = tuple(arguments.values())
        asked = (head, values, *map(type, values))  # 1 and True are equal
        found = self._recent.get(asked)
        if found is None:
            found = key_from_head(head, arguments)
            if sum(map(sys.getsizeof, values)) <= _SMALL:
                if len(self._recent) >= _MOST_RECENT:
                    self._recent.clear()
                self._recent[asked] = found
        return found

    def _with_inputs(
        self, plain: Digest, arguments: dict[str, Any], digests: dict[str, bytes], identity: Identity,
        inputs: dict[str, dict[str, str]], watched: dict[str, Watched], met: set[type],
    ) -> Key:  # fmt: skip
        classes = []
        told: dict[str, str] = {}
        for kind in met if self.settings.code is True else ():
            package = package_of_class(kind)
            if package is not None:
                told[package.name] = package.version
                continue
            found = closure_of_class(kind)
            told[f"{kind.__module__}.{kind.__qualname__}"] = found.with_packages
            classes.append((kind, found))
        told.pop("", None)
        if told:
            inputs["classes"] = dict(sorted(told.items()))
        if not inputs:
            return Key(plain, arguments, digests, identity, {}, watched, ())
        named = [(part, *field) for part, fields in sorted(inputs.items()) for field in sorted(fields.items())]
        # repr separates the fields unambiguously, whatever they contain.
        made = hash_tagged(b"call with inputs:", f"{plain} {named!r}".encode("utf-8", "surrogatepass"))
        return Key(Digest(made.decode()), arguments, digests, identity, inputs, watched, tuple(classes))

    def _variables(self) -> dict[str, str | None]:
        """Return the environment variables that the ``env`` option names."""
        return {name: os.environ.get(name) for name in self.settings.env}

    def _now(self) -> Identity:
        """Return the function's part of the key; it is computed again if something that it refers to has changed."""
        identity = self._identity
        if identity is not None and identity.closure.holds():
            return identity
        about = Closure("", {})
        code = None
        wanted = self.settings.code
        if wanted is True:
            about = closure(self.function, self.settings.state)
            code = about.with_packages
        elif wanted is not False:
            with contextlib.suppress(Indigestible):  # in that case there is nothing to watch
                about = closure(self.function, self.settings.state)
            code = Digest(wanted(self.function))
        other = self._identity
        if other is not identity and other is not None and other.closure.holds():
            return other  # concurrent first calls agree on one identity, even if one's run has changed something since
        self._identity = made = Identity(head_bytes(*self._named, code), code, about)
        return made

    def call_of(self, key: Key) -> Call:
        """Return the call with a key, in the form in which it is stored."""
        name, module, version = self._named
        return Call(
            name, key.arguments, key.described(), module, version, key.identity.code,
            key=key.digest if key.inputs else None, digests=key.digests, sealed=key.digest,
        )  # fmt: skip

    # A hit

    def _find(self, cache: BaseCache, key: Key, *, again: bool = False) -> tuple[Any] | None:
        """Return the recorded result in a tuple; None on a miss, or if a file or variable in the record has changed.

        ``again`` marks a second lookup after a miss, which isn't counted.
        """
        try:
            result, metadata = cache.find(key.digest)
        except (KeyError, RecursionError):
            return None
        except Exception as error:  # noqa: BLE001 - a cache may be anyone's code, and must not fail a call
            self._trouble("trouble", f"looking up a call of {self._named[0]} failed: {error!r}")
            return None
        files, variables = metadata.get("files"), metadata.get("variables")
        if files or variables or not self._plain or key.inputs:
            watched = [Watched(path, f["algo"], f.get("pattern"), f["digest"]) for path, f in (files or {}).items()]
            if any(state_of(item) != item.digest for item in watched if item.path not in key.watched):
                return None
            if any(os.environ.get(name) != value for name, value in (variables or {}).items()):
                return None
            found = {**{item.path: item for item in watched}, **key.watched}
            frames.hand_up(frames.frames_here(), found.values(), {**(variables or {}), **self._variables()})
            self._seen(key, found)
        if not again:
            self.counters["hits"] += 1
        around = running.get()
        if around is not None:
            around.children[key.digest] = None
        return (result,)

    def _seen(self, key: Key, watched: Mapping[str, Watched]) -> None:
        """Record the files of a call that was found or run; overridden by functions that are in the call tree."""

    # A miss

    def _miss(
        self, cache: BaseCache, key: Key, args: Any, kwargs: Any, *, reuse: bool = True, save: bool = True
    ) -> Any:
        if self._required:
            given = self.profile.signature.bind(*args, **kwargs).arguments
            if missing := [name for name in self.profile.signature.parameters if name in self._required - given.keys()]:
                self._uncached(f"the call omits {', '.join(missing)}", args, kwargs)
                return self.function(*args, **kwargs)
        for value in key.arguments.values():
            if type(value) is Digest:
                return self._with_values(cache, args, kwargs)
        self.counters["misses"] += 1
        if modes.current() != "rw":
            return self.function(*args, **kwargs)  # nothing is kept
        if self._async:
            return flights.run_async(self, cache, key, args, kwargs)
        reuse = reuse and save and not frames.refreshing.get() and not cache.refreshing
        if not reuse or self.settings.single_flight == "off":
            return self._run(cache, key, args, kwargs, save=save)
        if any(call.key == key.digest for call in under_way()):
            return self._run(cache, key, args, kwargs)  # the call is inside itself: waiting would never end
        ran: list[Digest] = []

        def find() -> tuple[Any] | None:
            return self._find(cache, key, again=True)

        def run() -> tuple[Any]:
            ran.append(key.digest)
            return (self._run(cache, key, args, kwargs),)

        def compute() -> tuple[Any]:
            # A lease costs at least 60 µs: a function that hasn't been seen to run long isn't worth one.
            asked = self.settings.single_flight
            wanted = asked == "always" or (asked == "processes" and self._leases_left > 0)
            directory = cache.leases if wanted else None
            if directory is not None:
                return fly(self._flight(key), directory, run, find, longest_wait=float("inf"))
            return find() or run()  # no lookup has been made since this thread's turn came

        # Threads come first in any case, since whether processes wait too may change from call to call.
        result = fly(f"{key.digest}-{id(cache):x}", None, compute, find, longest_wait=float("inf"))[0]
        if not ran and isinstance(result, (Iterator, AsyncIterator, Awaitable)):
            return self._run(cache, key, args, kwargs)  # another thread's generator or coroutine can't be used twice
        return result

    def _flight(self, key: Key) -> str:
        """Return the name of a call's lease."""
        return str(key.digest)

    def _with_values(self, cache: BaseCache, args: Any, kwargs: Any) -> Any:
        """Make the call with values loaded for the arguments that are digests."""

        def value(argument: Any) -> Any:
            return cache.load_value(argument) if type(argument) is Digest else argument

        return self(*map(value, args), **{name: value(argument) for name, argument in kwargs.items()})

    def _run(self, cache: BaseCache, key: Key, args: Any, kwargs: Any, *, save: bool = True) -> Any:
        run = self._begin(cache, key, save=save)
        try:
            result = self.function(*args, **kwargs)
        except BaseException:
            self._give_up(run)
            raise
        self._end(run, result)
        return result

    def _begin(self, cache: BaseCache, key: Key, *, save: bool = True, room: int = frames.OVERHEAD) -> Run:
        prepared = None
        if save:
            try:
                prepared = cache.prepare(self.call_of(key))
            except RecursionError:
                pass  # the stack has no room left; the body runs all the same
            except Exception as error:  # noqa: BLE001 - a cache may be anyone's code; the body runs all the same
                self._trouble("trouble", f"can't prepare a call of {self._named[0]} for the cache: {error}")
        above = frames.frames_here()
        frame = frames.Frame(key.digest, self._named[0], running.get(), self._node(key))
        token = frames.enter(frame, room)
        return Run(cache, key, prepared, frame, above, token, time.time(), time.perf_counter())

    def _node(self, key: Key) -> str | None:  # noqa: ARG002
        """Return the id of a call in the call tree; None if the function's calls aren't in the tree."""
        return None

    def _give_up(self, run: Run) -> None:
        """Clean up after a body that raised."""
        frames.leave(run.frame, run.token)
        if run.prepared is not None:
            run.prepared.abandon()

    def _end(self, run: Run, result: Any) -> None:
        """Store a result, unless something that its key counts changed while the body ran."""
        seconds = time.perf_counter() - run.clock
        frames.leave(run.frame, run.token)
        key, frame = run.key, run.frame
        self._leases_left = _SLOW_FOR if seconds >= WORTH_A_LEASE else max(self._leases_left - 1, 0)
        watched = {**frame.watched, **key.watched}
        if watched or frame.variables or self.settings.env:
            frames.hand_up(run.above, watched.values(), {**frame.variables, **self._variables()})
        self._seen(key, watched)
        if run.prepared is None:
            return
        why = self._why_not(key, watched)
        if why is not None:
            run.prepared.abandon()
            self._trouble(*why)
            return
        metadata = self._metadata(run, seconds)
        try:
            run.prepared.commit(result, metadata)
            if frame.parent is not None:
                frame.parent.children[key.digest] = None
            if key.identity.closure.unloaded:
                self._file_as_loaded(run, key, result, metadata)
        except RecursionError:
            self.counters["dropped"] += 1
        except Exception as error:  # noqa: BLE001 - the result is returned even if it can't be kept
            if isinstance(error.__context__, RecursionError):  # the stack had no room left to digest the result
                self.counters["dropped"] += 1
                return
            self._trouble("dropped", f"a result of {self._named[0]} is returned but not kept: {error}")

    def _why_not(self, key: Key, watched: Mapping[str, Watched]) -> tuple[str, str] | None:
        """Return why a result can't be stored, as the counter to raise and a message; None if it can."""
        about = key.identity.closure
        changed = [] if about.holds() or (not about.unloaded and self._is_still(key.identity)) else about.changed()
        for kind, found in key.classes:
            if not found.holds() and closure_of_class(kind).with_packages != found.with_packages:
                changed += found.changed()
        if changed:
            return "changed", (
                f"a result of {self._named[0]} is returned but not kept: the run changed {', '.join(changed)}, which "
                f"counts; if it isn't an input, declare it: state={tuple(changed)!r}"
            )
        moved = [item.path for item in watched.values() if state_of(item) != item.digest]
        if moved:
            return "modified", (
                f"{self._named[0]}: {', '.join(moved)} was modified while it ran; the result isn't saved, since it may "
                "be based on the old content or the new"
            )
        return None

    def _is_still(self, identity: Identity) -> bool:
        """Return whether everything that changed has been changed back."""
        try:
            return self._now().code == identity.code
        except Indigestible:
            return False

    def _file_as_loaded(self, run: Run, key: Key, result: Any, metadata: Metadata) -> None:
        """Store a result under the call's present key as well.

        Modules that counted by their source before the run are now loaded and count by their content.
        """
        try:
            identity = self._now()
        except Indigestible:
            return
        made = key_from_head(identity.head, {name: Digest(found.decode()) for name, found in key.digests.items()})[0]
        named = self._with_inputs(made, key.arguments, key.digests, identity, dict(key.inputs), key.watched, set())
        run.cache.prepare(self.call_of(named)).commit(result, metadata)

    def _metadata(self, run: Run, seconds: float) -> Metadata:
        key, frame, started = run.key, run.frame, run.started
        metadata: Metadata = {
            **key.described(),
            "runtime": {"status": "done", "timestart": started, "timestop": started + seconds, "duration": seconds},
            "environment": _circumstances(),
        }
        links = {}
        if frame.parent is not None:
            links["parents"] = [frame.parent.key]
        if frame.children:
            links["children"] = list(frame.children)
        if links:
            metadata["links"] = links
        if self.settings.tags:
            metadata["tags"] = dict(self.settings.tags)
        watched = {**frame.watched, **key.watched}
        if watched:
            metadata["files"] = {item.path: item.written() for item in watched.values()}
        if frame.variables:
            metadata["variables"] = dict(frame.variables)
        return metadata

    def _uncached(self, why: object, args: Any, kwargs: Any) -> None:
        if isinstance(why, TypeError) and not isinstance(why, Indigestible):
            try:
                self.profile.signature.bind(*args, **kwargs)
            except TypeError:
                return  # the arguments don't fit, and the function itself will raise that error
        self._trouble("uncached", f"a call of {self._named[0]} isn't cached: {why}")

    def _trouble(self, counter: str, message: str) -> None:
        self.counters[counter] += 1
        if counter not in self._warned:
            self._warned.add(counter)
            warn(message, UserWarning if counter == "modified" else RuntimeWarning)
        _logger.info("%s", message)


class Run(NamedTuple):
    """A run of a function's body."""

    cache: BaseCache
    key: Key
    prepared: PreparedCall | None
    frame: frames.Frame
    above: list[frames.Frame]
    token: Any
    started: float
    clock: float


class BoundRunner:
    """A memoized method bound to an instance or a class."""

    def __init__(self, runner: Runner, instance: object) -> None:
        self._runner = runner
        self._instance = instance
        functools.update_wrapper(self, runner.function)

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:  # noqa: D102
        return self._runner(self._instance, *args, **kwargs)

    def __counts__(self) -> tuple[Any, ...]:
        """Return the parts of the method that count in the key of a function that refers to it."""
        return (self._runner, self._instance)

    def __getattr__(self, name: str) -> Any:
        if name not in {"call", "digest", "contains", "load", "query", "rerun", "explain"}:
            raise AttributeError(f"{type(self._runner).__name__} has no method {name!r}")
        return functools.partial(getattr(self._runner, name), self._instance)


async def _as_awaitable(result: Any) -> Any:
    return result


@functools.cache
def _circumstances() -> dict[str, str]:
    return {
        "host": platform.node(), "python": platform.python_version(), "implementation": sys.implementation.name,
        "platform": sys.platform, "machine": platform.machine(),
    }  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""A call of ``cuda.core.Program.compile``, and its events (:mod:`~cuda_progcache.compile.cuda_core`)."""

from __future__ import annotations

import time
from collections.abc import Mapping

from cuda_progcache import events
from cuda_progcache._util import modes
from cuda_progcache._util.lazy import kept_property
from cuda_progcache.compile import history
from cuda_progcache.compile.arch import with_arch
from cuda_progcache.compile.lookup import fleet, is_theirs, leases_dir
from cuda_progcache.compile.single_flight import fly
from cuda_progcache.errors import FrozenMissError, ProgCacheError
from cuda_progcache.keys.headers import NO_HEADERS
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.options import DEFAULT_NAME, ProgramOptions, as_options
from cuda_progcache.keys.schema import base_key
from cuda_progcache.store.base import ProgramCacheResource, entry_digest, key_bytes, program_bytes
from cuda_progcache.store.compile_record import CompileRecord

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from cuda_progcache.keys.inputs import CompileInputs

#: The reason for a miss if our own key of the program can't be computed.
UNKNOWN = ("no entry has cuda.core's key for it, which doesn't say more",)


class WatchedCall:
    """One call: its use of the cache, and its outcome.

    Parameters
    ----------
    compile_ : callable
        cuda.core's method.
    made_of : tuple
        The positional and keyword arguments with which the program was made.
    args, kwargs
        The arguments of the call.
    """

    def __init__(
        self,
        compile_: Callable[..., Any],
        made_of: tuple[tuple[Any, ...], Mapping[str, Any]],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        self._compile: Callable[..., Any] | None = compile_
        given = dict(zip(("code", "code_type", "options"), made_of[0], strict=False)) | dict(made_of[1])
        self._code, self._code_type = given.get("code"), str(given.get("code_type")).lower()
        self._options = given.get("options")
        self._target = str(args[0] if args else kwargs.get("target_type")).lower()
        self._args, self._kwargs = args, kwargs
        cache = kwargs.get("cache")
        #: Whether there is a cache that is used for lookups.
        self._cached = cache is not None and not (isinstance(cache, ProgramCacheResource) and modes.of(cache) == "off")
        self._clock = time.perf_counter()
        self._digest: str | None = None
        self._hit: bool | None = None
        self._seconds = 0.0
        self._reasons: tuple[str, ...] = UNKNOWN
        self._stored: bool | None = None
        self._error: type[Exception] | None = None
        #: The output that cuda.core has compiled in this call, until it is returned.
        self._made: list[Any] = []

    def run(self) -> Any:
        """Make the call.

        The result isn't stored in a variable: a frame that can raise must hold no ObjectCode, whose repr deadlocks
        without a driver.
        """
        cache: Any = self._kwargs.get("cache")
        if not self._cached or not (isinstance(cache, ProgramCacheResource) or is_theirs(cache)):
            return self._call()  # no cache, or nothing that cuda.core accepts as one
        if not isinstance(cache, ProgramCacheResource):
            return self._call(cache=_Watched(cache, self))
        try:
            return self._call(cache=_Asked(cache, self))
        except _MissedError as missed:
            key = missed.key
        kept = modes.of(cache) == "rw"
        done = fly(
            str(self._digest),
            leases_dir(cache) if kept else None,
            lambda: self._compiled(cache, key),
            lambda: _again(cache, key),
            fleet=fleet(cache, str(self._digest)) if kept else None,
        )
        if isinstance(done, Exception):
            try:
                raise done
            finally:
                del done  # otherwise the error would refer to itself, and only the garbage collector would free it
        if self._made:
            return self._made.pop()
        self._hit = self._stored is None  # compiled meanwhile by another thread or process
        return self._call(cache=_Given(done))

    def _call(self, **more: Any) -> Any:
        if self._compile is None:
            raise RuntimeError("the call has failed")
        return self._compile(*self._args, **self._kwargs | more)

    def _compiled(self, cache: Any, key: Any) -> bytes | Exception:
        """Compile and store; return the bytes, or the error."""
        compiled = _Taking()
        self._clock = time.perf_counter()
        try:
            self._made.append(self._call(cache=compiled))
            self.store(cache, key, compiled.held)
        except Exception as error:  # noqa: BLE001 - raised by the caller
            return error
        return compiled.data

    # Use of the cache

    def look_up(self, cache: Any, key: Any) -> bytes | None:
        """Look the program up; the compile time is measured from the end of the lookup."""
        self._digest = entry_digest(key)
        try:
            data: bytes | None = cache.get(key)
        except FrozenMissError:
            self._missed(cache, key)
            raise
        self._hit = data is not None
        if data is None:
            self._missed(cache, key)
        else:
            self._seconds = _seconds_spared(cache, self._digest)
        self._clock = time.perf_counter()
        return data

    def _missed(self, cache: Any, key: Any) -> None:
        if _takes_records(cache) and (record := self._record(key)) is not None:
            self._reasons = history.reasons(cache, CompileRecord(record), self._digest)

    def store(self, cache: Any, key: Any, held: list[Any]) -> None:
        """Store the output, which is removed from ``held``, with a record if the cache accepts one."""
        self._seconds = time.perf_counter() - self._clock
        self._stored = False
        record = self._record(key) if _takes_records(cache) else None
        if record is None:
            cache[key] = held.pop()
            self._stored = True
            return
        self._stored = cache.publish(key, held.pop(), record)
        if self._stored:
            history.note(cache, CompileRecord(record), str(self._digest))

    # The program

    @kept_property
    def _inputs(self) -> CompileInputs | None:
        """The inputs of the same compile by this package; None if it would refuse them."""
        try:
            return normalize(
                code=self._code,
                code_type=self._code_type,
                options=with_arch(as_options(self._options, ProgramOptions)),
                target_type=self._target,
            )
        except (ProgCacheError, ValueError, TypeError, OSError):
            return None

    def _record(self, key: Any) -> dict[str, Any] | None:
        """Return the program's record, with the components of our own key; None if that key can't be computed."""
        from datetime import UTC, datetime

        inputs = self._inputs
        if inputs is None:
            return None
        try:
            ours = base_key(inputs).with_headers(NO_HEADERS)  # cuda.core doesn't cache programs with headers
        except (ProgCacheError, OSError):
            return None
        return {
            "name": inputs.name,
            "code_type": inputs.code_type,
            "target_type": inputs.target_type,
            "arch": inputs.arch,
            "key": key_bytes(key).hex(),
            "components": ours.printable(),
            "headers": [],
            "toolchain": [{"name": tool.name, "digest": tool.identity} for tool in ours.toolchain],
            "log": "",
            "symbol_mapping": {},
            "duration": self._seconds,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "compiled_by": "cuda.core",
        }

    def _about(self) -> tuple[str, str, str]:
        if self._inputs is not None:
            return self._inputs.name, self._inputs.target_type, self._inputs.arch
        name, arch = (str(getattr(self._options, field, None) or "") for field in ("name", "arch"))
        return name or DEFAULT_NAME, self._target, arch

    # Events

    def failed(self, error: Exception) -> None:
        """Note that the call raised.

        Neither the error nor the program is stored: the error's traceback refers to this object, and cuda.core 1.2.2
        fails if the garbage collector frees a ``Program``.
        """
        self._compile = None
        self._made.clear()
        self._error = type(error)

    def tell(self) -> None:
        """Emit the events of this call."""
        about = self._about()
        if self._hit:
            events.emit(events.Event("hit", *about, self._digest, seconds=self._seconds))
        elif self._error is not None and issubclass(self._error, FrozenMissError):
            events.emit(events.Event("miss", *about, self._digest, self._reasons))
        elif self._error is not None and self._stored is None:
            # Invalid arguments are refused before a compiler is called, and uncacheable ones before a lookup.
            if not issubclass(self._error, (ValueError, TypeError)) and (self._hit is False or not self._cached):
                events.emit(events.Event("refused", *about, None, (self._error.__name__,)))
        elif self._stored is not None:
            events.emit(events.Event("miss", *about, self._digest, self._reasons))
            events.emit(events.Event("compile", *about, self._digest, seconds=self._seconds))
            why = (modes.why_dropped(self._kwargs.get("cache")),)
            kept = events.Event("store", *about, self._digest)
            events.emit(kept if self._stored else events.Event("drop", *about, None, why))
        elif not self._cached:
            events.emit(events.Event("compile", *about, seconds=time.perf_counter() - self._clock))


def _again(cache: Any, key: Any) -> bytes | None:
    """Look the program up again without counting another miss."""
    entry = cache.load_again(key)
    return None if entry is None else bytes(entry.data)


class _MissedError(Exception):
    """A lookup missed; ends a call before anything is compiled."""

    def __init__(self, key: Any) -> None:
        super().__init__(key)
        self.key = key


class _Cache(ProgramCacheResource):
    """A stand-in for a cache during one call, which does a lookup and may then store."""

    def __getitem__(self, key: Any) -> bytes:
        data: bytes | None = self.get(key)
        if data is None:
            raise KeyError(key)
        return data

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""

    def __delitem__(self, key: Any) -> None:
        """Keep nothing."""

    def __len__(self) -> int:
        return 0

    def clear(self) -> None:
        """Keep nothing."""


class _Watched(_Cache):
    """Forwards to a cache, and notes what happens."""

    def __init__(self, cache: Any, call: WatchedCall) -> None:
        self._cache = cache
        self._call = call

    def get(self, key: Any, default: Any = None) -> Any:
        data = self._call.look_up(self._cache, key)
        return default if data is None else data

    def __setitem__(self, key: Any, value: Any) -> None:
        held = [value]
        del value  # a frame that can raise holds no ObjectCode
        self._call.store(self._cache, key, held)


class _Asked(_Watched):
    """Returns the cache's entry; a miss ends the call."""

    def get(self, key: Any, default: Any = None) -> Any:
        data = super().get(key, default)
        if data is None:
            raise _MissedError(key)
        return data


class _Taking(_Cache):
    """Always misses, and receives the output."""

    def __init__(self) -> None:
        self.held: list[Any] = []
        self.data = b""

    def get(self, key: Any, default: Any = None) -> Any:  # noqa: ARG002 - there is none
        return default

    def __setitem__(self, key: Any, value: Any) -> None:
        self.held.append(value)
        del value  # a frame that can raise holds no ObjectCode
        self.data = program_bytes(self.held[0])


class _Given(_Cache):
    """Always returns the given bytes."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def get(self, key: Any, default: Any = None) -> Any:  # noqa: ARG002 - whatever the key
        return self._data


def _takes_records(cache: Any) -> bool:
    """Whether a cache is one of our stores and doesn't raise if it can't store."""
    return isinstance(cache, ProgramCacheResource) and not getattr(cache, "_strict", False)


def _seconds_spared(cache: Any, digest: str) -> float:
    if not isinstance(cache, ProgramCacheResource):
        return 0.0
    try:
        return float(cache.info(digest).about.seconds)
    except (KeyError, OSError, NotImplementedError):
        return 0.0  # still a hit, but its compile time is unknown

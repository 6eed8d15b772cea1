# SPDX-License-Identifier: Apache-2.0
"""One cached function: what is in the key of a call, when a saved result is good, how a new one is made and saved."""

from __future__ import annotations

import inspect
import logging
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from cuda_progcache._util import modes
from cuda_progcache._util.lazy import kept_property
from cuda_progcache.compile.single_flight import fly
from cuda_progcache.memo import cache_dir as layout
from cuda_progcache.memo import call_tree
from cuda_progcache.memo.call_tree import Frame, Watched
from cuda_progcache.memo.code import argument_digest, closure
from cuda_progcache.memo.files import Pattern, hash_text, is_there, paths_in, shared, without_paths
from cuda_progcache.memo.signature import FunctionProfile
from cuda_progcache.memo.syntax import find_path_specs

_logger = logging.getLogger(__name__)

#: Characters of a value's repr up to which it goes into a record as it is.
_SHOWN = 200


class Options(NamedTuple):
    """What :func:`~cuda_progcache.memo.cache_file.cache_file` was told."""

    cache_dir: str | os.PathLike[str] | None = None
    backend: str = "pickle"
    file_args: Sequence[str] | None = None
    ignore_args: Sequence[str] | None = None
    file_pattern: Pattern = None
    env_vars: Sequence[str] | None = None
    algo: str = "xxhash64"
    version: str | int | None = None
    depends_on_files: Sequence[str | os.PathLike[str]] | None = None
    depends_on_vars: Mapping[str, Any] | None = None
    verbose: bool = False
    hash_file_paths: bool = True


class _Key(NamedTuple):
    """A call's key, and what went into it.

    Attributes
    ----------
    digest : str
        SHA-256 (hex) of the parts.
    stem : str
        ``<function>.<hash>``.
    parts : dict
        By component, as texts: what two calls' difference is told from.
    watched : dict
        Files and directories of which the contents are in it, by path.
    bound : dict
        The arguments.
    packages : dict
    """

    digest: str
    stem: str
    parts: dict[str, dict[str, str]]
    watched: dict[str, Watched]
    bound: dict[str, Any]
    packages: dict[str, str]


_CONTROLS = {"_load": True, "_force": False, "_skip_save": False}


class CachedFunction:
    """A function and how its results are kept."""

    def __init__(self, function: Callable[..., Any], options: Options) -> None:
        self.function = function
        self.options = options
        self.fname = getattr(function, "__name__", None) or type(function).__name__
        profile = FunctionProfile.of(function)
        self._bind = profile.binder(options.ignore_args or ())
        # A parameter of the function's own wins over a control argument of the same name.
        self._controls = {n: d for n, d in _CONTROLS.items() if n not in profile.signature.parameters}
        self._latest: dict[str, dict[str, str]] | None = None
        self._warned: set[str] = set()

    @kept_property
    def _specs(self) -> dict[str, list[str]]:
        return find_path_specs(self.function)

    @property
    def directory(self) -> str:
        """Where results are kept."""
        chosen = self.options.cache_dir
        return os.path.abspath(os.fspath(chosen)) if chosen is not None else default_directory()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it, or take the saved result."""
        control = {name: kwargs.pop(name, default) for name, default in self._controls.items()}
        control = {**_CONTROLS, **control}
        if (mode := modes.current()) == "off":
            return self.function(*args, **kwargs)
        if mode != "rw":
            control["_skip_save"] = True
        try:
            key = self._key(args, kwargs)
        except Exception as error:  # noqa: BLE001 - an argument's own code may raise anything; the body runs all the same
            self._bind(args, kwargs)  # raises where the arguments don't fit
            self._warn("key", f"{self.fname}: this call can't be cached: {error}")
            return self.function(*args, **kwargs)
        directory = self.directory
        path = os.path.join(directory, key.stem + layout.SUFFIXES[self.options.backend])
        call_tree.register(key.stem, self.fname, key.stem.rpartition(".")[2], path, self.options.algo)
        reuse = control["_load"] and not control["_force"]
        if reuse:
            found = self._look_up(path, key)
            if found is not None:
                self._log("cache hit", key)
                return found.value
        self._log_miss(key, directory, forced=bool(control["_force"]))

        def compute() -> _Box:
            return _Box(self._run(key, path, args, kwargs, save=not control["_skip_save"]))

        underway = any(frame.node == key.stem for frame in call_tree.stack.frames())
        if not reuse or control["_skip_save"] or underway:
            return compute().value
        sentinel = os.path.basename(path) + layout.SENTINEL
        return fly(sentinel, directory, compute, lambda: self._look_up(path, key), longest_wait=float("inf")).value

    def _run(self, key: _Key, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, save: bool) -> Any:
        """Run the function and save its result, if that can be done and what it read stayed as it was."""
        frame = Frame(key.stem)
        above = call_tree.stack.frames()
        call_tree.stack.push(frame)
        started, clock = time.time(), time.perf_counter()
        try:
            value = self.function(*args, **kwargs)
        except BaseException:
            call_tree.forget(key.stem)
            raise
        finally:
            call_tree.stack.pop()
        duration = time.perf_counter() - clock
        watched = {**frame.watched, **key.watched}
        call_tree.add_files(key.stem, watched.values())
        if above:
            _hand_up(above[-1], watched.values(), {**frame.environment, **self._environment()})
        changed = [item.path for item in watched.values() if _state(item) != item.digest]
        if changed:
            warnings.warn(
                f"{self.fname}: {', '.join(changed)} was modified while it ran; the result isn't saved, since it may "
                "come from either content",
                stacklevel=2,
            )
        elif save:
            self._save(key, path, value, frame, above, started, duration)
        return value

    def _look_up(self, path: str, key: _Key) -> _Box | None:
        """The saved result, if there is one, it is this key's, and the files it depends on are as they were."""
        try:
            loaded = layout.read(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except layout.RefusedError as error:
            if modes.current() == "rw" and not isinstance(error, layout.UntrustedError):
                layout.set_aside(path)
            self._warn(f"read {path}", f"{path} isn't used: {error}")
            return None
        except OSError as error:
            self._warn(f"read {path}", f"{path} can't be read: {error}")
            return None
        record = loaded.checks
        if record.get("key", key.digest) != key.digest:
            return None  # two keys with one hash
        tracked = [Watched(*item) for item in record.get("tracked") or ()]
        environment: dict[str, str | None] = record.get("environment") or {}
        if any(_state(item) != item.digest for item in tracked):
            return None
        if any(os.environ.get(name) != value for name, value in environment.items()):
            return None
        watched = [*key.watched.values(), *tracked]
        call_tree.add_files(key.stem, watched)
        above = call_tree.stack.frames()
        if above:
            _hand_up(above[-1], watched, {**environment, **self._environment()})
        self._latest = key.parts
        return _Box(loaded.value)

    def _save(
        self, key: _Key, path: str, value: Any, frame: Frame, above: Sequence[Frame], started: float, duration: float
    ) -> None:
        parts = key.parts
        checks = {
            "format": 1,
            "key": key.digest,
            "tracked": [_written(item) for item in frame.watched.values() if item.path not in key.watched],
            "environment": frame.environment,
        }
        record = {
            "id": key.stem,
            "fname": self.fname,
            "hash": key.stem.rpartition(".")[2],
            "module": getattr(self.function, "__module__", None),
            "parts": parts,
            "call": {name: _shown(argument) for name, argument in key.bound.items()},
            "created": started,
            "duration": duration,
            "host": platform.node(),
            "python": platform.python_version(),
            "algo": self.options.algo,
            "parents": [above[-1].node] if above else [],
            "children": list(frame.children),
            "used": list(frame.running.children),
            "watched": [_written(item) for item in {**frame.watched, **key.watched}.values()],
        }
        meta = {
            "call": {name: _kept(argument) for name, argument in key.bound.items()},
            "closure": parts["closure"][""],
            "dir_states": parts["files"],
            "envs": self._environment(),
            "version": self.options.version,
            "depends_on_files": parts["depends_on_files"],
            "depends_on_vars": parts["depends_on_vars"],
            "pkgs": key.packages,
            **{name: record[name] for name in ("fname", "hash", "created", "duration", "host", "parents", "children")},
        }
        try:
            layout.write(path, value, meta, checks, record)
        except OSError as error:
            self._warn("save", f"{self.fname}: the result can't be saved in {os.path.dirname(path)}: {error}")
        except Exception as error:  # noqa: BLE001 - pickling runs any class's code; the result is there all the same
            self._warn("save", f"{self.fname}: a result of type {type(value).__qualname__} can't be saved: {error}")
        else:
            self._latest = parts

    def _key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Key:
        options = self.options
        bound = self._bind(args, kwargs)
        watched: dict[str, Watched] = {}
        arguments: dict[str, str] = {}
        for name, value in bound.items():
            arguments[name] = self._argument(name, value, watched)
        for path in self._named_paths():
            self._watch(path, watched)
        depends = [os.path.realpath(path) for path in options.depends_on_files or ()]
        for path in depends:
            self._watch(path, watched)
        found = closure(self.function)
        parts: dict[str, dict[str, str]] = {
            "arguments": arguments,
            "closure": {"": found.digest},
            "files": {
                item.path if options.hash_file_paths else str(index): str(item.digest)
                for index, item in enumerate(watched.values())
                if item.path not in depends
            },
            "environment": {name: repr(value) for name, value in self._environment().items()},
            "version": {"": repr(options.version)},
            "depends_on_files": {path: str(watched[path].digest) for path in depends},
            "depends_on_vars": {name: argument_digest(v) for name, v in (options.depends_on_vars or {}).items()},
            "packages": found.packages,
        }
        named = [(part, *field) for part, fields in parts.items() for field in sorted(fields.items())]
        # repr tells every field from the next, whatever is in it.
        digest = sha256(repr(named).encode("utf-8", "surrogatepass"), usedforsecurity=False).hexdigest()
        return _Key(
            digest, f"{_file_safe(self.fname)}.{hash_text(digest, options.algo)}", parts, watched, bound, found.packages
        )

    def _argument(self, name: str, value: Any, watched: dict[str, Watched]) -> str:
        """What of an argument is in the key: its digest, and for files what :meth:`_watch` says of them."""
        every = self.options.file_args is None
        named = name in (self.options.file_args or ())
        seen = list(paths_in(value, declared=named, guess=every))
        for path in seen:
            self._watch(path, watched)
        if not seen:
            return argument_digest(value)
        if named or not self.options.hash_file_paths:
            # The place counts by the path that is watched, or not at all: its spelling doesn't.
            value = without_paths(value, declared=named, guess=every)
        return argument_digest(value)

    def _watch(self, path: str, watched: dict[str, Watched]) -> None:
        real = os.path.realpath(path)
        if real not in watched:
            pattern, algo = self.options.file_pattern, self.options.algo
            watched[real] = Watched(real, algo, pattern, shared.of_path(real, algo, pattern))

    def _named_paths(self) -> Iterator[str]:
        """Paths in the source itself: literals, and globals or closure variables, that reading calls are given."""
        for text in self._specs["literals"]:
            if os.path.exists(text):
                yield text
        if not self._specs["symbols"]:
            return
        outer = inspect.getclosurevars(inspect.unwrap(self.function))
        for name in self._specs["symbols"]:
            value = outer.nonlocals.get(name, outer.globals.get(name))
            if isinstance(value, str | os.PathLike) and is_there(os.fspath(value)):
                yield os.fspath(value)

    def _environment(self) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in self.options.env_vars or ()}

    def _log(self, what: str, key: _Key) -> None:
        if self.options.verbose:
            _logger.info("%s: %s (%s)", self.fname, what, key.stem)

    def _log_miss(self, key: _Key, directory: str, *, forced: bool) -> None:
        if not self.options.verbose:
            return
        if forced:
            self._log("forced execution", key)
            return
        earlier = self._latest or _latest_parts(directory, self.fname)
        if earlier is None:
            self._log("first execution", key)
        else:
            self._log(f"cache miss: {'; '.join(differences(key.parts, earlier))}", key)

    def _warn(self, about: str, message: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            warnings.warn(message, RuntimeWarning, stacklevel=4)


class _Box(NamedTuple):
    """A result; None inside it is one, too."""

    value: Any


def _hand_up(frame: Frame, watched: Iterable[Watched], environment: Mapping[str, str | None]) -> None:
    """Let a caller depend on what a cached call depends on."""
    for item in watched:
        frame.watched.setdefault(item.path, item)
    for name, value in environment.items():
        frame.environment.setdefault(name, value)


def _state(item: Watched) -> str | None:
    return shared.of_path(item.path, item.algo, item.pattern)


def _written(item: Watched) -> list[Any]:
    return [item.path, item.algo, getattr(item.pattern, "pattern", item.pattern), item.digest]


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | bytes | complex | None | Path) else ""
    if text and len(text) <= _SHOWN:
        return text
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _kept(value: Any) -> Any:
    """An argument in the metadata: itself where it is small and plain."""
    plain = value is None or isinstance(value, str | int | float | bool | bytes | complex)
    return value if plain and len(repr(value)) <= _SHOWN else _shown(value)


def _file_safe(name: str) -> str:
    return "".join(char if char.isalnum() or char in "_-" else "_" for char in name)


_COMPONENTS = {
    "arguments": "argument", "closure": "function body or what it refers to", "files": "file",
    "environment": "environment variable", "version": "version", "depends_on_files": "depends_on_files",
    "depends_on_vars": "depends_on_vars", "packages": "package",
}  # fmt: skip


def differences(new: Mapping[str, Mapping[str, str]], old: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What two calls' keys differ in, a phrase each: ``argument x changed``, ``file /data/a.csv is new``."""
    found = []
    for component, label in _COMPONENTS.items():
        mine, theirs = new.get(component) or {}, old.get(component) or {}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                how = "changed" if name in mine and name in theirs else "is new" if name in mine else "is gone"
                found.append(f"{label} {name} {how}".replace("  ", " "))
    return found or ["nothing in its key changed: the saved result is gone, or a file that it tracked changed"]


def _latest_parts(directory: str, fname: str) -> dict[str, dict[str, str]] | None:
    """What went into the key of the newest entry of a function; None where there is none."""
    named = [row for row in layout.rows(directory) if row.fname == _file_safe(fname)]
    for row in sorted(named, key=lambda row: -row.status.st_mtime_ns):
        try:
            parts = layout.read_record(row.path).get("parts")
        except OSError:
            continue
        if isinstance(parts, dict):
            return parts
    return {} if named else None


def default_directory() -> str:
    """The directory for functions that name none; made, unless nothing is to be written."""
    chosen = os.environ.get("CACHER_DIR")
    if not chosen:
        from platformdirs import user_cache_path

        chosen = str(user_cache_path("cuda_progcache") / "calls")
    if modes.current() == "rw":
        os.makedirs(chosen, mode=0o755, exist_ok=True)
    return chosen

# SPDX-License-Identifier: Apache-2.0
"""Function results that are kept in files and reused as long as nothing they depend on has changed.

>>> from cuda_progcache.memo.cache_file import cache_file, track_file
>>> @cache_file("results", file_args=["path"])  # doctest: +SKIP
... def load(path, threshold=0.5):
...     return parse(path, threshold)

A result depends on the arguments, the function's code with everything that it
refers to (:mod:`~cuda_progcache.memo.code`), the contents of files and
directories among the arguments, declared files and values, and the versions of
the packages that the function uses. Files that become known only while the
function runs are reported with :func:`track_file`. They are checked before a
result is reused, and so are the files of the cached functions that it calls.

A result is computed once, even if many threads and processes ask for it. A
waiting process sees the result within 50 ms of its publication, and takes over
if the computing process dies. An error in the cache never loses a result: the
result is computed and returned, with a warning.

Arguments that are files
------------------------
``file_args`` names the parameters that are files. Path objects are files in any
parameter. If ``file_args`` isn't given, so is a string that is one line of at
most 4,096 characters, contains a path separator or begins with a dot, and names
something that exists; a text of source code isn't a file.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util import modes
from cuda_progcache.errors import OptionError, ProgCacheError
from cuda_progcache.memo import cache_dir as layout
from cuda_progcache.memo import call_tree, frames
from cuda_progcache.memo.cache_dir import DirectoryCache, cache_info, cache_list, cache_prune, cache_stats
from cuda_progcache.memo.call_tree import (
    cache_tree_changed_files,
    cache_tree_files,
    cache_tree_for_file,
    cache_tree_load,
    cache_tree_nodes,
    cache_tree_reset,
    cache_tree_save,
    cache_tree_summary,
    cache_tree_to_dot,
    cache_tree_to_json,
)
from cuda_progcache.memo.code import argument_digest, closure, get_recursive_closure_hash
from cuda_progcache.memo.explain import differences
from cuda_progcache.memo.files import PathRule, Watched, hash_file, is_there, new_hasher, shared
from cuda_progcache.memo.frames import refreshing
from cuda_progcache.memo.memoize import Memoized
from cuda_progcache.memo.runner import Settings
from cuda_progcache.memo.syntax import find_path_specs
from cuda_progcache.memo.tree_plot import plot_cache_graph

if TYPE_CHECKING:
    from cuda_progcache.memo.call_key import Key
    from cuda_progcache.memo.files import Pattern

__all__ = [
    "CacheDecorator",
    "cache_default_dir",
    "cache_file",
    "cache_file_state_clear",
    "cache_file_state_info",
    "cache_info",
    "cache_list",
    "cache_prune",
    "cache_stats",
    "cache_tree_changed_files",
    "cache_tree_files",
    "cache_tree_for_file",
    "cache_tree_load",
    "cache_tree_nodes",
    "cache_tree_reset",
    "cache_tree_save",
    "cache_tree_summary",
    "cache_tree_sync",
    "cache_tree_to_dot",
    "cache_tree_to_json",
    "fast_file_hash",
    "get_recursive_closure_hash",
    "load_config",
    "plot_cache_graph",
    "probabilistic_file_hash",
    "track_file",
]

_logger = logging.getLogger(__name__)

# Further names that programs import if they were written for the module that this one replaces.
logger = _logger
_cache_tree_current_node = call_tree.node_here
_cache_tree_graph = call_tree.graph
_digest_obj = argument_digest
_cache_tree_call_stack = call_tree.stack
_cache_tree_register_node = call_tree.register
_find_path_specs = find_path_specs
_file_state_cache = shared.memory
_FILE_STATE_CACHE_LIMIT = 10_000
shared.limit = lambda: _FILE_STATE_CACHE_LIMIT


def _get_package_versions(function: Any) -> dict[str, str]:
    """Return the versions of the packages that a function uses, by top-level module."""
    return closure(function).packages


def _detect_import_names(function: Any) -> set[str]:
    """Return the top-level names of the packages that a function uses."""
    return set(closure(function).packages)


def cache_file(
    cache_dir: str | os.PathLike[str] | None = None,
    backend: str = "pickle",
    file_args: Sequence[str] | None = None,
    ignore_args: Sequence[str] | None = None,
    file_pattern: Pattern = None,
    env_vars: Sequence[str] | None = None,
    algo: str = "xxhash64",
    version: str | int | None = None,
    depends_on_files: Sequence[str | os.PathLike[str]] | None = None,
    depends_on_vars: Mapping[str, Any] | None = None,
    verbose: bool = False,  # noqa: FBT001, FBT002 - the original design's signature
    hash_file_paths: bool = True,  # noqa: FBT001, FBT002 - as above
) -> CacheDecorator:
    """Make a decorator that keeps a function's results in files.

    Parameters
    ----------
    cache_dir : path-like, optional
        The directory for the results, created now. Default: :func:`cache_default_dir`.
    backend : {"pickle"}
        The format in which values are written.
    file_args : sequence of str, optional
        Parameters whose values are paths; the files' contents count. Default: every argument that looks like a path
        (see the module's docstring). Path objects count in any case.
    ignore_args : sequence of str, optional
        Parameters that don't count.
    file_pattern : str or re.Pattern, optional
        Which files of a directory count: see :func:`~cuda_progcache.memo.files.name_filter`.
    env_vars : sequence of str, optional
        Environment variables that count.
    algo : {"xxhash64", "sha256"}
        The hash for files. Entries are named by the first 16 digits of their keys, or all 64 with ``sha256``. The whole
        key is in the record, so another key with the same first digits is a miss.
    version : str or int, optional
        Part of the key; change it if results differ from earlier ones.
    depends_on_files : sequence of path-like, optional
        Files and directories whose contents count.
    depends_on_vars : mapping, optional
        Values that count.
    verbose : bool
        Log hits, first executions, forced executions, and misses with the changes that caused them, at INFO.
    hash_file_paths : bool
        Whether the path of a file counts in addition to its content.

    Returns
    -------
    CacheDecorator
        Calls of the decorated function accept ``_load=False`` or ``_force=True``, which run the function without a
        lookup and without waiting for another process, and ``_skip_save=True``, which saves nothing. None of these
        arguments is part of the key.

    Raises
    ------
    OptionError
        Unknown ``backend`` or ``algo``. It is also a ValueError.
    """
    return CacheDecorator(
        Options(
            cache_dir, backend, file_args, ignore_args, file_pattern, env_vars, algo, version, depends_on_files,
            depends_on_vars, verbose, hash_file_paths,
        )
    )  # fmt: skip


class Options(NamedTuple):
    """The options of :func:`cache_file`, and ``state``: see :func:`~cuda_progcache.memo.memoize.memoize`."""

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
    state: Sequence[str] = ()


class CacheDecorator:
    """The decorator that :func:`cache_file` makes: ``@cf``, ``cf(function)``, or ``@cf(verbose=True)`` with options."""

    def __init__(self, options: Options) -> None:
        if str(options.backend).lower() != "pickle":
            raise OptionError(f"backend={options.backend!r} isn't known; valid: pickle")
        new_hasher(options.algo)  # raises if the hash is unknown
        if callable(options.cache_dir):
            raise TypeError("cache_file takes a directory as its first argument: write @cache_file() above a function")
        directory = os.path.abspath(cache_default_dir() if options.cache_dir is None else options.cache_dir)
        try:
            _make(directory)
        except OSError as error:
            _logger.info("can't create %s: %s", directory, error)  # saving a result there will warn
        self._options = options._replace(cache_dir=directory)

    def __call__(self, function: Callable[..., Any] | None = None, /, **overrides: Any) -> Any:
        """Decorate a function, or return a decorator with other options.

        Raises
        ------
        TypeError
            An option is unknown, or the function is a coroutine or generator function, whose result can't be saved.
        """
        unknown = overrides.keys() - set(Options._fields)
        if unknown:
            valid = ", ".join(Options._fields)
            raise TypeError(f"cache_file has no option {min(unknown)!r}; valid: {valid}")
        if overrides:
            other = CacheDecorator(self._options._replace(**overrides))
            return other if function is None else other(function)
        if function is None:
            return self
        plain = getattr(function, "__func__", function)
        if inspect.iscoroutinefunction(plain) or inspect.isgeneratorfunction(plain):
            raise TypeError(f"{function!r} returns a coroutine or generator, which can't be saved")
        return CachedFunction(function, self._options)


_CONTROLS = {"_load": True, "_force": False, "_skip_save": False}


class CachedFunction(Memoized[..., Any]):
    """A function whose results are kept in a directory; made by :class:`CacheDecorator`.

    Calls accept ``_load``, ``_force`` and ``_skip_save`` in addition to the function's own arguments.
    """

    def __init__(self, function: Any, options: Options) -> None:
        plain = getattr(function, "__func__", function)
        self.options = options
        self.fname = getattr(plain, "__name__", None) or type(plain).__name__
        directory = str(options.cache_dir)
        store = DirectoryCache(directory, self.fname, options.algo)
        rule = PathRule(
            frozenset(options.file_args or ()), True, options.file_args is None, options.file_pattern, options.algo,
            options.hash_file_paths, self._other_paths,
        )  # fmt: skip
        super().__init__(
            function,
            store,
            Settings(
                name=self.fname, version=options.version, ignore=frozenset(options.ignore_args or ()),
                state=tuple(sorted(options.state)), paths=rule, env=tuple(options.env_vars or ()),
                depends_on=options.depends_on_vars, single_flight="always",
            ),
            unknown_names=True,
        )  # fmt: skip
        self._store = store
        self._specs: dict[str, list[str]] | None = None
        self._verbose = options.verbose
        # The function's own parameter overrides a control argument of the same name.
        self._controls = {n: d for n, d in _CONTROLS.items() if n not in self.profile.signature.parameters}

    def _controlled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        control = {**_CONTROLS, **{name: kwargs.pop(name, default) for name, default in self._controls.items()}}
        try:
            key = self.key(args, kwargs)
        except Exception as error:  # noqa: BLE001 - as in the engine
            self._uncached(error, args, kwargs)
            return self.function(*args, **kwargs)
        reuse = control["_load"] and not control["_force"] and not refreshing.get()
        if reuse:
            found = self._find(self._store, key)
            if found is not None:
                self._log("cache hit", key)
                return found[0]
        self._log_miss(key, forced=bool(control["_force"]))
        return self._miss(self._store, key, args, kwargs, reuse=reuse, save=not control["_skip_save"])

    def _flight(self, key: Key) -> str:
        return os.path.basename(self._store.path(key.digest)) + layout.SENTINEL

    def _node(self, key: Key) -> str:
        node = f"{self.fname}:{self._store.short(key.digest)}"
        call_tree.register(node, self.fname, node.rpartition(":")[2], self._store.path(key.digest), self.options.algo)
        return node

    def _seen(self, key: Key, watched: Mapping[str, Watched]) -> None:
        call_tree.add_files(self._node(key), watched.values())

    def _give_up(self, run: Any) -> None:
        super()._give_up(run)
        call_tree.forget(run.frame.node)

    def _other_paths(self) -> Iterator[str]:
        """Yield the declared files, and the existing paths (literals and names) that the source passes to readers."""
        yield from (os.fspath(path) for path in self.options.depends_on_files or ())
        if self._specs is None:
            self._specs = find_path_specs(self.function)
        yield from filter(is_there, self._specs["literals"])
        if not self._specs["symbols"]:
            return
        outer = inspect.getclosurevars(inspect.unwrap(self.function))
        for name in self._specs["symbols"]:
            value = outer.nonlocals.get(name, outer.globals.get(name))
            if isinstance(value, str | os.PathLike) and is_there(os.fspath(value)):
                yield os.fspath(value)

    def _log(self, what: str, key: Key) -> None:
        if self.options.verbose:
            _logger.info("%s: %s (%s)", self.fname, what, self._store.stem(key.digest))

    def _log_miss(self, key: Key, *, forced: bool) -> None:
        if not self.options.verbose:
            return
        if forced:
            self._log("forced execution", key)
            return
        found = differences(self._store, self.call_of(key))
        if found is None and not self._store.contains(key.digest):
            self._log("first execution", key)
        else:
            gone = "the key is the same, but the saved result is gone or a tracked file has changed"
            self._log(f"cache miss: {'; '.join(found or [gone])}", key)


def _make(directory: str) -> None:
    """Make a directory for results if the mode allows writing."""
    if modes.current() == "rw":
        os.makedirs(directory, mode=0o755, exist_ok=True)


def track_file(path: str | os.PathLike[str]) -> Path:
    """Record that the running memoized call reads a file or directory; its result is reused until that changes.

    In a thread that a body started, all calls that run in this process are taken to read the file.

    Parameters
    ----------
    path : path-like
        A path that needn't exist; if it doesn't, the result is valid until it does.

    Returns
    -------
    Path
        The absolute path without symbolic links; outside of a memoized call, the path as given.
    """
    found = frames.frames_here()
    if not found:
        return Path(path)
    real = os.path.realpath(path)
    for frame in found:
        algo = call_tree.algo_of(frame.node)
        item = Watched(real, algo, None, shared.of_path(real, algo))
        frame.watched.setdefault(real, item)
        if frame.node is not None:
            call_tree.add_files(frame.node, [item])
    return Path(real)


def cache_tree_sync(cache_dir: str | os.PathLike[str]) -> dict[str, call_tree.Node]:
    """Merge the calls recorded in a cache directory into the call tree; return the tree's nodes."""
    for row, call in layout.recorded(os.fspath(cache_dir)):
        if call is not None:
            call_tree.restore(call, row.hash, Path(row.path))
    call_tree.complete()
    return cache_tree_nodes()


def _wait_for_sentinel(
    sentinel: str | os.PathLike[str],
    outfile: str | os.PathLike[str],
    load: Callable[[Any], Any],
    fname: str,
    poll: float = 0.01,
    timeout: float = 600.0,
    stale: float = 3600.0,
) -> Any:
    """Wait for a result that another process computes, and load it; None if there is no result to wait for.

    For programs that have sentinels of their own. :func:`cache_file` itself waits with
    :func:`~cuda_progcache.compile.single_flight.fly`, which sees whether the holder is alive.
    """
    end = time.monotonic() + timeout
    while not os.path.exists(outfile):
        try:
            age = time.time() - os.stat(sentinel).st_mtime
        except OSError:
            return None  # never begun, or abandoned
        if age > stale or time.monotonic() > end:
            _logger.info("%s: the holder of %s produced no result", fname, os.fspath(sentinel))
            return None
        time.sleep(poll)
    return load(outfile)


def cache_default_dir() -> Path:
    """Return the default directory, and create it: ``$CACHER_DIR``, or ``calls`` in the user's cache directory."""
    chosen = os.environ.get("CACHER_DIR")
    if not chosen:
        from platformdirs import user_cache_path

        chosen = str(user_cache_path("cuda_progcache") / "calls")
    _make(chosen)
    return Path(os.path.abspath(chosen))


def cache_file_state_info() -> dict[str, Any]:
    """Return which files' digests are cached: ``n_entries``, ``paths``, ``limit``."""
    paths = list(_file_state_cache)
    return {"n_entries": len(paths), "paths": paths, "limit": _FILE_STATE_CACHE_LIMIT}


def cache_file_state_clear() -> int:
    """Clear the cache of file digests; return how many there were."""
    count = len(_file_state_cache)
    _file_state_cache.clear()
    return count


def load_config(path: str | os.PathLike[str], existing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read options of :func:`cache_file` from a YAML file.

    Parameters
    ----------
    path : path-like
    existing : mapping, optional
        Options already chosen; they override the file's.

    Raises
    ------
    ProgCacheError
        The file isn't valid YAML or doesn't contain a mapping, or PyYAML isn't installed (extra: ``yaml``).
    """
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise ProgCacheError(f"a YAML file needs PyYAML: pip install 'cuda-progcache[yaml]' ({error})") from error
    with open(path, encoding="utf-8") as file:
        try:
            loaded = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ProgCacheError(f"{os.fspath(path)} is not YAML: {error}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ProgCacheError(f"{os.fspath(path)} contains a {type(loaded).__name__}, not a mapping of options")
    return {**(loaded or {}), **(existing or {})}


def fast_file_hash(path: str | os.PathLike[str], algo: str = "xxhash64") -> str | None:
    """Return the hash of a file's whole content, cached as long as its status doesn't change; None if unreadable."""
    return shared.of_file(os.fspath(path), algo)


def probabilistic_file_hash(
    path: str | os.PathLike[str],
    block_size: int = 65536,  # noqa: ARG001 - there are no blocks to choose
    n_blocks: int = 5,  # noqa: ARG001 - as above
    algo: str = "xxhash64",
) -> str | None:
    """Return the hash of a file's whole content, which is read every time; None if the file can't be read.

    The name is from a design that hashed samples of large files, and so missed edits between the samples.
    """
    try:
        return hash_file(os.fspath(path), algo)[0]
    except OSError:
        return None

# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: tests that compile CUDA programs compile each of them once, across runs and xdist workers.

It is there in every run once ``cuda-progcache`` is installed, and does nothing until a test asks for
:func:`program_cache`::

    def test_saxpy(program_cache):
        program = cuda.core.Program(SOURCE, "c++", cuda.core.ProgramOptions(arch="sm_90"))
        code = program.compile("cubin", cache=program_cache)

``--progcache-dir DIR`` chooses the directory, ``--progcache MODE`` (or ``progcache`` in the ini file) how it is used:
``rw``, ``ro``, ``off`` or ``frozen``, in this run and in the processes that it starts. The run ends with a line such as
``progcache: 12 hits, 3 misses, 0 dropped (80% hits), 1.4 MB at DIR``, summed over xdist's workers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from cuda_progcache.store.file_stream import FileStreamProgramCache

# Before anybody imports it: its asserts are told as those of a test are.
pytest.register_assert_rewrite("cuda_progcache.testing")


class SessionCounts(NamedTuple):
    """What the ``program_cache`` of one process, or of all of them, did in this session.

    Attributes
    ----------
    hits, misses, dropped : int
        Lookups that found a program, that didn't, and programs that the cache could not store.
    bytes : int
        The size of the cache when the session ended.
    path : str
        Its directory.
    unkeyed : int
        Programs that were compiled and not kept, since a hit could differ from a fresh compile.
    """

    hits: int
    misses: int
    dropped: int
    bytes: int
    path: str
    unkeyed: int = 0

    def __add__(self, other: object) -> SessionCounts:
        """Sum the counts; the directory is one, and who ended last saw the most of it."""
        if not isinstance(other, SessionCounts):
            return NotImplemented
        return SessionCounts(
            self.hits + other.hits,
            self.misses + other.misses,
            self.dropped + other.dropped,
            max(self.bytes, other.bytes),
            self.path,
            self.unkeyed + other.unkeyed,
        )

    def line(self) -> str:
        """Write the counts for people."""
        lookups = self.hits + self.misses
        counts = f"{_count(self.hits, 'hit')}, {_count(self.misses, 'miss')}, {self.dropped} dropped"
        if self.unkeyed:
            counts += f", {self.unkeyed} not kept"
        share = f" ({100 * self.hits / lookups:.0f}% hits)" if lookups else ""
        return f"progcache: {counts}{share}, {_size(self.bytes)} at {self.path}"


#: Those of :mod:`cuda_progcache._util.modes`, which isn't imported in runs that don't need it.
_MODES = ("rw", "ro", "off", "frozen")
_VARIABLE = "CUDA_PROGCACHE"
_COUNTS = pytest.StashKey[SessionCounts]()
_LOST = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--progcache`` and ``--progcache-dir``."""
    group = parser.getgroup("progcache", "compiled CUDA programs (cuda_progcache)")
    group.addoption(
        "--progcache",
        metavar="MODE",
        default=None,
        help="how programs, compiled templates and memoized calls are cached: rw; ro (nothing is written); off "
        "(nothing is read, either); frozen (nothing is compiled) (default: ini progcache, $CUDA_PROGCACHE, or rw)",
    )
    parser.addini("progcache", "default of --progcache", default="")
    group.addoption(
        "--progcache-dir",
        metavar="DIR",
        default=None,
        help="where the program_cache fixture keeps compiled programs, shared by all xdist workers "
        "(default: $CUDA_PROGCACHE_DIR, or the user's cache directory)",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Set the mode, and make the directory absolute: xdist hands options on as they are, and a test may change it."""
    _set_mode(config)
    directory = config.option.progcache_dir
    if directory:
        config.option.progcache_dir = str(Path(config.invocation_params.dir, directory).absolute())


def _set_mode(config: pytest.Config) -> None:
    """Have this process, and those that it starts, use caches in the mode that was asked for."""
    mode = config.option.progcache or config.getini("progcache")
    if not mode:
        return
    if mode not in _MODES:
        raise pytest.UsageError(f"--progcache={mode} is no mode of the cache: it is one of {', '.join(_MODES)}")
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = mode

    def put_back() -> None:
        if before is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = before

    config.add_cleanup(put_back)


@pytest.fixture(scope="session")
def program_cache(pytestconfig: pytest.Config) -> Iterator[FileStreamProgramCache]:
    """Give the cache of compiled programs that this test run, its xdist workers and later runs share.

    It goes wherever a cache goes: ``cuda.core.Program(...).compile("cubin", cache=program_cache)``,
    ``cuda_progcache.Program(...).compile(..., cache=program_cache)`` or ``CompileService(program_cache)``.
    """
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    with FileStreamProgramCache(pytestconfig.option.progcache_dir) as cache:
        yield cache
        stats = cache.stats()
        _add(
            pytestconfig,
            SessionCounts(stats.hits, stats.misses, stats.dropped, stats.bytes, str(cache.path), stats.unkeyed),
        )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """In a worker of xdist, send the counts to the controller."""
    output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
    counts = session.config.stash.get(_COUNTS, None)
    if output is not None and counts is not None:
        output["progcache"] = tuple(counts)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """In xdist's controller, receive a worker's counts."""
    output = getattr(node, "workeroutput", None)
    if output is None:
        node.config.stash[_LOST] = node.config.stash.get(_LOST, 0) + 1
    elif "progcache" in output:
        _add(node.config, SessionCounts(*output["progcache"]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the summary line when a test used the cache."""
    counts = config.stash.get(_COUNTS, None)
    if counts is None:
        return
    lost = config.stash.get(_LOST, 0)
    note = f" (without what {lost} crashed {'worker' if lost == 1 else 'workers'} did)" if lost else ""
    terminalreporter.write_line(counts.line() + note, yellow=bool(counts.dropped or counts.unkeyed or lost))


def _add(config: pytest.Config, counts: SessionCounts) -> None:
    before = config.stash.get(_COUNTS, None)
    config.stash[_COUNTS] = counts if before is None else before + counts


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun}{'es' if noun.endswith('s') else 's'}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"

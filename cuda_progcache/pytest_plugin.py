# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin: tests compile each CUDA program only once, across runs and xdist workers.

The plugin is active in every run once ``cuda-progcache`` is installed, and does nothing until a test compiles.
Fixtures: :func:`program_cache`, :func:`compile_service` and :func:`kernel`::

    def test_saxpy(program_cache):
        program = cuda.core.Program(SOURCE, "c++", cuda.core.ProgramOptions(arch="sm_90"))
        code = program.compile("cubin", cache=program_cache)


    @pytest.mark.no_compile  # fails if anything is compiled while it runs
    def test_softmax(kernel):
        softmax = kernel("softmax", dtype="float16")

The ini file can set a default for each option, under the same name with underscores (``progcache_dir``). The run ends
with a summary over all xdist workers: hits, misses by reason, compiles, and the time that hits saved. The summary
counts compiles by this package and by ``cuda.core.Program``, with or without a cache, in the processes that run tests.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from cuda_progcache import events
from cuda_progcache.compile.cuda_core import watch

if TYPE_CHECKING:
    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.service.activity import Activity
    from cuda_progcache.service.compile_service import CompileService
    from cuda_progcache.store.base import ProgramCacheResource

# Must run before the module is imported: pytest then explains its failed asserts like those of a test.
pytest.register_assert_rewrite("cuda_progcache.testing")

#: The modes of :mod:`cuda_progcache._util.modes`, which isn't imported in runs that don't need it.
_MODES = ("rw", "ro", "off", "frozen")
#: The architecture of the ``kernel`` fixture if there is no device.
_ARCH = "sm_90"
_WARNINGS = "default::cuda_progcache.ProgCacheWarning"


class _Option(NamedTuple):
    name: str
    metavar: str
    help: str
    is_path: bool = False
    #: The environment variable through which the option also applies to processes that tests start.
    variable: str = ""


_OPTIONS = (
    _Option(
        "progcache",
        "MODE",
        "how programs, compiled templates and memoized calls are cached: rw; ro (nothing is written); off "
        "(nothing is read, either); frozen (nothing is compiled) (default: $CUDA_PROGCACHE, or rw)",
        variable="CUDA_PROGCACHE",
    ),
    _Option(
        "progcache-dir",
        "DIR",
        "directory of the program_cache fixture's compiled programs, shared by all xdist workers "
        "(default: $CUDA_PROGCACHE_DIR, or the user's cache directory)",
        is_path=True,
    ),
    _Option(
        "progcache-max-size",
        "SIZE",
        "size cap of program_cache, beyond which the least recently used programs are evicted; 0: no cap "
        "(default: $CUDA_PROGCACHE_MAX_SIZE, or 5GB)",
    ),
    _Option(
        "progcache-record",
        "FILE",
        "append the programs that the run used to FILE; 'cuda-progcache lock' makes a lockfile from it "
        "(default: $CUDA_PROGCACHE_RECORD, or no recording)",
        is_path=True,
        variable="CUDA_PROGCACHE_RECORD",
    ),
    _Option("progcache-report", "FILE", "write the summary and every compile to FILE, as JSON", is_path=True),
    _Option("progcache-arch", "ARCH", f"architecture of the kernel fixture (default: the device's, or {_ARCH})"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, each with a default in the ini file."""
    group = parser.getgroup("progcache", "compiled CUDA programs (cuda_progcache)")
    for option in _OPTIONS:
        group.addoption(f"--{option.name}", metavar=option.metavar, default=None, help=option.help)
        parser.addini(option.name.replace("-", "_"), f"default of --{option.name}", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Determine the options, and subscribe to events."""
    config.addinivalue_line(
        "markers",
        "no_compile: the test fails if a program is compiled, by cuda_progcache or cuda.core, while the test or one of "
        "its function-scoped fixtures runs, in any thread of its process",
    )
    for option in _OPTIONS:
        _settle(config, option)
    if (mode := config.option.progcache) and mode not in _MODES:
        raise pytest.UsageError(f"--progcache={mode} isn't a mode of the cache ({', '.join(_MODES)})")
    if config.option.progcache_max_size:
        _max_size(config)
    for option in _OPTIONS:
        if option.variable and (value := getattr(config.option, _dest(option))):
            _set_variable(config, option.variable, value)
    _let_warnings_be(config)
    run = _Run(config)
    config.stash[_RUN] = run
    config.pluginmanager.register(run, "progcache-run")


def _dest(option: _Option) -> str:
    return option.name.replace("-", "_")


def _settle(config: pytest.Config, option: _Option) -> None:
    """Set an option from the ini file if the command line doesn't have it; make paths absolute.

    Absolute paths are needed since a test may change the working directory, and xdist passes options on unchanged.
    """
    value, start = getattr(config.option, _dest(option)), config.invocation_params.dir
    if not value:
        value, start = config.getini(_dest(option)), (config.inipath or config.rootpath / "pytest.ini").parent
    if value and option.is_path:
        value = str(Path(start, value).absolute())
    setattr(config.option, _dest(option), value or None)


def _max_size(config: pytest.Config) -> int | None:
    from cuda_progcache.store.default_cap import default_max_size, parse_size

    told = config.option.progcache_max_size
    try:
        return default_max_size() if told is None else parse_size(told) or None
    except ValueError as error:
        raise pytest.UsageError(f"--progcache-max-size: {error}" if told else str(error)) from None


def _set_variable(config: pytest.Config, name: str, value: str) -> None:
    """Set an environment variable until the run ends."""
    before = os.environ.get(name)
    os.environ[name] = value

    def put_back() -> None:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before

    config.add_cleanup(put_back)


class _Run:
    """The test run of this process: the events in it, and in xdist's controller also those of the workers."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._activity: Activity | None = None
        self._where = ""
        self._lost = 0
        watch()
        config.add_cleanup(events.subscribe(self._hear))

    @property
    def activity(self) -> Activity:
        """The activity so far; created on first use."""
        if self._activity is None:
            from cuda_progcache.service.activity import Activity

            self._activity = Activity()
            self._activity.where = self._where
        return self._activity

    def _hear(self, event: events.Event) -> None:
        self.activity(event)

    def _now(self, where: str) -> None:
        self._where = where
        if self._activity is not None:
            self._activity.where = where

    # Tests

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Note which test is running."""
        self._now(item.nodeid)
        try:
            return (yield)
        finally:
            self._now("")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Generator[None, object, object]:
        """Note which fixture of a wider scope is being set up; its compiles don't count as those of a test."""
        if fixturedef.scope == "function":
            return (yield)
        before = self._where
        self._now(f"fixture {fixturedef.argname} of {before}" if before else f"fixture {fixturedef.argname}")
        try:
            return (yield)
        finally:
            self._now(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, None, None]:
        """Fail a test marked ``no_compile`` that compiled."""
        yield
        self._refuse_compiles(item)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, None, None]:
        """Fail a test marked ``no_compile`` whose teardown compiled."""
        before = self._compiles(item)
        yield
        self._refuse_compiles(item, after=len(before))

    def _compiles(self, item: pytest.Item) -> list[Any]:
        return [] if self._activity is None else self._activity.at(item.nodeid)

    def _refuse_compiles(self, item: pytest.Item, after: int = 0) -> None:
        if item.get_closest_marker("no_compile") is None:
            return
        if compiles := self._compiles(item)[after:]:
            number = "a program was" if len(compiles) == 1 else f"{len(compiles)} programs were"
            told = "\n".join(f"  {one}" for one in compiles)
            pytest.fail(f"no_compile: {number} compiled during this test\n{told}", pytrace=False)

    # The end

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Add the activity of a worker, in xdist's controller."""
        output = getattr(node, "workeroutput", None)
        if output is None:
            self._lost += 1
        elif "progcache" in output:
            from cuda_progcache.service.activity import Activity

            self._activity = self.activity + Activity.from_dict(output["progcache"])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Send the activity to the controller if this is an xdist worker; otherwise write the report."""
        output: dict[str, Any] | None = getattr(session.config, "workeroutput", None)
        if output is not None:
            if self._activity is not None:
                output["progcache"] = self._activity.as_dict()
        elif path := self._config.option.progcache_report:
            self._trouble = _write_report(
                path,
                self.activity.as_dict()
                | {
                    "mode": self._config.option.progcache or os.environ.get("CUDA_PROGCACHE") or "rw",
                    "lost_workers": self._lost,
                    "exit_status": int(exitstatus),
                },
            )

    #: Why the report couldn't be written.
    _trouble = ""

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the summary if anything was compiled or looked up."""
        if self._trouble:
            terminalreporter.write_line(f"progcache: {self._trouble}", red=True)
        record = self._config.option.progcache_record
        if record and not os.path.exists(record):
            terminalreporter.write_line(
                f"progcache: {record} wasn't written. Only programs compiled by cuda_progcache.Program and "
                "CompileService are recorded, not those of cuda.core.Program",
                yellow=True,
            )
        lines = [] if self._activity is None else self._activity.summary()
        if not lines:
            return
        crashed = f" (not counting {self._lost} crashed {'worker' if self._lost == 1 else 'workers'})"
        well = self._activity is not None and self._activity.is_well and not self._lost
        terminalreporter.write_line(f"progcache: {lines[0]}{crashed if self._lost else ''}", yellow=not well)
        for line in lines[1:]:
            terminalreporter.write_line(f"  {line}")


_RUN = pytest.StashKey[_Run]()


def _write_report(path: str, report: Mapping[str, Any]) -> str:
    """Write the report; return the reason if that fails, otherwise an empty string."""
    import json

    try:
        with contextlib.suppress(FileExistsError):
            Path(path).parent.mkdir(parents=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        return f"can't write the report {path}: {error.strerror or error}"
    return ""


def _let_warnings_be(config: pytest.Config) -> None:
    """Keep the cache's warnings from being errors if all warnings are, unless a filter names them.

    Otherwise a full disk would fail a test.
    """
    said: list[str] = config.getini("filterwarnings")
    for lines in (said, config.known_args_namespace.pythonwarnings or []):
        for index in reversed([i for i, line in enumerate(lines) if _is_error(line)]):
            lines.insert(index + 1, _WARNINGS)  # later filters win
    if any(map(_is_error, sys.warnoptions)):
        said.insert(0, _WARNINGS)


def _is_error(line: str) -> bool:
    """Return whether a warning filter turns all warnings, or all of category RuntimeWarning, into errors."""
    action, message, category, *where = (*(part.strip() for part in line.split(":")), "", "", "")
    return action == "error" and not (message or any(where)) and category in {"", "Warning", "RuntimeWarning"}


@pytest.fixture(scope="session")
def program_cache(pytestconfig: pytest.Config) -> Iterator[ProgramCacheResource]:
    """Yield the cache of compiled programs that this test run, its xdist workers and later runs share.

    Pass it wherever a cache is accepted: ``cuda.core.Program(...).compile("cubin", cache=program_cache)``,
    ``cuda_progcache.Program(...).compile(..., cache=program_cache)`` or ``CompileService(program_cache)``. If its
    directory can't be used, programs are compiled and kept in memory, or not at all, and the summary says so.
    """
    from cuda_progcache._util import modes
    from cuda_progcache.service.activity import CacheState

    with _opened(pytestconfig) as cache:
        yield cache
        run, mode, path = pytestconfig.stash[_RUN], modes.of(cache), cache.directory or "memory"
        try:
            run.activity.cache = CacheState.of(path, mode, cache.stats())
        except OSError:  # the directory can no longer be listed
            nothing: Any = dict.fromkeys(CacheState._fields, 0)
            run.activity.cache = CacheState(**{**nothing, "path": path, "mode": mode, "read_errors": 1})


def _opened(config: pytest.Config) -> ProgramCacheResource:
    from cuda_progcache.errors import ProgCacheWarning, UnsafeRootError
    from cuda_progcache.store.fallback import KeptInMemory
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.in_memory import InMemoryProgramCache

    path, cap = config.option.progcache_dir, _max_size(config)
    try:
        return FileStreamProgramCache(path, max_size_bytes=cap, tiers="configured")
    except UnsafeRootError as trouble:  # the directory's content can't be trusted
        warnings.warn(f"compiled programs are kept in memory only: {trouble}", ProgCacheWarning, stacklevel=2)
        return InMemoryProgramCache(max_size_bytes=cap)
    except OSError as trouble:
        return KeptInMemory.instead_of(path or "", trouble, shared=False, max_size_bytes=cap)


@pytest.fixture(scope="session")
def compile_service(program_cache: ProgramCacheResource) -> CompileService:
    """Return a compile service that uses :func:`program_cache` and the bundled kernel library."""
    from cuda_progcache.service.compile_service import CompileService

    return CompileService(program_cache)


@pytest.fixture(scope="session")
def kernel(compile_service: CompileService, pytestconfig: pytest.Config) -> Callable[..., Any]:
    """Return a function that compiles a kernel of the library, or gets it from the cache.

    It takes the arguments of ``CompileService.kernel``: ``kernel("softmax", dtype="float16")``. ``arch`` defaults to
    ``--progcache-arch``, or to the device's architecture.
    """

    def compiled(
        name: str, *, arch: str | list[str] | tuple[str, ...] | None = None, target_type: str = "cubin", **params: Any
    ) -> CompiledProgram | dict[str, CompiledProgram]:
        chosen = arch or pytestconfig.option.progcache_arch or _device_arch()
        return compile_service.kernel(name, arch=chosen, target_type=target_type, **params)

    return compiled


def _device_arch() -> str:
    """Return the current device's architecture, or one that every NVRTC supports if there is no device."""
    from cuda_progcache.compile.arch import with_arch
    from cuda_progcache.errors import ArchError
    from cuda_progcache.keys.options import ProgramOptions

    try:
        return str(with_arch(ProgramOptions()).arch)
    except ArchError:
        return _ARCH

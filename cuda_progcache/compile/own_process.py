# SPDX-License-Identifier: Apache-2.0
"""Compilers in separate processes, so that nothing in the caller's process can affect their output.

Some options of NVRTC and nvJitLink affect later compiles in the same process (:mod:`cuda_progcache.keys.lasting`), and
the caller's process may have loaded another NVRTC, or used it for other compiles. So no compile runs in the caller's
process. A compiler process loads exactly the library that is in the key, gets no variables except those in the key and
:data:`NEEDED`, and only serves jobs with the same lasting options. It starts faster (20 ms for Python, 30 ms for NVRTC)
than ``cuda.bindings`` can be imported by the caller (160 ms). A compiler crash costs one job, front ends that would
wait for each other within a process run in parallel, and a fork of the caller never happens during a compile.

There are at most as many processes as CPUs. Each ends with the caller, or after being idle for a while.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable

from cuda_progcache._util import forks
from cuda_progcache._util.children import interpreters
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.compile.compiler_process import GREETING, receive, send
from cuda_progcache.errors import ToolchainError
from cuda_progcache.keys import toolchain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Seconds without a job after which a compiler process ends.
PATIENCE = 60.0
_SERVE = (
    "import sys; sys.path.append(sys.argv[1]); "
    "from cuda_progcache.compile.compiler_process import main; main(float(sys.argv[2]))"
)
#: Variables that the loader, the C library and temporary files need. The compilers get these and those in the key, and
#: no others, so that an unknown variable can't affect an output.
NEEDED = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "LD_LIBRARY_PATH", "PATH", "TEMP", "TMP", "TMPDIR")


def environment(variables: Iterable[str] | None = None) -> dict[str, str]:
    """Return the environment for a compiler process.

    Parameters
    ----------
    variables : iterable of str, optional
        ``NAME=value`` of the variables that affect outputs; None: those of the current environment.
    """
    found = {name: os.environ[name] for name in NEEDED if name in os.environ}
    for variable in toolchain.environment() if variables is None else variables:
        name, _, found[name] = variable.partition("=")
    return found


class NoProcessError(Exception):
    """No compiler process can be started on this machine; the message says why."""


class Kind(NamedTuple):
    """The lasting options, variables and user of a compiler process; a job of another kind needs another process."""

    lasting: frozenset[str]
    variables: tuple[str, ...]
    user: tuple[int, int]

    @classmethod
    def of(cls, lasting: frozenset[str]) -> Kind:
        """Return the kind of a job with these lasting options, in the current environment."""
        return cls(lasting, toolchain.environment(), (os.geteuid(), os.getegid()))


class _Process:
    """A compiler process, on its caller's side."""

    def __init__(self, executable: str, kind: Kind) -> None:
        self.kind = kind
        #: Path of each library that the process has loaded, and the build of its files at that time.
        self.builds: dict[str, str] = {}
        self._greeted = False
        self._popen = subprocess.Popen(
            # -I -S: no modules from variables, site-packages or the working directory.
            [executable, "-I", "-S", "-c", _SERVE, _root(), str(PATIENCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # unbuffered, so that a forked child can close it safely
            env=environment(kind.variables),
            cwd=os.sep,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def greet(self) -> None:
        """Read the greeting; raises EOFError or OSError if the process didn't start or is another program."""
        if not self._greeted:
            if self._receive(1 << 10) != GREETING:
                raise EOFError("it isn't a compiler process of this Python")
            self._greeted = True

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Send a job and return the answer; raises EOFError or OSError if the process is gone."""
        self.greet()
        assert self._popen.stdin is not None  # noqa: S101 - for mypy
        send(self._popen.stdin.fileno(), job)
        answer: dict[str, Any] = self._receive()
        return answer

    def _receive(self, limit: int = 1 << 62) -> Any:
        assert self._popen.stdout is not None  # noqa: S101 - for mypy
        try:
            return receive(self._popen.stdout.fileno(), limit)
        except (ValueError, TypeError, OverflowError, MemoryError) as error:
            raise EOFError(f"its answer can't be read: {error}") from error

    def end(self) -> str:
        """Kill the process, if it still runs; return how it ended."""
        status = self._popen.poll()
        self._popen.kill()
        self._close()
        self._popen.wait()
        if status is None:
            status = self._popen.returncode
        return f"signal {-status}" if status < 0 else f"status {status}"

    def died(self) -> str:
        """Wait for a process that has closed its pipe; return how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # if it still runs with a closed pipe, it is killed now
            self._popen.wait(10)
        return self.end()

    def forget(self) -> None:
        """Forget the process in a forked child, since it belongs to the parent."""
        self._popen.returncode = 0
        self._close()

    def _close(self) -> None:
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None:
                stream.close()


class _Seat:
    """A slot of the pool: a running process, or the right to start one."""

    def __init__(self) -> None:
        self.process: _Process | None = None


class _Pool:
    """The pool of this process's compiler processes."""

    def __init__(self) -> None:
        self.taken: set[_Seat] = set()
        self.idle: list[_Process] = []
        self.reset()
        forks.in_child(self.reset)

    def reset(self) -> None:
        """Start with an empty pool in a forked child: the processes belong to the parent."""
        for process in [*self.idle, *(seat.process for seat in list(self.taken))]:
            if process is not None:
                process.forget()
        self.changed = threading.Condition(threading.Lock())
        self.taken = set()
        self.idle = []
        self.limit = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def sit(self, seat: _Seat, kind: Kind, path: str, build: str, *, fresh: bool) -> None:
        """Wait for a slot, and take an idle process that fits, unless a ``fresh`` one is wanted."""
        with self.changed:
            while True:
                fitting = [p for p in self.idle if p.kind == kind and p.builds.get(path, build) == build]
                if fitting and not fresh:
                    self.taken.add(seat)
                    seat.process = fitting[-1]  # the latest, so that the others can end
                    self.idle.remove(seat.process)
                    return
                while self.idle and len(self.taken) + len(self.idle) >= self.limit:
                    self.idle.pop(0).end()
                if len(self.taken) < self.limit:
                    self.taken.add(seat)
                    return
                self.changed.wait()

    def stand_up(self, seat: _Seat, *, keep: bool) -> None:
        """Release a slot; keep its process for later, or end it."""
        with self.changed:
            self.taken.discard(seat)
            if keep and seat.process is not None:
                self.idle.append(seat.process)
                seat.process = None
            self.changed.notify_all()
        if seat.process is not None:
            seat.process.end()

    def end_all(self) -> None:
        """End all idle processes."""
        with self.changed:
            processes, self.idle = self.idle, []
        for process in processes:
            process.end()


_pool = _Pool()
atexit.register(_pool.end_all)


def ask(
    job: dict[str, Any], *, kind: Kind, build: str, about: str, holds: Callable[[], bool], alone: bool = False
) -> dict[str, Any]:
    """Run a job in a compiler process.

    Parameters
    ----------
    job : dict
        The argument of :func:`cuda_progcache.compile.compiler_process.perform`.
    kind : Kind
        The kind of process that the job needs.
    build : str
        The build of the job's library, from :func:`cuda_progcache.keys.toolchain.build`.
    about : str
        What is compiled, for messages.
    holds : callable
        Returns whether the library's files are unchanged.
    alone : bool
        Whether to use a process for this job only.

    Returns
    -------
    dict
        The answer.

    Raises
    ------
    NoProcessError
        If no process can be started on this machine.
    ToolchainError
        If the process died, and a second one as well.
    """
    path = job["library"]
    job = job | {"cwd": _cwd(), "pwd": os.environ.get("PWD")}
    for last in (False, True):  # an idle process may have died in the meantime, and a crash may not repeat
        seat, keep = _Seat(), False
        try:
            _pool.sit(seat, kind, path, build, fresh=alone or last)
            if seat.process is None:
                seat.process = _start(kind)
            answer = seat.process.ask(job)
            seat.process.builds[path] = build
            keep = not alone and holds()  # otherwise it isn't known which files it has loaded
            return answer
        except (EOFError, OSError) as error:
            cause = seat.process.died() if seat.process is not None else str(error)
            if last:
                raise ToolchainError(
                    f"the process that compiled {about} died ({cause}), and so did a second one: the compiler crashed, "
                    f"or memory ran out"
                ) from error
        finally:  # also after an interrupt: this job's answer would be taken for the next job's
            _pool.stand_up(seat, keep=keep)
    raise AssertionError


_interpreter: list[str] = []
"""The first Python executable that worked; empty before."""


def _start(kind: Kind) -> _Process:
    why = "there is no Python to start: sys.executable is " + (sys.executable or "not set")
    for executable in _interpreter or interpreters():
        process = None
        try:
            process = _Process(executable, kind)
            if not _interpreter:
                process.greet()
                _interpreter.append(executable)
            return process
        except (OSError, EOFError) as error:
            why = f"{executable}: {str(error) or 'it ended at once'}"
            if process is not None:
                process.end()
        except BaseException:
            if process is not None:
                process.end()
            raise
    raise NoProcessError(why)


def _root() -> str:
    return os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError:
        return os.sep  # the directory is gone: paths relative to it can't be found anyway

# SPDX-License-Identifier: Apache-2.0
"""Compilers in processes of their own: what else happens in the caller's process can't reach what they make.

NVRTC and nvJitLink don't forget some of the options that they are given (:mod:`cuda_progcache.keys.lasting`), and a
process may have another NVRTC mapped, or have had one compile who knows what for somebody else. So no compile runs in
the caller's process. A compiler process loads exactly the library that is in the key, is given no variable that isn't,
and serves jobs with the same lasting options alone. It takes less time to start (20 ms for Python, 30 ms for NVRTC)
than importing ``cuda.bindings`` into the caller's (160 ms); a compiler that crashes costs one job; front ends that
would wait for each other within a process run side by side; and a fork of the caller never meets a compile.

There are at most as many as CPUs. Each ends with the caller, and when it has had nothing to do for a while.
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
#: Variables that the loader, the C library and temporary files need. The compilers get these, those that are in the
#: key, and no others: what isn't known to reach an output can't.
NEEDED = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LC_MESSAGES", "LD_LIBRARY_PATH", "PATH", "TEMP", "TMP", "TMPDIR")


def environment(variables: Iterable[str] | None = None) -> dict[str, str]:
    """The environment of a compiler process.

    Parameters
    ----------
    variables : iterable of str, optional
        ``NAME=value`` of those that reach what compilers make; None: as they are set now.
    """
    found = {name: os.environ[name] for name in NEEDED if name in os.environ}
    for variable in toolchain.environment() if variables is None else variables:
        name, _, found[name] = variable.partition("=")
    return found


class NoProcessError(Exception):
    """No compiler process can be started here; the message says why."""


class Kind(NamedTuple):
    """What a compiler process was given before: a job of another kind could tell."""

    lasting: frozenset[str]
    variables: tuple[str, ...]
    user: tuple[int, int]

    @classmethod
    def of(cls, lasting: frozenset[str]) -> Kind:
        """Of a job with these lasting options, now."""
        return cls(lasting, toolchain.environment(), (os.geteuid(), os.getegid()))


class _Process:
    """A compiler process, as its caller has it."""

    def __init__(self, executable: str, kind: Kind) -> None:
        self.kind = kind
        #: Path of each library that it has loaded, and what was in its files then.
        self.builds: dict[str, str] = {}
        self._greeted = False
        self._popen = subprocess.Popen(
            # -I -S: neither variables nor site-packages, nor a json.py in the working directory, bring it modules.
            [executable, "-I", "-S", "-c", _SERVE, _root(), str(PATIENCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # a forked child may close what nothing is buffered for
            env=environment(kind.variables),
            cwd=os.sep,
        )

    @property
    def pid(self) -> int:
        return self._popen.pid

    def greet(self) -> None:
        """Hear that it is there; raises EOFError or OSError where it isn't, or is something else."""
        if not self._greeted:
            if self._receive(1 << 10) != GREETING:
                raise EOFError("it is another Python, or none")
            self._greeted = True

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """Have it do a job; raises EOFError or OSError where it is gone."""
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
            raise EOFError(f"it gives no answer of ours: {error}") from error

    def end(self) -> str:
        """End it at once; says how it ended, if it had before."""
        status = self._popen.poll()
        self._popen.kill()
        self._close()
        self._popen.wait()
        if status is None:
            status = self._popen.returncode
        return f"signal {-status}" if status < 0 else f"status {status}"

    def died(self) -> str:
        """Wait for one whose pipe is closed; says how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):  # else it closed its pipe, and lives: it ends now
            self._popen.wait(10)
        return self.end()

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        self._popen.returncode = 0
        self._close()

    def _close(self) -> None:
        for stream in (self._popen.stdin, self._popen.stdout):
            if stream is not None:
                stream.close()


class _Seat:
    """One of the places of the pool: a process that works, or the right to start one."""

    def __init__(self) -> None:
        self.process: _Process | None = None


class _Pool:
    """The compiler processes of this process."""

    def __init__(self) -> None:
        self.taken: set[_Seat] = set()
        self.idle: list[_Process] = []
        self.reset()
        forks.in_child(self.reset)

    def reset(self) -> None:
        """Start anew, in a forked child: those processes answer the parent."""
        for process in [*self.idle, *(seat.process for seat in list(self.taken))]:
            if process is not None:
                process.forget()
        self.changed = threading.Condition(threading.Lock())
        self.taken = set()
        self.idle = []
        self.limit = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def sit(self, seat: _Seat, kind: Kind, path: str, build: str, *, fresh: bool) -> None:
        """Wait for a seat, with an idle process that fits unless a ``fresh`` one is wanted."""
        with self.changed:
            while True:
                fitting = [p for p in self.idle if p.kind == kind and p.builds.get(path, build) == build]
                if fitting and not fresh:
                    self.taken.add(seat)
                    seat.process = fitting[-1]  # the latest: the others may come to their end
                    self.idle.remove(seat.process)
                    return
                while self.idle and len(self.taken) + len(self.idle) >= self.limit:
                    self.idle.pop(0).end()
                if len(self.taken) < self.limit:
                    self.taken.add(seat)
                    return
                self.changed.wait()

    def stand_up(self, seat: _Seat, *, keep: bool) -> None:
        """Give a seat back; its process is kept for later, or ends."""
        with self.changed:
            self.taken.discard(seat)
            if keep and seat.process is not None:
                self.idle.append(seat.process)
                seat.process = None
            self.changed.notify_all()
        if seat.process is not None:
            seat.process.end()

    def end_all(self) -> None:
        """End all that are idle."""
        with self.changed:
            processes, self.idle = self.idle, []
        for process in processes:
            process.end()


_pool = _Pool()
atexit.register(_pool.end_all)


def ask(
    job: dict[str, Any], *, kind: Kind, build: str, about: str, holds: Callable[[], bool], alone: bool = False
) -> dict[str, Any]:
    """Have a compiler process do a job.

    Parameters
    ----------
    job : dict
        As :func:`cuda_progcache.compile.compiler_process.perform` takes it.
    kind : Kind
        Which processes may do it.
    build : str
        What is in the files of the job's library, by :func:`cuda_progcache.keys.toolchain.build`.
    about : str
        What is compiled, for messages.
    holds : callable
        Whether the library's files are still those.
    alone : bool
        The process does this job only.

    Returns
    -------
    dict
        The answer.

    Raises
    ------
    NoProcessError
        If no process can be started here.
    ToolchainError
        If the process died, and a new one too.
    """
    path = job["library"]
    job = job | {"cwd": _cwd(), "pwd": os.environ.get("PWD")}
    for last in (False, True):  # one that was idle may have died since, and a crash may have been chance
        seat, keep = _Seat(), False
        try:
            _pool.sit(seat, kind, path, build, fresh=alone or last)
            if seat.process is None:
                seat.process = _start(kind)
            answer = seat.process.ask(job)
            seat.process.builds[path] = build
            keep = not alone and holds()  # else which files it has loaded isn't known
            return answer
        except (EOFError, OSError) as error:
            cause = seat.process.died() if seat.process is not None else str(error)
            if last:
                raise ToolchainError(
                    f"the process that compiled {about} died ({cause}), and so did a second one: the compiler crashed, "
                    f"or memory ran out"
                ) from error
        finally:  # at an interrupt, too: its answer would be taken for the next one's
            _pool.stand_up(seat, keep=keep)
    raise AssertionError


_interpreter: list[str] = []
"""The Python that has served, once one has."""


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
        return os.sep  # it is gone, and nothing that is given relative to it can be found

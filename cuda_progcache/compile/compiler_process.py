# SPDX-License-Identifier: Apache-2.0
"""The main loop of a compiler process: it reads a job, calls the compiler that the job names, and answers.

A job and its answer are marshalled dictionaries, each preceded by its length in 8 bytes. Jobs are read from stdin,
answers are written to stdout. The process ends as soon as stdin is closed, even in the middle of a compile, so it never
outlives the process that started it. It also ends if no job has come for a while.

Few modules are imported here: the interpreter is started without ``site``, and loads a compiler after 20 ms.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal imports enum, which takes as long as the rest
import _thread
import marshal
import os
import select
import sys

from cuda_progcache.compile.library import Library, RefusedError, UnusableError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

#: The first message of a compiler process, which identifies it.
GREETING = f"cuda_progcache {sys.version}"

_libraries: dict[str, Any] = {}


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Call a compiler, in this process.

    Parameters
    ----------
    job : dict
        ``library``, the path of the compiler's library; ``beside``, the paths of libraries that it loads by name;
        ``call``, one of :data:`_CALLS`; ``given``, its arguments.

    Returns
    -------
    dict
        ``made``, the result of the call; or ``refused``, the compiler's status, log and header trace; or ``trouble``, a
        message that says why the compiler can't be called.
    """
    try:
        kind, method = _CALLS[job["call"]]
        path = job["library"]
        library = _libraries.get(path)
        if library is None:
            library = _libraries[path] = kind()(path, job["beside"])
        return {"made": getattr(library, method)(**job["given"])}
    except RefusedError as refusal:
        return {"refused": (refusal.status, refusal.log, refusal.told)}
    except (UnusableError, OSError, MemoryError) as error:
        return {"trouble": str(error) or type(error).__name__}


def _nvrtc() -> type[Library]:
    from cuda_progcache.compile.nvrtc import Nvrtc

    return Nvrtc


def _nvjitlink() -> type[Library]:
    from cuda_progcache.compile.nvjitlink import NvJitLink

    return NvJitLink


def _nvvm() -> type[Library]:
    from cuda_progcache.compile.nvvm import Nvvm

    return Nvvm


_CALLS: dict[str, tuple[Callable[[], type[Library]], str]] = {
    "nvrtc": (_nvrtc, "compile"),
    "archs": (_nvrtc, "archs"),
    "reserve": (_nvrtc, "reserve_pch_heap"),
    "nvJitLink": (_nvjitlink, "link"),
    "nvvm": (_nvvm, "compile"),
}


def send(descriptor: int, message: Any) -> None:
    """Write a message to a pipe; raises OSError if nobody reads it."""
    content = marshal.dumps(message)
    rest = memoryview(len(content).to_bytes(8, "big") + content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive(descriptor: int, limit: int = 1 << 62) -> Any:
    """Read a message of at most ``limit`` bytes from a pipe; raises EOFError if it is closed or has another content."""
    size = int.from_bytes(_read(descriptor, 8), "big")
    if size > limit:
        raise EOFError("it sent something other than a message")
    return marshal.loads(_read(descriptor, size))  # noqa: S302 - from our own process


def _read(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def main(patience: float) -> None:
    """Serve jobs from stdin until it is closed, or until none has come for ``patience`` seconds."""
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # the caller decides about interrupts
    answers = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not be mixed with the answers
    send(answers, GREETING)
    _thread.start_new_thread(_end_with_caller, ())
    jobs = select.poll()
    jobs.register(0, select.POLLIN)
    while jobs.poll(patience * 1000):
        try:
            job = receive(0)
            _move(job["cwd"], job["pwd"])
            send(answers, perform(job))
        except (EOFError, OSError):
            break  # no more jobs
    os._exit(0)  # without the libraries' exit handlers, which have nothing to save


def _move(cwd: str, pwd: str | None) -> None:
    """Change to the caller's working directory, under the caller's name for it."""
    try:
        os.chdir(cwd)
    except OSError:
        os.chdir("/")  # the directory is gone: paths relative to it can't be found anyway
    if pwd is not None:
        os.environ["PWD"] = pwd
    else:
        os.environ.pop("PWD", None)


def _end_with_caller() -> None:
    """Wait until the caller closes stdin or dies."""
    end = select.poll()
    end.register(0, 0)
    end.poll()
    os._exit(0)

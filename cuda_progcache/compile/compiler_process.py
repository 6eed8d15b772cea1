# SPDX-License-Identifier: Apache-2.0
"""What a compiler process does: take a job, call the compiler that it names, answer.

A job and its answer are dictionaries, marshalled, each behind its length in 8 bytes. Jobs come on stdin, answers go
out on stdout. The process ends as soon as stdin is closed, in the middle of a compile too, so it never outlives the
one that started it; and when no job has come for a while.

Little is imported here: the interpreter is started without ``site`` and loads a compiler 20 ms later.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal would import enum, which takes as long as all else here
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

#: What a compiler process says first, so that nothing else is taken for one.
GREETING = f"cuda_progcache {sys.version}"

_libraries: dict[str, Any] = {}


def perform(job: dict[str, Any]) -> dict[str, Any]:
    """Call a compiler, in this process.

    Parameters
    ----------
    job : dict
        ``library``, the path of its file; ``beside``, those of files that it will look for by name; ``call``, one of
        :data:`_CALLS`; ``given``, its arguments.

    Returns
    -------
    dict
        ``made``, what the call returned; or ``refused``, the compiler's status, log and what it told of headers; or
        ``trouble``, a message: there is no compiler here that could be asked.
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
    """Write a message to a pipe; raises OSError where nobody reads it."""
    content = marshal.dumps(message)
    rest = memoryview(len(content).to_bytes(8, "big") + content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def receive(descriptor: int, limit: int = 1 << 62) -> Any:
    """Read a message of ``limit`` bytes at most from a pipe; raises EOFError where it was closed, or has none."""
    size = int.from_bytes(_read(descriptor, 8), "big")
    if size > limit:
        raise EOFError("what it sends is no message")
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
    """Do what stdin asks for until it is closed, or silent for so many seconds."""
    _signal.signal(_signal.SIGINT, _signal.SIG_IGN)  # the one who asked decides
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
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
            break  # nobody asks any more
    os._exit(0)  # not through the libraries' own ends: there is nothing that they would have to save


def _move(cwd: str, pwd: str | None) -> None:
    """Work where the caller does, under the name that it has for that place."""
    try:
        os.chdir(cwd)
    except OSError:
        os.chdir("/")  # it is gone: nothing that is given relative to it can be found
    if pwd is not None:
        os.environ["PWD"] = pwd
    else:
        os.environ.pop("PWD", None)


def _end_with_caller() -> None:
    """Wait until the other end of stdin is closed, by the caller or by its death."""
    end = select.poll()
    end.register(0, 0)
    end.poll()
    os._exit(0)

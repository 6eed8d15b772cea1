# SPDX-License-Identifier: Apache-2.0
"""Compiles in a process of their own, for options that NVRTC never forgets.

``--restrict`` and ``--optimization-info`` set something in NVRTC's optimizer that stays: after one compile with
``--restrict`` the pointers of every later kernel of the process are taken as restrict, too, and come out as other
code; after one with ``--optimization-info`` every later log has remarks (NVRTC 13.5.37). So a process that compiles
anything else is never given them. ``python -m cuda_progcache.compile.apart`` reads compiles from stdin and answers on
stdout. It is kept for later ones with the same options, and ends with the process that started it.
"""

from __future__ import annotations

import atexit
import ctypes
import marshal
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from cuda_progcache._util.children import end, start_module
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.compile.nvrtc import build, compile_here
from cuda_progcache.compile.output import CompilerRefusal, Output
from cuda_progcache.errors import ToolchainError
from cuda_progcache.keys import toolchain

_Kind = tuple[frozenset[str], str, tuple[str, ...]]
"""What a process was given before: the lasting options; and the NVRTC, and the variables, that it started with."""

_idle: dict[_Kind, list[subprocess.Popen[bytes]]] = {}
_lock = ForkSafeLock()
_parents: list[object] = []


def compile_apart(lasting: Iterable[str], given: Mapping[str, Any]) -> Output:
    """Compile in a process that has been given these lasting options before, and no others.

    Parameters
    ----------
    lasting : iterable of str
        Those of the options that NVRTC doesn't forget.
    given : mapping
        Arguments of :func:`cuda_progcache.compile.nvrtc.compile_here`.

    Returns
    -------
    Output

    Raises
    ------
    CompilerRefusal
        With NVRTC's status and log.
    ToolchainError
        If NVRTC isn't there, or that process died.
    """
    kind = (frozenset(lasting), build(), toolchain.environment())
    with _lock:
        kept = _idle.get(kind)
        process = kept.pop() if kept else None
    if process is None:
        process = start_module("cuda_progcache.compile.apart")
    try:
        where = {"cwd": _cwd(), "pwd": os.environ.get("PWD")}
        answer = _ask(process, {"library": toolchain.locate("nvrtc"), **where, "given": dict(given)})
    except BaseException:  # an interrupt, too: its answer would be taken for the next one's
        end(process)
        raise
    with _lock:
        _idle.setdefault(kind, []).append(process)
    if "refusal" in answer:
        raise CompilerRefusal(*answer["refusal"])
    if "trouble" in answer:
        raise ToolchainError(answer["trouble"])
    return Output(*answer["output"])


def _cwd() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return os.sep  # it is gone, and nothing that is given relative to it can be found


def _ask(process: subprocess.Popen[bytes], job: dict[str, Any]) -> dict[str, Any]:
    assert process.stdin is not None  # noqa: S101 - for mypy
    assert process.stdout is not None  # noqa: S101
    try:
        marshal.dump(job, process.stdin)
        process.stdin.flush()
        answer: dict[str, Any] = marshal.load(process.stdout)  # noqa: S302 - from our own child
    except (OSError, EOFError) as error:
        status = process.wait()
        cause = f"signal {-status}" if status < 0 else f"status {status}"
        raise ToolchainError(
            f"the process that compiled {job['given']['name']} died ({cause}): NVRTC crashed, or memory ran out"
        ) from error
    return answer


def _end_all() -> None:
    with _lock:
        processes = [process for kept in _idle.values() for process in kept]
        _idle.clear()
    for process in processes:
        end(process)


def _start_anew() -> None:
    """In a forked child: those processes answer the parent."""
    _parents.append(dict(_idle))  # kept, or Popen would warn of processes that nobody waits for
    _idle.clear()


atexit.register(_end_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def main() -> None:
    """Compile what stdin asks for until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who asked decides
    jobs = sys.stdin.buffer
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # whatever a library prints must not end up among the answers
        while True:
            try:
                job = marshal.load(jobs)  # noqa: S302 - from the process that started this one
            except EOFError:
                return
            marshal.dump(_answer(job), answers)
            answers.flush()


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    try:
        os.chdir(job["cwd"])
        if job["pwd"] is not None:
            os.environ["PWD"] = job["pwd"]  # by which NVRTC calls the working directory, if it leads there
        ctypes.CDLL(job["library"])  # before any search for one: the very NVRTC that is in the key
        output = compile_here(**job["given"])
    except CompilerRefusal as refusal:
        return {"refusal": (refusal.status, refusal.log, refusal.trace)}
    except (ToolchainError, OSError) as error:
        return {"trouble": str(error)}
    return {"output": tuple(output._replace(symbols=dict(output.symbols)))}


if __name__ == "__main__":
    main()

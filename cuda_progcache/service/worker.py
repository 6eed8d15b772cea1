# SPDX-License-Identifier: Apache-2.0
"""A compile worker: ``python -m cuda_progcache.service.worker`` reads jobs from stdin and writes answers to stdout.

Jobs and answers are JSON objects, one per line. The process isn't forked or spawned by :mod:`multiprocessing`: a fork
during a compile hangs, a spawned process runs the caller's main module again, and a compiler crash would break the
whole pool instead of failing one job.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cuda_progcache._util.children import end, start_module
from cuda_progcache.errors import ProgCacheError, WorkerDiedError

if TYPE_CHECKING:
    from cuda_progcache.compile.compiled import CompiledProgram


class Worker:
    """A worker process, as the caller sees it; it does one job at a time.

    Parameters
    ----------
    setup : dict
        ``{"compiler": settings of a CachedCompiler, "library": settings of a KernelLibrary}``, and optionally
        ``"scratch"`` (a folder for temporary files), ``"asked_by"`` (the current call, as
        :func:`~cuda_progcache._util.running.asked_by` returns it), ``"who"`` (the calling process, as
        :func:`~cuda_progcache._util.who.who` returns it), ``"events"`` (whether to return events) and ``"publishes"``
        (whether a program counts as stored only if a tier took it).
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        with _no_interrupts():
            self._process = start_module(
                "cuda_progcache.service.worker", env=_environment(), text=True, encoding="utf-8"
            )
        self._setup = setup
        self._send(setup)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run a job and return its answer.

        Parameters
        ----------
        job : dict
            The result of :meth:`~cuda_progcache.service.wanted.Wanted.message`; and ``"precompile": True`` if more jobs
            with the same includes follow.

        Returns
        -------
        dict
            ``{"hit", "size", "digest", "reason", "duration", "precompiled"}``, or ``{"error": message}``; and
            ``"events"`` and ``"seconds"``.

        Raises
        ------
        WorkerDiedError
            If the process died (a compiler crash, the out-of-memory killer).
        """
        try:
            self._send(job)
            line = self._process.stdout.readline() if self._process.stdout else ""
        except (OSError, ValueError):  # the pipe is broken or closed
            line = ""
        if not line:
            status = self._process.wait()
            cause = f"signal {-status}" if status < 0 else f"status {status}"
            raise WorkerDiedError(
                f"the worker process compiling {job['kernel']} for {job['arch']} died ({cause}); "
                f"compile it alone to see why: {self._alone(job)}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _alone(self, job: Mapping[str, Any]) -> str:
        """Return the shell command that compiles one job's program."""
        if "source" in job:
            return "cuda-progcache prewarm --lock LOCKFILE --jobs 1"
        command = ["cuda-progcache", "compile", "--kernel", job["kernel"], "--arch", job["arch"]]
        for name, value in job["variant"].items():
            command += ["-p", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
        command += ["--manifest", self._setup["library"]["path"]]
        for folder in self._setup["compiler"].get("include_path") or ():
            command += ["-I", folder]
        command += ["--cache-dir", self._setup["compiler"]["cache"]["path"]]
        return shlex.join(command)

    def _send(self, message: dict[str, Any]) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End the process at once; a compile in progress is lost."""
        end(self._process)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Block SIGINT in processes started in the block: Ctrl-C reaches them, too, and the caller ends its workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


#: The prefixes of the environment variables that this package, Python, and the search for compilers and headers read.
_ITS_OWN = ("CUDA_PROGCACHE_", "PYTHON", "XDG_", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH")


def _environment() -> dict[str, str]:
    """Return a worker's environment: that of a compiler process, since it compiles itself, and the variables above."""
    from cuda_progcache.compile.own_process import environment

    return environment() | {name: value for name, value in os.environ.items() if name.startswith(_ITS_OWN)}


def trouble(error: Exception) -> str:
    """Return an error's message; for an error of another package also its type, which the message may not show."""
    return str(error) if isinstance(error, ProgCacheError) else f"{type(error).__name__}: {error}"


def told_of(done: CompiledProgram) -> dict[str, Any]:
    """Return the answer about a job's program."""
    return {
        "hit": done.hit, "size": len(done.data), "digest": done.digest, "reason": done.reason,
        "duration": done.about.duration,
    }  # fmt: skip


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library's output must not end up among the answers
    setup = json.loads(sys.stdin.readline())

    import time

    from cuda_progcache import events
    from cuda_progcache._util import who
    from cuda_progcache._util.running import Running, running
    from cuda_progcache.compile import compilers
    from cuda_progcache.compile.precompiled import PrecompiledHeaders
    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.service.wanted import Units, Wanted

    compilers.compiles_itself = True
    compiler = CachedCompiler.from_settings(setup["compiler"])
    units = Units(compiler, KernelLibrary(**setup["library"]))
    precompiled = PrecompiledHeaders(setup.get("scratch"))  # freed when the batch ends this process
    if setup.get("who"):
        who.act_for(*setup["who"])
    for caller in setup.get("asked_by") or ():
        running.set(Running(caller["key"], caller["name"], None))
    happened: list[events.Event] = []
    if setup.get("events"):
        events.subscribe(happened.append)
    for line in sys.stdin:
        job = json.loads(line)
        started = time.perf_counter()
        used = precompiled.used
        try:
            unit = units.unit(Wanted.of_message(job))
            done = compiler.compile_kernel(unit, precompiled if job.get("precompile") else None)
            answer: dict[str, Any] = {**told_of(done), "precompiled": precompiled.used > used}
        except Exception as error:  # noqa: BLE001 - it fails this job only; the next one is waiting
            answer = {"error": trouble(error)}
        if setup.get("publishes") and answer.get("digest") and not compiler.cache.has_published():
            answer |= {"digest": None, "reason": "no writable tier stored it (see the tier's warning)"}
        compiler.cache.close()  # writes the counters: the end of the batch kills this process
        answer["events"] = happened
        answer["seconds"] = time.perf_counter() - started
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:
            break
        happened.clear()
    # Reached only if the caller is gone: otherwise it kills this process and removes the folder itself.
    if setup.get("scratch"):
        shutil.rmtree(setup["scratch"], ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A compile worker: ``python -m cuda_progcache.service.worker`` reads jobs from stdin, answers on stdout.

One JSON object a line each way. A process of its own rather than one forked or
spawned by :mod:`multiprocessing`: forking beside a running compile hangs,
spawning runs the caller's main module again, and a compiler that crashes takes
one job with it, not the pool.
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
    """The caller's side: one worker process, one job at a time.

    Parameters
    ----------
    setup : dict
        ``{"compiler": settings of a CachedCompiler, "library": settings of a KernelLibrary}``, and where wanted
        ``"scratch"`` (a folder for temporary files), ``"asked_by"`` (the call that asks, as
        :func:`~cuda_progcache._util.running.asked_by` gives it), ``"who"`` (the process that asks, as
        :func:`~cuda_progcache._util.who.who` gives it), ``"events"`` (whether to send them along) and ``"publishes"``
        (whether what no tier took counts as not stored).
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        with _no_interrupts():
            self._process = start_module(
                "cuda_progcache.service.worker", env=_environment(), text=True, encoding="utf-8"
            )
        self._setup = setup
        self._send(setup)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job.

        Parameters
        ----------
        job : dict
            What :meth:`~cuda_progcache.service.wanted.Wanted.message` gives; ``"precompile": True`` where more jobs
            with the same includes will come.

        Returns
        -------
        dict
            ``{"hit", "size", "digest", "seconds", "reason", "precompiled"}``, or ``{"error": message}``; and
            ``"events"``.

        Raises
        ------
        WorkerDiedError
            If the process went away (a compiler crash, the out-of-memory killer).
        """
        try:
            self._send(job)
            line = self._process.stdout.readline() if self._process.stdout else ""
        except (OSError, ValueError):  # a broken pipe, or one that was closed
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
        """The command that compiles one job's program, as it can be typed."""
        if "source" in job:
            return "cuda-progcache prewarm --lock F --jobs 1"
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
        """End the process (at once: what it was compiling is lost)."""
        end(self._process)


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """Block SIGINT in what is started: Ctrl-C reaches the whole group, and the one who asked ends its workers."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


#: How the variables are called that this package, Python, and the search for compilers and headers look at.
_ITS_OWN = ("CUDA_PROGCACHE_", "PYTHON", "XDG_", "CONDA_PREFIX", "CUDA_HOME", "CUDA_PATH")


def _environment() -> dict[str, str]:
    """A worker compiles in its own process, so it gets the variables that a compiler process gets, and these."""
    from cuda_progcache.compile.own_process import environment

    return environment() | {name: value for name, value in os.environ.items() if name.startswith(_ITS_OWN)}


def trouble(error: Exception) -> str:
    """What went wrong with a job; of an error that isn't ours also the kind, which its message may not tell."""
    return str(error) if isinstance(error, ProgCacheError) else f"{type(error).__name__}: {error}"


def told_of(done: CompiledProgram) -> dict[str, Any]:
    """What is told of a job's program."""
    return {
        "hit": done.hit, "size": len(done.data), "digest": done.digest, "reason": done.reason,
        "duration": done.about.duration,
    }  # fmt: skip


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
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
    precompiled = PrecompiledHeaders(setup.get("scratch"))  # goes with this process, and that with the batch
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
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's, and the next one is waiting
            answer = {"error": trouble(error)}
        if setup.get("publishes") and answer.get("digest") and not compiler.cache.has_published():
            answer |= {"digest": None, "reason": "no tier that takes writes took it (see its warning)"}
        compiler.cache.close()  # what was counted is written down: the end of the batch kills this process
        answer["events"] = happened
        answer["seconds"] = time.perf_counter() - started
        try:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()
        except BrokenPipeError:
            break
        happened.clear()
    # At the end of a batch this process is killed. Nobody is there any more to remove what it left.
    if setup.get("scratch"):
        shutil.rmtree(setup["scratch"], ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()

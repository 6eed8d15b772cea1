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
import sys
from typing import Any

from cuda_progcache._util.children import end, start_module
from cuda_progcache.errors import ProgCacheError


class Worker:
    """The caller's side: one worker process, one job at a time.

    Parameters
    ----------
    setup : dict
        ``{"cache": the store's settings, "library": the kernel library's}``, and where wanted ``"header_policy"`` (its
        fields), ``"keep_failures"`` (seconds), ``"scratch"`` (a folder for temporary files), ``"asked_by"`` (the call
        that asks, as :func:`~cuda_progcache._util.running.asked_by` gives it) and ``"events"`` (whether to send them
        along).
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        self._process = start_module("cuda_progcache.service.worker", text=True, encoding="utf-8")
        self._send(setup)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Do a job.

        Parameters
        ----------
        job : dict
            ``{"kernel": name, "variant": {...}, "arch": "sm_90"}``; ``"precompile": True`` where more jobs with the
            same includes will come.

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
                f"compile it alone to see why: cuda-progcache prewarm --jobs 1 --kernel {job['kernel']}"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _send(self, message: dict[str, Any]) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def close(self) -> None:
        """End the process (at once: what it was compiling is lost)."""
        end(self._process)


class WorkerDiedError(ProgCacheError, RuntimeError):
    """A worker process ended in the middle of a job."""


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers
    setup = json.loads(sys.stdin.readline())

    import time

    from cuda_progcache import events
    from cuda_progcache._util.running import Running, running
    from cuda_progcache.compile.precompiled import PrecompiledHeaders
    from cuda_progcache.keys.headers import HeaderPolicy
    from cuda_progcache.service.compile_service import CompileService, KernelUnit
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    cache = FileStreamProgramCache(**setup["cache"])
    headers = HeaderPolicy(**setup.get("header_policy", {}))
    given = {"header_policy": headers, "keep_failures": setup.get("keep_failures", 0.0)}
    service = CompileService(cache, library=KernelLibrary(**setup["library"]), **given)
    precompiled = PrecompiledHeaders(setup.get("scratch"))  # goes with this process, and that with the batch
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
            rendered = service.library.render(job["kernel"], **job["variant"])
            unit = KernelUnit(rendered, job["arch"], header_policy=headers)
            done = service._obtain(unit, precompiled if job.get("precompile") else None)
            answer: dict[str, Any] = {
                "hit": done.hit,
                "size": len(done.data),
                "digest": done.digest,
                "reason": done.reason,
                "duration": done.record.get("duration"),
                "precompiled": precompiled.used > used,
            }
        except ProgCacheError as error:
            answer = {"error": str(error)}
        answer["events"] = happened
        answer["seconds"] = time.perf_counter() - started
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        happened.clear()


if __name__ == "__main__":
    main()

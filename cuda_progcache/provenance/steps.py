# SPDX-License-Identifier: Apache-2.0
"""Calls around a compile that make no program: rendering its source, analysing its binary, prewarming a library.

They are recorded beside the programs, in the usual format of call records, when the work is actually done; a hit
records nothing. A call's parents are the calls that led to it; its children are the calls that it asked for:

============== ================================================= ======================== =========================
call           arguments                                         parents                  children
============== ================================================= ======================== =========================
render         template, module (of a part), parameters, files   the caller
(a compile)    see :mod:`~cuda_progcache.provenance.programs`  its rendering, the caller
(a link)       the same, and inputs                              its rendering, the caller the programs linked
resource_usage program                                           its compile, the caller
sass           program                                           its compile, the caller
prewarm        manifest, archs, kernels                          the caller               the programs asked for
============== ================================================= ======================== =========================

The record of a compile holds the arguments of its rendering, so the rendering's key can be computed from it
(:func:`render_key`), and the rendering is known even if its own record is gone. Prewarm runs of the same manifest,
kernels and architectures are the same call. A run that only finds the programs of the recorded run doesn't replace its
record.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache._util.running import asked_by, note_child, run
from cuda_progcache.memo.call import Call, DigestedCall
from cuda_progcache.memo.digest import Digest, Indigestible, digest
from cuda_progcache.memo.tagged_json import SaveError, encode_json

if TYPE_CHECKING:
    from cuda_progcache.provenance.step_records import Steps
    from cuda_progcache.store.compile_record import CompileRecord, Kernel

R = TypeVar("R")

_logger = logging.getLogger(__name__)

RENDER = ("render", "cuda_progcache.templates")
PREWARM = ("prewarm", "cuda_progcache.service")
RESOURCE_USAGE = ("resource_usage", "cuda_progcache.inspect")
SASS = ("sass", "cuda_progcache.inspect")
#: The kinds of call defined in this module, by name and module.
KINDS = frozenset({RENDER, PREWARM, RESOURCE_USAGE, SASS})


def kind_of(call: Any) -> str | None:
    """Return the kind of a call: ``"render"``, ``"prewarm"``, ``"resource_usage"`` or ``"sass"``; None if another."""
    return call.name if (call.name, call.module) in KINDS else None


def render_arguments(kernel: Kernel) -> dict[str, Any]:
    """Return the arguments of a rendering, from ``kernel`` or ``part_of`` in the record of its compile."""
    found = {"template": kernel.name, "parameters": dict(kernel.parameters), "files": dict(kernel.templates)}
    return found if kernel.module is None else {**found, "module": kernel.module}


def render_key(kernel: Kernel) -> Digest:
    """Return the key of a rendering, from ``kernel`` or ``part_of`` in the record of its compile."""
    return _key(RENDER, render_arguments(kernel))


def _key(kind: tuple[str, str], arguments: dict[str, Any]) -> Digest:
    return Call(kind[0], arguments, module=kind[1]).to_lookup_key()


def rendering_of(about: CompileRecord) -> Kernel | None:
    """Return what a compile's record says about the rendering of its source; None if not rendered, or for a link."""
    return None if about.code_type == "link" else about.rendered  # the parts of a link were rendered


def links_of(about: CompileRecord) -> dict[str, list[str]]:
    """Return the parents and children of the call that made a program, from its record; empty lists are left out."""
    rendering = rendering_of(about)
    parents = [] if rendering is None else [str(render_key(rendering))]
    parents += [caller.key for caller in about.parents]
    children = [part.digest for part in about.inputs if part.digest]
    return {name: keys for name, keys in (("parents", parents), ("children", children)) if keys}


def inlined(values: Mapping[str, Any]) -> tuple[dict[str, Digest], dict[Digest, bytes]]:
    """Return the digests of arguments by name, and the arguments in a record's encoding by digest."""
    digests = {name: digest(value) for name, value in values.items()}
    return digests, {digests[name]: encode_json(value) for name, value in values.items()}


def call_as_recorded(
    kind: tuple[str, str], arguments: Mapping[str, Any], result: Any, started: float, seconds: float, *,
    parents: Sequence[str] = (), children: Iterable[str] = (), about: Mapping[str, Any] | None = None,
) -> DigestedCall:  # fmt: skip
    """Return a call in the form in which it is recorded.

    ``arguments`` and ``result`` are JSON values, kept in the record; a result of None isn't kept, since it can be
    computed again. ``started`` is in seconds since the epoch. The call that is running is added to ``parents``.
    ``about`` is metadata, stored under the call's name.
    """
    digests, inline = inlined(arguments)
    results, kept = inlined({} if result is None else {"result": result})
    above = asked_by()
    around = {"parents": [*parents, *(part["key"] for part in above)], "children": list(children)}
    metadata: dict[str, dict[str, Any]] = {
        "runtime": {"status": "done", "timestart": started, "timestop": started + seconds, "duration": seconds},
        "environment": {"host": platform.node(), "python": platform.python_version()},
        "links": {name: keys for name, keys in around.items() if keys},
        "asked_by": {part["key"]: part["name"] for part in above},
        kind[0]: dict(about or {}),
    }
    metadata = {group: fields for group, fields in metadata.items() if fields}
    return DigestedCall(kind[0], digests, results.get("result"), metadata, kind[1], inline=inline | kept)


def _record(steps: Steps, *call: Any, **around: Any) -> None:
    """Save a :func:`call_as_recorded`; a call that can't be saved is counted and logged, not an error."""
    try:
        steps.save(call_as_recorded(*call, **around))
    except (SaveError, Indigestible) as error:
        steps.counters["dropped"] += 1
        _logger.info("a call that isn't a program's isn't recorded: %s", error)


def _text_facts(text: str) -> dict[str, Any]:
    content = text.encode("utf-8", "surrogateescape")
    return {"sha256": sha256(content, usedforsecurity=False).hexdigest(), "bytes": len(content)}


def record_rendering(steps: Steps, kernel: Kernel, template: str, source: str, started: float, seconds: float) -> None:
    """Record the rendering of a template, with the SHA-256 of the resulting source, unless it is already recorded.

    ``kernel`` is the description of the rendering in the record of the compile.
    """
    if not steps.contains(render_key(kernel)):
        about = {"template": template, "lines": source.count("\n"), **_text_facts(source)}
        _record(steps, RENDER, render_arguments(kernel), None, started, seconds, about=about)


def record_analysis(steps: Steps, kind: tuple[str, str], program: str, analyse: Callable[[], R]) -> R:
    """Analyse a program; record the analysis unless it is already recorded. Return its result.

    ``kind`` is :data:`RESOURCE_USAGE` or :data:`SASS`, ``program`` the digest of an entry. The result depends on the
    program alone.
    """
    started, clock = time.time(), time.perf_counter()
    result = analyse()
    seconds = time.perf_counter() - clock
    arguments = {"program": program}
    key = _key(kind, arguments)
    if not steps.contains(key):
        # A listing isn't kept: it is many times as large as its binary.
        kept, about = (None, _text_facts(result)) if isinstance(result, str) else (result, None)
        _record(steps, kind, arguments, kept, started, seconds, parents=[program], about=about)
    note_child(key)
    return result


class PrewarmRun:
    """A prewarm run. The programs it compiles name it as a parent; its own record, written at its end, names them.

    ``manifest`` is the SHA-256 (hex) of the library's manifest. Empty ``kernels`` means all kernels.
    """

    def __init__(self, manifest: str, archs: Sequence[str], kernels: Sequence[str]) -> None:
        self._arguments = {"manifest": manifest, "archs": tuple(archs), "kernels": tuple(kernels)}
        self.key = _key(PREWARM, self._arguments)

    def running(self) -> run:
        """Return a context manager; programs compiled in its block have this run as a parent."""
        return run(self.key, PREWARM[0])

    def record(self, steps: Steps, report: Mapping[str, Any], programs: Iterable[str], started: float) -> bool:
        """Record the run, unless it only found the programs that an equal run recorded; return whether it is recorded.

        ``report`` has the run's counts and sums, including ``seconds``; ``programs`` are the digests of the entries
        that the run found or compiled.
        """
        children = list(dict.fromkeys(programs))
        found_all = not report["compiled"] and not report["failed"]
        if not (found_all and children == self._recorded_children(steps)):
            _record(steps, PREWARM, self._arguments, dict(report), started, report["seconds"], children=children)
        return self._recorded_children(steps) is not None  # None if the record couldn't be saved

    def _recorded_children(self, steps: Steps) -> list[str] | None:
        try:
            return steps.load(self.key).links("children")
        except KeyError:
            return None

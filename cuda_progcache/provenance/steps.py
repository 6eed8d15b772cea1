# SPDX-License-Identifier: Apache-2.0
"""Calls around a compile that make no program: rendering its source, analysing its binary, prewarming a library.

They are recorded beside the programs, in the format of every call, when the work is really done; a hit writes none.
What led to a call is its parent, what a call asked for is its child:

============== ================================================= ======================== =========================
call           arguments                                         parents                  children
============== ================================================= ======================== =========================
render         template, module (of a part), parameters, files   who asked
(a compile)    see :mod:`~cuda_progcache.provenance.programs`  its rendering, who asked
(a link)       the same, and inputs                              its rendering, who asked the programs linked
resource_usage program                                           its compile, who asked
sass           program                                           its compile, who asked
prewarm        manifest, archs, kernels                          who asked                the programs asked for
============== ================================================= ======================== =========================

A compile's record holds what its rendering was given, so the key of the rendering follows from it (:func:`render_key`)
and the walk goes on where the rendering's own record is gone. A prewarm of the same manifest, kernels and architectures
is the same call: its record is that of the last run that did something.
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
#: What is recorded here, by name and module.
KINDS = frozenset({RENDER, PREWARM, RESOURCE_USAGE, SASS})


def kind_of(call: Any) -> str | None:
    """Which of these calls it is: ``"render"``, ``"prewarm"``, ``"resource_usage"``, ``"sass"``; None: another one."""
    return call.name if (call.name, call.module) in KINDS else None


def render_arguments(kernel: Kernel) -> dict[str, Any]:
    """Arguments of a rendering, from what the record of its compile has as ``kernel`` or ``part_of``."""
    found = {"template": kernel.name, "parameters": dict(kernel.parameters), "files": dict(kernel.templates)}
    return found if kernel.module is None else {**found, "module": kernel.module}


def render_key(kernel: Kernel) -> Digest:
    """The key of a rendering, from what the record of its compile has of it."""
    return _key(RENDER, render_arguments(kernel))


def _key(kind: tuple[str, str], arguments: dict[str, Any]) -> Digest:
    return Call(kind[0], arguments, module=kind[1]).to_lookup_key()


def rendering_of(about: CompileRecord) -> Kernel | None:
    """What the record of a compile has of the rendering of its source; None: it wasn't rendered, or is a link."""
    return None if about.code_type == "link" else about.rendered  # of a link, the parts were rendered


def links_of(about: CompileRecord) -> dict[str, list[str]]:
    """Parents and children of the call that made a program, from its record; without those there are none of."""
    rendering = rendering_of(about)
    parents = [] if rendering is None else [str(render_key(rendering))]
    parents += [caller.key for caller in about.parents]
    children = [part.digest for part in about.inputs if part.digest]
    return {name: keys for name, keys in (("parents", parents), ("children", children)) if keys}


def inlined(values: Mapping[str, Any]) -> tuple[dict[str, Digest], dict[Digest, bytes]]:
    """Digests of arguments by name, and the arguments as they lie in a record by digest."""
    digests = {name: digest(value) for name, value in values.items()}
    return digests, {digests[name]: encode_json(value) for name, value in values.items()}


def call_as_recorded(
    kind: tuple[str, str], arguments: Mapping[str, Any], result: Any, started: float, seconds: float, *,
    parents: Sequence[str] = (), children: Iterable[str] = (), about: Mapping[str, Any] | None = None,
) -> DigestedCall:  # fmt: skip
    """A call as it is recorded.

    ``arguments`` and ``result`` are JSON values and lie in the record; a result of None isn't kept, since it can be had
    again. ``started`` is in seconds since the epoch. Whoever runs here is a parent, too. ``about`` is metadata under
    the call's name.
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
    """Keep a :func:`call_as_recorded`; what can't be kept is counted, and costs nothing that has been made."""
    try:
        steps.save(call_as_recorded(*call, **around))
    except (SaveError, Indigestible) as error:
        steps.counters["dropped"] += 1
        _logger.info("a call that isn't a program's isn't recorded: %s", error)


def _text_facts(text: str) -> dict[str, Any]:
    content = text.encode("utf-8", "surrogateescape")
    return {"sha256": sha256(content, usedforsecurity=False).hexdigest(), "bytes": len(content)}


def record_rendering(steps: Steps, kernel: Kernel, template: str, source: str, started: float, seconds: float) -> None:
    """Record that a template file was rendered, unless it is there, with the SHA-256 of the source that it gave.

    ``kernel`` is what the record of the compile has of it.
    """
    if not steps.contains(render_key(kernel)):
        about = {"template": template, "lines": source.count("\n"), **_text_facts(source)}
        _record(steps, RENDER, render_arguments(kernel), None, started, seconds, about=about)


def record_analysis(steps: Steps, kind: tuple[str, str], program: str, analyse: Callable[[], R]) -> R:
    """Analyse a program and record that, unless it is recorded: what it gives follows from the program alone.

    ``kind`` is :data:`RESOURCE_USAGE` or :data:`SASS`, ``program`` the digest of an entry.
    """
    started, clock = time.time(), time.perf_counter()
    result = analyse()
    seconds = time.perf_counter() - clock
    arguments = {"program": program}
    key = _key(kind, arguments)
    if not steps.contains(key):
        # A listing is many times its binary.
        kept, about = (None, _text_facts(result)) if isinstance(result, str) else (result, None)
        _record(steps, kind, arguments, kept, started, seconds, parents=[program], about=about)
    note_child(key)
    return result


class PrewarmRun:
    """A prewarm run: what it compiles names it as a parent, and its record, written at its end, what it asked for.

    ``manifest`` is the SHA-256 (hex) of the library's manifest; no ``kernels`` means all.
    """

    def __init__(self, manifest: str, archs: Sequence[str], kernels: Sequence[str]) -> None:
        self._arguments = {"manifest": manifest, "archs": tuple(archs), "kernels": tuple(kernels)}
        self.key = _key(PREWARM, self._arguments)

    def running(self) -> run:
        """Let what is compiled in this block be asked for by it."""
        return run(self.key, PREWARM[0])

    def record(self, steps: Steps, report: Mapping[str, Any], programs: Iterable[str], started: float) -> bool:
        """Record it, unless it found all that an earlier run like it has recorded; returns whether it is recorded.

        ``report`` has its counts and sums, ``seconds`` among them; ``programs`` are digests of the entries that it
        found or compiled.
        """
        children = list(dict.fromkeys(programs))
        found_all = not report["compiled"] and not report["failed"]
        if not (found_all and children == self._recorded_children(steps)):
            _record(steps, PREWARM, self._arguments, dict(report), started, report["seconds"], children=children)
        return self._recorded_children(steps) is not None  # not where the cache is only read, or can't be written

    def _recorded_children(self, steps: Steps) -> list[str] | None:
        try:
            return steps.load(self.key).links("children")
        except KeyError:
            return None

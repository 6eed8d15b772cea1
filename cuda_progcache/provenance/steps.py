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

import contextlib
import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache._util.running import asked_by, note_child, run
from cuda_progcache.memo.call import Call, DigestedCall
from cuda_progcache.memo.digest import Digest, Indigestible, digest

if TYPE_CHECKING:
    from cuda_progcache.provenance.step_records import Steps

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


def render_arguments(kernel: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a rendering, from what the record of its compile has as ``kernel`` or ``part_of``."""
    found = {
        "template": kernel.get("name"),
        "parameters": dict(kernel.get("parameters") or {}),
        "files": {part["name"]: part["digest"] for part in kernel.get("templates") or ()},
    }
    return found | ({"module": kernel["module"]} if "module" in kernel else {})


def render_key(kernel: Mapping[str, Any]) -> Digest:
    """The key of a rendering, from what the record of its compile has of it."""
    return Call(RENDER[0], render_arguments(kernel), module=RENDER[1]).to_lookup_key()


def rendering_of(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the record of a compile has of the rendering of its source; None: it wasn't rendered, or is a link."""
    if record.get("code_type") == "link":
        return None  # its parts were rendered
    found: Mapping[str, Any] | None = record.get("kernel") or record.get("part_of")
    return found or None


def links_of(record: Mapping[str, Any]) -> dict[str, list[str]]:
    """Parents and children of the call that made a program, from its record; without those there are none of."""
    rendering = rendering_of(record)
    parents = [] if rendering is None else [str(render_key(rendering))]
    parents += [str(part["key"]) for part in record.get("parents") or ()]
    children = [str(part["digest"]) for part in record.get("inputs") or () if part.get("digest")]
    return {name: keys for name, keys in (("parents", parents), ("children", children)) if keys}


def call_as_recorded(
    kind: tuple[str, str], arguments: Mapping[str, Any], result: Any, started: float, seconds: float, *,
    parents: Sequence[str] = (), children: Iterable[str] = (), about: Mapping[str, Any] | None = None,
) -> DigestedCall:  # fmt: skip
    """A call as it is recorded.

    Parameters
    ----------
    kind : tuple of str
        Name and module.
    arguments : mapping
        JSON values; they lie in the record.
    result : object
        Likewise; None: it isn't kept, since it can be had again.
    started, seconds : float
        When it began (since the epoch), how long it took.
    parents, children : iterable of str
        Keys; whoever runs here is a parent, too.
    about : mapping, optional
        Metadata, under the call's name.
    """
    from cuda_progcache.memo.tagged_json import encode_json

    digests = {name: digest(value) for name, value in arguments.items()}
    inline = {digests[name]: encode_json(value) for name, value in arguments.items()}
    found = None
    if result is not None:
        found = digest(result)
        inline[found] = encode_json(result)
    above = asked_by()
    links = {"parents": [*parents, *(part["key"] for part in above)], "children": list(children)}
    metadata: dict[str, dict[str, Any]] = {
        "runtime": {"status": "done", "timestart": started, "timestop": started + seconds, "duration": seconds},
        "environment": {"host": platform.node(), "python": platform.python_version()},
        "links": {name: keys for name, keys in links.items() if keys},
    }
    if above:
        metadata["asked_by"] = {part["key"]: part["name"] for part in above}
    if about:
        metadata[kind[0]] = dict(about)
    return DigestedCall(kind[0], digests, found, metadata, kind[1], inline=inline)


def _keep(steps: Steps, make: Callable[[], DigestedCall]) -> None:
    """Keep a call; what can't be kept is counted, and costs nothing that has been made."""
    from cuda_progcache.memo.tagged_json import SaveError

    try:
        steps.save(make())
    except (SaveError, Indigestible) as error:
        steps.counters["dropped"] += 1
        _logger.info("a call beside the programs isn't recorded: %s", error)


def record_rendering(
    steps: Steps, kernel: Mapping[str, Any], template: str, source: str, started: float, seconds: float
) -> Digest:
    """Record a rendering, unless it is there.

    Parameters
    ----------
    steps : Steps
    kernel : mapping
        As the compile's record has it.
    template : str
        The file that was rendered.
    source : str
        What it gave; its SHA-256 is recorded.
    started, seconds : float

    Returns
    -------
    Digest
        Its key.
    """
    key = render_key(kernel)
    if not steps.contains(key):
        text = source.encode("utf-8", "surrogateescape")
        about = {
            "template": template, "sha256": sha256(text, usedforsecurity=False).hexdigest(), "bytes": len(text),
            "lines": source.count("\n"),
        }  # fmt: skip
        _keep(steps, lambda: call_as_recorded(RENDER, render_arguments(kernel), None, started, seconds, about=about))
    return key


def record_analysis(steps: Steps, kind: tuple[str, str], program: str, analyse: Callable[[], R]) -> R:
    """Analyse a program and record that, unless it is recorded: what it gives follows from the program alone.

    Parameters
    ----------
    steps : Steps
    kind : tuple of str
        :data:`RESOURCE_USAGE` or :data:`SASS`.
    program : str
        Digest of its entry.
    analyse : callable
        Does it.
    """
    started, clock = time.time(), time.perf_counter()
    result = analyse()
    seconds = time.perf_counter() - clock
    key = Call(kind[0], {"program": program}, module=kind[1]).to_lookup_key()
    if not steps.contains(key):
        text = result.encode("utf-8", "surrogateescape") if isinstance(result, str) else None
        about = {} if text is None else {"bytes": len(text), "sha256": sha256(text, usedforsecurity=False).hexdigest()}
        kept = result if text is None else None  # a listing is many times its binary
        _keep(
            steps,
            lambda: call_as_recorded(
                kind, {"program": program}, kept, started, seconds, parents=[program], about=about
            ),
        )
    note_child(key)
    return result


class PrewarmRun:
    """A prewarm run: what it compiles names it as a parent, and its record, written at its end, what it asked for.

    Parameters
    ----------
    manifest : str
        SHA-256 (hex) of the manifest.
    archs, kernels : sequence of str
        What was asked for; no kernels: all.
    """

    def __init__(self, manifest: str, archs: Sequence[str], kernels: Sequence[str]) -> None:
        self._arguments = {"manifest": manifest, "archs": tuple(archs), "kernels": tuple(kernels)}
        self.key = Call(PREWARM[0], self._arguments, module=PREWARM[1]).to_lookup_key()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let what is compiled here be asked for by it."""
        with run(self.key, PREWARM[0]):
            yield

    def record(self, steps: Steps, report: Mapping[str, Any], programs: Iterable[str], started: float) -> bool:
        """Record it, unless it found all that an earlier run like it has recorded.

        Parameters
        ----------
        report : mapping
            Its counts and sums, ``seconds`` among them.
        programs : iterable of str
            Digests of the entries that it asked for, found or compiled.
        started : float

        Returns
        -------
        bool
            Whether it is recorded, now or before.
        """
        children = list(dict.fromkeys(programs))
        if not report["compiled"] and not report["failed"]:
            with contextlib.suppress(KeyError):
                before = steps.load(self.key).metadata.get("links") or {}
                if before.get("children", []) == children:
                    return True
        told = dict(report)
        _keep(
            steps, lambda: call_as_recorded(PREWARM, self._arguments, told, started, told["seconds"], children=children)
        )
        try:
            steps.load(self.key)
        except KeyError:
            return False  # the cache is only read, or can't be written
        return True

# SPDX-License-Identifier: Apache-2.0
"""Conversion of the records of programs and calls to nodes of a provenance graph."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.provenance.graph import Node
from cuda_progcache.provenance.steps import kind_of
from cuda_progcache.store.compile_record import Caller

if TYPE_CHECKING:
    from cuda_progcache.memo.call import DigestedCall
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.compile_record import CompileRecord

_LONGEST = 60  # characters of an argument to show


class Part(NamedTuple):
    """A file that a program was made from, as its record names it: a header, template, compiler's file or source."""

    kind: str
    name: str
    digest: str | None


def parts_of(about: CompileRecord) -> Iterator[Part]:
    """Return the files that a program was made from: ``source``, ``template``, ``header`` and ``tool``."""
    if about.code_type != "link":
        yield Part("source", about.name or "source", source_digest(about))
    templates = () if about.rendered is None else about.rendered.templates
    for kind, files in (("template", templates), ("header", about.headers), ("tool", about.toolchain)):
        yield from (Part(kind, file.name, file.digest) for file in files)


def binary_node(entry: EntryInfo) -> Node:
    """Return the node of a program."""
    about = entry.about
    label = f"{about.title} ({about.target_type or '-'}, {about.arch or '-'})"
    detail = {"entry": entry.digest, "target_type": about.target_type or None, "arch": about.arch or None}
    return Node.of("binary", entry.digest, label, content_digest(entry), **detail, size=entry.size)


def making_node(entry: EntryInfo) -> Node:
    """Return the node of the ``compile`` or ``link`` that made a program."""
    about = entry.about
    kind = "link" if about.code_type == "link" else "compile"
    tool = about.toolchain[0].name if about.toolchain else "?"
    return Node.of(
        kind,
        entry.digest,
        f"{kind} with {tool}",
        key=about.key or None,
        options=about.labelled("option"),
        name_expressions=sorted(about.symbol_mapping),
        duration=about.duration,
        **times(about),
    )


def call_node(call: DigestedCall) -> Node:
    """Return a call as a step: a call of a memoized function, a prewarm run, or an analysis."""
    kind = kind_of(call)
    about = {"key": call.to_lookup_key(), **times_of_call(call)}
    children = call.links("children")
    if kind is None:
        about |= {"module": call.module, "version": call.version, "code": call.code_digest, "children": children}
        return Node.of("call", about["key"], call.name, **about)
    about |= {"result": call.recorded_result(), **(call.metadata.get(call.name) or {})}
    if kind == "prewarm":
        asked = call.recorded_arguments()
        about |= {name: list(asked.get(name) or ()) for name in ("archs", "kernels")}
        about |= {"manifest": asked.get("manifest"), "programs": len(children)}
        return Node.of("prewarm", about["key"], "prewarm", **about)
    label = {"sass": "disassembly", "resource_usage": "resource usage"}.get(call.name, call.name)
    return Node.of("analysis", about["key"], label, **about)


def content_digest(entry: EntryInfo) -> str | None:
    """Return the SHA-256 (hex) of an entry's bytes; None if the store has no files or the file can't be read."""
    if entry.path is None:
        return None
    try:
        with open(entry.path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def source_digest(about: CompileRecord) -> str | None:
    """Return the SHA-256 (hex) of the source that a program was compiled from; None if it isn't recorded."""
    for code in about.labelled("code"):
        _, found, digest = code.rpartition("sha256:")
        return digest if found else sha256(os.fsencode(code), usedforsecurity=False).hexdigest()
    return None


def times(about: CompileRecord) -> dict[str, str]:
    """Return when a compile started and ended, RFC 3339 in UTC; empty if that isn't recorded."""
    ended = about.created
    return {} if ended is None else {"started": _utc(ended - about.seconds), "ended": _utc(ended)}


def times_of_call(call: DigestedCall) -> dict[str, Any]:
    """Return when a call started and ended (RFC 3339 in UTC) and how long it took (seconds)."""
    runtime = call.runtime
    found: dict[str, Any] = {"duration": runtime.get("duration")}
    started: float | None = runtime.get("timestart")
    if started is not None:
        found |= {"started": _utc(started), "ended": _utc(runtime.get("timestop") or started)}
    return found


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def callers(call: DigestedCall) -> list[Caller]:
    """Return the parents of a call, with the names that its record has for them."""
    names = call.metadata.get("asked_by") or {}
    return [Caller(key, names.get(key, "")) for key in call.links("parents")]


def abridged(value: object) -> str:
    """Return the repr of a value, truncated if it is long."""
    written = repr(value)
    return written if len(written) <= _LONGEST else f"{written[: _LONGEST - 1]}…"

# SPDX-License-Identifier: Apache-2.0
"""What the records of programs and calls say, and the nodes of a graph that this makes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from hashlib import file_digest, sha256
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.compile.record import components, program_name, rendered_kernel
from cuda_progcache.provenance.graph import Node
from cuda_progcache.provenance.steps import kind_of

if TYPE_CHECKING:
    from cuda_progcache.memo.call import DigestedCall
    from cuda_progcache.store.base import EntryInfo

_LONGEST = 60  # characters of an argument that are shown


class Part(NamedTuple):
    """A file that a program was made of, as its record names it: a header, template, compiler's file or source."""

    kind: str
    name: str
    digest: str | None


def parts_of(record: Mapping[str, Any]) -> Iterator[Part]:
    """The files that a program was made of: ``source``, ``template``, ``header`` and ``tool``."""
    if record.get("code_type") != "link":
        yield Part("source", str(record.get("name") or "source"), source_digest(record))
    for kind, files in (
        ("template", rendered_kernel(record).get("templates")),
        ("header", record.get("headers")),
        ("tool", record.get("toolchain")),
    ):
        yield from (Part(kind, str(file["name"]), str(file["digest"])) for file in files or ())


def binary_node(entry: EntryInfo) -> Node:
    """A program."""
    record = entry.record
    target, arch = record.get("target_type"), record.get("arch")
    label = f"{program_name(record)} ({target}, {arch})"
    about = {"entry": entry.digest, "target_type": target, "arch": arch, "size": entry.size}
    return Node.of("binary", entry.digest, label, content_digest(entry), **about)


def making_node(entry: EntryInfo) -> Node:
    """The ``compile`` or ``link`` that made a program."""
    record = entry.record
    kind = "link" if record.get("code_type") == "link" else "compile"
    tool = next((part["name"] for part in record.get("toolchain") or ()), "?")
    return Node.of(
        kind,
        entry.digest,
        f"{kind} with {tool}",
        key=record.get("key"),
        options=components(record, "option"),
        name_expressions=sorted(record.get("symbol_mapping") or {}),
        duration=record.get("duration"),
        **times(record),
    )


def call_node(call: DigestedCall) -> Node:
    """A call as a step: of a memoized function, a prewarm run, or an analysis."""
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
    """SHA-256 (hex) of an entry's bytes; None in a store without files, or where the file is gone."""
    if entry.path is None:
        return None
    try:
        with open(entry.path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def source_digest(record: Mapping[str, Any]) -> str | None:
    """SHA-256 (hex) of the source that a program was compiled from; None where its record doesn't say."""
    for code in components(record, "code"):
        _, found, digest = code.rpartition("sha256:")
        return digest if found else sha256(code.encode(), usedforsecurity=False).hexdigest()
    return None


def times(record: Mapping[str, Any]) -> dict[str, str]:
    """When a compile started and ended, RFC 3339 in UTC; empty where its record doesn't say."""
    try:
        ended = datetime.fromisoformat(str(record.get("created"))).timestamp()
    except ValueError:
        return {}
    return {"started": _utc(ended - float(record.get("duration") or 0.0)), "ended": _utc(ended)}


def times_of_call(call: DigestedCall) -> dict[str, Any]:
    """When a call ran (RFC 3339 in UTC) and how long (seconds)."""
    runtime = call.runtime
    found: dict[str, Any] = {"duration": runtime.get("duration")}
    started: float | None = runtime.get("timestart")
    if started is not None:
        found |= {"started": _utc(started), "ended": _utc(runtime.get("timestop") or started)}
    return found


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def callers(call: DigestedCall) -> list[dict[str, str]]:
    """The parents of a call, with the names that its record has of them."""
    names = call.metadata.get("asked_by") or {}
    return [{"key": key, "name": names.get(key, "")} for key in call.links("parents")]


def abridged(value: object) -> str:
    """A value as people read it, cut where it is long."""
    written = repr(value)
    return written if len(written) <= _LONGEST else f"{written[: _LONGEST - 1]}…"

# SPDX-License-Identifier: Apache-2.0
"""What the records of programs and calls say, and the nodes of a graph that this makes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from hashlib import file_digest, sha256
from typing import TYPE_CHECKING, Any

from cuda_progcache.provenance.graph import Node

if TYPE_CHECKING:
    from cuda_progcache.memo.call import DigestedCall
    from cuda_progcache.store.base import EntryInfo

_LONGEST = 60  # characters of an argument that are shown


def binary_node(entry: EntryInfo) -> Node:
    """A program."""
    record = entry.record
    target, arch = record.get("target_type"), record.get("arch")
    detail = {"entry": entry.digest, "target_type": target, "arch": arch, "size": entry.size}
    label = f"{display_name(record)} ({target}, {arch})"
    return Node(f"binary:{entry.digest}", "binary", label, content_digest(entry), detail)


def step_node(record: Mapping[str, Any], entry: EntryInfo, kind: str) -> Node:
    """The ``compile`` or ``link`` that made a program."""
    parts = record["components"]
    detail: dict[str, Any] = {
        "key": record.get("key"),
        "options": [value for label, value in parts if label == "option"],
        "name_expressions": sorted(record.get("symbol_mapping") or {}),
        "duration": record.get("duration"),
        **times(record),
    }
    tool = next((t["name"] for t in record.get("toolchain") or ()), "?")
    return Node(f"{kind}:{entry.digest}", kind, f"{kind} with {tool}", None, detail)


def source_node(record: Mapping[str, Any], entry: EntryInfo) -> Node:
    """The source that a program was compiled from."""
    digest = source_digest(record)
    return Node(f"source:{digest or entry.digest}", "source", str(record.get("name") or "source"), digest)


def call_node(call: DigestedCall) -> Node:
    """A memoized call."""
    detail = {
        "key": call.to_lookup_key(),
        "module": call.module,
        "version": call.version,
        "code": call.code_digest,
        "children": links(call, "children"),
        **times_of_call(call),
    }
    return Node(f"call:{detail['key']}", "call", call.name, None, detail)


def prewarm_node(call: DigestedCall) -> Node:
    """A prewarm run."""
    asked = recorded_arguments(call)
    detail = {
        "key": call.to_lookup_key(),
        "archs": list(asked.get("archs") or ()),
        "kernels": list(asked.get("kernels") or ()),
        "manifest": asked.get("manifest"),
        "result": recorded_result(call),
        "programs": len(links(call, "children")),
        **times_of_call(call),
    }
    return Node(f"prewarm:{detail['key']}", "prewarm", "prewarm", None, detail)


def analysis_node(call: DigestedCall) -> Node:
    """An analysis of a program."""
    label = {"sass": "disassembly", "resource_usage": "resource usage"}.get(call.name, call.name)
    detail = {"key": call.to_lookup_key(), "result": recorded_result(call), **(call.metadata.get(call.name) or {})}
    return Node(f"analysis:{detail['key']}", "analysis", label, None, {**detail, **times_of_call(call)})


# What records say


def content_digest(entry: EntryInfo) -> str | None:
    """SHA-256 (hex) of an entry's bytes; None in a store without files, or where the file is gone."""
    if entry.path is None:
        return None
    try:
        with open(entry.path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def display_name(record: Mapping[str, Any]) -> str:
    """What people know a program by: the library kernel's name, else the program's."""
    kernel = record.get("kernel") or {}
    return str(kernel.get("name") or record.get("name") or "-")


def source_digest(record: Mapping[str, Any]) -> str | None:
    """SHA-256 (hex) of the source that a program was compiled from; None where its record doesn't say."""
    code = next((value for label, value in record.get("components") or () if label == "code"), None)
    if code is None:
        return None
    _, found, digest = str(code).rpartition("sha256:")
    return digest if found else sha256(str(code).encode(), usedforsecurity=False).hexdigest()


def times(record: Mapping[str, Any]) -> dict[str, str]:
    """When a compile started and ended, RFC 3339 in UTC; empty where its record doesn't say."""
    try:
        ended = datetime.fromisoformat(str(record.get("created")))
    except ValueError:
        return {}
    started = ended - timedelta(seconds=float(record.get("duration") or 0.0))
    return {"started": _utc(started), "ended": _utc(ended)}


def times_of_call(call: DigestedCall) -> dict[str, Any]:
    """When a call ran (RFC 3339 in UTC) and how long (seconds)."""
    runtime = call.metadata.get("runtime") or {}
    found: dict[str, Any] = {"duration": runtime.get("duration")}
    started: float | None = runtime.get("timestart")
    if started is not None:
        found["started"] = _utc(datetime.fromtimestamp(started, UTC))
        found["ended"] = _utc(datetime.fromtimestamp(runtime.get("timestop") or started, UTC))
    return found


def _utc(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def links(call: Any, which: str) -> list[str]:
    """Keys of a call's ``parents`` or ``children``."""
    return list((call.metadata.get("links") or {}).get(which) or ())


def callers(call: DigestedCall) -> list[dict[str, str]]:
    """The parents of a call, with the names that its record has of them."""
    names = call.metadata.get("asked_by") or {}
    return [{"key": key, "name": names.get(key, "")} for key in links(call, "parents")]


def recorded_arguments(call: DigestedCall) -> dict[str, Any]:
    """The arguments that lie in a call's record."""
    from cuda_progcache.memo.tagged_json import decode_json

    return {name: decode_json(call.inline[key]) for name, key in call.arguments.items() if key in call.inline}


def recorded_result(call: DigestedCall) -> Any:
    """A call's result, where it lies in its record; else None."""
    from cuda_progcache.memo.tagged_json import decode_json

    text = None if call.result is None else call.inline.get(call.result)
    return None if text is None else decode_json(text)


def abridged(value: object) -> str:
    """A value as people read it, cut where it is long."""
    written = repr(value)
    return written if len(written) <= _LONGEST else f"{written[: _LONGEST - 1]}…"

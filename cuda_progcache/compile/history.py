# SPDX-License-Identifier: Apache-2.0
"""Explains why a program had to be compiled, by comparing it with the nearest earlier compile.

``latest/`` in a cache has a small file per program name with its latest compiles, one line each, the oldest first: the
entry's digest, its variant, and a JSON object that says when it was compiled, on which host, and by which process and
command line. A line is appended after a compile, and the file is read to explain a miss. The files are disposable:
without them, a miss is "the first compile". They are never copied: records, and so bundles, don't say who compiled.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping

from cuda_progcache._util import files
from cuda_progcache._util.digest import is_digest, sha256
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.who import who
from cuda_progcache.compile import lines
from cuda_progcache.compile.record import components, rendered_kernel
from cuda_progcache.store.derived import derived, forget_oldest
from cuda_progcache.store.records import checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The number of compiles to compare with: of the same variant, or else of the same name.
_SAME, _OTHERS = 4, 16
#: The number of compiles kept per program name, and the file size in bytes from which it is cut down to these.
_KEPT, _LARGEST = 256, 160_000
#: The maximum number of program names; beyond that, the oldest are removed.
_NAMES = 4096
#: The reason for compiling a program that resembles no earlier one.
FIRST = ("first compile of this program",)
_GONE = "it was in the cache before, and was evicted, removed or damaged since"
_THERE = "the cache has it, but not by these paths or headers; or it was compiled elsewhere at the same moment"
#: The reason if there is no difference to report.
ALIKE = ("the records don't differ",)
#: The maximum number of earlier entries that one is compared with, newest first: 2,000 records are read in 60 ms.
_COMPARED = 2000


class Compiled(NamedTuple):
    """An earlier compile: its entry, and the variant of the program.

    Attributes
    ----------
    digest, variant : str
    by : str
        JSON: ``{"at": seconds since the epoch, "host", "pid", "command"}``; empty if unknown.
    """

    digest: str
    variant: str
    by: str = ""

    @property
    def line(self) -> str:
        """The compile as a line of its file."""
        return f"{self.digest} {self.variant} {self.by}".rstrip()


def note(cache: Any, record: Mapping[str, Any], digest: str, *, made_here: bool = True) -> None:
    """Note the entry ``digest`` as the latest compile of the program of ``record``.

    If this process has compiled it, that is noted as well. Copies don't say who compiled them.
    """
    name, compiled = _name(record), Compiled(digest, _variant(record), _made_here() if made_here else "")
    path = _path(cache, name)
    if path is None:
        kept = derived(cache, "latest")
        others = [known for known in kept.get(name, ()) if known.digest != digest]
        kept[name] = [compiled, *others][:_KEPT]
        forget_oldest(kept, _NAMES)
        return
    with contextlib.suppress(OSError):  # disposable: a later miss has one compile less to compare with
        _append(cache, path, compiled)


def _append(cache: Any, path: str, compiled: Compiled) -> None:
    size = lines.append(cache, path, compiled.line)
    if not size and path.endswith("0"):  # one in sixteen new names checks them all
        _forget_oldest(os.path.dirname(path))
    if size > _LARGEST:
        lines.rewrite(cache, path, [one.line for one in reversed(_read(path)[:_KEPT])])


def _made_here() -> str:
    import json

    return json.dumps({"at": round(time.time(), 3), **who()._asdict()}, separators=(",", ":"))


class Makers:
    """Who compiled the entries of a cache. Each program name's file is read once."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._by: dict[str, dict[str, str]] = {}

    def of(self, record: Mapping[str, Any], digest: str) -> dict[str, Any] | None:
        """Who compiled an entry: ``{"at", "host", "pid", "command"}``; None if unknown, as for an imported one."""
        import json

        if not record.get("name"):
            return None
        name = _name(record)
        if name not in self._by:
            self._by[name] = {one.digest: one.by for one in latest(self._cache, name)}
        try:
            found = json.loads(self._by[name].get(digest, ""))
            who = {"host": str(found["host"]), "pid": int(found["pid"]), "command": str(found["command"])}
            return {"at": float(found["at"]), **who}
        except (ValueError, KeyError, TypeError):
            return None


def _forget_oldest(folder: str) -> None:
    with os.scandir(folder) as found:
        aged = [(item.stat(follow_symlinks=False).st_mtime_ns, item.path) for item in found]
    if len(aged) > _NAMES:
        for _, path in sorted(aged)[: len(aged) - _NAMES * 3 // 4]:
            files.unlink_quietly(path)


def latest(cache: Any, name: str) -> list[Compiled]:
    """The latest compiles of the programs with a name, newest first. Folders in the name are ignored.

    Those of this cache come before those of its read-only layers.
    """
    own, file = _path(cache, name), _file(name)
    found = list(derived(cache, "latest").get(os.path.basename(name), ())) if own is None else _read(own)
    layers = (os.path.join(root, "latest", file) for root in getattr(cache, "roots", ()))
    return [*found, *(one for layer in layers if layer != own for one in _read(layer))]


def _read(path: str) -> list[Compiled]:
    found: dict[str, Compiled] = {}
    for line in reversed(lines.read(path)):
        digest, variant, by = (*line.split(" ", 2), "", "")[:3]
        if is_digest(digest) and variant:
            found.setdefault(digest, Compiled(digest, variant, by))
    return list(found.values())


def _path(cache: Any, name: str) -> str | None:
    root = getattr(cache, "path", None)
    if root is None:
        return None
    return os.path.join(root, "latest", _file(name))


def _file(name: str) -> str:
    return sha256(os.fsencode(os.path.basename(name))).hexdigest()[:32]


def _name(record: Mapping[str, Any]) -> str:
    return os.path.basename(str(record["name"]))


def _variant(record: Mapping[str, Any]) -> str:
    """Identify a variant as users see it: by a kernel's parameters, or a source's options and instances."""
    kernel = rendered_kernel(record)
    if kernel:
        asked = (kernel.get("name"), kernel.get("module"), sorted((kernel.get("parameters") or {}).items()))
    else:
        asked = (_name(record), _options(record), sorted(components(record, "name_expression")))
    made = (asked, record.get("code_type"), record.get("target_type"), record.get("arch"))
    return sha256(repr(made).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _options(record: Mapping[str, Any]) -> list[str]:
    return sorted(components(record, "option"))


def reasons(cache: Any, record: Mapping[str, Any], digest: str | None, *, headers: bool = True) -> tuple[str, ...]:
    """Why the program of ``record`` wasn't a hit.

    Parameters
    ----------
    cache : store
        One of our stores.
    record : mapping
        The record of the compile that was needed.
    digest : str or None
        Its entry's digest, if known.
    headers : bool
        Whether the headers that were read are known; if not, they aren't compared.

    Returns
    -------
    tuple of str
        A sentence per difference from the nearest earlier compile of that name (:func:`nearest`).
    """
    known, variant = latest(cache, _name(record)), _variant(record)
    if any(one.digest == digest for one in known):
        return (_THERE if _is_whole(cache, str(digest)) else _GONE,)
    same = [one for one in known if one.variant == variant][:_SAME]
    for candidates in (same, known[:_OTHERS]):
        records = (_record(cache, one.digest) for one in candidates)
        found = nearest(record, records if headers else map(without_headers, records))
        if found is not None:
            return tuple(differences(record, found)) or ALIKE
    return FIRST


def without_headers(record: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The record as it would be if the program had read no headers and no path had reached its output."""
    from cuda_progcache.keys.explain import OF_HEADERS

    if record is None:
        return None
    components = [part for part in record["components"] if part[0] not in OF_HEADERS]
    return {**record, "components": components, "headers": []}


def _record(cache: Any, digest: str) -> Mapping[str, Any] | None:
    try:
        record: Mapping[str, Any] = cache.info(digest).record
    except (KeyError, OSError):
        return None  # removed meanwhile
    return record if record.get("components") else None


def _is_whole(cache: Any, digest: str) -> bool:
    """Whether an entry is intact; a damaged one may stay in a read-only cache."""
    try:
        entry = cache.info(digest)
        return entry.path is None or checksum(entry.path.read_bytes()) == entry.checksum
    except (KeyError, OSError):
        return False


def nearest(record: Mapping[str, Any], others: Iterable[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """The best compile to compare another one with.

    The same variant comes first (kernel, parameters, architecture and target, or name and options); then the same
    options; then the one with the fewest differences to report, and with the fewest differing components.

    Parameters
    ----------
    record : mapping
    others : iterable of mapping or None
        Newest first, which decides between equals; None is skipped.
    """
    mine, variant, options = _components(record), _variant(record), _options(record)

    def distance(other: Mapping[str, Any]) -> tuple[bool, bool, int, int]:
        told = len(differences(record, other))
        return (_variant(other) != variant, _options(other) != options, told, len(mine ^ _components(other)))

    return min((other for other in others if other is not None), key=distance, default=None)


def _components(record: Mapping[str, Any]) -> set[tuple[str, ...]]:
    return {tuple(part) for part in record["components"]}


def differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """The differences between two records' compiles, as sentences. Templates and parameters stand for the source."""
    from cuda_progcache.keys.explain import differing
    from cuda_progcache.keys.tool_versions import versions

    mine, theirs = ({h["name"]: h["digest"] for h in r.get("headers") or ()} for r in (new, old))
    known = versions(old) | versions(new)
    found = list(differing(new["components"], old["components"], mine, theirs, known))
    rendered = _rendered_otherwise(new, old)
    if rendered and any(label == "code" for label, _ in found):
        found = [(label, sentence) for label, sentence in found if label not in {"code", "name_expression"}]
        return rendered + [sentence for _, sentence in found]
    return [sentence for _, sentence in found]


def _rendered_otherwise(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """Why the source of a library kernel differs: parameters or templates."""
    mine, theirs = (rendered_kernel(record) for record in (new, old))
    if not mine or not theirs:
        return []
    now, before = (kernel.get("parameters") or {} for kernel in (mine, theirs))
    found = [
        f"parameter {name} {before.get(name, 'unset')} → {now.get(name, 'unset')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    now, before = ({t["name"]: t["digest"] for t in kernel.get("templates") or ()} for kernel in (mine, theirs))
    for name in dict.fromkeys([*before, *now]):
        if name not in before or name not in now:
            found.append(f"template {name} {'is used now' if name in now else 'is no longer used'}")
        elif before[name] != now[name]:
            found.append(f"template {name} changed ({before[name][:12]} → {now[name][:12]})")
    return found


def is_compiled(entry: Any) -> bool:
    """Whether an entry's record says what it was compiled from; an entry that was added by hand doesn't have this."""
    return bool(entry.record.get("components"))


def explain_entry(cache: Any, digest: str) -> tuple[str, ...]:
    """Why an entry was compiled, by comparing its record with the nearest of the last few thousand before it.

    Raises
    ------
    KeyError
        If there is no such entry, or it wasn't compiled (but added by hand).
    """
    info = cache.info(digest)
    record = info.record
    if not is_compiled(info):
        raise KeyError(digest)
    found = _same_before(cache, record, digest) or nearest(record, _akin(cache, info))
    if found is None:
        return FIRST
    return tuple(differences(record, found)) or ("it was compiled again: its entry was evicted, removed or damaged",)


def _same_before(cache: Any, record: Mapping[str, Any], digest: str) -> Mapping[str, Any] | None:
    """The previous compile of the same variant, by the order in the file, since a clock may have been wrong."""
    known = latest(cache, _name(record))
    at = next((n for n, one in enumerate(known) if one.digest == digest), len(known))
    same = [one for one in known[at + 1 :] if one.variant == _variant(record)][:_SAME]
    return nearest(record, (_record(cache, one.digest) for one in same))


def _akin(cache: Any, info: Any) -> list[Mapping[str, Any]]:
    """Earlier records of the same kernel, of the last few thousand; else of the same templates, after a renaming."""
    record = info.record
    older = cache.first(
        _COMPARED,
        by="created",
        matches=lambda other: other.created < info.created and other.digest != info.digest and is_compiled(other),
    )
    templates = _templates(record)
    return [o.record for o in older if _kernel(o.record) == _kernel(record)] or [
        o.record for o in older if templates and _templates(o.record) == templates
    ]


def _kernel(record: Mapping[str, Any]) -> str:
    """The name by which users know a program."""
    kernel = record.get("kernel") or {}
    return str(kernel.get("name") or _name(record))


def _templates(record: Mapping[str, Any]) -> set[str]:
    return {t["name"] for t in (record.get("kernel") or {}).get("templates") or ()}

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
from collections.abc import Iterable, Iterator

from cuda_progcache._util import files
from cuda_progcache._util.digest import is_digest, sha256
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.who import who
from cuda_progcache.compile import lines
from cuda_progcache.store.derived import derived, forget_oldest
from cuda_progcache.store.records import checksum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.store.compile_record import CompileRecord

#: The number of compiles to compare with: of the same variant; otherwise, of the same name.
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


def note(cache: Any, about: CompileRecord, digest: str, *, made_here: bool = True) -> None:
    """Note the entry ``digest`` as the latest compile of a program.

    If the current process compiled the entry, that is noted as well; the origin of a copied entry isn't known.
    """
    name, compiled = _name(about), Compiled(digest, _variant(about), _made_here() if made_here else "")
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
    """A lookup of the processes that compiled a cache's entries. Each program name's file is read once."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._by: dict[str, dict[str, str]] = {}

    def of(self, entry: Any) -> dict[str, Any] | None:
        """Return who compiled an entry: ``{"at", "host", "pid", "command"}``; None if unknown, as for an import."""
        import json

        try:
            found = json.loads(self._noted(entry).get(entry.digest, ""))
            who = {"host": str(found["host"]), "pid": int(found["pid"]), "command": str(found["command"])}
            return {"at": float(found["at"]), **who}
        except (ValueError, KeyError, TypeError):
            return None

    def know(self, entry: Any) -> bool:
        """Return whether the entry has been noted, which its compiler does right after storing it."""
        return entry.digest in self._noted(entry)

    def _noted(self, entry: Any) -> dict[str, str]:
        name = _name(entry.about)
        if not name:
            return {}
        if name not in self._by:
            self._by[name] = {one.digest: one.by for one in latest(self._cache, name)}
        return self._by[name]


def _forget_oldest(folder: str) -> None:
    with os.scandir(folder) as found:
        aged = [(item.stat(follow_symlinks=False).st_mtime_ns, item.path) for item in found]
    if len(aged) > _NAMES:
        for _, path in sorted(aged)[: len(aged) - _NAMES * 3 // 4]:
            files.unlink_quietly(path)


def latest(cache: Any, name: str) -> list[Compiled]:
    """Return the latest compiles of the programs with a name, newest first. Folders in the name are ignored.

    The cache's own compiles come before those of its read-only layers.
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


def _name(about: CompileRecord) -> str:
    return os.path.basename(about.name)


def _variant(about: CompileRecord) -> str:
    """Identify a variant as users see it: by a kernel's parameters, or a source's options and instances."""
    if (kernel := about.rendered) is not None:
        asked: tuple[Any, ...] = (kernel.name, kernel.module, sorted(kernel.parameters.items()))
    else:
        asked = (_name(about), _options(about), sorted(about.labelled("name_expression")))
    made = (asked, about.code_type, about.target_type, about.arch)
    return sha256(repr(made).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _options(about: CompileRecord) -> list[str]:
    return sorted(about.labelled("option"))


def reasons(cache: Any, about: CompileRecord, digest: str | None, *, headers: bool = True) -> tuple[str, ...]:
    """Return why a program wasn't a hit.

    Parameters
    ----------
    cache : store
        One of our stores.
    about : CompileRecord
        The compile that was needed.
    digest : str or None
        Its entry's digest, if known.
    headers : bool
        Whether the headers that were read are known; if not, they aren't compared.

    Returns
    -------
    tuple of str
        A sentence per difference from the nearest earlier compile with that name (:func:`nearest`).
    """
    known, variant = latest(cache, _name(about)), _variant(about)
    if any(one.digest == digest for one in known):
        return (_THERE if _is_whole(cache, str(digest)) else _GONE,)
    same = [one for one in known if one.variant == variant][:_SAME]
    for candidates in (same, known[:_OTHERS]):
        records = _records(cache, candidates)
        found = nearest(about, records if headers else map(without_headers, records))
        if found is not None:
            return tuple(differences(about, found)) or ALIKE
    return FIRST


def is_new(reasons: tuple[str, ...]) -> bool:
    """Whether the reasons say that the program was never compiled before, or only for other architectures."""
    return reasons == FIRST or any(reason.startswith("option arch ") for reason in reasons)


def without_headers(about: CompileRecord) -> CompileRecord:
    """Return the record without headers and without the paths that reached the output."""
    from cuda_progcache.keys.explain import OF_HEADERS

    components = [part for part in about.components if part[0] not in OF_HEADERS]
    return about.replaced(components=components, headers=[])


def _records(cache: Any, compiles: Iterable[Compiled]) -> Iterator[CompileRecord]:
    """Yield the records of the compiles whose entries still exist."""
    for one in compiles:
        with contextlib.suppress(KeyError, OSError):  # removed in the meantime
            if is_compiled(entry := cache.info(one.digest)):
                yield entry.about


def _is_whole(cache: Any, digest: str) -> bool:
    """Whether an entry is intact; a damaged one may stay in a read-only cache."""
    try:
        entry = cache.info(digest)
        return entry.path is None or checksum(entry.path.read_bytes()) == entry.checksum
    except (KeyError, OSError):
        return False


def nearest(about: CompileRecord, others: Iterable[CompileRecord]) -> CompileRecord | None:
    """Return the best compile to compare another one with; None if there are none.

    The same variant comes first (kernel, parameters, architecture and target, or name and options); then the same
    options; then the fewest differences to report; then the fewest differing components.

    Parameters
    ----------
    about : CompileRecord
    others : iterable of CompileRecord
        Newest first; among equals, the newest is returned.
    """
    mine, variant, options = set(about.components), _variant(about), _options(about)

    def distance(other: CompileRecord) -> tuple[bool, bool, int, int]:
        told = len(differences(about, other))
        return (_variant(other) != variant, _options(other) != options, told, len(mine ^ set(other.components)))

    return min(others, key=distance, default=None)


def differences(new: CompileRecord, old: CompileRecord) -> list[str]:
    """Return the differences between two compiles as sentences; for a kernel's source, its templates and parameters."""
    from cuda_progcache.keys.explain import differing

    mine, theirs = dict(new.headers), dict(old.headers)
    found = list(differing(new.components, old.components, mine, theirs, old.versions | new.versions))
    rendered = _rendered_otherwise(new, old)
    if rendered and any(label == "code" for label, _ in found):
        found = [(label, sentence) for label, sentence in found if label not in {"code", "name_expression"}]
        return rendered + [sentence for _, sentence in found]
    return [sentence for _, sentence in found]


def _rendered_otherwise(new: CompileRecord, old: CompileRecord) -> list[str]:
    """Return why the source of a library kernel differs: parameters and templates."""
    mine, theirs = new.rendered, old.rendered
    if mine is None or theirs is None:
        return []
    now, before = mine.parameters, theirs.parameters
    found = [
        f"parameter {name} {before.get(name, 'unset')} → {now.get(name, 'unset')}"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    now, before = dict(mine.templates), dict(theirs.templates)
    for name in dict.fromkeys([*before, *now]):
        if name not in before or name not in now:
            found.append(f"template {name} {'is used now' if name in now else 'is no longer used'}")
        elif before[name] != now[name]:
            found.append(f"template {name} changed ({before[name][:12]} → {now[name][:12]})")
    return found


def is_compiled(entry: Any) -> bool:
    """Whether an entry's record has its compile's inputs; the record of an entry added by hand doesn't."""
    return bool(entry.about.is_compile)


def explain_entry(cache: Any, digest: str) -> tuple[str, ...]:
    """Return why an entry was compiled, by comparing its record with the nearest of the last few thousand before it.

    Raises
    ------
    KeyError
        If there is no such entry, or it wasn't compiled (but added by hand).
    """
    info = cache.info(digest)
    if not is_compiled(info):
        raise KeyError(digest)
    about = info.about
    found = _same_before(cache, about, digest) or nearest(about, _akin(cache, info))
    if found is None:
        return FIRST
    return tuple(differences(about, found)) or ("it was compiled again: its entry was evicted, removed or damaged",)


def _same_before(cache: Any, about: CompileRecord, digest: str) -> CompileRecord | None:
    """Return the previous compile of the same variant, by the order in the file, since a clock may have been wrong."""
    known, variant = latest(cache, _name(about)), _variant(about)
    at = next((n for n, one in enumerate(known) if one.digest == digest), len(known))
    return nearest(about, _records(cache, [one for one in known[at + 1 :] if one.variant == variant][:_SAME]))


def _akin(cache: Any, info: Any) -> list[CompileRecord]:
    """Return the same kernel's compiles among the last few thousand; if none, those of a kernel with its templates."""
    name, templates = _known_as(info.about), _templates(info.about)
    older = cache.first(
        _COMPARED,
        by="created",
        matches=lambda other: other.created < info.created and other.digest != info.digest and is_compiled(other),
    )
    made = [one.about for one in older]
    return [one for one in made if _known_as(one) == name] or [
        one for one in made if templates and _templates(one) == templates
    ]


def _known_as(about: CompileRecord) -> str:
    """Return the name by which users know a program, without its folder."""
    return _name(about) if about.kernel is None else about.kernel.name


def _templates(about: CompileRecord) -> set[str]:
    return set() if about.kernel is None else {template.name for template in about.kernel.templates}

# SPDX-License-Identifier: Apache-2.0
"""Why a program had to be compiled: its key against the nearest earlier compile's.

Beside the entries, ``latest/`` keeps a small file per program name with the
digests of its latest compiles. It is written after a compile, read when a miss
is to be explained, and disposable: without it, a miss is "the first compile".
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping

from cuda_progcache._util import files
from cuda_progcache._util.digest import sha256
from cuda_progcache.store.derived import derived, write_beside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Digests kept per program name.
_KEPT = 16
_LENGTH = 65  # 64 hex digits and a newline
#: Program names remembered: beyond, the oldest go.
_NAMES = 4096


def note(cache: Any, name: str, digest: str) -> None:
    """Remember the entry ``digest`` as the latest compile of the program ``name``."""
    before = latest(cache, name)
    digests = [digest, *(known for known in before if known != digest)][:_KEPT]
    path = _path(cache, name)
    if path is None:
        kept = derived(cache, "latest")
        kept[name] = digests
        if len(kept) > _NAMES:
            kept.pop(next(iter(kept)))
        return
    content = "".join(f"{known}\n" for known in digests).encode()
    with contextlib.suppress(OSError):  # disposable: a later miss has less to be compared with
        write_beside(cache.path, path, content)
        if not before and path.endswith("0"):  # one in sixteen new names looks at them all
            _forget_oldest(os.path.dirname(path))


def _forget_oldest(folder: str) -> None:
    with os.scandir(folder) as found:
        aged = [(item.stat(follow_symlinks=False).st_mtime_ns, item.path) for item in found]
    if len(aged) > _NAMES:
        for _, path in sorted(aged)[: len(aged) - _NAMES * 3 // 4]:
            files.unlink_quietly(path)


def latest(cache: Any, name: str) -> list[str]:
    """Digests of the latest compiles of the program ``name``, newest first."""
    path = _path(cache, name)
    if path is None:
        return list(derived(cache, "latest").get(name, ()))
    try:
        content, _ = files.read_regular(path)
    except OSError:
        return []
    lines = (content or b"").decode("ascii", "replace").splitlines()
    return [line for line in lines if len(line) == _LENGTH - 1]


def _path(cache: Any, name: str) -> str | None:
    root = getattr(cache, "path", None)
    if root is None:
        return None
    return os.path.join(root, "latest", sha256(os.fsencode(name)).hexdigest()[:32])


def reasons(cache: Any, record: Mapping[str, Any], digest: str) -> tuple[str, ...]:
    """Why the program of ``record`` wasn't served by an earlier compile.

    Parameters
    ----------
    cache : store
        Ours.
    record : mapping
        Of the compile that was needed.
    digest : str
        Its entry's digest.

    Returns
    -------
    tuple of str
        A sentence per difference from the nearest earlier compile: of the same name, and of those the
        one with the fewest components unlike.
    """
    candidates = latest(cache, str(record["name"]))
    if digest in candidates:
        return ("it was in the cache before, and was evicted, removed or damaged since",)
    nearest = _nearest(record, (_record(cache, known) for known in candidates))
    if nearest is None:
        return ("first compile of this program",)
    return tuple(differences(record, nearest)) or ("the records don't differ",)


def differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What differs between two records' compiles, a sentence each."""
    from cuda_progcache.keys.explain import explain

    mine, theirs = ({h["name"]: h["digest"] for h in r.get("headers") or ()} for r in (new, old))
    return explain(new["components"], old["components"], mine, theirs)


def _record(cache: Any, digest: str) -> Mapping[str, Any] | None:
    try:
        record: Mapping[str, Any] = cache.info(digest).record
    except (KeyError, OSError):
        return None  # gone since
    return record if record.get("components") else None


def _nearest(record: Mapping[str, Any], others: Iterable[Mapping[str, Any] | None]) -> Mapping[str, Any] | None:
    """The one with the fewest components unlike ``record``'s; of several the first, which is the newest."""
    mine = {tuple(part) for part in record["components"]}
    known = [other for other in others if other is not None]
    return min(known, key=lambda other: len(mine ^ {tuple(part) for part in other["components"]}), default=None)


def explain_entry(cache: Any, digest: str) -> tuple[str, ...]:
    """Why an entry was compiled: its record against the nearest one that is older.

    Raises
    ------
    KeyError
        If there is no such entry, or it is no program's (put there by hand).
    """
    info = cache.info(digest)
    record = info.record
    if not record.get("components"):
        raise KeyError(digest)
    others = [
        other
        for other in cache.entries()
        if other.created < info.created and other.digest != digest and other.record.get("components")
    ]
    same = [o for o in others if o.record["name"] == record["name"]] or [
        o for o in others if _templates(o.record) & _templates(record)
    ]
    same.sort(key=lambda other: -other.created)
    nearest = _nearest(record, (other.record for other in same))
    if nearest is None:
        return ("first compile of this program",)
    return tuple(differences(record, nearest)) or ("it was compiled again: its entry was evicted, removed or damaged",)


def _templates(record: Mapping[str, Any]) -> set[str]:
    return {t["name"] for t in (record.get("kernel") or {}).get("templates") or ()}

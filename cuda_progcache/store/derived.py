# SPDX-License-Identifier: Apache-2.0
"""Data that other packages derive from compiles and keep with the entries, such as header manifests.

It is disposable: if it is lost, programs are explained less well, and at worst compiled once more. A store with a
directory keeps it in subdirectories there, with the permissions of its entries; one without keeps it in memory.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref

from cuda_progcache._util.digest import is_digest
from cuda_progcache._util.files import LARGE, put_in_place, read_regular, write_new
from cuda_progcache.store.sharing import Sharing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from typing import Any

#: The subdirectories of a store's root. They are cleared with the entries.
DIRECTORIES = ("failures", "latest", "manifests", "steps", "toolchains", "unkept")
#: The largest number of header sets in a manifest. Ours have only a few.
_MOST_SETS = 64

_kept: weakref.WeakKeyDictionary[object, dict[str, dict[str, Any]]] = weakref.WeakKeyDictionary()


def derived(cache: object, what: str) -> dict[str, Any]:
    """The derived data of a store that has no directory.

    Parameters
    ----------
    cache : store
    what : str
        The name of the data.

    Returns
    -------
    dict
        Empty at first, and after ``clear()``.
    """
    return _kept.setdefault(cache, {}).setdefault(what, {})


def forget_oldest(kept: dict[str, Any], most: int) -> None:
    """Forget the oldest of what is derived, but for so many; other threads may do the same meanwhile."""
    if len(kept) > most:
        for name in list(kept)[:-most]:
            kept.pop(name, None)


def forget_derived(cache: object) -> None:
    """Forget all of it, as ``clear()`` has to."""
    _kept.pop(cache, None)


def write_beside(root: str | os.PathLike[str], path: str, content: bytes, *, new: bool = False) -> None:
    """Write a small file below a store's root.

    Parameters
    ----------
    root : str or os.PathLike
        The store's.
    path : str
        The file; directories that it lacks are made.
    content : bytes
        All of it.
    new : bool
        Write it only if there is no such file. Otherwise, the file is replaced atomically.

    Raises
    ------
    FileExistsError
        ``new``, and the file exists.
    OSError
        It can't be written.
    """
    sharing = Sharing.below(root)
    mode, sure = sharing.file_mode, sharing.sure_bits

    def write() -> None:
        if new:
            write_new(path, content, mode=mode, sync=False, at_least=sure)
        else:
            staged = f"{path}.{os.getpid()}.{threading.get_ident()}"
            put_in_place(path, content, staged=staged, mode=mode, at_least=sure)

    try:
        write()
    except FileNotFoundError:
        _make_directories(os.fspath(root), os.path.dirname(path), sharing)
        write()


def _make_directories(root: str, directory: str, sharing: Sharing) -> None:
    if directory == root or os.path.isdir(directory):
        return
    _make_directories(root, os.path.dirname(directory), sharing)
    with contextlib.suppress(FileExistsError):
        os.mkdir(directory, sharing.directory_mode)
        if sharing.root is not None:
            sharing.open_to_group(directory)


def clear_derived(root: str, *, names: Iterable[str] = DIRECTORIES) -> None:
    """Remove derived data from a store's root (OSError if that fails). What is written meanwhile stays."""
    for name in names:
        for folder, _, files in os.walk(os.path.join(root, name), topdown=False):
            for file in files:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(folder, file))
            with contextlib.suppress(OSError):  # not empty: something was just written
                os.rmdir(folder)


# A header manifest, {"format": n, "sets": [...]} with the newest set first, travels with the entries it leads to.


def manifest_path(root: str | os.PathLike[str], manifest: str) -> str:
    """The path of a header manifest."""
    return os.path.join(root, "manifests", manifest[:2], manifest[2:])


def manifest_sets(content: bytes) -> tuple[Any, list[Any]] | None:
    """The format and the header sets of a manifest; ``None`` if it isn't a valid one."""
    import json

    try:
        manifest = json.loads(content)
        known, sets = manifest["format"], manifest["sets"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return (known, sets) if isinstance(sets, list) and len(sets) <= _MOST_SETS else None


def _leads_to(one: Any, digests: Collection[str]) -> bool:
    """Whether a header set leads to one of these entries. It may be any JSON value."""
    entry = one.get("entry") if isinstance(one, dict) else None
    return isinstance(entry, str) and entry in digests


def leading_to(content: bytes, digests: Collection[str] | None) -> bytes | None:
    """Cut a manifest to the sets that lead to these entries, without stamps of files; ``None`` if nothing is left.

    If there is nothing to cut, the same bytes are returned, since they may be signed.
    """
    known = manifest_sets(content)
    if known is None:
        return None
    sets = [
        _unstamped(one) if one.get("stamps") else one
        for one in known[1]
        if (isinstance(one, dict) if digests is None else _leads_to(one, digests))
    ]
    if sets == known[1]:
        return content if sets else None
    return _manifest_of(known[0], sets) if sets else None


def _unstamped(one: Any) -> Any:
    """A header set without the stamps of its files, which mean nothing on another machine."""
    return {name: value for name, value in one.items() if name != "stamps"} if isinstance(one, dict) else one


def _manifest_of(known: Any, sets: list[Any]) -> bytes:
    import json

    return json.dumps({"format": known, "sets": sets}, separators=(",", ":")).encode("ascii")


def read_manifest(root: str, manifest: str, *, largest: int = LARGE) -> bytes | None:
    """A header manifest of a directory; ``None`` if it isn't there, is no regular file or can't be read."""
    try:
        return read_regular(manifest_path(root, manifest), largest=largest)[0]
    except OSError:
        return None  # without it, a program is compiled once more


def manifests_leading_to(root: str, digests: Collection[str]) -> Iterator[tuple[str, bytes]]:
    """The manifests that lead to these entries, cut as by :func:`leading_to`.

    An entry may have several: two programs that differ only in the spelling of an include path have the same output.

    Parameters
    ----------
    root : str
        The store's.
    digests : collection of str
        Of the entries.

    Yields
    ------
    tuple
        Name and content of a manifest, in order of name.
    """
    for name in manifests_in(root):
        content = leading_to(read_manifest(root, name) or b"", digests)
        if content is not None:
            yield name, content


def manifests_in(root: str) -> Iterator[str]:
    """The names of the header manifests in a store's root, sorted."""
    directory = os.path.join(root, "manifests")
    for shard in _names(directory):
        for rest in _names(os.path.join(directory, shard)):
            if is_digest(shard + rest):
                yield shard + rest


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def merged_manifest(first: bytes, then: bytes) -> bytes | None:
    """Merge two manifests, with the sets of the first in front; ``None`` if their formats differ or one is invalid.

    Sets that differ only in the stamps of files count as equal.
    """
    ours, theirs = manifest_sets(first), manifest_sets(then)
    if ours is None or theirs is None or ours[0] != theirs[0]:
        return None
    known = [_unstamped(one) for one in ours[1]]
    new = [one for one in theirs[1] if _unstamped(one) not in known]
    return _manifest_of(ours[0], [*ours[1], *new][:_MOST_SETS]) if new else first


def merge_manifest(root: str, manifest: str, content: bytes) -> None:
    """Add the header sets of a manifest to those of a store's root."""
    path = manifest_path(root, manifest)
    here = read_manifest(root, manifest)
    if here is not None:
        content = merged_manifest(here, content) or content
        if content == here:
            return
    with contextlib.suppress(OSError):  # then the first compile of a program here writes it again
        write_beside(root, path, content)

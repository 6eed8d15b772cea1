# SPDX-License-Identifier: Apache-2.0
"""Read-only layers in installed packages: caches among a package's files, found without configuration.

A package declares one by an entry point of the group ``cuda_progcache.layers``, whose value is the dotted path of a
directory in it::

    [cuda_progcache.layers]
    my-kernels-sm90 = my_kernels_sm90.layer

This is ``my_kernels_sm90/layer`` next to the package's metadata, with ``entries``, ``records`` and ``manifests`` in it
(``cuda-progcache export --wheel`` makes such a package). The default cache looks up in the layers what it doesn't have
itself; a hit in the cache doesn't touch them. This module reads the metadata itself, since importing
``importlib.metadata`` takes longer than a whole hit. Nothing of the package is imported.

A layer is trusted like the installed packages: whoever can write there chooses what runs in this process anyway.
"""

from __future__ import annotations

import functools
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.store.base import Entry, EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache

GROUP = "cuda_progcache.layers"
_SECTION = f"[{GROUP}]"


def directories() -> tuple[str, ...]:
    """The layers of the packages on ``sys.path``, in that order."""
    return tuple(store.directory for store in _stores(tuple(sys.path)))


def look(digest: str, *, with_record: bool) -> Entry | None:
    """The entry of the first layer that has it."""
    for store in _stores(tuple(sys.path)):
        if (found := store._examine(digest, with_record=with_record)) is not None:
            return found
    return None


def info(digest: str) -> EntryInfo | None:
    """One entry of a layer; None if no layer has it."""
    for store in _stores(tuple(sys.path)):
        if (found := store._info(digest)) is not None:
            return found
    return None


@functools.lru_cache(maxsize=4)
def _stores(path: tuple[str, ...]) -> tuple[FileStreamProgramCache, ...]:
    """The stores on the layers; searched for once per process, and again if ``sys.path`` has changed."""
    found = list(dict.fromkeys(layer for folder in path for layer in _declared(folder or os.curdir)))
    if not found:
        return ()
    from cuda_progcache.store.reader import Reader

    return tuple(Reader(layer, shared=True) for layer in found)


def _declared(folder: str) -> list[str]:
    """The layers of the packages that are installed in a folder."""
    try:
        names = os.listdir(folder)
    except OSError:  # a zip file, or nothing
        return []
    found = []
    for name in sorted(name for name in names if name.endswith((".dist-info", ".egg-info"))):
        try:
            with open(os.path.join(folder, name, "entry_points.txt"), "rb") as file:
                content = file.read()
        except OSError:
            continue  # it has none
        if _SECTION.encode() in content:
            found += _layers(folder, content.decode("utf-8", "replace"))
    return found


def _layers(folder: str, entry_points: str) -> list[str]:
    found, inside = [], False
    for line in map(str.strip, entry_points.splitlines()):
        if line.startswith("["):
            inside = line == _SECTION
        elif inside and "=" in line:
            place = line.partition("=")[2].partition("[")[0].strip()
            if (layer := _place(folder, place)) is not None:
                found.append(layer)
            else:
                _warn(folder, line)
    return found


def _place(folder: str, dotted: str) -> str | None:
    """The directory that a dotted path names; for an editable install, the import system is asked where it is."""
    package, _, rest = dotted.partition(".")
    tail = rest.split(".") if rest else []
    layer = os.path.join(os.path.abspath(folder), package, *tail)
    if os.path.isdir(os.path.join(layer, "entries")):
        return layer
    from importlib.util import find_spec

    spec = find_spec(package) if package.isidentifier() else None
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        layer = os.path.join(place, *tail)
        if os.path.isdir(os.path.join(layer, "entries")):
            return layer
    return None


def _warn(folder: str, line: str) -> None:
    from cuda_progcache._util.warning import warn
    from cuda_progcache.errors import ProgCacheWarning

    warn(
        f"the layer {line!r} of a package in {folder} isn't used: it isn't a cache directory",
        ProgCacheWarning,
    )

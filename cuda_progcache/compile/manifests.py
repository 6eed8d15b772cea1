# SPDX-License-Identifier: Apache-2.0
"""Header manifests: the headers that earlier compiles of the same source, options and compiler have read.

They are kept in this process's memory, and under ``manifests/`` of a cache on disk. They are disposable: without them
the next lookup is a miss.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from cuda_progcache._util.fields import replace
from cuda_progcache._util.locks import ForkSafeLock
from cuda_progcache.keys import toolchain
from cuda_progcache.keys.headers import HeaderManifest, HeaderSet, Holds, holds, read_file, with_stamps
from cuda_progcache.store.derived import manifest_path, write_beside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.keys.schema import BaseKey

_manifests: OrderedDict[tuple[str | None, str], HeaderManifest] = OrderedDict()
_manifests_lock = ForkSafeLock()
_MAX_MANIFESTS = 512
#: The number of manifests in a shard (one of 256) below which none is checked, and how many are checked per write.
_FEW, _LOOKED_AT = 64, 4


def _manifest_path(cache: object, manifest_id: str) -> str | None:
    root = getattr(cache, "directory", None)
    if root is None:
        root = getattr(cache, "path", None)  # for a store that isn't ours
    return manifest_path(root, manifest_id) if root is not None else None


def known_headers(base: BaseKey, cache: object, holds: Holds = holds) -> HeaderSet | None:
    """Return the header set of an earlier compile that still matches the files; None if there is none."""
    found = headers_here(base, cache, holds)
    if found is None and (content := _beyond(base.manifest_id, cache)) is not None:
        found = _take(base, content, cache, holds)
    if found is None and (path := _manifest_path(cache, base.manifest_id)) is not None:
        _recall_include_source(path)  # the program will be compiled
    return found


def fetch_manifests(bases: Iterable[BaseKey], cache: Any, holds: Holds = holds) -> None:
    """Fetch the manifests that this machine lacks from the tiers, in as few requests as possible."""
    missing = {base.manifest_id: base for base in bases if headers_here(base, cache, holds) is None}
    for manifest_id, content in cache.find_manifests(missing).items():
        _take(missing[manifest_id], content, cache, holds)


def headers_here(base: BaseKey, cache: object, holds: Holds = holds) -> HeaderSet | None:
    """Return the header set as :func:`known_headers` does, but only from this machine."""
    path = _manifest_path(cache, base.manifest_id)
    slot = (path, base.manifest_id)
    search, recheck_after = base.search, base.inputs.header_policy.recheck_after
    manifest = _in_memory(slot)
    if manifest is not None and (found := manifest.match(search, recheck_after, holds)) is not None:
        return found
    if path is not None:
        manifest = HeaderManifest.read(path)  # another process may have updated it
        _keep_manifest(slot, manifest)
        if (found := manifest.match(search, look=holds)) is not None:
            return found
    for layer in _layers(cache, base.manifest_id, path):
        if (found := HeaderManifest.read(layer).match(search, look=holds)) is not None:
            _keep_manifest(slot, HeaderManifest(path, [found, *(manifest.sets if manifest is not None else ())]))
            return found
    return None


def _take(base: BaseKey, content: bytes, cache: object, holds: Holds) -> HeaderSet | None:
    """Return, and store, the header set of another machine's manifest that matches the files; None if there is none."""
    from cuda_progcache.keys.elsewhere import from_elsewhere

    found = from_elsewhere(content).match(base.search, look=holds)
    if found is not None:
        found = with_stamps(found, base.search)
        _remember(base.manifest_id, found, cache)
    return found


def _beyond(manifest_id: str, cache: object) -> bytes | None:
    """Return a manifest from the cache's tiers; None if it isn't there."""
    find = getattr(cache, "find_manifest", None)  # stores of cuda.core don't have it
    content: bytes | None = find(manifest_id) if find is not None else None
    return content


def headers_before(base: BaseKey, cache: object) -> HeaderSet | None:
    """Return the header set of the latest compile of this source and options, whether or not it still matches."""
    path = _manifest_path(cache, base.manifest_id)
    for file in [path, *_layers(cache, base.manifest_id, path)]:
        if sets := HeaderManifest.read(file).sets:
            return sets[0]
    return None


def headers_alike(base: BaseKey, cache: object) -> Iterator[HeaderSet]:
    """Yield the header sets of earlier compiles that differ from this one only in comments and white space.

    This applies to the source and to each header. A set gives the key of the earlier compile.
    """
    if base.shows_text:
        return
    from cuda_progcache.keys.plain_text import alike

    path = _manifest_path(cache, base.plain_id)
    files = [path, *_layers(cache, base.plain_id, path)]
    held = _in_memory((path, base.plain_id))
    known = itertools.chain(
        [] if held is None else [held], map(HeaderManifest.read, files), _manifest_beyond(base.plain_id, cache)
    )
    for headers in itertools.chain.from_iterable(manifest.sets for manifest in known):
        if (found := alike(headers, base.search)) is not None:
            yield found


def _manifest_beyond(manifest_id: str, cache: object) -> Iterator[HeaderManifest]:
    content = _beyond(manifest_id, cache)
    if content is not None:
        from cuda_progcache.keys.elsewhere import from_elsewhere

        yield from_elsewhere(content)


def _in_memory(slot: tuple[str | None, str]) -> HeaderManifest | None:
    with _manifests_lock:
        manifest = _manifests.get(slot)
        if manifest is not None:
            _manifests.move_to_end(slot)
    return manifest


def _layers(cache: object, manifest_id: str, own: str | None) -> Iterator[str]:
    """Yield the paths of a manifest in the read-only layers of a cache."""
    for root in getattr(cache, "roots", ()):
        layer = manifest_path(root, manifest_id)
        if layer != own:
            yield layer


def _include_source_path(manifest: str) -> str:
    return os.path.join(os.path.dirname(os.path.dirname(manifest)), f"nvrtc-{toolchain.build('c++')[:32]}")


def _recall_include_source(manifest: str) -> None:
    """Read from the cache how the installed NVRTC reports headers; trying it takes as long as a compile."""
    from cuda_progcache.compile import compilers
    from cuda_progcache.keys.includes import NOTHING, TIME_TRACE, TRACE

    build = toolchain.build("c++")
    if build not in compilers.include_sources:
        found = (read_file(_include_source_path(manifest)) or b"").decode("ascii", "replace")
        if found in {TRACE, TIME_TRACE, NOTHING}:
            compilers.include_sources[build] = found


def _keep_include_source(cache: object, manifest: str) -> None:
    from cuda_progcache.compile import compilers

    path = _include_source_path(manifest)
    found = compilers.include_sources.get(toolchain.build("c++"))
    if found is not None and not os.path.lexists(path):
        _write(cache, path, found.encode())


def _keep_manifest(slot: tuple[str | None, str], manifest: HeaderManifest) -> None:
    with _manifests_lock:
        _manifests[slot] = manifest
        _manifests.move_to_end(slot)
        while len(_manifests) > _MAX_MANIFESTS:
            _manifests.popitem(last=False)


def remember_headers(base: BaseKey, headers: HeaderSet, cache: object, entry: str = "") -> None:
    """Store a compile's header set for later lookups of the entry, in this process and in the cache's directory."""
    known = replace(headers, entry=entry)
    path = _remember(base.manifest_id, known, cache)
    if path is not None:
        _keep_include_source(cache, path)
    _send(base.manifest_id, known, cache)


def _send(manifest_id: str, headers: HeaderSet, cache: object) -> None:
    """Add a set to the manifest in the cache's tiers, if it has any."""
    if getattr(cache, "reaches_beyond", False):  # stores of cuda.core don't
        from cuda_progcache.keys.elsewhere import for_elsewhere

        cache.keep_manifest(manifest_id, for_elsewhere(headers))  # type: ignore[attr-defined]


def remember_alike(base: BaseKey, headers: HeaderSet, cache: object, entry: str) -> bool:
    """Store a header set for programs that differ only in comments and white space.

    Return False, and store nothing, if comments or white space may affect the output.
    """
    from cuda_progcache.keys.include_text import asks_for_columns
    from cuda_progcache.keys.includes import plain_texts

    if base.shows_text or headers.columns or asks_for_columns(base.inputs.code):
        return False

    plain = plain_texts(base, headers)
    source = base.inputs.source.identity.decode()
    known = replace(headers, entry=entry, source=source, plain=plain)
    _remember(base.plain_id, known, cache)
    _send(base.plain_id, known, cache)
    return True


def _remember(manifest_id: str, headers: HeaderSet, cache: object) -> str | None:
    """Add a set at the front of a manifest; return the path of its file, if it has one."""
    path = _manifest_path(cache, manifest_id)
    slot = (path, manifest_id)
    if path is not None:
        manifest = HeaderManifest.read(path)
    else:
        known = _in_memory(slot)
        manifest = HeaderManifest(None, list(known.sets) if known else [])
    content = manifest.add(headers)
    _keep_manifest(slot, manifest)
    if path is not None:
        _write(cache, path, content)
        _trim(os.path.dirname(path))
    return path


def _trim(shard: str) -> None:
    """Remove some manifests whose entries are gone, since evicting an entry doesn't remove its manifest.

    If a shard has many manifests, a few are checked at each write. So the manifests of evicted entries stay fewer than
    a third of the others.
    """
    from cuda_progcache._util.chance import chance
    from cuda_progcache._util.liveness import LITTER_AGE

    try:
        with os.scandir(shard) as found:
            names = [item.name for item in found]
        if len(names) <= _FEW:
            return
        for name in chance.sample(names, _LOOKED_AT):
            path = os.path.join(shard, name)
            young = time.time() - os.lstat(path).st_mtime < LITTER_AGE  # its entry may not be published yet
            if not young and not any(_entry_is_there(shard, known.entry) for known in HeaderManifest.read(path).sets):
                os.unlink(path)
    except OSError:
        return  # another process was faster, or the directory is in trouble, which the entry's write reports


def _entry_is_there(shard: str, digest: str) -> bool:
    root = os.path.dirname(os.path.dirname(shard))
    return os.path.lexists(os.path.join(root, "entries", digest[:2], digest[2:])) if digest else False


def _write(cache: object, path: str, content: bytes) -> None:
    """Write a disposable file. Without it, the next process compiles once more."""
    with contextlib.suppress(OSError):  # the entry's write warns if the cache is in trouble
        write_beside(cache.path, path, content)  # type: ignore[attr-defined]

# SPDX-License-Identifier: Apache-2.0
"""Packs: a lockfile's programs as one object of a tier, for a machine that has none of them.

``packs/<the lockfile's digest>.tar`` is a bundle (:mod:`cuda_progcache.store.bundle`) of the programs and of the header
manifests that lead to them. It is checked like any bundle, and only the lockfile's programs are imported from it. On a
tier with ``trust=signed``, each record must be signed like that of an object, and so must the list of the pack's files,
because manifests have no records.

If anything is wrong with a pack, it counts as a miss: the programs are requested one by one.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util.digest import is_digest
from cuda_progcache.errors import BundleError, StoreError
from cuda_progcache.store.bundle import opened_file, write
from cuda_progcache.store.derived import leading_to, merge_manifest
from cuda_progcache.store.disk_store import DiskStore
from cuda_progcache.store.stack import ProgramCacheStack
from cuda_progcache.store.tiers.engine import batches
from cuda_progcache.store.tiers.envelope import PACKS, PROGRAMS
from cuda_progcache.store.tiers.remote import remote_in
from cuda_progcache.store.tiers.sides import Item, Side, TierSide, manifests_of

if TYPE_CHECKING:
    from cuda_progcache.store.bundle import Bundle
    from cuda_progcache.store.records import Version
    from cuda_progcache.store.tiers.engine import Listed
    from cuda_progcache.store.tiers.remote import RemoteProgramCache

#: The maximum size of a pack, in bytes.
MAX_BYTES = 256 << 20
#: A pack is requested if at least this many of its programs are missing, and at least this share of them.
_SEVERAL, _PART = 2, 0.25


def pack_name(lock: str) -> str:
    """The name of a lockfile's pack, from the lockfile's digest."""
    return f"{PACKS}{lock}.tar"


def packs_on(tier: TierSide) -> Iterator[tuple[str, Listed]]:
    """List all packs, with the digests of their lockfiles, without reading them."""
    for one in tier.objects(PACKS):
        digest = one.name.removeprefix(PACKS).removesuffix(".tar")
        if is_digest(digest) and one.name == pack_name(digest):
            yield digest, one


# Writing


class _NotWholeError(Exception):
    """A program of the lockfile can't be read."""


def write_pack(source: Side, tier: TierSide, lock: str, digests: Collection[str]) -> int:
    """Write a lockfile's pack, and return the number of its programs; 0 if the source doesn't have all of them intact.

    Parameters
    ----------
    source : Side
    tier : TierSide
    lock : str
        The lockfile's digest.
    digests : collection of str
        The digests of its programs.

    Raises
    ------
    StoreError
        The tier can't be written, or the pack would be too large.
    """
    name, file = pack_name(lock), io.BytesIO()

    def fits() -> None:
        if file.tell() > MAX_BYTES:
            raise StoreError(errno.EFBIG, f"a pack may have {MAX_BYTES} bytes; use several lockfiles", tier.name)

    def programs() -> Iterator[tuple[str, bytes, Version]]:
        for batch in batches(sorted(digests), lambda _: 0):
            found = {one.digest: one for one in source.read(PROGRAMS, batch) if isinstance(one, Item)}
            if len(found) < len(batch):
                raise _NotWholeError
            for digest in batch:
                _, data, record = found[digest]
                yield digest, data, tier.trust.version(digest, data, record, time.time())
                fits()

    def manifests(digests: Collection[str]) -> Iterator[tuple[str, bytes]]:
        return ((one.digest, one.data) for items in manifests_of(source, digests) for one in items)

    def seal(files: bytes) -> Mapping[str, Any]:
        return {} if tier.trust.signer is None else tier.trust.signer(name, files, {})

    try:
        count = write(file, programs(), manifests, seal)
    except _NotWholeError:
        return 0
    fits()
    tier.put(name, file.getvalue())
    return count


# Reading


class _Pack(NamedTuple):
    """The used parts of a pack: programs (digest, entry, version) and header manifests (name, content)."""

    programs: list[tuple[str, bytes, Version]]
    manifests: list[tuple[str, bytes]]


def fetch_pack(cache: object, lock: Callable[[], str], digests: Collection[str]) -> int:
    """Fetch a lockfile's pack if many of its programs are missing; return how many were added.

    Parameters
    ----------
    cache : store
        A store with a directory and tiers.
    lock : callable
        Returns the lockfile's digest.
    digests : collection of str
        The digests of its programs.
    """
    stack = cache if isinstance(cache, ProgramCacheStack) else getattr(cache, "_stack", None)
    if stack is None:
        return 0
    disks = (getattr(one.store, "owner", one.store) for one in stack._levels if one.writable and not one.is_remote)
    disk = next((one for one in disks if isinstance(one, DiskStore)), None)
    if disk is None:
        return 0
    missing = {one for one in digests if not any(stack._has(level, one) for level in stack._here)}
    came = 0
    for level in stack._levels:
        remote = remote_in(level.store)
        if len(missing) < max(_SEVERAL, _PART * len(digests)) or remote is None:
            continue
        pack = _load(remote, pack_name(lock()), missing)
        for digest, data, version in pack.programs:
            level.count("hits")
            came += disk._copy(digest, data, version.record_json)
            missing.discard(digest)
        for manifest, content in pack.manifests:
            merge_manifest(disk._root.path, manifest, content)
    return came


def _load(remote: RemoteProgramCache, name: str, wanted: Collection[str]) -> _Pack:
    """Read the wanted programs from a tier's pack; if anything is wrong, that is a miss."""
    pack = _Pack([], [])
    packed = remote._objects.fetch(name, limit=MAX_BYTES)
    if packed is None:
        remote._counters.count("misses")
        remote._calls.tell()
        return pack
    try:
        with opened_file(io.BytesIO(packed), name) as bundle:
            pack = _verified(remote, name, bundle, wanted)
        remote._calls.judge(is_sound=True)
    except BundleError as exc:
        remote._objects.reject("pack", f"has a pack that isn't used: {exc}")
    remote._counters.count("hits", len(pack.programs))
    remote._calls.tell()
    return pack


def _verified(remote: RemoteProgramCache, name: str, bundle: Bundle, wanted: Collection[str]) -> _Pack:
    """The trusted programs and manifests (BundleError if the pack is damaged, or belongs to another lockfile)."""
    asked = [digest for digest in bundle.digests if digest in wanted]
    if not asked:
        raise bundle.refuse("it has nothing of this lockfile")
    verifier = remote.trust.verifier_of(PACKS)
    programs = []
    why = None
    for digest in asked:
        version, _ = bundle.version(digest)
        record = version.record()
        data = bundle.entry(digest, version)
        doubt = None if verifier is None else verifier(digest, data, record)
        if doubt is None:
            programs.append((digest, data, version))
        else:
            remote._objects.count("untrusted")
            why = doubt
    found = list(bundle.manifests())
    if verifier is not None and (doubt := verifier(name, bundle.files, bundle.seal)) is not None:
        found, why = [], doubt
    if why is not None:
        remote._calls.note("untrusted pack", f"has {name}, of which not all is trusted ({why}); that is left out")
    kept = {digest for digest, _, _ in programs}
    cut = [(manifest, leading_to(content, kept)) for manifest, content in found]
    return _Pack(programs, [(manifest, content) for manifest, content in cut if content is not None])

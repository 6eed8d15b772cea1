# SPDX-License-Identifier: Apache-2.0
"""A directory or a tier as a source or target of copies: its programs and header manifests, by name.

A tier is used directly through its engine; its write queue, breaker and memory of misses are only for compiles. Trouble
is an error here, after a few attempts.
"""

from __future__ import annotations

import errno
import functools
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from cuda_progcache._util.chance import chance
from cuda_progcache._util.digest import is_digest
from cuda_progcache.errors import ReadOnlyError, StoreError
from cuda_progcache.store.derived import (
    leading_to,
    manifests_in,
    merge_manifest,
    merged_manifest,
    read_manifest,
)
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.readonly import look_into
from cuda_progcache.store.records import encode_record
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.configuration import configured
from cuda_progcache.store.tiers.deadline import within
from cuda_progcache.store.tiers.engine import batches, each_of
from cuda_progcache.store.tiers.envelope import (
    MANIFESTS,
    PROGRAMS,
    DamagedObjectError,
    digest_in,
    most_bytes,
    object_name,
    pack,
    unpack,
)
from cuda_progcache.store.tiers.remote import remote_in
from cuda_progcache.store.tiers.settings import TierSettings, parse_tier
from cuda_progcache.store.tiers.signing import SIGNATURE

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.engine import Engine, Listed
    from cuda_progcache.store.tiers.signing import Trust

R = TypeVar("R")
#: The number of attempts of a call, and the first pause between them, in seconds; each further one is twice as long.
_TRIES, _PAUSE = 4, 0.2
#: Errors after which another attempt is pointless.
_LASTING = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTSUP, errno.EINVAL, errno.EFBIG})
#: The time limit of a listing, in seconds: some millions of objects. Each page has the time limit of a write.
_LISTING = 600.0


class Item(NamedTuple):
    """A program, or a header manifest.

    Attributes
    ----------
    digest : str
    data : bytes
    record : mapping
        Empty for a manifest.
    """

    digest: str
    data: bytes
    record: Mapping[str, Any]


class Side(Protocol):
    """A directory or a tier."""

    @property
    def name(self) -> str:
        """Its path, or its URL without secrets."""

    def sizes(self, tree: str) -> dict[str, int]:
        """Digest and size of all programs or manifests (StoreError if it can't list)."""

    def read(self, tree: str, digests: Sequence[str]) -> Iterator[Item | str]:
        """Read those that exist; an unusable item is yielded as its digest."""

    def write(self, tree: str, items: Sequence[Item]) -> int:
        """Write items; return how many were stored (StoreError if it is read-only)."""

    def close(self) -> None:
        """Close what is open."""


def is_url(place: str) -> bool:
    """Whether a place is a tier's URL rather than a path."""
    return "://" in place or place.startswith("file:")


def settings_of(url: str) -> TierSettings:
    """The settings of a URL. A URL without options stands for the configured tier with that URL, if there is one."""
    settings = parse_tier(url, where="the tier")
    if settings == TierSettings(settings.url, mode=settings.mode):
        return next((one for one in configured().tiers if one.url == settings.url), settings)
    return settings


def side(place: str | os.PathLike[str], *, writes: bool) -> Side:
    """Open a directory or a tier.

    Parameters
    ----------
    place : str or path
        A path, or a tier's URL.
    writes : bool
        Whether it is written to; a missing directory is then created.

    Raises
    ------
    ConfigError
        It isn't a tier's URL.
    StoreError
        It can't be opened or written.
    """
    place = os.fspath(place)
    return side_of(settings_of(place), writes=writes) if is_url(place) else _Directory(place, writes=writes)


def side_of(settings: TierSettings, *, writes: bool = False) -> Side:
    """Open a tier; as :func:`side`."""
    if settings.scheme == "file":
        if writes:
            raise ReadOnlyError(errno.EROFS, "a layer is read-only; to write there, give its path", settings.path)
        return _Directory(settings.path, writes=False)
    if writes and settings.mode == "ro":
        why = "an image is read-only; to make one, run cuda-progcache export --oci DIR, and push it to the registry"
        raise ReadOnlyError(
            errno.EROFS, why if settings.scheme == "oci" else "this tier is read-only (mode=ro)", settings.url
        )
    return TierSide(settings)


class _Directory:
    def __init__(self, path: str, *, writes: bool) -> None:
        self._cache = FileStreamProgramCache(path, strict=True, mode="rw") if writes else look_into(path)
        self.name = str(self._cache.path)

    def sizes(self, tree: str) -> dict[str, int]:
        if tree == PROGRAMS:
            return {digest: size for digest, size, _ in self._cache._sizes()}
        return dict.fromkeys(manifests_in(self.name), 0)

    def read(self, tree: str, digests: Sequence[str]) -> Iterator[Item | str]:
        for digest in digests:
            if tree == MANIFESTS:
                content = read_manifest(self.name, digest)
                if content is not None:
                    yield Item(digest, content, {})
                continue
            found = self._cache._examine(digest, with_record=True)
            if found is not None:
                yield Item(digest, found.data, found.record)
            elif self._cache._info(digest) is not None:
                yield digest

    def write(self, tree: str, items: Sequence[Item]) -> int:
        kept = 0
        for digest, data, record in items:
            if tree == MANIFESTS:
                merge_manifest(self.name, digest, data)
                kept += 1
            else:
                put = functools.partial(self._cache._put, digest, data, encode_record(record))
                kept += self._cache._asked("copy a program", lambda put=put: self._cache._wrote(put()))  # type: ignore[misc]
        return kept

    def close(self) -> None:
        self._cache.close()


class NotMade:
    """A missing directory in a dry run, which doesn't create it. It is empty."""

    def __init__(self, path: str) -> None:
        self.name = path

    def sizes(self, tree: str) -> dict[str, int]:  # noqa: ARG002
        """None."""
        return {}

    def read(self, tree: str, digests: Sequence[str]) -> Iterator[Item | str]:  # noqa: ARG002
        """None."""
        return iter(())

    def write(self, tree: str, items: Sequence[Item]) -> int:  # noqa: ARG002
        """Store nothing."""
        return 0

    def close(self) -> None:
        """Do nothing: nothing is open."""


class TierSide:
    """A tier, used through its engine.

    Parameters
    ----------
    settings : TierSettings
    """

    def __init__(self, settings: TierSettings) -> None:
        remote = remote_in(open_tier(settings))
        if remote is None:
            raise StoreError(errno.EINVAL, "not a remote service", settings.url)
        self._remote = remote
        self._settings = settings
        self.name = settings.url

    @property
    def engine(self) -> Engine:
        """The tier's engine."""
        return self._remote.engine

    @property
    def trust(self) -> Trust:
        """Whose objects are trusted, and in whose name they are written."""
        return self._remote.trust

    def call(self, seconds: float, operation: Callable[..., R], *args: Any, tries: int = _TRIES, **named: Any) -> R:
        """Call the engine, with a few attempts if necessary (OSError if the last one fails)."""
        pause = _PAUSE
        while True:
            until = time.monotonic() + seconds
            try:
                if self.engine.keeps_time:
                    return operation(*args, **named, until=until)
                return within(until, functools.partial(operation, *args, **named, until=until))
            except OSError as exc:
                tries -= 1
                if not tries or exc.errno in _LASTING:
                    if isinstance(exc, TimeoutError):
                        raise StoreError(errno.ETIMEDOUT, exc.strerror or str(exc), self.name) from exc
                    raise
            time.sleep(pause * chance.uniform(0.5, 1.5))
            pause *= 2

    def objects(self, prefix: str) -> Iterator[Listed]:
        """List all objects whose names start with a prefix (StoreError if it can't list, or takes too long)."""
        try:
            yield from self.engine.list(prefix, until=time.monotonic() + _LISTING)
        except TimeoutError as exc:
            raise StoreError(errno.ETIMEDOUT, f"the listing {exc.strerror or exc}", self.name) from exc

    def listed(self, tree: str) -> Iterator[tuple[str, Listed]]:
        """List all programs or manifests, with their digests, without reading them."""
        for one in self.objects(tree):
            digest = digest_in(one.name)
            if is_digest(digest):
                yield digest, one

    def sizes(self, tree: str) -> dict[str, int]:
        """See :class:`Side`."""
        return {digest: listed.size for digest, listed in self.listed(tree)}

    def read(self, tree: str, digests: Sequence[str]) -> Iterator[Item | str]:
        """See :class:`Side`."""
        verifier = self.trust.verifier_of(tree)
        names = {object_name(tree, digest): digest for digest in digests}
        ask = functools.partial(self.call, self._settings.write_timeout, self.engine.get_many, limit=self._limit(tree))
        for name, packed in each_of(names, ask, self.name):
            if packed is None:
                continue
            digest = names[name]
            try:
                data, version = unpack(digest, packed)
                record = version.record()
            except DamagedObjectError:
                yield digest
                continue
            yield digest if verifier is not None and verifier(digest, data, record) else Item(digest, data, record)

    def write(self, tree: str, items: Sequence[Item]) -> int:
        """See :class:`Side`."""
        if tree == MANIFESTS:
            items = self._with_theirs(items)
        packed = {}
        for digest, data, record in items:
            content = pack(digest, data, self.trust.version(digest, data, record, time.time()))
            if len(content) <= self._limit(tree):
                packed[object_name(tree, digest)] = content
        for batch in batches(packed, lambda name: len(packed[name])):
            self.call(self._settings.write_timeout, self.engine.put_many, {name: packed[name] for name in batch})
        return len(packed)

    def _limit(self, tree: str) -> int:
        return most_bytes(tree, self._settings.max_bytes)

    def _with_theirs(self, items: Sequence[Item]) -> list[Item]:
        """The manifests, merged with those of the tier."""
        theirs = {
            one.digest: one
            for one in self.read(MANIFESTS, [item.digest for item in items])
            if isinstance(one, Item) and self._remote.may_sign(*one)
        }
        merged = []
        for item in items:
            there = theirs.get(item.digest)
            if there is None:
                merged.append(item)
                continue
            # A manifest to which nothing is added keeps its bytes and its record, and so its signature.
            content = merged_manifest(item.data, there.data) or item.data
            if content == item.data:
                gains = SIGNATURE in item.record and SIGNATURE not in there.record
                if content != there.data or gains:
                    merged.append(item)
            elif merged_manifest(there.data, item.data) != there.data:
                merged.append(Item(item.digest, content, {}))
        return merged

    def put(self, name: str, content: bytes) -> None:
        """Write one object."""
        self.call(self._settings.write_timeout, self.engine.put, name, content)

    def delete(self, names: Sequence[str]) -> None:
        """Remove objects."""
        self.call(self._settings.write_timeout, self.engine.delete, names)

    def asked(self) -> float:
        """Seconds that the lookup of a missing object takes (OSError if it fails)."""
        started = time.perf_counter()
        self.call(self._settings.timeout, self._remote._get_nothing, tries=1)
        return time.perf_counter() - started

    def close(self) -> None:
        """Close the connections."""
        self.engine.close()


def manifests_of(source: Side, digests: Collection[str] | None) -> Iterator[list[Item]]:
    """The manifests of a side, as they are copied, in groups; none if it can't list.

    Without them, the target compiles each program with headers once more.

    Parameters
    ----------
    source : Side
    digests : collection of str or None
        Only manifests that lead to these programs.
    """
    try:
        names = sorted(source.sizes(MANIFESTS))
    except OSError:
        return
    for batch in batches(names, lambda _: 0):
        items = []
        for one in source.read(MANIFESTS, batch):
            content = leading_to(one.data, digests) if isinstance(one, Item) else None
            if isinstance(one, Item) and content is not None:
                items.append(one if content == one.data else Item(one.digest, content, {}))
        yield items

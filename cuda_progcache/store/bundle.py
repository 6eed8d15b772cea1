# SPDX-License-Identifier: Apache-2.0
"""Bundles: a cache, or part of one, as one file.

A bundle is an uncompressed tar archive (POSIX ustar) that any ``tar`` lists and unpacks, in this order::

    entries/ab/cdef...      each entry, as it lies in a cache, by digest
    records/ab/cdef...      and its record
    manifests/ab/cdef...    the header manifests that their keys are found by
    bundle.json             {"format": 1, "files": {name: {"size", "sha256"}}}: every file before it;
                            in a tier's signed pack also "signature", over those files

Owners, modes and times are fixed, so that the same entries give the same bytes. ``bundle.json`` comes last, so a
truncated archive has none. Files are read from a bundle by digest, and verified; their names are never used as paths.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util.files import CREATE_FLAGS, replace, unlink_quietly
from cuda_progcache._util.liveness import current_owner
from cuda_progcache.errors import BundleError
from cuda_progcache.store.compile_record import CompileRecord
from cuda_progcache.store.derived import leading_to, manifest_sets, manifests_leading_to, merge_manifest
from cuda_progcache.store.judge import judge, look, lstat
from cuda_progcache.store.records import DamagedRecordError, Version, decode, encode

if TYPE_CHECKING:
    import tarfile

    from cuda_progcache.store.base import EntryInfo, ProgramCacheResource
    from cuda_progcache.store.root import Root

FORMAT = 1
_INDEX = "bundle.json"
_NAME = re.compile(r"(entries|records|manifests)/([0-9a-f]{2})/([0-9a-f]{62})")

_serial = itertools.count()


class ExportReport(NamedTuple):
    """What went into a bundle: entries, bytes of the bundle, and damaged entries that were left out."""

    path: str
    entries: int
    bytes: int
    damaged: int


class _Imported(NamedTuple):
    imported: int
    bytes: int
    present: int
    filtered: int
    refused: int


class ImportReport(_Imported):
    """What came out of a bundle.

    Attributes
    ----------
    imported, bytes : int
        Entries that are new here, and their bytes.
    present : int
        Entries that were here already.
    filtered : int
        Entries for other architectures.
    refused : int
        Entries larger than the size cap.
    differing : int
        How many of those already here have bytes other than the bundle's. They are left unchanged.
    """

    differing: int = 0

    def _asdict(self) -> dict[str, int]:
        return {**super()._asdict(), "differing": self.differing}


# Writing


def export(
    cache: ProgramCacheResource,
    root: Root,
    path: str,
    archs: frozenset[str] | None,
    wanted: Callable[[EntryInfo], bool] | None,
) -> ExportReport:
    """Write a bundle; see :meth:`FileStreamProgramCache.export`."""
    folder = os.path.dirname(os.path.abspath(path))
    # Not named after the bundle, whose name may have the maximum length.
    staged = os.path.join(folder, f".bundle.{current_owner()}-{next(_serial)}")
    try:
        with os.fdopen(os.open(staged, CREATE_FLAGS, 0o666), "wb") as file:
            entries, damaged = _write(file, cache, root, archs, wanted)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        replace(staged, path)
    except BaseException:
        unlink_quietly(staged)
        raise
    return ExportReport(path, entries, size, damaged)


def _write(
    file: IO[bytes],
    cache: ProgramCacheResource,
    root: Root,
    archs: frozenset[str] | None,
    wanted: Callable[[EntryInfo], bool] | None,
) -> tuple[int, int]:
    damaged = 0

    def chosen() -> Iterator[tuple[str, bytes, Version]]:
        nonlocal damaged
        for digest in sorted(cache._digests("")):
            try:
                info = cache.info(digest)
            except KeyError:
                info = None
            if info is not None and not _fits(info.about, archs):
                continue
            if info is not None and wanted is not None and not wanted(info):
                continue
            seen = None if info is None else look(root, digest, quietly=True)
            if seen is None or seen.version is None or seen.data is None:
                damaged += lstat(root.entry_path(digest)) is not None  # otherwise it has just been removed
                continue
            yield digest, seen.data, seen.version

    return write(file, chosen(), lambda digests: manifests_leading_to(root.path, digests)), damaged


def write(
    file: IO[bytes],
    programs: Iterable[tuple[str, bytes, Version]],
    manifests: Callable[[Collection[str]], Iterable[tuple[str, bytes]]],
    seal: Callable[[bytes], Mapping[str, Any]] = lambda _: {},
) -> int:
    """Write programs as a bundle, and return their number.

    Parameters
    ----------
    file : binary file
    programs : iterable of (str, bytes, Version)
        Digest, entry, and the version that vouches for it.
    manifests : callable
        Names and contents of the header manifests that lead to these digests.
    seal : callable
        Returns further fields for the index, given the JSON that lists the files.
    """
    import tarfile

    files: dict[str, dict[str, Any]] = {}
    digests: set[str] = set()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for digest, data, version in programs:
            _add(tar, files, _member("entries", digest), data)
            _add(tar, files, _member("records", digest), encode(digest, [version]))
            digests.add(digest)
        for manifest, content in manifests(digests):
            _add(tar, files, _member("manifests", manifest), content)
        index = {"format": FORMAT, "files": files, **seal(_canonical(files))}
        _add(tar, {}, _INDEX, json.dumps(index, indent=0, sort_keys=True).encode("ascii"))
    return len(digests)


def _canonical(files: Any) -> bytes:
    return json.dumps(files, sort_keys=True, separators=(",", ":")).encode("ascii")


def _fits(about: CompileRecord, archs: frozenset[str] | None) -> bool:
    return archs is None or about.arch in archs


def _member(tree: str, digest: str) -> str:
    return f"{tree}/{digest[:2]}/{digest[2:]}"


def _add(tar: tarfile.TarFile, files: dict[str, dict[str, Any]], name: str, data: bytes) -> None:
    import io
    import tarfile

    member = tarfile.TarInfo(name)  # mode 0644, and zeros and empty names for owner and times
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
    files[name] = {"size": len(data), "sha256": _sha256(data)}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data, usedforsecurity=False).hexdigest()


# Reading


class Bundle:
    """An open bundle, all of it verified; made by :func:`opened`.

    Attributes
    ----------
    digests : tuple of str
        The entries in it, sorted.
    files : bytes
        The JSON that lists its files, as it was sealed.
    seal : mapping
        The index's other fields.
    """

    def __init__(self, path: str, tar: tarfile.TarFile) -> None:
        self._path = path
        self._tar = tar
        self._members: dict[str, tarfile.TarInfo] = {}
        self._index: dict[str, Any] = {}
        self._take_members()
        self._take_index()
        self.digests = self._of("entries")
        if self._of("records") != self.digests:
            raise self.refuse("its entries and records don't match")

    def refuse(self, why: str) -> BundleError:
        """The error to raise, with the reason."""
        return BundleError(f"{self._path} can't be used as a bundle: {why}")

    def _take_members(self) -> None:
        import tarfile

        for member in self._tar:
            name = member.name
            if name != _INDEX and not _NAME.fullmatch(name):
                raise self.refuse(f"it contains {name!r}, which is not a path of a cache file")
            # By the raw type: links, devices, FIFOs, directories and sparse files aren't allowed.
            if member.type not in {tarfile.REGTYPE, tarfile.AREGTYPE} or member.pax_headers:
                raise self.refuse(f"{name} isn't a regular file (was it repacked by another tool?)")
            if name in self._members:
                raise self.refuse(f"it contains {name} twice")
            self._members[name] = member

    def _take_index(self) -> None:
        member = self._members.pop(_INDEX, None)
        if member is None:
            raise self.refuse(f"it has no {_INDEX}: it is truncated, or not a bundle")
        if any(other.offset > member.offset for other in self._members.values()):
            raise self.refuse(f"there are files after {_INDEX}")
        try:
            index = json.loads(self._data(member))
            known, files = index["format"], index["files"]
            if known != FORMAT:
                raise self.refuse(f"its format is {known!r}, and this version reads format {FORMAT}")
            if {name: int(about["size"]) for name, about in files.items()} != {
                name: member.size for name, member in self._members.items()
            }:
                raise self.refuse(f"its files aren't those that {_INDEX} names")
            self._index = {name: str(about["sha256"]) for name, about in files.items()}
            self.files = _canonical(files)
            self.seal = {name: value for name, value in index.items() if name not in {"format", "files"}}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            if isinstance(exc, BundleError):
                raise
            raise self.refuse(f"{_INDEX} is damaged ({type(exc).__name__}: {exc})") from exc

    def _of(self, tree: str) -> tuple[str, ...]:
        found = (_NAME.fullmatch(name) for name in self._members)
        return tuple(sorted(match[2] + match[3] for match in found if match is not None and match[1] == tree))

    def _data(self, member: tarfile.TarInfo) -> bytes:
        file = self._tar.extractfile(member)
        data = b"" if file is None else file.read()
        if len(data) != member.size:
            raise self.refuse(f"{member.name} is truncated")
        return data

    def _file(self, tree: str, digest: str) -> bytes:
        name = _member(tree, digest)
        data = self._data(self._members[name])
        if _sha256(data) != self._index[name]:
            raise self.refuse(f"{name} doesn't have the checksum that {_INDEX} gives")
        return data

    def version(self, digest: str) -> tuple[Version, CompileRecord]:
        """An entry's version, and what its record says."""
        try:
            (version,) = decode(self._file("records", digest), digest)
            about = CompileRecord(version.record())
            version = version._replace(created=min(float(version.created), time.time()))
        except (DamagedRecordError, ValueError, TypeError, RecursionError) as exc:
            if isinstance(exc, BundleError):
                raise
            raise self.refuse(f"the record of {digest} is damaged ({exc})") from exc
        return version, about

    def entry(self, digest: str, version: Version) -> bytes:
        """An entry's bytes."""
        data = self._file("entries", digest)
        if isinstance(judge(digest, data, encode(digest, [version])), str):
            raise self.refuse(f"entry {digest} doesn't match its record")
        return data

    def manifests(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the header manifests."""
        for manifest in self._of("manifests"):
            content = self._file("manifests", manifest)
            if manifest_sets(content) is None:
                raise self.refuse(f"manifest {manifest} is damaged")
            yield manifest, content


@contextlib.contextmanager
def opened(path: str) -> Iterator[Bundle]:
    """Open a bundle and check its structure.

    Raises
    ------
    BundleError
        The file isn't a valid bundle.
    OSError
        The file can't be read.
    """
    with open(path, "rb") as file, opened_file(file, path) as bundle:
        yield bundle


@contextlib.contextmanager
def opened_file(file: IO[bytes], name: str) -> Iterator[Bundle]:
    """As :func:`opened`, for an open file; ``name`` is used in messages."""
    import tarfile

    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield Bundle(name, tar)
    except (tarfile.TarError, EOFError, UnicodeError, OverflowError) as exc:
        raise BundleError(f"{name} can't be used as a bundle: it is not a tar file, or a damaged one ({exc})") from exc


def import_bundle(
    root: Root, path: str, archs: frozenset[str] | None, put: Callable[[str, bytes, bytes, float], bool]
) -> ImportReport:
    """Read a bundle into a cache; see :meth:`FileStreamProgramCache.import_`.

    Parameters
    ----------
    put : callable
        Stores digest, bytes, record (JSON) and time of publication; returns False if the size cap doesn't allow it.
    """
    with opened(path) as bundle:
        wanted = []
        for digest in bundle.digests:
            version, about = bundle.version(digest)
            bundle.entry(digest, version)
            if _fits(about, archs):
                wanted.append(digest)
        manifests = list(bundle.manifests())
        # The whole bundle is valid: write it.
        imported = size = present = refused = differing = 0
        for digest in wanted:
            version, _ = bundle.version(digest)
            here = look(root, digest, quietly=True)
            if here.version is not None:
                present += 1
                differing += here.version.checksum != version.checksum
                continue
            data = bundle.entry(digest, version)
            if put(digest, data, version.record_json, version.created):
                imported, size = imported + 1, size + len(data)
            else:
                refused += 1
        for manifest, content in manifests:
            if (travelling := leading_to(content, None)) is not None:
                merge_manifest(root.path, manifest, travelling)
        report = ImportReport(imported, size, present, len(bundle.digests) - len(wanted), refused)
        report.differing = differing
        return report

# SPDX-License-Identifier: Apache-2.0
"""Export of the programs that a deploy needs, as an OCI image layout or a wheel.

Both contain a cache directory of these programs: entries, records, header manifests, and the compilers that made them.
The same programs give the same bytes.

* An OCI image layout (OCI image-spec 1.1: ``oci-layout``, ``index.json``, ``blobs/sha256``) has one layer, with the
  cache at its root: mounted as a Kubernetes image volume or a bind mount, it is the cache.
* The files of a wheel (PEP 427) are a read-only layer that the default cache finds by itself
  (:mod:`cuda_progcache.store.layers`).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import re
from base64 import urlsafe_b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util.files import put_in_place
from cuda_progcache._util.scratch import ScratchFolder
from cuda_progcache.compile import history, toolchains
from cuda_progcache.errors import ExportError
from cuda_progcache.keys.toolchain import ToolFile
from cuda_progcache.store.layers import GROUP

if TYPE_CHECKING:
    from cuda_progcache.service.proof import Proof
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache

#: The exported parts of a cache directory; the other parts only concern the current machine.
_PARTS = ("CACHEDIR.TAG", "entries", "latest", "manifests", "records", "toolchains")
_LABELS = "cache.progcache.image"
_MEDIA = "application/vnd.oci.image"


class Exported(NamedTuple):
    """An export that was written: its path, and the number and total size of its entries."""

    path: str
    entries: int
    bytes: int


def needed(proof: Proof, cache: FileStreamProgramCache) -> frozenset[str]:
    """Return the digests of the entries of a proof's programs, and of the entries that they were linked from.

    Raises
    ------
    ExportError
        If a program isn't in the cache, so the export would be incomplete.
    """
    gone = [program for program in proof.programs if program.status in {"missing", "stale", "failed"}]
    if gone:
        first = f"{gone[0].title}: {'; '.join(gone[0].reasons)}"
        raise ExportError(
            f"{len(gone):,} of {len(proof.programs):,} programs can't be exported, since the cache doesn't have the "
            f"versions needed ({first}); nothing was written; cuda-progcache check lists these programs"
        )
    found: set[str] = set()
    for program in proof.programs:
        if program.digest is not None:
            found.add(program.digest)
            found |= {part.digest for part in cache.info(program.digest).about.inputs if part.digest}
    return frozenset(found)


@contextmanager
def cache_directory(
    cache: FileStreamProgramCache, wanted: Callable[[EntryInfo], bool]
) -> Iterator[tuple[str, Exported]]:
    """Make a temporary cache directory of some of a cache's programs, removed when the block ends."""
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    with ScratchFolder("progcache-export-") as folder:
        bundle, root = os.path.join(folder, "bundle.tar"), os.path.join(folder, "cache")
        cache.export(bundle, filter=wanted)
        with FileStreamProgramCache(root, durability="none", mode="rw") as copy:
            report = copy.import_(bundle)
            for digest in sorted(copy.digests()):
                about = copy.info(digest).about
                if about.is_compile:  # not stored by hand
                    history.note(copy, about, digest, made_here=False)
                    toolchains.note(copy, (ToolFile(tool.name, "", tool.digest) for tool in about.toolchain))
        os.unlink(bundle)
        yield root, Exported(root, report.imported, report.bytes)


def _files(root: str) -> Iterator[tuple[str, bytes]]:
    """Yield the names, relative to the root, and contents of a cache directory's files, in a fixed order."""
    for part in _PARTS:
        top = os.path.join(root, part)
        if os.path.isfile(top):
            with open(top, "rb") as file:
                yield part, file.read()
        for folder, folders, names in os.walk(top):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    yield os.path.relpath(path, root).replace(os.sep, "/"), file.read()


def write_oci(
    cache: FileStreamProgramCache,
    path: str | os.PathLike[str],
    wanted: Callable[[EntryInfo], bool],
    *,
    tag: str = "latest",
) -> Exported:
    """Write an OCI image layout.

    Parameters
    ----------
    cache : FileStreamProgramCache
    path : str or os.PathLike
        The directory of the layout; it must be empty or not exist.
    wanted : callable
        Returns whether to export an entry.
    tag : str
        The image's name in the layout (``skopeo inspect oci:DIR:latest``).

    Raises
    ------
    ExportError
        If the path exists and isn't an empty directory.
    OSError
        If the layout can't be written.
    """
    target = os.path.abspath(os.fspath(path))
    if os.path.lexists(target) and not (os.path.isdir(target) and not os.listdir(target)):
        raise ExportError(f"{target} already exists and is not an empty directory; nothing was written")
    with cache_directory(cache, wanted) as (root, report):
        plain = _tar(_files(root))
    # Compressed now, reproducibly: otherwise the tool that pushes the image does it, and the digest changes.
    layer = gzip.compress(plain, mtime=0)
    labels = {
        f"{_LABELS}/summary": _summary(report),
        f"{_LABELS}/entry-count": str(report.entries),
        f"{_LABELS}/cache-size-bytes": str(report.bytes),
    }
    os.makedirs(os.path.join(target, "blobs", "sha256"), exist_ok=True)

    def blob(data: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        _write(os.path.join(target, "blobs", "sha256", digest), data)
        return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(data)}

    layer_blob = blob(layer, f"{_MEDIA}.layer.v1.tar+gzip")
    config = {
        "architecture": {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Labels": labels},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(plain).hexdigest()}"]},
        "history": [{"created_by": "cuda-progcache export --oci"}],
    }
    config_blob = blob(_json(config), f"{_MEDIA}.config.v1+json")
    manifest = {
        "schemaVersion": 2,
        "mediaType": f"{_MEDIA}.manifest.v1+json",
        "config": config_blob,
        "layers": [layer_blob],
        "annotations": labels,
    }
    manifest_blob = blob(_json(manifest), f"{_MEDIA}.manifest.v1+json")
    named = {**manifest_blob, "annotations": {"org.opencontainers.image.ref.name": tag}}
    index = {"schemaVersion": 2, "mediaType": f"{_MEDIA}.index.v1+json", "manifests": [named]}
    _write(os.path.join(target, "index.json"), _json(index))
    _write(os.path.join(target, "oci-layout"), _json({"imageLayoutVersion": "1.0.0"}))
    return report._replace(path=target)


def write_wheel(
    cache: FileStreamProgramCache,
    folder: str | os.PathLike[str],
    wanted: Callable[[EntryInfo], bool],
    *,
    name: str,
    version: str = "1.0",
) -> Exported:
    """Write a wheel whose files are a read-only layer.

    Parameters
    ----------
    cache : FileStreamProgramCache
    folder : str or os.PathLike
        The folder to write the wheel to; created if it doesn't exist.
    wanted : callable
        Returns whether to export an entry.
    name, version : str
        The distribution's name and version, such as ``"my-kernels-sm90"`` and ``"1.0"``.

    Raises
    ------
    ExportError
        If the name or the version is invalid (PEP 508, PEP 440).
    OSError
        If the wheel can't be written.
    """
    import zipfile

    if not re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise ExportError(
            f"{name!r} is not a valid distribution name (letters, digits, '.', '-' and '_'); nothing was written"
        )
    if not re.fullmatch(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[a-z0-9]+(\.[a-z0-9]+)*)?", version):
        raise ExportError(f"{version!r} is not a valid version, such as 1.0 or 1.0.post1; nothing was written")
    package = re.sub(r"[-_.]+", "_", name).lower()
    package = package if package.isidentifier() else f"_{package}"
    info = f"{re.sub(r'[-_.]+', '_', name).lower()}-{version}.dist-info"
    with cache_directory(cache, wanted) as (root, report):
        files = [(f"{package}/layer/{part}", data) for part, data in _files(root)]
    summary = _summary(report)
    files += [
        (f"{package}/__init__.py", f'"""Compiled CUDA programs for cuda_progcache: {summary}."""\n'.encode()),
        (
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n"
            "Requires-Dist: cuda-progcache\n".encode(),
        ),
        (f"{info}/WHEEL", b"Wheel-Version: 1.0\nGenerator: cuda-progcache\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
        (f"{info}/entry_points.txt", f"[{GROUP}]\n{name} = {package}.layer\n".encode()),
    ]
    lines = [f"{part},sha256={_hash(data)},{len(data)}\n" for part, data in files]
    files.append((f"{info}/RECORD", "".join([*lines, f"{info}/RECORD,,\n"]).encode()))
    os.makedirs(folder, exist_ok=True)
    target = os.path.join(os.path.abspath(os.fspath(folder)), f"{info.removesuffix('.dist-info')}-py3-none-any.whl")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as wheel:
        for part, data in files:
            member = zipfile.ZipInfo(part, (1980, 1, 1, 0, 0, 0))
            member.external_attr = 0o100644 << 16
            wheel.writestr(member, data, zipfile.ZIP_DEFLATED)
    _write(target, content.getvalue())
    return report._replace(path=target)


def _summary(report: Exported) -> str:
    return f"{report.entries} compiled CUDA programs, {report.bytes} bytes"


def _hash(data: bytes) -> str:
    return urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode("ascii")


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1).encode("ascii") + b"\n"


def _tar(files: Iterable[tuple[str, bytes]]) -> bytes:
    """Return a tar archive of files and their folders, owned by root and readable by everyone."""
    import tarfile

    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        known: set[str] = set()
        for name, data in files:
            above = name.split("/")[:-1]
            for depth in range(1, len(above) + 1):
                if (folder := "/".join(above[:depth])) not in known:
                    known.add(folder)
                    member = tarfile.TarInfo(folder)
                    member.type, member.mode = tarfile.DIRTYPE, 0o755
                    tar.addfile(member)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def _write(path: str, data: bytes) -> None:
    """Write a file atomically."""
    put_in_place(path, data, staged=f"{path}.{os.getpid()}.tmp", mode=0o666)

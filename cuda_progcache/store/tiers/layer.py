# SPDX-License-Identifier: Apache-2.0
"""A cache directory as a read-only tier. Its contents are verified like a tier's objects."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NoReturn

from cuda_progcache.errors import StoreError
from cuda_progcache.store.derived import manifest_path, manifests_in, read_manifest
from cuda_progcache.store.records import Version, encode_record
from cuda_progcache.store.tiers.engine import Engine, Listed, TooLargeError
from cuda_progcache.store.tiers.envelope import MANIFESTS, PROGRAMS, digest_in, object_name, pack

if TYPE_CHECKING:
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.tiers.settings import TierSettings


class LayerEngine(Engine):
    """The programs and header manifests in a directory.

    Parameters
    ----------
    settings : TierSettings
        The settings of a ``file`` URL.
    """

    def __init__(self, settings: TierSettings) -> None:
        self.name = settings.url
        self._settings = settings
        self._layer: FileStreamProgramCache | None = None

    def layer(self, until: float) -> FileStreamProgramCache:  # noqa: ARG002 - a subclass fetches it first
        """The directory.

        Raises
        ------
        StoreError
            The directory doesn't exist.
        """
        if self._layer is None:
            from cuda_progcache.store.reader import Reader

            self._layer = Reader(self._settings.path, shared=True)
        return self._layer

    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """The object of that name, made from the files in the directory."""
        digest = digest_in(name)
        if name.startswith(PROGRAMS):
            return self._program(digest, limit, until)
        return self._manifest(digest, limit, until) if name.startswith(MANIFESTS) else None

    def _program(self, digest: str, limit: int, until: float) -> bytes | None:
        layer = self.layer(until)
        try:
            info = layer.info(digest)
        except KeyError:
            return None
        if info.size > limit:
            why = f"a program has {info.size} bytes, more than the limit of {limit}"
            raise TooLargeError(errno.EFBIG, why, self.name)
        entry = layer._examine(digest, with_record=True)
        if entry is None:
            return None
        return pack(digest, entry.data, Version.of(entry.data, encode_record(entry.record), info.created))

    def _manifest(self, name: str, limit: int, until: float) -> bytes | None:
        content = read_manifest(self.layer(until).directory, name, largest=limit)
        return None if content is None else pack(name, content, Version.of(content, b"{}", 0))

    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """List the programs and header manifests."""
        layer = self.layer(until)
        if not prefix.startswith(MANIFESTS):
            for entry in layer.entries():
                name = object_name(PROGRAMS, entry.digest)
                if name.startswith(prefix):
                    yield Listed(name, entry.size, entry.created)
        for digest in () if prefix.startswith(PROGRAMS) else manifests_in(str(layer.path)):
            name = object_name(MANIFESTS, digest)
            if not name.startswith(prefix):
                continue
            try:
                status = os.stat(manifest_path(layer.path, digest))
            except FileNotFoundError:
                continue  # removed meanwhile
            yield Listed(name, status.st_size, status.st_mtime)

    def put(self, name: str, data: bytes, *, until: float) -> NoReturn:  # noqa: ARG002
        """Refuse: a layer isn't written to."""
        raise StoreError(errno.EROFS, "a layer is read-only", self.name)

    def delete(self, names: Iterable[str], *, until: float) -> NoReturn:  # noqa: ARG002
        """Refuse, as :meth:`put`."""
        raise StoreError(errno.EROFS, "a layer is read-only", self.name)

    def close(self) -> None:
        """Do nothing: nothing is open."""

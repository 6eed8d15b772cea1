# SPDX-License-Identifier: Apache-2.0
"""An image in an OCI registry as a tier that is only read: the layer that ``cuda-progcache export --oci`` makes.

The layer is pulled when something is first looked for, and unpacked once into the user's cache directory, under the
digest of the image's manifest; each process after that reads it there. An image that the URL names by its digest
(``oci://registry/name@sha256:...``) is asked for at no registry once it lies there.

Of the registry's answers only digests are believed: a manifest that the URL names by one has that digest, and the
layer the one that the manifest has. Sizes are checked before anything is read. From the layer come plain files under
the names of a cache directory and nothing else: any other member (a link, a device, a path that leads elsewhere) and
the layer isn't used.

Sources: OCI Distribution 1.1 (pull), OCI Image 1.1 (manifest, index, layer), Docker's token authentication.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urljoin, urlsplit

from cuda_progcache._util import forks
from cuda_progcache._util.user_dirs import user_cache_dir
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.layer import LayerEngine
from cuda_progcache.store.tiers.timed_http import Answer, HttpClient, authorization

if TYPE_CHECKING:
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.tiers.settings import TierSettings

_MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
#: Bytes that a manifest, a layer as it is sent, and one unpacked may have, and files in it.
_MANIFEST, _LAYER, _UNPACKED, _FILES = 4 << 20, 1 << 30, 4 << 30, 1_000_000
#: Seconds that a pull may take in all; it goes on when the look-up that asked for it has given up.
_PULL = 600.0
#: Redirects that are followed to a layer, which registries keep elsewhere.
_HOPS = 3
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,200}")
#: The folders of a cache directory, and its tag.
_FOLDERS = frozenset({"entries", "latest", "manifests", "records", "toolchains"})
_TAG = "CACHEDIR.TAG"


class OciEngine(LayerEngine):
    """The programs and header manifests in an image's layer.

    Parameters
    ----------
    settings : TierSettings
        Of an ``oci`` URL.
    """

    def __init__(self, settings: TierSettings) -> None:
        super().__init__(settings)
        path, _, digest = settings.path.partition("@")
        head, colon, tag = path.rpartition(":")
        self._repository, self._reference = (head, tag) if colon else (path, "latest")
        self._wanted = digest or None
        self._renew()
        forks.in_child(self._renew)

    def _renew(self) -> None:
        """Make the lock anew: in a forked child nobody pulls."""
        self._lock = threading.Lock()

    @property
    def pinned(self) -> bool:  # type: ignore[override]
        """Whether the URL names the image by its digest."""
        return self._wanted is not None

    # Getting it

    def layer(self, until: float) -> FileStreamProgramCache:
        """The layer, unpacked; one thread of the process gets it, and those that can't wait for it say so."""
        if self._layer is not None:
            return self._layer
        if not self._lock.acquire(timeout=max(until - time.monotonic(), 0.0)):
            raise TimeoutError(errno.ETIMEDOUT, "still being pulled", self.name)
        try:
            if self._layer is None:
                from cuda_progcache.store.reader import Reader

                try:
                    self._layer = Reader(self._directory())
                except TooLargeError as exc:  # an answer of the registry's is; nothing is known of the object
                    raise StoreError(exc.errno, exc.strerror, self.name) from exc
            return self._layer
        finally:
            self._lock.release()

    def _directory(self) -> str:
        """Where the image lies unpacked; it is pulled if it doesn't yet."""
        try:
            root = os.path.join(user_cache_dir(), "cuda-progcache-images")
            os.makedirs(root, mode=0o700, exist_ok=True)
        except OSError as exc:
            raise StoreError(
                exc.errno, f"can't unpack the image in the user's cache ({exc.strerror})", self.name
            ) from exc
        if self._wanted is not None and os.path.isdir(place := _place(root, self._wanted)):
            return place
        registry = _Registry(self._settings, self._repository)
        digest, manifest = registry.image(self._wanted or self._reference)
        place = _place(root, digest)
        if not os.path.isdir(place):
            layer = self._layer_of(manifest)
            self._unpack(registry.blob(layer["digest"], layer["size"]), root, place)
        return place

    def _layer_of(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """The one layer of an image that ``export --oci`` made."""
        layers = manifest.get("layers")
        if isinstance(layers, list) and len(layers) == 1 and isinstance(layers[0], dict):
            layer: dict[str, Any] = layers[0]
            size = layer.get("size")
            if _is_digest(layer.get("digest")) and isinstance(size, int) and not isinstance(size, bool):
                if 0 < size <= _LAYER:
                    return layer
                raise StoreError(errno.EFBIG, f"the layer has {size} bytes, more than the limit of {_LAYER}", self.name)
        raise StoreError(
            errno.EPROTO, "not an image with one layer, as cuda-progcache export --oci makes it", self.name
        )

    def _unpack(self, layer: bytes, root: str, place: str) -> None:
        staged = tempfile.mkdtemp(prefix=".unpacking-", dir=root)
        try:
            for name, content in self._files(layer):
                path = os.path.join(staged, *name.split("/"))
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "xb") as file:
                    file.write(content)
            if not os.path.isdir(os.path.join(staged, "entries")):
                raise StoreError(errno.EPROTO, "the layer contains no programs", self.name)
            try:
                os.rename(staged, place)
            except OSError:
                if not os.path.isdir(place):  # else another process has just done the same
                    raise
        except FileExistsError as exc:
            raise self._refuse("contains a file twice") from exc
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _files(self, layer: bytes) -> Iterator[tuple[str, bytes]]:
        """Names and contents of a layer's files, in the order of the archive."""
        import tarfile

        count = total = 0
        try:
            with tarfile.open(fileobj=io.BytesIO(self._plain(layer)), mode="r:") as tar:
                for member in tar:
                    count += 1
                    if count > _FILES:
                        raise self._refuse(f"contains more than {_FILES} files")
                    if member.isdir():
                        continue
                    if not member.isreg() or member.sparse is not None:
                        raise self._refuse(f"contains {member.name[:100]!r}, which is not a regular file")
                    if not _is_ours(member.name):
                        raise self._refuse(f"contains {member.name[:100]!r}, which doesn't belong in a cache directory")
                    total += member.size
                    if total > _UNPACKED:
                        raise self._refuse(f"unpacks to more than {_UNPACKED} bytes")
                    file = tar.extractfile(member)
                    content = b"" if file is None else file.read()
                    if len(content) != member.size:
                        raise self._refuse("is truncated")
                    yield member.name, content
        except (tarfile.TarError, EOFError, UnicodeError, OverflowError, ValueError) as exc:
            raise self._refuse(f"can't be read ({type(exc).__name__}: {exc})") from exc

    def _plain(self, layer: bytes) -> bytes:
        """A layer without its compression, as far as it may get that large."""
        if not layer.startswith(b"\x1f\x8b"):
            return layer
        inflate = zlib.decompressobj(wbits=31)
        # The contents of cubins shrink to a third, and their padding to a thousandth: what shrinks further is a bomb.
        most = min(_UNPACKED, 100 * len(layer) + (16 << 20))
        try:
            plain = inflate.decompress(layer, most)
        except zlib.error as exc:
            raise self._refuse(f"can't be unpacked ({exc})") from exc
        if inflate.unconsumed_tail or not inflate.eof:
            raise self._refuse("is truncated, or unpacks to an implausible size")
        return plain

    def _refuse(self, why: str) -> StoreError:
        return StoreError(errno.EPROTO, f"the layer {why}; none of it is used", self.name)


class _Registry:
    """Pulls from one repository of a registry.

    Parameters
    ----------
    settings : TierSettings
    repository : str
    """

    def __init__(self, settings: TierSettings, repository: str) -> None:
        self._settings = settings
        self._name = settings.url
        self._until = time.monotonic() + _PULL
        self._path = f"/v2/{quote(repository)}"
        port = "" if settings.port is None else f":{settings.port}"
        self._base = f"{'https' if settings.tls else 'http'}://{settings.host}{port}"
        self._client = self._to(self._base)
        self._entrance: dict[str, str] = {}

    def _to(self, url: str) -> HttpClient:
        return HttpClient(url, connect_timeout=self._settings.connect_timeout, ca_file=self._settings.ca_file)

    def image(self, reference: str) -> tuple[str, Mapping[str, Any]]:
        """The digest of an image's manifest, and the manifest."""
        for _ in range(2):
            target = f"{self._path}/manifests/{quote(reference, safe=':')}"
            answer = self._ask(target, _MANIFEST, {"Accept": ", ".join(_MANIFESTS)})
            digest = f"sha256:{hashlib.sha256(answer.data).hexdigest()}"
            if _is_digest(reference) and digest != reference:
                raise StoreError(errno.EPROTO, f"the registry returned a manifest other than {reference}", self._name)
            manifest = self._json(answer.data, "manifest")
            if "manifests" not in manifest:
                return digest, manifest
            reference = self._only(manifest["manifests"])
        raise StoreError(errno.EPROTO, "the image is an index of indexes", self._name)

    def _only(self, listed: Any) -> str:
        """The one image of an index."""
        if isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], dict):
            digest = listed[0].get("digest")
            if _is_digest(digest):
                return str(digest)
        raise StoreError(errno.EPROTO, "the index must list exactly one image", self._name)

    def blob(self, digest: str, size: int) -> bytes:
        """A blob, of that digest."""
        data = self._ask(f"{self._path}/blobs/{digest}", size, {}).data
        if len(data) != size or f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
            raise StoreError(errno.EPROTO, f"the registry returned something else for {digest}", self._name)
        return data

    def _ask(self, target: str, limit: int, headers: Mapping[str, str]) -> Answer:
        answer = self._get(self._client, target, limit, headers)
        if answer.status == 401 and not self._entrance:
            self._entrance = self._enter(answer.headers.get("WWW-Authenticate", ""))
            answer = self._get(self._client, target, limit, headers)
        url = urljoin(self._base, target)
        for _ in range(_HOPS):
            if answer.status not in {301, 302, 303, 307, 308}:
                break
            url = urljoin(url, answer.headers.get("Location", ""))
            parts = urlsplit(url)
            if parts.scheme not in {"http", "https"} or (self._settings.tls and parts.scheme != "https"):
                raise StoreError(errno.EPROTO, "the registry redirects to something other than HTTPS", self._name)
            client = self._to(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
            # Where the layers are kept, which is another's: nobody says there who asks.
            answer = client.exchange("GET", url.partition(parts.netloc)[2] or "/", until=self._until, limit=limit)
            client.close()
        if answer.status != 200:
            raise self._refused(answer.status)
        return answer

    def _refused(self, status: int) -> StoreError:
        code = errno.EACCES if status in {401, 403} else errno.EIO
        return StoreError(code, f"the registry answered {status}", self._name)

    def _get(self, client: HttpClient, target: str, limit: int, headers: Mapping[str, str]) -> Answer:
        return client.exchange("GET", target, until=self._until, limit=limit, headers={**headers, **self._entrance})

    def _enter(self, challenge: str) -> dict[str, str]:
        """What lets us in, by what a registry's 401 asks for: name and password, or a token that these get."""
        basic = authorization(self._settings.credentials)
        if self._settings.credentials.token is not None:
            return basic
        kind, _, rest = challenge.partition(" ")
        if kind.lower() != "bearer":
            return basic
        asked = dict(re.findall(r'([a-z]+)="([^"]*)"', rest))
        parts = urlsplit(asked.get("realm", ""))
        if parts.scheme not in {"http", "https"} or (self._settings.tls and parts.scheme != "https"):
            return basic
        query = urlencode({name: asked[name] for name in ("service", "scope") if name in asked})
        client = self._to(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
        given = client.exchange("GET", f"{parts.path}?{query}", until=self._until, limit=1 << 16, headers=basic)
        client.close()
        if given.status != 200:
            raise StoreError(errno.EACCES, f"the registry answered {given.status} to a request for a token", self._name)
        told = self._json(given.data, "token")
        found = told.get("token") or told.get("access_token")
        if not isinstance(found, str) or not found.isprintable():
            raise StoreError(errno.EPROTO, "the registry returned no token", self._name)
        return {"Authorization": f"Bearer {found}"}

    def _json(self, text: bytes, what: str) -> Mapping[str, Any]:
        try:
            told = json.loads(text)
        except (ValueError, RecursionError) as exc:
            raise StoreError(errno.EPROTO, f"the registry's {what} is not JSON", self._name) from exc
        if not isinstance(told, dict):
            raise StoreError(errno.EPROTO, f"the registry's {what} is not a JSON object", self._name)
        return told


def _is_digest(text: object) -> bool:
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _place(root: str, digest: str) -> str:
    return os.path.join(root, digest.replace(":", "-"))


def _is_ours(name: str) -> bool:
    """Whether a cache directory has files called so."""
    first, *rest = name.split("/")
    return name == _TAG or (first in _FOLDERS and 0 < len(rest) <= 4 and all(map(_NAME.fullmatch, rest)))

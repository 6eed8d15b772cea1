# SPDX-License-Identifier: Apache-2.0
"""An image in an OCI registry as a read-only tier: the layer that ``cuda-progcache export --oci`` makes.

The layer is pulled on the first lookup, and unpacked once into the user's cache directory, under the digest of the
image's manifest (:mod:`~cuda_progcache.store.tiers.images`); later processes read it there. Once an image that the URL
names by its digest (``oci://registry/name@sha256:...``) is unpacked, no registry is contacted for it.

Nothing but digests is trusted: a manifest that the URL names by its digest must have that digest, and the layer must
have the digest in the manifest. Sizes are checked before anything is read.

Sources: OCI Distribution 1.1 (pull), OCI Image 1.1 (manifest, index, layer), Docker's token authentication.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urljoin, urlsplit

from cuda_progcache._util import forks
from cuda_progcache.errors import StoreError
from cuda_progcache.store.reader import Reader
from cuda_progcache.store.tiers.engine import TooLargeError
from cuda_progcache.store.tiers.images import Image, Images
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
#: The maximum size of a manifest, and of a layer as it is sent, in bytes.
_MANIFEST, _LAYER = 4 << 20, 1 << 30
#: The maximum of seconds for a pull. It continues after the lookup that started it has given up.
_PULL = 600.0
#: The maximum number of redirects to a layer, which registries may keep on another server.
_HOPS = 3
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class OciEngine(LayerEngine):
    """The programs and header manifests in an image's layer.

    Parameters
    ----------
    settings : TierSettings
        The settings of an ``oci`` URL.
    """

    def __init__(self, settings: TierSettings) -> None:
        super().__init__(settings)
        path, _, digest = settings.path.partition("@")
        head, colon, tag = path.rpartition(":")
        self._repository, self._reference = (head, tag) if colon else (path, "latest")
        self._wanted = digest or None
        self._image: Image | None = None
        self._renew()
        forks.in_child(self._renew)

    def _renew(self) -> None:
        """Make a new lock. A forked child has none of the threads that may hold its parent's."""
        self._lock = threading.Lock()

    # Pulling

    def layer(self, until: float) -> FileStreamProgramCache:
        """The unpacked layer. One thread of the process pulls it; others wait for it (TimeoutError after ``until``)."""
        if self._layer is not None:
            return self._layer
        if not self._lock.acquire(timeout=max(until - time.monotonic(), 0.0)):
            raise TimeoutError(errno.ETIMEDOUT, "still being pulled", self.name)
        try:
            if self._layer is None:
                try:
                    self._image = self._pulled()
                except TooLargeError as exc:  # the registry's answer is too large; that says nothing about the object
                    raise StoreError(exc.errno, exc.strerror, self.name) from exc
                self._layer = Reader(self._image.path)
            return self._layer
        finally:
            self._lock.release()

    def _pulled(self) -> Image:
        """Open the image; pull it if it isn't there."""
        images = Images(self.name)
        found = None if self._wanted is None else images.find(self._wanted)
        if found is not None:
            return found
        with closing(_Registry(self._settings, self._repository)) as registry:
            digest, manifest = registry.image(self._wanted or self._reference)
            found = images.find(digest)
            if found is None:
                layer = self._layer_of(manifest)
                with images.scratch() as file:
                    registry.blob(layer["digest"], layer["size"], file)
                    found = images.unpack(digest, file)
        return found

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

    def close(self) -> None:
        """Stop using the image, so that it can be removed. This doesn't wait for a pull that is under way."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            image, self._image, self._layer = self._image, None, None
            if image is not None:
                image.close()
        finally:
            self._lock.release()


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

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

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

    def blob(self, digest: str, size: int, file: IO[bytes]) -> None:
        """Write the blob of that digest to a file."""
        hashed = hashlib.sha256()

        def take(piece: bytes) -> None:
            hashed.update(piece)
            try:
                file.write(piece)
            except OSError as exc:
                raise StoreError(exc.errno, f"can't keep the layer while it is pulled ({exc.strerror})") from exc

        self._ask(f"{self._path}/blobs/{digest}", size, {}, take)
        if file.tell() != size or f"sha256:{hashed.hexdigest()}" != digest:
            raise StoreError(errno.EPROTO, f"the registry returned something else for {digest}", self._name)

    def _ask(
        self, target: str, limit: int, headers: Mapping[str, str], into: Callable[[bytes], None] | None = None
    ) -> Answer:
        answer = self._get(target, limit, headers, into)
        if answer.status == 401 and not self._entrance:
            self._entrance = self._enter(answer.headers.get("WWW-Authenticate", ""))
            answer = self._get(target, limit, headers, into)
        url = urljoin(self._base, target)
        for _ in range(_HOPS):
            if answer.status not in {301, 302, 303, 307, 308}:
                break
            url = urljoin(url, answer.headers.get("Location", ""))
            parts = urlsplit(url)
            if parts.scheme not in {"http", "https"} or (self._settings.tls and parts.scheme != "https"):
                raise StoreError(errno.EPROTO, "the registry redirects to something other than HTTPS", self._name)
            client = self._to(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")
            # Another party's server keeps the layers: it isn't sent the credentials.
            target = url.partition(parts.netloc)[2] or "/"
            answer = client.exchange("GET", target, until=self._until, limit=limit, into=into)
            client.close()
        if answer.status != 200:
            raise self._refused(answer.status)
        return answer

    def _refused(self, status: int) -> StoreError:
        if status in {401, 403}:
            why = f"the registry answered {status}: check the tier's user and password"
            return StoreError(errno.EACCES, why, self._name)
        if status == 404:
            return StoreError(errno.ENOENT, "the registry has no such image (404): check its name and tag", self._name)
        return StoreError(errno.EIO, f"the registry answered {status}", self._name)

    def _get(self, target: str, limit: int, headers: Mapping[str, str], into: Callable[[bytes], None] | None) -> Answer:
        headers = {**headers, **self._entrance}
        return self._client.exchange("GET", target, until=self._until, limit=limit, headers=headers, into=into)

    def _enter(self, challenge: str) -> dict[str, str]:
        """The headers that a registry's 401 asks for: name and password, or a token obtained with these."""
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

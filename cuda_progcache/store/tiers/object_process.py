# SPDX-License-Identifier: Apache-2.0
"""The process that runs obstore: ``python -m cuda_progcache.store.tiers.object_process``, started by a tier.

Its standard input is a socket. The tier sends its settings as a line of JSON, and then connections as descriptors
(SCM_RIGHTS). The process answers HTTP on each of them: GET, PUT and DELETE of objects, and GET of ``/?prefix`` for a
listing. It reports trouble with status 502 and, as JSON, an error number and a message, in which ``{what}`` stands for
the request.
"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import socket
import sys
import threading
from datetime import timedelta
from typing import IO, Any
from urllib.parse import unquote

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from cuda_progcache._util.printable import one_line
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers import s3
from cuda_progcache.store.tiers.connections import IDLE
from cuda_progcache.store.tiers.settings import TierSettings
from cuda_progcache.store.tiers.timed_http import Headers

#: The part of its time that a request is given, so that it has ended before its caller's patience has.
_SHARE = 0.97
#: Variables with which the environment says who asks.
_KNOWN_TO_GOOGLE = (
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
)
_KNOWN_TO_AZURE = (
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_STORAGE_TOKEN",
    "AZURE_STORAGE_CLIENT_SECRET",
    "AZURE_FEDERATED_TOKEN_FILE",
)
_STATUS = re.compile(r"status code: (\d{3})")
_SYSTEM = re.compile(r'Os \{\s*code: (\d+),\s*kind: \w+,\s*message: "([^"]*)"')
_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")


class _Bucket:
    """A tier's bucket, or container."""

    def __init__(self, settings: TierSettings) -> None:
        self._settings = settings
        self._stores: dict[float, Any] = {}  # by the seconds that a request may take
        self._is_anonymous = False

    def store(self, seconds: float) -> Any:
        store = self._stores.get(seconds)
        return self._stores.setdefault(seconds, self._opened(seconds)) if store is None else store

    def check_writable(self) -> None:
        if self._is_anonymous and self._settings.scheme == "gs":
            # Before a write, obstore would ask the metadata service all the same.
            raise StoreError(errno.EACCES, "can't write without credentials")

    def _opened(self, seconds: float) -> Any:
        settings = self._settings
        kind: Any
        kind, config = {
            "s3": (S3Store, _s3),
            "gs": (GCSStore, _google),
            "az": (AzureStore, _azure),
        }[settings.scheme]
        given = config(settings)
        self._is_anonymous = "skip_signature" in given
        endpoint = given.get("endpoint") or given.get("base_url") or ""
        try:
            return kind(
                settings.host,
                prefix=settings.path or None,
                config=given,
                client_options={
                    "connect_timeout": timedelta(seconds=min(settings.connect_timeout, seconds)),
                    "timeout": timedelta(seconds=_SHARE * seconds),
                    "allow_http": endpoint.startswith("http://"),
                    "pool_idle_timeout": timedelta(seconds=IDLE),
                    "user_agent": "cuda-progcache",
                },
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=seconds)},
            )
        except Exception:  # noqa: BLE001 - its message may have what it was given
            raise StoreError(errno.EINVAL, "obstore can't open it with these settings") from None


class _Request:
    """A request whose head has been read, and the stream for its answer."""

    def __init__(self, stream: IO[bytes], line: bytes, bucket: _Bucket) -> None:
        self._stream = stream
        self._bucket = bucket
        self._method, target, _ = line.decode().split(" ")
        path, self._is_listing, prefix = target.partition("?")
        self._name = unquote(prefix if self._is_listing else path[1:])
        self._headers = Headers.read(stream)
        self.is_last = False

    def answer(self) -> None:
        """Carry the request out, and send the answer."""
        body = self._stream.read(int(self._headers.get("Content-Length", 0)))
        try:
            store = self._bucket.store(float(self._headers.get("X-Seconds")))
            if self._is_listing:
                self._say(200, json.dumps(self._listed(store)).encode())
            elif self._method == "GET":
                self._get(store)
            else:
                self._bucket.check_writable()
                if self._method == "PUT":
                    obstore.put(store, self._name, body, use_multipart=False)
                else:
                    obstore.delete(store, self._name)
                self._say(200)
        except FileNotFoundError as exc:
            missing = _NO_BUCKET.search(str(exc)) if self._method == "GET" else None
            if missing is None:
                self._say(404)
            else:
                self._fail(errno.ENOENT, f"no such bucket ({missing[1]})")
        except StoreError as exc:
            self._fail(exc.errno or errno.EIO, exc.strerror or str(exc))
        except BaseException as exc:  # noqa: BLE001 - a panic of Rust code is none of Exception's
            self._fail(*_reason(exc))

    def _get(self, store: Any) -> None:
        found = obstore.get(store, self._name)
        start, end = found.range  # the whole object's; its metadata would take longer to make
        size = end - start
        if size > int(self._headers.get("X-Limit")):  # obstore would allocate that much
            self._head(200, size)  # the client reads no further
            self.is_last = True
            return
        data = found.bytes().to_bytes()
        if len(data) != size:
            raise StoreError(errno.EPROTO, f"{self._name} has {len(data)} bytes instead of {size}")
        self._say(200, data)

    def _listed(self, store: Any) -> list[tuple[str, int, float]]:
        folder = self._name.rpartition("/")[0] or None
        return [
            (one["path"], one["size"], one["last_modified"].timestamp())
            for page in obstore.list(store, folder, chunk_size=1000)
            for one in page
            if one["path"].startswith(self._name)
        ]

    def _fail(self, code: int, why: str) -> None:
        self._say(502, json.dumps([code, why]).encode())

    def _say(self, status: int, body: bytes = b"") -> None:
        self._head(status, len(body))
        self._stream.write(body)

    def _head(self, status: int, length: int) -> None:
        self._stream.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n" % (status, length))


def _reason(exc: BaseException) -> tuple[int, str]:
    """An error number and a short message: obstore's own are pages long, and quote what the server sent."""
    message = str(exc)
    if isinstance(exc, TimeoutError) or "TimedOut" in message:
        return errno.ETIMEDOUT, "took too long"
    status, system = _STATUS.search(message), _SYSTEM.search(message)
    if status is not None:
        code = errno.EACCES if status[1] in {"401", "403"} else errno.EIO
        return code, f"the server answered {status[1]} to {{what}}"
    if system is not None:
        return int(system[1]), f"can't be reached ({system[2]})"
    words = "its certificate isn't trusted" if "InvalidCertificate" in message else _first_words(message)
    return errno.EIO, f"the request failed ({words or type(exc).__name__})"


def _first_words(message: str) -> str:
    """The reason from obstore's message, without the URL, which has Azure's secrets."""
    line = re.sub(r"https?://\S+", "", message.partition("\n")[0])
    return one_line(re.sub(r"^Generic \w+ error: |Error performing .*? - ", "", line))[:150]


def _s3(settings: TierSettings) -> dict[str, Any]:
    user, password, token = settings.credentials
    config = _revealed(access_key_id=user, secret_access_key=password, session_token=token)
    if s3.is_anonymous(settings):
        config["skip_signature"] = True
    endpoint = s3.endpoint(settings)
    return config | ({"endpoint": endpoint} if endpoint else {}) | {"region": s3.region(settings)}


def _google(settings: TierSettings) -> dict[str, Any]:
    _, password, token = settings.credentials
    config = _revealed(service_account_key=password, bearer_token=token)
    own = os.path.expanduser("~/.config/gcloud/application_default_credentials.json")
    if not config and not any(os.environ.get(name) for name in _KNOWN_TO_GOOGLE) and not os.path.exists(own):
        config["skip_signature"] = True
    return config | ({"base_url": settings.endpoint} if settings.endpoint else {})


def _azure(settings: TierSettings) -> dict[str, Any]:
    user, password, token = settings.credentials
    config = _revealed(account_name=user, account_key=password, sas_key=token)
    if not config.keys() - {"account_name"} and not any(os.environ.get(name) for name in _KNOWN_TO_AZURE):
        config["skip_signature"] = True
    return config | ({"endpoint": settings.endpoint} if settings.endpoint else {})


def _revealed(**secrets: Any) -> dict[str, Any]:
    return {name: secret.reveal() for name, secret in secrets.items() if secret is not None}


def _serve(connection: socket.socket, bucket: _Bucket) -> None:
    try:
        stream: Any
        with connection, connection.makefile("rwb", 1 << 15) as stream:
            while line := stream.readline():
                request = _Request(stream, line, bucket)
                request.answer()
                stream.flush()
                if request.is_last:
                    return
    except OSError:
        return  # the other end is closed


def main() -> None:
    """Serve until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; this process ends with its parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=sys.stdin.fileno())
    line = b""
    while not line.endswith(b"\n"):
        piece = control.recv(1 << 16)
        if not piece:
            return
        line += piece
    bucket = _Bucket(TierSettings.of_parent(json.loads(line)))
    control.sendall(b"r")
    while True:
        said, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not said:
            os._exit(0)  # whatever obstore still waits for
        for descriptor in descriptors:
            connection = socket.socket(fileno=descriptor)
            threading.Thread(target=_serve, args=(connection, bucket), daemon=True).start()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Object stores as tiers: S3 and what speaks its protocol, Google's and Azure's, through obstore.

obstore ends a request in time by itself, from the connection to the last byte of the body. What it can't do is live
through a fork: its runtime hangs in the child, and may take the parent along. So no process uses it that was forked
from one that had it loaded.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from cuda_progcache._util import forks
from cuda_progcache._util.parallel import for_each
from cuda_progcache._util.printable import one_line
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.connections import IDLE
from cuda_progcache.store.tiers.deadline import within
from cuda_progcache.store.tiers.engine import MANY, Engine, Listed, TooLargeError

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.settings import TierSettings

R = TypeVar("R")

#: The part of its time that a request is given, so that it has ended before its caller's patience has.
_SHARE = 0.97
#: Variables with which the environment says who asks.
_KNOWN_TO_AWS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
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
_LISTING = "a listing"
#: PF_FORKNOEXEC of Linux: the process runs the program of the one that it was forked from.
_FORKED = 0x40
_NO_BUCKET = re.compile(r"<Code>(NoSuchBucket|ContainerNotFound)</Code>")


def _has_inherited_it() -> bool:
    """Whether this process was forked, before it loaded this module, from one that had obstore loaded."""
    loaded = list(sys.modules)  # in the order of loading
    if loaded.index(obstore.__name__) > loaded.index(__name__):  # this module loaded it
        return False
    try:
        with open("/proc/self/stat", "rb") as file:
            flags = int(file.read().rpartition(b")")[2].split()[6])  # proc_pid_stat(5)
        with open(f"/proc/{os.getppid()}/maps", "rb") as file:
            return bool(flags & _FORKED) and b"/obstore/" in file.read()
    except (OSError, ValueError, IndexError):  # another system, or another user's process
        return False


class _Process:
    """What is true of this process: whether it was forked from one that had obstore loaded."""

    forked_with_it = _has_inherited_it()


class ObjectEngine(Engine):
    """Objects of a bucket of S3 (``s3``) or Google's (``gs``), or of a container of Azure's (``az``).

    Without credentials, here or in the environment, requests aren't signed: obstore would ask the machine's metadata
    service for them, which takes long where there is none. For S3, ``AWS_EC2_METADATA_DISABLED=false`` allows that.

    Parameters
    ----------
    settings : TierSettings
        Of an ``s3``, ``gs`` or ``az`` URL.
    """

    keeps_time = True
    threads = MANY
    survives_fork = False

    def __init__(self, settings: TierSettings) -> None:
        self.name = settings.url
        self._settings = settings
        self._stores: dict[float, Any] = {}  # by the seconds that a request may take
        self._is_anonymous = False

    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """The object of that name; ``None`` if there is none."""
        patient = until - time.monotonic() > self._settings.timeout  # as it is for a pack
        seconds = self._settings.write_timeout if patient else self._settings.timeout
        store = self._store(seconds)
        return self._call(lambda: _get(store, name, limit), seconds, until, f"a get of {name}")

    def put(self, name: str, data: bytes, *, until: float) -> None:
        """Write an object, in one request."""
        store = self._store(self._settings.write_timeout)
        try:
            self._write(lambda: obstore.put(store, name, data, use_multipart=False), until, f"a put of {name}")
        except FileNotFoundError:
            raise StoreError(
                errno.ENOENT, "the server answered 404 to a put: does the bucket exist?", self.name
            ) from None

    def delete(self, names: Iterable[str], *, until: float) -> None:
        """Remove objects, a thousand in a request where the service can."""
        store, wanted = self._store(self._settings.write_timeout), list(names)
        if not wanted:
            return
        try:
            self._write(lambda: obstore.delete(store, wanted), until, "a delete")
        except FileNotFoundError:  # of a service that removes them one by one; some of the others may be there
            for_each(wanted, lambda name: self._delete(store, name, until), self.threads)

    def _delete(self, store: Any, name: str, until: float) -> None:
        try:
            self._write(lambda: obstore.delete(store, name), until, f"a delete of {name}")
        except FileNotFoundError:
            return

    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """The objects whose names begin so."""
        store = self._store(self._settings.write_timeout)
        folder = prefix.rpartition("/")[0]
        pages = iter(obstore.list(store, folder or None, chunk_size=1000))
        while True:
            page_until = min(until, time.monotonic() + self._settings.write_timeout)
            page: Any = self._write(lambda: next(pages, None), page_until, _LISTING)
            if page is None:
                return
            for one in page:
                if one["path"].startswith(prefix):
                    yield Listed(one["path"], one["size"], one["last_modified"].timestamp())

    def _write(self, call: Callable[[], R], until: float, what: str) -> R:
        if self._is_anonymous and self._settings.scheme == "gs" and what != _LISTING:
            # For a write obstore asks the metadata service even so.
            raise StoreError(errno.EACCES, "can't write without credentials", self.name)
        return self._call(call, self._settings.write_timeout, until, what)

    def _call(self, call: Callable[[], R], seconds: float, until: float, what: str) -> R:
        """Make a call that obstore ends after ``seconds``; on a thread, left behind then, if ``until`` is earlier."""
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "took too long", self.name)
        try:
            return call() if left >= _SHARE * seconds else within(until, call)
        except StoreError as exc:
            exc.filename = self.name
            raise
        except FileNotFoundError:
            raise
        except Exception as exc:  # noqa: BLE001 - obstore's errors have no common class with pyo3's
            self._fail(exc, until, what)
        except BaseException as exc:
            if type(exc).__name__ == "PanicException":  # of Rust code
                self._fail(exc, until, what)
            raise

    def _fail(self, exc: BaseException, until: float, what: str) -> NoReturn:
        """Raise a short error: obstore's messages go on for pages, and quote what the server sent."""
        told = str(exc)
        if isinstance(exc, TimeoutError) or "TimedOut" in told or time.monotonic() >= until:
            raise TimeoutError(errno.ETIMEDOUT, "took too long", self.name) from None
        status, system = _STATUS.search(told), _SYSTEM.search(told)
        if status is not None:
            code = errno.EACCES if status[1] in {"401", "403"} else errno.EIO
            raise StoreError(code, f"the server answered {status[1]} to {what}", self.name) from None
        if system is not None:
            raise StoreError(int(system[1]), f"can't be reached ({system[2]})", self.name) from None
        words = "its certificate isn't trusted" if "InvalidCertificate" in told else _first_words(told)
        raise StoreError(errno.EIO, f"the request failed ({words or type(exc).__name__})", self.name) from None

    def _store(self, seconds: float) -> Any:
        if _Process.forked_with_it:
            raise StoreError(
                errno.ENOTSUP,
                "can't be used here: this process was forked from one that had loaded obstore, which doesn't survive a "
                "fork; start such processes by spawn or forkserver",
                self.name,
            )
        store = self._stores.get(seconds)
        return self._stores.setdefault(seconds, self._opened(seconds)) if store is None else store

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
            raise StoreError(errno.EINVAL, "obstore can't open it with these settings", self.name) from None

    def close(self) -> None:
        """Forget the clients; obstore closes their connections."""
        if not _Process.forked_with_it:
            self._stores = {}


def _get(store: Any, name: str, limit: int) -> bytes | None:
    try:
        found = obstore.get(store, name)
    except FileNotFoundError as exc:
        missing = _NO_BUCKET.search(str(exc))
        if missing is not None:
            raise StoreError(errno.ENOENT, f"no such bucket ({missing[1]})") from None
        return None
    start, end = found.range  # of the object, all of which was asked for; its metadata would take a while to be made
    size = end - start
    if size > limit:  # obstore would make room for it, and abort the process where there is none
        raise TooLargeError(errno.EFBIG, f"{name} has {size} bytes, more than the limit of {limit}")
    data = found.bytes().to_bytes()
    if len(data) != size:
        raise StoreError(errno.EPROTO, f"{name} has {len(data)} bytes instead of {size}")
    return data


def _first_words(told: str) -> str:
    """The reason from obstore's message, without the URL, which has Azure's secrets."""
    line = re.sub(r"https?://\S+", "", told.partition("\n")[0])
    return one_line(re.sub(r"^Generic \w+ error: |Error performing .*? - ", "", line))[:150]


def _s3(settings: TierSettings) -> dict[str, Any]:
    user, password, token = settings.credentials
    config = _revealed(access_key_id=user, secret_access_key=password, session_token=token)
    asks = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "false"
    if not config and not asks and not any(os.environ.get(name) for name in _KNOWN_TO_AWS):
        config["skip_signature"] = True
    endpoint = settings.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = settings.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return config | ({"endpoint": endpoint} if endpoint else {}) | {"region": region}


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


def _after_fork() -> None:
    _Process.forked_with_it = _Process.forked_with_it or "obstore" in sys.modules


forks.in_child(_after_fork)

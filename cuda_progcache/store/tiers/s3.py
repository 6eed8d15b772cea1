# SPDX-License-Identifier: Apache-2.0
"""S3, and servers that speak its protocol, as tiers over our own HTTP client.

It serves tiers with an access key and public buckets. obstore (:mod:`cuda_progcache.store.tiers.objects`) serves those
that need more: an instance's role, a proxy, or encryption with the customer's key.
"""

from __future__ import annotations

import errno
import os
import re
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import SplitResult, quote, urlsplit

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.aws_signature import AwsSigner
from cuda_progcache.store.tiers.http import HttpEngine
from cuda_progcache.store.tiers.objects import ObjectEngine, no_bucket
from cuda_progcache.store.tiers.timed_http import HttpClient

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cuda_progcache.store.tiers.engine import Engine, Listed
    from cuda_progcache.store.tiers.settings import TierSettings
    from cuda_progcache.store.tiers.timed_http import Answer

#: Variables with which the environment says who asks.
_WHO = (
    "AWS_ACCESS_KEY_ID",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
)
#: Variables that change what obstore sends, or to whom.
_MORE = (
    "AWS_ALLOW_INVALID_CERTIFICATES",
    "AWS_BUCKET",
    "AWS_CHECKSUM_ALGORITHM",
    "AWS_DEFAULT_HEADERS",
    "AWS_ENDPOINT",
    "AWS_PROXY_URL",
    "AWS_REQUEST_PAYER",
    "AWS_S3_EXPRESS",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SKIP_SIGNATURE",
    "AWS_SSE_BUCKET_KEY_ENABLED",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AWS_SSE_KMS_KEY_ID",
    "AWS_TOKEN",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
)
_CODE = re.compile(rb"<Code>(\w{1,60})</Code>", re.ASCII)
#: Answers to a key that has expired, or isn't known (any more).
_UNKNOWN = (400, 401, 403)


def endpoint(settings: TierSettings) -> str | None:
    """The server that isn't Amazon's."""
    return settings.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def region(settings: TierSettings) -> str:
    """The region that the bucket is in."""
    return settings.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def is_anonymous(settings: TierSettings) -> bool:
    """Whether there are no credentials, and the machine isn't to be asked for some."""
    asks = os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "false"
    return not (any(settings.credentials) or asks or any(os.environ.get(name) for name in _WHO))


def is_enough(settings: TierSettings) -> bool:
    """Whether this module's engine can do what a tier's settings, and the environment, ask for."""
    user, password, _ = settings.credentials
    if any(settings.credentials):
        has_key = None not in (user, password)
    else:
        has_key = bool(os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY"))
    if not (has_key or is_anonymous(settings)) or "//" in settings.path or any(name in os.environ for name in _MORE):
        return False
    try:
        parts = urlsplit(_address(settings))
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and not _has_proxy(parts)
    except ValueError:  # it is no URL, and obstore says so
        return False


def _address(settings: TierSettings) -> str:
    return endpoint(settings) or f"https://s3.{region(settings)}.amazonaws.com"


def _has_proxy(parts: SplitResult) -> bool:
    if not any(name.lower().endswith("_proxy") for name in os.environ):
        return False
    from urllib.request import getproxies, proxy_bypass

    return bool(getproxies().keys() & {parts.scheme, "all"}) and not proxy_bypass(parts.netloc)


def s3_engine(settings: TierSettings) -> Engine:
    """The engine of an ``s3`` URL: this module's, or that of obstore where it takes more.

    Raises
    ------
    ModuleNotFoundError
        It takes obstore, which isn't installed.
    """
    return S3Engine(settings) if is_enough(settings) else ObjectEngine(settings)


class S3Engine(HttpEngine):
    """Objects of a bucket of S3, by path-style URLs.

    Parameters
    ----------
    settings : TierSettings
        Of an ``s3`` URL, for which :func:`is_enough` holds.
    """

    def __init__(self, settings: TierSettings) -> None:
        parts = urlsplit(_address(settings))
        client = HttpClient(
            f"{parts.scheme}://{parts.netloc}", name=settings.url, connect_timeout=settings.connect_timeout
        )
        path = parts.path.rstrip("/") + quote(f"/{settings.host}/{settings.path}".rstrip("/"))
        super().__init__(settings, client, path)
        self._signer: AwsSigner | None = None

    def _exchange(
        self, method: str, name: str, *, until: float, limit: int | None = None, body: bytes | None = None
    ) -> Answer:
        target = f"{self._path}/{quote(name)}"
        signer = self._signer
        if signer is None and not is_anonymous(self._settings):
            signer = self._signer = self._new_signer()
        headers = signer.headers(method, target, body) if signer else None
        answer = self._client.exchange(method, target, until=until, limit=limit, body=body, headers=headers)
        if answer.status in _UNKNOWN:
            self._signer = None  # the key is read again: it may have been replaced
        elif answer.status == 404 and method == "GET" and _code(answer) == "NoSuchBucket":
            raise StoreError(errno.ENOENT, "no such bucket (NoSuchBucket)", self.name)
        return answer

    def _new_signer(self) -> AwsSigner:
        if any(self._settings.credentials):
            user, password, token = (None if one is None else one.reveal() for one in self._settings.credentials)
        else:
            names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
            user, password, token = (os.environ.get(name) or None for name in names)
        return AwsSigner(user or "", password or "", token, region(self._settings), self._client.host)

    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """The objects whose names begin so, from obstore."""
        try:
            listing = ObjectEngine(self._settings)
        except ModuleNotFoundError as exc:
            raise StoreError(
                errno.ENOTSUP, f"can't list without a package that isn't installed ({exc})", self.name
            ) from exc
        try:
            listing.prepare()
            yield from listing.list(prefix, until=until)
        finally:
            listing.close()

    def _refuse(self, what: str, answer: Answer) -> NoReturn:
        if answer.status == 404:
            raise no_bucket(what, self.name)
        code, home = _code(answer), answer.headers.get("x-amz-bucket-region", "")
        if re.fullmatch(r"[a-z0-9-]{1,40}", home) and home != region(self._settings):
            what += f"; its bucket is in the region {home}"
        if code:
            what += f" ({code})"
        if code == "AccessDenied" and what.startswith("GET"):  # which it also says of an object that isn't there
            what += "; to be told what isn't there, a reader needs s3:ListBucket besides s3:GetObject"
        super()._refuse(what, answer)


def _code(answer: Answer) -> str:
    """The code of an error; empty where there is none."""
    found = _CODE.search(answer.data)
    return found[1].decode() if found else ""

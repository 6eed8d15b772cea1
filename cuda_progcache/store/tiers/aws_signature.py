# SPDX-License-Identifier: Apache-2.0
"""The signature of requests to S3: AWS Signature Version 4, in headers.

Source: AWS, "Authenticating Requests: Using the Authorization Header (AWS Signature Version 4)", Amazon S3 API
Reference. A signature holds for 15 minutes around the time in it, by the server's clock.
"""

from __future__ import annotations

import hashlib
import hmac
import time

_EMPTY = hashlib.sha256().hexdigest()


class AwsSigner:
    """Signs requests to one server.

    Parameters
    ----------
    key_id, secret : str
        The access key.
    token : str or None
        Of temporary credentials.
    region : str
    host : str
        As in the ``Host`` header.
    """

    def __init__(self, key_id: str, secret: str, token: str | None, region: str, host: str) -> None:
        self._key_id = key_id
        self._secret = secret
        self._token = token
        self._region = region
        self._host = host
        self._key = ("", b"")  # of one day

    def headers(self, method: str, path: str, body: bytes | None) -> dict[str, str]:
        """The headers that sign a request, in addition to ``Host``.

        Parameters
        ----------
        method : str
        path : str
            Percent-encoded as S3 requires: all but letters, digits and ``/-_.~``. It has no query.
        body : bytes or None
        """
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        content = hashlib.sha256(body).hexdigest() if body else _EMPTY
        signed = {"x-amz-content-sha256": content, "x-amz-date": stamp}
        if self._token is not None:
            signed["x-amz-security-token"] = self._token
        names = ";".join(["host", *signed])
        lines = "".join(f"{name}:{value}\n" for name, value in signed.items())
        asked = f"{method}\n{path}\n\nhost:{self._host}\n{lines}\n{names}\n{content}"
        scope = f"{stamp[:8]}/{self._region}/s3/aws4_request"
        text = f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{hashlib.sha256(asked.encode()).hexdigest()}"
        signature = _hmac(self._day_key(stamp[:8]), text).hex()
        signed["Authorization"] = (
            f"AWS4-HMAC-SHA256 Credential={self._key_id}/{scope}, SignedHeaders={names}, Signature={signature}"
        )
        return signed

    def _day_key(self, day: str) -> bytes:
        known, key = self._key
        if known != day:
            key = f"AWS4{self._secret}".encode()
            for part in (day, self._region, "s3", "aws4_request"):
                key = _hmac(key, part)
            self._key = (day, key)
        return key


def _hmac(key: bytes, text: str) -> bytes:
    return hmac.digest(key, text.encode(), "sha256")

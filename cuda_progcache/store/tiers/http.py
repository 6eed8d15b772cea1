# SPDX-License-Identifier: Apache-2.0
"""Any HTTP server as a tier: nginx, bazel-remote, whatever answers GET and takes PUT."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

from cuda_progcache._util.parallel import for_each
from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.engine import MANY, Engine, Listed
from cuda_progcache.store.tiers.timed_http import Answer, HttpClient, authorization

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.settings import TierSettings

_ABSENT = (404, 410)
_DONE = (200, 201, 202, 204)
_REFUSED = {401: errno.EACCES, 403: errno.EACCES, 405: errno.EROFS, 413: errno.EFBIG, 507: errno.ENOSPC}
#: Bytes that a listing may have: some hundred thousand names.
LISTING = 64 << 20
#: Folders that an object may lie in, one in the other: ``v1/programs/ab/``.
_DEEPEST = 3


class HttpEngine(Engine):
    """Objects of an HTTP server: GET, PUT and DELETE below a URL.

    Who may write is the server's to decide: a name and password, or a token, go with every request. Listing needs a
    server that answers for a directory as nginx does with ``autoindex_format json``.

    Parameters
    ----------
    settings : TierSettings
        Of an ``http`` or ``https`` URL.
    client : HttpClient, optional
        Where something else is asked than the URL's server.
    path : str
        The path of all objects at ``client``, quoted.
    """

    keeps_time = True
    threads = MANY

    def __init__(self, settings: TierSettings, client: HttpClient | None = None, path: str = "") -> None:
        self.name = settings.url
        self._settings = settings
        self._path = path if client else quote(f"/{settings.path}".rstrip("/"), safe="/%")
        self._client = client or HttpClient(
            settings.url,
            connect_timeout=settings.connect_timeout,
            ca_file=settings.ca_file,
            headers=lambda: authorization(settings.credentials),
        )

    def prepare(self) -> None:
        """See :meth:`Engine.prepare`."""
        self._client.prepare()

    def _exchange(
        self, method: str, name: str, *, until: float, limit: int | None = None, body: bytes | None = None
    ) -> Answer:
        """Make a request for an object, or for a directory."""
        return self._client.exchange(method, f"{self._path}/{quote(name)}", until=until, limit=limit, body=body)

    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """The object of that name; ``None`` where the server says 404 or 410."""
        answer = self._exchange("GET", name, until=until, limit=limit)
        if answer.status == 200:
            return answer.data
        if answer.status not in _ABSENT:
            self._refuse(f"GET of {name}", answer)
        return None

    def put(self, name: str, data: bytes, *, until: float) -> None:
        """Write an object by PUT."""
        answer = self._exchange("PUT", name, until=until, body=data)
        if answer.status not in _DONE:
            self._refuse(f"PUT of {name}", answer)

    def delete(self, names: Iterable[str], *, until: float) -> None:
        """Remove objects by DELETE, on several threads."""
        for_each(names, lambda name: self._delete(name, until), self.threads)

    def _delete(self, name: str, until: float) -> None:
        answer = self._exchange("DELETE", name, until=until)
        if answer.status not in _DONE + _ABSENT:
            self._refuse(f"DELETE of {name}", answer)

    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """The objects whose names begin so, from the server's listings of its directories."""
        folder = prefix.rpartition("/")[0]
        return self._below(f"{folder}/" if folder else "", prefix, until)

    def _below(self, folder: str, prefix: str, until: float) -> Iterator[Listed]:
        for entry in self._entries(folder, until):
            name = f"{folder}{entry['name']}"
            if entry.get("type") == "directory":
                leads_there = f"{name}/".startswith(prefix) or prefix.startswith(f"{name}/")
                if leads_there and folder.count("/") < _DEEPEST:
                    yield from self._below(f"{name}/", prefix, until)
            elif name.startswith(prefix):
                yield Listed(name, entry["size"], _time(entry.get("mtime")))

    def _entries(self, folder: str, until: float) -> Sequence[Mapping[str, Any]]:
        """What nginx's listing has of a directory: name, type, size, and time in GMT."""
        until = min(until, time.monotonic() + self._settings.write_timeout)
        answer = self._exchange("GET", folder, until=until, limit=LISTING)
        if answer.status in _ABSENT:
            return ()
        if answer.status != 200:
            self._refuse(f"GET of the listing of {folder or '/'}", answer)
        try:
            entries = json.loads(answer.data)
        except (ValueError, RecursionError):
            entries = None
        if isinstance(entries, list) and all(map(_is_entry, entries)):
            return entries
        raise StoreError(
            errno.ENOTSUP,
            "the server's listing can't be read; nginx needs 'autoindex on; autoindex_format json;'",
            self.name,
        )

    def _refuse(self, what: str, answer: Answer) -> NoReturn:
        code = _REFUSED.get(answer.status, errno.EIO)
        raise StoreError(code, f"the server answered {answer.status} to {what}", self.name)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _is_entry(entry: Any) -> bool:
    name = entry.get("name") if isinstance(entry, dict) else None
    plain = isinstance(name, str) and name not in {"", ".", ".."} and "/" not in name
    return plain and (entry.get("type") == "directory" or isinstance(entry.get("size"), int))


def _time(text: Any) -> float:
    try:
        return parsedate_to_datetime(text).replace(tzinfo=UTC).timestamp() if isinstance(text, str) else 0.0
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0

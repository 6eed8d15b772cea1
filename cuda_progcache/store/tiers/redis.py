# SPDX-License-Identifier: Apache-2.0
"""Redis and Valkey as a tier.

Keys: ``pc1:{<digest>}:e`` holds a program's object, ``pc1:{<digest>}:m`` a header manifest's, and ``pc1:<name>`` any
other object. The braces put all keys of one program into the same slot of a cluster.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cuda_progcache.errors import StoreError
from cuda_progcache.store.tiers.engine import BATCH_BYTES, Engine, Listed, TooLargeError
from cuda_progcache.store.tiers.envelope import MANIFESTS, PROGRAMS, digest_in, object_name
from cuda_progcache.store.tiers.redis_client import MOST_ITEMS, SHORT, RedisClient, RefusedError

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.redis_client import RedisConnection
    from cuda_progcache.store.tiers.settings import TierSettings

#: The maximum size of a page of keys, in bytes; a key has about 75.
_PAGE = 16 << 20
#: The suffix of the keys of each tree.
_TREES = {PROGRAMS: "e", MANIFESTS: "m"}


class RedisEngine(Engine):
    """The objects of a Redis database.

    Parameters
    ----------
    settings : TierSettings
    """

    keeps_time = True

    def __init__(self, settings: TierSettings) -> None:
        self.name = settings.url
        self._settings = settings
        self._client = RedisClient(settings)

    def prepare(self) -> None:
        """See :meth:`Engine.prepare`."""
        self._client.prepare()

    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """See :meth:`Engine.get`."""
        return _value(self._client.ask(until, limit, ("GET", _key(name)))[0], self.name)

    def get_many(self, names: Sequence[str], *, limit: int, until: float) -> Mapping[str, bytes | None]:
        """See :meth:`Engine.get_many`. It takes one round trip, and stops at an object that is too large."""
        found: dict[str, bytes | None] = {}

        def use(connection: RedisConnection) -> None:
            connection.send([("GET", _key(name)) for name in names])
            size = 0
            for name in names:
                try:
                    found[name] = data = _value(connection.answer(), self.name)
                except TooLargeError:
                    found[name] = None
                    connection.close()  # the remaining answers come after the one that is too large
                    return
                except RefusedError:
                    connection.close()
                    raise
                size += len(data or b"")
                if size >= BATCH_BYTES and name != names[-1]:
                    connection.close()
                    return

        if names:
            self._client.use(until, limit, use)
        return found

    def put(self, name: str, data: bytes, *, until: float) -> None:
        """See :meth:`Engine.put`."""
        self.put_many({name: data}, until=until)

    def put_many(self, objects: Mapping[str, bytes], *, until: float) -> None:
        """See :meth:`Engine.put_many`. It takes one round trip."""
        if objects:
            answers = self._client.ask(until, SHORT, *[("SET", _key(name), data) for name, data in objects.items()])
            if any(answer != b"OK" for answer in answers):
                raise StoreError(errno.EPROTO, "the server answered SET with something other than OK", self.name)

    def delete(self, names: Iterable[str], *, until: float) -> None:
        """See :meth:`Engine.delete`."""
        commands = [("UNLINK", _key(name)) for name in names]
        if commands:
            self._client.ask(until, SHORT, *commands)

    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """See :meth:`Engine.list`.

        Redis knows when a key was last used, not when it was written. The last use is returned, unless the server's
        eviction policy doesn't track it. The size is that of the value in memory. Neither request counts as a use.
        """
        cursor = b"0"
        while True:
            page_until = min(until, time.monotonic() + self._settings.timeout)
            scan = ("SCAN", cursor, "MATCH", _pattern(prefix), "COUNT", 1000)
            cursor, keys = _page(self._client.ask(page_until, _PAGE, scan, most_items=MOST_ITEMS)[0], self.name)
            names = {key: name for key in keys if (name := _name(key)) and name.startswith(prefix)}
            yield from self._listed(names, page_until)
            if cursor == b"0":
                return

    def _listed(self, names: Mapping[bytes, str], until: float) -> Iterator[Listed]:
        if not names:
            return
        commands = [(*what, key) for key in names for what in (("MEMORY", "USAGE"), ("OBJECT", "IDLETIME"))]

        def use(connection: RedisConnection) -> list[Any]:
            connection.send(commands)
            return [connection.answer() for _ in commands]

        told = self._client.use(until, SHORT, use)
        now = time.time()
        for name, size, idle in zip(names.values(), told[::2], told[1::2], strict=True):
            if isinstance(size, RefusedError):
                size.filename = self.name
                raise size
            if isinstance(size, int):  # otherwise it is gone
                yield Listed(name, size, now - idle if isinstance(idle, int) else 0.0)

    def close(self) -> None:
        """See :meth:`Engine.close`."""
        self._client.close()


def _page(answer: Any, tier: str) -> tuple[bytes, Sequence[bytes]]:
    """Parse the answer to SCAN: the cursor of the next page, and the keys of this one."""
    if isinstance(answer, list) and len(answer) == 2 and isinstance(answer[0], bytes) and isinstance(answer[1], list):
        cursor, keys = answer
        if all(isinstance(key, bytes) for key in keys):
            return cursor, keys
    raise StoreError(errno.EPROTO, "the server answered SCAN with something other than a page of keys", tier)


def _value(answer: Any, tier: str) -> bytes | None:
    """Check the answer to GET."""
    if isinstance(answer, Exception):
        raise answer
    if answer is not None and not isinstance(answer, bytes):
        raise StoreError(errno.EPROTO, "the server answered GET with something other than a value", tier)
    return answer


def _key(name: str) -> str:
    """The key of an object."""
    for tree, suffix in _TREES.items():
        if name.startswith(tree):
            return f"pc1:{{{digest_in(name)}}}:{suffix}"
    return f"pc1:{name}"


def _name(key: bytes) -> str | None:
    """The name of the object under a key; ``None`` if the key has something else, such as a lease."""
    text = key.decode("utf-8", "replace").removeprefix("pc1:")
    for tree, suffix in _TREES.items():
        if text.startswith("{") and text.endswith(f"}}:{suffix}"):
            return object_name(tree, text[1 : -len(suffix) - 2])
    return None if text.startswith("{") else text


def _pattern(prefix: str) -> str:
    """A pattern for the keys of objects whose names start with a prefix; other keys may match as well."""
    for tree, suffix in _TREES.items():
        if prefix.startswith(tree):
            return f"pc1:{{{prefix[len(tree) :].replace('/', '')}*}}:{suffix}"
    return f"pc1:{prefix}*" if prefix.startswith("packs") else "pc1:*"

# SPDX-License-Identifier: Apache-2.0
"""The trees of a tier's objects: programs and header manifests, which are named by digests, and packs."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from cuda_progcache.errors import StoreError

PROGRAMS, MANIFESTS, PACKS = "v1/programs/", "v1/manifests/", "packs/"
#: Bytes of a header manifest's object, at most.
MOST_OF_MANIFEST = 4 << 20
#: Objects of one call for many.
BATCH = 100


def object_name(tree: str, digest: str) -> str:
    """The name of a program's, or a manifest's, object."""
    return f"{tree}{digest[:2]}/{digest[2:]}"


def digest_in(name: str) -> str:
    """The digest in an object's name, if it is one."""
    return "".join(name.rsplit("/", 2)[-2:])


def most_bytes(name: str, limit: int) -> int:
    """Bytes that an object, or those of a tree, may have on a tier with this limit."""
    return min(limit, MOST_OF_MANIFEST) if name.startswith(MANIFESTS) else limit


def each_of(
    names: Iterable[str], ask: Callable[[Sequence[str]], Mapping[str, bytes | None]], where: str
) -> Iterator[tuple[str, bytes | None]]:
    """Each name with its object, ``None`` where there is none, in as many calls as the engine wants for them.

    Parameters
    ----------
    names : iterable of str
    ask : callable
        Makes a call of :meth:`~cuda_progcache.store.tiers.engine.Engine.get_many`, which may leave some for the next.
    where : str
        The tier's name.

    Raises
    ------
    StoreError
        A call left all of them.
    """
    waiting = list(names)
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        found = ask(batch)
        if not found:
            raise StoreError(errno.EPROTO, "the server answered none of several questions", where)
        waiting = [name for name in batch if name not in found] + waiting
        yield from found.items()

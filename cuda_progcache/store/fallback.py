# SPDX-License-Identifier: Apache-2.0
"""The replacement for the default store if its directory can't be made or written."""

from __future__ import annotations

import errno
import os
import warnings

from cuda_progcache.errors import ProgCacheWarning, StoreError
from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.in_memory import InMemoryProgramCache

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any, NoReturn, Self

    from cuda_progcache.store.base import ProgramCacheResource
    from cuda_progcache.store.stack import ProgramCacheStack
    from cuda_progcache.store.stats import Span


class KeptInMemory(FileStreamProgramCache):
    """Keeps programs in memory, and reads those that the directory has."""

    _instead: ProgramCacheResource

    def __new__(cls) -> Self:
        """Make a blank object, for :meth:`instead_of`."""
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        """Do nothing: Python calls this with the arguments meant for the default store."""

    @classmethod
    def instead_of(
        cls, path: str, trouble: OSError, *, shared: bool, max_size_bytes: int | None, tiers: Any = None
    ) -> KeptInMemory:
        """Make the stand-in, and warn.

        Parameters
        ----------
        path : str
            The directory; empty if none is known.
        trouble : OSError
            What is wrong with it.
        shared, max_size_bytes, tiers
            As for :class:`FileStreamProgramCache`.
        """
        made = cls()
        made._root = cls._ROOT(path, shared=shared)
        made._instead = memory = InMemoryProgramCache(max_size_bytes=max_size_bytes)
        reason = trouble.strerror or trouble
        told = f"compiled programs are kept in memory only: {path or 'the cache'} can't be made or written ({reason})"
        readable = bool(path) and os.access(made._root.entries, os.R_OK | os.X_OK)
        from cuda_progcache.store import layers

        behind: list[ProgramCacheResource] = []
        if below := [*([(path, shared)] if readable else []), *((layer, True) for layer in layers.directories())]:
            from cuda_progcache.store.readonly import ReadOnlyProgramCache

            behind += [ReadOnlyProgramCache(layer, shared=shared) for layer, shared in below]
        made._stand_before(layers=True, tiers=tiers)
        if made.tiers:
            from cuda_progcache.store.tiers.behind import stores

            behind += stores(made.tiers)
        if behind:
            from cuda_progcache.store.stack import ProgramCacheStack

            made._instead = ProgramCacheStack((memory, *behind))
        if readable:
            told = f"{path} can't be written ({reason}): programs in it are used, and new ones are kept in memory only"
        warnings.warn(
            f"{told}; set CUDA_PROGCACHE_DIR to a directory that you can write to", ProgCacheWarning, stacklevel=3
        )
        return made

    @property
    def _stack(self) -> ProgramCacheStack | None:
        """The stack of the memory and the levels behind it; None if there are none."""
        from cuda_progcache.store.stack import ProgramCacheStack

        return self._instead if isinstance(self._instead, ProgramCacheStack) else None

    @property
    def settings(self) -> dict[str, Any] | None:
        """None: another process can't share it."""
        return None

    @property
    def roots(self) -> tuple[Path, ...]:
        """The directory, and those of the layers of installed packages."""
        return tuple(dict.fromkeys((*super().roots, *self._instead.roots)))

    def clear(self, *, pinned: bool = True) -> None:  # noqa: ARG002 - nothing is pinned in memory
        """Forget what is kept in memory."""
        self._instead.clear()

    def pins(self) -> frozenset[str]:
        """None: nothing can be pinned in memory."""
        return frozenset()

    def over_time(self) -> tuple[Span, ...]:
        """None: memory doesn't outlive the process."""
        return ()


def _forward(name: str) -> Any:
    def forwarded(self: KeptInMemory, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._instead, name)(*args, **kwargs)

    return forwarded


def _refuse(name: str, what: str) -> Any:
    def refused(self: KeptInMemory, *_: Any, **__: Any) -> NoReturn:
        raise StoreError(errno.ENOTSUP, f"can't {what}: the programs are kept in memory only", self._root.path)

    refused.__name__ = name
    return refused


for _name in ("get", "__getitem__", "load", "load_again", "__setitem__", "_assign", "publish", "__delitem__", "remove",
              "quarantine", "__len__", "entries", "first", "info", "_digests", "_sizes", "stats", "close"):  # fmt: skip
    setattr(KeptInMemory, _name, _forward(_name))
for _name, _what in {
    "pin": "pin a program",
    "unpin": "unpin a program",
    "verify": "verify the cache",
    "prune": "prune the cache",
    "census": "sum up the cache",
    "adopt": "adopt a program",
    "export": "export the cache",
    "import_": "import a bundle",
}.items():
    setattr(KeptInMemory, _name, _refuse(_name, _what))

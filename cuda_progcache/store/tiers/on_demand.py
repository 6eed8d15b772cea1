# SPDX-License-Identifier: Apache-2.0
"""An engine that is created on first use, since its module may import a client library."""

from __future__ import annotations

import errno
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from cuda_progcache.store.tiers.engine import Engine, Listed, NotInstalledError

if TYPE_CHECKING:
    from cuda_progcache.store.tiers.settings import TierSettings

#: The module of a scheme's engine, and what makes it there.
_ENGINES = {
    "redis": ("redis", "RedisEngine"),
    "rediss": ("redis", "RedisEngine"),
    "http": ("http", "HttpEngine"),
    "https": ("http", "HttpEngine"),
    "s3": ("s3", "s3_engine"),
    "gs": ("objects", "ObjectEngine"),
    "az": ("objects", "ObjectEngine"),
    "oci": ("oci", "OciEngine"),
    "file": ("layer", "LayerEngine"),
}


class EngineOnDemand(Engine):
    """The engine of a tier's scheme.

    Parameters
    ----------
    settings : TierSettings
    """

    def __init__(self, settings: TierSettings) -> None:
        self.name = settings.url
        self._settings = settings
        self._made: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine itself.

        Raises
        ------
        NotInstalledError
            It needs a client library, which isn't installed.
        """
        if self._made is None:
            home, name = _ENGINES[self._settings.scheme]
            try:
                module = importlib.import_module(f"cuda_progcache.store.tiers.{home}")
                made: Engine = getattr(module, name)(self._settings)
            except ImportError as exc:
                raise NotInstalledError(
                    errno.ENOTSUP,
                    f"needs a package that isn't installed ({exc}): pip install 'cuda-progcache[s3]'",
                    self.name,
                ) from exc
            self._made = made
        return self._made

    @property
    def keeps_time(self) -> bool:  # type: ignore[override]
        """As the engine."""
        return self.engine.keeps_time

    def prepare(self) -> None:
        """Make the engine."""
        self.engine.prepare()

    def get(self, name: str, *, limit: int, until: float) -> bytes | None:
        """As the engine."""
        return self.engine.get(name, limit=limit, until=until)

    def get_many(self, names: Sequence[str], *, limit: int, until: float) -> Mapping[str, bytes | None]:
        """As the engine."""
        return self.engine.get_many(names, limit=limit, until=until)

    def put(self, name: str, data: bytes, *, until: float) -> None:
        """As the engine."""
        self.engine.put(name, data, until=until)

    def put_many(self, objects: Mapping[str, bytes], *, until: float) -> None:
        """As the engine."""
        self.engine.put_many(objects, until=until)

    def delete(self, names: Iterable[str], *, until: float) -> None:
        """As the engine."""
        self.engine.delete(names, until=until)

    def list(self, prefix: str, *, until: float) -> Iterator[Listed]:
        """As the engine."""
        return self.engine.list(prefix, until=until)

    def close(self) -> None:
        """As the engine, if it was made."""
        if self._made is not None:
            self._made.close()

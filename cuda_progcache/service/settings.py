# SPDX-License-Identifier: Apache-2.0
"""A table of the environment variables that cuda_progcache reads.

Other modules read the variables; the table is for ``config``, ``doctor`` and the documentation.
"""

from __future__ import annotations

import os

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.secrets import masked
from cuda_progcache.errors import ConfigError
from cuda_progcache.store.tiers.configuration import VARIABLE, configured


class Setting(NamedTuple):
    """An environment variable.

    Attributes
    ----------
    name : str
    meaning : str
        What the variable sets, and its values.
    default : str
        What applies if the variable isn't set.
    """

    name: str
    meaning: str
    default: str


SETTINGS = (
    Setting("CUDA_PROGCACHE", "how caches are used: rw, ro, off or frozen", "rw"),
    Setting("CUDA_PROGCACHE_DIR", "the directory of the cache", "cuda-progcache in the user's cache directory"),
    Setting(
        "CUDA_PROGCACHE_TIERS",
        "the stores behind the cache, as URLs with spaces between them; off for none",
        "tiers in cuda_progcache.toml or pyproject.toml, otherwise none",
    ),
    Setting("CUDA_PROGCACHE_MAX_SIZE", "the size cap of the default cache: 500MB, 20GB; 0 for none", "5 GB"),
    Setting(
        "CUDA_PROGCACHE_TEMPLATES",
        "the directory of compiled templates; off for none",
        "cuda-progcache/templates in the user's cache directory",
    ),
    Setting("CUDA_PROGCACHE_LOG", "explain prints each miss on stderr, all prints every event", "nothing is printed"),
    Setting("CUDA_PROGCACHE_RECORD", "the file in which a run records the programs it uses", "nothing is recorded"),
    Setting("CUDA_PROGCACHE_TRACEBACK", "1 shows the traceback of a failed command", "a one-line message"),
    Setting("CUDA_PROGCACHE_NVRTC", "the path of NVRTC's library", "the wheels, conda, then the system's loader"),
    Setting(
        "CUDA_PROGCACHE_NVJITLINK", "the path of nvJitLink's library", "the wheels, conda, then the system's loader"
    ),
    Setting("CUDA_PROGCACHE_NVVM", "the path of libNVVM's library", "the wheels, conda, then the system's loader"),
    Setting(
        "CUDA_PROGCACHE_TOOLCHAIN",
        "a file or a cache that names the compilers to assume if none is installed",
        "the compilers that made the cache's entries",
    ),
)


def value_of(name: str) -> str | None:
    """Return the value of a variable without secrets, for display; None if it isn't set."""
    value = os.environ.get(name)
    if value is None or not value.strip() or name != VARIABLE:
        return None if value is None else masked(value)
    try:
        tiers = configured().tiers
    except ConfigError:
        return "(invalid)"
    return " ".join(tier.url for tier in tiers) or value


def unknown_settings() -> list[str]:
    """Return the environment variables that begin with ``CUDA_PROGCACHE`` but that nothing reads."""
    known = {setting.name for setting in SETTINGS}
    return sorted(name for name in os.environ if name.startswith("CUDA_PROGCACHE") and name not in known)

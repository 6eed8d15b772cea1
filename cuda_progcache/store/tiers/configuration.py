# SPDX-License-Identifier: Apache-2.0
"""The configuration of tiers.

The first of these that is set is used; they are not combined:

1. an argument: ``CompileService(tiers=[...])``, ``FileStreamProgramCache(tiers=[...])``;
2. ``CUDA_PROGCACHE_TIERS``: URLs with spaces between them, the fastest first; ``off`` for none;
3. ``tiers`` in ``cuda_progcache.toml``, or under ``[tool.cuda_progcache]`` in ``pyproject.toml``: in the current
   directory, else in the nearest above it that has either.

A tier in a file is a URL, or a table with a ``url`` and options. Relative paths are relative to the file. A file
chooses whose programs run here, so it is ignored, with a warning, if everyone can write to it, or if its owner is
neither the user, nor root, nor the owner of the current directory (root reads only its own files). Files are read once
per process and directory.

None of this is read before a program is missing on the disk, and if nothing is configured, nothing is imported.
"""

from __future__ import annotations

import functools
import os
import stat

from cuda_progcache._util.fields import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Any, TypeAlias

    from cuda_progcache.store.tiers.settings import TierSettings

    #: The types that code can pass as a tier.
    Tier: TypeAlias = str | Mapping[str, Any] | TierSettings

VARIABLE = "CUDA_PROGCACHE_TIERS"
FILE, PROJECT = "cuda_progcache.toml", "pyproject.toml"
#: The keys of a file. Everything else is set by variables, which a hit can check without reading a file.
_KEYS = ("tiers",)
_ELSEWHERE = {"mode": "CUDA_PROGCACHE", "dir": "CUDA_PROGCACHE_DIR", "max_size": "CUDA_PROGCACHE_MAX_SIZE"}


class Configured(NamedTuple):
    """The configured tiers.

    Attributes
    ----------
    tiers : tuple of TierSettings
        The fastest first.
    source : str
        The variable or the file; empty if nothing is configured.
    """

    tiers: tuple[TierSettings, ...]
    source: str


def configured() -> Configured:
    """The tiers that the environment or a file names.

    Raises
    ------
    ConfigError
        One of them is invalid. The message says where it is, and contains no secrets.
    """
    told = os.environ.get(VARIABLE, "").strip()
    if told.lower() == "off":
        return Configured((), VARIABLE)
    try:
        return _configured(told, os.getcwd())
    except FileNotFoundError:  # the current directory was removed
        return _configured(told, "")


@functools.lru_cache(maxsize=16)
def _configured(told: str, folder: str) -> Configured:
    if told:
        return Configured(given(told, VARIABLE, folder), VARIABLE)
    for path, content in _files(folder):
        table = _table(path, content)
        if table is not None:
            return Configured(_tiers(table, path), path)
    return Configured((), "")


def given(tiers: str | Iterable[Tier], where: str = "tiers", folder: str | None = None) -> tuple[TierSettings, ...]:
    """Parse tiers: a string of URLs separated by spaces, or an iterable of URLs, tables and settings.

    Raises
    ------
    ConfigError
        One is invalid, or is listed twice.
    """
    from cuda_progcache.errors import ConfigError
    from cuda_progcache.store.tiers.settings import TierSettings, parse_tier

    found: list[TierSettings] = []
    for number, one in enumerate(tiers.split() if isinstance(tiers, str) else tiers, 1):
        name = f"{where}: tier {number}"
        tier = one if isinstance(one, TierSettings) else parse_tier(one, where=name, folder=folder)
        if any(tier.url == other.url for other in found):
            raise ConfigError(f"{name}: {tier.url} is listed twice")
        found.append(tier)
    return tuple(found)


def _files(folder: str) -> Iterator[tuple[str, bytes]]:
    """The files that may have a configuration, the nearest first, with their contents."""
    here = folder
    while folder:
        for name in (FILE, PROJECT):
            path = os.path.join(folder, name)
            content = _content(path, here)
            if content is not None:
                yield path, content
        above = os.path.dirname(folder)
        folder = "" if above == folder else above


def _content(path: str, here: str) -> bytes | None:
    """The contents of a file; None if it doesn't exist or isn't trusted.

    The check is made on the open file, so that one that replaces it meanwhile isn't read.
    """
    from cuda_progcache.errors import ConfigError

    try:
        # O_NONBLOCK: a pipe with that name must not block.
        opened = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        try:
            trusted = _is_trusted(path, os.stat(path), here)
        except OSError:
            return None  # removed meanwhile, or not accessible
        if not trusted:
            return None
        raise ConfigError(f"can't read {path}: {exc.strerror}") from exc
    try:
        if not _is_trusted(path, os.fstat(opened), here):
            return None
        with open(opened, "rb", closefd=False) as file:
            return file.read()
    except OSError as exc:
        raise ConfigError(f"can't read {path}: {exc.strerror}") from exc
    finally:
        os.close(opened)


def _is_trusted(path: str, status: os.stat_result, here: str) -> bool:
    if not hasattr(os, "geteuid"):
        return True
    owners = {0, os.geteuid()}
    if os.geteuid() != 0:  # root also works in directories of users whose settings it must not follow
        try:
            owners.add(os.stat(here).st_uid)
        except OSError:
            return False  # removed meanwhile
    if status.st_uid in owners and not status.st_mode & stat.S_IWOTH:
        return True
    if os.path.basename(path) == FILE:  # no warning for a pyproject.toml, which usually has other purposes
        from cuda_progcache._util.warning import warn
        from cuda_progcache.errors import ProgCacheWarning

        whose = f"owned by user id {status.st_uid}" if status.st_uid not in owners else "writable by everyone"
        warn(f"{path} is ignored because it is {whose}; it would decide whose programs run here", ProgCacheWarning)
    return False


def _table(path: str, content: bytes) -> Mapping[str, Any] | None:
    """The section of a file that is for this package; None if there is none."""
    from cuda_progcache.errors import ConfigError

    project = os.path.basename(path) == PROJECT
    if project and b"cuda_progcache" not in content:
        return None
    import tomllib

    found: dict[str, Any] | None = None
    trouble = ""
    try:
        found = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:  # whose messages quote the text
        _, at, place = str(exc).rpartition("(at ")
        trouble = f" (at {place}" if at else ""
    if found is None:
        raise ConfigError(f"{path} isn't TOML{trouble}")
    if not project:
        return found
    table = found.get("tool", {}).get("cuda_progcache") if isinstance(found.get("tool", {}), dict) else None
    if table is not None and not isinstance(table, dict):
        raise ConfigError(f"{path}: [tool.cuda_progcache] must be a table")
    return table


def _tiers(table: Mapping[str, Any], path: str) -> tuple[TierSettings, ...]:
    from cuda_progcache._util.suggest import did_you_mean
    from cuda_progcache.errors import ConfigError

    section = "[tool.cuda_progcache] " if os.path.basename(path) == PROJECT else ""
    for name in table:
        if variable := _ELSEWHERE.get(name):
            raise ConfigError(f"{path}: {section}{name} can't be set in a file; set {variable}")
        if name not in _KEYS:
            told = f"the unknown key {name!r}" if name.replace("_", "").replace("-", "").isalnum() else "an unknown key"
            raise ConfigError(f"{path}: {section}has {told}{did_you_mean(name, _KEYS)}")
    tiers = table.get("tiers", [])
    if not isinstance(tiers, list | str):
        raise ConfigError(f"{path}: {section}tiers must be a list of URLs or tables")
    return given(tiers, path, os.path.dirname(path))

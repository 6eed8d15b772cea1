# SPDX-License-Identifier: Apache-2.0
"""Which tiers lie behind the default cache, and where that is written.

The first of these that says anything counts, alone:

1. what code asks for: ``CompileService(tiers=[...])``, ``FileStreamProgramCache(tiers=[...])``;
2. ``CUDA_PROGCACHE_TIERS``: URLs with spaces between them, the fastest first; ``off`` for none;
3. ``tiers`` in ``cuda_progcache.toml``, or under ``[tool.cuda_progcache]`` in ``pyproject.toml``: in the current
   directory, else in the nearest above it that has either.

A tier in a file is a URL, or a table with a ``url`` and options. Relative paths are relative to the file. A file is
passed over, with a warning, if everyone can write to it, or if it belongs neither to this user, to root nor to whom the
current directory belongs to (root reads its own alone): it chooses whose programs run here. Files are read once per
process and directory.

None of this is looked at before a program isn't on the disk, and where nothing is configured, nothing is imported.
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

    #: What code may give for a tier.
    Tier: TypeAlias = str | Mapping[str, Any] | TierSettings

VARIABLE = "CUDA_PROGCACHE_TIERS"
FILE, PROJECT = "cuda_progcache.toml", "pyproject.toml"
#: What a file may set. All else is set by variables, which a hit can look at without reading a file.
_KEYS = ("tiers",)
_ELSEWHERE = {"mode": "CUDA_PROGCACHE", "dir": "CUDA_PROGCACHE_DIR", "max_size": "CUDA_PROGCACHE_MAX_SIZE"}


class Configured(NamedTuple):
    """What is configured.

    Attributes
    ----------
    tiers : tuple of TierSettings
        The fastest first.
    source : str
        The variable, or the file; empty where nothing is.
    """

    tiers: tuple[TierSettings, ...]
    source: str


def configured() -> Configured:
    """The tiers that the environment or a file names.

    Raises
    ------
    ConfigError
        One of them can't be used as it is written; the message says where it is, and has nothing of a secret.
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
    """Read what names tiers: a text of URLs with spaces between them, or URLs, tables and settings one by one.

    Raises
    ------
    ConfigError
        One is wrong, or is named twice.
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
    """The files that may configure something, the nearest first, with what is in them."""
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
    """What is in a file; None where there is none, or one that isn't trusted.

    The open file is judged, so that one that takes its place meanwhile isn't read.
    """
    from cuda_progcache.errors import ConfigError

    try:
        # A pipe in its place keeps nobody waiting.
        opened = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as exc:
        try:
            trusted = _is_trusted(path, os.stat(path), here)
        except OSError:
            return None  # gone since, or out of reach
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
    if os.geteuid() != 0:  # root goes into directories of users that it doesn't take orders from
        try:
            owners.add(os.stat(here).st_uid)
        except OSError:
            return False  # gone since
    if status.st_uid in owners and not status.st_mode & stat.S_IWOTH:
        return True
    if os.path.basename(path) == FILE:  # others' pyproject.toml is mostly about something else
        from cuda_progcache._util.warning import warn
        from cuda_progcache.errors import ProgCacheWarning

        whose = f"owned by user id {status.st_uid}" if status.st_uid not in owners else "writable by everyone"
        warn(f"{path} is ignored because it is {whose}; it would decide whose programs run here", ProgCacheWarning)
    return False


def _table(path: str, content: bytes) -> Mapping[str, Any] | None:
    """What a file says to this package; None: nothing."""
    from cuda_progcache.errors import ConfigError

    project = os.path.basename(path) == PROJECT
    if project and b"cuda_progcache" not in content:
        return None
    import tomllib

    found: dict[str, Any] | None = None
    trouble = ""
    try:
        found = tomllib.loads(content.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:  # which hold the text
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

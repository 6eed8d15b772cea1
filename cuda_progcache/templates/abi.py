# SPDX-License-Identifier: Apache-2.0
"""What compiled templates depend on besides their sources: this Python, this compiler, this Jinja2.

The tag is a digest of contents. Reading all these files takes milliseconds, so it is remembered beside the compiled
templates, under the files' sizes, times and inodes.
"""

from __future__ import annotations

import os
import sys

from cuda_progcache._util.digest import is_hex, sha256

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON_TAG: str = sys.implementation.cache_tag or f"python-{sys.hexversion:x}"
"""As in ``cpython-311``: the format of marshalled code changes with it."""

MEMO = "__progcache_abi_"
_tag = ""


def abi_tag(directory: str | None, *, keep: bool = True) -> str:
    """Return the digest of everything that decides how a template's source becomes code.

    That is the content of every module of this package's templates room and of Jinja2.

    Parameters
    ----------
    directory : str or None
        Where the digest is remembered between processes; it must be ours alone. None: nowhere.
    keep : bool
        Remember it there; else it is only looked for.

    Returns
    -------
    str
        16 hex digits.
    """
    global _tag  # noqa: PLW0603  (files that are loaded don't change any more)
    if not _tag:
        try:
            files = list(_files())
            if directory is None:
                _tag = _digest(files)
            else:
                signature = sha256(repr(files).encode()).hexdigest()[:32]
                memo = os.path.join(directory, f"{MEMO}{signature}")
                _tag = _remembered(memo) or (_remember(memo, _digest(files)) if keep else _digest(files))
        except OSError:
            _tag = _versions()
    return _tag


def _files() -> Iterator[tuple[str, str, int, int, int, int]]:
    """Yield name, path, size, times and inode of each module, sorted by name within its package."""
    for package, folder in (("templates", os.path.dirname(os.path.abspath(__file__))), ("jinja2", _jinja2_folder())):
        found = [(f"{package}/{name}", entry) for name, entry in _modules(folder, "")]
        for name, entry in sorted(found, key=lambda item: item[0]):
            status = entry.stat()
            yield name, entry.path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _modules(folder: str, prefix: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".py"):
                yield prefix + entry.name, entry
            elif entry.is_dir() and not entry.name.startswith(("_", ".")):
                yield from _modules(entry.path, f"{prefix}{entry.name}/")


def _jinja2_folder() -> str:
    loaded = sys.modules.get("jinja2")
    if loaded is not None and loaded.__file__:
        return os.path.dirname(loaded.__file__)
    # What importlib.util.find_spec would do, without the modules that it brings along.
    from _frozen_importlib_external import PathFinder

    spec = PathFinder.find_spec("jinja2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("jinja2 isn't installed, or not as files")
    return os.path.dirname(spec.origin)


def _digest(files: list[tuple[str, str, int, int, int, int]]) -> str:
    digest = sha256()
    for name, path, *_ in files:
        with open(path, "rb") as file:
            content = file.read()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def _versions() -> str:
    """Return the digest of the versions, for packages that aren't installed as files (a zip, a frozen program)."""
    from importlib.metadata import version

    import cuda_progcache

    return sha256(f"{cuda_progcache.__version__} {version('jinja2')}".encode()).hexdigest()[:16]


def _remembered(memo: str) -> str:
    try:
        with open(memo, "rb") as file:
            tag = file.read(64).decode("utf-8", "replace")
    except OSError:
        return ""
    return tag if len(tag) == 16 and is_hex(tag) else ""


def _remember(memo: str, tag: str) -> str:
    from contextlib import suppress

    from cuda_progcache._util.files import put_in_place

    with suppress(OSError):  # a directory that can't be written, or another thread's file: computed again next time
        put_in_place(memo, tag.encode(), staged=f"{memo}.{os.getpid()}", mode=0o600)
    return tag

# SPDX-License-Identifier: Apache-2.0
"""The tags of the software that a compiled template depends on: the Python, the template compiler and Jinja2.

The ABI tag is a digest of the source files of the compiler and Jinja2. Reading all the files takes milliseconds, so the
tag is cached beside the compiled templates, in a file whose name is derived from the sizes, times and inodes of the
source files.
"""

from __future__ import annotations

import os
import sys

from cuda_progcache._util.digest import is_hex, sha256

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Iterator

PYTHON_TAG: str = sys.implementation.cache_tag or f"python-{sys.hexversion:x}"
"""The Python version, such as ``cpython-311``. The format of marshalled code depends on it."""

MEMO = "__progcache_abi_"
_tag = ""


def abi_tag(directory: str | None, *, keep: bool = True) -> str:
    """Return a digest of the software that turns a template's source into code.

    The digest covers every module of `cuda_progcache.templates` and of Jinja2.

    Parameters
    ----------
    directory : str or None
        The directory that caches the digest between processes; nobody else may have access to it. None: no caching.
    keep : bool
        Whether to write the digest to `directory`. If False, `directory` is only searched.

    Returns
    -------
    str
        16 hex digits.
    """
    global _tag  # noqa: PLW0603  (modules that are loaded no longer change)
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
    """Yield the name, path, size, times and inode of each module, sorted by name within each package."""
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
    # This does what importlib.util.find_spec does, without the modules that importing importlib.util loads.
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
    """Return a digest of the version numbers, for packages that aren't installed as files (a zip, a frozen program)."""
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

    with suppress(OSError):  # the directory is read-only, or another thread is writing: compute the tag again next time
        put_in_place(memo, tag.encode(), staged=f"{memo}.{os.getpid()}", mode=0o600)
    return tag

# SPDX-License-Identifier: Apache-2.0
"""Template files and search paths: the first folder that contains a template's name wins."""

from __future__ import annotations

import os

from cuda_progcache._util.digest import sha256

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Sequence


class TemplateFile:
    """A template's file at the time it was read.

    Attributes
    ----------
    name, path, text : str
    digest : str
        The SHA-256 of the file, which is also that of the text in UTF-8; 64 hex digits.
    """

    __slots__ = ("_signature", "digest", "name", "path", "text")

    def __init__(self, name: str, path: str, data: bytes, signature: tuple[int, int, int] | None) -> None:
        self.name = name
        self.path = path
        try:
            self.text = data.decode()
        except UnicodeDecodeError as error:
            from cuda_progcache.errors import TemplateError

            line = data.count(b"\n", 0, error.start) + 1
            raise TemplateError(f"{name}:{line}: {path} is not UTF-8", template=name, line=line) from error
        self.digest = sha256(data).hexdigest()
        self._signature = signature

    def is_current(self) -> bool:
        """Whether the file has been neither edited nor removed since it was read."""
        return _signature(self.path) == self._signature


class SearchPath:
    """An ordered list of folders with templates.

    Parameters
    ----------
    roots : sequence of str
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = tuple(roots)

    def read(self, name: str) -> TemplateFile | None:
        """Return the file of a template; None if no folder has one of that name, or the name leads out of the folders.

        Raises
        ------
        TemplateError
            If the file can't be read or isn't UTF-8.
        """
        parts = name.split("/")
        if any(part == ".." or os.sep in part or (os.altsep and os.altsep in part) for part in parts):
            return None
        inner = os.path.join("", *(part for part in parts if part and part != "."))
        if not inner:
            return None
        for root in self.roots:
            path = os.path.join(root, inner)
            signature = _signature(path)  # taken before the read: a write in between makes the file stale
            if signature is None:
                continue
            data = _contents(path, name)
            if data is not None:
                return TemplateFile(name, path, data, signature)
        return None

    def names(self) -> list[str]:
        """Return the names of all files in the folders."""
        return sorted(
            os.path.relpath(os.path.join(folder, file), root).replace(os.sep, "/")
            for root in self.roots
            for folder, _, files in os.walk(root)
            for file in files
        )


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):  # ValueError: a name with a null character
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _contents(path: str, name: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError as error:
        from cuda_progcache.errors import TemplateError

        raise TemplateError(f"{name}: can't read {path}: {error.strerror}", template=name) from error

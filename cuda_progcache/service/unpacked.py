# SPDX-License-Identifier: Apache-2.0
"""Unpacking of kernel libraries in archives, such as a zipped application; the files are kept while the process runs.

Compilers, debuggers and worker processes need the templates as files, and NVRTC opens the library's own headers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from cuda_progcache._util.scratch import ScratchFolder
from cuda_progcache.errors import ManifestError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Protocol

    class Resource(Protocol):
        """A file or folder as :func:`importlib.resources.files` returns it."""

        @property
        def name(self) -> str:
            """The name without its folder."""

        def is_dir(self) -> bool:
            """Return whether the resource is a folder."""

        def read_bytes(self) -> bytes:
            """Return the file's content."""

        def iterdir(self) -> Iterable[Resource]:
            """Return the folder's content."""


_unpacked: dict[str, ScratchFolder] = {}


def folder_of(library: Resource) -> str:
    """Unpack a library in an archive; return its folder, the same at each call in a process.

    Parameters
    ----------
    library : importlib.resources.abc.Traversable
        A folder with a ``manifest.toml``.

    Raises
    ------
    ManifestError
        If the library isn't a folder.
    """
    if not hasattr(library, "iterdir") or not hasattr(library, "is_dir"):
        raise ManifestError(
            f"a kernel library must be the path of a folder, or a folder from importlib.resources.files; got "
            f"{type(library).__name__}"
        )
    if not library.is_dir():
        raise ManifestError(
            f"{library} is not a folder or doesn't exist; give the folder that contains the library's manifest.toml"
        )
    name = f"{os.getpid()} {library}"
    if name not in _unpacked:
        folder = ScratchFolder("progcache-library-")
        _unpack(library, folder.path)
        _unpacked[name] = folder
    return _unpacked[name].path


def _unpack(resource: Resource, folder: str) -> None:
    for part in resource.iterdir():
        path = os.path.join(folder, os.path.basename(part.name))
        if part.is_dir():
            os.mkdir(path)
            _unpack(part, path)
        else:
            with open(path, "wb") as file:
                file.write(part.read_bytes())

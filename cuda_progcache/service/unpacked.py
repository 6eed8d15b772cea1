# SPDX-License-Identifier: Apache-2.0
"""Kernel libraries that lie in an archive, such as a zipped application: unpacked for as long as the process runs.

Templates are files to compilers, debuggers and worker processes, and a library's own headers are opened by NVRTC.
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
        """What :func:`importlib.resources.files` gives."""

        @property
        def name(self) -> str:
            """Without the folders before it."""

        def is_dir(self) -> bool:
            """Whether it is a folder."""

        def read_bytes(self) -> bytes:
            """What is in it."""

        def iterdir(self) -> Iterable[Resource]:
            """What is in the folder."""


_unpacked: dict[str, ScratchFolder] = {}


def folder_of(library: Resource) -> str:
    """The folder that a library in an archive is unpacked to; the same one each time.

    Parameters
    ----------
    library : importlib.resources.abc.Traversable
        A folder with a ``manifest.toml``.

    Raises
    ------
    ManifestError
        It is no folder.
    """
    if not hasattr(library, "iterdir") or not hasattr(library, "is_dir"):
        raise ManifestError(
            f"a kernel library must be the path of a folder, or what importlib.resources.files returns; got "
            f"{type(library).__name__}"
        )
    if not library.is_dir():
        raise ManifestError(
            f"{library} is not a folder, or doesn't exist; give the folder that has the library's manifest.toml"
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

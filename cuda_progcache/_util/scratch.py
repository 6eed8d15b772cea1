# SPDX-License-Identifier: Apache-2.0
"""Temporary folders."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref


class ScratchFolder:
    """A folder in the temporary directory, removed when closed, and at the latest when the process ends.

    Its removal is registered before it is created, so a signal between the two leaves no folder behind, unlike with
    :class:`tempfile.TemporaryDirectory`. A forked child leaves the folder to its parent.

    Parameters
    ----------
    prefix : str
        The beginning of the folder's name.

    Attributes
    ----------
    path : str
        The path of the folder.
    """

    def __init__(self, prefix: str) -> None:
        self.path = os.path.join(tempfile.gettempdir(), prefix + secrets.token_hex(8))
        self._owner = os.getpid()
        weakref.finalize(self, _remove, self.path, self._owner)
        os.mkdir(self.path, 0o700)

    def close(self) -> None:
        """Remove the folder."""
        _remove(self.path, self._owner)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)

# SPDX-License-Identifier: Apache-2.0
"""Folders for what is needed for a moment."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import weakref


class ScratchFolder:
    """A folder in the temporary directory, removed when it is closed, and at the latest when this process ends.

    Its removal is arranged for before it is made. A signal between the two leaves a folder of
    :class:`tempfile.TemporaryDirectory` behind, and none of these. A forked child leaves it to its parent.

    Parameters
    ----------
    prefix : str
        What its name begins with.

    Attributes
    ----------
    path : str
    """

    def __init__(self, prefix: str) -> None:
        self.path = os.path.join(tempfile.gettempdir(), prefix + secrets.token_hex(8))
        self._owner = os.getpid()
        weakref.finalize(self, _remove, self.path, self._owner)
        os.mkdir(self.path, 0o700)

    def close(self) -> None:
        """Remove it."""
        _remove(self.path, self._owner)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)

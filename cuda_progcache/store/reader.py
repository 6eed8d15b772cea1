# SPDX-License-Identifier: Apache-2.0
"""A store on a directory that is only read. Separate from ``readonly``, so that a hit imports little."""

from __future__ import annotations

import errno
import os
import stat

from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.root import Root


class ReadRoot(Root):
    """A read-only root: nothing is created, moved or removed in it."""

    read_only = True

    def open(self) -> None:
        """Check it (OSError if it isn't a directory; UnsafeRootError)."""
        if not stat.S_ISDIR(os.stat(self.path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "the cache root is not a directory", self.path)
        self.check()


class Reader(FileStreamProgramCache):
    """Reads the entries of a directory; counts only in memory."""

    _ROOT = ReadRoot  # and no size cap, so last uses aren't written

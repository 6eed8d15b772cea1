# SPDX-License-Identifier: Apache-2.0
"""A directory that is only read. Apart from :mod:`~cuda_progcache.store.readonly`, so that a hit imports little."""

from __future__ import annotations

import errno
import os
import stat

from cuda_progcache.store.file_stream import FileStreamProgramCache
from cuda_progcache.store.root import Root


class ReadRoot(Root):
    """A directory that is looked at: nothing is made, moved or removed in it."""

    read_only = True

    def open(self) -> None:
        """Check it (OSError: it is no directory; UnsafeRootError)."""
        if not stat.S_ISDIR(os.stat(self.path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "the cache root is not a directory", self.path)
        self.check()


class Reader(FileStreamProgramCache):
    """Reads the entries of a directory; counts in memory alone."""

    _ROOT = ReadRoot  # and no size cap, so that no last use is bumped

# SPDX-License-Identifier: Apache-2.0
"""The location of the user's cache directory."""

from __future__ import annotations

import errno
import os
import sys


def user_cache_dir() -> str:
    """Return the user's directory for cached data.

    The result is that of platformdirs, which is used except on Linux: importing it takes 20 ms, half the time of a hit
    in a new process.

    Raises
    ------
    OSError
        The user has no home directory: HOME isn't set, and the system doesn't know the user id.
    """
    if sys.platform == "linux":
        chosen = os.environ.get("XDG_CACHE_HOME", "").strip()
        # The XDG specification: a relative path must be ignored.
        found = chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache")
        if not os.path.isabs(found):
            raise FileNotFoundError(
                errno.ENOENT,
                f"no home directory is known for user id {os.getuid()}; set HOME or CUDA_PROGCACHE_DIR",
                found,
            )
        return found
    else:  # noqa: RET505 - type checkers check only one of the two branches
        import platformdirs

        return platformdirs.user_cache_dir()

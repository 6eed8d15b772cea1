# SPDX-License-Identifier: Apache-2.0
"""The user's directories."""

from __future__ import annotations

import errno
import os
import sys


def user_cache_dir() -> str:
    """The directory for what can be made again.

    What platformdirs says, which is asked where the answer isn't short: importing it takes 20 ms, half of a cached
    kernel's way.

    Raises
    ------
    OSError
        No home directory is known of this user: none is set, and the system doesn't know the user id.
    """
    if sys.platform == "linux":
        chosen = os.environ.get("XDG_CACHE_HOME", "").strip()
        # The XDG rules: a relative path is to be ignored.
        found = chosen if os.path.isabs(chosen) else os.path.expanduser("~/.cache")
        if not os.path.isabs(found):
            raise FileNotFoundError(
                errno.ENOENT,
                f"no home directory is known of user id {os.getuid()}; set HOME or CUDA_PROGCACHE_DIR",
                found,
            )
        return found
    else:  # noqa: RET505 - type checkers look at one of the two
        import platformdirs

        return platformdirs.user_cache_dir()

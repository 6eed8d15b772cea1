# SPDX-License-Identifier: Apache-2.0
"""The user's directories."""

from __future__ import annotations

import os
import sys


def user_cache_dir() -> str:
    """The directory for what can be made again.

    What platformdirs says, which is asked where the answer isn't short: importing it takes 20 ms, half of a cached
    kernel's way.
    """
    if sys.platform == "linux":
        return os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.expanduser("~/.cache")
    else:  # noqa: RET505 - type checkers look at one of the two
        import platformdirs

        return platformdirs.user_cache_dir()

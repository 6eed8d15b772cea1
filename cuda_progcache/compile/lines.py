# SPDX-License-Identifier: Apache-2.0
"""Small text files in a cache's directory to which processes append lines. All of them are disposable."""

from __future__ import annotations

import contextlib
import os

from cuda_progcache._util import files
from cuda_progcache.store.derived import write_beside

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FLAGS = os.O_WRONLY | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def append(cache: Any, path: str, line: str) -> int:
    """Append a line to a file below a cache's root; create the file if necessary.

    Returns
    -------
    int
        The file's size after the append; 0 if this is its first line.

    Raises
    ------
    OSError
        If the file can't be written.
    """
    data = f"{line}\n".encode()
    try:
        try:
            descriptor = os.open(path, _FLAGS)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # another process was quicker, and its lines are kept
                write_beside(cache.path, path, b"", new=True)
            descriptor = os.open(path, _FLAGS)
    except PermissionError:  # another user's file in a shared directory: replace it
        before = read(path)
        rewrite(cache, path, [*before, line])
        return len(data) * (len(before) + 1)
    try:
        os.write(descriptor, data)  # one call, so that lines of other processes come before or after it
        size = os.fstat(descriptor).st_size
        return size if size > len(data) else 0
    finally:
        os.close(descriptor)


def read(path: str) -> list[str]:
    """Return the lines of a file, the oldest first; empty if it is missing or can't be read."""
    try:
        content, _ = files.read_regular(path)
    except OSError:
        return []
    return (content or b"").decode("utf-8", "replace").splitlines()


def rewrite(cache: Any, path: str, lines: list[str]) -> None:
    """Replace a file's contents by these lines; raises OSError if that fails."""
    write_beside(cache.path, path, "".join(f"{line}\n" for line in lines).encode())

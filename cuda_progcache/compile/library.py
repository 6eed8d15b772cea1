# SPDX-License-Identifier: Apache-2.0
"""A compiler's shared library, called through :mod:`ctypes`.

These are our own bindings because they load exactly the file that is in the key, work with every version of it, and are
imported in 15 ms; ``cuda.bindings`` takes ten times as long. A compiler process imports little else.
"""

from __future__ import annotations

import ctypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class RefusedError(Exception):
    """A compiler's status and log, verbatim, and its header trace up to the error."""

    def __init__(self, status: str, log: str = "") -> None:
        super().__init__(status, log)
        self.status = status
        self.log = log
        self.told: bytes | None = None


class UnusableError(Exception):
    """A library can't be loaded, or lacks a function."""


class Library:
    """A shared library whose functions return a status, 0 for success.

    Parameters
    ----------
    path : str
        The library's path. Its symbols aren't made global (``RTLD_LOCAL``).
    beside : sequence of str
        Paths of libraries that the library loads by name. They are loaded first, so that it finds exactly these: NVRTC
        in the 13.0 wheel, for example, has no search path that contains its builtins.

    Raises
    ------
    UnusableError
        If the library can't be loaded.
    """

    def __init__(self, path: str, beside: Sequence[str] = ()) -> None:
        self.path = path
        self._beside = [_loaded(other) for other in beside]
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise UnusableError(f"can't load {path}: {error}") from error

    def status_name(self, status: int) -> str:
        """Return the name of a status in the library's header file."""
        return f"status {status}"

    def find(self, *names: str) -> Any:
        """Return the first of these functions that the library has; None if it has none of them."""
        for name in names:
            try:
                return self._library[name]
            except AttributeError:
                continue
        return None

    def function(self, *names: str) -> Any:
        """Return the first of these functions that the library has; raises UnusableError if it has none of them."""
        found = self.find(*names)
        if found is None:
            raise UnusableError(f"{self.path} is too old: it has no {names[0]}")
        return found

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function; raises RefusedError for any status but success."""
        status = self.function(name)(*arguments)
        if status:
            raise RefusedError(self.status_name(status))

    def read(self, size: str, content: str, handle: Any) -> bytes:
        """Read data with a pair of functions: one returns the size, the other fills a buffer of that size."""
        length = ctypes.c_size_t()
        self.call(size, handle, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(max(length.value, 1))
        if length.value:
            self.call(content, handle, buffer)
        return buffer.raw[: length.value]


def _loaded(path: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path)
    except OSError:  # the library may not need it, or reports what is missing itself
        return None


def strings(values: Sequence[bytes]) -> Any:
    """Return an array of C strings."""
    return (ctypes.c_char_p * max(len(values), 1))(*values)


def text(log: bytes) -> str:
    """Return a log as text, without trailing NULs."""
    return log.rstrip(b"\0").decode("utf-8", "backslashreplace")

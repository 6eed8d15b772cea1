# SPDX-License-Identifier: Apache-2.0
"""A compiler's shared library, called through :mod:`ctypes`.

Bindings of our own, since they load exactly the file that is in the key, serve every version of it alike, and are
imported in 15 ms, where ``cuda.bindings`` takes ten times that. A compiler process imports this and little else.
"""

from __future__ import annotations

import ctypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any


class RefusedError(Exception):
    """A compiler's status and log, verbatim, and what it had told of the headers by then."""

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
        Of the file; its symbols stay its own (``RTLD_LOCAL``).
    beside : sequence of str
        Paths of libraries that it will look for by name. They are loaded first, so that it finds these: NVRTC 13.0's
        wheel, for one, has no search path in which its builtins would be.

    Raises
    ------
    UnusableError
        If it can't be loaded.
    """

    def __init__(self, path: str, beside: Sequence[str] = ()) -> None:
        self.path = path
        self._beside = [_loaded(other) for other in beside]
        try:
            self._library = ctypes.CDLL(path)
        except OSError as error:
            raise UnusableError(f"{path} can't be loaded: {error}") from error

    def status_name(self, status: int) -> str:
        """What the library's header file calls a status."""
        return f"status {status}"

    def find(self, *names: str) -> Any:
        """The function of the first of these names that the library has; None if it has none of them."""
        for name in names:
            try:
                return self._library[name]
            except AttributeError:
                continue
        return None

    def function(self, *names: str) -> Any:
        """As :meth:`find`; raises UnusableError where there is none."""
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
        """What a pair of functions gives: one tells the size, the other fills a buffer of it."""
        length = ctypes.c_size_t()
        self.call(size, handle, ctypes.byref(length))
        buffer = ctypes.create_string_buffer(max(length.value, 1))
        if length.value:
            self.call(content, handle, buffer)
        return buffer.raw[: length.value]


def _loaded(path: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(path)
    except OSError:  # who looks for it may do without, or says itself what is missing
        return None


def strings(values: Sequence[bytes]) -> Any:
    """An array of C strings."""
    return (ctypes.c_char_p * max(len(values), 1))(*values)


def text(log: bytes) -> str:
    """A log, without the NULs that end it."""
    return log.rstrip(b"\0").decode("utf-8", "backslashreplace")

# SPDX-License-Identifier: Apache-2.0
"""Parsing of Python source text, also in programs with threads."""

from __future__ import annotations

import ast

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The maximum number of attempts to parse a text.
_ATTEMPTS = 10


def parse(text: str | bytes, filename: str = "<unknown>", mode: str = "exec") -> Any:
    """Parse a source text, as :func:`ast.parse` does.

    Up to CPython 3.11.7, all threads count the depth of the tree in one variable. If a parse is interrupted by another
    one, in another thread or in a finalizer, it can fail with SystemError. The text is then parsed again.

    Returns
    -------
    ast.Module or ast.Expression
        Depending on the mode, ``exec`` or ``eval``.

    Raises
    ------
    SyntaxError, ValueError, RecursionError
        As :func:`ast.parse` raises them.

    References
    ----------
    https://github.com/python/cpython/issues/106905
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return ast.parse(text, filename, mode)
        except SystemError:
            continue
    return ast.parse(text, filename, mode)

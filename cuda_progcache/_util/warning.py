# SPDX-License-Identifier: Apache-2.0
"""Warnings that point at the line that called into this package, however deep the call stack within it."""

from __future__ import annotations

import os
import sys
from contextvars import ContextVar

from cuda_progcache._util.fields import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


class Place(NamedTuple):
    """A line of Python code, in the form that :func:`warnings.warn_explicit` takes."""

    file: str
    line: int
    module: str
    registry: dict[Any, Any]


#: The line on whose behalf one of this package's threads works; the thread's own call stack doesn't contain it.
asking: ContextVar[Place | None] = ContextVar("cuda_progcache_asking", default=None)


def caller() -> Place:
    """Return the line outside this package that called into it; in a command, which has none, the outermost line."""
    known = asking.get()
    if known is not None:
        return known
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_PACKAGE) and frame.f_back is not None:
        frame = frame.f_back
    module, registry = frame.f_globals.get("__name__", ""), frame.f_globals.setdefault("__warningregistry__", {})
    return Place(frame.f_code.co_filename, frame.f_lineno, module, registry)


def warn(message: str, category: type[Warning]) -> None:
    """Issue a warning at the line that called into this package.

    Parameters
    ----------
    message : str
    category : type of Warning
    """
    import warnings

    warnings.warn_explicit(message, category, *caller())

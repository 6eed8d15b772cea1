# SPDX-License-Identifier: Apache-2.0
"""A function called as if by nobody: how deep its caller is in the stack doesn't decide what it can do."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")


def on_own_stack(function: Callable[[Any], T], argument: Any) -> T:
    """Call a function; where that recurses too deeply, once more in a thread, which has a whole stack.

    JSON is read and written recursively. What nests some hundred levels deep can be read by a caller at the bottom of
    the stack, and not by one far up.

    Raises
    ------
    ValueError
        It recurses too deeply even so.
    RecursionError
        No thread can be started, so that nothing is known.
    """
    try:
        return function(argument)
    except RecursionError as far_up:
        try:
            from concurrent.futures import ThreadPoolExecutor

            alone = ThreadPoolExecutor(1)
            done = alone.submit(function, argument)  # takes more frames than to wait for it
        except RuntimeError:  # no room for it, no more threads, or the interpreter is shutting down
            raise far_up from None
        with alone:
            try:
                return done.result()
            except RecursionError:
                raise ValueError("it is nested too deeply") from None

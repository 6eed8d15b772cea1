# SPDX-License-Identifier: Apache-2.0
"""Calls of recursive functions that don't depend on the depth of the caller's stack."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TypeVar

    T = TypeVar("T")


def on_own_stack(function: Callable[[Any], T], argument: Any) -> T:
    """Call a function; if it recurses too deeply, call it again in a new thread, which has an empty stack.

    JSON is read and written recursively. A value nested some hundred levels deep may be readable for a caller near the
    bottom of the stack, but not for one whose own stack is deep.

    Raises
    ------
    ValueError
        The function recurses too deeply even in a new thread.
    RecursionError
        No thread can be started, so the call can't be repeated.
    """
    try:
        return function(argument)
    except RecursionError as far_up:
        try:
            from concurrent.futures import ThreadPoolExecutor

            alone = ThreadPoolExecutor(1)
            done = alone.submit(function, argument)  # needs more stack frames than waiting for the result
        except RuntimeError:  # the stack is full, no thread can be started, or the interpreter is shutting down
            raise far_up from None
        with alone:
            try:
                return done.result()
            except RecursionError:
                raise ValueError("it is nested too deeply") from None

# SPDX-License-Identifier: Apache-2.0
"""The runtime functions of ``{% require %}`` and ``{% unroll %}``."""

from __future__ import annotations

from cuda_progcache.errors import TemplateError
from cuda_progcache.templates.undefined import is_undefined

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn


def refuse(message: object, names: Sequence[str], values: Sequence[object], template: str, line: int) -> NoReturn:
    """Raise the error of a ``{% require %}`` whose condition is false.

    Parameters
    ----------
    message : object
        The message in the template.
    names, values : sequence
        The variables in the condition; the error shows them, except functions.
    template, line : str, int
        The place of the statement.

    Raises
    ------
    TemplateError
        Always.
    """
    pairs = [
        f"{name} is undefined" if is_undefined(value) else f"{name} = {value!r}"
        for name, value in zip(names, values, strict=True)
        if is_undefined(value) or not callable(value)
    ]
    tail = f" ({', '.join(pairs)})" if pairs else ""
    raise TemplateError(f"{template}:{line}: {message}{tail}", template=template, line=line)


def pragma(factor: object, template: str, line: int) -> str:
    """Return ``#pragma unroll factor`` with a line break.

    Raises
    ------
    TemplateError
        If `factor` is neither a positive integer nor a non-blank string.
    """
    whole = not isinstance(factor, bool) and isinstance(factor, int) and factor >= 1
    if not whole and not (isinstance(factor, str) and factor.strip()):
        message = f"{template}:{line}: unroll takes a positive integer or a C++ expression, not {factor!r}"
        raise TemplateError(message, template=template, line=line)
    return f"#pragma unroll {factor}\n"

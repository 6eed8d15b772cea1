# SPDX-License-Identifier: Apache-2.0
"""Conversion of values to JSON, which has no infinities and no NaN (RFC 8259, section 6)."""

from __future__ import annotations

from collections.abc import Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def json_value(value: Any) -> Any:
    """Replace non-finite numbers in a value with strings (``"inf"``, ``"-inf"``, ``"nan"``), which JSON can hold.

    Parameters
    ----------
    value : object
        Mappings, lists and tuples are converted recursively; other values are returned unchanged.
    """
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)
    if isinstance(value, Mapping):
        return {name: json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return value

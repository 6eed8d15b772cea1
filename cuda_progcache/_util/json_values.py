# SPDX-License-Identifier: Apache-2.0
"""Values for JSON, which has no infinities and no NaN (RFC 8259, section 6)."""

from __future__ import annotations

from collections.abc import Mapping

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def json_value(value: Any) -> Any:
    """A value as JSON can hold it: numbers that aren't finite become their text (``"inf"``, ``"-inf"``, ``"nan"``).

    Parameters
    ----------
    value : object
        Mappings, lists and tuples are gone through; everything else stays as it is.
    """
    if isinstance(value, float):
        return value if value - value == 0 else repr(value)
    if isinstance(value, Mapping):
        return {name: json_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(part) for part in value]
    return value

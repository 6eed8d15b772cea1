# SPDX-License-Identifier: Apache-2.0
"""JSON read without importing :mod:`json`, which compiles regular expressions: 6 ms of a cached kernel's way."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_scan: Callable[[str, int], tuple[Any, int]] | None = None


class _Settings:
    """What :class:`json.JSONDecoder` would tell its scanner."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")


def loads(text: bytes) -> Any:
    """The value of a JSON text in UTF-8, with nothing around it; NaN and infinities are none.

    Raises
    ------
    ValueError, RecursionError
        It is no JSON text.
    """
    global _scan  # noqa: PLW0603 - made once
    if _scan is None:
        try:
            from _json import make_scanner  # type: ignore[import-not-found, unused-ignore]
        except ImportError:  # another Python than CPython
            import json

            return json.loads(text, parse_constant=_Settings.parse_constant)
        _scan = make_scanner(_Settings)  # type: ignore[arg-type, unused-ignore]
    decoded = text.decode("utf-8")
    try:
        value, end = _scan(decoded, 0)
    except StopIteration as exc:
        raise ValueError(f"no JSON value at character {exc.value}") from None
    if end != len(decoded):
        raise ValueError(f"more than one JSON value, from character {end} on")
    return value

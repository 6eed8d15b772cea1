# SPDX-License-Identifier: Apache-2.0
"""A JSON parser that doesn't import :mod:`json`, whose regular expressions would add 6 ms to a hit in a new process."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

_scan: Callable[[str, int], tuple[Any, int]] | None = None


class _Settings:
    """The settings that :class:`json.JSONDecoder` passes to its scanner."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float, parse_int = float, int

    @staticmethod
    def parse_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} isn't valid JSON")


def loads(text: bytes) -> Any:
    """Parse a JSON text in UTF-8 without surrounding whitespace; NaN and infinities are rejected.

    Raises
    ------
    ValueError, RecursionError
        The text isn't valid JSON, or is nested too deeply.
    """
    global _scan  # noqa: PLW0603 - created once
    if _scan is None:
        try:
            from _json import make_scanner  # type: ignore[import-not-found, unused-ignore]
        except ImportError:  # not CPython
            import json

            return json.loads(text, parse_constant=_Settings.parse_constant)
        _scan = make_scanner(_Settings)  # type: ignore[arg-type, unused-ignore]
    decoded = text.decode("utf-8")
    try:
        value, end = _scan(decoded, 0)
    except StopIteration as exc:
        raise ValueError(f"no JSON value at character {exc.value}") from None
    if end != len(decoded):
        raise ValueError(f"unexpected text after the JSON value, at character {end}")
    return value

# SPDX-License-Identifier: Apache-2.0
"""The size cap of the default store, and sizes as people write them."""

from __future__ import annotations

import os

#: The size cap of the default store, in bytes, if none is configured.
DEFAULT_MAX_SIZE = 5 * 10**9

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Turn ``500MB``, ``2GiB``, ``1.5g`` or ``0`` into bytes.

    Raises
    ------
    ValueError
        The text isn't a size.
    """
    written = text.strip().lower()
    number = written.rstrip("kmgtib ")
    unit = written[len(number) :].strip().removesuffix("b")
    if unit not in _UNITS or not number.isascii() or not number.replace(".", "", 1).isdigit() or number[:1] == ".":
        raise ValueError(f"{text!r} isn't a size such as 500MB, 2GiB or 0")
    return int(float(number) * _UNITS[unit])


def default_max_size() -> int | None:
    """The default store's size cap: ``CUDA_PROGCACHE_MAX_SIZE``, or 5 GB; ``None`` for no cap. Read on each call.

    Raises
    ------
    ConfigError
        The variable isn't a size.
    """
    told = os.environ.get("CUDA_PROGCACHE_MAX_SIZE")
    if not told:
        return DEFAULT_MAX_SIZE
    try:
        return parse_size(told) or None
    except ValueError as exc:
        from cuda_progcache.errors import ConfigError

        raise ConfigError(f"CUDA_PROGCACHE_MAX_SIZE: {exc}") from None

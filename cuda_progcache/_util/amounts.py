# SPDX-License-Identifier: Apache-2.0
"""Formatting of sizes, durations and counts for display."""

from __future__ import annotations


def size(count: float) -> str:
    """Format a number of bytes in SI units: ``6.5 kB``."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 99.95 else f"{count:.0f} {unit}"
    return f"{count / 1000:.1f} TB"


def seconds(value: float) -> str:
    """Format a duration: ``412 us``, ``85 ms``, ``12.4 s``, ``3 min 20 s``; zero is ``0 s``."""
    if not value:
        return "0 s"
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    if value < 0.9995:
        return f"{value * 1e3:.0f} ms"
    if value < 60:
        return f"{value:.1f} s" if value >= 9.95 else f"{value:.2f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """Format a count with its noun: ``1 entry``, ``2 entries``, ``3 hits``, ``4 misses``."""
    if count == 1:
        return f"1 {noun}"
    ending = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:,} {ending}"

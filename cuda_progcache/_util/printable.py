# SPDX-License-Identifier: Apache-2.0
"""Escaping of text from records, file names and logs before it is printed."""

from __future__ import annotations

import re

# C0 and C1 controls, which terminals interpret; invisible characters and marks of text direction; surrogates.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(value: str) -> str:
    r"""Escape control and invisible characters as Python does: ``\x1b``, ``\u202e``. Newlines and tabs are kept."""
    return _UNSAFE.sub(_escaped, value)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that isn't UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(value: str) -> str:
    r"""Escape newlines and tabs, too, unlike :func:`printable`, so that a name can't look like several lines."""
    return printable(value).replace("\n", "\\n").replace("\t", "\\t")

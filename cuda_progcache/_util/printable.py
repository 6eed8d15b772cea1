# SPDX-License-Identifier: Apache-2.0
"""Text from records, file names and logs, made safe to print: the one place where it is escaped."""

from __future__ import annotations

import re

# C0 and C1 controls, which steer terminals; marks that change the direction of text or can't be seen; what isn't text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def printable(value: str) -> str:
    r"""Write what would steer a terminal, or hide, as Python escapes it: ``\x1b``, ``\u202e``. Lines and tabs stay."""
    return _UNSAFE.sub(_escaped, value)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that isn't UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def one_line(value: str) -> str:
    r"""As :func:`printable`, in one line: a name can't look like more than one."""
    return printable(value).replace("\n", "\\n").replace("\t", "\\t")

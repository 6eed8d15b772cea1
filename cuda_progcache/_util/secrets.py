# SPDX-License-Identifier: Apache-2.0
"""Masking of credentials in text to be shown."""

from __future__ import annotations

_OPTIONS = r"password|passwd|pwd|token|secret|access_key|secret_key|sig|signature"


def masked(text: str) -> str:
    """Replace the user and password in a URL, and the values of its password-like options, with ``***``.

    >>> masked("redis://ci:abc@host:6379/0")
    'redis://***@host:6379/0'
    >>> masked("https://host/x?token=abc&mode=ro")
    'https://host/x?token=***&mode=ro'
    """
    if "://" not in text:
        return text
    import re

    # Match up to the last @: an unencoded password may contain any character.
    text = re.sub(r"(?s)([A-Za-z][A-Za-z0-9+.-]*://).*@", r"\1***@", text)
    return re.sub(rf"(?is)([?&](?:{_OPTIONS})=)[^&\s#]*", r"\1***", text)

# SPDX-License-Identifier: Apache-2.0
"""Texts as they may be shown: without what lets people into a service."""

from __future__ import annotations

_OPTIONS = r"password|passwd|pwd|token|secret|access_key|secret_key|sig|signature"


def masked(text: str) -> str:
    """One value, as it may be shown: with no user and password before a host, and no value of an option of that kind.

    >>> masked("redis://ci:abc@host:6379/0")
    'redis://***@host:6379/0'
    >>> masked("https://host/x?token=abc&mode=ro")
    'https://host/x?token=***&mode=ro'
    """
    if "://" not in text:
        return text
    import re

    # To the last @, whatever stands before it: in a password that wasn't encoded there may be anything.
    text = re.sub(r"(?s)([A-Za-z][A-Za-z0-9+.-]*://).*@", r"\1***@", text)
    return re.sub(rf"(?is)([?&](?:{_OPTIONS})=)[^&\s#]*", r"\1***", text)

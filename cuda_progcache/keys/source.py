# SPDX-License-Identifier: Apache-2.0
"""A source, and what its text alone tells: whether it may read headers, and whether it names the date or time.

A program is asked for again and again, mostly as the same object; what was found out about it is remembered. Small
texts are remembered by content, large ones by identity, since hashing 200 kB for a dictionary takes half as long
as its SHA-256.
"""

from __future__ import annotations

import functools

from cuda_progcache._util.digest import sha256
from cuda_progcache.keys.quick_text import (
    can_paste,
    may_include,
    may_paste,
    mentions_file,
    pieces,
    time_macro,
    whole_words,
)

_LARGE = 16_384  # characters
_MAX_LARGE = 2  # more would keep so much memory in use that each new text costs the page faults of fresh memory


class Source:
    """A source, and what its text alone says; the costly questions are answered when they are asked.

    Attributes
    ----------
    text : str or bytes
        As it was given.
    identity : bytes
        Its length and SHA-256.
    may_include : bool
        Whether it can read a header.
    """

    __slots__ = ("_may_paste", "_mentions_file", "_time_macro", "identity", "may_include", "text")

    def __init__(self, text: str | bytes) -> None:
        code = text.encode() if isinstance(text, str) else text
        self.text = text
        self.identity = f"{len(code)} bytes, sha256:{sha256(code).hexdigest()}".encode()
        self.may_include = may_include(code)
        self._may_paste = may_paste(code)
        self._time_macro: str | None = None  # "" is none; None: not looked for yet
        self._mentions_file: bool | None = None

    @property
    def code(self) -> bytes:
        """What the compiler reads; made anew each time, since a hit has no use for it."""
        return self.text.encode() if isinstance(self.text, str) else self.text

    @property
    def time_macro(self) -> str | None:
        """The date or time macro in it, if there is one; with it each compile gives another output."""
        if self._time_macro is None:
            self._time_macro = self._find_time_macro() or ""
        return self._time_macro or None

    def _find_time_macro(self) -> str | None:
        uncut = isinstance(self.text, str) and "\\" not in self.text and "?" not in self.text
        if time_macro(self.text if uncut else whole_words(self.code)) is None and not self._pastes_a_time_macro():
            return None
        from cuda_progcache.keys import include_text  # most sources aren't read so closely

        return include_text.time_macro(self.code)

    def _pastes_a_time_macro(self) -> bool:
        if not self._may_paste:
            return False
        found = pieces(self.code)
        return any(can_paste(macro, found) for macro in (b"__TIME__", b"__DATE__", b"__TIMESTAMP__"))

    @property
    def mentions_file(self) -> bool:
        """Whether it has ``__FILE__`` or its like, which in a header that expands it is a path."""
        if self._mentions_file is None:
            self._mentions_file = mentions_file(whole_words(self.code))
        return self._mentions_file


_read_small = functools.lru_cache(maxsize=256)(Source)
_large: dict[int, Source] = {}  # by the id of the text, which the Source keeps alive


def read_source(text: str | bytes) -> Source:
    """The source of a text; the same object for the same text, as long as it is remembered."""
    if len(text) < _LARGE:
        return _read_small(text)
    known = _large.get(id(text))
    if known is not None and known.text is text:
        return known
    source = Source(text)
    if len(_large) >= _MAX_LARGE:
        _large.clear()
    _large[id(text)] = source
    return source

# SPDX-License-Identifier: Apache-2.0
"""A source, and the facts that its text alone gives: whether it may read headers or use the date, time or its path.

Programs are often looked up repeatedly, mostly with the same object, so the facts are cached: for small texts by
content, for large ones by object identity, since hashing 200 kB for a dictionary takes half as long as its SHA-256.
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
_MAX_LARGE = 2  # with more, so much memory stays in use that each new text costs page faults


class Source:
    """A source, and facts about its text; costly ones are computed when they are first used.

    Attributes
    ----------
    text : str or bytes
        The source as it was given.
    identity : bytes
        Its length and SHA-256.
    may_include : bool
        Whether it may read a header.
    """

    __slots__ = ("_may_paste", "_mentions_file", "_time_macro", "identity", "may_include", "text")

    def __init__(self, text: str | bytes) -> None:
        code = text.encode() if isinstance(text, str) else text
        self.text = text
        self.identity = f"{len(code)} bytes, sha256:{sha256(code).hexdigest()}".encode()
        self.may_include = may_include(code)
        self._may_paste = may_paste(code)
        self._time_macro: str | None = None  # "" if there is none, None if not searched for yet
        self._mentions_file: bool | None = None

    @property
    def code(self) -> bytes:
        """The source as bytes; encoded at each call, since a hit doesn't need it."""
        return self.text.encode() if isinstance(self.text, str) else self.text

    @property
    def time_macro(self) -> str | None:
        """The date or time macro in the source, if any; it makes the output differ at each compile."""
        if self._time_macro is None:
            self._time_macro = self._find_time_macro() or ""
        return self._time_macro or None

    def _find_time_macro(self) -> str | None:
        uncut = isinstance(self.text, str) and "\\" not in self.text and "?" not in self.text
        if time_macro(self.text if uncut else whole_words(self.code)) is None and not self._pastes_a_time_macro():
            return None
        from cuda_progcache.keys import include_text  # here, since most sources don't need to be parsed

        return include_text.time_macro(self.code)

    def _pastes_a_time_macro(self) -> bool:
        if not self._may_paste:
            return False
        found = pieces(self.code)
        return any(can_paste(macro, found) for macro in (b"__TIME__", b"__DATE__", b"__TIMESTAMP__"))

    @property
    def mentions_file(self) -> bool:
        """Whether the source has ``__FILE__`` or a similar name, which may expand to a path."""
        if self._mentions_file is None:
            self._mentions_file = mentions_file(whole_words(self.code))
        return self._mentions_file


_read_small = functools.lru_cache(maxsize=256)(Source)
_large: dict[int, Source] = {}  # by the id of the text, which the Source keeps alive


def read_source(text: str | bytes) -> Source:
    """Return the source of a text, from the cache if the text is known."""
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

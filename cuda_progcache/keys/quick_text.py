# SPDX-License-Identifier: Apache-2.0
"""Quick searches in a text for words that matter to a key. Comments and strings count, so nothing is overlooked.

Most texts are done with here; :mod:`~cuda_progcache.keys.include_text` reads the others closely.
"""

from __future__ import annotations

from collections.abc import Iterable

_CONTINUED = rb"(?:\\|\?\?/)[ \t\v\f]*\r?\n"
_CUTS_A_WORD = rb"\\[ \t\v\f]*\r?\n\w"
# Names that a macro may paste together from pieces, to be read as the whole.
_WATCHED = (
    b"__has_include", b"__has_include_next", b"__TIME__", b"__DATE__", b"__TIMESTAMP__", b"__FILE__", b"__BASE_FILE__",
    b"__builtin_FILE", b"__builtin_COLUMN",
)  # fmt: skip
_WATCHED_TEXT = b" ".join(_WATCHED)
_MOST_PIECES = 4
_WORDS = bytes(c if chr(c).isalnum() or c == ord("_") or c > 127 else ord(" ") for c in range(256))
# What gives the path of the file that it stands in, or is called from.
_FILE_NAMES = (b"_FILE", b"assert", b"source_location")


def may_include(code: bytes) -> bool:
    """Whether this source can read any header at all, or test for one: a superset, since comments and strings count.

    For an ``#include`` it looks at the lines with a ``#`` or its digraph alone; where such a line goes on in the next
    one, it may.
    """
    if b"#" not in code and b"%" not in code and b"?" not in code:
        return False
    at = code.find(b"#")
    while at >= 0:
        end = code.find(b"\n", at)
        if _may_be_include(code[at:end] if end >= 0 else code[at:]):
            return True
        at = code.find(b"#", end) if end >= 0 else -1
    at = code.find(b"%")  # one character at a time is a memchr, thirty times as fast as a search for two
    while at >= 0:
        if code.startswith((b"%:", b"%\\"), at):
            end = code.find(b"\n", at)
            if _may_be_include(code[at:end] if end >= 0 else code[at:]):
                return True
        at = code.find(b"%", at + 1)
    if (b"?" in code and b"??=" in code) or b"__has_include" in code:  # the trigraph of #; tests outside directives
        return True
    return may_paste(code) and can_paste(b"__has_include", pieces(code))


def _may_be_include(line: bytes) -> bool:
    return b"include" in line or b"\\" in line or b"/*" in line or b"??" in line


def may_paste(code: bytes) -> bool:
    """Whether this text may have a ``##``: a superset."""
    if b"#" not in code and b"%" not in code and b"?" not in code:
        return False
    return any(paste in code for paste in (b"##", b"#\\", b"%:%", b"%:\\", b"??=??="))


def pieces(code: bytes, name: bytes | None = None) -> frozenset[bytes]:
    """The words of a text that are parts of a watched name, or of ``name``."""
    whole = _WATCHED_TEXT if name is None else name
    words = set(whole_words(code).translate(_WORDS).split())
    return frozenset(word for word in words if word in whole and word != name and word not in _WATCHED)


def can_paste(name: bytes, found: Iterable[bytes]) -> bool:
    """Whether a name is made of such pieces: of four at most, and of few for a short name.

    With any number, a program with a ``_`` and some variables of one letter could make any name.
    """

    def from_(start: int, left: int) -> bool:
        return any(
            name.startswith(piece, start)
            and (start + len(piece) == len(name) or (left > 1 and from_(start + len(piece), left - 1)))
            for piece in found
        )

    return from_(0, min(_MOST_PIECES, max(2, len(name) // 2)))


def joined(code: bytes) -> bytes:
    """A text with its continued lines joined."""
    if b"\\" not in code and b"??/" not in code:
        return code
    import re  # most hits have no use for it

    return re.sub(_CONTINUED, b"", code)


def whole_words(code: bytes) -> bytes:
    """A text in which no word is cut in two by the end of a continued line."""
    if b"?" in code and b"??/" in code:
        return joined(code)
    if b"\\" not in code:
        return code
    import re

    return joined(code) if re.search(_CUTS_A_WORD, code) else code


def mentions_file(code: bytes) -> bool:
    """Whether the path of a file may come out of it (of :func:`whole_words`)."""
    return any(name in code for name in _FILE_NAMES)


def time_macro(code: str | bytes) -> str | None:
    """The date or time macro in a text of :func:`whole_words`: with it each compile gives another output."""
    # Letters first: a search for one is a memchr, a search for eight takes as long as the SHA-256 of the same text.
    if isinstance(code, str):
        if "T" not in code or "E" not in code:
            return None
        code = code.encode("utf-8", "surrogateescape")
    if b"T" not in code or b"E" not in code:
        return None
    if b"__DATE__" in code:
        return "__DATE__"
    if b"M" not in code or b"__TIME" not in code:
        return None
    return next((macro for macro in ("__TIME__", "__TIMESTAMP__") if macro.encode() in code), None)

# SPDX-License-Identifier: Apache-2.0
"""Fast searches in a text for words that matter to a key. They include comments and strings, so nothing is overlooked.

They suffice for most texts; :mod:`~cuda_progcache.keys.include_text` parses the others.
"""

from __future__ import annotations

from collections.abc import Iterable

_CONTINUED = rb"(?:\\|\?\?/)[ \t\v\f]*\r?\n"
_CUTS_A_WORD = rb"\\[ \t\v\f]*\r?\n\w"
# Names that a macro may make from pieces with ##.
_WATCHED = (
    b"__has_include", b"__has_include_next", b"__TIME__", b"__DATE__", b"__TIMESTAMP__", b"__FILE__", b"__BASE_FILE__",
    b"__builtin_FILE", b"__builtin_COLUMN",
)  # fmt: skip
_WATCHED_TEXT = b" ".join(_WATCHED)
_MOST_PIECES = 4
_WORDS = bytes(c if chr(c).isalnum() or c == ord("_") or c > 127 else ord(" ") for c in range(256))
# Parts of the names that expand to the path of their own file or of the calling file.
_FILE_NAMES = (b"_FILE", b"assert", b"source_location")


def may_include(code: bytes) -> bool:
    """Return whether a source may read a header or test for one: a superset, since comments and strings count.

    ``#include`` is searched for only in lines with a ``#`` or its digraph; a continued line counts, too.
    """
    if b"#" not in code and b"%" not in code and b"?" not in code:
        return False
    at = code.find(b"#")
    while at >= 0:
        end = code.find(b"\n", at)
        if _may_be_include(code[at:end] if end >= 0 else code[at:]):
            return True
        at = code.find(b"#", end) if end >= 0 else -1
    at = code.find(b"%")  # a search for one character is a memchr, thirty times as fast as a search for two
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
    """Return whether a text may have a ``##``: a superset."""
    if b"#" not in code and b"%" not in code and b"?" not in code:
        return False
    return any(paste in code for paste in (b"##", b"#\\", b"%:%", b"%:\\", b"??=??="))


def pieces(code: bytes, name: bytes | None = None) -> frozenset[bytes]:
    """Return the words of a text that are parts of a watched name, or of ``name`` if given."""
    whole = _WATCHED_TEXT if name is None else name
    words = set(whole_words(code).translate(_WORDS).split())
    return frozenset(word for word in words if word in whole and word != name and word not in _WATCHED)


def can_paste(name: bytes, found: Iterable[bytes]) -> bool:
    """Return whether a name can be made of these pieces: of at most four, and of fewer if the name is short.

    With more pieces, a program with a ``_`` and some one-letter variables could make any name.
    """

    def from_(start: int, left: int) -> bool:
        return any(
            name.startswith(piece, start)
            and (start + len(piece) == len(name) or (left > 1 and from_(start + len(piece), left - 1)))
            for piece in found
        )

    return from_(0, min(_MOST_PIECES, max(2, len(name) // 2)))


def joined(code: bytes) -> bytes:
    """Return a text with its continued lines joined."""
    if b"\\" not in code and b"??/" not in code:
        return code
    import re  # here, since most hits don't need it

    return re.sub(_CONTINUED, b"", code)


def whole_words(code: bytes) -> bytes:
    """Return a text in which no word is split by a line continuation."""
    if b"?" in code and b"??/" in code:
        return joined(code)
    if b"\\" not in code:
        return code
    import re

    return joined(code) if re.search(_CUTS_A_WORD, code) else code


def mentions_file(code: bytes) -> bool:
    """Return whether a text (from :func:`whole_words`) may expand to the path of a file."""
    return any(name in code for name in _FILE_NAMES)


def time_macro(code: str | bytes) -> str | None:
    """Return the date or time macro in a text (from :func:`whole_words`), which makes each compile's output differ."""
    # Search for letters first: that is a memchr. A search for eight characters takes as long as the text's SHA-256.
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

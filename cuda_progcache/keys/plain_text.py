# SPDX-License-Identifier: Apache-2.0
"""The normal form of a source or header: its text without comments and without the width of white space.

Two texts with the same normal form have the same tokens on the same lines, with white space between the same tokens. So
``__LINE__`` and the strings made by ``#`` are equal. The columns of tokens may differ, as may the lines quoted in the
compiler's log. So equal normal forms give equal output if there is no debug or line information, no text asks for a
column (:func:`cuda_progcache.keys.include_text.asks_for_columns`), and the log is empty. :func:`alike` uses this to
match headers with those of an earlier compile.
"""

from __future__ import annotations

import re

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import replace
from cuda_progcache.keys.headers import (
    Header,
    HeaderSet,
    SearchPath,
    choice_holds,
    file_digest,
    known_stamp,
    paths_of,
    read_file,
)

# A text that matches one of these has no normal form: its meaning depends on the dialect, or a warning may quote it.
_PRINTABLE = bytes(range(0x20, 0x7F)) + b"\t\n\r" + bytes(range(0x80, 0x100))
_BACKSLASH = re.compile(
    rb"\\(?:[ \t]+\r?$"  # not a splice
    rb"|(?<=[/*R]\\)\r?$)",  # may split the delimiter of a comment or a raw string
    re.MULTILINE,
)
_TRIGRAPH = re.compile(rb"\?\?[=/'()!<>-]")
_LINT = re.compile(rb"/[/*][ \t]*(?:NOTREACHED|ARGSUSED|VARARGS|PRINTFLIKE|SCANFLIKE|CONSTCOND|FALL)")
_ODD_NAME = re.compile(rb"include[ \t(]*<[^>\n]*(?:  |[\t'\"]|//|/\*)[^>\n]*>")
_RIGHT_TO_LEFT = re.compile(rb"\xe2(?:\x80[\xaa-\xae]|\x81[\xa6-\xa9])")
# Comments, strings and character literals. A literal character at the start of each makes the search ten times faster.
_LEXEME = re.compile(
    rb"//(?P<line>)[^\n]*+"
    rb"|/\*(?P<block>[^*/]*+(?:\*(?!/)[^*/]*+|/(?!\*)[^*/]*+)*+\*/)"
    rb'|"(?P<raw>(?:(?<=[^\w]R")|(?<=[^\w][LUu]R")|(?<=[^\w]u8R"))([^()\\\s"]{0,16})\(.*?\)\4")'
    rb'|"(?P<string>[^"\\\n]*+(?:\\(?:\r?\n|.)[^"\\\n]*+)*+")'
    # A quote between digits separates them.
    rb"|'(?P<quote>(?:(?<=[0-9]')|(?<=[0-9A-Fa-f][A-Fa-f]')|(?<=[xX'][A-Fa-f]'))(?<!\Wu8')(?=\w)"
    rb"|[^'\\\n]*+(?:\\.[^'\\\n]*+)*+')"
    rb"|/\*|\"|'",  # unclosed, or a comment that begins inside another
    re.DOTALL,
)
_BLANKS = re.compile(rb"  +")
_LINE_OF_COMMENT = b"\x01"
_HIDE = bytes.maketrans(b" \t\n\r", b"\x02\x03\x04\x05")
_SPLICE = b"\\\x06"


class _UnusualError(Exception):
    """A text has no normal form."""


def _without_comment(found: re.Match[bytes]) -> bytes:
    kind, text = found.lastgroup, found[0]
    if kind == "line":
        if text.endswith((b"\\", b"\\\r")):
            raise _UnusualError
        return b" "
    if kind == "block":
        return _LINE_OF_COMMENT * text.count(b"\n") or b" "
    if kind is None:
        raise _UnusualError
    if kind != "raw" and b"\n" in text and b"\\\\" in text:  # it isn't obvious which backslash joins the lines
        raise _UnusualError
    return text.translate(_HIDE) if b"  " in text or b"\t" in text or b"\n" in text else text


def _is_unusual(text: bytes) -> bool:
    if text.translate(None, _PRINTABLE) or _BACKSLASH.search(text) or _LINT.search(text) or _ODD_NAME.search(text):
        return True
    if b"??" in text and _TRIGRAPH.search(text):
        return True
    if text.isascii():
        return False
    try:
        text.decode()
    except UnicodeDecodeError:  # NVRTC stops reading there
        return True
    return _RIGHT_TO_LEFT.search(text) is not None  # a compiler may warn about it


def normalized(text: bytes) -> bytes | None:
    """Return the normal form of a text, which edits of comments and white space don't change.

    Parameters
    ----------
    text : bytes
        C++ text in UTF-8.

    Returns
    -------
    bytes or None
        The lines without comments, with one blank for any white space between two tokens, and none at either end. A
        comment of several lines leaves a mark for each, so that line numbers stay. String and character literals and
        line splices are unchanged. None if something unusual would make this unsafe; then compare the text itself.

    Notes
    -----
    The form is only for comparison, by its digest; it isn't C++.
    """
    if _is_unusual(text):
        return None
    crlf = b"\r" in text
    if crlf and (text.count(b"\r") != text.count(b"\r\n") or text.count(b"\r\n") != text.count(b"\n")):
        return None
    try:
        plain = _LEXEME.sub(_without_comment, b"\n" + text)
    except _UnusualError:
        return None
    if crlf:
        plain = plain.replace(b"\r\n", b"\n")
    lines = plain.replace(b"\\\n", _SPLICE).replace(b"\t", b" ").split(b"\n")
    form = _BLANKS.sub(b" ", b"\n".join([line.strip() for line in lines]))
    return b"\r" + form if crlf else form


_digests: dict[str, str] = {}
_MAX_DIGESTS = 8192


def plain_digest(digest: str, text: bytes) -> str:
    """Return the digest of a text's normal form, cached by the digest of the text.

    Parameters
    ----------
    digest : str
        The SHA-256 (hex) of the text.
    text : bytes

    Returns
    -------
    str
        64 hex digits; ``digest`` itself if the text has no normal form.
    """
    plain = _digests.get(digest)
    if plain is None:
        form = normalized(text)
        plain = digest if form is None else sha256(b"normal form\0" + form).hexdigest()
        if len(_digests) >= _MAX_DIGESTS:
            _digests.clear()
        _digests[digest] = plain
    return plain


def alike(headers: HeaderSet, search: SearchPath) -> HeaderSet | None:
    """Return the set that a compile would read now, if its texts have the same normal forms as this set's.

    The compile then gives the same output, provided that comments and white space don't show there. None if not.
    """
    if len(headers.plain) != len(headers.headers):
        return None
    try:
        paths = paths_of(headers, search)
    except KeyError:
        return None
    if not choice_holds(paths):
        return None
    now: list[Header] = []
    for header, plain, (path, digest, _) in zip(headers.headers, headers.plain, paths.headers, strict=True):
        found = file_digest(path)
        if found is None:
            return None
        if found != digest and (plain == digest or plain_digest(found, read_file(path) or b"") != plain):
            return None
        now.append(Header(header.place, found))
    stamps = tuple([known_stamp(path, header.digest) for header, (path, *_) in zip(now, paths.headers, strict=True)])
    return replace(headers, headers=tuple(now), stamps=stamps, stands_for=headers.identity)

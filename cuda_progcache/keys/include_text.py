# SPDX-License-Identifier: Apache-2.0
"""Questions about the text of a C++ source or header, which is read as a preprocessor reads it.

They are about includes, macros, date and time, and uses of the file's own path. The text is first freed of comments,
raw strings and ``#if 0`` groups, and continued lines are joined. Lexical details follow the front end of NVRTC 13.5
(EDG), as measured: an unclosed quote ends with its line, raw strings are recognized in skipped groups, and a carriage
return alone doesn't end a line.

Two details depend on the version and the dialect: trigraphs are replaced only before C++17, and a backslash followed by
blanks at the end of a line isn't a splice in current releases. A text that contains either is read in both ways, and
the results of all readings count.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.keys.quick_text import can_paste, may_paste, pieces, whole_words
from cuda_progcache.keys.quick_text import time_macro as may_mention_time

# --- the text without comments -------------------------------------------------------------------------------------

RAW_STRING = b'R""'
"""The replacement for a raw string, whose content doesn't matter."""

_TRIGRAPHS = {
    b"=": b"#",
    b"/": b"\\",
    b"'": b"^",
    b"(": b"[",
    b")": b"]",
    b"!": b"|",
    b"<": b"{",
    b">": b"}",
    b"-": b"~",
}
_TRIGRAPH = re.compile(rb"\?\?([=/'()!<>-])")
_LOOSE_SPLICE = re.compile(rb"(?:\\|\?\?/)[ \t\v\f]+\r?\n")
_CUT_RAW = re.compile(rb"R(?:(?:\\|\?\?/)[ \t\v\f]*\r?\n)+(?=\")")
# Header names may contain characters that begin a comment or a string elsewhere.
_ODD_NAME = re.compile(rb"include(?:_next)?[ \t]*\(?[ \t]*<[^>\n]*(?://|/\*|['\"])[^>\n]*>")
_HIDE, _SHOW = bytes.maketrans(b"/*'\"", b"\x01\x02\x03\x04"), bytes.maketrans(b"\x01\x02\x03\x04", b"/*'\"")


@functools.cache
def _lexemes(backslash: bytes, blanks: bytes) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """Return a pattern for comments, strings and character literals in a text with splices, and one for a splice.

    Each alternative begins with a literal character, which makes the search fast.
    """
    splice = rb"(?:%b%b\r?\n)" % (backslash, blanks)
    s = splice + rb"*+"
    # The rest of a line, up to its end or to the excluded character.
    within = rb"(?:[^%b\\?\n]++|%b|%b" + s + rb"[^\n]|[\\?])*+"
    return re.compile(
        rb"/%b/%b" % (s, within % (b"", splice, backslash))
        + rb"|/%b\*[^*]*+(?:\*(?!%b/)[^*]*+)*+(?:\*%b/|\Z)" % (s, s, s)
        + rb'|"(?P<raw>(?:(?<=[^\w]R")|(?<=[^\w][LUu]R")|(?<=[^\w]u8R"))'
        + rb'(?P<delimiter>[^()\\\s"]{0,16})\(.*?(?:\)(?P=delimiter)"|\Z))'
        + rb'|"(?P<string>%b"?)' % (within % (b'"', splice, backslash))
        # A quote between digits separates them.
        + rb"|'(?P<quote>(?:(?<=[0-9]')|(?<=[0-9A-Fa-f][A-Fa-f]')|(?<=[xX'][A-Fa-f]'))(?<!\Wu8')(?=\w)"
        + rb"|%b'?)" % (within % (b"'", splice, backslash)),
        re.DOTALL,
    ), re.compile(splice)


def _plain(found: re.Match[bytes]) -> bytes:
    kind = found.lastgroup
    if kind is None:
        return b" "  # a comment
    return RAW_STRING[1:] if kind in {"raw", "delimiter"} else found[0]


def _strip(code: bytes, backslash: bytes, blanks: bytes) -> bytes:
    if b"R\\" in code or b"R??/" in code:
        code = _CUT_RAW.sub(b"R", code)
    hidden = b"include" in code and _ODD_NAME.search(code) is not None
    if hidden:
        code = _ODD_NAME.sub(lambda name: name[0].translate(_HIDE), code)
    lexemes, splice = _lexemes(backslash, blanks)
    text = splice.sub(b"", lexemes.sub(_plain, b"\n" + code))
    return text.translate(_SHOW) if hidden else text


def readings(code: bytes) -> list[bytes]:
    """Return the text as compilers may read it: without comments, raw strings and ``#if 0`` groups, with lines joined.

    Parameters
    ----------
    code : bytes
        The text of a source or a header.

    Returns
    -------
    list of bytes
        One text, or several if the reading depends on the dialect or the version of the compiler.
    """
    blanks = [b"", rb"[ \t\v\f]*+"] if _LOOSE_SPLICE.search(code) else [b""]
    texts = [_strip(code, rb"\\", b) for b in blanks]
    if b"??" in code and _TRIGRAPH.search(code):
        for b in blanks:
            text = _strip(code, rb"(?:\\|\?\?/)", b)
            texts.append(_TRIGRAPH.sub(lambda found: _TRIGRAPHS[found[1]], text))
    return [_without_skipped(text) for text in texts]


# --- directives ----------------------------------------------------------------------------------------------------

_DIRECTIVE = re.compile(rb"^[ \t\v\f\r]*+(?:#|%:)[ \t\v\f]*+(\w*+)([^\n]*)", re.MULTILINE)
_NEVER = re.compile(rb"(?:#|%:)[ \t\v\f]*+if[ \t\v\f(]+(?:0|false)\b")
_IS_NEVER = re.compile(rb"[ \t\v\f(]*(?:0|false)[ \t\v\f\r)]*\Z")


def _without_skipped(text: bytes) -> bytes:
    """Return a text without its ``#if 0`` groups."""
    if _NEVER.search(text) is None:
        return text
    kept, at = [], 0
    skipping = False
    depth = 0  # of conditionals within the skipped group
    for found in _DIRECTIVE.finditer(text):
        name = found[1]
        if not skipping:
            if name == b"if" and _IS_NEVER.match(found[2]):
                kept.append(text[at : found.end()])
                skipping, depth = True, 0
        elif name.startswith(b"if"):
            depth += 1
        elif depth:
            depth -= name == b"endif"
        elif name == b"endif" or name.startswith(b"el"):
            at = found.start()
            skipping = False
    if not skipping:
        kept.append(text[at:])
    return b"\n".join(kept)


class Directive(NamedTuple):
    """A preprocessing directive: its name, and the rest of its line."""

    name: bytes
    rest: bytes


def directives(text: bytes) -> Iterator[Directive]:
    """Return the directives of a text (one of :func:`readings`), in order."""
    return (Directive(*found.groups()) for found in _DIRECTIVE.finditer(text))


def without_directives(text: bytes, names: frozenset[bytes]) -> bytes:
    """Return a text (one of :func:`readings`) in which the directives of these names are empty lines."""
    return _DIRECTIVE.sub(lambda found: b"" if found[1] in names else found[0], text)


class Macro(NamedTuple):
    """The definition of a macro. ``parameters`` includes ``__VA_ARGS__``; None for an object-like macro."""

    name: bytes
    parameters: tuple[bytes, ...] | None
    body: bytes


_WORD = re.compile(rb"[A-Za-z_]\w*+")
_MACRO = re.compile(rb"[ \t\v\f]*(\w+)(?:\(([^()\n]*)\))?([^\n]*)")


def macros(text: bytes) -> Iterator[Macro]:
    """Yield the definitions of macros in a text (one of :func:`readings`), in order."""
    for directive in directives(text):
        if directive.name == b"define" and (found := _MACRO.match(directive.rest)) is not None:
            name, listed, body = found.groups()
            parameters = None if listed is None else (*_WORD.findall(listed), *([b"__VA_ARGS__"] * (b"..." in listed)))
            yield Macro(name, parameters, body)


class Include(NamedTuple):
    """The header that an ``#include`` names."""

    name: str
    quoted: bool


_INCLUDES = frozenset([b"include", b"include_next"])
_HEADER = re.compile(rb"[ \t\v\f]*(?:<([^>\n]+)>|\"([^\"\n]+)\")")


def includes(code: bytes) -> list[Include]:
    """Return the headers that a text names in ``#include`` lines, in any conditional, except those named by a macro.

    Parameters
    ----------
    code : bytes
        The text of a source or a header.

    Returns
    -------
    list of Include
        The headers in the order of the text.
    """
    found = []
    for text in readings(code) if b"include" in whole_words(code) else ():
        for name, rest in directives(text):
            if name in _INCLUDES and (header := _HEADER.match(rest)) is not None:
                angled, quoted = header.groups()
                found.append(Include(os.fsdecode(angled or quoted), bool(quoted)))
    return found


def included_names(code: bytes) -> dict[str, bool] | None:
    """Return the names in a text's ``#include`` lines, and whether each is ever in quotes; None if a macro names one.

    A header in angle brackets isn't searched for in the folder of the source or in the working directory (tested with
    NVRTC 12.0 to 13.5).
    """
    names: dict[str, bool] = {}
    if b"include" not in whole_words(code):
        return names
    for text in readings(code):
        for line in directives(text):
            if line.name in _INCLUDES:
                header = _HEADER.match(line.rest)
                if header is None:
                    return None
                name = os.fsdecode(header[1] or header[2])
                names[name] = names.get(name, False) or header[1] is None
    return names


# --- time ----------------------------------------------------------------------------------------------------------

_TIME = re.compile(rb"\"(?:[^\"\\\n]|\\.)*+\"?|\b(__DATE__|__TIME__|__TIMESTAMP__)\b")
TIME_MACROS = (b"__DATE__", b"__TIME__", b"__TIMESTAMP__")


def written_time_macro(code: bytes) -> str | None:
    """Return the date or time macro that a text contains as a word; it makes the output differ at each compile."""
    if may_mention_time(whole_words(code)) is None:
        return None
    found = (macro for text in readings(code) for macro in _TIME.findall(text) if macro)
    return next((str(macro, "ascii") for macro in found), None)


def time_macro(code: bytes) -> str | None:
    """Like :func:`written_time_macro`, but also return a macro that may be made with ``##``."""
    written = written_time_macro(code)
    if written is not None or not may_paste(code):
        return written
    for text in readings(code):
        pasted = pieces(text) if may_paste(text) else frozenset()
        for macro in TIME_MACROS:
            if can_paste(macro, pasted):
                return str(macro, "ascii")
    return None


# --- paths ---------------------------------------------------------------------------------------------------------

NO_PATH, PRINTED, FOLDED = range(3)
"""How a text uses paths: not at all; only in ways that print a path, so that the output shows it; or in ways that may
turn it into other bytes (``__FILE__[0]``, a hash)."""

_PATH_PARTS = (b"assert", b"FILE", b"source_location", b"SOURCE_LOCATION")
_PATH_WORD = re.compile(
    rb"\b(?:\w*(?:source_location|SOURCE_LOCATION|BUILTIN_FILE)\w*|__(?:BASE_)?FILE__|__builtin_FILE)\b"
)
_ASSERT = re.compile(rb"\bassert\b")
_PRINTS = frozenset([b"printf", b"__assertfail", b"__assert_fail", b"_wassert"])
_TOKEN = re.compile(rb"\"(?:[^\"\\\n]|\\.)*+\"?|'(?:[^'\\\n]|\\.)*+'?|[A-Za-z_]\w*+|::|->|[0-9][\w.]*+|\S")
_PATH, _STRING = b"__FILE__", b'"'


def may_name_paths(code: bytes) -> bool:
    """Return whether a text may contain anything that :func:`path_macros` looks for: a quick test for a superset."""
    text = whole_words(code)
    return any(part in text for part in _PATH_PARTS)


def path_macros(code: bytes) -> int:
    """Return how a text uses the path of its own file or of the calling file.

    Parameters
    ----------
    code : bytes
        The text of a source or a header.

    Returns
    -------
    int
        ``PRINTED`` for ``assert``, and if ``__FILE__`` or ``__builtin_FILE()``, alone or with string literals, is an
        argument of ``printf`` or of the functions to which ``assert`` expands; ``FOLDED`` for any other use;
        ``NO_PATH`` if there is no use.
    """
    return max(map(_paths_in, readings(code))) if may_name_paths(code) else NO_PATH


def _paths_in(text: bytes) -> int:
    if _PATH_WORD.search(text) is None:
        return PRINTED if _ASSERT.search(text) else NO_PATH
    return max(map(_paths_of, _streams(text)))


def _streams(text: bytes) -> Iterator[list[bytes]]:
    """Yield the tokens of each directive, and those of the text outside directives; brackets match within each."""
    yield from (_TOKEN.findall(rest) for _, rest in directives(text))
    yield _TOKEN.findall(_DIRECTIVE.sub(b"", text))


class _Call(NamedTuple):
    """An open bracket: the called function, and the tokens of the current argument."""

    callee: bytes
    argument: list[bytes]

    @property
    def folds(self) -> bool:
        """Whether the current argument may do more with a path than print it."""
        if _PATH not in self.argument:
            return False
        return self.callee not in _PRINTS or any(token not in {_PATH, _STRING} for token in self.argument)


def _paths_of(tokens: list[bytes]) -> int:
    if any(map(_PATH_WORD.fullmatch, tokens)):
        return FOLDED if _folds(tokens) else PRINTED
    return PRINTED if b"assert" in tokens else NO_PATH


def _folds(tokens: list[bytes]) -> bool:
    calls = [_Call(b"", [])]
    for token in tokens:
        callee, argument = call = calls[-1]
        if token in {b")", b"]", b"}", b",", b";"} and call.folds:
            return True
        if token in {b"(", b"[", b"{"}:
            calls.append(_Call(_callee(argument) if token == b"(" else b"", []))
        elif token in {b")", b"]", b"}"} and len(calls) > 1:
            calls.pop()
            outer = calls[-1].argument
            if token == b")" and callee == b"__builtin_FILE":
                outer[-1:] = [_PATH]
            elif token == b")" and argument == [b"__LINE__"] and callee:  # a macro that turns the line into a string
                outer[-1:] = [_STRING]
            else:
                outer.append(token)
        elif token in {b",", b";"}:
            argument.clear()
        elif token.startswith(b'"'):
            argument.append(_STRING)
        elif token == b"__BASE_FILE__":
            argument.append(_PATH)
        elif _PATH_WORD.fullmatch(token) and token not in {b"__FILE__", b"__builtin_FILE"}:
            return True
        else:
            argument.append(token)
    return any(call.folds for call in calls)


def _callee(before: list[bytes]) -> bytes:
    """Return the function called after these tokens; "" if it is a member or in a namespace other than ``std``."""
    *earlier, name = before or [b""]
    if earlier[-1:] in ([b"."], [b"->"]):
        return b""
    if earlier[-1:] == [b"::"] and earlier[-2:-1] != [b"std"] and _WORD.fullmatch(b"".join(earlier[-2:-1])):
        return b""
    return name


_COLUMN = re.compile(rb"BUILTIN_COLUMN|__builtin_COLUMN|source_location|SOURCE_LOCATION")


def asks_for_columns(code: bytes) -> bool:
    """Return whether a text may ask for the column of a token, as with ``__builtin_COLUMN()``."""
    return _COLUMN.search(whole_words(code)) is not None and any(map(_COLUMN.search, readings(code)))


def redefines_printing(code: bytes) -> bool:
    """Return whether a text may redefine ``printf`` or a function to which ``assert`` expands as more than printing."""
    text = whole_words(code)
    return any(name in text for name in _PRINTS) and any(map(_redefines, readings(code)))


def _redefines(text: bytes) -> bool:
    for macro in macros(text):
        tokens = _TOKEN.findall(macro.body)
        if macro.name in _PRINTS:
            # A macro that ignores its arguments can't use a path.
            if macro.parameters is None or set(macro.parameters).intersection(tokens):
                return True
        elif _misuses(tokens):
            return True
    return _misuses(_TOKEN.findall(_DIRECTIVE.sub(b"", text)))


def _misuses(tokens: list[bytes]) -> bool:
    """Return whether a printing function is defined in these tokens, or its name is used for something else."""
    for at, token in enumerate(tokens):
        if token not in _PRINTS:
            continue
        if tokens[at + 1 : at + 2] != [b"("]:
            if tokens[at - 1 : at] != [b"::"]:
                return True
            continue
        depth = 0
        for end in range(at + 1, len(tokens)):
            depth += (tokens[end] == b"(") - (tokens[end] == b")")
            if not depth:
                if tokens[end + 1 : end + 2] in ([b"{"], [b"noexcept"], [b"const"]):
                    return True
                break
    return False

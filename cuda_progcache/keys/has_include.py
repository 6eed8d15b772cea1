# SPDX-License-Identifier: Apache-2.0
"""Find the headers that a compile tests for with ``__has_include``, directly or through macros.

NVRTC evaluates ``__has_include`` both in directives and outside of them (measured with 13.5). A test in a macro's body
takes place where the macro is used. So all macros are collected whose bodies have a test or use such a macro, and their
uses are expanded. All definitions of a macro count, whatever conditional they are in. If the text doesn't determine
which header a use tests for, the result has the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.keys.include_text import Macro, macros, readings, without_directives
from cuda_progcache.keys.quick_text import joined, whole_words

PROBES = (b"__has_include", b"__has_include_next")
_NO_USE = frozenset([b"define", b"undef", b"ifdef", b"ifndef", b"elifdef", b"elifndef", b"error", b"warning"])
_STRING = rb"\"(?:[^\"\\\n]|\\.)*+\"?|'(?:[^'\\\n]|\\.)*+'?"
_TOKEN = re.compile(_STRING + rb"|[A-Za-z_]\w*+")
_BRACKET = re.compile(_STRING + rb"|[()]")
_SEPARATOR = re.compile(_STRING + rb"|[(),]")
_LITERAL = re.compile(_STRING)
_OPENS = re.compile(rb"\s*\(")
_DEFINED = re.compile(rb"\bdefined[\s(]*\Z")
_ARGUMENT = re.compile(rb"\s*(?:<([^>\n]+)>|\"([^\"\n]+)\")\s*\Z")
_MOST_STEPS = 200
_NEAR = 80
_SHOWN = 60


class Mentions(NamedTuple):
    """The occurrences of a name in a text: macros whose bodies have it, and uses with their arguments."""

    macros: tuple[Macro, ...] = ()
    uses: tuple[bytes, ...] = ()


class Asked(NamedTuple):
    """A test for a header: the index of the text, the header's name, and whether the name is in quotes."""

    text: int
    name: str
    quoted: bool


class Undecided(NamedTuple):
    """A test for an unknown header: the index of the text, and why the header isn't known."""

    text: int
    reason: str


class Text(Protocol):
    """One of the texts of a compile."""

    def mentions(self, name: bytes) -> Mentions:
        """Return the occurrences of a name in the text."""

    def defined(self, names: frozenset[bytes]) -> frozenset[bytes]:
        """Return the subset of ``names`` that the text defines as macros."""


class Probes(NamedTuple):
    """The tests for headers in the texts of a compile, and the macros through which tests may be written."""

    asked: list[Asked]
    undecided: list[Undecided]
    macros: frozenset[bytes]


_NOTHING = Mentions()


def mentions(code: bytes, name: bytes) -> Mentions:
    """Return the uses of a name in a text, outside of comments, strings, ``#if 0``, ``#ifdef`` and ``defined``."""
    if name not in whole_words(code):
        return _NOTHING
    bodies: dict[Macro, None] = {}
    uses: dict[bytes, None] = {}
    for text in readings(code):
        for macro in macros(text):
            if macro.name not in {*PROBES, name} and any(_uses(macro.body, [name])):
                bodies[macro] = None
        uses.update((use.text, None) for use in _uses(without_directives(text, _NO_USE), [name]))
    return Mentions(tuple(bodies), tuple(uses))


def defined(code: bytes, names: frozenset[bytes]) -> frozenset[bytes]:
    """Return the subset of ``names`` that a text defines as macros."""
    pattern = rb"define[ \t\v\f]+(?:%b)\b" % b"|".join(sorted(names))
    if not names or re.search(pattern, joined(code)) is None:
        return frozenset()
    return names.intersection(macro.name for text in readings(code) for macro in macros(text))


def probes(texts: Sequence[Text]) -> Probes:
    """Return the tests for headers in the texts of a compile, which include the macros from options."""
    known: dict[bytes, list[Macro]] = {name: [] for name in PROBES}
    uses: dict[tuple[int, bytes], None] = {}
    pending = list(PROBES)
    while pending:
        name = pending.pop()
        for index, text in enumerate(texts):
            found = text.mentions(name)
            uses.update(((index, use), None) for use in found.uses)
            for macro in found.macros:
                if macro.name not in known:
                    pending.append(macro.name)
                definitions = known.setdefault(macro.name, [])
                if macro not in definitions:
                    definitions.append(macro)
    expanded = [(index, _expanded(text, known)) for index, text in uses]
    words = frozenset(word for _, use in expanded for word in use.words)
    changed = frozenset(word for text in texts for word in text.defined(words)) if words else words
    asked: dict[Asked, None] = {}
    undecided: dict[Undecided, None] = {}
    for index, use in expanded:
        asked.update((Asked(index, name, quoted), None) for name, quoted in use.names)
        undecided.update((Undecided(index, reason), None) for reason in use.reasons)
        for word in sorted(changed & use.words):
            reason = f"tests for a header through a macro, and {word.decode()} in its name is another macro"
            undecided[Undecided(index, reason)] = None
    return Probes(list(asked), list(undecided), frozenset(known))


# --- uses and their expansions -------------------------------------------------------------------------------------


class _Use(NamedTuple):
    """A use of a name in a text, with its argument in parentheses if there is one."""

    name: bytes
    argument: bytes | None
    text: bytes

    @property
    def behind(self) -> bytes:
        """The text after the name."""
        return self.text[len(self.name) :]


def _uses(text: bytes, names: Collection[bytes]) -> Iterator[_Use]:
    for found in _TOKEN.finditer(text):
        if found[0] in names and _DEFINED.search(text, max(0, found.start() - _NEAR), found.start()) is None:
            argument, end = _parenthesized(text, found.end())
            yield _Use(found[0], argument, text[found.start() : end])


def _parenthesized(text: bytes, start: int) -> tuple[bytes | None, int]:
    """Return the text in the parentheses at ``start`` and the end of them; None and ``start`` if there are none."""
    opens = _OPENS.match(text, start)
    if opens is None:
        return None, start
    depth = 0
    for found in _BRACKET.finditer(text, opens.end() - 1):
        depth += (found[0] == b"(") - (found[0] == b")")
        if not depth:
            return text[opens.end() : found.start()], found.end()
    return None, start


class _Expanded(NamedTuple):
    """The result of expanding a use."""

    names: dict[tuple[str, bool], None]  # header names, and whether each is in quotes
    words: set[bytes]  # words in header names that other macros may change
    reasons: dict[str, None]  # why a header's name isn't known


def _expanded(use: bytes, known: Mapping[bytes, list[Macro]]) -> _Expanded:
    found = _Expanded({}, set(), {})
    steps = 0

    def expand(text: bytes, active: frozenset[bytes]) -> None:
        nonlocal steps
        for inner in _uses(text, known):
            steps += 1
            if steps > _MOST_STEPS:
                found.reasons["tests for headers through more macros than are followed"] = None
            elif inner.name in PROBES:
                _ask(inner, found, by_macro=bool(active))
            elif inner.name not in active:
                for macro in known[inner.name]:
                    body = _substituted(macro, inner, found)
                    if body is not None:
                        expand(body, active | {inner.name})

    expand(use, frozenset())
    return found


def _ask(use: _Use, found: _Expanded, *, by_macro: bool) -> None:
    name = use.name.decode()
    if use.argument is None:
        found.reasons[f"passes {name} on to a macro"] = None
        return
    header = _ARGUMENT.match(use.argument)
    if header is None:
        shown = use.argument.decode(errors="replace").strip()[:_SHOWN]
        found.reasons[f"tests {name}({shown}), and a macro gives the header's name"] = None
        return
    angled, quoted = header.groups()
    found.names[os.fsdecode(angled or quoted), bool(quoted)] = None
    if angled and by_macro:  # then macros are expanded in the name, too
        found.words.update(_TOKEN.findall(angled))


def _substituted(macro: Macro, use: _Use, found: _Expanded) -> bytes | None:
    """Return the text that replaces a use of a macro; None if it isn't known."""
    name = macro.name.decode(errors="replace")
    if macro.parameters is None:
        return macro.body + use.behind
    if use.argument is None:
        found.reasons[f"passes {name}, which tests for a header, on to another macro"] = None
        return None
    if b"#" in _LITERAL.sub(b"", macro.body) or b"%:" in macro.body:
        found.reasons[f"uses {name}, which makes the name of a header it tests for with # or ##"] = None
        return None
    arguments = _split(use.argument)
    values = dict(zip(macro.parameters, arguments, strict=False))
    values[b"__VA_ARGS__"] = b",".join(arguments[sum(p != b"__VA_ARGS__" for p in macro.parameters) :])
    return _TOKEN.sub(lambda token: values.get(token[0], token[0]), macro.body)


def _split(arguments: bytes) -> list[bytes]:
    parts, start, depth = [], 0, 0
    for found in _SEPARATOR.finditer(arguments):
        depth += (found[0] == b"(") - (found[0] == b")")
        if found[0] == b"," and not depth:
            parts.append(arguments[start : found.start()])
            start = found.end()
    return [part.strip() for part in (*parts, arguments[start:])]

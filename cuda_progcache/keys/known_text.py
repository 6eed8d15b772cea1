# SPDX-License-Identifier: Apache-2.0
"""The texts of a compile, with answers to questions about each, cached by content.

A process may compile many programs with the same headers; each header is read and examined once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from cuda_progcache._util.digest import sha256
from cuda_progcache.keys.has_include import Mentions, defined, mentions
from cuda_progcache.keys.headers import read_file
from cuda_progcache.keys.quick_text import pieces

_Answer = TypeVar("_Answer")

#: Answers by the digest of the text, the question, and the question's arguments.
_answers: dict[tuple[object, ...], Any] = {}
_MAX_ANSWERS = 65_536


class KnownText:
    """A text of a compile.

    Parameters
    ----------
    where : str
        The text's name in messages.
    digest : str
        The SHA-256 (hex) of its content.
    path : str
        The file from which the content is read, if needed.
    content : bytes, optional
        The content, if it was already read.
    """

    __slots__ = ("_content", "_digest", "_path", "where")

    def __init__(self, where: str, digest: str, path: str, content: bytes | None = None) -> None:
        self.where = where
        self._digest = digest
        self._path = path
        self._content = content

    @classmethod
    def of(cls, where: str, content: bytes) -> KnownText:
        """Return a text that isn't a file."""
        return cls(where, sha256(content).hexdigest(), "", content)

    def _ask(self, question: Callable[..., _Answer], *about: object) -> _Answer:
        """Return the answer to a question about the content.

        Raise OSError with the text's name if the content has to be read and the file has changed.
        """
        asked = (self._digest, question, *about)
        try:
            return cast("_Answer", _answers[asked])
        except KeyError:
            pass
        if self._content is None:
            content = read_file(self._path)
            if content is None or sha256(content).hexdigest() != self._digest:
                raise OSError(self.where)
            self._content = content
        answer = question(self._content, *about)
        if len(_answers) >= _MAX_ANSWERS:
            _answers.clear()
        _answers[asked] = answer
        return answer

    def ask(self, question: Callable[[bytes], _Answer]) -> _Answer:
        """Return the answer to a question of :mod:`cuda_progcache.keys.include_text`; answers are cached."""
        return self._ask(question)

    def mentions(self, name: bytes) -> Mentions:
        """Return the occurrences of a name: :func:`cuda_progcache.keys.has_include.mentions`."""
        return self._ask(mentions, name)

    def defined(self, names: frozenset[bytes]) -> frozenset[bytes]:
        """Return the subset of ``names`` that the text defines as macros."""
        return self._ask(defined, names)

    def pieces(self, name: bytes | None) -> frozenset[bytes]:
        """Return the words from which ``##`` may make a name: :func:`cuda_progcache.keys.quick_text.pieces`."""
        return self._ask(pieces, name)

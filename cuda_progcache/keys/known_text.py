# SPDX-License-Identifier: Apache-2.0
"""The texts of a compile, and what was found out about each, remembered by content.

One process compiles many programs over the same headers: a header is read and looked into once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from cuda_progcache._util.digest import sha256
from cuda_progcache.keys.has_include import Mentions, defined, mentions
from cuda_progcache.keys.headers import read_file
from cuda_progcache.keys.quick_text import pieces

_Answer = TypeVar("_Answer")

#: By the digest of the text, the question, and what it is about.
_answers: dict[tuple[object, ...], Any] = {}
_MAX_ANSWERS = 65_536


class KnownText:
    """A text of a compile.

    Parameters
    ----------
    where : str
        How a person would call it.
    digest : str
        SHA-256 (hex) of its content.
    path : str
        Where it can be read, if it has to be.
    content : bytes, optional
        If it was read already.
    """

    __slots__ = ("_content", "_digest", "_path", "where")

    def __init__(self, where: str, digest: str, path: str, content: bytes | None = None) -> None:
        self.where = where
        self._digest = digest
        self._path = path
        self._content = content

    @classmethod
    def of(cls, where: str, content: bytes) -> KnownText:
        """A text that is no file."""
        return cls(where, sha256(content).hexdigest(), "", content)

    def _ask(self, question: Callable[..., _Answer], *about: object) -> _Answer:
        """The answer to a question about its content; OSError with the name if that has to be read, and has changed."""
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
        """Ask one of :mod:`cuda_progcache.keys.include_text`'s questions; the answer is remembered."""
        return self._ask(question)

    def mentions(self, name: bytes) -> Mentions:
        """Where it has a name: :func:`cuda_progcache.keys.has_include.mentions`."""
        return self._ask(mentions, name)

    def defined(self, names: frozenset[bytes]) -> frozenset[bytes]:
        """Those of the names that are macros which it defines."""
        return self._ask(defined, names)

    def pieces(self, name: bytes | None) -> frozenset[bytes]:
        """Words from which a name may be pasted: :func:`cuda_progcache.keys.source.pieces`."""
        return self._ask(pieces, name)

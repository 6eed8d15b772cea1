# SPDX-License-Identifier: Apache-2.0
"""Selections of programs by name, parameters and architecture, as users write them.

Examples: ``softmax``, ``softmax@sm_90``, ``softmax?dtype=float16,block=256@sm_90``. In a name, ``*`` matches anything
and ``?`` one character; brackets are literal, since file names may contain them. A ``?`` before a name and ``=`` begins
the parameters.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cuda_progcache.store.compile_record import CompileRecord

_PARAMETERS = re.compile(r"\?(?=[A-Za-z_]\w*=)")
_ARCH = re.compile(r"@((?:sm|compute)_\w+)$")


def fits(name: str, pattern: str) -> bool:
    """Return whether a name matches a pattern with ``*`` and ``?``."""
    return _compiled(pattern).fullmatch(name) is not None


@functools.lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = (".*" if each == "*" else "." if each == "?" else re.escape(each) for each in pattern)
    return re.compile("".join(parts), re.DOTALL)


class Selection(NamedTuple):
    """A selection of programs.

    Attributes
    ----------
    name : str
        A name or a pattern with ``*`` and ``?``.
    parameters : tuple of (str, str)
        The parameters that must match, with their values as text.
    arch : str or None
        None for all architectures.
    """

    name: str
    parameters: tuple[tuple[str, str], ...] = ()
    arch: str | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Parse ``kernel?param=value,param=value@arch``; all but the name may be left out.

        Raises
        ------
        ValueError
            If a parameter has no ``=``.
        """
        arch = None
        if found := _ARCH.search(text):
            text, arch = text[: found.start()], found[1]
        name, *rest = _PARAMETERS.split(text, maxsplit=1)
        parameters = []
        for pair in re.split("[,&]", rest[0]) if rest else ():
            key, equals, value = pair.partition("=")
            if not (key and equals):
                raise ValueError(f"{pair!r} isn't PARAMETER=VALUE")
            parameters.append((key, value))
        return cls(name, tuple(parameters), arch)

    def includes(self, about: CompileRecord) -> bool:
        """Return whether the selection includes the program of a record."""
        if self.arch is not None and about.arch != self.arch:
            return False
        if not (fits(about.title, self.name) or fits(about.name, self.name)):
            return False
        has = {} if about.kernel is None else about.kernel.parameters
        return all(name in has and _same(has[name], value) for name, value in self.parameters)


def _same(value: Any, text: str) -> bool:
    return str(value).lower() == text.lower()

# SPDX-License-Identifier: Apache-2.0
"""Which programs are meant: by name, parameters and architecture, as people write them.

``softmax``, ``softmax@sm_90``, ``softmax?dtype=float16,block=256@sm_90``. In a name ``*`` stands for anything and ``?``
for one character; a bracket is a bracket, as file names have them. The ``?`` that begins the parameters is followed by
a name and ``=``.
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
    """Whether a name is of a pattern with ``*`` and ``?``."""
    return _compiled(pattern).fullmatch(name) is not None


@functools.lru_cache(maxsize=64)
def _compiled(pattern: str) -> re.Pattern[str]:
    parts = (".*" if each == "*" else "." if each == "?" else re.escape(each) for each in pattern)
    return re.compile("".join(parts), re.DOTALL)


class Selection(NamedTuple):
    """Some programs.

    Attributes
    ----------
    name : str
        May hold ``*`` and ``?``.
    parameters : tuple of (str, str)
        Those that count, as text.
    arch : str or None
    """

    name: str
    parameters: tuple[tuple[str, str], ...] = ()
    arch: str | None = None

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read ``kernel?param=value,param=value@arch``; all but the name may be left out.

        Raises
        ------
        ValueError
            A parameter has no ``=``.
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
        """Whether the program of a record is meant."""
        if self.arch is not None and about.arch != self.arch:
            return False
        if not (fits(about.title, self.name) or fits(about.name, self.name)):
            return False
        has = {} if about.kernel is None else about.kernel.parameters
        return all(name in has and _same(has[name], value) for name, value in self.parameters)


def _same(value: Any, text: str) -> bool:
    return str(value).lower() == text.lower()

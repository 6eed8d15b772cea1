# SPDX-License-Identifier: Apache-2.0
"""The paths that reach the output of a compile, found by searching the output.

Where ``__FILE__`` is expanded, NVRTC writes the header's path into its output: the include directory as it was given, a
slash, and the rest; for a header next to the source, the folder in the program's name. The working directory isn't
written (measured with NVRTC 12.9 to 13.5). So an include directory that occurs in the output belongs in the key, as it
was spelled, and the others don't: the same project in another directory is the same program.

The compiler's log also contains paths, but these aren't in the key: :func:`relocated` replaces the old paths by the
current ones.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence

from cuda_progcache.keys.include_text import FOLDED, NO_PATH

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.keys.headers import HeaderSet, Place
    from cuda_progcache.keys.includes import Trace
    from cuda_progcache.keys.schema import BaseKey

Root = tuple[str, int]
"""The first two parts of a :data:`~cuda_progcache.keys.headers.Place`, or ``NAME`` for the program's own name."""

NAME: Root = ("N", 0)

# An initialized array in PTX: ".global .align 1 .b8 name[4] = {0, 1, 2, 3};"
_ARRAY = re.compile(rb"\.[bus](8|16|32|64)\s+[^\s=;]+\s*=\s*\{([^}]*)\}")
_FORMATS = {b"8": "B", b"16": "<H", b"32": "<I", b"64": "<Q"}


def reaching(
    base: BaseKey, headers: HeaderSet, trace: Trace | None, output: bytes, target_type: str
) -> tuple[Root, ...]:
    """Return the roots whose paths a compile wrote into its output.

    Parameters
    ----------
    base : BaseKey
        The program's key.
    headers : HeaderSet
        The headers that the compile read, and how they use paths.
    trace : list of (int, str) or None
        The headers as they were opened. If None, a root counts if its spelling occurs anywhere in the output.
    output : bytes
        The compiled output.
    target_type : {"cubin", "ptx", "ltoir"}
        The type of the output.

    Returns
    -------
    tuple of Root
        All roots if a text may turn a path into other bytes, and for LTO-IR, which can't be searched.
    """
    if headers.mentions_file == NO_PATH:
        return ()
    inputs = base.inputs
    everything = (*base.search.prefixes, NAME)
    if headers.mentions_file == FOLDED or target_type == "ltoir":
        return everything
    texts = [output, *_arrays(output)] if target_type == "ptx" else [output]

    def is_there(path: str) -> bool:
        return any(os.fsencode(path) in text for text in texts)

    if trace is None:
        roots = (root for root in everything if inputs.spelled(root))
        outside = any(header.place[0] == "A" and is_there(header.name) for header in headers.headers)
        return (*(root for root in roots if is_there(inputs.spelled(root))), *((("A", 0),) if outside else ()))
    if inputs.header_policy.hermetic:  # headers in memory have no paths but their names
        return everything if any(is_there(path) for _, path in trace) else ()
    reached = [NAME] if is_there(inputs.name) else []
    for root, paths in _by_root(base, trace).items():
        if root is None:
            if any(map(is_there, paths)):
                return everything
        elif is_there(inputs.spelled(root)) and any(map(is_there, paths)):
            reached.append(root)
    return tuple(reached)


def _by_root(base: BaseKey, trace: Trace) -> dict[Root | None, list[str]]:
    """Return the paths of a trace by the root with which they are spelled; None if the root isn't known."""
    found: dict[Root | None, list[str]] = {}
    for path in dict.fromkeys(path for _, path in trace):
        places = base.search.places(path)
        root = next((place[:2] for place in places if base.inputs.spelled(place[:2]) + place[2] == path), None)
        found.setdefault(root, []).append(path)
    return found


def _arrays(ptx: bytes) -> Iterator[bytes]:
    """Yield the initial values of the arrays in a PTX text, as bytes in memory; addresses become zeros."""
    for width, values in _ARRAY.findall(ptx):
        size, code = int(width) // 8, _FORMATS[width]
        numbers = [value.strip() for value in values.split(b",")]
        yield b"".join(
            [struct.pack(code, int(n) % (1 << 8 * size)) if n.lstrip(b"-").isdigit() else bytes(size) for n in numbers]
        )


# --- logs ----------------------------------------------------------------------------------------------------------


def in_log(base: BaseKey, trace: Trace | None, log: str) -> list[list[Any]]:
    """Return the files that a log names, for a record: ``[[path, [root, index, rest]], ...]``, longest path first."""
    if not log:
        return []
    inputs = base.inputs
    found: dict[str, Place] = {}
    for path in dict.fromkeys(path for _, path in trace or ()):
        for place in base.search.places(path):
            if inputs.spelled(place[:2]) + place[2] == path:
                found[path] = place
                break
    found[inputs.compiler_name] = (*NAME, "")
    return [[path, list(found[path])] for path in sorted(found, key=len, reverse=True) if path in log]


def relocated(log: str, files: Sequence[Sequence[Any]], spelled: Callable[[Root], str]) -> str:
    """Return a log with the current paths of its files.

    Parameters
    ----------
    log : str
    files : sequence
        The result of :func:`in_log`.
    spelled : callable
        A function that returns the current spelling of a root.

    Returns
    -------
    str
    """
    now = {}
    for path, (root, index, rest) in files:
        with contextlib.suppress(IndexError):  # a root that this compile doesn't have: the path stays
            now[path] = spelled((root, index)) + rest
    if all(path == new for path, new in now.items()):
        return log
    # NVRTC writes "path(line): ..." and "... at line N of path".
    path = "|".join(map(re.escape, now))
    pattern = re.compile(rf"^({path})(?=\(\d+\): )|(?<= of )({path})$", re.MULTILINE)
    return pattern.sub(lambda found: now[found[0]], log)

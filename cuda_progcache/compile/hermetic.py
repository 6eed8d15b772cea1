# SPDX-License-Identifier: Apache-2.0
"""Hermetic compiles: the compiler gets exactly the header bytes that are in the key, and can't read others.

First a run of the front end finds the headers; their bytes are read, hashed and kept. Then the real compile gets them
as NVRTC's in-memory headers, without include directories. NVRTC finds those only by the name in the ``#include``
(observed with 13.5: neither the includer's folder nor the search path counts, and files on disk come last), so each
header is passed under every name by which it is included. One of these names has the content; the others include that
one, because ``#pragma once`` would otherwise take them for several files.

Afterwards the opened headers are compared with the passed ones. A program that can't be compiled this way (two headers
with the same name, an ``#include_next``, a header that keeps changing) is compiled as usual, and isn't kept.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from cuda_progcache.compile.compilers import compile_cpp
from cuda_progcache.compile.output import CompilerRefusal
from cuda_progcache.keys import has_include
from cuda_progcache.keys.flags import BUNDLED_HEADERS, INCLUDE_PATH, without
from cuda_progcache.keys.folders import Folders
from cuda_progcache.keys.include_text import includes
from cuda_progcache.keys.includes import UNKNOWN, Trace, folders_of, headers_read
from cuda_progcache.keys.known_text import KnownText

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cuda_progcache.compile.output import Output
    from cuda_progcache.keys.headers import HeaderSet, SearchPath
    from cuda_progcache.keys.schema import BaseKey

_ATTEMPTS = 3
_ANY_TIME = Folders(1 << 63, {})  # no header is too recent: the recorded bytes are the ones that will be compiled

# The content of a header that a __has_include asks for but nothing includes.
_ONLY_LOOKED_FOR = b"#error it was looked for, and not included\n"


class _NotHermeticError(Exception):
    """A program can't be compiled from memory; the message says why."""


class _InMemory(NamedTuple):
    """Headers for NVRTC, by name; ``forwarders`` are the names whose content is only our ``#include``."""

    headers: dict[str, bytes]
    forwarders: frozenset[str]


def compile_hermetic(base: BaseKey, random_seed: str) -> tuple[Output, HeaderSet]:
    """Compile C++ with headers from memory; return the output, and the headers it was made from.

    Parameters
    ----------
    base : BaseKey
        The key of a program that reads headers.
    random_seed : str
        As for :func:`~cuda_progcache.compile.compilers.compile_cpp`.

    Returns
    -------
    output : Output
    headers : HeaderSet
        If the headers had to be read from disk, ``uncacheable`` says why.

    Raises
    ------
    CompilerRefusal
        If the compiler refuses the program.
    """
    inputs = base.inputs
    code, name = inputs.compiler_code, inputs.compiler_name
    run = functools.partial(compile_cpp, code, name=name, target_type=inputs.target_type)
    reason = "its headers changed again and again while it was being compiled"
    for _ in range(_ATTEMPTS):
        started = time.time_ns()
        front_end = run(flags=inputs.flags, front_end_only=True)
        contents: dict[str, bytes] = {}
        headers = headers_read(base, front_end.trace, _ANY_TIME, contents)
        try:
            if headers.uncacheable:
                raise _NotHermeticError(headers.uncacheable)
            memory = _in_memory(base, front_end.trace, contents)
            output = run(
                flags=without(inputs.flags, INCLUDE_PATH, BUNDLED_HEADERS),
                name_expressions=inputs.name_expressions,
                random_seed=random_seed,
                headers=memory.headers,
            )
        except _NotHermeticError as error:
            reason = str(error)
            break
        except CompilerRefusal as refusal:
            if _edited_since(started, contents):  # the recorded bytes aren't those that the front end saw
                continue
            reason = f"the compiler refuses it with headers from memory ({refusal.status})"
            break
        recorded = [contents.get(os.path.join(base.cwd, path)) for _, path in front_end.trace or ()]
        if _opened(output.trace or [], memory) == list(dict.fromkeys(recorded)):
            return output, headers
    before = folders_of(base)
    output = run(flags=inputs.flags, name_expressions=inputs.name_expressions, random_seed=random_seed)
    headers = headers_read(base, output.trace, before)
    return output, replace(headers, uncacheable=headers.uncacheable or f"it can't be compiled hermetically: {reason}")


def _edited_since(time_ns: int, paths: Iterable[str]) -> bool:
    try:
        return any(max(st.st_mtime_ns, st.st_ctime_ns) >= time_ns for st in map(os.stat, paths))
    except OSError:
        return True


def _opened(trace: Trace, memory: _InMemory) -> list[bytes | None]:
    """Return the header contents that a compile opened, each once, in order; None stands for a file on disk."""
    return list(dict.fromkeys(memory.headers.get(name) for _, name in trace if name not in memory.forwarders))


def _in_memory(base: BaseKey, trace: Trace | None, contents: Mapping[str, bytes]) -> _InMemory:
    if trace is None or any(depth == UNKNOWN for depth, _ in trace):
        raise _NotHermeticError("this NVRTC doesn't say which header includes which")
    inputs = base.inputs
    search = base.search
    names: dict[str, str] = {}  # name in the #include: path of the header
    chain: list[str] = []
    for depth, spelled in trace:
        path = os.path.join(search.cwd, spelled)
        if depth:
            includer = chain[depth - 1]
            text, folders = contents[includer], [os.path.dirname(includer)]
            written = _included(text)
        else:
            folders = [search.source_dir, search.cwd]
            written = _included(inputs.code) | set(inputs.pre_includes)
        for name in _names_of(path, folders, search, written):
            if os.path.realpath(names.setdefault(name, path)) != os.path.realpath(path):
                raise _NotHermeticError(f"{name} is the name of two headers")
        chain[depth:] = [path]
    _check_probes(base, search, contents, names)
    canonical: dict[str, str] = {}
    headers: dict[str, bytes] = {}
    forwarders: set[str] = set()
    for name, path in names.items():
        first = canonical.setdefault(os.path.realpath(path), name)
        headers[name] = contents.get(path, _ONLY_LOOKED_FOR) if first == name else f"#include <{first}>\n".encode()
        if first != name:
            forwarders.add(name)
    return _InMemory(headers, frozenset(forwarders))


def _included(text: bytes) -> set[str]:
    return {include.name for include in includes(text)}


def _names_of(path: str, folders: list[str], search: SearchPath, written: set[str]) -> set[str]:
    """Return a header's names by which it may have been included: those in the text, or all if a macro names it."""
    places = [place[2] for place in search.places(path)]
    beside = [path[len(folder) + 1 :] for folder in folders if path.startswith(folder + "/")]
    names = {path, *places, *beside}
    return names & written or names - {path}


def _check_probes(base: BaseKey, search: SearchPath, contents: Mapping[str, bytes], names: dict[str, str]) -> None:
    """Ensure that each ``__has_include`` finds in memory exactly what it finds on disk."""
    dirs = [*search.include_dirs, *([search.bundled] if search.bundled else [])]
    texts = [(base.inputs.code, [search.source_dir]), *((text, [os.path.dirname(p)]) for p, text in contents.items())]
    missing: set[str] = set()
    for index, name, quoted in has_include.probes([KnownText.of("", text) for text, _ in texts]).asked:
        beside = texts[index][1] if quoted else ()
        paths = (os.path.join(folder, name) for folder in (*beside, *dirs))
        found = next((path for path in paths if os.path.isfile(path)), None)
        if found is None:
            missing.add(name)
        else:
            names.setdefault(name, found)
    for name in missing & names.keys():
        raise _NotHermeticError(f"{name} is found by one header, but not by __has_include in another")

# SPDX-License-Identifier: Apache-2.0
"""Precompiled headers, for a batch of compiles that begin with the same includes.

NVRTC's front end needs more than a second to read CCCL. A precompiled header (PCH) of it loads in half a second, and
the output is the same, bit for bit. But NVRTC never checks the headers again, a PCH only works in the process that made
it, and it takes some 300 MB of memory and as much on disk. So it is made only for a batch, by a process that ends with
the batch (:mod:`cuda_progcache.service.worker`), and each use is checked:

* before: every header in it has the same content, and no other file shadows one of them, as for a hit;
* after: NVRTC has used it, and the log doesn't mention it.

In any other case, and if the compiler refuses the program, it is compiled without a PCH. So outputs, logs and keys are
the same with and without PCHs.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from cuda_progcache.compile.output import CompilerRefusal
from cuda_progcache.keys.flags import PRE_INCLUDE
from cuda_progcache.keys.headers import HeaderSet, SearchPath, holds
from cuda_progcache.keys.includes import TRACE, folders_of, headers_read
from cuda_progcache.keys.lasting import lasting
from cuda_progcache.keys.quick_text import may_include, whole_words

if TYPE_CHECKING:
    from cuda_progcache.compile.output import Output
    from cuda_progcache.keys.includes import Trace
    from cuda_progcache.keys.inputs import CompileInputs
    from cuda_progcache.keys.schema import BaseKey

#: Bytes of address space that NVRTC reserves for a PCH; cub and thrust need some 300 MB, and the default is 256 MB.
HEAP = 1 << 30
#: The number of PCHs kept at a time; each is a large file.
_KEPT = 2

_BLANK = re.compile(rb"(?:\s+|//[^\n]*|/\*.*?\*/)+", re.DOTALL)
_DIRECTIVE = re.compile(rb"[ \t]*#[ \t]*(include|define|undef|pragma)\b[^\n]*")
_INCLUDED = re.compile(rb"[ \t]*#[ \t]*include[ \t]*(?:<([^>\n]+)>|\"([^\"\n]+)\")")
# Options that use PCHs themselves, read headers that aren't in the source, make no output, or compile elsewhere.
_UNFIT = {"pch", "create-pch", "use-pch", "pch-dir", PRE_INCLUDE, "fdevice-syntax-only"}


def shared_prefix(inputs: CompileInputs) -> bytes | None:
    """Return the directives at the start of a source, if all its headers are included there.

    Comments and blank lines are left out, because they don't matter to NVRTC's PCHs.

    Returns
    -------
    bytes or None
        None if the source can't use a PCH.
    """
    if inputs.code_type != "c++" or not inputs.facts.names.isdisjoint(_UNFIT):
        return None
    if lasting("nvrtc", inputs.flags):
        return None
    code = inputs.code
    directives = []
    at = 0
    while True:
        blank = _BLANK.match(code, at)
        at = blank.end() if blank is not None else at
        found = _DIRECTIVE.match(code, at)
        if found is None or found[0].rstrip().endswith(b"\\") or b"/*" in found[0]:
            break
        directives.append(found[0].split(b"//")[0].strip() if found[1] != b"include" else found[0].strip())
        at = found.end()
    rest = code[at:]
    # NVRTC may follow a directive that isn't understood here; a probe for a header concerns only this source.
    if rest.startswith((b"#", b"%:", b"??=")) or may_include(rest) or b"__has_include" in whole_words(code):
        return None
    prefix = b"\n".join(directives)
    return prefix if _INCLUDED.search(prefix) else None


def prefix_id(inputs: CompileInputs, cwd: str) -> str | None:
    """Return an identifier of the compiles that can share a PCH; equal for the same includes, flags and search path."""
    prefix = shared_prefix(inputs)
    if prefix is None:
        return None
    search = inputs.search_path(cwd)
    what = (prefix, inputs.flags, search.include_dirs, search.source_dir, search.cwd)
    return sha256(repr(what).encode("utf-8", "surrogateescape"), usedforsecurity=False).hexdigest()


def reaches_many_headers(inputs: CompileInputs, search: SearchPath, many: int = 32) -> bool:
    """Whether a source includes at least ``many`` headers, directly or indirectly.

    This distinguishes front ends that take a second (CCCL, cooperative groups: more than a hundred headers) from those
    that take milliseconds (cuda_fp16.h, mma.h: five). Only the text is examined; conditions are ignored.

    Parameters
    ----------
    inputs : CompileInputs
    search : SearchPath
        The search path of the compile.
    many : int
        The threshold; no more headers are read.
    """
    if not inputs.reads_headers:
        return False
    seen: set[str] = set()
    waiting: list[tuple[str, bytes]] = [(search.source_dir, inputs.code)]
    while waiting:
        folder, content = waiting.pop()
        for line in content.splitlines():
            named = _INCLUDED.match(line)
            if named is None:
                continue
            name = os.fsdecode(named[1] or named[2])
            folders = search.include_dirs if named[1] else (folder, *search.include_dirs)
            path = next((p for d in folders if os.path.isfile(p := os.path.join(d, name))), None)
            if path is None or path in seen:
                continue
            seen.add(path)
            if len(seen) >= many:
                return True
            try:
                with open(path, "rb") as file:
                    waiting.append((os.path.dirname(path), file.read()))
            except OSError:
                continue  # the compiler will report it
    return False


@dataclass(frozen=True)
class _Precompiled:
    descriptor: int
    headers: HeaderSet
    trace: Trace

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.descriptor}"


class PrecompiledHeaders:
    """The PCHs of a batch of compiles in the current process; each is made at the first compile of its prefix.

    An object must be used by one thread only. The files have no names, so they are removed when the process ends.

    Parameters
    ----------
    scratch : str, optional
        The directory in which PCHs are made; None: the system's directory for temporary files.
    """

    def __init__(self, scratch: str | None = None) -> None:
        self._scratch = scratch
        self._kept: OrderedDict[str, _Precompiled] = OrderedDict()
        self._hopeless: set[str] = set()
        self.made = self.used = 0
        """How many PCHs were made, and how many compiles have used one."""

    def compile(self, base: BaseKey, compile_: Callable[[Sequence[str]], Output]) -> tuple[Output, HeaderSet] | None:
        """Compile with a PCH.

        Parameters
        ----------
        base : BaseKey
            The key of the program.
        compile_ : callable
            Compiles with the additional NVRTC flags that it is given.

        Returns
        -------
        (Output, HeaderSet) or None
            The output, as a plain compile would make it, and the headers it would have read. None: the caller must
            compile without a PCH.
        """
        prefix = prefix_id(base.inputs, base.cwd)
        if prefix is None or prefix in self._hopeless:
            return None
        known = self._kept.get(prefix)
        try:
            if known is None:
                return self._make(prefix, base, compile_)
            self._kept.move_to_end(prefix)
            return self._use(prefix, known, base, compile_)
        except CompilerRefusal as refusal:
            if known is not None and "precompiled header" in refusal.log:  # the PCH can no longer be read
                self._drop(prefix)
                self._hopeless.add(prefix)
            return None  # the plain compile reports it without mentioning PCHs

    def _make(
        self, prefix: str, base: BaseKey, compile_: Callable[[Sequence[str]], Output]
    ) -> tuple[Output, HeaderSet] | None:
        from cuda_progcache.compile.compilers import include_source, reserve_pch_heap

        self._hopeless.add(prefix)  # until this succeeds: a failing attempt at each compile would double its cost
        # Only the trace shows whether a PCH was used.
        if include_source() != TRACE or not os.path.isdir("/proc/self/fd") or not reserve_pch_heap(HEAP):
            return None
        before = folders_of(base)
        with tempfile.TemporaryDirectory(prefix="progcache-pch-", dir=self._scratch) as folder:
            path = os.path.join(folder, "headers.pch")
            output = compile_((f"--create-pch={path}", "--pch-messages=false"))
            # A log may be about the headers, and would be missing in the next compile.
            if output.pch_status != "created" or output.trace is None or output.log:
                return None
            headers = headers_read(base, output.trace, before)
            if headers.uncacheable is not None:
                return None
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        while len(self._kept) >= _KEPT:
            os.close(self._kept.popitem(last=False)[1].descriptor)
        self._kept[prefix] = _Precompiled(descriptor, headers, output.trace)
        self._hopeless.discard(prefix)
        self.made += 1
        return output._replace(pch_status=None), headers

    def _use(
        self, prefix: str, known: _Precompiled, base: BaseKey, compile_: Callable[[Sequence[str]], Output]
    ) -> tuple[Output, HeaderSet] | None:
        if not holds(known.headers, base.search):
            self._drop(prefix)
            return None
        output = compile_((f"--use-pch={known.path}", "--pch-messages=false"))
        if output.trace is not None:  # it lists NVRTC's own prologue: the headers were read, and the PCH wasn't used
            self._drop(prefix)
            self._hopeless.add(prefix)
            return None
        self.used += 1
        # Only the headers of the prefix can have been read: a source with other includes has no prefix.
        return output._replace(trace=known.trace), known.headers

    def _drop(self, prefix: str) -> None:
        os.close(self._kept.pop(prefix).descriptor)

    def close(self) -> None:
        """Close the files."""
        for prefix in list(self._kept):
            self._drop(prefix)

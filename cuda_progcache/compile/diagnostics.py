# SPDX-License-Identifier: Apache-2.0
"""A compiler's diagnostics, mapped to the lines of the source or of its template."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

from cuda_progcache.compile.arch import about_arch
from cuda_progcache.errors import CompileError, Diagnostic, UnsupportedArchError, and_theirs
from cuda_progcache.keys.flags import ARCH, read_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cuda_progcache.compile.output import CompilerRefusal

# NVRTC:  gemm.cu(12): error: identifier "x" is undefined        gemm.cu(3): warning #177-D: variable ...
# libNVVM and nvJitLink:  ptxas application ptx input, line 7; error : ...
_NVRTC_LINE = re.compile(
    r"^(?P<file>.+?)\((?P<line>\d+)\): (?P<severity>(?:catastrophic )?error|warning|remark|note)"
    r"(?: #(?P<code>[\w-]+))?: (?P<message>.*)$"
)
_PTXAS_LINE = re.compile(
    r"^(?P<file>ptxas .*?), line (?P<line>\d+); (?P<severity>error|warning|fatal)\s*: (?P<message>.*)$"
)

# The arguments of `#line`: a line, and a file in quotes.
_DIRECTIVE = re.compile(r'\s*#\s*line\s+(?P<line>\d+)\s+"(?P<file>(?:[^"\\]|\\.)*)"\s*')

LineLookup = Callable[["int", "int | None"], "tuple[str, int] | None"]
"""Generated line (from 1) and column (from 0, or None if the compiler gives none) to (template file, line)."""


def parse_log(
    log: str, *, name: str = "", source: str = "", lookup: LineLookup | None = None
) -> tuple[Diagnostic, ...]:
    """Parse a compiler's log.

    Parameters
    ----------
    log : str
        The compiler's log, unchanged.
    name : str
        The program's name; messages for a file of this name refer to ``source``.
    source : str
        The source that was compiled.
    lookup : callable, optional
        Maps a line and a column of ``source`` to the template's file and line, if it was rendered from one.

    Returns
    -------
    tuple of Diagnostic
    """
    lines = source.splitlines()
    directed = _directed_lines(lines)
    found = []
    said = log.splitlines()
    for index, text in enumerate(said):
        match = _NVRTC_LINE.match(text) or _PTXAS_LINE.match(text)
        if match is None:
            continue
        parts = match.groupdict()
        named = parts["file"], int(parts["line"])
        shown, column = _caret(said, index + 1)
        written = directed.get(named, [named[1]] if parts["file"] == name else [])
        written = [line for line in written if 0 < line <= len(lines)]
        line = next((line for line in written if lines[line - 1] == shown), written[0] if written else None)
        rendered = None if line is None else lines[line - 1]
        place = None
        if lookup is not None and (line is not None or parts["file"] == name):
            place = lookup(line or named[1], column if shown == rendered else None)
            if place is None and named in directed:
                place = named
        found.append(
            Diagnostic(
                severity=parts["severity"],
                file=parts["file"],
                line=named[1],
                message=parts["message"].strip(),
                code=parts.get("code"),
                template=place[0] if place else None,
                template_line=place[1] if place else None,
                rendered=rendered,
            )
        )
    return tuple(found)


def _caret(said: Sequence[str], start: int) -> tuple[str | None, int | None]:
    """Return the source line that a log shows after a message, and the column that its caret points at."""
    for index in range(start, len(said)):
        if _NVRTC_LINE.match(said[index]):
            break
        if said[index].strip() == "^" and index > start:
            shown = said[index - 1].removeprefix(_MARGIN)
            before = shown.encode()[: said[index].index("^") - len(_MARGIN)]  # the caret counts bytes
            return shown, len(before.decode(errors="ignore"))
    return None, None


_MARGIN = "  "


def _directed_lines(lines: Sequence[str]) -> dict[tuple[str, int], list[int]]:
    """Return the numbers of a source's lines by the file and the line that its ``#line`` directives give them."""
    found: dict[tuple[str, int], list[int]] = {}
    file, number = "", 0
    for written, text in enumerate(lines, 1):
        match = _DIRECTIVE.fullmatch(text) if "#" in text else None
        if match:
            file, number = re.sub(r"\\(.)", r"\1", match["file"]), int(match["line"])
        elif file:
            found.setdefault((file, number), []).append(written)
            number += 1
    return found


def compile_error(
    refusal: CompilerRefusal,
    *,
    name: str,
    code_type: str,
    target_type: str,
    flags: Sequence[str],
    source: str = "",
    lookup: LineLookup | None = None,
) -> CompileError:
    """Return the error for a compiler's refusal, with the program, the places of the errors, and the log."""
    diagnostics = parse_log(refusal.log, name=name, source=source, lookup=lookup)
    errors = [d for d in diagnostics if d.severity != "warning"]
    log = refusal.log.strip()
    head = f"{name}: {code_type} -> {target_type} failed ({refusal.status}) with {' '.join(flags)}"
    mapped = [str(d) for d in errors if d.template is not None]
    parts = [
        head,
        *mapped,
        *_missing_directories(refusal, flags),
        f"compilation log:\n\n{log}" if log else "the compiler left no log",
    ]
    refused_arch = _refused_arch(refusal, flags)
    if refused_arch is not None:
        parts.insert(0, about_arch(refused_arch))
    ours = CompileError if refused_arch is None else UnsupportedArchError
    return and_theirs(ours, *_THEIRS[code_type])(
        "\n".join(parts),
        name=name,
        code_type=code_type,
        target_type=target_type,
        options=flags,
        log=refusal.log,
        diagnostics=diagnostics,
    )


def _missing_directories(refusal: CompilerRefusal, flags: Sequence[str]) -> list[str]:
    """Return hints about missing include directories, if a header wasn't found."""
    if "cannot open source file" not in refusal.log:
        return []
    named = [flag.value for flag in read_flags(flags) if flag.name == "include-path" and flag.value]
    return [f"include directory {path} doesn't exist" for path in named if not os.path.isdir(path)]


# The exceptions of cuda.core, by code type: the module, which may not be loaded, and the class.
_THEIRS = {
    "c++": ("cuda.core._utils.cuda_utils", "NVRTCError"),
    "ptx": ("cuda.bindings.nvjitlink", "nvJitLinkError"),
    "link": ("cuda.bindings.nvjitlink", "nvJitLinkError"),
    "nvvm": ("cuda.bindings.nvvm", "nvvmError"),
}


def _refused_arch(refusal: CompilerRefusal, flags: Sequence[str]) -> str | None:
    """Return the architecture if the compiler refused it, otherwise None."""
    arch = next((flag.value for flag in read_flags(flags) if flag.name == ARCH), None)
    if arch is None:
        return None
    said = (
        "invalid value for --gpu-architecture",  # NVRTC
        "--nv_arch flag",  # its front end, for sm_90f
        f"-arch={arch} is an unsupported option",  # libNVVM
        f"Value '{arch}' is not defined for option 'gpu-name'",  # ptxas
    )
    refused = "UNSUPPORTED_ARCH" in refusal.status or any(words in refusal.log for words in said)
    return arch if refused else None

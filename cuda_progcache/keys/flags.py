# SPDX-License-Identifier: Apache-2.0
"""A compiler's flags, read as the compilers read them: one reading for every spelling.

``-G`` is ``--device-debug``, ``-I dir``, ``-Idir`` and ``--include-path=dir`` are one option, and what ``-Xptxas``
hands on is ptxas's own. Whoever has to know what flags mean asks :func:`facts`; what goes to the compiler, and into
the key, stays as it was given.

The spellings are those of NVRTC (user guide, "Supported Compile Options"), nvJitLink, libNVVM and ptxas
(``ptxas --help``). What isn't documented there was tried with NVRTC 13.5 under ``strace``: each option name that its
ptxas knows was given a file name.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.keys.quick_text import mentions_file, time_macro

INCLUDE_PATH, PRE_INCLUDE, BUNDLED_HEADERS = "include-path", "pre-include", "use-bundled-headers"
ARCH, DEBUG, LINE_INFO = "gpu-architecture", "device-debug", "generate-line-info"

# Short names, without their dash. Most other options are spelled alike with one dash and with two.
_LONG = {
    "arch": ARCH,
    "G": DEBUG,
    "g": DEBUG,  # nvJitLink's and libNVVM's
    "lineinfo": LINE_INFO,
    "D": "define-macro",
    "U": "undefine-macro",
    "I": INCLUDE_PATH,
    "include": PRE_INCLUDE,
    "Xptxas": "ptxas-options",
    "Ofc": "Ofast-compile",
    "opt-info": "optimization-info",
    "dlto": "dlink-time-opt",
    "rdc": "relocatable-device-code",
    "dc": "device-c",
    "dw": "device-w",
    "ewp": "extensible-whole-program",
    "jtd": "jump-table-density",
    "w": "disable-warnings",
    "err-no": "display-error-number",
    "no-err-no": "no-display-error-number",
    "brief-diag": "brief-diagnostics",
    "default-device": "device-as-default-execution-space",
    "Werror": "warning-as-error",
    "o": "output-file",
    "optf": "options-file",
}
# The value may stand in the next word, whatever that begins with.
_TAKES_NEXT = {
    ARCH,
    INCLUDE_PATH,
    PRE_INCLUDE,
    "define-macro",
    "undefine-macro",
    "ptxas-options",
    "Xcudafe",
    "Xnvvm",
    "Xopt",
    "Xllc",
    "Xlnk",
    "Xlto",
}
#: Given several times, they add up; of any other option NVRTC takes the last.
REPEATABLE = _TAKES_NEXT - {ARCH} | {
    "diag-error",
    "diag-suppress",
    "diag-warn",
    "warning-as-error",
    "kernels-used",
    "variables-used",
}
_SPACE = " \t\n\v\f\r"


class Flag(NamedTuple):
    """One option.

    Attributes
    ----------
    name : str
        The long name, without dashes.
    value : str or None
    words : tuple of str
        As it was given: one word, or two.
    """

    name: str
    value: str | None
    words: tuple[str, ...]


def read_flags(words: Iterable[str]) -> Iterator[Flag]:
    """Read flags as NVRTC does; nvJitLink and libNVVM refuse a part of what this takes.

    ``--name=value`` and ``-name=value`` are one word; ``--name value`` two. ``-D``, ``-U`` and ``-I`` take theirs
    without anything between as well. White space around a word doesn't count. A word that is neither an option nor a
    value comes as an option without a name.
    """
    waiting: tuple[str, str] | None = None  # name and word of an option that may have its value in the next word
    for given in words:
        word = given.strip(_SPACE)
        if waiting is not None:
            name, first = waiting
            waiting = None
            if name in _TAKES_NEXT or not word.startswith("-"):
                yield Flag(name, word, (first, given))
                continue
            yield Flag(name, None, (first,))
        if word[:2] in {"-D", "-U", "-I"} and len(word) > 2:
            rest = word[2:]
            yield Flag(_LONG[word[1]], rest[1:] if rest[0] == "=" else rest.lstrip(_SPACE), (given,))
            continue
        spelled, equals, value = word.partition("=")
        name = spelled[2:] if spelled.startswith("--") else _LONG.get(spelled[1:], spelled[1:])
        if not spelled.startswith("-"):
            yield Flag("", word, (given,))
        elif equals:
            yield Flag(name, value, (given,))
        else:
            waiting = name, given
    if waiting is not None:
        yield Flag(waiting[0], None, (waiting[1],))


def without(words: Sequence[str], *names: str) -> list[str]:
    """The flags, but for options of these names."""
    return [word for flag in read_flags(words) if flag.name not in names for word in flag.words]


class Facts(NamedTuple):
    """What the flags of a compile say to those who handle it.

    Attributes
    ----------
    names : frozenset of str
        Long names of all options.
    debug, lineinfo : bool
        With them the working directory and the program's name reach the output.
    include_dirs, pre_includes, macros : tuple of str
        In order; of macros what is defined, ``N=3``.
    bundled_headers : str or None
        The directory into which NVRTC puts its own headers.
    time_macro : str or None
        A date or time macro in a definition: with it each compile gives another output.
    mention_file, probes : bool
        Whether a definition has ``__FILE__`` or its like, or ``__has_include``.
    writes : tuple of str
        Options that write a file beside the output.
    reads : tuple of str
        Options that read a file whose content isn't keyed.
    precompiled : tuple of str
        Options that use precompiled headers.
    """

    names: frozenset[str]
    debug: bool
    lineinfo: bool
    include_dirs: tuple[str, ...]
    pre_includes: tuple[str, ...]
    macros: tuple[str, ...]
    bundled_headers: str | None
    time_macro: str | None
    mention_file: bool
    probes: bool
    writes: tuple[str, ...]
    reads: tuple[str, ...]
    precompiled: tuple[str, ...]

    @property
    def reads_unkeyed(self) -> bool:
        """Whether an option makes the compiler read what isn't keyed."""
        return bool(self.reads or self.precompiled)


@functools.lru_cache(maxsize=256)
def facts(words: tuple[str, ...], code_type: str = "c++") -> Facts:
    """Read the flags of a compile of ``code_type``, or of a ``"link"``."""
    flags = tuple(read_flags(words))
    names = frozenset(flag.name for flag in flags)
    text = "\n".join(words)
    precompiled = [flag for flag in flags if flag.name in _PRECOMPILED]
    files = _Files()
    files.look_at(flags, _NVRTC_WRITES if code_type == "c++" else frozenset())
    return Facts(
        names,
        DEBUG in names,
        LINE_INFO in names,
        _values(flags, INCLUDE_PATH),
        _values(flags, PRE_INCLUDE),
        _values(flags, "define-macro"),
        next((flag.value for flag in flags if flag.name == BUNDLED_HEADERS), None),
        time_macro(text),
        mentions_file(text.encode("utf-8", "surrogateescape")),
        "__has_include" in text,
        tuple(files.written),
        tuple(files.read),
        _shown(precompiled),
    )


def _values(flags: Iterable[Flag], *names: str) -> tuple[str, ...]:
    return tuple(flag.value for flag in flags if flag.name in names and flag.value is not None)


def _shown(flags: Iterable[Flag]) -> tuple[str, ...]:
    return tuple(" ".join(flag.words) for flag in flags)


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


_NVRTC_WRITES = frozenset({"create-pch", "time", "fdevice-time-trace"})
# A precompiled header hides from the include trace which headers went into it.
_PRECOMPILED = frozenset({"pch", "use-pch", "pch-dir"})
_PTXAS_WRITES = frozenset({"link-info", "debug-info", "output-file"})
# A word after any other option of ptxas is a file that it assembles.
_PTXAS_TAKES_NEXT = _words(
    "O opt-level Ofast-compile maxrregcount maxntid minnctapersm func-maxrregcount device-function-maxrregcount",
    "entry e regUsageLevel register-usage-level dlcm def-load-cache dscm def-store-cache flcm force-load-cache fscm",
    "force-store-cache fmad m machine split-compile sanitize allow-expensive-optimizations device-stack-protector",
    "pic position-independent-code",
)
# An option that isn't known: whether it names a file is seen in its name.
_SOUNDS_LIKE_A_FILE = _words(
    "file files filename dir directory path output dump trace keep save temps log report controls pch reproducers"
)
# Options whose names sound so, and which name none that we wouldn't see.
_KNOWN = frozenset(
    {
        INCLUDE_PATH,
        PRE_INCLUDE,
        BUNDLED_HEADERS,
        "pch-verbose",
        "pch-messages",
        "instantiate-templates-in-pch",
        *_NVRTC_WRITES,
        *_PRECOMPILED,
    }
)
# Of the front end behind -Xcudafe: how it words its messages. What else it takes isn't documented, and some of it
# reads and writes files.
_CUDAFE_HARMLESS = ("--diag_", "--display_error_number", "--no_warnings", "--remarks", "--error_limit", "--wrap_")


class _Files:
    """Finds the options that read or write files, in what is handed on to other programs as well."""

    def __init__(self) -> None:
        self.written: list[str] = []
        self.read: list[str] = []

    def look_at(self, flags: Sequence[Flag], written: frozenset[str]) -> None:
        for flag in flags:
            shown = " ".join(flag.words)
            if flag.name in written:
                self.written.append(shown)
            elif flag.name not in _KNOWN and _sounds_like_a_file(flag.name):
                self.read.append(shown)
        self._look_at_ptxas(_values(flags, "ptxas-options"))
        self._look_at_llvm(_values(flags, "Xopt", "Xllc", "Xlnk", "Xlto"))
        self.read += [f"-Xcudafe {word}" for word in _values(flags, "Xcudafe") if not word.startswith(_CUDAFE_HARMLESS)]
        if to_nvvm := _values(flags, "Xnvvm"):
            self.look_at(tuple(read_flags(to_nvvm)), frozenset())

    def _look_at_ptxas(self, words: Sequence[str]) -> None:
        for flag in read_flags(words):
            shown = f"-Xptxas {' '.join(flag.words)}"
            is_input = not flag.name or (len(flag.words) > 1 and flag.name not in _PTXAS_TAKES_NEXT)
            if flag.name in _PTXAS_WRITES:
                self.written.append(shown)
            elif is_input or _sounds_like_a_file(flag.name):
                self.read.append(shown)

    def _look_at_llvm(self, words: Sequence[str]) -> None:
        for word in words:
            if word.startswith("@") or _sounds_like_a_file(word.lstrip("-").partition("=")[0]):
                self.read.append(word)


def _sounds_like_a_file(name: str) -> bool:
    return not _SOUNDS_LIKE_A_FILE.isdisjoint(name.replace("_", "-").split("-"))

# SPDX-License-Identifier: Apache-2.0
"""Compiler flags, parsed as the compilers parse them, so that all spellings of an option are equal.

``-G`` is ``--device-debug``; ``-I dir``, ``-Idir`` and ``--include-path=dir`` are one option; ``-Xptxas`` passes
options on to ptxas. :func:`facts` says what flags mean. The compiler and the key get the flags as they were given.

The spellings are those of NVRTC (user guide, "Supported Compile Options"), nvJitLink, libNVVM and ptxas
(``ptxas --help``). Undocumented behaviour was determined with NVRTC 13.5 under ``strace``, by giving a file name to
each option that its ptxas has.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.keys.quick_text import mentions_file, time_macro

INCLUDE_PATH, PRE_INCLUDE, BUNDLED_HEADERS = "include-path", "pre-include", "use-bundled-headers"
ARCH, DEBUG, LINE_INFO = "gpu-architecture", "device-debug", "generate-line-info"

# Short names, without their dash. Most other options have the same name with one dash and with two.
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
# Options whose value may be in the next word, even if that word begins with a dash.
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
#: Options whose repetitions accumulate. NVRTC uses the last occurrence of any other option.
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
    """One option among a compiler's flags.

    Attributes
    ----------
    name : str
        The long name, without dashes.
    value : str or None
    words : tuple of str
        The one or two words in which the option was given.
    """

    name: str
    value: str | None
    words: tuple[str, ...]


def read_flags(words: Iterable[str]) -> Iterator[Flag]:
    """Parse flags as NVRTC does; nvJitLink and libNVVM accept only some of these forms.

    ``--name=value`` and ``-name=value`` are one word, ``--name value`` is two. The value of ``-D``, ``-U`` and ``-I``
    may also follow immediately. White space around a word is ignored. A word that is neither an option nor a value is
    returned as an option without a name.
    """
    waiting: tuple[str, str] | None = None  # name and word of an option whose value may be the next word
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
    """Return the flags without the options of these names."""
    return [word for flag in read_flags(words) if flag.name not in names for word in flag.words]


class Facts(NamedTuple):
    """The meaning of a compile's flags.

    Attributes
    ----------
    names : frozenset of str
        The long names of all options.
    debug, lineinfo : bool
        Whether debug or line information is generated. Either puts the working directory and the program's name into
        the output.
    include_dirs, pre_includes, macros : tuple of str
        The values of these options, in order; a macro's value is its definition, such as ``N=3``.
    bundled_headers : str or None
        The directory in which NVRTC installs its own headers.
    time_macro : str or None
        A date or time macro in a macro definition; it makes the output differ at each compile.
    mention_file, probes : bool
        Whether a macro definition contains ``__FILE__`` or a similar name, or ``__has_include``.
    writes : tuple of str
        Options that write a file in addition to the output.
    reads : tuple of str
        Options that read a file whose content isn't in the key.
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
        """Whether an option makes the compiler read a file that isn't in the key."""
        return bool(self.reads or self.precompiled)


@functools.lru_cache(maxsize=256)
def facts(words: tuple[str, ...], code_type: str = "c++") -> Facts:
    """Return the meaning of the flags of a compile of ``code_type``, or of a ``"link"``."""
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
# The include trace doesn't show the headers inside a precompiled header.
_PRECOMPILED = frozenset({"pch", "use-pch", "pch-dir"})
_PTXAS_WRITES = frozenset({"link-info", "debug-info", "output-file"})
# Options of ptxas that take the next word as their value. A word after any other option is a file to assemble.
_PTXAS_TAKES_NEXT = _words(
    "O opt-level Ofast-compile maxrregcount maxntid minnctapersm func-maxrregcount device-function-maxrregcount",
    "entry e regUsageLevel register-usage-level dlcm def-load-cache dscm def-store-cache flcm force-load-cache fscm",
    "force-store-cache fmad m machine split-compile sanitize allow-expensive-optimizations device-stack-protector",
    "pic position-independent-code",
)
# Words in the name of an unknown option that suggest that its value is a file.
_SOUNDS_LIKE_A_FILE = _words(
    "file files filename dir directory path output dump trace keep save temps log report controls pch reproducers"
)
# Options whose names contain such a word, but which name no file that isn't handled already.
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
# Options of the front end (-Xcudafe) that only affect its messages. Its other options are undocumented, and some of
# them read or write files.
_CUDAFE_HARMLESS = ("--diag_", "--display_error_number", "--no_warnings", "--remarks", "--error_limit", "--wrap_")


class _Files:
    """The options that read or write files, including options passed on to other programs."""

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

# SPDX-License-Identifier: Apache-2.0
"""The inputs of a compile: their checks, and the form in which the compiler gets them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache._util.user_dirs import user_cache_dir
from cuda_progcache.keys import options as opt
from cuda_progcache.keys.flags import Facts, facts
from cuda_progcache.keys.headers import CHECK_EACH_TIME, HeaderPolicy, SearchPath
from cuda_progcache.keys.source import Source, read_source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

CODE_TYPES = ("c++", "ptx", "nvvm")
_UNQUOTABLE = frozenset('"\\\n')

TARGET_TYPES = {"c++": ("ptx", "cubin", "ltoir"), "ptx": ("cubin", "ptx"), "nvvm": ("ptx", "ltoir")}


class CompileInputs(NamedTuple):
    """The normalized inputs of one compile, as the compiler would get them.

    ``flags`` are the compiler's flags, and ``include_dirs`` the include directories among them. ``unknown_fields`` are
    option fields that this version of the package doesn't know.
    """

    source: Source
    code_type: str
    target_type: str
    options: Any
    name: str
    arch: str
    flags: tuple[str, ...]
    include_dirs: tuple[str, ...]
    name_expressions: tuple[str | bytes, ...]
    extra_digest: bytes | None
    unknown_fields: tuple[tuple[str, str], ...] = ()
    header_policy: HeaderPolicy = CHECK_EACH_TIME

    @property
    def code(self) -> bytes:
        """The source as bytes, without the ``#line`` of :attr:`compiler_code`."""
        return self.source.code

    @property
    def compiler_name(self) -> str:
        """The file name that the compiler gets.

        It is the program's name. If that is the default and there is debug or line information, a name is derived from
        the source's digest, since debuggers and profilers couldn't tell programs of the same name apart.
        """
        said = self.facts
        if self.code_type == "c++" and self.name == opt.DEFAULT_NAME and (said.debug or said.lineinfo):
            return f"program_{sha256(self.code).hexdigest()[:16]}.cu"
        return self.name

    @property
    def debug_source(self) -> str | None:
        """The file in which a debugger finds the source, for a debug build of a program without a name; otherwise None.

        It is in a directory of the user, and its path is in the output. NVRTC gets it in a ``#line``, not as the
        program's name, since it searches the folder of that name for headers.
        """
        if self.code_type != "c++" or self.name != opt.DEFAULT_NAME or not self.facts.debug:
            return None
        path = os.path.join(debug_sources_dir(), self.compiler_name)
        return path if _UNQUOTABLE.isdisjoint(path) else None  # NVRTC doesn't escape these characters in PTX

    @property
    def compiler_code(self) -> bytes:
        """The text that the compiler gets: the source, after a ``#line`` with :attr:`debug_source` if there is one."""
        path = self.debug_source
        if path is None:
            return self.code
        return b'#line 1 "%s"\n' % os.fsencode(path) + self.code

    @property
    def unrepeatable(self) -> str | None:
        """Why two compiles of these inputs may give different bytes; None if they can't."""
        said = self.facts
        if self.extra_digest is None and (reason := unkeyed_files(said)) is not None:
            return reason
        if self.code_type != "c++":
            return None
        if said.precompiled and self.extra_digest is None:
            return f"the option {', '.join(said.precompiled)} hides which headers a precompiled header was made from"
        macro = self.source.time_macro or said.time_macro
        if macro:
            return f"the source uses {macro}, whose value differs at each compile"
        if unclear := [folder for folder in self.include_dirs if folder.startswith(" ") or "\n" in folder]:
            return f"the include directory {unclear[0]!r} can't be told from another in the compiler's list of headers"
        if said.probes:
            return "a macro from an option tests __has_include, and what it looks at isn't in the key"
        return None

    @property
    def reads_headers(self) -> bool:
        """Whether the compiler may open any header."""
        if self.code_type != "c++":
            return False
        return self.source.may_include or bool(self.facts.pre_includes)

    @property
    def facts(self) -> Facts:
        """The meaning of the flags."""
        return facts(self.flags, self.code_type)

    def search_path(self, cwd: str | None = None) -> SearchPath:
        """Return where the compiler searches for headers."""
        cwd = working_directory() if cwd is None else cwd
        return SearchPath.of(self.include_dirs, self.name, cwd, self.facts.bundled_headers, self.pre_includes)

    def spelled(self, root: tuple[str, int]) -> str:
        """Return the prefix of paths in a root of the search path, as it was given to the compiler."""
        kind, index = root
        if kind == "I":
            return self.include_dirs[index].rstrip("/") + "/"
        if kind == "B":
            return (self.facts.bundled_headers or "").rstrip("/") + "/"
        if kind == "N":
            return self.compiler_name
        if kind == "P":
            return os.path.dirname(self.pre_includes[index]) + "/"
        folder = os.path.dirname(self.name) if kind == "S" else ""
        return folder.rstrip("/") + "/" if folder else ""

    @property
    def pre_includes(self) -> list[str]:
        """The headers that are read before the source."""
        return list(self.facts.pre_includes)


def unkeyed_files(said: Facts) -> str | None:
    """Return why these flags can't be keyed, if they name files that the compiler reads; otherwise None."""
    if not said.reads:
        return None
    return f"the option {', '.join(said.reads)} names a file, and its content isn't in the key"


def normalize(
    *,
    code: object,
    code_type: object,
    options: Any,
    target_type: object,
    name_expressions: Iterable[Any] | None = (),
    extra_digest: object = None,
    header_policy: HeaderPolicy = CHECK_EACH_TIME,
) -> CompileInputs:
    """Check compile inputs, and convert them to the form that the compiler gets.

    Returns
    -------
    CompileInputs

    Raises
    ------
    ValueError
        ``code_type`` or ``target_type`` is unknown, no compiler supports their combination, or an option doesn't apply
        to the input.
    TypeError
        The code, a name expression or ``extra_digest`` has the wrong type.
    ArchError
        ``options.arch`` isn't set, or is virtual (``compute_90``) although the target is machine code.
    """
    if code_type != "c++" or target_type not in _CPP_TARGETS:  # not the most common spelling
        code_type, target_type = _check_types(code_type, target_type)
    source = _source(code, code_type)
    if extra_digest is not None and (not isinstance(extra_digest, bytes) or not extra_digest):
        raise TypeError(f"extra_digest must be non-empty bytes or None, got {extra_digest!r}")
    if code_type != "nvvm" and getattr(options, "extra_sources", None) is not None:
        raise ValueError(f"extra_sources is for code_type='nvvm' only; code_type={code_type!r} has no such input")
    expressions = _expressions(name_expressions) if code_type == "c++" else ()  # other compilers ignore them
    options = opt.with_plain_arch(options, target_type)
    flags, include_dirs, unknown_fields = opt.translate(options, code_type, target_type)
    return CompileInputs(
        source,
        code_type,
        target_type,
        options,
        options.name if options.name is not None else opt.DEFAULT_NAME,
        options.arch,
        flags,
        include_dirs,
        expressions,
        extra_digest,
        unknown_fields,
        header_policy,
    )


_CPP_TARGETS = frozenset(TARGET_TYPES["c++"])


def _check_types(code_type: object, target_type: object) -> tuple[str, str]:
    """Return the code type and the target type in lower case, if a compiler supports their combination."""
    code_type, target_type = (kind.lower() if isinstance(kind, str) else kind for kind in (code_type, target_type))
    if not isinstance(code_type, str) or code_type not in CODE_TYPES:
        raise ValueError(f"code_type: {code_type!r} is not a valid SourceCodeType. Must be {_one_of(CODE_TYPES)}")
    if not isinstance(target_type, str) or target_type not in TARGET_TYPES["c++"]:
        raise ValueError(f"target_type={target_type!r} is not supported (must be {_one_of(TARGET_TYPES['c++'])})")
    if target_type not in TARGET_TYPES[code_type]:
        raise ValueError(
            f"target_type={target_type!r} is not valid for code_type={code_type!r}: "
            f"it compiles to {_one_of(TARGET_TYPES[code_type])}"
        )
    return code_type, target_type


def _source(code: object, code_type: str) -> Source:
    if isinstance(code, str):
        return read_source(code)
    if isinstance(code, bytes | bytearray):
        if code_type == "nvvm":
            return read_source(bytes(code))
        raise TypeError(
            f"code must be str for code_type={code_type!r}, got {type(code).__name__} (bytes are for 'nvvm' only)"
        )
    raise TypeError(f"code must be str or bytes, got {type(code).__name__}")


def _expressions(given: object) -> tuple[str | bytes, ...]:
    """Return name expressions, given as any iterable or as a single expression, as a tuple."""
    if given is None:
        return ()
    if isinstance(given, str | bytes):
        return (given,)
    if not hasattr(given, "__iter__"):
        raise TypeError(f"name_expressions must be an iterable of str or bytes, got {type(given).__name__}")
    expressions = tuple(given)
    for expression in expressions:
        if not isinstance(expression, str | bytes):
            raise TypeError(f"name_expressions must be str or bytes, got {type(expression).__name__}")
    return expressions


def _one_of(values: Sequence[str]) -> str:
    *head, last = map(repr, values)
    return f"{', '.join(head)} or {last}" if head else last


def debug_sources_dir() -> str:
    """Return the directory in which debuggers find the sources of programs without a name."""
    return os.path.join(user_cache_dir(), "cuda-progcache-sources")


def working_directory() -> str:
    """Return the working directory; empty if it no longer exists."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""

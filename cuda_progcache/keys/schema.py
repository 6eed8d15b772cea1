# SPDX-License-Identifier: Apache-2.0
"""What identifies a compile: an ordered list of named components, and the SHA-256 over them.

Each component is hashed as its label, the payload's length in 8 bytes (big
endian) and the payload, so that no two lists of components give the same
stream. ``schema`` comes first: a change in what is keyed, or how, bumps it, and
``tests/keys/test_golden_keys.py`` sees to it that this is deliberate.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

from cuda_progcache.errors import ArchError, UncacheableError
from cuda_progcache.keys import options as opt
from cuda_progcache.keys.headers import NO_HEADERS, HeaderSet, SearchPath, may_include, time_macro
from cuda_progcache.keys.toolchain import ToolFile, toolchain

SCHEMA = "1"

CODE_TYPES = ("c++", "ptx", "nvvm")
TARGET_TYPES = {"c++": ("ptx", "cubin", "ltoir"), "ptx": ("cubin", "ptx"), "nvvm": ("ptx", "ltoir")}

_INCLUDE_PATH, _BUNDLED_HEADERS = "--include-path=", "--use-bundled-headers="


class Component(NamedTuple):
    """One thing that decides what comes out of a compile."""

    label: str
    payload: bytes

    @property
    def printable(self) -> str:
        """The payload as text; a long or binary one as its length and digest."""
        if len(self.payload) <= 400:
            try:
                return self.payload.decode().replace("\0", " ")
            except UnicodeDecodeError:
                return self.payload.hex()
        return f"{len(self.payload)} bytes, sha256:{sha256(self.payload, usedforsecurity=False).hexdigest()}"


def digest(components: Sequence[Component]) -> bytes:
    """SHA-256 over labelled, length-prefixed components (32 bytes)."""
    hasher = sha256(usedforsecurity=False)
    for label, payload in components:
        hasher.update(label.encode())
        hasher.update(len(payload).to_bytes(8, "big"))
        hasher.update(payload)
    return hasher.digest()


@dataclass(frozen=True)
class ProgramKey:
    """A key with everything that went into it.

    Attributes
    ----------
    digest : bytes
        The key itself, 32 bytes.
    components : tuple of Component
        In hashing order.
    headers : HeaderSet
        The headers among them.
    toolchain : tuple of ToolFile
        The compiler files among them.
    """

    digest: bytes
    components: tuple[Component, ...]
    headers: HeaderSet = NO_HEADERS
    toolchain: tuple[ToolFile, ...] = ()

    def printable(self) -> list[list[str]]:
        """``[[label, text], ...]`` for records and people."""
        return [[c.label, c.printable] for c in self.components]

    def explain(self, other: ProgramKey) -> list[str]:
        """What differs from another key, a sentence each; empty if the keys are equal."""
        from cuda_progcache.keys.explain import explain

        mine, theirs = ({h.name: h.digest for h in key.headers.headers} for key in (self, other))
        return explain(self.printable(), other.printable(), mine, theirs)


@dataclass(frozen=True, eq=False)
class Source:
    """A source, and what its text alone says; the costly questions are answered when they are asked.

    Attributes
    ----------
    code : bytes
        What the compiler reads.
    identity : bytes
        Its length and SHA-256.
    may_include : bool
        Whether it can read a header.
    """

    code: bytes
    identity: bytes
    may_include: bool

    @functools.cached_property
    def time_macro(self) -> str | None:
        """The macro in it that makes each compile's output its own (comments count)."""
        return time_macro(self.code)

    @functools.cached_property
    def mentions_file(self) -> bool:
        """Whether it has ``__FILE__``, which in a header that expands it is a path."""
        return b"__FILE__" in self.code


@functools.lru_cache(maxsize=64)
def _read_source(text: str | bytes) -> Source:
    """Read a source; remembered, since a program is compiled again as the same object and 200 kB take 0.1 ms."""
    code = text.encode() if isinstance(text, str) else text
    identity = f"{len(code)} bytes, sha256:{sha256(code, usedforsecurity=False).hexdigest()}".encode()
    return Source(code, identity, may_include(code))


NO_SOURCE = _read_source(b"")


class CompileInputs(NamedTuple):
    """The normalized inputs of one compile: what the compiler would get.

    ``flags`` are the compiler's own; ``include_dirs`` are taken out of them for the search of headers.
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

    @property
    def code(self) -> bytes:
        """What the compiler reads."""
        return self.source.code

    @property
    def unrepeatable(self) -> str | None:
        """Why two compiles of this can't be expected to give the same bytes; None if they can."""
        if self.code_type != "c++":
            return None
        macro = self.source.time_macro or next(
            (m for f in self.flags if "__" in f and (m := time_macro(f.encode()))), None
        )
        return f"the source uses {macro}: each compile's output is its own" if macro else None

    @property
    def reads_headers(self) -> bool:
        """Whether the compiler may open any header."""
        if self.code_type != "c++":
            return False
        return self.source.may_include or any(flag.startswith("--pre-include") for flag in self.flags)

    def search_path(self, cwd: str | None = None) -> SearchPath:
        """Where the compiler looks for headers."""
        return SearchPath.of(self.include_dirs, self.name, cwd if cwd is not None else os.getcwd())


def normalize(
    *,
    code: object,
    code_type: object,
    options: Any,
    target_type: object,
    name_expressions: Sequence[Any] = (),
    extra_digest: object = None,
) -> CompileInputs:
    """Check compile inputs and bring them to the form the compiler gets.

    Returns
    -------
    CompileInputs

    Raises
    ------
    ValueError
        For an unknown ``code_type`` or ``target_type``, a pair that no compiler makes, or options that don't go with
        the input.
    TypeError
        For code, name expressions or ``extra_digest`` of the wrong type.
    ArchError
        If ``options.arch`` isn't set.
    """
    code_type, target_type = _check_types(code_type, target_type)
    source = _source(code, code_type)
    if extra_digest is not None and (not isinstance(extra_digest, bytes) or not extra_digest):
        raise TypeError(f"extra_digest must be non-empty bytes or None, got {extra_digest!r}")
    if code_type != "nvvm" and getattr(options, "extra_sources", None) is not None:
        raise ValueError(f"extra_sources is for code_type='nvvm' only; code_type={code_type!r} has no such input")
    for expression in name_expressions if code_type == "c++" else ():  # no other compiler looks at them
        if not isinstance(expression, str | bytes):
            raise TypeError(f"name_expressions must be str or bytes, got {type(expression).__name__}")
    if not getattr(options, "arch", None):
        raise ArchError("no architecture: set ProgramOptions(arch='sm_90') or the like")
    flags = _flags(options, code_type, target_type)
    return CompileInputs(
        source,
        code_type,
        target_type,
        options,
        options.name if options.name is not None else opt.DEFAULT_NAME,
        options.arch,
        tuple(flags),
        tuple(flag[len(_INCLUDE_PATH) :] for flag in flags if flag.startswith(_INCLUDE_PATH)),
        tuple(name_expressions) if code_type == "c++" else (),
        extra_digest,
    )


def _check_types(code_type: object, target_type: object) -> tuple[str, str]:
    """Both in lower case, if there is a compiler that makes one of the other."""
    code_type, target_type = (kind.lower() if isinstance(kind, str) else kind for kind in (code_type, target_type))
    if not isinstance(code_type, str) or code_type not in CODE_TYPES:
        raise ValueError(f"code_type={code_type!r} is not valid (must be {_one_of(CODE_TYPES)})")
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
        return _read_source(code)
    if isinstance(code, bytes | bytearray):
        if code_type == "nvvm":
            return _read_source(bytes(code))
        raise TypeError(
            f"code must be str for code_type={code_type!r}, got {type(code).__name__} (bytes are for 'nvvm' only)"
        )
    raise TypeError(f"code must be str or bytes, got {type(code).__name__}")


def _flags(options: Any, code_type: str, target_type: str) -> list[str]:
    if code_type == "nvvm":
        return opt.nvvm_flags(options, target_type)
    if code_type == "ptx":
        flags = opt.linker_flags(options)
        return [*flags, "-ptx"] if target_type == "ptx" else flags
    flags = opt.nvrtc_flags(options)
    if target_type == "ltoir" and "--dlink-time-opt" not in flags:
        flags.append("--dlink-time-opt")  # without it NVRTC makes no LTO-IR at all
    return flags


def _one_of(values: Sequence[str]) -> str:
    *head, last = map(repr, values)
    return f"{', '.join(head)} or {last}" if head else last


@dataclass(frozen=True)
class BaseKey:
    """All of a key but the headers: what can be known without asking the compiler.

    Attributes
    ----------
    inputs : CompileInputs
    components : tuple of Component
    plain : bytes
        Digest of the components: the key, where there are no headers and no path reaches the output.
    toolchain : tuple of ToolFile
    cwd : str
        The working directory when the key was made.
    """

    inputs: CompileInputs
    components: tuple[Component, ...]
    plain: bytes
    toolchain: tuple[ToolFile, ...]
    cwd: str

    @property
    def manifest_id(self) -> str:
        """Names the header manifest (hex): the same for the same source, options and compiler, wherever they lie."""
        roots = Component("include_roots", str(len(self.inputs.include_dirs)).encode())
        return digest((*self.components, roots)).hex()

    @property
    def flight(self) -> str:
        """Names one compile while it is under way (hex): equal only where the same bytes come out, headers included."""
        here = [Component("cwd", os.fsencode(self.cwd))]
        here += [Component("include_path", os.fsencode(d)) for d in self.inputs.include_dirs]
        return digest((*self.components, *here)).hex()

    def with_headers(self, headers: HeaderSet, *, output: str | None = None) -> ProgramKey:
        """The key, given what the compiler reads.

        Parameters
        ----------
        headers : HeaderSet
            What a compile would read now.
        output : str, optional
            The target type that is kept in the end, where that isn't this compile's own: LTO-IR that is only linked
            into a cubin doesn't take its working directory there.
        """
        paths = self._paths_reach_output(headers, output or self.inputs.target_type)
        if not headers.headers and not paths:
            return ProgramKey(self.plain, self.components, headers, self.toolchain)
        components = list(self.components)
        if headers.headers:
            components.append(Component("headers", headers.identity.encode()))
        if paths:
            components.append(Component("cwd", os.fsencode(self.cwd)))
            components += [Component("include_path", os.fsencode(d)) for d in self.inputs.include_dirs]
        return ProgramKey(digest(components), tuple(components), headers, self.toolchain)

    def _paths_reach_output(self, headers: HeaderSet, output: str) -> bool:
        inputs = self.inputs
        if inputs.code_type != "c++":
            return False
        options = inputs.options
        return bool(
            output == "ltoir"
            or options.debug
            or options.lineinfo
            or headers.mentions_file
            or (bool(headers.headers) and inputs.source.mentions_file)
            or any("__FILE__" in flag for flag in inputs.flags)
        )


def base_key(inputs: CompileInputs) -> BaseKey:
    """Key everything but the headers.

    Raises
    ------
    UncacheableError
        (a ``ValueError``) for options that a hit couldn't honour; the message says why.
    ToolchainError
        If the compiler isn't installed.
    """
    options = inputs.options
    libdevice = inputs.code_type == "nvvm" and bool(getattr(options, "use_libdevice", None))
    extra_sources: tuple[tuple[str, bytes], ...] = ()
    if inputs.code_type == "nvvm" and options.extra_sources:
        extra_sources = tuple((n, s.encode() if isinstance(s, str) else bytes(s)) for n, s in options.extra_sources)
    tools = toolchain(inputs.code_type, libdevice=libdevice)
    components, plain = _components(inputs[:3], inputs.name, inputs.flags, opt.unknown_fields(options),
                                    inputs.name_expressions, extra_sources, inputs.extra_digest, tools)  # fmt: skip
    return BaseKey(inputs, components, plain, tools, os.getcwd())


@functools.lru_cache(maxsize=256)
def _components(
    what: tuple[Source, str, str],
    name: str,
    flags: tuple[str, ...],
    unknown_fields: tuple[tuple[str, str], ...],
    name_expressions: tuple[str | bytes, ...],
    extra_sources: tuple[tuple[str, bytes], ...],
    extra_digest: bytes | None,
    tools: tuple[ToolFile, ...],
) -> tuple[tuple[Component, ...], bytes]:
    """The components of a key but for its headers, and their digest; remembered, as programs are asked for again."""
    source, code_type, target_type = what
    if code_type == "c++":
        _refuse_uncacheable(flags, vouched=extra_digest is not None)
    components = [Component("schema", SCHEMA.encode())]
    components += [Component(f"tool {tool.name}", tool.identity.encode()) for tool in tools]
    components += [
        Component("code_type", code_type.encode()),
        Component("target_type", target_type.encode()),
        Component("name", name.encode()),
        Component("code", source.identity),
    ]
    for flag in flags:
        if flag.startswith(_BUNDLED_HEADERS):
            components.append(Component("option", _BUNDLED_HEADERS.rstrip("=").encode()))  # what lies there is keyed
        elif not flag.startswith(_INCLUDE_PATH):
            components.append(Component("option", flag.encode()))
    components += [Component(f"option {field}", value.encode()) for field, value in unknown_fields]
    tagged = (b"b:" + e if isinstance(e, bytes) else b"s:" + e.encode() for e in name_expressions)
    components += [Component("name_expression", tag) for tag in sorted(set(tagged))]
    for module_name, module in extra_sources:
        components += [Component("extra_source_name", module_name.encode()), Component("extra_source", module)]
    if extra_digest is not None:
        components.append(Component("extra_digest", extra_digest))
    return tuple(components), digest(components)


# A hit runs no compiler, so the files these write would not be written.
_SIDE_EFFECTS = ("--create-pch=", "--time=", "--fdevice-time-trace=")
# A precompiled header hides from the include trace which headers went into it.
_PRECOMPILED = ("--pch-dir=", "--use-pch=")


def _refuse_uncacheable(flags: tuple[str, ...], *, vouched: bool) -> None:
    if found := [flag for flag in flags if flag.startswith(_SIDE_EFFECTS)]:
        raise UncacheableError(
            f"a program with {' '.join(found)} can't be cached: such options write a file as a side effect, and a "
            f"cache hit compiles nothing, so the file would be missing. Unset them, or compile without cache=."
        )
    found = [flag for flag in flags if flag == "--pch" or flag.startswith(_PRECOMPILED)]
    if found and not vouched:
        raise UncacheableError(
            f"a program with {' '.join(found)} can't be keyed: the headers inside a precompiled header are not in the "
            f"include trace. Compile without it, or give extra_digest= over its content."
        )

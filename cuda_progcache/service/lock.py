# SPDX-License-Identifier: Apache-2.0
"""Lockfiles: lists of the programs that a deploy needs.

A lockfile is a JSON object with one program per line, so that a diff of two lockfiles shows which programs changed::

    {
    "format": 1,
    "toolchain": [
    {"name": "nvrtc", "build": "build-id:feebac3bea34..."},
    ...
    ],
    "programs": [
    {"kernel": "axpby", "parameters": {"dtype": "float16", ...}, "arch": "sm_90", "target": "cubin", "key": ...},
    ...
    ],
    "sources": {
    "e115c32167be...": [
    "#include <cub/block/block_reduce.cuh>",
    ...
    ]}
    }

The same programs give the same bytes. Library kernels come first, sorted by name, parameters, architecture and target;
programs from source follow, sorted by name. Empty fields are left out. ``toolchain`` lists the compiler files that made
the programs. ``sources`` has the text of programs from source, line by line. ``key`` is the entry's digest and
``sha256`` the digest of its bytes; a program that isn't compiled yet has neither.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.files import put_in_place
from cuda_progcache._util.json_values import json_value
from cuda_progcache.compile import recording
from cuda_progcache.errors import LockError, ProgCacheError
from cuda_progcache.keys.arch import Arch
from cuda_progcache.service.wanted import SourceProgram, Wanted

if TYPE_CHECKING:
    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.manifest import KernelLibrary

FORMAT = 1


class Locked(NamedTuple):
    """One program of a lockfile.

    Attributes
    ----------
    kernel : str
        The library kernel's name; empty for a program from source.
    parameters : mapping
        The kernel's parameters.
    name : str
        The name of a program from source; empty for a kernel.
    arch, target, code_type : str
    name_expressions : tuple of str
    fields : mapping or None
        The options of a program from source; None if they can't be stored in a lockfile.
    flags : tuple of str
        The compiler's flags, without include directories.
    source : str
        SHA-256 of the source.
    headers : str
        SHA-256 over the headers that were read; empty if there were none or they aren't known.
    key, sha256 : str
        The entry's digest and the SHA-256 of its bytes; empty if the program isn't compiled yet.
    """

    kernel: str = ""
    parameters: Mapping[str, Any] = {}
    name: str = ""
    arch: str = ""
    target: str = "cubin"
    code_type: str = "c++"
    name_expressions: tuple[str, ...] = ()
    fields: Mapping[str, Any] | None = None
    flags: tuple[str, ...] = ()
    source: str = ""
    headers: str = ""
    key: str = ""
    sha256: str = ""

    @property
    def identity(self) -> tuple[Any, ...]:
        """The program's identity, independent of the binary; programs are sorted by it."""
        arch = _arch_order(self.arch)
        if self.kernel:
            return (0, self.kernel, _json(self.parameters), arch, self.target, "")
        asked = (_json(self.fields), _json(self.name_expressions), self.source or self.key)
        return (1, self.name, self.code_type, arch, self.target, "\0".join(asked))

    def title(self) -> str:
        """Return a text for display: kernel, parameters, architecture, and the target if it isn't a cubin."""
        values = [f"{name}={value}" for name, value in self.parameters.items()]
        target = [] if self.target == "cubin" else [self.target]
        return " ".join([self.kernel or self.name, *values, self.arch, *target])

    def to_json(self) -> dict[str, Any]:
        """Return the program's line as a JSON object."""
        told: dict[str, Any] = {"kernel": self.kernel, "parameters": dict(self.parameters)} if self.kernel else {}
        if not self.kernel:
            told["name"] = self.name
        rest = {name: getattr(self, name) for name in self._fields[3:]}
        told |= {name: value for name, value in rest.items() if value or name == "fields"}
        if self.kernel or told["fields"] is None:
            told.pop("fields")
        return told

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Locked:
        """Return the program that :meth:`to_json` described; raises TypeError or ValueError for anything else."""
        tuples = {name: tuple(told[name]) for name in ("name_expressions", "flags") if name in told}
        found = cls(**{**told, **tuples})
        if not (found.kernel or found.name) or not found.arch:
            raise ValueError("a program needs a kernel or a name, and an arch")
        return found

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Locked:
        """Return the program on a line of a recording."""
        kernel = line["kernel"] or ""
        return cls(
            kernel,
            line["parameters"] or {},
            "" if kernel else line["name"],
            line["arch"],
            line["target"],
            line["code_type"],
            tuple(line["name_expressions"]),
            line["fields"],
            tuple(line["flags"]),
            (line["source"] or {}).get("sha256", ""),
            line["headers"] or "",
            line["key"] or "",
            line["sha256"] if line["key"] else "",
        )


class Lock(NamedTuple):
    """The programs that a deploy needs.

    Attributes
    ----------
    programs : tuple of Locked
        Sorted by identity.
    toolchain : tuple of (str, str)
        Names and identities of the compiler files that made the programs, sorted.
    sources : mapping of str to (str or bytes)
        Source texts by their SHA-256.
    """

    programs: tuple[Locked, ...]
    toolchain: tuple[tuple[str, str], ...] = ()
    sources: Mapping[str, str | bytes] = {}

    @classmethod
    def of_lines(cls, lines: Iterable[Mapping[str, Any]], more: Iterable[Locked] = ()) -> Lock:
        """Return a lock of recorded programs.

        Parameters
        ----------
        lines : iterable of mapping
            Lines as :func:`cuda_progcache.compile.recording.read` returns them. If a program has several, the last one
            counts.
        more : iterable of Locked
            Further programs; used if no line has them.
        """
        found = {program.identity: program for program in more}
        tools: set[tuple[str, str]] = set()
        sources: dict[str, str | bytes] = {}
        for line in lines:
            program = Locked.of_line(line)
            found[program.identity] = program
            tools |= {(tool["name"], tool["digest"]) for tool in line["toolchain"]}
            if not program.kernel and line["source"] and len(line["source"]) > 1:
                sources[program.source] = _source(line["source"])
        ordered = tuple(found[name] for name in sorted(found))
        return cls(ordered, tuple(sorted(tools)), {name: sources[name] for name in sorted(sources)})

    @property
    def keys(self) -> frozenset[str]:
        """The entries' digests of the compiled programs."""
        return frozenset(program.key for program in self.programs if program.key)

    @property
    def digest(self) -> str:
        """SHA-256 of the lockfile as :meth:`write` writes it; a tier stores the lockfile's pack under this name."""
        return sha256(self._data()).hexdigest()

    def _data(self) -> bytes:
        return self.text().encode("utf-8", "surrogatepass")

    def wanted(self, program: Locked) -> Wanted:
        """Return what to compile for one of the programs; ``unmakeable`` is set if the lockfile doesn't have it."""
        if program.kernel:
            return Wanted(program.kernel, dict(program.parameters), program.arch, program.target)
        about = (program.name, dict[str, Any](), program.arch, program.target)
        code = self.sources.get(program.source)
        if program.code_type == "link":
            why = f"{program.name} was linked from binaries that only the recorded run has"
        elif code is None or program.fields is None:
            what = "source" if code is None else "options"
            why = f"the {what} of {program.name} can't be stored in a lockfile: only the recorded run can compile it"
        else:
            source = SourceProgram(program.name, program.code_type, program.fields, program.name_expressions, code)
            return Wanted(*about, source)
        return Wanted(*about, None, program.key, why)

    def text(self) -> str:
        """Return the lockfile's text."""
        toolchain = [_json({"name": name, "build": build}) for name, build in self.toolchain]
        programs = [_json(program.to_json()) for program in self.programs]
        parts = ["{", f'"format": {FORMAT},', _list("toolchain", toolchain, ","), _list("programs", programs, ",")]
        sources = []
        for digest, code in self.sources.items():
            if isinstance(code, str):
                lines = ",\n".join(_json(line) for line in code.split("\n"))
                sources.append(f'"{digest}": [\n{lines}\n]')
            else:
                from base64 import b64encode

                sources.append(f'"{digest}": {_json({"base64": b64encode(code).decode("ascii")})}')
        parts += ['"sources": {' + "".join(("\n", ",\n".join(sources), "\n") if sources else ()) + "}", "}"]
        return "\n".join(parts) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the lockfile atomically, unless the file already has the same bytes (raises OSError)."""
        target, data = os.path.abspath(os.fspath(path)), self._data()
        try:
            with open(target, "rb") as file:
                if file.read() == data:
                    return
        except FileNotFoundError:
            pass
        put_in_place(target, data, staged=f"{target}.{os.getpid()}.tmp", mode=0o666)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Lock:
        """Read a lockfile.

        Raises
        ------
        LockError
            If the file isn't a lockfile, or has another format version.
        OSError
            If it can't be read.
        """
        with open(path, "rb") as file:
            data = file.read()
        try:
            told = json.loads(data.decode("utf-8", "surrogatepass"))
            known = told["format"]
            if known != FORMAT:
                raise LockError(f"{path} is a lockfile of format {known!r}, but this version reads format {FORMAT}")
            programs = tuple(Locked.from_json(program) for program in told["programs"])
            toolchain = tuple((tool["name"], tool["build"]) for tool in told["toolchain"])
            sources = {digest: _code(code) for digest, code in told["sources"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, LockError):
                raise
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise LockError(f"{path} is not a lockfile: {why}") from error
        return cls(programs, toolchain, sources)


def of_manifest(
    compiler: CachedCompiler, library: KernelLibrary, wanted: Sequence[Wanted]
) -> tuple[list[dict[str, Any]], list[Locked]]:
    """Return a library's programs: lines for those in the cache, and locked programs for those that aren't.

    Programs for architectures below the kernel's ``min_arch`` are left out.

    Raises
    ------
    ProgCacheError
        If a kernel can't be rendered.
    """
    from cuda_progcache.errors import ArchError
    from cuda_progcache.service.kernel_unit import KernelUnit, require_arch
    from cuda_progcache.service.wanted import Units

    units = Units(compiler, library)
    lines, others = [], []
    for one in wanted:
        try:
            require_arch(one.arch, library[one.kernel])
        except ArchError:
            continue
        unit = units.unit(one)
        if not isinstance(unit, KernelUnit):
            continue
        found = unit.look_up(compiler.cache)
        if found is None:
            kernel = unit.kernel
            code_type = unit.compiles[0].code_type
            others.append(Locked(kernel["name"], kernel["parameters"], "", one.arch, one.target, code_type))
        else:
            lines.append(recording.kernel_line(found, unit.kernel, unit.compiles))
    return lines, others


def _source(told: Mapping[str, str]) -> str | bytes:
    return told["text"] if "text" in told else _code(told)


def _code(told: Any) -> str | bytes:
    if isinstance(told, list):
        return "\n".join(told)
    from base64 import b64decode

    return b64decode(told["base64"], validate=True)


def _list(name: str, lines: Sequence[str], end: str) -> str:
    inner = "\n" + ",\n".join(lines) + "\n" if lines else ""
    return f'"{name}": [{inner}]{end}'


def _json(value: Any) -> str:
    # Escape characters that confuse terminals and diffs: control, line separator and bidirectional characters.
    text = json.dumps(json_value(value), ensure_ascii=False, allow_nan=False)
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


_UNSAFE = re.compile("[\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def _arch_order(arch: str) -> tuple[int, str]:
    try:
        return (Arch.parse(arch).capability, arch)
    except ProgCacheError:
        return (0, arch)

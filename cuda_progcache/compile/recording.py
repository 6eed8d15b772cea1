# SPDX-License-Identifier: Apache-2.0
"""Recordings of the programs of a run: one line per program, in a file to which any number of processes append.

``CUDA_PROGCACHE_RECORD=run.json`` records a whole run, :class:`record` a part of one. Each line is a JSON object:

============================ =======================================================================================
``format``                   1
``name``                     the program's name
``kernel``, ``parameters``   for a library kernel; otherwise null
``code_type``                ``c++``, ``ptx``, ``nvvm`` or ``link``
``target``, ``arch``         ``cubin``, ``ptx`` or ``ltoir``; an architecture such as ``sm_90``
``flags``                    the compiler's flags, without include directories
``name_expressions``         template instances
``fields``                   for a program from source: the ``ProgramOptions`` fields that aren't their defaults; null
                             if JSON can't represent them
``source``                   ``{"sha256"}`` of the source (several modules are joined by zero bytes); the first time
                             that a process writes a program from source, also its ``"text"``, or ``"base64"`` if it
                             isn't UTF-8
``key``                      the entry's digest; null if the program wasn't kept
``sha256``                   SHA-256 of the binary
``headers``                  SHA-256 over the names and digests of the headers that were read; null: none
``toolchain``                ``[{"name", "digest"}]``: the compiler's files
``outcome``                  ``hit`` or ``compiled``
``reason``                   why the program wasn't kept
============================ =======================================================================================

Each line is appended by one ``write``, so that it survives if its process is killed, and a truncated line damages no
other. A process writes each program once. In ``fields``, the directories of CUDA's and CCCL's headers are written as
``@cuda`` and ``@cccl``, since they differ between environments.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence

from cuda_progcache._util.digest import sha256
from cuda_progcache._util.json_values import json_value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.keys.inputs import CompileInputs

FORMAT = 1
VARIABLE = "CUDA_PROGCACHE_RECORD"
#: Header directories that are recorded by a symbolic name.
ROOTS = ("cuda", "cccl")

# As in _util.modes: for a variable that isn't set, os.environ takes 1 us, and this 30 ns.
_variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_raw: str | bytes = VARIABLE if os.name == "nt" else VARIABLE.encode()

_lock = threading.Lock()
_open: list[record] = []
#: The value of the variable, and the recording that it has started.
_asked: tuple[str, record | None] = ("", None)


class record:  # noqa: N801 - used as a function
    """Record every program that the current process compiles or gets from a cache while the block is open.

    Parameters
    ----------
    path : str or os.PathLike, optional
        The file to append to; created if missing. None: programs are only recorded in memory.

    Attributes
    ----------
    path : str or None
        The file's absolute path.
    programs : list of dict
        The lines that this object has recorded.

    Raises
    ------
    OSError
        If the file can't be written.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else os.path.abspath(os.fspath(path))
        self.programs: list[dict[str, Any]] = []
        self._seen: set[tuple[Any, ...]] = set()
        self._sources: set[str] = set()
        if self.path is not None:
            self._append(b"")

    def __enter__(self) -> Self:
        with _lock:
            _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _lock:
            _open[:] = [other for other in _open if other is not self]

    def take(self, line: Mapping[str, Any], source: bytes | None) -> None:
        """Record a program, unless it was recorded before; raises OSError if it can't be written."""
        import json

        told = dict(line)
        name = (line["key"], line["sha256"], line["name"], line["arch"], line["target"], str(line["parameters"]))
        with _lock:
            if name in self._seen:
                return
            self._seen.add(name)
            if source is not None:
                digest = line["source"]["sha256"]
                if digest not in self._sources:
                    self._sources.add(digest)
                    told["source"] = {"sha256": digest, **_text(source)}
            self.programs.append(told)
        if self.path is not None:
            # The leading line break separates it from another process's truncated line.
            self._append(b"\n" + json.dumps(told, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")

    def _append(self, data: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
        file = os.open(str(self.path), flags, 0o666)
        try:
            while data:
                data = data[os.write(file, data) :]
        finally:
            os.close(file)


def wanted() -> bool:
    """Whether a recording is active; checked at each use of a program."""
    return bool(_open) or _raw in _variables


def note(done: CompiledProgram, inputs: CompileInputs) -> None:
    """Record the use of a program that was compiled from source."""
    line = _line(
        done,
        code_type=inputs.code_type,
        flags=inputs.flags,
        name_expressions=inputs.name_expressions,
        fields=_fields(inputs.options),
        sources=[inputs.code],
    )
    _take(line, inputs.code)


def note_kernel(done: CompiledProgram, kernel: Mapping[str, Any], compiles: Sequence[CompileInputs]) -> None:
    """Record the use of a library kernel; see :func:`kernel_line`."""
    _take(kernel_line(done, kernel, compiles), None)


def note_link(done: CompiledProgram, flags: Sequence[str]) -> None:
    """Record the use of a program that was linked from binaries."""
    _take(_line(done, code_type="link", flags=flags), None)


def kernel_line(done: CompiledProgram, kernel: Mapping[str, Any], compiles: Sequence[CompileInputs]) -> dict[str, Any]:
    """Return the line for a library kernel.

    Parameters
    ----------
    done : CompiledProgram
    kernel : mapping
        The kernel's ``name`` and ``parameters``.
    compiles : sequence of CompileInputs
        The inputs of the kernel's compiles; several for a linked kernel.
    """
    return _line(
        done,
        kernel=kernel,
        code_type=compiles[0].code_type,
        flags=tuple(dict.fromkeys(flag for inputs in compiles for flag in inputs.flags)),
        name_expressions=tuple(dict.fromkeys(name for inputs in compiles for name in inputs.name_expressions)),
        sources=[inputs.code for inputs in compiles],
    )


def _line(
    done: CompiledProgram,
    *,
    kernel: Mapping[str, Any] | None = None,
    code_type: str,
    flags: Sequence[str],
    name_expressions: Sequence[str | bytes] = (),
    fields: Mapping[str, Any] | None = None,
    sources: Sequence[bytes] = (),
) -> dict[str, Any]:
    made = done.about
    headers = sorted((header.name, header.digest) for header in made.headers)
    return {
        "format": FORMAT,
        "name": done.name,
        "kernel": None if kernel is None else kernel["name"],
        "parameters": None if kernel is None else json_value(kernel["parameters"]),
        "code_type": code_type,
        "target": done.target_type,
        "arch": done.arch,
        "flags": _without_folders(flags),
        "name_expressions": [name if isinstance(name, str) else os.fsdecode(name) for name in name_expressions],
        "fields": fields,
        "source": {"sha256": sha256(b"\0".join(sources)).hexdigest()} if sources else None,
        "key": done.digest,
        "sha256": sha256(done.data).hexdigest(),
        "headers": sha256(repr(headers).encode()).hexdigest() if headers else None,
        "toolchain": [{field: told for field, told in tool._asdict().items() if told} for tool in made.toolchain],
        "outcome": "hit" if done.hit else "compiled",
        "reason": done.reason or (None if done.digest else "no cache was given"),
    }


def _take(line: Mapping[str, Any], source: bytes | None) -> None:
    for recording in (*_open, *_by_variable()):
        try:
            recording.take(line, source)
        except OSError as error:
            _warn(recording, error)


def _by_variable() -> tuple[record, ...]:
    """Return the recording that the environment variable requests, if any."""
    global _asked  # noqa: PLW0603 - read at each use, as modes are
    if _raw not in _variables:
        return ()
    path = os.environ[VARIABLE]
    if path != _asked[0]:
        made = None
        try:
            made = record(path) if path else None
        except OSError as error:
            _warn(path, error)
        _asked = (path, made)
    return () if _asked[1] is None else (_asked[1],)


def _warn(where: record | str, error: OSError) -> None:
    from cuda_progcache._util.warning import warn
    from cuda_progcache.errors import ProgCacheWarning

    path = where if isinstance(where, str) else where.path
    message = f"can't record programs in {path}: {error.strerror or error}; nothing else is affected"
    warn(message, ProgCacheWarning)


def _text(source: bytes) -> dict[str, str]:
    try:
        return {"text": source.decode("utf-8")}
    except UnicodeDecodeError:
        from base64 import b64encode

        return {"base64": b64encode(source).decode("ascii")}


def _without_folders(flags: Sequence[str]) -> list[str]:
    """Return flags without include directories, which differ between machines."""
    from cuda_progcache.keys.flags import INCLUDE_PATH, without

    return without(list(flags), INCLUDE_PATH)


def _fields(options: Any) -> dict[str, Any] | None:
    """Return the fields of options that aren't their defaults, as JSON values; None if JSON can't represent them."""
    from cuda_progcache.keys.options import ProgramOptions

    plain = vars(ProgramOptions())
    found = {
        name: value
        for name, value in vars(options).items()
        if not name.startswith("_") and name != "arch" and value is not None and value != plain.get(name)
    }
    if set(found) - set(plain) or not all(_is_plain(value) for value in found.values()):
        return None
    if folders := found.get("include_path"):
        found["include_path"] = [_named(folder) for folder in ([folders] if isinstance(folders, str) else folders)]
    return found


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return isinstance(value, str | int | float | bool)


def _named(folder: str) -> str:
    """Return a header directory's symbolic name, if it has one; below the working directory, its relative path."""
    from cuda_progcache.errors import ToolchainError
    from cuda_progcache.keys.toolchain import header_root

    path = os.path.abspath(folder)
    for name in ROOTS:
        try:
            if path == os.path.abspath(header_root(name)):
                return f"@{name}"
        except ToolchainError:
            continue
    here = os.getcwd()
    return os.path.relpath(path, here) if path.startswith(here + os.sep) else folder


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read a recording's programs, each once.

    Parameters
    ----------
    path : str or os.PathLike
        A file in which runs were recorded.

    Returns
    -------
    list of dict
        The lines, in order of their first appearance; for programs from source, with ``source["text"]`` or
        ``["base64"]``. ``outcome`` is ``compiled`` if any process has compiled the program.

    Raises
    ------
    RecordingError
        If the file isn't a recording, or has another format version.
    OSError
        If the file can't be read.
    """
    import json

    from cuda_progcache.errors import RecordingError

    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    found: dict[str, dict[str, Any]] = {}
    sources: dict[str, dict[str, Any]] = {}
    for raw in filter(None, text.split("\n")):
        try:
            line = json.loads(raw)
        except ValueError:  # truncated by a kill or a full disk
            continue
        if not isinstance(line, dict) or "sha256" not in line:
            continue
        if line.get("format") != FORMAT:
            raise RecordingError(f"{path} is a recording of format {line.get('format')!r}; this version reads {FORMAT}")
        source = line["source"]
        if source is not None and len(source) > 1:
            sources[source["sha256"]] = source
        name = json.dumps({key: value for key, value in line.items() if key not in {"outcome", "source"}})
        known = found.setdefault(name, line)
        if line["outcome"] == "compiled":
            known["outcome"] = "compiled"
    if not found and text.strip():
        raise RecordingError(
            f"{path} is not a recording: it contains no programs (CUDA_PROGCACHE_RECORD makes a recording)"
        )
    for line in found.values():
        if line["source"] is not None:
            line["source"] = sources.get(line["source"]["sha256"], line["source"])
    return list(found.values())

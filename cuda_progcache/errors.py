# SPDX-License-Identifier: Apache-2.0
"""The errors that this package raises, and the category of its warnings.

All errors derive from :class:`ProgCacheError`. Each also derives from the
built-in exception that a caller would expect (``ValueError`` for bad input,
``LookupError`` for failed lookups, ``OSError`` for storage), so that code
written for :mod:`cuda.core` or plain files keeps working.

A cache miss is never an error: lookups return ``None``. A problem that doesn't
affect the result, such as a program that was compiled but couldn't be kept, is
a :class:`ProgCacheWarning`.
"""

from __future__ import annotations

import sys

from cuda_progcache._util.fields import dataclass

TYPE_CHECKING = False  # importing typing takes 9 ms, as long as a complete hit in a new process
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any, Self, TypeVar

    _Error = TypeVar("_Error", bound="ProgCacheError")


class ProgCacheError(Exception):
    """Base class of every error raised by ``cuda_progcache``."""

    def __reduce__(self) -> tuple[object, ...]:
        made = OSError.__reduce__(self) if isinstance(self, OSError) else Exception.__reduce__(self)
        return (_again, (_home(type(self)), made[1]), self.__dict__)


class ProgCacheWarning(RuntimeWarning):
    """The cache has a problem, but the caller got the result; warned once per store and kind of problem."""


class StoreError(ProgCacheError, OSError):
    """An operation of a store failed (disk full, no permission, root removed).

    Its arguments are those of :class:`OSError`, ``(errno, message, path)``. As with OSError, the number selects the
    class: with ``EACCES`` the error is also a :class:`PermissionError`, with ``ENOENT`` a :class:`FileNotFoundError`,
    and so on.
    """

    def __new__(cls, *args: object) -> Self:
        """Create an instance of both this class and Python's class for the errno."""
        native = type(OSError(*args[:2]))
        return super().__new__(cls if issubclass(cls, native) else _also(cls, native), *args)


def _also(ours: type[_Error], other: type[Exception]) -> type[_Error]:
    """Return a subclass of ``ours`` that ``except other`` also catches; tracebacks show it as ``ours``."""
    both = _made.get((ours, other))
    if both is None:
        names = {name: getattr(ours, name) for name in ("__module__", "__qualname__", "__doc__")}
        both = _made[ours, other] = type(ours.__name__, (ours, other), {**names, "_other": other})
    return both


def _home(kind: type) -> type:
    """Return the importable class behind a class made by :func:`_also`, for pickle and copy."""
    return next(base for base in kind.__mro__ if "_other" not in vars(base))


def _again(kind: type[_Error], args: tuple[object, ...]) -> _Error:
    """Recreate an error from its pickle; arguments of its class beyond ``args`` are in the pickle's state."""
    return kind.__new__(kind, *args)


_made: dict[tuple[type, type], Any] = {}


def and_theirs(ours: type[_Error], module: str, name: str) -> type[_Error]:
    """Return a class that is caught by handlers for ``ours`` and by those for another library's error.

    Parameters
    ----------
    ours : type
        This package's error class.
    module, name : str
        Module and name of the other library's class. If the module isn't loaded, ``ours`` itself is returned.
    """
    theirs = getattr(sys.modules.get(module), name, None)
    return ours if theirs is None else _also(ours, theirs)


class ReadOnlyError(StoreError):
    """A read-only store was asked to write."""


class UnsafeRootError(StoreError):
    """Other users can write to the cache root, which isn't marked as shared, and could choose which code runs."""


class BundleError(ProgCacheError, ValueError):
    """A bundle file is truncated, altered or not a bundle; nothing was imported."""


class AmbiguousDigestError(ProgCacheError, LookupError):
    """A digest prefix matches more than one entry.

    Attributes
    ----------
    prefix : str
        The requested prefix.
    matches : tuple of str
        The matching digests.
    """

    def __init__(self, prefix: str, matches: Iterable[str]) -> None:
        self.prefix = prefix
        self.matches = tuple(matches)
        shown = ", ".join(m[: len(prefix) + 8] for m in self.matches[:5])
        more = f" and {len(self.matches) - 5} more" if len(self.matches) > 5 else ""
        super().__init__(f"digest prefix {prefix!r} matches {len(self.matches)} entries ({shown}{more}); add digits")


class UncacheableError(ProgCacheError, ValueError):
    """The compile inputs can't be keyed, as a hit could differ from a fresh compile; the message says which and why."""


class OptionError(ProgCacheError, ValueError, RuntimeError):
    """A compiler option has an invalid value or doesn't fit the input."""


class ModeError(ProgCacheError, ValueError):
    """An unknown cache mode was requested; the message lists the valid ones."""


class ConfigError(ProgCacheError, ValueError):
    """A setting or a configuration file is invalid; the message says which, and contains no secret."""


class FrozenMissError(ProgCacheError, LookupError):
    """A frozen cache doesn't contain the program; nothing was compiled.

    Attributes
    ----------
    name : str
        The program's name; empty if only its key is known.
    reasons : tuple of str
        The differences from the nearest program in the cache, one sentence each, as printed by ``explain``.
    command : str
        The command that would add the program.
    """

    def __init__(self, message: str, *, name: str = "", reasons: Iterable[str] = (), command: str = "") -> None:
        super().__init__(message)
        self.name = name
        self.reasons = tuple(reasons)
        self.command = command

    def with_options(self, options: str) -> FrozenMissError:
        """Return a copy of the error with more options in its command."""
        command = f"{self.command} {options}"
        message = str(self).removesuffix(self.command) + command
        return FrozenMissError(message, name=self.name, reasons=self.reasons, command=command)


class RecordingError(ProgCacheError, ValueError):
    """A file isn't a recording, or has a later format."""


class LockError(ProgCacheError, ValueError):
    """A file isn't a lockfile, has a later format, or contains an invalid value; the message says where."""


class ExportError(ProgCacheError, ValueError):
    """Programs can't be exported as requested; nothing was written."""


class ToolchainError(ProgCacheError, RuntimeError):
    """A compiler library, header package or tool is missing or can't be used; the message names what to install."""


@dataclass(frozen=True)
class Diagnostic:
    """One message of a compiler.

    Attributes
    ----------
    severity : str
        ``"error"``, ``"catastrophic error"``, ``"warning"``, ``"remark"``, ``"note"`` or ``"fatal"``.
    file : str
        The file as the compiler names it: the program's name, or a header.
    line : int
        Line in that file, from 1.
    message : str
        The message, in one line.
    code : str or None
        The diagnostic's number, as in ``-diag-suppress``.
    template : str or None
        The template that the line was rendered from.
    template_line : int or None
        The line in the template.
    rendered : str or None
        The rendered source line.
    """

    severity: str
    file: str
    line: int
    message: str
    code: str | None = None
    template: str | None = None
    template_line: int | None = None
    rendered: str | None = None

    def __str__(self) -> str:
        code = f" #{self.code}" if self.code else ""
        if self.template is None:
            return f"{self.file}:{self.line}: {self.severity}{code}: {self.message}"
        text = f"{self.template}:{self.template_line}: {self.severity}{code}: {self.message}"
        shown = (self.rendered or "").strip()
        where = "" if self.file == self.template else f" {self.file}:{self.line}"
        return f"{text}\n    rendered as{where}:  {shown}" if shown else text


class CompileError(ProgCacheError):
    """The compiler rejected the program.

    If ``cuda.core`` is loaded, the raised instance also derives from the error that ``cuda.core`` raises for the
    compiler (``cuda.core._utils.cuda_utils.NVRTCError``, ``nvJitLinkError`` or ``nvvmError`` of ``cuda.bindings``), so
    that handlers written for ``cuda.core.Program`` catch it.

    Attributes
    ----------
    name : str
        The program's name (the kernel's, for library kernels).
    code_type, target_type : str
        The kind of source, and the kind of binary it was compiled to.
    options : tuple of str
        The flags passed to the compiler.
    log : str
        The compiler's log, verbatim.
    diagnostics : tuple of Diagnostic
        The log, parsed; each with the template's file and line where known.
    """

    def __init__(
        self,
        message: str,
        *,
        name: str = "",
        code_type: str = "",
        target_type: str = "",
        options: Iterable[str] = (),
        log: str = "",
        diagnostics: Iterable[Diagnostic] = (),
    ) -> None:
        Exception.__init__(self, message)  # not super(): the compilers' own classes take a status
        self.name = name
        self.code_type = code_type
        self.target_type = target_type
        self.options = tuple(options)
        self.log = log
        self.diagnostics = tuple(diagnostics)


class TemplateError(ProgCacheError):
    """A kernel template could not be rendered.

    Attributes
    ----------
    template : str
        The template's name.
    line : int or None
        The line in the template, from 1.
    """

    def __init__(self, message: str, *, template: str = "", line: int | None = None) -> None:
        super().__init__(message)
        self.template = template
        self.line = line


class ManifestError(ProgCacheError, ValueError):
    """A kernel library's ``manifest.toml`` is missing or wrong; the message names file, kernel and field."""


class KernelNotFoundError(ProgCacheError, LookupError):
    """The library has no such kernel; the message names the nearest one."""


class ParameterError(ProgCacheError, ValueError):
    """A kernel parameter is unknown, of the wrong type or out of range; the message names the nearest valid one."""


class ArchError(ProgCacheError, ValueError):
    """An architecture is missing, misspelled or not supported by the compiler; the message lists the supported ones."""


class UnsupportedArchError(ArchError, CompileError):
    """The compiler rejected an architecture; both an :class:`ArchError` and a :class:`CompileError`."""


class UnsupportedCodeTypeError(ProgCacheError, RuntimeError, ValueError):
    """No available compiler supports the code type."""


class ClosedProgramError(ProgCacheError, RuntimeError):
    """The program or linker has been closed."""


class WorkerDiedError(ProgCacheError, RuntimeError):
    """A worker process died during a job."""


class InspectError(ProgCacheError, RuntimeError):
    """A binary can't be inspected: it is corrupt or of an unsupported kind or architecture, or a tool is missing."""

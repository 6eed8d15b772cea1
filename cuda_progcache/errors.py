# SPDX-License-Identifier: Apache-2.0
"""Every error this package raises, and the category of its warnings.

All errors are :class:`ProgCacheError`. Each also derives from the built-in
exception a caller would expect in its place (``ValueError`` for bad input,
``KeyError``-like lookups as ``LookupError``, ``OSError`` for storage), so that
code written against :mod:`cuda.core` or plain files keeps working.

A cache miss is never an error: lookups return ``None``. Trouble that costs no
result, a program that was compiled and couldn't be kept, is a
:class:`ProgCacheWarning`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes 9 ms, as long as a cached kernel takes in all
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from cuda_progcache.compile.diagnostics import Diagnostic


class ProgCacheError(Exception):
    """Base class of every error raised by ``cuda_progcache``."""


class ProgCacheWarning(RuntimeWarning):
    """The cache is in trouble, and the caller has the result all the same; said once per store and kind of trouble."""


class StoreError(ProgCacheError, OSError):
    """The store could not do what it was asked through its mapping API (disk full, permission, vanished root).

    Made as an :class:`OSError` is, ``(errno, message, path)``. As there, the number decides about the class: with
    ``EACCES`` the error is a :class:`PermissionError`, too, with ``ENOENT`` a :class:`FileNotFoundError`, and so on.
    """

    def __new__(cls, *args: object) -> Self:
        """Make an instance of the class that Python has for this errno and of this one."""
        native = type(OSError(*args[:2]))
        kind: type[Self] = cls if issubclass(cls, native) else _also(cls, native)  # type: ignore[assignment]
        return super().__new__(kind, *args)

    def __reduce__(self) -> tuple[object, ...]:
        # The class made for an errno can't be found by its name: pickle and copy go through the one that can.
        home = next(base for base in type(self).__mro__ if "_native" not in vars(base))
        return (home, *super().__reduce__()[1:])


_made: dict[tuple[type[StoreError], type[OSError]], type[StoreError]] = {}


def _also(cls: type[StoreError], native: type[OSError]) -> type[StoreError]:
    """``cls`` that ``except native`` catches as well; it looks like ``cls`` in tracebacks."""
    if (cls, native) not in _made:
        names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
        _made[cls, native] = type(cls.__name__, (cls, native), {**names, "_native": native})
    return _made[cls, native]


class ReadOnlyError(StoreError):
    """A write was asked of a store that only reads."""


class UnsafeRootError(StoreError):
    """The cache root can be written by others and isn't marked as shared: whoever writes there chooses what runs."""


class BundleError(ProgCacheError, ValueError):
    """A bundle file is truncated, altered, or no bundle at all; nothing of it was imported."""


class AmbiguousDigestError(ProgCacheError, LookupError):
    """A digest prefix fits more than one entry.

    Attributes
    ----------
    prefix : str
        What was asked for.
    matches : tuple of str
        The digests that fit.
    """

    def __init__(self, prefix: str, matches: Iterable[str]) -> None:
        self.prefix = prefix
        self.matches = tuple(matches)
        shown = ", ".join(m[: len(prefix) + 8] for m in self.matches[:5])
        more = f" and {len(self.matches) - 5} more" if len(self.matches) > 5 else ""
        super().__init__(f"digest prefix {prefix!r} fits {len(self.matches)} entries ({shown}{more}); give more digits")


class UncacheableError(ProgCacheError, ValueError):
    """These compile inputs can't be keyed: a hit could differ from a fresh compile. The message says which and why."""


class OptionError(ProgCacheError, ValueError, RuntimeError):
    """A compiler option has a value, or goes with an input, that the compiler can't take."""


class ToolchainError(ProgCacheError, RuntimeError):
    """A compiler library, header package or tool is missing or can't be used; the message names what to install."""


class CompileError(ProgCacheError):
    """The compiler refused the program.

    Where ``cuda.core`` is loaded, the raised instance is also what it raises for that compiler
    (``cuda.core._utils.cuda_utils.NVRTCError``, ``nvJitLinkError`` or ``nvvmError`` of ``cuda.bindings``), so that
    handlers written for ``cuda.core.Program`` still see it.

    Attributes
    ----------
    name : str
        The program's name (the kernel's, for library kernels).
    code_type, target_type : str
        What was compiled, to what.
    options : tuple of str
        The flags the compiler was given.
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
        Exception.__init__(self, message)  # not a sibling's: the compilers' own classes take a status
        self.name = name
        self.code_type = code_type
        self.target_type = target_type
        self.options = tuple(options)
        self.log = log
        self.diagnostics = tuple(diagnostics)

    def __reduce__(self) -> tuple[object, ...]:
        # Compile errors cross process borders in prewarm; the dynamic NVRTCError subclass can't be pickled by name.
        home = UnsupportedArchError if isinstance(self, UnsupportedArchError) else CompileError
        return (_rebuild_compile_error, (home, str(self), dict(self.__dict__)))


def _rebuild_compile_error(home: type[CompileError], message: str, attributes: dict[str, object]) -> CompileError:
    error = home(message)
    error.__dict__.update(attributes)
    return error


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
    """No such kernel in the library; the message names the nearest one."""


class ParameterError(ProgCacheError, ValueError):
    """A kernel parameter is unknown, of the wrong type or out of range; the message names the nearest valid one."""


class ArchError(ProgCacheError, ValueError):
    """An architecture is missing, misspelled or not supported by this compiler; the message lists what is."""


class UnsupportedArchError(ArchError, CompileError):
    """The compiler refused an architecture: an :class:`ArchError`, and what any other refusal is."""


class UnsupportedCodeTypeError(ProgCacheError, RuntimeError, ValueError):
    """No compiler here takes this code type."""


class ClosedProgramError(ProgCacheError, RuntimeError):
    """The program, or the linker, was closed."""


class WorkerDiedError(ProgCacheError, RuntimeError):
    """A worker process ended in the middle of a job."""


class InspectError(ProgCacheError, RuntimeError):
    """A binary could not be inspected (cuobjdump or nvdisasm missing, or not applicable to this target type)."""

# SPDX-License-Identifier: Apache-2.0
"""``Program``: the functions of ``cuda.core.Program``, with a cache that accepts every program."""

from __future__ import annotations

from collections.abc import Iterable

from cuda_progcache.compile import recording
from cuda_progcache.compile.arch import with_arch
from cuda_progcache.compile.pipeline import obtain
from cuda_progcache.errors import ClosedProgramError, OptionError, UnsupportedCodeTypeError
from cuda_progcache.keys.headers import CHECK_EACH_TIME, HeaderPolicy
from cuda_progcache.keys.inputs import CODE_TYPES, TARGET_TYPES, normalize
from cuda_progcache.keys.options import ProgramOptions, as_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from cuda.core import ObjectCode

    from cuda_progcache.compile.compiled import CompiledProgram

    class LogWriter(Protocol):
        """Anything with ``write(str)``."""

        def write(self, text: str, /) -> object:
            """Write text."""


_BACKENDS = {"c++": "NVRTC", "ptx": "nvJitLink", "nvvm": "NVVM"}


class Program:
    """A program to compile: a drop-in for :class:`cuda.core.Program`.

    Parameters
    ----------
    code : str, bytes or bytearray
        The source; bytes for ``code_type="nvvm"`` only.
    code_type : {"c++", "ptx", "nvvm"}
        In any case.
    options : ProgramOptions or mapping, optional
        Ours or ``cuda.core``'s, or a mapping of its fields.
    header_policy : HeaderPolicy
        How strictly headers are checked.

    Raises
    ------
    TypeError
        For code or options of the wrong type.
    ValueError
        For ``extra_sources`` with another code type than NVVM.
    RuntimeError
        For an unknown ``code_type``.

    Notes
    -----
    Creating a program loads no library. The compiler's own program object is created for each actual compile.
    """

    def __init__(
        self,
        code: str | bytes | bytearray,
        code_type: str,
        options: Any = None,
        *,
        header_policy: HeaderPolicy = CHECK_EACH_TIME,
    ) -> None:
        self._options = as_options(options, ProgramOptions)
        self._header_policy = header_policy
        kind = str(code_type).lower()
        if kind not in CODE_TYPES:
            raise UnsupportedCodeTypeError(f"Unsupported code_type={kind!r} (supported_code_types={CODE_TYPES!r})")
        if kind != "nvvm":
            if not isinstance(code, str):
                raise TypeError(f"Expected type str, but got {type(code).__name__}")
            if self._options.extra_sources is not None:
                backend = "NVRTC" if kind == "c++" else "PTX"
                raise ValueError(f"extra_sources is not supported by the {backend} backend: it is for code_type='nvvm'")
        elif not isinstance(code, str | bytes | bytearray):
            raise TypeError(f"NVVM IR code must be provided as str, bytes, or bytearray, got {type(code).__name__}")
        self._code = code
        self._code_type = kind
        self._closed = False
        self._peer: Any = None
        self._pch_status: str | None = None

    def compile(
        self,
        target_type: str,
        name_expressions: Iterable[str | bytes] | None = (),
        logs: LogWriter | None = None,
        *,
        cache: Any = None,
    ) -> ObjectCode:
        """Compile, or return the binary from a cache.

        Parameters
        ----------
        target_type : {"ptx", "cubin", "ltoir"}
            In any case.
        name_expressions : iterable of str or bytes, optional
            Template instances to make; ``ObjectCode.get_kernel`` finds them by these names, also on a hit.
        logs : object with ``write``, optional
            Receives the compiler's log; on a hit, the log of the compile that made the entry.
        cache : ProgramCacheResource, optional
            One of our stores, or ``cuda.core``'s.

        Returns
        -------
        cuda.core.ObjectCode

        Warns
        -----
        RuntimeWarning
            If there is a CUDA driver that is too old to load the requested PTX; also on a hit.

        Raises
        ------
        CompileError
            If the compiler refuses the program.
        ValueError
            For a target that this code type doesn't compile to; with ``cache``, for options that write a file
            (``create_pch``, ``time``, ``fdevice_time_trace``), which a hit wouldn't write.
        ArchError
            If no architecture was given and there is no device; if the compiler doesn't know it; or for a virtual one
            (``compute_90``) if a cubin is requested.
        """
        return self.compiled(target_type, name_expressions, logs, cache=cache).to_object_code()

    def compiled(
        self,
        target_type: str,
        name_expressions: Iterable[str | bytes] | None = (),
        logs: LogWriter | None = None,
        *,
        cache: Any = None,
    ) -> CompiledProgram:
        """Compile as :meth:`compile` does, without importing ``cuda.core``; return the bytes, hit flag and record."""
        if self._closed:
            raise ClosedProgramError("Program has been closed")
        known = TARGET_TYPES[self._code_type]
        if target_type not in known and str(target_type).lower() not in known:
            supported = ", ".join(repr(t) for t in known)
            raise ValueError(
                f'Unsupported target_type="{target_type}" for {_BACKENDS[self._code_type]} (supported: {supported})'
            )
        inputs = normalize(
            code=self._code,
            code_type=self._code_type,
            options=with_arch(self._options),
            target_type=target_type,
            name_expressions=name_expressions,
            header_policy=self._header_policy,
        )
        done = obtain(inputs, cache)
        if recording.wanted():
            recording.note(done, inputs)
        self._pch_status = None if done.hit else done.about.pch_status  # programs with a status can't be cached
        if logs is not None and done.log:
            logs.write(done.log)
        if done.target_type == "ptx":
            from cuda_progcache.compile.driver import warn_of_older_driver

            warn_of_older_driver(done.data)
        return done

    def close(self) -> None:
        """Close the program; a later :meth:`compile` raises RuntimeError."""
        self._closed = True
        if self._peer is not None:
            self._peer.close()

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def backend(self) -> str:
        """The compiler library: ``"NVRTC"``, ``"NVVM"`` or ``"nvJitLink"``.

        It is a ``cuda.core.typing.CompilerBackendType``.
        """
        return _member("CompilerBackendType", _BACKENDS[self._code_type])

    @property
    def pch_status(self) -> str | None:
        """The status of the precompiled header in the latest compile, a ``cuda.core.typing.PCHStatusType``.

        None if there was no compile, or no precompiled header was requested.
        """
        return None if self._pch_status is None else _member("PCHStatusType", self._pch_status)

    @property
    def handle(self) -> Any:
        """A handle of the compiler library for this source; ``cuda.core`` creates it on demand."""
        if self._peer is None:
            from cuda.core import Program as Peer
            from cuda.core import ProgramOptions as PeerOptions

            given = with_arch(self._options)
            fields = {name: value for name, value in vars(given).items() if not name.startswith("_")}
            if fields.pop("extra_flags", None):
                raise OptionError("the handle is made by cuda.core's Program, which takes no extra_flags")
            self._peer = Peer(self._code, self._code_type, PeerOptions(**fields))
            if self._closed:
                self._peer.close()  # then its handle is null
        return self._peer.handle

    def __repr__(self) -> str:
        return f"<Program backend='{_BACKENDS[self._code_type]}'>"


def _member(enumeration: str, value: str) -> str:
    """Return a member of a string enumeration in ``cuda.core.typing``; the string itself if there is no such member."""
    try:
        from cuda.core import typing as names

        member: str = getattr(names, enumeration)(value)
    except (ImportError, AttributeError, ValueError):  # another version of cuda.core
        return value
    return member

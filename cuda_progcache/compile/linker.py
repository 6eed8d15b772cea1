# SPDX-License-Identifier: Apache-2.0
"""``link`` and ``Linker``: the functions of ``cuda.core.Linker``, with a cache."""

from __future__ import annotations

from collections.abc import Iterable

from cuda_progcache._util.fields import replace
from cuda_progcache.compile import recording
from cuda_progcache.compile.arch import is_arch, with_arch
from cuda_progcache.compile.compiled import CompiledProgram
from cuda_progcache.compile.linking import NOTHING_TO_LINK, LinkInput, obtain_linked, unknown_arch
from cuda_progcache.errors import ClosedProgramError, CompileError, OptionError
from cuda_progcache.keys.flags import facts
from cuda_progcache.keys.options import LinkerOptions, as_options, linker_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda.core import ObjectCode


def link(
    inputs: Iterable[Any],
    options: Any = None,
    target_type: str = "cubin",
    *,
    cache: Any = None,
) -> CompiledProgram:
    """Link binaries with nvJitLink, through the cache.

    Parameters
    ----------
    inputs : iterable
        In link order: ``CompiledProgram``, ``cuda.core.ObjectCode`` (if it names a file, the file is read), or
        ``(bytes, target_type)`` pairs.
    options : LinkerOptions or mapping, optional
        Ours or ``cuda.core``'s, or a mapping of its fields. If any input is LTO-IR, ``link_time_optimization`` is
        enabled unless it is set.
    target_type : {"cubin", "ptx"}
        In any case.
    cache : ProgramCacheResource, optional
        The key contains the content of the inputs, the flags and the linker.

    Returns
    -------
    CompiledProgram

    Raises
    ------
    CompileError
        If the linker refuses the inputs.
    TypeError
        For an input that isn't a binary, for options or a cache of the wrong type.
    OptionError
        For an empty list, or a target that nvJitLink doesn't support.
    ArchError
        As for :meth:`Program.compile`.
    """
    ready = [_input(item, index) for index, item in enumerate(inputs)]
    return _linked(ready, as_options(options, LinkerOptions), target_type, cache)


def _linked(ready: list[LinkInput], options: Any, target_type: str, cache: Any) -> CompiledProgram:
    target = target_type.lower() if hasattr(target_type, "lower") else target_type
    options = with_arch(options)
    lto = target == "ptx" or any(item.target_type == "ltoir" for item in ready)
    if lto and options.link_time_optimization is None and "lto" not in facts(tuple(linker_flags(options))).names:
        options = replace(options, link_time_optimization=True)
    done = obtain_linked(ready, options, target, cache)
    if recording.wanted():
        recording.note_link(done, linker_flags(options))
    return done


def _input(item: Any, index: int) -> LinkInput:
    if isinstance(item, CompiledProgram):
        return LinkInput(item.name, item.target_type, item.data, item.digest)
    is_pair = isinstance(item, tuple) and len(item) == 2 and not isinstance(item[0], str)
    code, kind = item if is_pair else (getattr(item, field, None) for field in ("code", "code_type"))
    if isinstance(code, str) and isinstance(kind, str):  # an ObjectCode backed by a file
        with open(code, "rb") as file:
            code = file.read()
    if not isinstance(code, bytes | bytearray | memoryview) or not isinstance(kind, str):
        raise TypeError(
            f"input {index} can't be linked: expected CompiledProgram, ObjectCode or (bytes, target_type), got "
            f"{type(item).__name__}"
        )
    return LinkInput(getattr(item, "name", "") or f"input {index}", kind.lower(), bytes(code))


class Linker:
    """Binaries to link: a drop-in for :class:`cuda.core.Linker`.

    Parameters
    ----------
    *object_codes : cuda.core.ObjectCode or CompiledProgram
        At least one, in link order. If one names a file, the file is read now.
    options : LinkerOptions or mapping, optional
        Ours or ``cuda.core``'s, or a mapping of its fields.

    Raises
    ------
    ValueError
        If there is nothing to link.
    TypeError
        For an input or options of the wrong type.
    ArchError
        For an invalid architecture in the options.

    Notes
    -----
    Creating a linker loads no library: nvJitLink is called only when something must be linked.
    """

    def __init__(self, *object_codes: Any, options: Any = None) -> None:
        if not object_codes:
            raise OptionError(NOTHING_TO_LINK)
        self._object_codes = object_codes
        self._inputs = [_input(item, index) for index, item in enumerate(object_codes)]
        self._options = as_options(options, LinkerOptions)
        if self._options.arch is not None and not is_arch(self._options.arch):
            raise unknown_arch(self._options)
        self._logs = {"info": "", "error": ""}
        self._closed = False
        self._peer: Any = None

    def link(self, target_type: str, *, cache: Any = None) -> ObjectCode:
        """Link, or return the binary from a cache.

        Parameters
        ----------
        target_type : {"cubin", "ptx"}
            In any case.
        cache : ProgramCacheResource, optional
            As for :func:`link`.

        Returns
        -------
        cuda.core.ObjectCode
            Its name is the one in the options.

        Raises
        ------
        CompileError
            If the linker refuses the inputs; :meth:`get_error_log` then returns its log.
        OptionError
            For a target that nvJitLink doesn't support.
        ArchError
            As for :meth:`Program.compile`.
        ClosedProgramError
            If the linker was closed.
        """
        if self._closed:
            raise ClosedProgramError("Linker has been closed")
        try:
            made = _linked(self._inputs, self._options, target_type, cache)
        except CompileError as error:
            self._logs = {"info": "", "error": error.log}
            raise
        self._logs = {"info": made.log, "error": ""}
        return made.to_object_code()

    def get_error_log(self) -> str:
        """Return the log of the latest link if the linker refused it; otherwise empty."""
        return self._logs["error"]

    def get_info_log(self) -> str:
        """Return the log of the latest link if it succeeded; on a hit, the log of the link that made the entry."""
        return self._logs["info"]

    def close(self) -> None:
        """Close the linker; a later :meth:`link` raises RuntimeError."""
        self._closed = True
        if self._peer is not None:
            self._peer.close()

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    @property
    def handle(self) -> Any:
        """A handle of the linker library for these inputs; ``cuda.core`` creates it on demand."""
        if self._peer is None:
            from cuda.core import Linker as Peer
            from cuda.core import LinkerOptions as PeerOptions

            fields = dict(vars(with_arch(self._options)))
            if fields.pop("extra_flags", None):
                raise OptionError("the handle is made by cuda.core's Linker, which takes no extra_flags")
            codes = [c.to_object_code() if isinstance(c, CompiledProgram) else c for c in self._object_codes]
            self._peer = Peer(*codes, options=PeerOptions(**fields))
            if self._closed:
                self._peer.close()  # then its handle is null
        return self._peer.handle

    @classmethod
    def which_backend(cls) -> Any:
        """Return the linker library that ``cuda.core`` would use: ``"nvJitLink"`` or ``"driver"``."""
        from cuda.core import Linker as Peer

        return Peer.which_backend()

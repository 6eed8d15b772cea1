# SPDX-License-Identifier: Apache-2.0
"""The inputs of a linker, and the results of a compiler: an output or a refusal."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from cuda_progcache._util.fields import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from cuda_progcache.keys.includes import Trace

    class Label(Protocol):
        """The description of a compile or a link in records, events and :class:`CompiledProgram`."""

        @property
        def name(self) -> str:
            """The program's name."""

        @property
        def code_type(self) -> str:
            """The type of its source; ``"link"`` for a link."""

        @property
        def target_type(self) -> str:
            """The type of its output: cubin, PTX or LTO-IR."""

        @property
        def arch(self) -> str:
            """The architecture of its output."""

        @property
        def name_expressions(self) -> tuple[str | bytes, ...]:
            """The requested template instances."""


class Output(NamedTuple):
    """A compiler's output.

    Attributes
    ----------
    data : bytes
        The binary; empty if only the front end ran.
    log : str
        Warnings and remarks, verbatim.
    symbols : mapping
        Name expression to mangled name.
    trace : list of (int, str) or None
        The headers that were opened; None if the compiler doesn't report them.
    pch_status : str or None
        ``"created"``, ``"not_attempted"`` or ``"failed"``; None if no precompiled header was requested.
    unkept : str or None
        Why this can't be kept: other options or libraries may have affected it.
    """

    data: bytes
    log: str
    symbols: Mapping[str | bytes, bytes] = MappingProxyType({})
    trace: Trace | None = None
    pch_status: str | None = None
    unkept: str | None = None


class LinkerInput(NamedTuple):
    """An input of a linker: its bytes, their type, and the name for diagnostics."""

    data: bytes
    target_type: str
    name: str


class CompilerRefusal(Exception):  # noqa: N818 - internal: always turned into a CompileError
    """A compiler's status and log, verbatim, and the include trace of a compile that had one."""

    def __init__(self, status: str, log: str, trace: Trace | None = None) -> None:
        super().__init__(status, log)
        self.status = status
        self.log = log
        self.trace = trace

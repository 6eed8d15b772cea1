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
        """What records, events and :class:`CompiledProgram` say of a compile or a link."""

        @property
        def name(self) -> str:
            """The program's name."""

        @property
        def code_type(self) -> str:
            """What it was made of; ``"link"`` of a link."""

        @property
        def target_type(self) -> str:
            """What it is: cubin, PTX or LTO-IR."""

        @property
        def arch(self) -> str:
            """What it is for."""

        @property
        def name_expressions(self) -> tuple[str | bytes, ...]:
            """What was asked to be instantiated."""


class Output(NamedTuple):
    """What a compiler made.

    Attributes
    ----------
    data : bytes
        The binary; empty where only the front end ran.
    log : str
        Warnings and remarks, verbatim.
    symbols : mapping
        Name expression to mangled name.
    trace : list of (int, str) or None
        The headers that were opened; None where the compiler doesn't tell.
    pch_status : str or None
        ``"created"``, ``"not_attempted"`` or ``"failed"``; None where no precompiled header was asked for.
    unkept : str or None
        Why this may not be the work of this compiler and these options alone, so that it can't be kept.
    """

    data: bytes
    log: str
    symbols: Mapping[str | bytes, bytes] = MappingProxyType({})
    trace: Trace | None = None
    pch_status: str | None = None
    unkept: str | None = None


class LinkerInput(NamedTuple):
    """One thing to link: its bytes, what they are, and the name that diagnostics use."""

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

# SPDX-License-Identifier: Apache-2.0
"""The result of a compile: a binary and its record."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from cuda_progcache._util.fields import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self, TypeAlias

    from cuda.core import ObjectCode

    from cuda_progcache.inspect import Occupancy
    from cuda_progcache.store.compile_record import CompileRecord

    Recorder: TypeAlias = Callable[["CompiledProgram", str, Callable[[], Any]], Any]


@dataclass(frozen=True)
class CompiledProgram:
    """A binary and the record of how it was made.

    Attributes
    ----------
    data : bytes
        The binary: cubin, PTX or LTO-IR.
    target_type : str
        The binary's type: ``"cubin"``, ``"ptx"`` or ``"ltoir"``.
    name : str
        The program's name.
    arch : str
        The architecture it was compiled for.
    symbol_mapping : dict
        Name expression (as given, str or bytes) to mangled name (bytes).
    log : str
        The compiler's warnings and remarks, verbatim; replayed on a hit.
    record : mapping
        The record that was published with the entry. It is read at the first access to it or to the log.
    about : CompileRecord
        The record, with typed fields.
    hit : bool
        Whether the program came from the cache.
    digest : str or None
        The digest of the entry in the cache (64 hex digits); None if it wasn't stored.
    reason : str or None
        Why the program wasn't stored; None if it was.
    """

    data: bytes = field(repr=False)
    target_type: str
    name: str
    arch: str
    symbol_mapping: Mapping[str | bytes, bytes]
    log: str = field(repr=False)
    record: Mapping[str, Any] = field(repr=False)
    hit: bool
    digest: str | None
    reason: str | None

    def __init__(
        self,
        data: bytes,
        target_type: str,
        name: str,
        arch: str,
        symbol_mapping: Mapping[str | bytes, bytes] | None = None,
        log: str = "",
        record: Mapping[str, Any] | Callable[[], Mapping[str, Any]] | None = None,
        *,
        hit: bool = False,
        digest: str | None = None,
        reason: str | None = None,
    ) -> None:
        # In one update: setting each field, as a frozen dataclass does, takes 2 of the 25 µs of a hit.
        self.__dict__.update(
            data=data,
            target_type=target_type,
            name=name,
            arch=arch,
            symbol_mapping={} if symbol_mapping is None else symbol_mapping,
            hit=hit,
            digest=digest,
            reason=reason,
        )
        if callable(record):
            self.__dict__["_read"] = record
        else:
            self.__dict__.update(log=log, record={} if record is None else record)

    def __getattr__(self, name: str) -> Any:
        # Called for missing attributes: the record and its log, before they are read.
        if name not in {"log", "record"} or "_read" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        record = self._read()
        self.__dict__["record"] = record
        self.__dict__["log"] = self.about.log
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "log": self.log, "record": self.record}
        state.pop("_read", None)
        state.pop("_recorder", None)
        return state

    def analyse_with(self, recorder: Recorder) -> Self:
        """Make :meth:`resource_usage` and :meth:`sass` call ``recorder(program, name, analyse)``."""
        self.__dict__["_recorder"] = recorder
        return self

    def _analysed(self, name: str, analyse: Callable[[], Any]) -> Any:
        recorder: Recorder | None = self.__dict__.get("_recorder")
        return analyse() if recorder is None else recorder(self, name, analyse)

    @property
    def about(self) -> CompileRecord:
        """The record, with typed fields."""
        from cuda_progcache.store.compile_record import CompileRecord  # most hits don't need it

        return CompileRecord(self.record)

    @property
    def code(self) -> bytes:
        """:attr:`data`, under its name in ``ObjectCode``."""
        return self.data

    @property
    def code_type(self) -> str:
        """:attr:`target_type`, under its name in ``ObjectCode``."""
        return self.target_type

    def to_object_code(self) -> ObjectCode:
        """Return a ``cuda.core.ObjectCode`` of the binary.

        This imports cuda.core. A driver is only needed to load the binary.
        """
        make = _object_code_makers()[self.target_type]
        return make(self.data, name=self.name, symbol_mapping=dict(self.symbol_mapping))

    def resource_usage(self) -> dict[str, dict[str, int | None]]:
        """Return registers, spills, memory (bytes), barriers and largest block of each kernel, as in ``ptxas -v``.

        The fields are those of :class:`cuda_progcache.inspect.Resources`; None means unknown. They are read from the
        cubin without running a tool. For a service's program, this is a recorded call.

        Raises
        ------
        InspectError
            If the program isn't a cubin.
        """
        from cuda_progcache.inspect import resource_record

        usage: dict[str, dict[str, int | None]] = self._analysed("resource_usage", lambda: resource_record(self.data))
        return usage

    def occupancy(self, block_size: int, dynamic_shared_bytes: int = 0) -> dict[str, Occupancy]:
        """Return how many blocks and warps of each kernel run on a multiprocessor at once, and what limits them.

        Parameters
        ----------
        block_size : int
            Threads per block.
        dynamic_shared_bytes : int
            Dynamic shared memory per block, in addition to the static shared memory.

        Raises
        ------
        InspectError
            If the program isn't a cubin, the architecture isn't known, or a figure is out of range.
        """
        from cuda_progcache.inspect import Cubin, occupancy, resource_usage

        arch = Cubin(self.data).arch
        return {
            name: occupancy(used, arch, block_size, dynamic_shared_bytes)
            for name, used in resource_usage(self.data).items()
        }

    def sass(self) -> str:
        """Return nvdisasm's disassembly. For a service's program, this is a recorded call.

        Raises
        ------
        InspectError
            If nvdisasm isn't installed or the program isn't a cubin.
        """
        from cuda_progcache.inspect import sass

        listing: str = self._analysed("sass", lambda: sass(self.data))
        return listing


@functools.cache
def _object_code_makers() -> dict[str, Any]:
    from cuda.core import ObjectCode

    return {"cubin": ObjectCode.from_cubin, "ptx": ObjectCode.from_ptx, "ltoir": ObjectCode.from_ltoir}

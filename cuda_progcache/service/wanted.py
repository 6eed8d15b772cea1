# SPDX-License-Identifier: Apache-2.0
"""Programs that are to be in a cache, as a manifest or a lockfile names them, and how each is made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.compile.lookup import digest_here
from cuda_progcache.compile.manifests import fetch_manifests
from cuda_progcache.compile.pipeline import find, obtain
from cuda_progcache.compile.policy import PLAIN, MissPolicy
from cuda_progcache.compile.recording import ROOTS
from cuda_progcache.errors import LockError, ProgCacheError
from cuda_progcache.keys.headers import Holds, holds, looking_once
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.options import ProgramOptions
from cuda_progcache.keys.schema import base_key
from cuda_progcache.keys.toolchain import header_root

if TYPE_CHECKING:
    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.keys.inputs import CompileInputs
    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.kernel_unit import KernelUnit
    from cuda_progcache.service.lock import Lock
    from cuda_progcache.service.manifest import KernelLibrary, RenderedKernel
    from cuda_progcache.store.base import EntryInfo


class SourceProgram(NamedTuple):
    """A program that isn't a library's, with all that it is compiled from but its headers.

    Attributes
    ----------
    name, code_type : str
    fields : mapping
        Of its ``ProgramOptions``, as :mod:`~cuda_progcache.compile.recording` writes them.
    name_expressions : tuple of str
    code : str or bytes
    """

    name: str
    code_type: str
    fields: Mapping[str, Any]
    name_expressions: tuple[str, ...]
    code: str | bytes


class Wanted(NamedTuple):
    """A program that is to be in a cache.

    Attributes
    ----------
    kernel : str
        The library's kernel; of a program from source its name.
    variant : dict
        The kernel's parameters.
    arch, target : str
    source : SourceProgram or None
        Where it isn't a library's.
    key : str
        The entry's digest, of a program of which no more is known.
    unmakeable : str
        Why it can't be made here then; empty: it can.
    """

    kernel: str
    variant: dict[str, Any]
    arch: str
    target: str = "cubin"
    source: SourceProgram | None = None
    key: str = ""
    unmakeable: str = ""

    def message(self) -> dict[str, Any]:
        """As JSON, for another process; :meth:`of_message` reads it."""
        told: dict[str, Any] = {"kernel": self.kernel, "variant": self.variant, "arch": self.arch}
        if self.target != "cubin":
            told["target"] = self.target
        if self.source is not None:
            code = self.source.code
            plain = code if isinstance(code, str) else code.decode("latin-1")
            told["source"] = {**self.source._asdict(), "code": plain, "bytes": isinstance(code, bytes)}
        return told

    @classmethod
    def of_message(cls, told: Mapping[str, Any]) -> Wanted:
        """What :meth:`message` gave."""
        source = None
        if (said := told.get("source")) is not None:
            code = said["code"].encode("latin-1") if said["bytes"] else said["code"]
            expressions = tuple(said["name_expressions"])
            source = SourceProgram(said["name"], said["code_type"], said["fields"], expressions, code)
        return cls(told["kernel"], told["variant"], told["arch"], told.get("target", "cubin"), source)


class SourceUnit:
    """A program from source on its way to a binary; what :class:`~.kernel_unit.KernelUnit` is to a kernel.

    Parameters
    ----------
    program : SourceProgram
    arch, target_type : str
    include_path : sequence of str
        Folders in which headers are looked for, before the program's own.

    Raises
    ------
    ArchError, ValueError, TypeError
        As a compile of it.
    """

    def __init__(self, program: SourceProgram, arch: str, target_type: str, include_path: Sequence[str] = ()) -> None:
        fields = {name: _tuples(value) for name, value in program.fields.items()}
        own = [_place(folder) for folder in fields.get("include_path") or ()]
        if include_path or own:
            fields["include_path"] = [*include_path, *own]
        self.arch, self.target_type = arch, target_type
        self.inputs: CompileInputs = normalize(
            code=program.code,
            code_type=program.code_type,
            options=ProgramOptions(**{**fields, "arch": arch}),
            target_type=target_type,
            name_expressions=program.name_expressions,
        )
        self.compiles = (self.inputs,)

    def obtain(self, cache: Any, policy: MissPolicy = PLAIN) -> CompiledProgram:
        """Take it from the cache, or compile and publish it."""
        return obtain(self.inputs, cache, policy=policy)

    def digest_here(self, cache: Any, holds: Holds = holds) -> bytes | None:
        """As that of :class:`~.kernel_unit.KernelUnit`."""
        return digest_here(base_key(self.inputs), cache, holds)

    def look_up(self, cache: Any, holds: Holds = holds) -> CompiledProgram | None:
        """Take it from the cache; None if it would have to be compiled."""
        return find(self.inputs, cache, holds)


@dataclass(frozen=True)
class Job:
    """One program that isn't there yet.

    Attributes
    ----------
    index : int
        Its place in the report.
    wanted : Wanted
    unit : KernelUnit or SourceUnit
    """

    index: int
    wanted: Wanted
    unit: KernelUnit | SourceUnit


class Units:
    """Makes units of what is wanted, for one call; a kernel's variant is rendered once for all architectures.

    Parameters
    ----------
    compiler : CachedCompiler
    library : KernelLibrary
        Whose kernels they are.
    """

    def __init__(self, compiler: CachedCompiler, library: KernelLibrary) -> None:
        self._compiler = compiler
        self._library = library
        self._known: tuple[tuple[str, str], RenderedKernel | Exception] | None = None
        self._holds: Holds = holds

    def unit(self, wanted: Wanted) -> KernelUnit | SourceUnit:
        """The unit of a program.

        Raises
        ------
        ProgCacheError, ValueError
            The library has no such kernel, or it can't be rendered so, or not be compiled for that architecture.
        """
        if wanted.unmakeable:
            raise LockError(wanted.unmakeable)
        if wanted.source is not None:
            return SourceUnit(wanted.source, wanted.arch, wanted.target, self._compiler.include_path)
        return self._compiler.unit(self._rendered(wanted), wanted.arch, wanted.target)

    @property
    def reach_beyond(self) -> bool:
        """Whether a part of the compiler's cache lies beyond this machine, and can be copied here."""
        return self._compiler.mode == "rw" and getattr(self._compiler.cache, "reaches_beyond", False)

    def fetch_pack(self, lock: Lock | None) -> None:
        """Fetch a lockfile's pack from a tier if many of its programs are missing here."""
        if lock is not None and self.reach_beyond:
            from cuda_progcache.store.tiers.packs import fetch_pack

            fetch_pack(self._compiler.cache, lambda: lock.digest, lock.keys)

    def fetch(self, units: Iterable[KernelUnit | SourceUnit]) -> None:
        """Fetch what the tiers have of these, together rather than one by one.

        Their headers are looked at now; :meth:`look_up` doesn't look again. What can't be keyed is left out: its own
        look-up tells why.
        """
        self._holds = looking_once()
        cache = self._compiler.cache
        units = list(units)
        bases = []
        for inputs in {id(inputs): inputs for unit in units for inputs in unit.compiles}.values():
            with contextlib.suppress(ProgCacheError, ValueError):
                if inputs.reads_headers:
                    bases.append(base_key(inputs))
        fetch_manifests(bases, cache, self._holds)
        keys = []
        for unit in units:
            with contextlib.suppress(ProgCacheError, ValueError):
                if (key := unit.digest_here(cache, self._holds)) is not None:
                    keys.append(key)
        cache.fetch(keys)

    def look_up(
        self, wanted: Wanted, unit: KernelUnit | SourceUnit | None = None
    ) -> tuple[CompiledProgram | EntryInfo | None, KernelUnit | SourceUnit | None]:
        """The program in the compiler's cache, or None, and its unit, which would make it (raises as :meth:`unit`)."""
        cache = self._compiler.cache
        if wanted.unmakeable:
            try:
                return cache.info(wanted.key), None
            except KeyError:
                raise LockError(f"it is not in the cache, and {wanted.unmakeable}") from None
        unit = unit or self.unit(wanted)
        return unit.look_up(cache, self._holds), unit

    def rules_out(self, wanted: Wanted) -> bool:
        """Whether a kernel's manifest rules out the architecture."""
        from cuda_progcache.errors import ArchError
        from cuda_progcache.service.kernel_unit import require_arch

        if wanted.source is not None or wanted.unmakeable or wanted.kernel not in self._library:
            return False
        try:
            self._rendered(wanted)
            require_arch(wanted.arch, self._library[wanted.kernel])
        except ArchError:
            return True
        except Exception:  # noqa: BLE001 - another trouble
            return False
        return False

    def _rendered(self, wanted: Wanted) -> RenderedKernel:
        name = (wanted.kernel, repr(wanted.variant))
        if self._known is None or self._known[0] != name:
            rendered: RenderedKernel | Exception
            try:
                rendered = self._library.render(wanted.kernel, **self._typed(wanted))
            except Exception as error:  # noqa: BLE001 - raised below, for each architecture
                rendered = error
            self._known = (name, rendered)
        found = self._known[1]
        if isinstance(found, Exception):
            raise found
        return found

    def _typed(self, wanted: Wanted) -> dict[str, Any]:
        """The parameters as they were before JSON, which has no infinities."""
        declared = self._library[wanted.kernel].parameters
        return {
            name: float(value)
            if isinstance(value, str) and name in declared and declared[name].type == "float"
            else value
            for name, value in wanted.variant.items()
        }


def of_manifest(library: KernelLibrary, archs: Iterable[str], kernels: Iterable[str] | None = None) -> list[Wanted]:
    """The variants that a library lists, for each architecture.

    Raises
    ------
    KernelNotFoundError
        One of ``kernels`` isn't there.
    """
    specs = list(library) if kernels is None else [library[name] for name in dict.fromkeys(kernels)]
    archs = tuple(dict.fromkeys(archs))
    return [
        Wanted(spec.name, dict(variant), arch) for spec in specs for variant in spec.variants or ({},) for arch in archs
    ]


def _place(folder: str) -> str:
    """Where a recorded include directory is here."""
    if folder.startswith("@"):
        if folder[1:] not in ROOTS:
            raise LockError(f"{folder} names no header directory: there are @{', @'.join(ROOTS)}")
        return header_root(folder[1:])
    return os.path.normpath(folder) if os.path.isabs(folder) else folder


def _tuples(value: Any) -> Any:
    """JSON's lists as the tuples that options have inside lists (``define_macro``)."""
    if isinstance(value, list):
        return [tuple(part) if isinstance(part, list) else part for part in value]
    return value

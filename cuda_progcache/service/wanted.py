# SPDX-License-Identifier: Apache-2.0
"""The programs that a manifest or a lockfile asks for, and the units that compile them."""

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
    """A program from source rather than a library, with all its compile inputs except the headers.

    Attributes
    ----------
    name, code_type : str
    fields : mapping
        The fields of its ``ProgramOptions``, as :mod:`~cuda_progcache.compile.recording` writes them.
    name_expressions : tuple of str
    code : str or bytes
    """

    name: str
    code_type: str
    fields: Mapping[str, Any]
    name_expressions: tuple[str, ...]
    code: str | bytes


class Wanted(NamedTuple):
    """A program that should be in a cache.

    Attributes
    ----------
    kernel : str
        The name of the library kernel, or of the program from source.
    variant : dict
        The kernel's parameters.
    arch, target : str
    source : SourceProgram or None
        The program from source; None for a library kernel.
    key : str
        The entry's digest, if the program can't be compiled from what is known of it; otherwise empty.
    unmakeable : str
        Why the program can't be compiled; empty if it can.
    """

    kernel: str
    variant: dict[str, Any]
    arch: str
    target: str = "cubin"
    source: SourceProgram | None = None
    key: str = ""
    unmakeable: str = ""

    def message(self) -> dict[str, Any]:
        """Return the program as JSON types, for another process; :meth:`of_message` reads it."""
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
        """Return the program that :meth:`message` described."""
        source = None
        if (said := told.get("source")) is not None:
            code = said["code"].encode("latin-1") if said["bytes"] else said["code"]
            expressions = tuple(said["name_expressions"])
            source = SourceProgram(said["name"], said["code_type"], said["fields"], expressions, code)
        return cls(told["kernel"], told["variant"], told["arch"], told.get("target", "cubin"), source)


class SourceUnit:
    """The compile unit of a program from source, the counterpart of :class:`~.kernel_unit.KernelUnit`.

    Parameters
    ----------
    program : SourceProgram
    arch, target_type : str
    include_path : sequence of str
        Folders to search for headers before the program's own.

    Raises
    ------
    ArchError, ValueError, TypeError
        If the inputs are invalid, as for a compile.
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
        """Return the program from the cache, or compile and store it."""
        return obtain(self.inputs, cache, policy=policy)

    def digest_here(self, cache: Any, holds: Holds = holds) -> bytes | None:
        """Return the key; None if the headers the program reads aren't known on this machine."""
        return digest_here(base_key(self.inputs), cache, holds)

    def look_up(self, cache: Any, holds: Holds = holds) -> CompiledProgram | None:
        """Return the program from the cache; None if it would have to be compiled."""
        return find(self.inputs, cache, holds)


@dataclass(frozen=True)
class Job:
    """A program that isn't in the cache yet.

    Attributes
    ----------
    index : int
        Its position in the report.
    wanted : Wanted
    unit : KernelUnit or SourceUnit
    """

    index: int
    wanted: Wanted
    unit: KernelUnit | SourceUnit


class Units:
    """The units of wanted programs; a variant is rendered once for consecutive architectures.

    Parameters
    ----------
    compiler : CachedCompiler
    library : KernelLibrary
        The library of the kernels.
    """

    def __init__(self, compiler: CachedCompiler, library: KernelLibrary) -> None:
        self._compiler = compiler
        self._library = library
        self._known: tuple[tuple[str, str], RenderedKernel | Exception] | None = None
        self._holds: Holds = holds

    def unit(self, wanted: Wanted) -> KernelUnit | SourceUnit:
        """Return the unit of a program.

        Raises
        ------
        ProgCacheError, ValueError
            If the library has no such kernel, or the program can't be rendered with these parameters or compiled for
            the architecture.
        """
        if wanted.unmakeable:
            raise LockError(wanted.unmakeable)
        if wanted.source is not None:
            return SourceUnit(wanted.source, wanted.arch, wanted.target, self._compiler.include_path)
        return self._compiler.unit(self._rendered(wanted), wanted.arch, wanted.target)

    @property
    def reach_beyond(self) -> bool:
        """Whether the compiler's cache has remote tiers to fetch entries from."""
        return self._compiler.mode == "rw" and getattr(self._compiler.cache, "reaches_beyond", False)

    def fetch_pack(self, lock: Lock | None) -> None:
        """Fetch a lockfile's pack from a tier if many of its programs are missing on this machine."""
        if lock is not None and self.reach_beyond:
            from cuda_progcache.store.tiers.packs import fetch_pack

            fetch_pack(self._compiler.cache, lambda: lock.digest, lock.keys)

    def fetch(self, units: Iterable[KernelUnit | SourceUnit]) -> None:
        """Fetch the units' entries from the tiers in one batch.

        The headers are checked now, and :meth:`look_up` doesn't check them again. Units that can't be keyed are left
        out; their own lookup reports why.
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
        """Return the cached program, or None, and the unit that would compile it (raises as :meth:`unit`)."""
        cache = self._compiler.cache
        if wanted.unmakeable:
            try:
                return cache.info(wanted.key), None
            except KeyError:
                raise LockError(f"it isn't in the cache and can't be compiled: {wanted.unmakeable}") from None
        unit = unit or self.unit(wanted)
        return unit.look_up(cache, self._holds), unit

    def rules_out(self, wanted: Wanted) -> bool:
        """Return whether the architecture is below the kernel's ``min_arch``."""
        from cuda_progcache.errors import ArchError
        from cuda_progcache.service.kernel_unit import require_arch

        if wanted.source is not None or wanted.unmakeable or wanted.kernel not in self._library:
            return False
        try:
            self._rendered(wanted)
            require_arch(wanted.arch, self._library[wanted.kernel])
        except ArchError:
            return True
        except Exception:  # noqa: BLE001 - not about the architecture
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
        """Return the parameters with floats restored that JSON holds as text, such as infinities."""
        declared = self._library[wanted.kernel].parameters
        return {
            name: float(value)
            if isinstance(value, str) and name in declared and declared[name].type == "float"
            else value
            for name, value in wanted.variant.items()
        }


def of_manifest(library: KernelLibrary, archs: Iterable[str], kernels: Iterable[str] | None = None) -> list[Wanted]:
    """Return the variants that a library lists, for each architecture.

    Raises
    ------
    KernelNotFoundError
        If one of ``kernels`` doesn't exist.
    """
    specs = list(library) if kernels is None else [library[name] for name in dict.fromkeys(kernels)]
    archs = tuple(dict.fromkeys(archs))
    return [
        Wanted(spec.name, dict(variant), arch) for spec in specs for variant in spec.variants or ({},) for arch in archs
    ]


def _place(folder: str) -> str:
    """Return the current machine's path of a recorded include directory."""
    if folder.startswith("@"):
        if folder[1:] not in ROOTS:
            raise LockError(f"unknown header directory {folder}; the known ones are @{', @'.join(ROOTS)}")
        return header_root(folder[1:])
    return os.path.normpath(folder) if os.path.isabs(folder) else folder


def _tuples(value: Any) -> Any:
    """Convert lists inside a JSON list to tuples, as options have them (``define_macro``)."""
    if isinstance(value, list):
        return [tuple(part) if isinstance(part, list) else part for part in value]
    return value

# SPDX-License-Identifier: Apache-2.0
"""Proofs that a cache has all programs that a deploy needs, made by looking them up as a frozen run would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache._util.json_values import json_value
from cuda_progcache.compile import recording
from cuda_progcache.compile.history import is_new
from cuda_progcache.errors import FrozenMissError, LockError
from cuda_progcache.service.kernel_unit import KernelUnit
from cuda_progcache.service.lock import Lock, Locked
from cuda_progcache.service.wanted import Units, Wanted
from cuda_progcache.service.worker import trouble

if TYPE_CHECKING:
    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.service.cached_compiler import CachedCompiler
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.service.wanted import SourceUnit
    from cuda_progcache.store.compile_record import CompileRecord


class Proved(NamedTuple):
    """The result of looking up one program.

    Attributes
    ----------
    title : str
        Kernel, parameters, architecture and target.
    kernel, arch, target : str
    parameters : mapping
    status : {"hit", "missing", "stale", "failed", "skipped"}
        ``"missing"``: the cache has no such program for its architecture. ``"stale"``: the cache has a similar program
        with another key, or a program whose key isn't the locked one. ``"failed"``: the program can't be looked up.
        ``"skipped"``: its kernel needs a later architecture.
    reasons : tuple of str
        Why it isn't a hit, in the words of a frozen run.
    command : str
        The command that would fix it.
    digest : str or None
        The digest of the entry that was found.
    """

    title: str
    kernel: str
    arch: str
    target: str
    parameters: Any
    status: str
    reasons: tuple[str, ...] = ()
    command: str = ""
    digest: str | None = None


class Unused(NamedTuple):
    """An entry that no program of the proof needs."""

    digest: str
    name: str
    arch: str
    target: str
    size: int


class Proof(NamedTuple):
    """The result of looking up all programs that are needed.

    Attributes
    ----------
    programs : tuple of Proved
        In the order in which they were asked for.
    unused : tuple of Unused
        Entries that belong to none of the programs and that none is linked from. They do no harm.
    """

    programs: tuple[Proved, ...]
    unused: tuple[Unused, ...] = ()

    def count(self, status: str) -> int:
        """Return the number of programs with a status."""
        return sum(program.status == status for program in self.programs)

    @property
    def ok(self) -> bool:
        """Whether the cache has all programs that are needed."""
        return all(program.status in {"hit", "skipped"} for program in self.programs)

    def to_dict(self) -> dict[str, Any]:
        """Return the proof as JSON types."""
        counts = {status: self.count(status) for status in ("hit", "missing", "stale", "failed", "skipped")}
        return {
            "ok": self.ok,
            "counts": {**counts, "unused": len(self.unused)},
            "programs": [json_value(program._asdict()) for program in self.programs],
            "unused": [entry._asdict() for entry in self.unused],
        }


def prove(compiler: CachedCompiler, library: KernelLibrary, asked: Lock | Sequence[Wanted], options: str = "") -> Proof:
    """Look up all programs in a cache without compiling; see :meth:`CompileService.check`.

    ``options`` are the command-line options that select the library and its headers.
    """
    frozen = compiler.frozen()
    units = Units(frozen, library)
    pairs: Iterable[tuple[Wanted, Locked | None]]
    if isinstance(asked, Lock):
        pairs = ((asked.wanted(program), program) for program in asked.programs)
    else:
        pairs = ((wanted, None) for wanted in asked)
    proved = []
    used: set[str | None] = set()
    for wanted, locked in pairs:
        found, about = _prove_one(frozen, units, wanted, locked)
        if found.command.startswith("CUDA_PROGCACHE=rw ") and options:
            found = found._replace(command=f"{found.command} {options}")
        proved.append(found)
        used.add(found.digest)
        used |= set() if about is None else {part.digest for part in about.inputs}
    return Proof(tuple(proved), tuple(_unused(compiler.cache, used)))


def _prove_one(
    frozen: CachedCompiler, units: Units, wanted: Wanted, locked: Locked | None
) -> tuple[Proved, CompileRecord | None]:
    """Look up one program; return the result and the record of the entry found."""
    title = locked or Locked(wanted.kernel, wanted.variant, "", wanted.arch, wanted.target)
    about = Proved(title.title(), wanted.kernel, wanted.arch, wanted.target, wanted.variant, "hit")
    try:
        if wanted.unmakeable:
            there, _ = units.look_up(wanted)
            return about._replace(digest=wanted.key), None if there is None else there.about
        if units.rules_out(wanted):
            return about._replace(status="skipped", reasons=("the kernel needs a later architecture",)), None
        unit = units.unit(wanted)
        done = frozen.compile_kernel(unit)
    except FrozenMissError as miss:
        status = "missing" if is_new(miss.reasons) else "stale"
        return about._replace(status=status, reasons=miss.reasons, command=miss.command), None
    except LockError as error:
        return about._replace(
            status="missing", reasons=(str(error),), command="run the recorded program again with CUDA_PROGCACHE=rw"
        ), None
    except Exception as error:  # noqa: BLE001 - a program that fails doesn't end the proof
        return about._replace(status="failed", reasons=(trouble(error),)), None
    if locked is not None and locked.key and done.digest != locked.key:
        reasons = _differing(locked, done, unit)
        return about._replace(status="stale", reasons=reasons, command="lock again", digest=done.digest), done.about
    return about._replace(digest=done.digest), done.about


def _differing(locked: Locked, done: CompiledProgram, unit: KernelUnit | SourceUnit) -> tuple[str, ...]:
    """Return how a program in the cache differs from the locked program, as far as the lockfile shows."""
    kernel = unit.kernel if isinstance(unit, KernelUnit) else {"name": "", "parameters": {}}
    now = Locked.of_line({**recording.kernel_line(done, kernel, unit.compiles), "fields": None})
    found = []
    if now.flags != locked.flags:
        before, after = set(locked.flags), set(now.flags)
        told = [*(f"{flag} is new" for flag in now.flags if flag not in before)]
        told += [f"{flag} is gone" for flag in locked.flags if flag not in after]
        found.append(f"options differ from the locked ones: {', '.join(told) or 'their order'}")
    if now.source != locked.source:
        found.append("the source differs from the locked one")
    if now.headers != locked.headers:
        found.append("headers differ from the locked ones")
    return tuple(found) or ("the compiler's build, or a path in the output, differs from the locked one",)


def _unused(cache: Any, used: set[str | None]) -> Iterable[Unused]:
    for digest in sorted(set(cache.digests()) - used):
        try:
            entry = cache.info(digest)
        except (KeyError, OSError):
            continue  # removed meanwhile
        about = entry.about
        yield Unused(digest, about.title, about.arch, about.target_type, entry.size)

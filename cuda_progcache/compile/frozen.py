# SPDX-License-Identifier: Apache-2.0
"""Errors for programs that a frozen cache doesn't have: why they would be compiled, and how to fix that.

No compiler is loaded, so the headers of a program are known only if an earlier compile has read them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cuda_progcache import events
from cuda_progcache.compile import history
from cuda_progcache.compile.manifests import headers_before
from cuda_progcache.compile.toolchains import without_compiler
from cuda_progcache.errors import FrozenMissError
from cuda_progcache.keys.headers import NO_HEADERS, as_now
from cuda_progcache.keys.schema import base_key
from cuda_progcache.keys.tool_versions import as_recorded
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.compile_record import CompileRecord

if TYPE_CHECKING:
    from typing import Protocol

    from cuda_progcache.keys.inputs import CompileInputs
    from cuda_progcache.keys.schema import BaseKey

    class Step(Protocol):
        """A compile or a link."""

        @property
        def name(self) -> str:
            """The program's name."""

        @property
        def target_type(self) -> str:
            """The type of its output."""

        @property
        def arch(self) -> str | None:
            """The architecture of its output."""


_SHADOWED = "a file that would be read is gone, or another file shadows it"


def missed(base: BaseKey, cache: Any, kernel: Mapping[str, Any] | None) -> FrozenMissError:
    """Return the error for a missing program.

    Parameters
    ----------
    base : BaseKey
    cache : store
        A result of :func:`~cuda_progcache.store.in_mode.in_mode`.
    kernel : mapping, optional
        As for :func:`~cuda_progcache.compile.pipeline.obtain`.
    """
    inputs = base.inputs
    before = headers_before(base, cache) if inputs.reads_headers else NO_HEADERS
    now = NO_HEADERS if before is None else as_now(before, base.search) if before.headers else before
    key = base.with_headers(now)
    about = CompileRecord(
        _would_be(inputs, kernel)
        | {
            "components": key.printable(),
            "headers": [{"name": header.name, "digest": header.digest} for header in now.headers],
            "toolchain": as_recorded(base.toolchain),
        }
    )
    if before is None:
        about = history.without_headers(about)
    digest = entry_digest(key.digest) if before is not None and now.headers == before.headers else None
    reasons = history.reasons(cache, about, digest, headers=before is not None)
    if reasons == history.ALIKE:
        reasons = (_SHADOWED,)
    return _error(inputs, cache, kernel, reasons)


def no_cache(inputs: Step) -> FrozenMissError:
    """Return the error for a compile without a cache."""
    reasons = ("no cache was given",)
    command = "pass cache=, or run it with CUDA_PROGCACHE=rw"
    _tell(inputs, reasons)
    return FrozenMissError(_message(inputs, "", reasons, command), name=inputs.name, reasons=reasons, command=command)


def no_compiler(
    inputs: CompileInputs, cache: Any, kernel: Mapping[str, Any] | None, missing: Exception
) -> FrozenMissError:
    """Return the error if the compiler isn't installed, based on the compilers that made the cache's entries."""
    told = without_compiler(cache, lambda _: missed(base_key(inputs), cache, kernel))
    return (
        told
        if told is not None
        else _error(inputs, cache, kernel, (str(missing), "and no compiler that made the cache's entries fits"))
    )


def no_link(inputs: Step, cache: Any, kernel: Mapping[str, Any] | None) -> FrozenMissError:
    """Return the error for a missing link."""
    return _error(inputs, cache, kernel, ("it was never linked from these inputs",))


def _would_be(inputs: CompileInputs, kernel: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of a program's record that is known before it is compiled."""
    part = kernel is not None and "module" in kernel
    return {
        "name": inputs.name,
        "code_type": inputs.code_type,
        "target_type": inputs.target_type,
        "arch": inputs.arch,
        "part_of" if part else "kernel": None if kernel is None else dict(kernel),
    }


def _error(inputs: Step, cache: Any, kernel: Mapping[str, Any] | None, reasons: tuple[str, ...]) -> FrozenMissError:
    where = "" if cache is None else cache.name
    command = _command(inputs, where, kernel)
    _tell(inputs, reasons)
    return FrozenMissError(
        _message(inputs, where, reasons, command), name=inputs.name, reasons=reasons, command=command
    )


def _tell(inputs: Step, reasons: tuple[str, ...]) -> None:
    if events.wanted("miss"):
        about = (inputs.name, inputs.target_type, inputs.arch or "")
        events.emit(events.Event("miss", *about, reasons=reasons))


def _message(inputs: Step, where: str, reasons: tuple[str, ...], command: str) -> str:
    there = f" isn't in {where}" if where else " would have to be compiled"
    return (
        f"the cache is frozen, and {inputs.name} ({inputs.target_type}, {inputs.arch}){there}: {'; '.join(reasons)}. "
        f"Nothing was compiled. To fix it: {command}"
    )


def _command(inputs: Step, where: str, kernel: Mapping[str, Any] | None) -> str:
    """Return the command that adds a library kernel; for other programs, advice."""
    if kernel is None:
        return "run it once with CUDA_PROGCACHE=rw"
    words = ["cuda-progcache", "compile", "--kernel", str(kernel["name"])]
    for name, value in (kernel.get("parameters") or {}).items():
        words += ["-p", f"{name}={str(value).lower() if isinstance(value, bool) else value}"]
    words += ["--arch", str(inputs.arch)]
    if os.path.isabs(where):
        words += ["--cache-dir", where]
    return "CUDA_PROGCACHE=rw " + shlex.join(words)

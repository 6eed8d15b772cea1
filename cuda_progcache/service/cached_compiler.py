# SPDX-License-Identifier: Apache-2.0
"""The cached compiler that the service, a prewarm and its worker processes share.

It compiles through one cache, remembers refusals, checks hits, and records the calls around a compile.
"""

from __future__ import annotations

import os

from cuda_progcache._util import modes
from cuda_progcache._util.lazy import kept_property
from cuda_progcache.compile import recording
from cuda_progcache.compile.arch import check_arch
from cuda_progcache.compile.pipeline import find, obtain
from cuda_progcache.compile.policy import MissPolicy
from cuda_progcache.errors import CompileError, FrozenMissError
from cuda_progcache.keys.headers import CHECK_EACH_TIME, HeaderPolicy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any, Self

    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.compile.precompiled import PrecompiledHeaders
    from cuda_progcache.keys.inputs import CompileInputs
    from cuda_progcache.provenance.step_records import Steps
    from cuda_progcache.service.hit_check import HitCheck
    from cuda_progcache.service.kernel_unit import KernelUnit
    from cuda_progcache.service.manifest import RenderedKernel
    from cuda_progcache.service.wanted import SourceUnit
    from cuda_progcache.store.tiers.configuration import Tier


class CachedCompiler:
    """Compiles sources and kernels through one cache.

    Parameters
    ----------
    cache : store or path, optional
    header_policy : HeaderPolicy
    keep_failures, verify_rate : float
    include_path : sequence of str
    mode : str, optional
    tiers : sequence, optional
        As for :class:`~cuda_progcache.service.compile_service.CompileService`.

    Attributes
    ----------
    cache : store
    hit_check : HitCheck or None
        None if ``verify_rate`` is 0 or the mode is ``frozen``.
    """

    def __init__(
        self,
        cache: Any = None,
        header_policy: HeaderPolicy = CHECK_EACH_TIME,
        keep_failures: float = 0.0,
        verify_rate: float = 0.0,
        include_path: Sequence[str | os.PathLike[str]] = (),
        mode: str | None = None,
        tiers: Sequence[Tier] | str | None = None,
    ) -> None:
        if keep_failures < 0:
            raise ValueError(f"keep_failures must be a number of seconds, 0 or more, got {keep_failures!r}")
        if not 0 <= verify_rate <= 1:
            raise ValueError(f"verify_rate must be a fraction of the hits, from 0 to 1, got {verify_rate!r}")
        if cache is None or isinstance(cache, str | os.PathLike):
            from cuda_progcache.store.file_stream import FileStreamProgramCache

            cache = FileStreamProgramCache(cache, mode=mode, tiers="configured" if tiers is None else tiers)
        elif tiers is not None:
            raise TypeError("tiers can't be given with a store; give a path as cache, or give the store its tiers")
        elif mode is not None and modes.chosen(mode) != modes.of(cache):
            from cuda_progcache.store.in_mode import given_mode

            cache = given_mode(cache, mode)
        self.cache = cache
        self.header_policy = header_policy
        self.keep_failures = float(keep_failures)
        self.include_path = tuple(os.fspath(folder) for folder in include_path)
        self.hit_check: HitCheck | None = None
        if verify_rate and self.mode != "frozen":  # a hit is checked by compiling it
            from cuda_progcache.service.hit_check import HitCheck

            self.hit_check = HitCheck(cache, verify_rate)

    @property
    def mode(self) -> str:
        """How the cache is used (:mod:`cuda_progcache._util.modes`)."""
        return modes.of(self.cache)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The settings for :meth:`from_settings` in another process; None for a cache in memory.

        They contain the tiers' secrets: send them only over a pipe to our own processes.
        """
        cache = getattr(self.cache, "settings", None)
        if cache is None:
            return None
        if tiers := getattr(self.cache, "tiers", ()):
            cache = {**cache, "tiers": [tier.for_child() for tier in tiers]}
        headers = {"hermetic": self.header_policy.hermetic, "recheck_after": self.header_policy.recheck_after}
        return {
            "cache": cache,
            "header_policy": headers,
            "keep_failures": self.keep_failures,
            "include_path": self.include_path,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """Make a compiler over the same directory as another process's compiler."""
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        cache = dict(settings["cache"])
        if told := cache.pop("tiers", None):
            from cuda_progcache.store.tiers.settings import TierSettings

            cache["tiers"] = [TierSettings.of_parent(one) for one in told]
        return cls(
            FileStreamProgramCache(**cache),
            HeaderPolicy(**settings.get("header_policy", {})),
            settings.get("keep_failures", 0.0),
            include_path=settings.get("include_path", ()),
        )

    def frozen(self) -> CachedCompiler:
        """Return a compiler over the same cache that never compiles (mode ``frozen``)."""
        return CachedCompiler(self.cache, self.header_policy, include_path=self.include_path, mode="frozen")

    def reasons(self, unit: KernelUnit | SourceUnit) -> tuple[str, ...]:
        """Return why a frozen cache doesn't have a program; empty if it has it."""
        try:
            unit.obtain(self.cache)
        except FrozenMissError as miss:
            return miss.reasons
        return ()

    @kept_property
    def steps(self) -> Steps | None:
        """The record of calls that don't produce programs; None if the store keeps no records."""
        from cuda_progcache.provenance.step_records import Steps
        from cuda_progcache.store.base import ProgramCacheResource

        if not isinstance(self.cache, ProgramCacheResource):
            return None
        if self.mode == "rw":
            return Steps(self.cache)
        from cuda_progcache.store.in_mode import looked_at

        return Steps(looked_at(self.cache, self.mode))

    def compile(self, inputs: CompileInputs) -> CompiledProgram:
        """Return a program from the cache, or compile and store it."""
        policy = MissPolicy(keep_failures=self.keep_failures)
        done = _naming_archs(inputs.arch, lambda: obtain(inputs, self.cache, policy=policy))
        if self.hit_check is not None and done.hit:
            self.hit_check.saw(done, lambda: obtain(inputs), lambda: find(inputs, self.cache))
        if recording.wanted():
            recording.note(done, inputs)
        return done.analyse_with(self._analyse)

    def unit(self, rendered: RenderedKernel, arch: str, target_type: str = "cubin") -> KernelUnit:
        """Return the compile unit of a rendered kernel.

        Raises
        ------
        ArchError, ValueError
            If the kernel can't be compiled for the architecture or to the target type.
        """
        from cuda_progcache.service.kernel_unit import KernelUnit

        return KernelUnit(rendered, arch, target_type, self.header_policy, self.include_path)

    def compile_kernel(
        self, unit: KernelUnit | SourceUnit, precompiled: PrecompiledHeaders | None = None
    ) -> CompiledProgram:
        """Return a kernel from the cache, or compile and store it.

        Parameters
        ----------
        unit : KernelUnit or SourceUnit
        precompiled : PrecompiledHeaders, optional
            The precompiled headers of the current batch.
        """
        from cuda_progcache.service.kernel_unit import KernelUnit

        policy = MissPolicy(precompiled, self.keep_failures)
        done = _naming_archs(unit.arch, lambda: unit.obtain(self.cache, policy))
        if self.hit_check is not None and done.hit:
            self.hit_check.saw(done, lambda: unit.obtain(None), lambda: unit.look_up(self.cache))
        if not isinstance(unit, KernelUnit):
            return done.analyse_with(self._analyse)
        missing = unit.missing_entry_point(done)
        # The cached program may be damaged: a fresh compile shows whether the manifest is wrong.
        frozen = self.mode == "frozen"
        if missing and (not done.hit or frozen or unit.missing_entry_point(unit.obtain(None))):
            raise unit.wrong_entry_point(missing)
        if not done.hit and done.digest is not None and self.steps is not None:
            unit.record_rendering(self.steps)
        return done.analyse_with(self._analyse)

    def _analyse(self, program: CompiledProgram, name: str, analyse: Callable[[], Any]) -> Any:
        """Run an analysis of a cached program as a recorded call."""
        if program.digest is None or self.steps is None:
            return analyse()
        from cuda_progcache.provenance import steps

        kind = {"resource_usage": steps.RESOURCE_USAGE, "sass": steps.SASS}[name]
        return steps.record_analysis(self.steps, kind, program.digest, analyse)


def _naming_archs(arch: str, work: Callable[[], CompiledProgram]) -> CompiledProgram:
    """Run a compile; if the compiler refuses the architecture, raise an error that lists those it supports."""
    try:
        return work()
    except CompileError as error:
        if "gpu-architecture" in error.log or "-arch" in error.log:
            check_arch(arch)
        raise

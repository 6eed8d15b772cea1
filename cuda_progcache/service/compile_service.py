# SPDX-License-Identifier: Apache-2.0
"""The compile service: sources and library kernels in, binaries out, through a cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from cuda_progcache._util.fields import replace
from cuda_progcache._util.running import here
from cuda_progcache.compile.arch import check_arch, with_arch
from cuda_progcache.compile.linking import LinkInput, look_up_linked, obtain_linked
from cuda_progcache.compile.lookup import look_up
from cuda_progcache.compile.pipeline import obtain
from cuda_progcache.compile.policy import PLAIN, MissPolicy
from cuda_progcache.errors import ArchError, CompileError
from cuda_progcache.keys.headers import CHECK_EACH_TIME, HeaderPolicy
from cuda_progcache.keys.options import LinkerOptions, ProgramOptions
from cuda_progcache.keys.schema import CompileInputs, base_key, normalize
from cuda_progcache.keys.toolchain import header_root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, overload

    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.compile.precompiled import PrecompiledHeaders
    from cuda_progcache.compile.program import LogWriter
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.memo.storage.steps import Steps
    from cuda_progcache.service.hit_check import HitCheck
    from cuda_progcache.service.manifest import KernelLibrary, KernelSpec, RenderedKernel, RenderedModule
    from cuda_progcache.service.prewarm import PrewarmItem, PrewarmReport

# Architectures that some NVRTC 12 or 13 compiles for. Others are asked of the installed one, which loads it.
_ARCHS = {50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 107, 110, 120, 121}


class CompileService:
    """Compiles programs and library kernels through one cache.

    Parameters
    ----------
    cache : store or path, optional
        Where binaries are kept: a store, the path of an on-disk one, or None for the one at the default root
        (``CUDA_PROGCACHE_DIR``, else the user's cache directory).
    library : KernelLibrary or path, optional
        The kernels :meth:`kernel` knows; None for the bundled library.
    header_policy : HeaderPolicy
        How much is done to be sure of headers.
    keep_failures : float
        Seconds for which a compiler's refusal is remembered, as long as the source, its headers, the options and the
        compiler stay the same; the error has a note that says so. 0: each call asks the compiler again.
    verify_rate : float
        Share of the hits (0 to 1; 0.01 is one of a hundred) that are compiled again in the background and compared. One
        that differs is moved to the quarantine, with a warning and a ``mismatch`` event. It loads the compiler, and
        takes a core for as long as a compile.

    Attributes
    ----------
    cache : store
    hit_check : HitCheck or None
        Where ``verify_rate`` is given: its ``stats``, and ``wait()``.

    Notes
    -----
    Thread-safe: calls share nothing but the cache and the library, which are.
    """

    def __init__(
        self,
        cache: Any = None,
        *,
        library: KernelLibrary | str | os.PathLike[str] | None = None,
        header_policy: HeaderPolicy = CHECK_EACH_TIME,
        keep_failures: float = 0.0,
        verify_rate: float = 0.0,
    ) -> None:
        if keep_failures < 0:
            raise ValueError(f"keep_failures is a number of seconds, or 0 for none, got {keep_failures!r}")
        if cache is None or isinstance(cache, str | os.PathLike):
            from cuda_progcache.store.file_stream import FileStreamProgramCache

            cache = FileStreamProgramCache(cache)
        if not 0 <= verify_rate <= 1:
            raise ValueError(f"verify_rate is a share of the hits, 0 to 1, got {verify_rate!r}")
        self.cache = cache
        self.header_policy = header_policy
        self.hit_check: HitCheck | None = None
        if verify_rate:
            from cuda_progcache.service.hit_check import HitCheck

            self.hit_check = HitCheck(cache, verify_rate)
        self.keep_failures = float(keep_failures)
        self._given_library = library

    @functools.cached_property
    def library(self) -> KernelLibrary:
        """The kernel library."""
        from cuda_progcache.service.manifest import KernelLibrary

        given = self._given_library
        return given if isinstance(given, KernelLibrary) else KernelLibrary(given)

    @functools.cached_property
    def calls(self) -> Cache:
        """The calls that made the programs in the cache, and those around them: to be queried, shown, transferred.

        Compiles and links; renderings of kernels, analyses (``resource_usage``, ``sass``) and prewarm runs
        (:mod:`cuda_progcache.memo.steps`); and calls with small results that are saved here, as a function memoized
        with this cache does.
        """
        from cuda_progcache.memo.storage import program_cache

        return program_cache(self.cache)

    @functools.cached_property
    def _steps(self) -> Steps | None:
        """Where calls that make no program are recorded; None beside a store that keeps no records."""
        from cuda_progcache.memo.storage.steps import Steps
        from cuda_progcache.store.base import ProgramCacheResource

        return Steps(self.cache) if isinstance(self.cache, ProgramCacheResource) else None

    def _analyse(self, program: CompiledProgram, name: str, analyse: Callable[[], Any]) -> Any:
        """Analyse a program of this cache as a recorded call."""
        if program.digest is None or self._steps is None:
            return analyse()
        from cuda_progcache.memo import steps

        kind = {"resource_usage": steps.RESOURCE_USAGE, "sass": steps.SASS}[name]
        return steps.analysed(self._steps, kind, program.digest, analyse)

    def compile(
        self,
        source: str | bytes,
        code_type: str = "c++",
        *,
        options: Any = None,
        target_type: str = "cubin",
        name_expressions: Sequence[str | bytes] = (),
        logs: LogWriter | None = None,
    ) -> CompiledProgram:
        """Compile a source, or take the binary from the cache.

        Parameters
        ----------
        source : str or bytes
            CUDA C++, PTX or NVVM IR.
        code_type : {"c++", "ptx", "nvvm"}
        options : ProgramOptions or mapping, optional
            Ours or ``cuda.core``'s; without ``arch``, the current device's is taken.
        target_type : {"cubin", "ptx", "ltoir"}
        name_expressions : sequence of str or bytes
            Template instances to make.
        logs : object with ``write``, optional
            Gets the compiler's log, on a hit too.

        Returns
        -------
        CompiledProgram

        Raises
        ------
        CompileError
            If the compiler refuses the source.
        ArchError
            For an architecture that the compiler doesn't know, or none where there is no device.
        ValueError, TypeError
            For inputs that no compile can take, before any compile.
        """
        if options is None:
            options = ProgramOptions()
        elif isinstance(options, Mapping):
            options = ProgramOptions(**options)
        options = with_arch(options)
        inputs = normalize(
            code=source,
            code_type=code_type,
            options=options,
            target_type=target_type,
            name_expressions=name_expressions,
            header_policy=self.header_policy,
        )
        policy = MissPolicy(keep_failures=self.keep_failures)
        done = _naming_archs(options.arch, lambda: obtain(inputs, self.cache, policy=policy))
        if self.hit_check is not None and done.hit:
            self.hit_check.saw(done, lambda: obtain(inputs), lambda: look_up(base_key(inputs), self.cache))
        done.analyse_with(self._analyse)
        if logs is not None and done.log:
            logs.write(done.log)
        return done

    if TYPE_CHECKING:

        @overload
        def kernel(self, name: str, *, arch: str, target_type: str = "cubin", **params: Any) -> CompiledProgram: ...
        @overload
        def kernel(
            self, name: str, *, arch: list[str] | tuple[str, ...], target_type: str = "cubin", **params: Any
        ) -> dict[str, CompiledProgram]: ...

    def kernel(
        self, name: str, *, arch: str | list[str] | tuple[str, ...], target_type: str = "cubin", **params: Any
    ) -> CompiledProgram | dict[str, CompiledProgram]:
        """Compile a kernel of the library, or take it from the cache.

        Parameters
        ----------
        name : str
            The kernel.
        arch : str, or list or tuple of str
            ``"sm_90"`` or the like; of several, each is an entry of its own, and they are compiled side by side.
        target_type : {"cubin", "ptx", "ltoir"}
        **params
            The kernel's parameters; those not given have their defaults.

        Returns
        -------
        CompiledProgram, or for several architectures a dict of them by architecture

        Raises
        ------
        KernelNotFoundError, ParameterError, ArchError
            For a name or value that doesn't exist, before any compile; the message names the nearest that does.
        TemplateError
            If the template refuses the parameters.
        CompileError
            If the compiler refuses what was rendered; diagnostics name the template's line.
        """
        rendered = self.library.render(name, **params)
        if isinstance(arch, list | tuple):
            units = {one: KernelUnit(rendered, one, target_type, self.header_policy) for one in arch}
            return _side_by_side({one: functools.partial(self._obtain, unit) for one, unit in units.items()})
        return self._obtain(KernelUnit(rendered, arch, target_type, self.header_policy))

    def _obtain(self, unit: KernelUnit, precompiled: PrecompiledHeaders | None = None) -> CompiledProgram:
        policy = MissPolicy(precompiled, self.keep_failures)
        done = _naming_archs(unit.arch, lambda: unit.obtain(self.cache, policy))
        if self.hit_check is not None and done.hit:
            self.hit_check.saw(done, lambda: unit.obtain(None), lambda: unit.look_up(self.cache))
        if not done.hit and done.digest is not None and self._steps is not None:
            unit.record_rendering(self._steps)
        return done.analyse_with(self._analyse)

    def explain(self, digest: str) -> tuple[str, ...]:
        """Say why an entry had to be compiled: what differs from the nearest compile before it.

        Parameters
        ----------
        digest : str
            Of an entry, or the first digits of one (4 at least).

        Returns
        -------
        tuple of str
            A sentence per difference, or ``("first compile of this program",)``.

        Raises
        ------
        KeyError
            If there is no such entry, or it was put there by hand.
        AmbiguousDigestError
            If several begin with these digits.
        """
        from cuda_progcache.compile.history import explain_entry

        return explain_entry(self.cache, self.cache.resolve(digest))

    def prewarm(
        self,
        library: KernelLibrary | str | os.PathLike[str] | None = None,
        *,
        archs: Iterable[str],
        jobs: int | None = None,
        kernels: Iterable[str] | None = None,
        on_progress: Callable[[PrewarmItem, int, int], None] | None = None,
        on_start: Callable[[PrewarmItem, int, int], None] | None = None,
    ) -> PrewarmReport:
        """Compile every variant that a library lists, for several architectures, in parallel.

        Light programs are compiled in threads. Where several include much (cub, thrust, cooperative groups), worker
        processes do it, which precompile the headers that three or more of the programs begin with; what comes out is
        the same.

        Parameters
        ----------
        library : KernelLibrary or path, optional
            None: this service's.
        archs : iterable of str
            ``["sm_80", "sm_90"]``.
        jobs : int, optional
            How many are compiled at once; None: one per CPU. A cache without a directory is served by threads alone.
        kernels : iterable of str, optional
            Only these.
        on_progress : callable, optional
            Called with (item, done, total) in the calling thread after each variant.
        on_start : callable, optional
            Called in the same way when a compile begins; the item's status is ``"compiling"``.

        Returns
        -------
        PrewarmReport
            With every failure in it: a kernel that doesn't compile raises nothing here.

        Raises
        ------
        KernelNotFoundError, ArchError, ManifestError
            For wrong input, before any compile.
        """
        from cuda_progcache.service.prewarm import prewarm

        return prewarm(
            self, library, archs=archs, jobs=jobs, kernels=kernels, on_progress=on_progress, on_start=on_start
        )


class KernelUnit:
    """One rendered kernel for one architecture, on its way to one target: a compile, or compiles and a link.

    Parameters
    ----------
    rendered : RenderedKernel
    arch : str
    target_type : {"cubin", "ptx", "ltoir"}

    Raises
    ------
    ArchError
        For an architecture that isn't one, or is below the kernel's ``min_arch``.
    ValueError
        For a target this kernel can't have.
    """

    def __init__(
        self,
        rendered: RenderedKernel,
        arch: str,
        target_type: str = "cubin",
        header_policy: HeaderPolicy = CHECK_EACH_TIME,
    ) -> None:
        require_arch(arch, rendered.spec)
        self.header_policy = header_policy
        self.rendered = rendered
        self.arch = arch
        self.target_type = target_type.lower()
        self.link_inputs: tuple[LinkInput, ...] = ()
        self.inputs: CompileInputs | None = None
        modules = rendered.modules
        code_type = rendered.spec.code_type
        if len(modules) > 1:
            self.link_inputs = tuple(self._stage(module, "ltoir") for module in modules)
        elif code_type == "nvvm" and self.target_type == "cubin":
            self.link_inputs = (self._stage(modules[0], "ptx"),)
        else:
            self.inputs = self._inputs(modules[0], self.target_type)

    def obtain(self, cache: Any, policy: MissPolicy = PLAIN) -> CompiledProgram:
        """Take it from the cache, or compile and publish it (raises CompileError, ToolchainError)."""
        rendered = self.rendered
        kernel = self._kernel(rendered.template_digests)
        if self.inputs is not None:
            lookup = _template_lines(rendered.modules[0])
            return obtain(self.inputs, cache, kernel=kernel, lookup=lookup, policy=policy)
        return obtain_linked(
            self.link_inputs, self._link_options(), self.target_type, cache, kernel=kernel, policy=policy
        )

    def _kernel(self, template_digests: Mapping[str, str]) -> dict[str, Any]:
        """What a record has of the kernel."""
        return {
            "name": self.rendered.spec.name,
            "parameters": dict(self.rendered.params),
            "templates": [{"name": name, "digest": digest} for name, digest in template_digests.items()],
        }

    def _part(self, module: RenderedModule) -> dict[str, Any]:
        """What the record of a module that goes into a link has of the kernel."""
        return {**self._kernel(dict(sorted(module.template_digests.items()))), "module": module.name}

    def record_rendering(self, steps: Steps) -> None:
        """Record that its source was rendered, of several modules each, beside the programs compiled from it."""
        from cuda_progcache.memo.steps import record_rendering

        rendered = self.rendered
        for module in rendered.modules:
            kernel = self._kernel(rendered.template_digests) if self.inputs is not None else self._part(module)
            record_rendering(steps, kernel, module.template, module.source, rendered.started, rendered.seconds)

    @property
    def compiles(self) -> tuple[CompileInputs, ...]:
        """What has to be compiled for it."""
        if self.inputs is not None:
            return (self.inputs,)
        return tuple(item.compile for item in self.link_inputs if item.compile is not None)

    def look_up(self, cache: Any) -> CompiledProgram | None:
        """Take it from the cache; None if it would have to be compiled. Loads no compiler library."""
        if self.inputs is not None:
            return look_up(base_key(self.inputs), cache)
        return look_up_linked(self.link_inputs, self._link_options(), self.target_type, cache)

    def _link_options(self) -> LinkerOptions:
        lto = any(item.target_type == "ltoir" for item in self.link_inputs)
        return LinkerOptions(name=self.rendered.spec.name, arch=self.arch, link_time_optimization=True if lto else None)

    def _stage(self, module: RenderedModule, target_type: str) -> LinkInput:
        return LinkInput(
            module.name,
            target_type,
            compile=self._inputs(module, target_type),
            kernel=functools.partial(self._part, module),
            lookup=_template_lines(module),
        )

    def _inputs(self, module: RenderedModule, target_type: str) -> CompileInputs:
        spec = self.rendered.spec
        options = ProgramOptions(name=f"{module.name}{_SUFFIXES[spec.code_type]}", arch=self.arch, **spec.options)
        if spec.headers:
            own = options.include_path or ()
            own = (own,) if isinstance(own, str) else tuple(own)
            options = replace(options, include_path=(*own, *(header_root(name) for name in spec.headers)))
        if spec.code_type == "c++" and len(self.rendered.modules) > 1:
            options = replace(options, relocatable_device_code=True)
        return normalize(
            code=module.source,
            code_type=spec.code_type,
            options=options,
            target_type=target_type,
            name_expressions=self.rendered.name_expressions,
            header_policy=self.header_policy,
        )


_SUFFIXES = {"c++": ".cu", "nvvm": ".ll"}


def _template_lines(module: RenderedModule) -> Callable[[int], tuple[str, int] | None]:
    """Line lookup into the template; the source map is made when the first line is asked for."""
    made: list[Any] = []

    def lookup(line: int) -> tuple[str, int] | None:
        if not made:
            made.append(module.source_map())
        place = made[0].lookup(line)
        return None if place is None else (place.template, place.line)

    return lookup


def require_arch(arch: object, spec: KernelSpec | None = None) -> None:
    """Refuse what isn't an architecture, or is below what a kernel needs.

    Well-known ones pass unasked: whether the installed compiler supports them shows when it compiles, and a hit needs
    no compiler at all.

    Raises
    ------
    ArchError
        With the nearest one that the compiler supports.
    """
    number = _capability(arch) if isinstance(arch, str) else None
    if number not in _ARCHS:
        check_arch(str(arch))
        return
    if spec is not None and spec.min_arch is not None and number < spec.min_arch:
        raise ArchError(f"kernel {spec.name!r} needs sm_{spec.min_arch} or later; {arch} was asked for")


def _capability(arch: str) -> int | None:
    """90 for sm_90, compute_90 and sm_90a; None for what is written otherwise."""
    prefix, _, number = arch.partition("_")
    if number[-1:] in {"a", "f"}:
        number = number[:-1]
    return int(number) if prefix in {"sm", "compute"} and number.isascii() and number.isdigit() else None


def _side_by_side(work: Mapping[str, Callable[[], CompiledProgram]]) -> dict[str, CompiledProgram]:
    """Do several compiles in threads: NVRTC lets go of the interpreter's lock."""
    if not work:
        raise ArchError("no architecture: give arch='sm_90', or several in a list")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1)) as pool:
        futures = {arch: pool.submit(here(job)) for arch, job in work.items()}
        return {arch: future.result() for arch, future in futures.items()}


def _naming_archs(arch: str, work: Callable[[], CompiledProgram]) -> CompiledProgram:
    """Do it; where the compiler refuses the architecture, say which ones it takes."""
    try:
        return work()
    except CompileError as error:
        if "gpu-architecture" in error.log or "-arch" in error.log:
            check_arch(arch)
        raise

# SPDX-License-Identifier: Apache-2.0
"""The compile service: sources and library kernels in, binaries out, through a cache."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from cuda_progcache._util.lazy import kept_property
from cuda_progcache._util.running import here
from cuda_progcache.compile import recording
from cuda_progcache.compile.arch import with_arch
from cuda_progcache.errors import ArchError, FrozenMissError
from cuda_progcache.keys.headers import CHECK_EACH_TIME, HeaderPolicy
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.options import ProgramOptions, as_options
from cuda_progcache.service.cached_compiler import CachedCompiler

TYPE_CHECKING = False
if TYPE_CHECKING:
    from concurrent.futures import Executor
    from typing import Any, overload

    from cuda_progcache.compile.compiled import CompiledProgram
    from cuda_progcache.compile.program import LogWriter
    from cuda_progcache.memo.caches import Cache
    from cuda_progcache.service.hit_check import HitCheck
    from cuda_progcache.service.kernel_unit import KernelUnit
    from cuda_progcache.service.lock import Lock, Locked
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.service.prewarm import PrewarmItem, PrewarmReport
    from cuda_progcache.service.proof import Proof
    from cuda_progcache.store.tiers.configuration import Tier


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
    include_path : sequence of str or path
        Folders in which the headers of library kernels are looked for, before those that the manifest names.
    mode : {"rw", "ro", "off", "frozen"}, optional
        How the cache, and that of compiled templates, is used (:mod:`cuda_progcache._util.modes`); None: as
        ``CUDA_PROGCACHE`` says.
    tiers : sequence of str, mapping or TierSettings, optional
        Stores beyond this machine that lie behind the directory, the fastest first, as URLs
        (``redis://host:6379?mode=ro``) or tables; ``[]`` for none. None: those that are configured
        (:mod:`~cuda_progcache.store.tiers.configuration`). They are opened when something isn't in the directory. Not
        with a store for ``cache``, which has its own.

    Raises
    ------
    ConfigError
        One of the tiers can't be used as it is written.

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
        include_path: Sequence[str | os.PathLike[str]] = (),
        mode: str | None = None,
        tiers: Sequence[Tier] | str | None = None,
    ) -> None:
        self._compiler = CachedCompiler(cache, header_policy, keep_failures, verify_rate, include_path, mode, tiers)
        self._given_library = library

    @property
    def cache(self) -> Any:
        """Where binaries are kept."""
        return self._compiler.cache

    @property
    def mode(self) -> str:
        """How the cache is used."""
        return self._compiler.mode

    @property
    def header_policy(self) -> HeaderPolicy:
        """How much is done to be sure of headers."""
        return self._compiler.header_policy

    @property
    def keep_failures(self) -> float:
        """Seconds for which a compiler's refusal is remembered."""
        return self._compiler.keep_failures

    @property
    def hit_check(self) -> HitCheck | None:
        """Where ``verify_rate`` is given: its ``stats``, and ``wait()``."""
        return self._compiler.hit_check

    @kept_property
    def library(self) -> KernelLibrary:
        """The kernel library."""
        return self._opened(self._given_library)

    @kept_property
    def calls(self) -> Cache:
        """The calls that made the programs in the cache, and those around them: to be queried, shown, transferred.

        Compiles and links; renderings of kernels, analyses (``resource_usage``, ``sass``) and prewarm runs
        (:mod:`~cuda_progcache.provenance.steps`); and calls with small results that are saved here, as a function
        memoized with this cache does.
        """
        from cuda_progcache.provenance.programs import program_cache

        if self.mode == "rw":
            return program_cache(self.cache)
        from cuda_progcache.store.in_mode import looked_at

        return program_cache(looked_at(self.cache, self.mode))

    def compile(
        self,
        code: str | bytes | None = None,
        code_type: str = "c++",
        *,
        options: Any = None,
        target_type: str = "cubin",
        name_expressions: Iterable[str | bytes] | None = (),
        logs: LogWriter | None = None,
        source: str | bytes | None = None,
    ) -> CompiledProgram:
        """Compile a program, or take the binary from the cache.

        Parameters
        ----------
        code : str or bytes
            CUDA C++, PTX or NVVM IR. Its earlier name, ``source``, is taken as well.
        code_type : {"c++", "ptx", "nvvm"}
        options : ProgramOptions or mapping, optional
            Ours or ``cuda.core``'s; without ``arch``, the current device's is taken.
        target_type : {"cubin", "ptx", "ltoir"}
        name_expressions : iterable of str or bytes, optional
            Template instances to make.
        logs : object with ``write``, optional
            Gets the compiler's log, on a hit too.

        Returns
        -------
        CompiledProgram

        Raises
        ------
        CompileError
            If the compiler refuses the program.
        ArchError
            For an architecture that the compiler doesn't know, or none where there is no device.
        ValueError, TypeError
            For inputs that no compile can take, before any compile.
        """
        if (code is None) == (source is None):
            raise TypeError("compile() needs the source exactly once, as code")
        inputs = normalize(
            code=source if code is None else code,
            code_type=code_type,
            options=with_arch(as_options(options, ProgramOptions)),
            target_type=target_type,
            name_expressions=name_expressions,
            header_policy=self.header_policy,
        )
        done = self._compiler.compile(inputs)
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
        compiler = self._compiler
        if not isinstance(arch, list | tuple):
            return self._used(compiler.unit(rendered, arch, target_type))
        units = {one: compiler.unit(rendered, one, target_type) for one in arch}
        return _side_by_side({one: functools.partial(self._used, unit) for one, unit in units.items()})

    def _used(self, unit: KernelUnit) -> CompiledProgram:
        """Get a kernel that a caller will use; a prewarm uses none."""
        try:
            done = self._compiler.compile_kernel(unit)
        except FrozenMissError as miss:
            options = self._command_options(self.library)
            raise miss.with_options(options) if options else miss from None
        if recording.wanted():
            recording.note_kernel(done, unit.kernel, unit.compiles)
        return done

    def _command_options(self, library: KernelLibrary) -> str:
        """What leads a command line to a library and its headers; empty for the bundled one."""
        import shlex

        from cuda_progcache.service.manifest import bundled_library

        words = [] if library.path == bundled_library() else ["--manifest", os.path.abspath(library.path)]
        for folder in self._compiler.include_path:
            words += ["-I", os.path.abspath(folder)]
        return shlex.join(words)

    def record(self, path: str | os.PathLike[str] | None = None) -> recording.record:
        """Record what is used while the block is open: ``with service.record("run.json"):``.

        It holds for this process, whatever compiles or looks up there, this service or another, or a
        :class:`~cuda_progcache.Program`. ``CUDA_PROGCACHE_RECORD=run.json`` records a run with all of its processes.

        Parameters
        ----------
        path : str or os.PathLike, optional
            A file that is appended to (:mod:`~cuda_progcache.compile.recording`); None: ``programs`` of what the block
            gets is all.

        Returns
        -------
        cuda_progcache.record
            A context manager.

        Raises
        ------
        OSError
            The file can't be written.
        """
        return recording.record(path)

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
        archs: Iterable[str] = (),
        jobs: int | None = None,
        kernels: Iterable[str] | None = None,
        lock: Lock | str | os.PathLike[str] | None = None,
        dry_run: bool = False,
        on_progress: Callable[[PrewarmItem, int, int], None] | None = None,
        on_start: Callable[[PrewarmItem, int, int], None] | None = None,
        executor: Executor | None = None,
    ) -> PrewarmReport:
        """Compile what a library lists for several architectures, or what a lockfile does, in parallel.

        What is there already is a hit, so that a prewarm that was stopped goes on where it was. Light programs are
        compiled in threads. Where several include much (cub, thrust, cooperative groups), worker processes do it, which
        precompile the headers that three or more of the programs begin with; what comes out is the same.

        Parameters
        ----------
        library : KernelLibrary or path, optional
            None: this service's.
        archs : iterable of str
            ``["sm_80", "sm_90"]``; not with a lock, which has its own.
        jobs : int, optional
            How many are compiled at once; None: one per CPU. A cache without a directory is served by threads alone.
        kernels : iterable of str, optional
            Only these.
        lock : Lock or path, optional
            Compile exactly what a lockfile lists.
        dry_run : bool
            Compile nothing: what isn't there is ``"missing"`` in the report, with the reasons.
        on_progress : callable, optional
            Called with (item, done, total) in the calling thread after each variant.
        on_start : callable, optional
            Called in the same way when a compile begins; the item's status is ``"compiling"``.
        executor : concurrent.futures.Executor, optional
            What compiles, in the place of this process: a pool of processes, a Dask client's ``get_executor()``. Its
            workers need this package, the library's folder, and a tier or a directory of this cache that they share;
            they give back keys and no programs. ``jobs`` is how many workers it has; None: as many as it says.

        Returns
        -------
        PrewarmReport
            With every failure in it: a kernel that doesn't compile raises nothing here.

        Raises
        ------
        KernelNotFoundError, ArchError, ManifestError, LockError
            For wrong input, before any compile.
        """
        from cuda_progcache.service.prewarm import prewarm, variants

        library = self._library(library)
        chosen = None if kernels is None else tuple(dict.fromkeys(kernels))
        locked: Lock | None = None
        if lock is None:
            archs = tuple(dict.fromkeys(archs))
            wanted = variants(library, archs, chosen)
        else:
            locked = _lock(lock)
            wanted = [locked.wanted(one) for one in locked.programs if chosen is None or one.kernel in chosen]
            archs = [one.arch for one in wanted]
        return prewarm(
            self._compiler,
            library,
            wanted,
            archs=archs,
            jobs=jobs,
            kernels=chosen or (),
            dry_run=dry_run,
            on_progress=on_progress,
            on_start=on_start,
            executor=executor,
            lock=locked if chosen is None else None,
        )

    def lock(
        self,
        recordings: Iterable[str | os.PathLike[str]] = (),
        *,
        library: KernelLibrary | str | os.PathLike[str] | None = None,
        archs: Iterable[str] = (),
        kernels: Iterable[str] | None = None,
    ) -> Lock:
        """Write down the programs that a deploy needs: those of recorded runs, and those that a library lists.

        Parameters
        ----------
        recordings : iterable of path
            Files that runs were recorded in (:meth:`record`). Programs that weren't kept are left out.
        library : KernelLibrary or path, optional
            With ``archs``; None: this service's.
        archs : iterable of str
            Lock the library's variants for these; none of them where there is no arch. Those that aren't in the cache
            are locked without a key.
        kernels : iterable of str, optional
            Only these of the library.

        Returns
        -------
        Lock

        Raises
        ------
        RecordingError, KernelNotFoundError, ArchError, ManifestError
            For wrong input.
        OSError
            A recording can't be read.
        """
        from cuda_progcache.service.lock import Lock, of_manifest
        from cuda_progcache.service.prewarm import variants

        lines = [line for path in recordings for line in recording.read(path) if line["key"]]
        more: list[Locked] = []
        if archs := tuple(archs):
            library = self._library(library)
            known, more = of_manifest(self._compiler, library, variants(library, archs, kernels))
            lines = [*known, *lines]
        return Lock.of_lines(lines, more)

    def check(
        self,
        lock: Lock | str | os.PathLike[str] | None = None,
        *,
        library: KernelLibrary | str | os.PathLike[str] | None = None,
        archs: Iterable[str] = (),
        kernels: Iterable[str] | None = None,
    ) -> Proof:
        """Report for each program that a deploy needs whether it is in the cache, and if not, why; compile nothing.

        Each is looked up as in a frozen run, and the reasons are those of its :class:`FrozenMissError`.

        Parameters
        ----------
        lock : Lock or path, optional
            What is needed. A program that is there under another key than the locked one is stale.
        library, archs, kernels
            Without a lock: what the library lists, as for :meth:`prewarm`. With one: the library of its kernels.

        Returns
        -------
        Proof

        Raises
        ------
        LockError, KernelNotFoundError, ArchError, ManifestError
            For wrong input.
        """
        from cuda_progcache.service.prewarm import variants
        from cuda_progcache.service.proof import prove

        library = self._library(library)
        asked = _lock(lock) if lock is not None else variants(library, archs, kernels)
        return prove(self._compiler, library, asked, self._command_options(library))

    def _library(self, given: KernelLibrary | str | os.PathLike[str] | None) -> KernelLibrary:
        return self.library if given is None else self._opened(given)

    def _opened(self, given: KernelLibrary | str | os.PathLike[str] | None) -> KernelLibrary:
        from cuda_progcache.service.manifest import KernelLibrary

        return given if isinstance(given, KernelLibrary) else KernelLibrary(given, mode=self.mode)


def _lock(given: Lock | str | os.PathLike[str]) -> Lock:
    from cuda_progcache.service.lock import Lock

    return given if isinstance(given, Lock) else Lock.read(given)


def _side_by_side(work: Mapping[str, Callable[[], CompiledProgram]]) -> dict[str, CompiledProgram]:
    """Do several compiles in threads: NVRTC lets go of the interpreter's lock."""
    if not work:
        raise ArchError("no architecture: give arch='sm_90', or several in a list")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1)) as pool:
        futures = {arch: pool.submit(here(job)) for arch, job in work.items()}
        return {arch: future.result() for arch, future in futures.items()}

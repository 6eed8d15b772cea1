# SPDX-License-Identifier: Apache-2.0
"""The compile service: it compiles sources and library kernels to binaries, through a cache."""

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
        The cache of binaries: a store, the path of an on-disk store, or None for the store at the default root
        (``CUDA_PROGCACHE_DIR``, otherwise the user's cache directory).
    library : KernelLibrary or path, optional
        The kernel library that :meth:`kernel` uses; None for the bundled library.
    header_policy : HeaderPolicy
        How carefully headers are checked.
    keep_failures : float
        Seconds for which a compiler's refusal is remembered, unless the source, its headers, the options or the
        compiler change; a note on the error says so. 0: each call asks the compiler again.
    verify_rate : float
        Share of the hits (0 to 1; 0.01 is one in a hundred) to compile again in the background and compare. A hit that
        differs is moved to the quarantine, with a warning and a ``mismatch`` event. Each check loads the compiler and
        uses a core for the time of a compile.
    include_path : sequence of str or path
        Folders to search for the headers of library kernels, before those that the manifest names.
    mode : {"rw", "ro", "off", "frozen"}, optional
        How the program cache and the cache of compiled templates are used (:mod:`cuda_progcache._util.modes`). None:
        the mode in ``CUDA_PROGCACHE``.
    tiers : sequence of str, mapping or TierSettings, optional
        Remote stores behind the directory, the fastest first, as URLs (``redis://host:6379?mode=ro``) or tables;
        ``[]`` for none. None: the configured tiers (:mod:`~cuda_progcache.store.tiers.configuration`). They are opened
        at the first miss in the directory. Not allowed if ``cache`` is a store, which has its own tiers.

    Raises
    ------
    ConfigError
        If the settings of a tier are invalid.

    Notes
    -----
    Thread-safe: calls share only the cache and the library, which are thread-safe.
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
        """The cache of binaries."""
        return self._compiler.cache

    @property
    def mode(self) -> str:
        """How the cache is used."""
        return self._compiler.mode

    @property
    def header_policy(self) -> HeaderPolicy:
        """How carefully headers are checked."""
        return self._compiler.header_policy

    @property
    def keep_failures(self) -> float:
        """Seconds for which a compiler's refusal is remembered."""
        return self._compiler.keep_failures

    @property
    def hit_check(self) -> HitCheck | None:
        """The check of hits, with ``stats`` and ``wait()``; None if ``verify_rate`` is 0 or the mode is ``frozen``."""
        return self._compiler.hit_check

    @kept_property
    def library(self) -> KernelLibrary:
        """The kernel library."""
        return self._opened(self._given_library)

    @kept_property
    def calls(self) -> Cache:
        """The recorded calls that made the programs in the cache, to query, show or transfer.

        They include compiles and links; renderings of kernels, analyses (``resource_usage``, ``sass``) and prewarm runs
        (:mod:`~cuda_progcache.provenance.steps`); and calls with small results that are saved in this cache, such as
        those of a function memoized with it.
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
        """Compile a program, or return its binary from the cache.

        Parameters
        ----------
        code : str or bytes
            CUDA C++, PTX or NVVM IR. The former name of this argument, ``source``, is still accepted.
        code_type : {"c++", "ptx", "nvvm"}
        options : ProgramOptions or mapping, optional
            Our ``ProgramOptions`` or those of ``cuda.core``; the default for ``arch`` is the current device's.
        target_type : {"cubin", "ptx", "ltoir"}
        name_expressions : iterable of str or bytes, optional
            Template instances to make.
        logs : object with ``write``, optional
            Receives the compiler's log, also on a hit.

        Returns
        -------
        CompiledProgram

        Raises
        ------
        CompileError
            If the compiler refuses the program.
        ArchError
            If the compiler doesn't know the architecture, or none is given and there is no device.
        ValueError, TypeError
            For invalid inputs, before any compile.
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
        """Compile a kernel of the library, or return it from the cache.

        Parameters
        ----------
        name : str
            The kernel's name.
        arch : str, or list or tuple of str
            Such as ``"sm_90"``. Several architectures are compiled in parallel; each has its own entry.
        target_type : {"cubin", "ptx", "ltoir"}
        **params
            The kernel's parameters; omitted parameters have their defaults.

        Returns
        -------
        CompiledProgram, or for a list of architectures a dict of programs by architecture

        Raises
        ------
        KernelNotFoundError, ParameterError, ArchError
            For an unknown name or a value that isn't allowed, before any compile; the message suggests the nearest.
        TemplateError
            If the template can't be rendered with these parameters.
        CompileError
            If the compiler refuses the rendered source; diagnostics name the template's line.
        """
        rendered = self.library.render(name, **params)
        compiler = self._compiler
        if not isinstance(arch, list | tuple):
            return self._used(compiler.unit(rendered, arch, target_type))
        units = {one: compiler.unit(rendered, one, target_type) for one in arch}
        return _side_by_side({one: functools.partial(self._used, unit) for one, unit in units.items()})

    def _used(self, unit: KernelUnit) -> CompiledProgram:
        """Compile a kernel and record its use. A prewarm doesn't call this: it uses no kernels."""
        try:
            done = self._compiler.compile_kernel(unit)
        except FrozenMissError as miss:
            options = self._command_options(self.library)
            raise miss.with_options(options) if options else miss from None
        if recording.wanted():
            recording.note_kernel(done, unit.kernel, unit.compiles)
        return done

    def _command_options(self, library: KernelLibrary) -> str:
        """Return the command-line options that select a library and its headers; empty for the bundled library."""
        import shlex

        from cuda_progcache.service.manifest import bundled_library

        words = [] if library.path == bundled_library() else ["--manifest", os.path.abspath(library.path)]
        for folder in self._compiler.include_path:
            words += ["-I", os.path.abspath(folder)]
        return shlex.join(words)

    def record(self, path: str | os.PathLike[str] | None = None) -> recording.record:
        """Record the programs that are used while the block is open: ``with service.record("run.json"):``.

        The recording covers the whole process: this service, other services and :class:`~cuda_progcache.Program`.
        ``CUDA_PROGCACHE_RECORD=run.json`` records a run with all of its processes.

        Parameters
        ----------
        path : str or os.PathLike, optional
            A file to append to (:mod:`~cuda_progcache.compile.recording`). None: the programs are only in the
            ``programs`` attribute of the object that the block receives.

        Returns
        -------
        cuda_progcache.record
            A context manager.

        Raises
        ------
        OSError
            If the file can't be written.
        """
        return recording.record(path)

    def explain(self, digest: str) -> tuple[str, ...]:
        """Return why an entry had to be compiled: the differences from the nearest earlier compile.

        Parameters
        ----------
        digest : str
            The digest of an entry, or at least its first 4 digits.

        Returns
        -------
        tuple of str
            A sentence per difference, or ``("first compile of this program",)``.

        Raises
        ------
        KeyError
            If there is no such entry, or it was put into the cache by hand.
        AmbiguousDigestError
            If several digests begin with these digits.
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
        """Compile the variants of a library for some architectures, or the programs of a lockfile, in parallel.

        Programs that are in the cache already are hits, so an interrupted prewarm can be continued. Light programs are
        compiled in threads. If several programs include many headers (cub, thrust, cooperative groups), worker
        processes compile them. A worker process precompiles the headers that three or more of the programs begin with;
        the binaries are the same.

        Parameters
        ----------
        library : KernelLibrary or path, optional
            None: the service's library.
        archs : iterable of str
            ``["sm_80", "sm_90"]``; not with ``lock``, which names the architectures.
        jobs : int, optional
            How many programs are compiled at once; None: one per CPU. A cache without a directory uses threads only.
        kernels : iterable of str, optional
            Only these kernels, of the library or of the lock.
        lock : Lock or path, optional
            Compile exactly the programs that a lockfile lists.
        dry_run : bool
            Compile nothing: programs that aren't in the cache are ``"missing"`` in the report, with the reasons.
        on_progress : callable, optional
            Called with (item, done, total) in the calling thread after each variant.
        on_start : callable, optional
            Called in the same way when a compile begins; the item's status is ``"compiling"``.
        executor : concurrent.futures.Executor, optional
            Compiles in place of the current process: a process pool, or a Dask client's ``get_executor()``. Its workers
            need this package, the library's folder, and a tier or directory of this cache that they share. They return
            keys, not programs. ``jobs`` is then the number of workers; None: the number that the executor reports.

        Returns
        -------
        PrewarmReport
            It lists every failure: a kernel that doesn't compile raises no exception.

        Raises
        ------
        KernelNotFoundError, ArchError, ManifestError, LockError, OptionError
            For wrong input, before any compile.
        """
        from cuda_progcache.errors import KernelNotFoundError
        from cuda_progcache.service.prewarm import prewarm, variants

        library = self._library(library)
        chosen = None if kernels is None else tuple(dict.fromkeys(kernels))
        locked: Lock | None = None
        if lock is None:
            archs = tuple(dict.fromkeys(archs))
            wanted = variants(library, archs, chosen)
        else:
            locked = _lock(lock, archs)
            for name in chosen or ():
                if all(one.kernel != name for one in locked.programs):
                    raise KernelNotFoundError(f"the lockfile has no program of the kernel {name!r}")
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
        """Make a lock of the programs that a deploy needs: those of recorded runs and those that a library lists.

        Parameters
        ----------
        recordings : iterable of path
            Recordings of runs (:meth:`record`). Programs that weren't cached are left out.
        library : KernelLibrary or path, optional
            Used with ``archs``; None: the service's library.
        archs : iterable of str
            Lock the library's variants for these architectures; if empty, none. Variants that aren't in the cache are
            locked without a key.
        kernels : iterable of str, optional
            Only these kernels of the library.

        Returns
        -------
        Lock

        Raises
        ------
        RecordingError, KernelNotFoundError, ArchError, ManifestError
            For wrong input.
        OSError
            If a recording can't be read.
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
        """Report, for each program that a deploy needs, whether it is in the cache and why not; compile nothing.

        Each program is looked up as in a frozen run; the reasons are those of :class:`FrozenMissError`.

        Parameters
        ----------
        lock : Lock or path, optional
            The programs needed. A program whose key in the cache isn't the locked key is stale.
        library, archs, kernels
            The variants to check, as for :meth:`prewarm`. With a lock, ``library`` is the library of its kernels, and
            the others can't be given.

        Returns
        -------
        Proof

        Raises
        ------
        LockError, KernelNotFoundError, ArchError, ManifestError, OptionError
            For wrong input.
        """
        from cuda_progcache.service.prewarm import variants
        from cuda_progcache.service.proof import prove

        library = self._library(library)
        asked = _lock(lock, archs, kernels) if lock is not None else variants(library, archs, kernels)
        return prove(self._compiler, library, asked, self._command_options(library))

    def _library(self, given: KernelLibrary | str | os.PathLike[str] | None) -> KernelLibrary:
        return self.library if given is None else self._opened(given)

    def _opened(self, given: KernelLibrary | str | os.PathLike[str] | None) -> KernelLibrary:
        from cuda_progcache.service.manifest import KernelLibrary

        return given if isinstance(given, KernelLibrary) else KernelLibrary(given, mode=self.mode)


def _lock(
    given: Lock | str | os.PathLike[str], archs: Iterable[str] = (), kernels: Iterable[str] | None = None
) -> Lock:
    """Read a lockfile. It names the architectures and kernels itself, so none may be given."""
    from cuda_progcache.errors import OptionError
    from cuda_progcache.service.lock import Lock

    for named, what in ((tuple(archs), "architectures"), (kernels, "kernels")):
        if named:
            raise OptionError(f"{what} can't be given together with a lockfile, which names its own")
    return given if isinstance(given, Lock) else Lock.read(given)


def _side_by_side(work: Mapping[str, Callable[[], CompiledProgram]]) -> dict[str, CompiledProgram]:
    """Run several compiles in threads; NVRTC releases the GIL."""
    if not work:
        raise ArchError("no architecture: give arch='sm_90', or several in a list")
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1)) as pool:
        futures = {arch: pool.submit(here(job)) for arch, job in work.items()}
        return {arch: future.result() for arch, future in futures.items()}

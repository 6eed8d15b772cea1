# SPDX-License-Identifier: Apache-2.0
"""Compiler options and their translation to flags, without a slow import.

:class:`ProgramOptions` and :class:`LinkerOptions` have the fields, defaults and
checks of the classes of these names in :mod:`cuda.core`, whose import takes 0.15-0.3 s.
Every function that takes options takes either package's class. Both give the same
flags, and so the same key. The spellings of flags are those of NVRTC, libNVVM and
nvJitLink; ``tests/keys/test_options.py`` compares every field with
``cuda.core``'s ``as_bytes``.
"""

from __future__ import annotations

import marshal
from collections.abc import Mapping, Sequence

from cuda_progcache._util.fields import NamedTuple, dataclass, replace
from cuda_progcache.errors import ArchError, OptionError, and_theirs
from cuda_progcache.keys.flags import ARCH, REPEATABLE, facts, read_flags
from cuda_progcache.keys.option_tables import (
    NVJITLINK,
    NVJITLINK_BOOLEANS,
    NVRTC,
    NVVM,
    NVVM_REFUSES_GIVEN,
    NVVM_REFUSES_TRUE,
    PTX_TO_LINKER,
    emit,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_NAME = "default_program"


def as_options(given: Any, kind: type[ProgramOptions | LinkerOptions]) -> Any:
    """Return options, given as options, as a mapping of fields, or as None for the defaults.

    Parameters
    ----------
    given : None, mapping or options
        Options may be this package's or ``cuda.core``'s.
    kind : type
        The class of this package to return or to which the given options correspond.

    Raises
    ------
    TypeError
        ``given`` is something else, or has an unknown field.
    """
    if given is None:
        return kind()
    if isinstance(given, Mapping):
        return kind(**given)
    if not hasattr(given, "as_bytes") or hasattr(given, "std") != (kind is ProgramOptions):
        raise TypeError(
            f"options must be {kind.__name__} (ours or cuda.core's) or a mapping of its fields, got {given!r}"
        )
    return given


def with_plain_arch(options: Any, target_type: str) -> Any:
    """Return options with no white space around the architecture; of the compilers, only NVRTC ignores some of it.

    Raises
    ------
    ArchError
        There is no architecture, or it is virtual although the target is machine code.
    """
    arch = options.arch
    plain = arch.strip() if isinstance(arch, str) else ""
    if not plain:
        raise ArchError(f"arch={arch!r} is not an architecture: set arch='sm_90', for example")
    if target_type == "cubin" and plain.startswith("compute_"):
        raise ArchError(
            f"{plain} is a virtual architecture, for which NVRTC makes no machine code (its cubin is empty): "
            f"set arch='sm_{plain.removeprefix('compute_')}', or compile to PTX"
        )
    return options if plain == arch else replace(options, arch=plain)


def nvrtc_flags(options: Any) -> list[str]:
    """Return NVRTC's flags for ``options`` (this package's or ``cuda.core``'s), ``-arch`` first."""
    if not _is_plain(options, ProgramOptions):
        return [flag.decode() for flag in options.as_bytes("nvrtc")]
    return _nvrtc_flags(options)


def _is_plain(options: Any, kind: type[ProgramOptions | LinkerOptions]) -> bool:
    """Return whether options have this class's own ``as_bytes``, not overridden in a subclass or the object."""
    return getattr(type(options), "as_bytes", None) is kind.as_bytes and "as_bytes" not in vars(options)


def _nvrtc_flags(options: ProgramOptions) -> list[str]:
    return _with_extra([f"-arch={options.arch}", *emit(NVRTC, options)], options)


def nvvm_flags(options: Any, target_type: str | None) -> list[str]:
    """Return libNVVM's flags for ``options``, with ``-gen-lto`` for ``target_type="ltoir"``.

    Raises
    ------
    OptionError
        libNVVM doesn't have one of the options.
    """
    if not _is_plain(options, ProgramOptions):
        return [flag.decode() for flag in options.as_bytes("nvvm", target_type)]
    return _nvvm_flags(options, target_type)


def _nvvm_flags(options: ProgramOptions, target_type: str | None) -> list[str]:
    refused = [name for name in NVVM_REFUSES_GIVEN if getattr(options, name) is not None]
    refused += [name for name in NVVM_REFUSES_TRUE if getattr(options, name)]
    if refused:
        ordered = [name for name in vars(options) if name in refused]
        error = and_theirs(OptionError, "cuda.core._utils.cuda_utils", "CUDAError")
        raise error(f"The following options are not supported by NVVM backend: {', '.join(ordered)}")
    arch = options.arch or ""
    if arch.startswith("sm_"):
        arch = f"compute_{arch[3:]}"
    flags = _with_extra([f"-arch={arch}", *emit(NVVM, options)], options)
    if target_type == "ltoir" and "-gen-lto" not in flags:
        flags.append("-gen-lto")
    return flags


def linker_flags(options: Any) -> list[str]:
    """Return nvJitLink's flags for linker options, or for program options, some of which apply to PTX input."""
    if hasattr(options, "std"):  # program options
        flags = emit({name: NVJITLINK[name] for name in NVJITLINK if name in PTX_TO_LINKER}, options)
    elif not _is_plain(options, LinkerOptions):
        return _for_lto([flag.decode() for flag in options.as_bytes()])
    else:
        flags = emit(NVJITLINK, options)
    return _with_extra(_for_lto(flags), options)


def _for_lto(flags: list[str]) -> list[str]:
    """Return the flags in a spelling that nvJitLink's LTO step accepts, too."""
    split = ((flag, *flag.partition("=")) for flag in flags)
    return [
        f"{name}={_DIGITS[value]}" if name in NVJITLINK_BOOLEANS and value in _DIGITS else flag
        for flag, name, _, value in split
    ]


_DIGITS = {"true": "1", "false": "0"}


def _with_extra(flags: list[str], options: Any) -> list[str]:
    """Return the flags of the fields, followed by the options' ``extra_flags``.

    Raises
    ------
    OptionError
        An option is given twice with different values, or ``extra_flags`` has the architecture.
    """
    extra = getattr(options, "extra_flags", None)
    if not extra:
        return flags
    extra = [extra] if isinstance(extra, str) else list(extra)
    given = {flag.name: flag for flag in read_flags(flags)}
    for flag in read_flags(extra):
        shown = " ".join(flag.words)
        if flag.name == ARCH:
            raise OptionError(f"extra_flags has {shown}: the architecture is a field, set arch= instead")
        before = given.setdefault(flag.name, flag)
        if flag.name not in REPEATABLE and before.value != flag.value:
            raise OptionError(
                f"an option is given twice with different values, {' '.join(before.words)} and {shown}: give it once"
            )
    return flags + extra


def unknown_fields(options: Any) -> tuple[tuple[str, str], ...]:
    """Return the fields of a newer ``cuda.core`` that this version doesn't know. They are keyed verbatim."""
    if isinstance(options, ProgramOptions):
        return ()
    from dataclasses import fields

    known = {f.name for f in fields(ProgramOptions)}
    values = ((f.name, getattr(options, f.name)) for f in fields(options) if f.name not in known)
    return tuple((name, repr(value)) for name, value in values if value is not None)


class Translation(NamedTuple):
    """The translation of options: the compiler's flags, the include directories among them, and unknown fields."""

    flags: tuple[str, ...]
    include_dirs: tuple[str, ...]
    unknown_fields: tuple[tuple[str, str], ...]


_translations: dict[tuple[type, str, str, bytes], Translation] = {}
_MAX_TRANSLATIONS = 256


def translate(options: Any, code_type: str, target_type: str) -> Translation:
    """Return the flags for a compile of ``code_type`` to ``target_type``.

    Translations are cached by the values of all fields, since options are mutable and have more than fifty fields.
    marshal distinguishes ``1`` from ``True`` and a list from a tuple, and copies the current values. For a class with
    its own ``as_bytes``, nothing is cached.
    """
    kind = type(options)
    if getattr(kind, "as_bytes", None) is not ProgramOptions.as_bytes and not kind.__module__.startswith("cuda.core."):
        return _translate(options, code_type, target_type)
    try:
        slot = (kind, code_type, target_type, marshal.dumps(tuple(vars(options).values()), 2))
    except (TypeError, ValueError):  # a value of a class that can't be marshalled isn't cached
        return _translate(options, code_type, target_type)
    known = _translations.get(slot)
    if known is None:
        known = _translate(options, code_type, target_type)
        if options.use_bundled_headers:  # their directory depends on the environment
            return known
        if len(_translations) >= _MAX_TRANSLATIONS:
            _translations.clear()
        _translations[slot] = known
    return known


def _translate(options: Any, code_type: str, target_type: str) -> Translation:
    if code_type == "nvvm":
        flags = nvvm_flags(options, target_type)
    elif code_type == "ptx":
        flags = linker_flags(options)
        if target_type == "ptx":
            flags.append("-ptx")
    else:
        flags = nvrtc_flags(options)
        if target_type == "ltoir" and "dlink-time-opt" not in facts(tuple(flags)).names:
            flags.append("--dlink-time-opt")  # without it, NVRTC makes no LTO-IR
    return Translation(tuple(flags), facts(tuple(flags), code_type).include_dirs, unknown_fields(options))


@dataclass
class ProgramOptions:
    """Options of one program: the fields of :class:`cuda.core.ProgramOptions` (documented there), and ``extra_flags``.

    Parameters
    ----------
    name : str
        The name of the program: NVRTC's file name in diagnostics, and the name of the ``ObjectCode``.
    arch : str, optional
        ``"sm_90"`` (real) or ``"compute_90"`` (virtual). The default is the current device's architecture at the time
        of a compile; without a device, a compile raises :class:`~cuda_progcache.errors.ArchError`, which lists the
        architectures that the compiler supports.
    extra_flags : str or sequence of str, optional
        Compiler flags that have no field, as words, passed on verbatim after the flags of the fields:
        ``("-Werror=reorder", "--fmax-errors", "3")``. They are in the key, in order, and mean the same as in a field:
        ``-I dir`` is searched for headers, whose content is in the key, and ``-G`` is ``debug=True``.

    Raises
    ------
    TypeError, ValueError
        ``name``, ``extra_sources`` or ``extra_flags`` is malformed.
    """

    name: str | None = DEFAULT_NAME
    arch: str | None = None
    relocatable_device_code: bool | None = None
    extensible_whole_program: bool | None = None
    debug: bool | None = None
    lineinfo: bool | None = None
    device_code_optimize: bool | None = None
    ptxas_options: str | Sequence[str] | None = None
    max_register_count: int | None = None
    ftz: bool | None = None
    prec_sqrt: bool | None = None
    prec_div: bool | None = None
    fma: bool | None = None
    use_fast_math: bool | None = None
    extra_device_vectorization: bool | None = None
    link_time_optimization: bool | None = None
    gen_opt_lto: bool | None = None
    define_macro: str | tuple[str, str] | Sequence[str | tuple[str, str]] | None = None
    undefine_macro: str | Sequence[str] | None = None
    include_path: str | Sequence[str] | None = None
    use_bundled_headers: bool | None = None
    pre_include: str | Sequence[str] | None = None
    no_source_include: bool | None = None
    std: str | None = None
    builtin_move_forward: bool | None = None
    builtin_initializer_list: bool | None = None
    disable_warnings: bool | None = None
    restrict: bool | None = None
    device_as_default_execution_space: bool | None = None
    device_int128: bool | None = None
    optimization_info: str | None = None
    no_display_error_number: bool | None = None
    diag_error: int | Sequence[int] | None = None
    diag_suppress: int | Sequence[int] | None = None
    diag_warn: int | Sequence[int] | None = None
    brief_diagnostics: bool | None = None
    time: str | None = None
    split_compile: int | None = None
    fdevice_syntax_only: bool | None = None
    minimal: bool | None = None
    no_cache: bool | None = None
    fdevice_time_trace: str | None = None
    device_float128: bool | None = None
    frandom_seed: str | None = None
    ofast_compile: str | None = None
    pch: bool | None = None
    create_pch: str | None = None
    use_pch: str | None = None
    pch_dir: str | None = None
    pch_verbose: bool | None = None
    pch_messages: bool | None = None
    instantiate_templates_in_pch: bool | None = None
    extra_sources: Sequence[tuple[str, str | bytes | bytearray]] | None = None
    use_libdevice: bool | None = None
    numba_debug: bool | None = None
    extra_flags: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"ProgramOptions.name must be a str, got {type(self.name).__name__}")
        _check_extra_flags(self.extra_flags)
        if self.extra_sources is not None:
            _check_extra_sources(self.extra_sources)

    def as_bytes(self, backend: str, target_type: str | None = None) -> list[bytes]:
        """Return the flags for one compiler.

        Parameters
        ----------
        backend : str
            ``"nvrtc"`` or ``"nvvm"``, in any case.
        target_type : str, optional
            ``"ltoir"`` adds libNVVM's ``-gen-lto``.

        Returns
        -------
        list of bytes

        Raises
        ------
        ValueError
            The backend is another one.
        OptionError
            libNVVM doesn't have one of the options.
        """
        kind = backend.lower()
        if kind == "nvrtc":
            return [flag.encode() for flag in _nvrtc_flags(self)]
        if kind == "nvvm":
            return [flag.encode() for flag in _nvvm_flags(self, target_type)]
        raise ValueError(f"Unknown backend '{kind}'. Must be one of: 'nvrtc', 'nvvm'")

    def __repr__(self) -> str:
        return f"ProgramOptions(name={self.name!r}, arch={self.arch!r})"


@dataclass
class LinkerOptions:
    """Options of one link: the fields of :class:`cuda.core.LinkerOptions` (documented there), and ``extra_flags``.

    Parameters
    ----------
    extra_flags : str or sequence of str, optional
        Flags for nvJitLink that have no field, as in :class:`ProgramOptions`.
    """

    name: str | None = "<default linker>"
    arch: str | None = None
    max_register_count: int | None = None
    time: bool | None = None
    verbose: bool | None = None
    link_time_optimization: bool | None = None
    ptx: bool | None = None
    optimization_level: int | None = None
    debug: bool | None = None
    lineinfo: bool | None = None
    ftz: bool | None = None
    prec_div: bool | None = None
    prec_sqrt: bool | None = None
    fma: bool | None = None
    kernels_used: str | Sequence[str] | None = None
    variables_used: str | Sequence[str] | None = None
    optimize_unused_variables: bool | None = None
    ptxas_options: str | Sequence[str] | None = None
    split_compile: int | None = None
    split_compile_extended: int | None = None
    no_cache: bool | None = None
    numba_debug: bool | None = None
    extra_flags: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        _check_extra_flags(self.extra_flags)

    def as_bytes(self, backend: str = "nvjitlink") -> list[bytes]:
        """Return the flags for nvJitLink, spelled as in ``cuda.core``.

        Raises
        ------
        ValueError
            ``backend`` is another one.
        """
        if backend.lower() != "nvjitlink":
            raise ValueError(f"as_bytes() only supports 'nvjitlink' backend, got {backend!r}")
        return [flag.encode() for flag in _with_extra(emit(NVJITLINK, self), self)]


def _check_extra_flags(flags: Any) -> None:
    if flags is None or isinstance(flags, str):
        return
    if not isinstance(flags, Sequence) or not all(isinstance(flag, str) for flag in flags):
        raise TypeError(f"extra_flags must be a str or a sequence of them, got {flags!r}")


def _check_extra_sources(sources: Any) -> None:
    if not isinstance(sources, Sequence):
        raise TypeError("extra_sources must be a sequence of 2-tuples: ((name1, source1), (name2, source2), ...)")
    for i, module in enumerate(sources):
        if not isinstance(module, tuple) or len(module) != 2:
            raise TypeError(
                f"Each extra module must be a 2-tuple (name, source), got {type(module).__name__} at index {i}"
            )
        name, source = module
        if not isinstance(name, str):
            raise TypeError(f"Module name at index {i} must be a string, got {type(name).__name__}")
        if not isinstance(source, str | bytes | bytearray):
            raise TypeError(
                f"Module source at index {i} must be str (textual LLVM IR), bytes or bytearray (textual LLVM IR or "
                f"bitcode), got {type(source).__name__}"
            )
        if not source:
            raise ValueError(f"Module source for '{name}' (index {i}) cannot be empty")

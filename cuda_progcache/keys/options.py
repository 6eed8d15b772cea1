# SPDX-License-Identifier: Apache-2.0
"""Compiler options, import-light, and the flags they become.

:class:`ProgramOptions` and :class:`LinkerOptions` have the fields, defaults and
checks of their namesakes in :mod:`cuda.core`, without importing it (0.15-0.3 s).
Everything that takes options takes either class; both give the same flags,
hence the same key. The flag spellings are those of NVRTC, libNVVM and
nvJitLink; ``tests/keys/test_options.py`` compares every field with
``cuda.core``'s ``as_bytes``.
"""

from __future__ import annotations

import marshal
from collections.abc import Callable, Iterator, Sequence

from cuda_progcache._util.fields import NamedTuple, dataclass
from cuda_progcache.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DEFAULT_NAME = "default_program"
INCLUDE_PATH, PRE_INCLUDE = "--include-path=", "--pre-include="
BUNDLED_HEADERS = "--use-bundled-headers="

_Flags = Iterator[str]


def _on(flag: str) -> Callable[[Any], _Flags]:
    """``flag`` when the value is truthy."""

    def emit(value: Any) -> _Flags:
        if value:
            yield flag

    return emit


def _exactly_true(flag: str) -> Callable[[Any], _Flags]:
    """``flag`` when the value is ``True`` itself (nvJitLink's gate for ``no_cache``)."""

    def emit(value: Any) -> _Flags:
        if value is True:
            yield flag

    return emit


def _given(flag: str) -> Callable[[Any], _Flags]:
    """``flag`` whatever the value, ``False`` too (nvJitLink's gate for ``time``)."""
    return lambda _: iter((flag,))


def _boolean(flag: str, true: str = "true", false: str = "false") -> Callable[[Any], _Flags]:
    """``flag=true`` or ``flag=false``."""

    def emit(value: Any) -> _Flags:
        yield f"{flag}={true if value else false}"

    return emit


def _value(flag: str) -> Callable[[Any], _Flags]:
    """``flag=value`` for any value."""

    def emit(value: Any) -> _Flags:
        yield f"{flag}={value}"

    return emit


def _exactly_boolean(flag: str, true: str, false: str) -> Callable[[Any], _Flags]:
    """``flag=true`` for ``True`` itself, ``flag=false`` for ``False`` itself, nothing for other values."""

    def emit(value: Any) -> _Flags:
        if value is True or value is False:
            yield f"{flag}={true if value else false}"

    return emit


def _each(flag: str, scalar: type = str) -> Callable[[Any], _Flags]:
    """``flag=value``, once per element of a sequence; values of another kind are ignored, as the peer does."""

    def emit(value: Any) -> _Flags:
        if isinstance(value, scalar):
            yield f"{flag}={value}"
        elif isinstance(value, Sequence):
            for element in value:
                yield f"{flag}={element}"

    return emit


def _macros(value: Any) -> _Flags:
    def one(macro: Any) -> str | None:
        if isinstance(macro, str):
            return f"--define-macro={macro}"
        if isinstance(macro, tuple):
            if len(macro) != 2 or not all(isinstance(part, str) for part in macro):
                raise OptionError(f"Expected define_macro tuple[str, str], got {macro}")
            return f"--define-macro={macro[0]}={macro[1]}"
        return None

    flag = one(value)
    if flag is not None:
        yield flag
        return
    if not isinstance(value, Sequence) or not value:
        raise OptionError(f"Expected define_macro str, tuple[str, str] or a list of them, got {value}")
    for macro in value:
        flag = one(macro)
        if flag is None:
            raise OptionError(f"Expected define_macro str or tuple[str, str], got {macro}")
        yield flag


def _bundled_headers(value: Any) -> _Flags:
    if value:
        yield f"--use-bundled-headers={bundled_headers_dir()}"


def bundled_headers_dir() -> str:
    """The directory into which NVRTC installs its bundled headers: the one that ``cuda.core`` uses too."""
    import os

    if os.name == "nt":
        root = os.environ.get("LOCALAPPDATA") or os.path.join(os.path.expanduser("~"), "AppData", "Local")
    else:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "cuda-python", "nvrtc-bundled-headers")


# Field -> how NVRTC is told. Order is the order of the flags. A field that is None emits nothing.
NVRTC: dict[str, Callable[[Any], _Flags]] = {
    "relocatable_device_code": _boolean("--relocatable-device-code"),
    "extensible_whole_program": _on("--extensible-whole-program"),
    "debug": _on("--device-debug"),
    "lineinfo": _on("--generate-line-info"),
    "device_code_optimize": _on("--dopt=on"),
    "ptxas_options": _each("--ptxas-options"),
    "max_register_count": _value("--maxrregcount"),
    "ftz": _boolean("--ftz"),
    "prec_sqrt": _boolean("--prec-sqrt"),
    "prec_div": _boolean("--prec-div"),
    "fma": _boolean("--fmad"),
    "use_fast_math": _on("--use_fast_math"),
    "extra_device_vectorization": _on("--extra-device-vectorization"),
    "link_time_optimization": _on("--dlink-time-opt"),
    "gen_opt_lto": _on("--gen-opt-lto"),
    "define_macro": _macros,
    "undefine_macro": _each("--undefine-macro"),
    "use_bundled_headers": _bundled_headers,
    "include_path": _each("--include-path"),
    "pre_include": _each("--pre-include"),
    "no_source_include": _on("--no-source-include"),
    "std": _value("--std"),
    "builtin_move_forward": _boolean("--builtin-move-forward"),
    "builtin_initializer_list": _boolean("--builtin-initializer-list"),
    "disable_warnings": _on("--disable-warnings"),
    "restrict": _on("--restrict"),
    "device_as_default_execution_space": _on("--device-as-default-execution-space"),
    "device_int128": _on("--device-int128"),
    "device_float128": _on("--device-float128"),
    "optimization_info": _value("--optimization-info"),
    "no_display_error_number": _on("--no-display-error-number"),
    "diag_error": _each("--diag-error", int),
    "diag_suppress": _each("--diag-suppress", int),
    "diag_warn": _each("--diag-warn", int),
    "brief_diagnostics": _boolean("--brief-diagnostics"),
    "time": _value("--time"),
    "split_compile": _value("--split-compile"),
    "fdevice_syntax_only": _on("--fdevice-syntax-only"),
    "minimal": _on("--minimal"),
    "no_cache": _on("--no-cache"),
    "fdevice_time_trace": _value("--fdevice-time-trace"),
    "frandom_seed": _value("--frandom-seed"),
    "ofast_compile": _value("--Ofast-compile"),
    "pch": _on("--pch"),
    "create_pch": _value("--create-pch"),
    "use_pch": _value("--use-pch"),
    "pch_dir": _value("--pch-dir"),
    "pch_verbose": _boolean("--pch-verbose"),
    "pch_messages": _boolean("--pch-messages"),
    "instantiate_templates_in_pch": _boolean("--instantiate-templates-in-pch"),
    "numba_debug": _on("--numba-debug"),
}

NVVM: dict[str, Callable[[Any], _Flags]] = {
    "debug": _on("-g"),
    "device_code_optimize": _exactly_boolean("-opt", "3", "0"),
    "ftz": _boolean("-ftz", "1", "0"),
    "prec_sqrt": _boolean("-prec-sqrt", "1", "0"),
    "prec_div": _boolean("-prec-div", "1", "0"),
    "fma": _boolean("-fma", "1", "0"),
    "numba_debug": _on("-numba-debug"),
}

# libNVVM has no such option: refused when given at all / when truthy.
_NVVM_REFUSES_GIVEN = (
    "relocatable_device_code",
    "ptxas_options",
    "max_register_count",
    "define_macro",
    "undefine_macro",
    "include_path",
    "pre_include",
    "std",
    "builtin_move_forward",
    "builtin_initializer_list",
    "optimization_info",
    "diag_error",
    "diag_suppress",
    "diag_warn",
    "brief_diagnostics",
    "time",
    "split_compile",
)
_NVVM_REFUSES_TRUE = (
    "extensible_whole_program",
    "lineinfo",
    "use_fast_math",
    "extra_device_vectorization",
    "gen_opt_lto",
    "use_bundled_headers",
    "no_source_include",
    "disable_warnings",
    "restrict",
    "device_as_default_execution_space",
    "device_int128",
    "no_display_error_number",
    "fdevice_syntax_only",
    "minimal",
)

NVJITLINK: dict[str, Callable[[Any], _Flags]] = {
    "arch": _value("-arch"),
    "max_register_count": _value("-maxrregcount"),
    "time": _given("-time"),
    "verbose": _on("-verbose"),
    "link_time_optimization": _on("-lto"),
    "ptx": _on("-ptx"),
    "optimization_level": lambda level: iter((f"-O{level}",)),
    "debug": _on("-g"),
    "lineinfo": _on("-lineinfo"),
    # 1 and 0: true and false, which cuda.core writes, are refused by nvJitLink's LTO step.
    "ftz": _boolean("-ftz", "1", "0"),
    "prec_div": _boolean("-prec-div", "1", "0"),
    "prec_sqrt": _boolean("-prec-sqrt", "1", "0"),
    "fma": _boolean("-fma", "1", "0"),
    "kernels_used": _each("-kernels-used"),
    "variables_used": _each("-variables-used"),
    "optimize_unused_variables": _on("-optimize-unused-variables"),
    "ptxas_options": _each("-Xptxas"),
    "split_compile": _value("-split-compile"),
    "split_compile_extended": _value("-split-compile-extended"),
    "no_cache": _exactly_true("-no-cache"),
}

# What of ProgramOptions reaches the linker when the input is PTX.
_PTX_TO_LINKER = (
    "arch",
    "max_register_count",
    "time",
    "link_time_optimization",
    "debug",
    "lineinfo",
    "ftz",
    "prec_div",
    "prec_sqrt",
    "fma",
    "ptxas_options",
    "split_compile",
    "no_cache",
)


def _emit(table: dict[str, Callable[[Any], _Flags]], options: Any) -> list[str]:
    given = [name for name, value in vars(options).items() if value is not None and name in table]
    if len(given) > 1:
        given = [name for name in table if name in given]
    return [flag for name in given for flag in table[name](getattr(options, name))]


def nvrtc_flags(options: Any) -> list[str]:
    """The flags NVRTC gets for ``options`` (ours or ``cuda.core``'s), ``-arch`` first."""
    if not isinstance(options, ProgramOptions):
        return [flag.decode() for flag in options.as_bytes("nvrtc")]
    return [f"-arch={options.arch}", *_emit(NVRTC, options)]


def nvvm_flags(options: Any, target_type: str | None) -> list[str]:
    """The flags libNVVM gets for ``options``; ``-gen-lto`` is added for ``target_type="ltoir"``.

    Raises
    ------
    OptionError
        For an option that libNVVM doesn't have.
    """
    if not isinstance(options, ProgramOptions):
        return [flag.decode() for flag in options.as_bytes("nvvm", target_type)]
    refused = [name for name in _NVVM_REFUSES_GIVEN if getattr(options, name) is not None]
    refused += [name for name in _NVVM_REFUSES_TRUE if getattr(options, name)]
    if refused:
        ordered = [name for name in vars(options) if name in refused]
        raise OptionError(f"The following options are not supported by NVVM backend: {', '.join(ordered)}")
    arch = options.arch or ""
    if arch.startswith("sm_"):
        arch = f"compute_{arch[3:]}"
    flags = [f"-arch={arch}", *_emit(NVVM, options)]
    if target_type == "ltoir" and "-gen-lto" not in flags:
        flags.append("-gen-lto")
    return flags


def linker_flags(options: Any) -> list[str]:
    """The flags nvJitLink gets for ``options``: linker options, or program options, of which PTX input reads a part."""
    if not isinstance(options, LinkerOptions) and not hasattr(options, "std"):
        return [flag.decode() for flag in options.as_bytes()]
    if hasattr(options, "std"):  # program options: only these reach the linker
        return _emit({name: NVJITLINK[name] for name in NVJITLINK if name in _PTX_TO_LINKER}, options)
    return _emit(NVJITLINK, options)


def unknown_fields(options: Any) -> tuple[tuple[str, str], ...]:
    """Fields of a newer ``cuda.core`` than this version knows, with their values: keyed verbatim, never dropped."""
    if isinstance(options, ProgramOptions):
        return ()
    from dataclasses import fields

    known = {f.name for f in fields(ProgramOptions)}
    values = ((f.name, getattr(options, f.name)) for f in fields(options) if f.name not in known)
    return tuple((name, repr(value)) for name, value in values if value is not None)


class Translation(NamedTuple):
    """What options come to: the compiler's flags, the include directories among them, fields we don't know."""

    flags: tuple[str, ...]
    include_dirs: tuple[str, ...]
    unknown_fields: tuple[tuple[str, str], ...]


_translations: dict[tuple[type, str, str, bytes], Translation] = {}
_MAX_TRANSLATIONS = 256


def translate(options: Any, code_type: str, target_type: str) -> Translation:
    """The flags for a compile of ``code_type`` to ``target_type``.

    Remembered by the values of all fields, since options are mutable and there are some fifty of them to look at:
    marshal tells ``1`` from ``True`` and a list from a tuple, and takes what it is given as it is now.
    """
    try:
        slot = (type(options), code_type, target_type, marshal.dumps(tuple(vars(options).values()), 2))
    except (TypeError, ValueError):  # a value of some class of the user's: no memory for that
        return _translate(options, code_type, target_type)
    known = _translations.get(slot)
    if known is None:
        known = _translate(options, code_type, target_type)
        if options.use_bundled_headers:  # where they lie, the environment says
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
        if target_type == "ltoir" and "--dlink-time-opt" not in flags:
            flags.append("--dlink-time-opt")  # without it NVRTC makes no LTO-IR at all
    dirs = tuple(flag[len(INCLUDE_PATH) :] for flag in flags if flag.startswith(INCLUDE_PATH))
    return Translation(tuple(flags), dirs, unknown_fields(options))


@dataclass
class ProgramOptions:
    """Options of one program, field by field those of :class:`cuda.core.ProgramOptions` (documented there).

    Parameters
    ----------
    name : str
        Name of the program: NVRTC's file name in diagnostics, and the ``ObjectCode``'s name.
    arch : str, optional
        ``"sm_90"`` (real) or ``"compute_90"`` (virtual). Without it the current device's is taken when something is
        compiled; where there is no device, compiling raises :class:`~cuda_progcache.errors.ArchError` that lists
        what the compiler supports.

    Raises
    ------
    TypeError, ValueError
        For malformed ``extra_sources``.
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

    def __post_init__(self) -> None:
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"ProgramOptions.name must be a str, got {type(self.name).__name__}")
        if self.extra_sources is not None:
            _check_extra_sources(self.extra_sources)

    def as_bytes(self, backend: str, target_type: str | None = None) -> list[bytes]:
        """The flags for one compiler.

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
            For another backend.
        OptionError
            For an option that libNVVM doesn't have.
        """
        kind = backend.lower()
        if kind == "nvrtc":
            return [flag.encode() for flag in nvrtc_flags(self)]
        if kind == "nvvm":
            return [flag.encode() for flag in nvvm_flags(self, target_type)]
        raise ValueError(f"Unknown backend '{kind}'. Must be one of: 'nvrtc', 'nvvm'")

    def __repr__(self) -> str:
        return f"ProgramOptions(name={self.name!r}, arch={self.arch!r})"


@dataclass
class LinkerOptions:
    """Options of one nvJitLink step, field by field those of :class:`cuda.core.LinkerOptions` (documented there)."""

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

    def as_bytes(self, backend: str = "nvjitlink") -> list[bytes]:
        """The flags for nvJitLink (the only ``backend`` there is; another is a ValueError)."""
        if backend.lower() != "nvjitlink":
            raise ValueError(f"Unknown backend '{backend}'. Must be 'nvjitlink'")
        return [flag.encode() for flag in linker_flags(self)]


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

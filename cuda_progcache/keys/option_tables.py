# SPDX-License-Identifier: Apache-2.0
"""Tables of the flags to which option fields are translated, one for each compiler.

A field that is ``None`` gives no flag. The spellings, and the conditions under which a value gives a flag, are those of
``cuda.core``; ``tests/keys/test_options.py`` compares every field with its ``as_bytes``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cuda_progcache.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_Flags = Iterator[str]


def _on(flag: str) -> Callable[[Any], _Flags]:
    """Emit ``flag`` if the value is truthy."""

    def emit(value: Any) -> _Flags:
        if value:
            yield flag

    return emit


def _exactly_true(flag: str) -> Callable[[Any], _Flags]:
    """Emit ``flag`` if the value is ``True`` itself (nvJitLink's condition for ``no_cache``)."""

    def emit(value: Any) -> _Flags:
        if value is True:
            yield flag

    return emit


def _given(flag: str) -> Callable[[Any], _Flags]:
    """Emit ``flag`` for any value, even ``False`` (nvJitLink's condition for ``time``)."""
    return lambda _: iter((flag,))


def _boolean(flag: str, true: str = "true", false: str = "false") -> Callable[[Any], _Flags]:
    """Emit ``flag=true`` or ``flag=false``, by the value's truth."""

    def emit(value: Any) -> _Flags:
        yield f"{flag}={true if value else false}"

    return emit


def _value(flag: str) -> Callable[[Any], _Flags]:
    """Emit ``flag=value`` for any value."""

    def emit(value: Any) -> _Flags:
        yield f"{flag}={value}"

    return emit


def _exactly_boolean(flag: str, true: str, false: str) -> Callable[[Any], _Flags]:
    """Emit ``flag=true`` for ``True`` itself, ``flag=false`` for ``False`` itself, and nothing for other values."""

    def emit(value: Any) -> _Flags:
        if value is True or value is False:
            yield f"{flag}={true if value else false}"

    return emit


def _each(flag: str, scalar: type = str) -> Callable[[Any], _Flags]:
    """Emit ``flag=value`` once per element of a sequence; other values are ignored, as ``cuda.core`` does."""

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
    """Return the directory in which NVRTC installs its bundled headers, which is also ``cuda.core``'s."""
    import os

    if os.name == "nt":
        root = os.environ.get("LOCALAPPDATA") or os.path.join(os.path.expanduser("~"), "AppData", "Local")
    else:
        root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(root, "cuda-python", "nvrtc-bundled-headers")


# Fields, in the order of their flags, and how each is emitted for NVRTC. A field that is None emits nothing.
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

# Options that libNVVM doesn't have. They are refused if they are given at all, or if they are truthy.
NVVM_REFUSES_GIVEN = (
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
NVVM_REFUSES_TRUE = (
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
    "ftz": _boolean("-ftz"),
    "prec_div": _boolean("-prec-div"),
    "prec_sqrt": _boolean("-prec-sqrt"),
    "fma": _boolean("-fma"),
    "kernels_used": _each("-kernels-used"),
    "variables_used": _each("-variables-used"),
    "optimize_unused_variables": _on("-optimize-unused-variables"),
    "ptxas_options": _each("-Xptxas"),
    "split_compile": _value("-split-compile"),
    "split_compile_extended": _value("-split-compile-extended"),
    "no_cache": _exactly_true("-no-cache"),
}

# cuda.core writes "-ftz=true". nvJitLink accepts that, but its LTO step needs "-ftz=1".
NVJITLINK_BOOLEANS = frozenset({"-ftz", "-prec-div", "-prec-sqrt", "-fma"})

# The fields of ProgramOptions that are passed to the linker if the input is PTX.
PTX_TO_LINKER = (
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


def emit(table: dict[str, Callable[[Any], _Flags]], options: Any) -> list[str]:
    """Return the flags of the fields in a table, in the table's order."""
    given = [name for name, value in vars(options).items() if value is not None and name in table]
    if len(given) > 1:
        given = [name for name in table if name in given]
    return [flag for name in given for flag in table[name](getattr(options, name))]

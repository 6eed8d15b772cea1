# SPDX-License-Identifier: Apache-2.0
"""Lasting options: compiler options that still have an effect on later compiles of the same process.

NVRTC and nvJitLink keep some options for the rest of the process. After one compile with ``--restrict``, the pointers
of all later kernels are treated as restrict; after one with ``--device-debug``, the code of all later kernels differs.
``ci/lasting_options.py`` finds such options for any build: it compiles kernels with an option, then others without it,
and compares these with the output of a new process. These are its results for the libraries of 12.9.86, 13.0.88 and
13.5.37, which agree except for nvJitLink's ``-g``, which lasts only in 13.5:

    NVRTC      --restrict  --optimization-info  --device-debug  --Ofast-compile=max
    nvJitLink  -O0  -g
    libNVVM    none

An option that isn't in :data:`FORGOTTEN` is treated as lasting. So an untested option costs a separate process, but
never changes another program's code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from cuda_progcache.keys.flags import read_flags

#: The options of each library that have no effect on later compiles.
FORGOTTEN = {
    "nvrtc": frozenset(
        {
            "-arch",
            "--relocatable-device-code",
            "--extensible-whole-program",
            "--generate-line-info",
            "--dopt",
            "--ptxas-options",
            "--maxrregcount",
            "--ftz",
            "--prec-sqrt",
            "--prec-div",
            "--fmad",
            "--use_fast_math",
            "--extra-device-vectorization",
            "--dlink-time-opt",
            "--gen-opt-lto",
            "--define-macro",
            "--undefine-macro",
            "--use-bundled-headers",
            "--include-path",
            "--pre-include",
            "--no-source-include",
            "--std",
            "--builtin-move-forward",
            "--builtin-initializer-list",
            "--disable-warnings",
            "--device-as-default-execution-space",
            "--device-int128",
            "--device-float128",
            "--no-display-error-number",
            "--diag-error",
            "--diag-suppress",
            "--diag-warn",
            "--brief-diagnostics",
            "--time",
            "--split-compile",
            "--fdevice-syntax-only",
            "--minimal",
            "--no-cache",
            "--fdevice-time-trace",
            "--frandom-seed",
            "--pch-verbose",
            "--pch-messages",
            "--instantiate-templates-in-pch",
        }
    ),
    "nvJitLink": frozenset(
        {
            "-arch",
            "-maxrregcount",
            "-time",
            "-verbose",
            "-lto",
            "-ptx",
            "-O3",
            "-lineinfo",
            "-ftz",
            "-prec-div",
            "-prec-sqrt",
            "-fma",
            "-kernels-used",
            "-variables-used",
            "-optimize-unused-variables",
            "-Xptxas",
            "-split-compile",
            "-split-compile-extended",
            "-no-cache",
        }
    ),
    "nvvm": frozenset(
        {
            "-arch",
            "-g",
            "-opt",
            "-ftz",
            "-prec-sqrt",
            "-prec-div",
            "-fma",
            "-numba-debug",
            "-gen-lto",
        }
    ),
}
_FORGOTTEN = {
    library: frozenset(flag.name for name in names for flag in read_flags([name]))
    for library, names in FORGOTTEN.items()
}
# A precompiled header is valid only in the process that made it, so compiles that use one run in that process.
_PRECOMPILED = {"pch", "create-pch", "use-pch", "pch-dir"}


def lasting(library: str, flags: Iterable[str]) -> frozenset[str]:
    """Return the flags that last in a process, or may last.

    Parameters
    ----------
    library : {"nvrtc", "nvJitLink", "nvvm"}
    flags : iterable of str
        The flags as the library gets them.

    Returns
    -------
    frozenset of str
        The lasting flags. A process that was given some runs only jobs with the same lasting flags.
    """
    found = [flag for flag in read_flags(flags) if flag.name not in _FORGOTTEN[library]]
    kept = frozenset(" ".join(flag.words) for flag in found if flag.name not in _PRECOMPILED)
    return kept | {"--pch"} if any(flag.name in _PRECOMPILED for flag in found) else kept


# The last release of NVRTC that continues the numbers of calls in PTX ("callseq 1") across compiles of a process.
_LAST_TO_NUMBER_ON = (12, 6)
_BUILTINS = re.compile(r"libnvrtc-builtins(?:\.alt)?\.so\.(\d+)\.(\d+)")


def tells_of_others(files: Iterable[str], target_type: str) -> bool:
    """Return whether NVRTC's output depends on the earlier compiles of its process, whatever the options.

    Parameters
    ----------
    files : iterable of str
        The paths of NVRTC's files; the name of the builtins library contains the release.
    target_type : {"ptx", "cubin", "ltoir"}
        The type of the output.
    """
    if target_type != "ptx":
        return False
    found = [_BUILTINS.match(os.path.basename(os.path.realpath(file))) for file in files]
    return any(name is not None and (int(name[1]), int(name[2])) <= _LAST_TO_NUMBER_ON for name in found)

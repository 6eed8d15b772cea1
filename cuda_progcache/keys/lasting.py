# SPDX-License-Identifier: Apache-2.0
"""Options that a compiler forgets when the compile is over, and those that it doesn't.

NVRTC and nvJitLink keep some of what they are told for the rest of the process: after one compile with ``--restrict``
the pointers of every later kernel are taken as restrict, after one with ``--device-debug`` every later kernel comes
out as other code. ``ci/lasting_options.py`` finds them, for any build: it compiles kernels with an option and others
after it, and compares these with what a new process makes. What it found with the libraries of 12.9.86, 13.0.88 and
13.5.37 is below; they agree, but for nvJitLink's ``-g``, which 13.5 alone doesn't forget:

    NVRTC      --restrict  --optimization-info  --device-debug  --Ofast-compile=max
    nvJitLink  -O0  -g
    libNVVM    none

An option that isn't below is taken for one that lasts. So an option nobody has looked at costs a process of its own,
and never another program's code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from cuda_progcache.keys.flags import read_flags

#: Options of each library that a later compile doesn't see.
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
# A precompiled header serves the process that made it, so those that use one go to where it was made.
_PRECOMPILED = {"pch", "create-pch", "use-pch", "pch-dir"}


def lasting(library: str, flags: Iterable[str]) -> frozenset[str]:
    """Those of the flags that a process doesn't forget, or may not.

    Parameters
    ----------
    library : {"nvrtc", "nvJitLink", "nvvm"}
    flags : iterable of str
        As the library gets them.

    Returns
    -------
    frozenset of str
        A process that was given these serves jobs with the same ones alone.
    """
    found = [flag for flag in read_flags(flags) if flag.name not in _FORGOTTEN[library]]
    kept = frozenset(" ".join(flag.words) for flag in found if flag.name not in _PRECOMPILED)
    return kept | {"--pch"} if any(flag.name in _PRECOMPILED for flag in found) else kept


# The last release of NVRTC that numbers the calls in PTX ("callseq 1") on from one compile of a process to the next.
_LAST_TO_NUMBER_ON = (12, 6)
_BUILTINS = re.compile(r"libnvrtc-builtins(?:\.alt)?\.so\.(\d+)\.(\d+)")


def tells_of_others(files: Iterable[str], target_type: str) -> bool:
    """Whether an output of NVRTC tells how much its process had compiled before, whatever the options.

    Parameters
    ----------
    files : iterable of str
        Paths of NVRTC's files, of which the builtins' name has the release.
    target_type : {"ptx", "cubin", "ltoir"}
    """
    if target_type != "ptx":
        return False
    found = [_BUILTINS.match(os.path.basename(os.path.realpath(file))) for file in files]
    return any(name is not None and (int(name[1]), int(name[2])) <= _LAST_TO_NUMBER_ON for name in found)

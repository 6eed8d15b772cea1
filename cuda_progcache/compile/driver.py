# SPDX-License-Identifier: Apache-2.0
"""Whether the CUDA driver that is here, if one is, can load PTX: it loads none of a later CUDA than its own."""

from __future__ import annotations

import functools
import re

from cuda_progcache._util.warning import warn

# As NVRTC and libNVVM begin their PTX: "// Cuda compilation tools, release 13.5, V13.5.37".
_RELEASE = re.compile(rb"^// Cuda compilation tools, release (\d+)\.(\d+)", re.MULTILINE)


@functools.lru_cache(maxsize=1)
def driver_version() -> int | None:
    """The CUDA version of the driver as it gives it, 13050 for 13.5; None where there is no driver.

    Nothing is initialized by asking.
    """
    import ctypes
    import sys

    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def warn_of_older_driver(ptx: bytes) -> None:
    """Warn, as ``cuda.core`` does, of PTX that the driver is too old for; silent where there is no driver."""
    made = _RELEASE.search(ptx, 0, 1024)
    driver = driver_version() if made is not None else None
    if made is None or driver is None:
        return
    release = int(made[1]), int(made[2])
    if release > (known := (driver // 1000, driver % 1000 // 10)):
        warn(
            "The CUDA driver version is older than the backend version. The generated ptx will not be loadable by the "
            f"current driver (of CUDA {known[0]}.{known[1]}, the ptx of {release[0]}.{release[1]}).",
            RuntimeWarning,
        )

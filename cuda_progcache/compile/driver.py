# SPDX-License-Identifier: Apache-2.0
"""Checks whether the installed CUDA driver can load PTX: it refuses PTX of a newer CUDA release than its own."""

from __future__ import annotations

import functools
import re

from cuda_progcache._util.warning import warn

# The first line of PTX from NVRTC and libNVVM: "// Cuda compilation tools, release 13.5, V13.5.37".
_RELEASE = re.compile(rb"^// Cuda compilation tools, release (\d+)\.(\d+)", re.MULTILINE)


@functools.lru_cache(maxsize=1)
def driver_version() -> int | None:
    """Return the CUDA version that the driver reports (13050 for 13.5), or None without a driver.

    This doesn't initialize the driver.
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
    """Warn, as ``cuda.core`` does, if the driver is too old for this PTX. Without a driver, do nothing."""
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

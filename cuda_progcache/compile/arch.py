# SPDX-License-Identifier: Apache-2.0
"""Architectures: the device's where none was given, and what to say to one that doesn't exist."""

from __future__ import annotations

from cuda_progcache._util.fields import replace
from cuda_progcache.errors import ArchError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def with_arch(options: Any) -> Any:
    """Options with an architecture: the current device's, where none was given.

    Raises
    ------
    ArchError
        If there is none and no device to ask; the message lists what the compiler supports.
    """
    if options.arch is not None:
        return options
    try:
        from cuda.core import Device

        return replace(options, arch=f"sm_{Device().arch}")
    except Exception as error:  # the driver's absence shows as several exception types
        raise ArchError(
            f"no architecture was given and there is no CUDA device to ask ({type(error).__name__}); "
            f"set arch= to one of {', '.join(_supported())}"
        ) from error


def check_arch(arch: str) -> None:
    """Refuse an architecture that the installed NVRTC doesn't know, naming the nearest.

    Raises
    ------
    ArchError
    """
    supported = _supported()
    base = arch.rstrip("af").replace("compute_", "sm_")
    if base in supported and arch.startswith(("sm_", "compute_")):
        return
    from cuda_progcache._util.suggest import did_you_mean

    hint = did_you_mean(f"sm_{arch.removeprefix('sm_').removeprefix('sm')}", supported, listing="it compiles for")
    known = "" if "compiles for" in hint else f" It compiles for {', '.join(supported)}."
    raise ArchError(f"this NVRTC knows no architecture {arch!r}{hint}{known}")


def _supported() -> list[str]:
    from cuda_progcache.compile.compilers import supported_archs

    return [f"sm_{n}" for n in supported_archs()]

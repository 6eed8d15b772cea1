# SPDX-License-Identifier: Apache-2.0
"""Architectures: the default, which is the current device's, and checks that an architecture exists."""

from __future__ import annotations

from cuda_progcache._util.fields import replace
from cuda_progcache.errors import ArchError
from cuda_progcache.keys.arch import Arch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Compute capabilities that some NVRTC 12 or 13 compiles for.
_WELL_KNOWN = {50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 107, 110, 120, 121}


def with_arch(options: Any) -> Any:
    """Return options with an architecture; if they have none, with the current device's.

    Raises
    ------
    ArchError
        If there is neither an architecture nor a device; the message lists the architectures that the compiler
        supports.
    """
    if options.arch is not None:
        return options
    try:
        from cuda.core import Device

        return replace(options, arch=f"sm_{Device().arch}")
    except Exception as error:  # a missing driver raises exceptions of several types
        raise ArchError(
            "no architecture was given, and there is no CUDA device to take it from; "
            f"give arch (--arch): one of {', '.join(_supported())}"
        ) from error


def known_arch(text: object) -> Arch:
    """Parse an architecture and check that it exists.

    Well-known architectures are accepted without asking the compiler: a hit needs no compiler, and a compile shows
    whether they are supported. For others, the installed NVRTC is asked.

    Raises
    ------
    ArchError
        If the architecture is invalid or the installed NVRTC doesn't know it; the message suggests the nearest.
    """
    arch = _parsed(text)
    if arch is None or arch.capability not in _WELL_KNOWN:
        check_arch(str(text))
    return Arch.parse(text)


def check_arch(arch: str) -> None:
    """Check that the installed NVRTC knows an architecture.

    Raises
    ------
    ArchError
        If it doesn't; the message suggests the nearest architecture.
    """
    if not knows_arch(arch):
        raise ArchError(about_arch(arch))


def is_arch(text: object) -> bool:
    """Whether a text has the form of an architecture, such as ``sm_90``; it needn't exist."""
    return _parsed(text) is not None


def knows_arch(arch: str) -> bool:
    """Whether the installed NVRTC knows an architecture."""
    parsed = _parsed(arch)
    return parsed is not None and f"sm_{parsed.capability}" in _supported()


def about_arch(arch: str) -> str:
    """Return the message for an architecture that a compiler refused."""
    from cuda_progcache._util.suggest import did_you_mean

    supported = _supported()
    number = arch.lower().removeprefix("sm").removeprefix("compute").removeprefix("_")
    if f"sm_{number}" in supported and arch == f"sm_{number}":
        return f"the installed compiler doesn't support the architecture {arch!r}"
    hint = did_you_mean(f"sm_{number}", supported, listing="it compiles for")
    known = "" if "compiles for" in hint else f" It compiles for {', '.join(supported)}."
    return f"this NVRTC doesn't know the architecture {arch!r}{hint}{known}"


def _parsed(text: object) -> Arch | None:
    """Return the architecture if it has a form that compilers accept (``sm_90``, ``compute_90a``), otherwise None."""
    try:
        arch = Arch.parse(text)
    except ArchError:
        return None
    return arch if arch.kind in {"sm", "compute"} else None


def _supported() -> list[str]:
    from cuda_progcache.compile.compilers import supported_archs

    return [f"sm_{n}" for n in supported_archs()]

# SPDX-License-Identifier: Apache-2.0
"""What this machine could use of a cache or a bundle that was made elsewhere."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cuda_progcache.errors import ArchError, ToolchainError
from cuda_progcache.keys.arch import Arch
from cuda_progcache.keys.schema import SCHEMA
from cuda_progcache.keys.toolchain import toolchain

_COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR in cuda.h


class Host(NamedTuple):
    """What programs are checked against.

    Attributes
    ----------
    archs : tuple of str
        Architectures of the devices, as ``"sm_90"``; empty where there are none: then any will do.
    tools : Mapping of str to frozenset of str
        Identities of the installed compiler files, by the names that records use.
    schema : str
        Of the keys that this version makes.
    """

    archs: tuple[str, ...]
    tools: Mapping[str, frozenset[str]]
    schema: str


class EntryCheck(NamedTuple):
    """Whether one entry is of use here.

    Attributes
    ----------
    digest, name, target_type, arch : str
        Of the program; empty where its record doesn't say.
    usable : bool or None
        ``None``: it has no record of a compile, and nobody can tell.
    reasons : tuple of str
        Why not.
    """

    digest: str
    name: str
    target_type: str
    arch: str
    usable: bool | None
    reasons: tuple[str, ...]


def this_host(archs: Iterable[str] | None = None) -> Host:
    """Look at this machine.

    Parameters
    ----------
    archs : iterable of str, optional
        Architectures to check for, in place of those of the devices present.

    Raises
    ------
    ArchError
        One of ``archs`` isn't an architecture.
    """
    asked = tuple(device_archs() if archs is None else [str(Arch.parse(arch)) for arch in archs])
    tools: dict[str, set[str]] = {}
    for code_type, libdevice in (("c++", False), ("ptx", False), ("nvvm", True)):
        try:
            for tool in toolchain(code_type, libdevice=libdevice):
                tools.setdefault(tool.name, set()).add(tool.identity)
        except ToolchainError:
            continue  # not installed: what needs it isn't usable, and says so
    return Host(asked, {name: frozenset(found) for name, found in tools.items()}, SCHEMA)


def device_archs() -> tuple[str, ...]:
    """Architectures of the CUDA devices of this machine, as the driver tells; none without driver or device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return ()
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for number in range(count.value):
        device, parts = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
        failed = driver.cuDeviceGet(ctypes.byref(device), number)
        for attribute, part in zip(_COMPUTE_CAPABILITY, parts, strict=True):
            failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        if not failed:
            found.append(f"sm_{parts[0].value}{parts[1].value}")
    return tuple(dict.fromkeys(found))


def check(path: str | os.PathLike[str], *, archs: Iterable[str] | None = None) -> tuple[EntryCheck, ...]:
    """Say of each program in a bundle or a cache directory whether it is of use on this machine, and why not.

    A program is of use if it runs on a device (or is compiled further for it), and if the compiler that would be asked
    here is the one that made it: another one makes other keys, and never finds it. Headers are checked when a program
    is looked up.

    Parameters
    ----------
    path : str or os.PathLike
        A bundle file, or the root of a cache; it is only read.
    archs : iterable of str, optional
        Architectures to check for (``"sm_90"``). Default: those of the devices present; where there are none, the
        architecture is left out of the question.

    Returns
    -------
    tuple of EntryCheck
        In order of digest.

    Raises
    ------
    BundleError
        The file is no bundle.
    ArchError
        One of ``archs`` isn't an architecture.
    OSError
        It can't be read.
    """
    host = this_host(archs)
    return tuple(check_record(digest, record, host) for digest, record in _records(os.fspath(path)))


def _records(path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if os.path.isdir(path):
        from cuda_progcache.store.readonly import ReadOnlyProgramCache

        with ReadOnlyProgramCache(path) as cache:
            for entry in sorted(cache.entries(), key=lambda entry: entry.digest):
                yield entry.digest, entry.record
        return
    from cuda_progcache.store.bundle import opened

    with opened(path) as bundle:
        for digest in bundle.digests:
            yield digest, bundle.version(digest)[1]


def check_record(digest: str, record: Mapping[str, Any], host: Host) -> EntryCheck:
    """Check one program by its record."""
    name = str((record.get("kernel") or {}).get("name") or record.get("name") or "")
    target, arch = str(record.get("target_type") or ""), str(record.get("arch") or "")
    if not record.get("components"):
        return EntryCheck(digest, name, target, arch, None, ("it has no record of how it was compiled",))
    reasons = []
    if host.archs and not any(runs_on(arch, target, device) for device in host.archs):
        reasons.append(f"{target} for {arch} doesn't run on {' or '.join(host.archs)}")
    schema = next((value for label, value in record["components"] if label == "schema"), None)
    if schema != host.schema:
        reasons.append(f"its key is of schema {schema}, and this version makes schema {host.schema}")
    for tool in record.get("toolchain") or ():
        here = host.tools.get(tool["name"])
        if here is None:
            reasons.append(f"compiled by {tool['name']}, which isn't installed here")
        elif tool["digest"] not in here:
            reasons.append(f"compiled by another {tool['name']} than the one installed here")
    return EntryCheck(digest, name, target, arch, not reasons, tuple(dict.fromkeys(reasons)))


def runs_on(arch: str, target_type: str, device: str) -> bool:
    """Whether a program for ``arch`` can run on a device, compiled further where it isn't machine code yet.

    Parameters
    ----------
    arch, device : str
        As ``"sm_90"``. With ``a`` behind it, it is for this device alone; with ``f``, for its family.
    target_type : {"cubin", "ptx", "ltoir"}
    """
    try:
        return Arch.parse(arch).runs_on(target_type, Arch.parse(device))
    except ArchError:
        return False

# SPDX-License-Identifier: Apache-2.0
"""What this machine could use of a cache or a bundle that was made elsewhere."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cuda_progcache.errors import ArchError, ToolchainError
from cuda_progcache.keys.arch import Arch
from cuda_progcache.keys.explain import of_input
from cuda_progcache.keys.headers import Header, HeaderManifest, HeaderSet, SearchPath, file_digest, read_file
from cuda_progcache.keys.inputs import debug_sources_dir
from cuda_progcache.keys.schema import SCHEMA
from cuda_progcache.keys.toolchain import environment, header_root, toolchain
from cuda_progcache.store.compile_record import CompileRecord

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
    environment : frozenset of str
        ``NAME=value`` of the variables that reach what compilers make.
    cwd, pwd : str
        The working directory, and its name in ``$PWD`` where that is another one.
    include_path : tuple of str
        Folders with headers.
    """

    archs: tuple[str, ...]
    tools: Mapping[str, frozenset[str]]
    schema: str
    environment: frozenset[str] = frozenset()
    cwd: str = ""
    pwd: str = ""
    include_path: tuple[str, ...] = ()


class EntryCheck(NamedTuple):
    """Whether one entry is of use here.

    Attributes
    ----------
    digest, name, target_type, arch : str
        Of the program; empty where its record doesn't say.
    usable : bool or None
        ``None``: nobody can tell.
    reasons : tuple of str
        Why not, or why nobody can tell.
    """

    digest: str
    name: str
    target_type: str
    arch: str
    usable: bool | None
    reasons: tuple[str, ...]


def this_host(archs: Iterable[str] | None = None, include_path: Iterable[str | os.PathLike[str]] = ()) -> Host:
    """Look at this machine.

    Parameters
    ----------
    archs : iterable of str, optional
        Architectures to check for, in place of those of the devices present.
    include_path : iterable of str or path
        Folders with headers, before CUDA's and CCCL's.

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
            continue  # not installed: what made a program stands in for it
    folders = [os.path.abspath(folder) for folder in include_path]
    for headers in ("cuda", "cccl"):
        with contextlib.suppress(ToolchainError):  # not installed: what was read of them isn't known here, and says so
            folders.append(header_root(headers))
    cwd, pwd = os.getcwd(), os.environ.get("PWD", "")
    return Host(
        asked,
        {name: frozenset(found) for name, found in tools.items()},
        SCHEMA,
        frozenset(environment()),
        cwd,
        pwd if pwd != cwd and os.path.realpath(pwd) == os.path.realpath(cwd) else "",
        tuple(folders),
    )


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


def check(
    path: str | os.PathLike[str],
    *,
    archs: Iterable[str] | None = None,
    include_path: Iterable[str | os.PathLike[str]] = (),
) -> tuple[EntryCheck, ...]:
    """Say of each program in a bundle or a cache directory whether it is of use on this machine, and why not.

    A program is of use if it runs on a device (or is compiled further for it), and if the same program, compiled here
    and in this working directory, would have its key: each component of the key is judged. Where a compiler isn't
    installed, those that made the programs stand in for it.

    Parameters
    ----------
    path : str or os.PathLike
        A bundle file, or the root of a cache; it is only read.
    archs : iterable of str, optional
        Architectures to check for (``"sm_90"``). Default: those of the devices present; where there are none, the
        architecture is left out of the question.
    include_path : iterable of str or path
        Folders with the programs' own headers. CUDA's and CCCL's are known.

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
    host = this_host(archs, include_path)
    return tuple(_checked(digest, about, host, sets) for digest, about, sets in _records(os.fspath(path)))


def _records(path: str) -> Iterator[tuple[str, CompileRecord, list[HeaderSet]]]:
    """Digest, record and remembered header sets of every entry."""
    if os.path.isdir(path):
        from cuda_progcache.store.derived import manifest_path
        from cuda_progcache.store.readonly import ReadOnlyProgramCache

        with ReadOnlyProgramCache(path) as cache:
            for entry in sorted(cache.entries(), key=lambda entry: entry.digest):
                about = entry.about
                content = read_file(manifest_path(path, about.manifest)) if about.manifest else None
                yield entry.digest, about, _sets(content)
        return
    from cuda_progcache.store.bundle import opened

    with opened(path) as bundle:
        manifests = dict(bundle.manifests())
        for digest in bundle.digests:
            about = bundle.version(digest)[1]
            yield digest, about, _sets(manifests.get(about.manifest))


def _sets(manifest: bytes | None) -> list[HeaderSet]:
    import json

    try:
        return [HeaderSet.from_json(one) for one in json.loads(manifest or b"")["sets"]]
    except (ValueError, KeyError, TypeError):
        return []  # another format, or none: the record has the headers' digests


def check_record(
    digest: str, record: Mapping[str, Any], host: Host, header_sets: Sequence[HeaderSet] = ()
) -> EntryCheck:
    """Check one program by its record.

    Parameters
    ----------
    digest : str
    record : mapping
    host : Host
    header_sets : sequence of HeaderSet
        What the cache remembers of the headers of this program and of others like it.
    """
    return _checked(digest, CompileRecord(record), host, header_sets)


def _checked(digest: str, about: CompileRecord, host: Host, header_sets: Sequence[HeaderSet]) -> EntryCheck:
    target, arch = about.target_type, about.arch
    if not about.is_compile:
        return EntryCheck(digest, about.title, target, arch, None, ("it has no record of how it was compiled",))
    against = []
    if host.archs and not any(runs_on(arch, target, device) for device in host.archs):
        against.append(f"{target} for {arch} doesn't run on {' or '.join(host.archs)}")
    against += _components_against(about, host)
    changed, unknown = _headers_against(digest, about, host, header_sets)
    against += changed
    usable = False if against else None if unknown else True
    return EntryCheck(digest, about.title, target, arch, usable, tuple(dict.fromkeys([*against, *unknown])))


#: Labels of paths in a key, and what is at them. They are there because they are in what was compiled.
_PATHS = {
    "include_path": "include directory",
    "source_folder": "source's folder",
    "name_path": "program's name",
    "bundled_headers": "folder of NVRTC's headers",
    "pre_include": "folder of a pre-included header",
    "path": "header",
}


def _components_against(about: CompileRecord, host: Host) -> list[str]:
    """Components of the key, but for the headers, that the same program wouldn't have here."""
    found = []
    variables = set()
    for full_label, value in about.components:
        _, label = of_input(full_label)
        if label == "schema":
            if value != host.schema:
                found.append(f"its key is of schema {value}, and this version makes schema {host.schema}")
        elif label.startswith("tool "):
            here = host.tools.get(tool := label.removeprefix("tool "))
            if here is not None and value not in here:
                found.append(
                    f"compiled by another {tool} ({_short(value)}) than the one here ({_short(*sorted(here))})"
                )
        elif label == "environment":
            variables.add(value)
        elif (differs := _place_against(label, value, host)) is not None:
            found.append(differs)
    found += [f"compiled with {variable}, which isn't set here" for variable in sorted(variables - host.environment)]
    found += [f"compiled without {variable}, which is set here" for variable in sorted(host.environment - variables)]
    return found


def _place_against(label: str, value: str, host: Host) -> str | None:
    """Why a path in the key doesn't hold on this machine; None if it does."""
    if label == "cwd" and value != host.cwd:
        return f"the working directory {value} is in what was compiled, and here it is {host.cwd}"
    if label == "pwd" and value != host.pwd:
        return f"$PWD, {value}, is in what was compiled, and here it is {host.pwd or 'not set'}"
    if label == "debug_source" and os.path.dirname(value) != (here := debug_sources_dir()):
        return (
            f"the folder of sources for debuggers, {os.path.dirname(value)}, is in what was compiled; here it is {here}"
        )
    if label in _PATHS:
        place = value.split(" ", 1)[1] if value[:1].isdigit() and " " in value else value  # "0 include"
        # A name needs no file, but a program that has it lies in that folder.
        there = os.path.dirname(place) if label == "name_path" else place
        if not os.path.exists(os.path.join(host.cwd, there)):
            return f"the {_PATHS[label]} {place} is in what was compiled, and isn't here"
    return None


def _short(*identities: str) -> str:
    """Identities of compiler files for reading: ``build-id:0123456789ab``."""
    return ", ".join(":".join(part[:12] for part in identity.split(":")[:2]) for identity in identities)


def _headers_against(
    digest: str, about: CompileRecord, host: Host, header_sets: Sequence[HeaderSet]
) -> tuple[list[str], list[str]]:
    """What speaks against the headers that there are here, and what can't be told."""
    if not about.headers:
        return [], []
    own = [one for one in header_sets if one.entry == digest] or list(header_sets)
    if not own:
        return _by_name(about, host)
    searches = [(one, _search_path(one, about, host)) for one in own]
    if any(HeaderManifest(None, [one]).match(search) is not None for one, (search, _) in searches):
        return [], []
    one, (search, missing) = searches[0]
    if missing:
        return [], [_unknown(missing)]
    changed = [h.name for h in one.headers if file_digest(search.absolute(h.place) or "") != h.digest]
    if changed:
        return [_differing(changed, len(one.headers))], []
    return ["another file would be read in place of one of its headers"], []


def _search_path(headers: HeaderSet, about: CompileRecord, host: Host) -> tuple[SearchPath, list[str]]:
    """Where a compile here would look, as far as that can be guessed; and the headers that are nowhere."""
    places = [header.place for header in headers.headers]
    count = 1 + max(
        (index for root, index, _ in [*places, *headers.absent, *headers.present] if root == "I"), default=-1
    )
    keyed = [v.split(" ", 1)[-1] for label, v in about.components if label.rpartition(" ")[2] == "include_path"]
    folders = [*host.include_path, *(os.path.join(host.cwd, folder) for folder in keyed)]
    chosen, missing = [], []
    for n in range(count):
        wanted = [h for h in headers.headers if h.place[:2] == ("I", n)]
        best = max(folders, key=lambda folder: _fit(folder, wanted), default="")
        if wanted and not any(_fit(best, wanted)):
            missing += [header.name for header in wanted]
        chosen.append(best if wanted else os.path.join(os.devnull, "unknown"))
    source = os.path.dirname(about.name)
    search = SearchPath(tuple(chosen), os.path.join(host.cwd, source).rstrip("/"), host.cwd)
    for header in headers.headers:
        path = search.absolute(header.place)
        if header.place[0] != "I" and (path is None or not os.path.exists(path)):
            missing.append(header.name)
    return search, missing


def _fit(folder: str, wanted: Sequence[Header]) -> tuple[int, int]:
    """How many of these headers a folder has just as they were, and how many at all."""
    digests = [(file_digest(os.path.join(folder, header.name)), header.digest) for header in wanted]
    return sum(here == there for here, there in digests), sum(here is not None for here, _ in digests)


def _by_name(about: CompileRecord, host: Host) -> tuple[list[str], list[str]]:
    """Judge headers by the names and digests that a record has, where nothing says in which directory each was."""
    folders = [host.cwd, *host.include_path]
    changed, missing = [], []
    for name, digest in about.headers:
        found = {file_digest(os.path.join(folder, name)) for folder in folders} - {None}
        if not found:
            missing.append(name)
        elif digest not in found:
            changed.append(name)
    against = [_differing(changed, len(about.headers))] if changed else []
    return against, [_unknown(missing)] if missing else []


def _differing(names: Sequence[str], of: int) -> str:
    verb, more = "differ" if len(names) > 1 else "differs", ", ..." if len(names) > 3 else ""
    return f"{len(names)} of its {of} headers {verb} here: {', '.join(names[:3])}{more}"


def _unknown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"where its header {names[0]}{more} lies here isn't known; name the folder (check -I DIR)"


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

# SPDX-License-Identifier: Apache-2.0
"""Whether the programs in a cache or a bundle made elsewhere are usable on the current machine."""

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
    """The properties of a machine and process that programs are checked against.

    Attributes
    ----------
    archs : tuple of str
        Architectures of the devices, such as ``"sm_90"``; if empty, the architecture isn't checked.
    tools : Mapping of str to frozenset of str
        Identities of the installed compiler files, by the names that records use.
    schema : str
        The key schema of this version.
    environment : frozenset of str
        ``NAME=value`` of the environment variables that affect the compilers' output.
    cwd, pwd : str
        The working directory, and ``$PWD`` if it is another name of that directory; otherwise empty.
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
    """The result of checking whether an entry is usable.

    Attributes
    ----------
    digest, name, target_type, arch : str
        The program's digest, name, target and architecture; empty if its record doesn't have them.
    usable : bool or None
        ``None`` if that is unknown.
    reasons : tuple of str
        Why the entry isn't usable, or why that is unknown.
    """

    digest: str
    name: str
    target_type: str
    arch: str
    usable: bool | None
    reasons: tuple[str, ...]


def this_host(archs: Iterable[str] | None = None, include_path: Iterable[str | os.PathLike[str]] = ()) -> Host:
    """Return the properties of the current machine and process.

    Parameters
    ----------
    archs : iterable of str, optional
        Architectures to check for, in place of those of the devices present.
    include_path : iterable of str or path
        Folders with headers, before CUDA's and CCCL's.

    Raises
    ------
    ArchError
        If one of ``archs`` is invalid.
    """
    asked = tuple(device_archs() if archs is None else [str(Arch.parse(arch)) for arch in archs])
    tools: dict[str, set[str]] = {}
    for code_type, libdevice in (("c++", False), ("ptx", False), ("nvvm", True)):
        try:
            for tool in toolchain(code_type, libdevice=libdevice):
                tools.setdefault(tool.name, set()).add(tool.identity)
        except ToolchainError:
            continue  # not installed: the compilers that made the programs are assumed
    folders = [os.path.abspath(folder) for folder in include_path]
    for headers in ("cuda", "cccl"):
        with contextlib.suppress(ToolchainError):  # not installed: programs that read them are reported as unknown
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
    """Return the architectures of this machine's CUDA devices, as the driver reports them; empty without a driver."""
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
    """Check whether each program in a bundle or a cache directory is usable on this machine, and why not.

    A program is usable if it runs on a device (or can be compiled further for it), and if the same program, compiled on
    this machine in the current working directory, would have the same key: each component of the key is checked. If a
    compiler isn't installed, the compilers that made the programs are assumed.

    Parameters
    ----------
    path : str or os.PathLike
        A bundle file, or the root of a cache; it is only read.
    archs : iterable of str, optional
        Architectures to check for (``"sm_90"``). None: those of the devices present; if there are none, architectures
        aren't checked.
    include_path : iterable of str or path
        Folders with the programs' own headers. Those of CUDA and CCCL are found if they are installed.

    Returns
    -------
    tuple of EntryCheck
        In order of digest.

    Raises
    ------
    BundleError
        If the file isn't a bundle.
    ArchError
        If one of ``archs`` is invalid.
    OSError
        If the bundle or cache can't be read.
    """
    host = this_host(archs, include_path)
    return tuple(_checked(digest, about, host, sets) for digest, about, sets in _records(os.fspath(path)))


def _records(path: str) -> Iterator[tuple[str, CompileRecord, list[HeaderSet]]]:
    """Yield the digest, record and known header sets of every entry."""
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
        return []  # no manifest, or another format: the record has the headers' digests


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
        The header sets in the manifest that the program shares with programs that differ only in their headers.
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


#: Labels of the paths in a key, and their descriptions. A path is in the key only if it is in the compiler's output.
_PATHS = {
    "include_path": "include directory",
    "source_folder": "source's folder",
    "name_path": "program's name",
    "bundled_headers": "folder of NVRTC's headers",
    "pre_include": "folder of a pre-included header",
    "path": "header",
}


def _components_against(about: CompileRecord, host: Host) -> list[str]:
    """Return how the key's components, other than headers, differ from those of the same program on this host."""
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
                    f"compiled by another {tool} ({_short(value)}) than the one on this machine "
                    f"({_short(*sorted(here))})"
                )
        elif label == "environment":
            variables.add(value)
        elif (differs := _place_against(label, value, host)) is not None:
            found.append(differs)
    found += [f"compiled with {variable}, which isn't set now" for variable in sorted(variables - host.environment)]
    found += [f"compiled without {variable}, which is set now" for variable in sorted(host.environment - variables)]
    return found


def _place_against(label: str, value: str, host: Host) -> str | None:
    """Return why a path in the key is wrong on this host; None if it is right."""
    if label == "cwd" and value != host.cwd:
        return f"the working directory {value} is in the compiled program, but the current one is {host.cwd}"
    if label == "pwd" and value != host.pwd:
        return (
            f"$PWD, {value}, is in the compiled program, "
            f"but $PWD is now {host.pwd or 'no other name of the working directory'}"
        )
    if label == "debug_source" and os.path.dirname(value) != (here := debug_sources_dir()):
        return (
            f"the folder of sources for debuggers, {os.path.dirname(value)}, is in the compiled program, "
            f"but the current one is {here}"
        )
    if label in _PATHS:
        place = value.split(" ", 1)[1] if value[:1].isdigit() and " " in value else value  # "0 include"
        # A program's name needs no file, but its folder must exist.
        there = os.path.dirname(place) if label == "name_path" else place
        if not os.path.exists(os.path.join(host.cwd, there)):
            return f"the {_PATHS[label]} {place} is in the compiled program, but doesn't exist on this machine"
    return None


def _short(*identities: str) -> str:
    """Return the identities of compiler files, shortened for display: ``build-id:0123456789ab``."""
    return ", ".join(":".join(part[:12] for part in identity.split(":")[:2]) for identity in identities)


def _headers_against(
    digest: str, about: CompileRecord, host: Host, header_sets: Sequence[HeaderSet]
) -> tuple[list[str], list[str]]:
    """Return how the headers on this host differ from those the program read, and which of them can't be found."""
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
    """Guess the search path of a compile on this host; return it and the headers that it doesn't find."""
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
    """Return how many of these headers a folder has unchanged, and how many it has at all."""
    digests = [(file_digest(os.path.join(folder, header.name)), header.digest) for header in wanted]
    return sum(here == there for here, there in digests), sum(here is not None for here, _ in digests)


def _by_name(about: CompileRecord, host: Host) -> tuple[list[str], list[str]]:
    """Compare headers by the names and digests in a record, which doesn't say in which directory each header was."""
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
    return f"{len(names)} of its {of} headers {verb} on this machine: {', '.join(names[:3])}{more}"


def _unknown(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"its header {names[0]}{more} can't be found on this machine; give its folder (check -I DIR)"


def runs_on(arch: str, target_type: str, device: str) -> bool:
    """Return whether a program for ``arch`` can run on a device, after further compiling if it isn't machine code.

    Parameters
    ----------
    arch, device : str
        Such as ``"sm_90"``. The suffix ``a`` means this architecture only, ``f`` its family.
    target_type : {"cubin", "ptx", "ltoir"}
    """
    try:
        return Arch.parse(arch).runs_on(target_type, Arch.parse(device))
    except ArchError:
        return False

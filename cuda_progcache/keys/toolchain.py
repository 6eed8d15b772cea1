# SPDX-License-Identifier: Apache-2.0
"""The compiler that will run, identified by the content of its files.

A version number doesn't identify a compiler: two patch releases of NVRTC both
report "13.4" and produce different binaries. The identity is the GNU build id
in the shared library (a note of type ``NT_GNU_BUILD_ID`` in a ``PT_NOTE``
segment, see ``elf(5)``) together with the file's size, or the SHA-256 of the
whole file if it has no build id. Reading a build id takes about 40 us and
doesn't load the library. Identities are cached per file, by stat.

An environment variable may give the path of a library (``CUDA_PROGCACHE_NVRTC``,
``CUDA_PROGCACHE_NVJITLINK``, ``CUDA_PROGCACHE_NVVM``). Otherwise the library is
searched for as in ``cuda.pathfinder``: in the wheels in site-packages, in conda,
then by the system's loader. Libraries that are loaded in the current process
don't count: compilers run in processes of their own, and a program's key doesn't
depend on what was imported before.
"""

from __future__ import annotations

import os
import site
import struct
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar

from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import ToolchainError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, BinaryIO


class ToolFile(NamedTuple):
    """One file of a compiler: its ``name`` in the key, its absolute ``path``, and the ``identity`` of its content."""

    name: str
    path: str
    identity: str


class NotInstalledError(ToolchainError):
    """A compiler isn't installed. Programs that it compiled elsewhere can still be used (:class:`standing_in`)."""


class _Library(NamedTuple):
    sonames: tuple[str, ...]
    wheel_dirs: tuple[str, ...]
    wheel: str


# Sonames and wheel folders, as in the Linux part of cuda.pathfinder's descriptor catalog.
_LIBRARIES = {
    "nvrtc": _Library(
        ("libnvrtc.so.13", "libnvrtc.so.12"), ("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"), "nvidia-cuda-nvrtc"
    ),
    "nvJitLink": _Library(
        ("libnvJitLink.so.13", "libnvJitLink.so.12"), ("nvidia/cu13/lib", "nvidia/nvjitlink/lib"), "nvidia-nvjitlink"
    ),
    "nvvm": _Library(("libnvvm.so.4", "libnvvm.so"), ("nvidia/cu13/lib", "nvidia/cuda_nvcc/nvvm/lib64"), "nvidia-nvvm"),
}
_LIBDEVICE_DIRS = ("nvidia/cu13/nvvm/libdevice", "nvidia/cuda_nvcc/nvvm/libdevice")
#: For each set of headers: its folders in wheels, a header in them, and its name in ``cuda.pathfinder``.
_HEADER_DIRS = {
    "cuda": (("nvidia/cu13/include", "nvidia/cuda_runtime/include"), "cuda_fp16.h", "cudart"),
    "cccl": (("nvidia/cu13/include/cccl", "nvidia/cuda_cccl/include"), "cub/version.cuh", "cccl"),
}

# elf(5): p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3

# Each lookup checks the stat of the library itself. The files beside it (NVRTC's builtins, libdevice) are usually
# replaced together with it, so lookups check them only after this interval in seconds. Before a program is stored, all
# files are checked.
_LOOK_INTERVAL = 0.1

#: Environment variables that affect the output of the compilers, and their meanings. ``ci/compiler_environment.py``
#: found them among all variables that libnvrtc, libnvvm and libnvJitLink of 12.9.86, 13.0.88 and 13.5.37 read. One
#: more, ``NVJITLINK_TRACE_MESSAGES``, affects only logs. Neither it nor the other variables that the libraries read are
#: passed on to the compilers.
VARIABLES = {
    "NV_NVVM_VERSION": "the IR dialect they work in",
    "LIBNVVM_NVVM_VERSION": "the IR dialect they work in",
    "NVVM_IR_VER_CHK": "whether the IR's version is checked",
    "LLVM_OVERRIDE_PRODUCER": "the producer that LTO-IR names",
    "FINALIZER_USE_LEGACY_ELF_BUILDER": "how a cubin is laid out (13.5)",
}
# Testing for a variable that isn't set takes 1 us with os.environ, and 30 ns with its underlying dictionary.
_variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)


def _raw(name: str) -> str | bytes:
    return name if os.name == "nt" else name.encode()


_RAW = [(_raw(name), name) for name in VARIABLES]
_SETTINGS = {name: f"CUDA_PROGCACHE_{name.upper()}" for name in _LIBRARIES}
_RAW_SETTINGS = {name: _raw(setting) for name, setting in _SETTINGS.items()}

LIBRARY_OF = {"c++": "nvrtc", "ptx": "nvJitLink", "nvvm": "nvvm"}

_Stamp = tuple[int, int, int, int]


class _Known:
    """A result of :func:`toolchain`, and when the files beside the library were last checked."""

    def __init__(self, tools: tuple[ToolFile, ...], stamps: tuple[_Stamp, ...]) -> None:
        self.tools = tools
        self.library = tools[0].path
        self.stamps = stamps
        self.looked = time.monotonic()

    def holds(self, *, thorough: bool) -> bool:
        """Return whether the files are unchanged; raise OSError if one no longer exists."""
        st = os.stat(self.library)
        if (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns) != self.stamps[0]:
            return False
        now = time.monotonic()
        if not thorough and now - self.looked < _LOOK_INTERVAL:
            return True
        self.looked = now
        return [_stamp(tool.path) for tool in self.tools] == list(self.stamps)


_known: dict[tuple[str, bool, Any], _Known] = {}
_located: dict[str, str] = {}


def package_dirs() -> list[str]:
    """Return the site-packages directories, in the order in which ``cuda.pathfinder`` searches them."""
    dirs = list(site.getsitepackages())
    if site.ENABLE_USER_SITE and (user := site.getusersitepackages()):
        dirs.insert(1 if sys.prefix != sys.base_prefix else 0, user)
    return dirs


def _search(rel_dirs: tuple[str, ...], names: tuple[str, ...]) -> str | None:
    for rel in rel_dirs:
        for base in package_dirs():
            for name in names:
                path = os.path.join(base, *rel.split("/"), name)
                if os.path.isfile(path):
                    return path
    return None


def _mappings() -> list[str]:
    """Return the paths of the files that are mapped into this process; an empty list if there is no ``/proc``."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            fields = (line.rstrip("\n").split(maxsplit=5) for line in maps)
            return [f[5] for f in fields if len(f) == 6]
    except OSError:
        return []


def environment() -> tuple[str, ...]:
    """Return ``NAME=value`` for each of :data:`VARIABLES` that is set."""
    return tuple([f"{name}={os.environ[name]}" for raw, name in _RAW if raw in _variables])


def locate(name: str) -> str:
    """Return the path of the compiler library that compiles use.

    Parameters
    ----------
    name : {"nvrtc", "nvJitLink", "nvvm"}
        The library's name in ``cuda.pathfinder``.

    Returns
    -------
    str
        The absolute path.

    Raises
    ------
    ToolchainError
        The library isn't found; the message names the wheel to install.
    """
    setting = os.environ.get(_SETTINGS[name]) if _RAW_SETTINGS[name] in _variables else None
    if setting is not None:
        if not os.path.isfile(setting):
            raise ToolchainError(f"{_SETTINGS[name]} is not a file: {setting!r}")
        return os.path.abspath(setting)
    path = _located.get(name)
    if path is None:
        library = _LIBRARIES[name]
        path = _located[name] = _search(library.wheel_dirs, library.sonames) or load(name)
    return path


def load(name: str) -> str:
    """Load a compiler library as ``cuda.bindings`` does, and return its path.

    Raises
    ------
    ToolchainError
        The library isn't found; the message names the wheel to install.
    """
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ModuleNotFoundError as error:  # an installation that only runs programs, without CUDA's packages
        raise NotInstalledError(
            f"the compiler library {name} was not found: install it with `pip install {_LIBRARIES[name].wheel}`"
        ) from error
    try:
        path: str | None = load_nvidia_dynamic_lib(name).abs_path
    except DynamicLibNotFoundError as error:
        raise NotInstalledError(
            f"the compiler library {name} was not found: install it with `pip install {_LIBRARIES[name].wheel}` "
            f"({error})"
        ) from error
    if path is None:
        raise ToolchainError(f"the compiler library {name} was loaded, but the system doesn't say from which file")
    return path


def identity(path: str) -> str:
    """Return the identity of a file's content: ``"build-id:<hex>:<size>"`` or ``"sha256:<hex>"``.

    Parameters
    ----------
    path : str
        The path of a shared library, a bitcode library or any other file.

    Raises
    ------
    OSError
        The file can't be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if (build_id := _gnu_build_id(file, size)) is not None:
            return f"build-id:{build_id}:{size}"
        file.seek(0)
        from hashlib import sha256

        digest = sha256(usedforsecurity=False)
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


#: The files of the driver's linker: the driver's library, and the PTX compiler that it loads.
_DRIVER, _DRIVERS_COMPILER = "libcuda.so.1", "libnvidia-ptxjitcompiler.so.1"


def linker() -> str:
    """Return the linker to use: ``"nvJitLink"``, or ``"driver"`` if only the CUDA driver is installed.

    Raises
    ------
    ToolchainError
        Neither is installed; the message names the wheel to install.
    """
    try:
        locate("nvJitLink")
    except ToolchainError as error:
        if _driver() is None:
            raise NotInstalledError(f"{error}; there is no CUDA driver either, whose linker could link PTX") from error
        return "driver"
    return "nvJitLink"


def _driver() -> str | None:
    """Load the CUDA driver's library and return its path; None if there is no driver."""
    import ctypes

    try:
        ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    return next((path for path in _mappings() if os.path.basename(path).startswith("libcuda.so.")), None)


def _driver_files() -> Iterator[tuple[str, str]]:
    path = _driver()
    if path is not None:
        yield "driver", path
        compiler = os.path.join(os.path.dirname(path), _DRIVERS_COMPILER)
        if os.path.exists(compiler):
            yield "driver's PTX compiler", compiler


def _stamp(path: str) -> _Stamp:
    st = os.stat(path)
    return (st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)


def _gnu_build_id(file: BinaryIO, size: int) -> str | None:
    """Return the ``NT_GNU_BUILD_ID`` note (hex) of a 64-bit little-endian ELF file; None if it has none."""

    def read(offset: int, length: int) -> bytes:
        if offset + length > size:
            return b""  # a malformed file
        file.seek(offset)
        return file.read(length)

    header = read(0, 64)
    if header[:6] != b"\x7fELF\x02\x01":
        return None
    (phoff,) = struct.unpack_from("<Q", header, 32)
    phentsize, phnum = struct.unpack_from("<HH", header, 54)
    if phentsize != _PROGRAM_HEADER.size:
        return None
    for kind, _, offset, _, _, length, *_ in _PROGRAM_HEADER.iter_unpack(read(phoff, phentsize * phnum)):
        notes = read(offset, min(length, 1 << 16)) if kind == _PT_NOTE else b""
        at = 0
        while at + 12 <= len(notes):
            namesz, descsz, note = struct.unpack_from("<III", notes, at)
            desc_at = at + 12 + ((namesz + 3) & ~3)
            if note == _NT_GNU_BUILD_ID and notes[at + 12 : at + 16] == b"GNU\0":
                return notes[desc_at : desc_at + descsz].hex()
            at = desc_at + ((descsz + 3) & ~3)
    return None


def toolchain(code_type: str, *, libdevice: bool = False, thorough: bool = False) -> tuple[ToolFile, ...]:
    """Return the files of the compiler for ``code_type``, with the identity of their content.

    Parameters
    ----------
    code_type : {"c++", "ptx", "nvvm"}
        Selects NVRTC (with its builtins library), nvJitLink or libNVVM.
    libdevice : bool
        Whether libdevice's bitcode is linked in (NVVM).
    thorough : bool
        Whether to check every file now; otherwise the files beside the library are checked at most ten times a second.

    Returns
    -------
    tuple of ToolFile

    Raises
    ------
    NotInstalledError
        The compiler isn't installed, and nothing stands in for it.
    ToolchainError
        A file can't be read.
    """
    slot = (code_type, libdevice)
    if _absent and (missing := _absent.get(slot)) is not None and time.monotonic() < missing[1]:
        error = NotInstalledError(*missing[0].args)
    else:
        try:
            return _installed(code_type, libdevice=libdevice, thorough=thorough)
        except NotInstalledError as now:
            error = now
            _absent[slot] = (now, time.monotonic() + _ABSENT)
    stand_ins = _stand_ins.get()
    if stand_ins is None or slot not in stand_ins:
        raise error
    return stand_ins[slot]


#: Compilers that aren't installed, with the error that says so, and the time before which they aren't searched for
#: again: a query of the system's loader takes as long as ten hits.
_absent: dict[tuple[str, bool], tuple[NotInstalledError, float]] = {}
_ABSENT = 2.0
_stand_ins: ContextVar[Mapping[tuple[str, bool], tuple[ToolFile, ...]] | None] = ContextVar("stand_ins", default=None)


class standing_in:  # noqa: N801 - used as a function
    """A context in which tools stand in for compilers that aren't installed: ``with standing_in(tools): ...``.

    Parameters
    ----------
    tools : mapping
        The results of :func:`toolchain` for compilers that aren't installed, by ``(code_type, libdevice)``.
    """

    def __init__(self, tools: Mapping[tuple[str, bool], tuple[ToolFile, ...]]) -> None:
        self._tools = tools

    def __enter__(self) -> None:
        self._token = _stand_ins.set(self._tools)

    def __exit__(self, *exc_info: object) -> None:
        _stand_ins.reset(self._token)


def _installed(code_type: str, *, libdevice: bool, thorough: bool) -> tuple[ToolFile, ...]:
    slot = (code_type, libdevice, _variables.get(_RAW_SETTINGS[LIBRARY_OF[code_type]]))
    known = _known.get(slot)
    if known is not None:
        try:
            if known.holds(thorough=thorough):
                return known.tools
        except OSError:
            _located.clear()  # moved or removed: locate the libraries again
    try:
        # Stat before reading: a file that is replaced in between is then read again at the next lookup.
        stamped = [(name, path, _stamp(path)) for name, path in _files(code_type, libdevice=libdevice)]
        tools = tuple(ToolFile(name, path, identity(path)) for name, path, _ in stamped)
    except OSError as error:
        raise ToolchainError(f"a compiler file can't be read: {error}") from error
    _known[slot] = _Known(tools, tuple(stamp for _, _, stamp in stamped))
    return tools


def build(code_type: str) -> str:
    """Return the identity of a compiler's build, by the content of its files (64 hex digits).

    Parameters
    ----------
    code_type : {"c++", "ptx", "nvvm"}
        The type of code that it compiles.
    """
    from hashlib import sha256

    tools = toolchain(code_type)
    return sha256("\n".join(tool.identity for tool in tools).encode(), usedforsecurity=False).hexdigest()


def trouble(code_type: str, tools: Iterable[ToolFile]) -> str | None:
    """Return why a new output may come from other compiler files than those in its key; None if it can't.

    Parameters
    ----------
    code_type : {"c++", "ptx", "nvvm"}
        The type of the compiled code; ``"ptx"`` for any link.
    tools : iterable of ToolFile
        The result of :func:`toolchain` before the compile; it may include files of other compilers.
    """
    tools = tuple(tools)
    now = toolchain(code_type, libdevice=any(tool.name == "libdevice" for tool in tools), thorough=True)
    names = {tool.name for tool in now}
    if now != tuple(tool for tool in tools if tool.name in names):
        return f"the files of {LIBRARY_OF[code_type]} were replaced while it was compiling"
    return None


def _files(code_type: str, *, libdevice: bool) -> Iterator[tuple[str, str]]:
    name = LIBRARY_OF[code_type]
    if name == "nvJitLink" and linker() == "driver":
        yield from _driver_files()
        return
    path = locate(name)
    yield name, path
    if code_type == "c++":
        if path not in _builtins:
            _builtins[path] = builtins_beside(path)
        for builtins in _builtins[path]:
            yield "nvrtc-builtins", builtins
    elif libdevice:
        yield "libdevice", libdevice_path()


_builtins: dict[str, tuple[str, ...]] = {}


def builtins_beside(nvrtc: str) -> tuple[str, ...]:
    """Return the paths of all builtins libraries in NVRTC's folder, since NVRTC chooses one of them itself."""
    folder = os.path.dirname(nvrtc)
    real: dict[str, str] = {}
    for entry in sorted(os.listdir(folder)):
        if entry.startswith("libnvrtc-builtins."):
            path = os.path.join(folder, entry)
            real.setdefault(os.path.realpath(path), path)
    return tuple(real.values())


def libdevice_path() -> str:
    """Return the path of ``libdevice.10.bc``, found as in ``cuda.core``.

    Raises
    ------
    ToolchainError
        The file isn't found.
    """
    path = _search(_LIBDEVICE_DIRS, ("libdevice.10.bc",))
    if path is not None:
        return path
    try:
        from cuda.pathfinder import BitcodeLibNotFoundError, find_bitcode_lib
    except ModuleNotFoundError as error:
        raise NotInstalledError("libdevice was not found: install nvidia-nvvm") from error
    try:
        return str(find_bitcode_lib("device"))
    except BitcodeLibNotFoundError as error:
        raise NotInstalledError(f"libdevice was not found: install nvidia-nvvm ({error})") from error


def header_root(name: str) -> str:
    """Return the include directory of a set of headers.

    Parameters
    ----------
    name : {"cuda", "cccl"}
        CUDA's own headers (cuda_fp16.h, mma.h, ...) or CCCL's (cub, thrust, cuda/std).

    Returns
    -------
    str
        The absolute path: in the wheels, conda, ``CUDA_PATH``, ``CUDA_HOME``, or a toolkit that ``cuda.pathfinder``
        finds.

    Raises
    ------
    ToolchainError
        The headers aren't found; the message names the searched places and the extra to install.
    """
    wheel_dirs, probe, known_as = _HEADER_DIRS[name]
    found = _search(wheel_dirs, (probe,))
    if found is not None:
        return found[: -len(probe) - 1]
    looked = [f"the wheels in {', '.join(package_dirs())}"]
    for variable in ("CONDA_PREFIX", "CUDA_PATH", "CUDA_HOME"):
        root = os.environ.get(variable)
        if (folder := _include_dir(root, name, probe)) is not None:
            return folder
        looked.append(f"{variable} ({root or 'not set'})")
    if (folder := _by_pathfinder(known_as, name, probe)) is not None:
        return folder
    raise ToolchainError(
        f"the {name} headers were not found: there is no {probe} in {', '.join(looked)}, nor in a CUDA toolkit that "
        f"cuda.pathfinder finds. Install them with `pip install 'cuda-progcache[headers]'`, or set CUDA_HOME to a "
        f"toolkit's folder."
    )


def _include_dir(root: str | None, name: str, probe: str) -> str | None:
    """Return the folder of a toolkit's headers, which contains ``probe``; None if there is no such folder."""
    tails = ("include/cccl", "include") if name == "cccl" else ("include",)
    for target in ("targets/x86_64-linux", "targets/sbsa-linux", "") if root else ():
        for tail in tails:
            folder = os.path.join(root or "", target, tail)
            if os.path.isfile(os.path.join(folder, probe)):
                return folder
    return None


def _by_pathfinder(known_as: str, name: str, probe: str) -> str | None:
    """Return the folder that ``cuda.pathfinder`` finds, which also asks the system's loader for a toolkit."""
    try:
        from cuda import pathfinder

        folder: str | None = pathfinder.find_nvidia_header_directory(known_as)
    except (ImportError, RuntimeError, AttributeError):  # not installed, or too old to know these headers
        return None
    if folder is None:
        return None
    if os.path.isfile(os.path.join(folder, probe)):
        return folder
    return _include_dir(os.path.dirname(folder), name, probe)

# SPDX-License-Identifier: Apache-2.0
"""Which compiler will run, by the content of its files.

A version number doesn't identify a compiler: two NVRTC patch releases both say
"13.4" and produce different binaries. The identity used here is the GNU build
id that the linker stored in the shared library (a note of type
``NT_GNU_BUILD_ID`` in a ``PT_NOTE`` segment, see ``elf(5)``) with the file's
size, or the SHA-256 of the whole file where there is none. Reading it takes
some 40 us and doesn't load the library; it is remembered per file by stat.

Where the library lies, a variable may say (``CUDA_PROGCACHE_NVRTC`` and its
like: the path of the file). Else it is looked for as ``cuda.pathfinder`` does:
in the wheels in site-packages, then in conda, then by the system's loader. What
this process has loaded doesn't count: the compilers run in processes of their
own, and a program's key doesn't depend on who imported what before.
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
    """One file of a compiler: ``name`` as the key shows it, absolute ``path``, ``identity`` of its content."""

    name: str
    path: str
    identity: str


class NotInstalledError(ToolchainError):
    """A compiler isn't there at all; what it made elsewhere can be used all the same (:class:`standing_in`)."""


class _Library(NamedTuple):
    sonames: tuple[str, ...]
    wheel_dirs: tuple[str, ...]
    wheel: str


# Sonames and wheel folders as in cuda.pathfinder's descriptor catalog (Linux part).
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
#: Wheel folders, a header that is there, and the name by which ``cuda.pathfinder`` knows them.
_HEADER_DIRS = {
    "cuda": (("nvidia/cu13/include", "nvidia/cuda_runtime/include"), "cuda_fp16.h", "cudart"),
    "cccl": (("nvidia/cu13/include/cccl", "nvidia/cuda_cccl/include"), "cub/version.cuh", "cccl"),
}

# elf(5): p_type, p_flags, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, p_align
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_PT_NOTE = 4
_NT_GNU_BUILD_ID = 3

# The library itself is looked at each time. What comes with it (NVRTC's builtins, libdevice) is replaced with it, save
# by hand: seconds after which that is noticed by a lookup; before something is stored, all are looked at.
_LOOK_INTERVAL = 0.1

#: Variables that the compilers read and that show in what they make, and what each says: of all that libnvrtc, libnvvm
#: and libnvJitLink of 12.9.86, 13.0.88 and 13.5.37 ask for, by ``ci/compiler_environment.py``. One more shows,
#: ``NVJITLINK_TRACE_MESSAGES``, in logs alone; it isn't handed on to the compilers, and nor are the rest.
VARIABLES = {
    "NV_NVVM_VERSION": "the IR dialect they work in",
    "LIBNVVM_NVVM_VERSION": "the IR dialect they work in",
    "NVVM_IR_VER_CHK": "whether the IR's version is checked",
    "LLVM_OVERRIDE_PRODUCER": "the producer that LTO-IR names",
    "FINALIZER_USE_LEGACY_ELF_BUILDER": "how a cubin is laid out (13.5)",
}
# To say that one isn't set takes os.environ 1 us, and this, its dictionary, 30 ns.
_variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)


def _raw(name: str) -> str | bytes:
    return name if os.name == "nt" else name.encode()


_RAW = [(_raw(name), name) for name in VARIABLES]
_SETTINGS = {name: f"CUDA_PROGCACHE_{name.upper()}" for name in _LIBRARIES}
_RAW_SETTINGS = {name: _raw(setting) for name, setting in _SETTINGS.items()}

LIBRARY_OF = {"c++": "nvrtc", "ptx": "nvJitLink", "nvvm": "nvvm"}

_Stamp = tuple[int, int, int, int]


class _Known:
    """What :func:`toolchain` found, and when the files beside the library were last looked at."""

    def __init__(self, tools: tuple[ToolFile, ...], stamps: tuple[_Stamp, ...]) -> None:
        self.tools = tools
        self.library = tools[0].path
        self.stamps = stamps
        self.looked = time.monotonic()

    def holds(self, *, thorough: bool) -> bool:
        """Whether the files are still those (OSError where one is gone)."""
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
    """Site-packages directories, in the order in which ``cuda.pathfinder`` searches them."""
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
    """Paths of the files that are mapped into this process; empty where there is no ``/proc``."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            fields = (line.rstrip("\n").split(maxsplit=5) for line in maps)
            return [f[5] for f in fields if len(f) == 6]
    except OSError:
        return []


def environment() -> tuple[str, ...]:
    """``NAME=value`` of each variable that is set and reaches what compilers make."""
    return tuple([f"{name}={os.environ[name]}" for raw, name in _RAW if raw in _variables])


def locate(name: str) -> str:
    """Path of the compiler library that compiles run.

    Parameters
    ----------
    name : {"nvrtc", "nvJitLink", "nvvm"}
        As ``cuda.pathfinder`` calls it.

    Returns
    -------
    str
        Absolute path.

    Raises
    ------
    ToolchainError
        If it is nowhere; the message names the wheel to install.
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
    """Load a compiler library as ``cuda.bindings`` does and return the path it came from.

    Raises
    ------
    ToolchainError
        If it can't be found; the message names the wheel to install.
    """
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib
    except ModuleNotFoundError as error:  # a place that only runs programs, and has none of CUDA's packages
        raise NotInstalledError(
            f"the compiler library {name} was not found: `pip install {_LIBRARIES[name].wheel}` brings it"
        ) from error
    try:
        path: str | None = load_nvidia_dynamic_lib(name).abs_path
    except DynamicLibNotFoundError as error:
        raise NotInstalledError(
            f"the compiler library {name} was not found: `pip install {_LIBRARIES[name].wheel}` brings it ({error})"
        ) from error
    if path is None:
        raise ToolchainError(f"the compiler library {name} was loaded, but the system doesn't say from which file")
    return path


def identity(path: str) -> str:
    """Identity of a file's content: ``"build-id:<hex>:<size>"`` or ``"sha256:<hex>"``.

    Parameters
    ----------
    path : str
        A shared library, a bitcode library, any file.

    Raises
    ------
    OSError
        If it can't be read.
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


#: The driver's own linker: the library, and the PTX compiler that it loads.
_DRIVER, _DRIVERS_COMPILER = "libcuda.so.1", "libnvidia-ptxjitcompiler.so.1"


def linker() -> str:
    """Which linker there is: ``"nvJitLink"``, or ``"driver"`` where that is missing and the CUDA driver isn't.

    Raises
    ------
    ToolchainError
        If there is neither; the message names the wheel to install.
    """
    try:
        locate("nvJitLink")
    except ToolchainError as error:
        if _driver() is None:
            raise NotInstalledError(
                f"{error}; there is no CUDA driver either, whose linker would do for PTX"
            ) from error
        return "driver"
    return "nvJitLink"


def _driver() -> str | None:
    """Path of the CUDA driver's library, which is loaded; None where there is no driver."""
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
    """The ``NT_GNU_BUILD_ID`` note of a 64-bit little-endian ELF file; None if it has none."""

    def read(offset: int, length: int) -> bytes:
        if offset + length > size:
            return b""  # not a well-formed file
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
    """The files that turn ``code_type`` into a binary, with the identity of their content.

    Parameters
    ----------
    code_type : {"c++", "ptx", "nvvm"}
        NVRTC (with its builtins library), nvJitLink or libNVVM.
    libdevice : bool
        Whether libdevice's bitcode is linked in (NVVM).
    thorough : bool
        Look at every file now; else those beside the library at most ten times a second.

    Returns
    -------
    tuple of ToolFile

    Raises
    ------
    NotInstalledError
        If it isn't installed, and nothing stands in for it.
    ToolchainError
        If a file can't be read.
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


#: Slots of compilers that aren't installed, with the error that says so, and until when nobody looks again: to ask the
#: system's loader takes as long as ten hits.
_absent: dict[tuple[str, bool], tuple[NotInstalledError, float]] = {}
_ABSENT = 2.0
_stand_ins: ContextVar[Mapping[tuple[str, bool], tuple[ToolFile, ...]] | None] = ContextVar("stand_ins", default=None)


class standing_in:  # noqa: N801 - used as a function
    """Let these tools stand in for compilers that aren't installed: ``with standing_in(tools): ...``.

    Parameters
    ----------
    tools : mapping
        By code type, and whether with libdevice: what :func:`toolchain` gives where there is none.
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
            _located.clear()  # moved or removed since it was located: look again
    try:
        # The stat first: a file replaced between the two is then read again next time.
        stamped = [(name, path, _stamp(path)) for name, path in _files(code_type, libdevice=libdevice)]
        tools = tuple(ToolFile(name, path, identity(path)) for name, path, _ in stamped)
    except OSError as error:
        raise ToolchainError(f"a compiler file can't be read: {error}") from error
    _known[slot] = _Known(tools, tuple(stamp for _, _, stamp in stamped))
    return tools


def build(code_type: str) -> str:
    """Names the build of a compiler, by the content of its files (64 hex digits).

    Parameters
    ----------
    code_type : {"c++", "ptx", "nvvm"}
        Of what it compiles.
    """
    from hashlib import sha256

    tools = toolchain(code_type)
    return sha256("\n".join(tool.identity for tool in tools).encode(), usedforsecurity=False).hexdigest()


def trouble(code_type: str, tools: Iterable[ToolFile]) -> str | None:
    """Why what a compiler has just made may not be the work of the files that are in its key, if so.

    Parameters
    ----------
    code_type : {"c++", "ptx", "nvvm"}
        What was compiled; ``"ptx"`` for all that is linked.
    tools : iterable of ToolFile
        From :func:`toolchain`, before the compile; those of other compilers may be among them.
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
    """Paths of the builtins in NVRTC's own folder; which of several it takes is its choice, so all count."""
    folder = os.path.dirname(nvrtc)
    real: dict[str, str] = {}
    for entry in sorted(os.listdir(folder)):
        if entry.startswith("libnvrtc-builtins."):
            path = os.path.join(folder, entry)
            real.setdefault(os.path.realpath(path), path)
    return tuple(real.values())


def libdevice_path() -> str:
    """Path of ``libdevice.10.bc``, found as ``cuda.core`` finds it.

    Raises
    ------
    ToolchainError
        If there is none.
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
    """The include directory of a set of headers.

    Parameters
    ----------
    name : {"cuda", "cccl"}
        CUDA's own headers (cuda_fp16.h, mma.h, ...) or CCCL's (cub, thrust, cuda/std).

    Returns
    -------
    str
        Absolute path: from the wheels, conda, ``CUDA_PATH`` or ``CUDA_HOME``, or a toolkit that ``cuda.pathfinder``
        finds.

    Raises
    ------
    ToolchainError
        If it is nowhere; the message names the places and the extra to install.
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
    """The folder of a toolkit's headers, of which ``probe`` is one; None where it isn't there."""
    tails = ("include/cccl", "include") if name == "cccl" else ("include",)
    for target in ("targets/x86_64-linux", "targets/sbsa-linux", "") if root else ():
        for tail in tails:
            folder = os.path.join(root or "", target, tail)
            if os.path.isfile(os.path.join(folder, probe)):
                return folder
    return None


def _by_pathfinder(known_as: str, name: str, probe: str) -> str | None:
    """What ``cuda.pathfinder`` finds: it asks the system's loader for the toolkit, too."""
    try:
        from cuda import pathfinder

        folder: str | None = pathfinder.find_nvidia_header_directory(known_as)
    except (ImportError, RuntimeError, AttributeError):  # an older one, which doesn't know these headers, or none
        return None
    if folder is None:
        return None
    if os.path.isfile(os.path.join(folder, probe)):
        return folder
    return _include_dir(os.path.dirname(folder), name, probe)

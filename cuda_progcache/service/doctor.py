# SPDX-License-Identifier: Apache-2.0
"""A check-up of the current machine: the compilers, tools, settings and caches it has, and what is wrong with them."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator

from cuda_progcache._util.amounts import plural, size
from cuda_progcache._util.fields import NamedTuple
from cuda_progcache.errors import ProgCacheError

#: A line at the start of compiled PTX: "// Cuda compilation tools, release 13.5, V13.5.37".
_VERSION = re.compile(rb"^// Cuda compilation tools, release [\d.]+, V([\d.]+)", re.MULTILINE)
_KERNEL = 'extern "C" __global__ void doctor(int *a) { *a = 1; }'
_NVVM = """\
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64-\
v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
target triple = "nvptx64-nvidia-cuda"
define void @doctor(i32* %a) {
  ret void
}
!nvvm.annotations = !{!0}
!0 = !{void (i32*)* @doctor, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0}
"""
_PTX = """\
.version 7.0
.target sm_75
.address_size 64
.visible .entry doctor() {
  ret;
}
"""
#: Free space in bytes below which programs will soon no longer be stored.
_SCARCE = 100_000_000


class Finding(NamedTuple):
    """The result of one check.

    Attributes
    ----------
    topic : str
        ``"software"``, ``"compilers"``, ``"headers"``, ``"tools"``, ``"driver"``, ``"settings"``, ``"cache"`` or
        ``"tiers"``.
    name : str
    value : str
        What was found.
    problem : str
        What is wrong; empty if nothing is.
    advice : str
        What to do about the problem; without a problem, what could be installed.
    """

    topic: str
    name: str
    value: str
    problem: str = ""
    advice: str = ""


def examine(cache_dir: str | os.PathLike[str] | None = None) -> list[Finding]:
    """Check everything needed to compile and cache programs; each compiler is tried (about 0.5 s).

    Parameters
    ----------
    cache_dir : path, optional
        The cache. None: ``CUDA_PROGCACHE_DIR``, otherwise the user's cache directory.

    Returns
    -------
    list of Finding
        A missing part that isn't always needed, such as nvJitLink, isn't a problem.
    """
    return [
        *_software(),
        *_compilers(),
        *_headers(),
        *_tools(),
        _driver(),
        *_settings(),
        *_cache(cache_dir),
        *_tiers(),
    ]


def _software() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    import cuda_progcache

    yield Finding("software", "cuda_progcache", cuda_progcache.__version__)
    yield Finding("software", "Python", f"{sys.version.split()[0]}  {sys.executable}")
    for name in ("cuda-core", "cuda-bindings"):
        try:
            yield Finding("software", name, version(name))
        except PackageNotFoundError:
            yield Finding("software", name, "not installed", "", f"pip install {name}")


def _compilers() -> Iterator[Finding]:
    from cuda_progcache.compile.compilers import supported_archs

    try:
        archs = supported_archs()
    except ProgCacheError:
        archs = []  # the compile below reports the problem
    arch = f"sm_{archs[-1]}" if archs else "sm_90"
    yield _tried("nvrtc", "c++", _KERNEL, arch, "nvidia-cuda-nvrtc", needed=True)
    yield _tried("nvJitLink", "ptx", _PTX, arch, "nvidia-nvjitlink", needed=False)
    yield _tried("nvvm", "nvvm", _NVVM, arch, "nvidia-nvvm", needed=False)
    if archs:
        yield Finding("compilers", "architectures", ", ".join(f"sm_{number}" for number in archs))


def _tried(name: str, code_type: str, source: str, arch: str, wheel: str, *, needed: bool) -> Finding:
    """Return a compiler's path and version, and whether it compiles a small program."""
    from cuda_progcache.compile.program import Program
    from cuda_progcache.keys import toolchain
    from cuda_progcache.keys.options import ProgramOptions

    try:
        if code_type == "ptx" and toolchain.linker() == "driver":
            return Finding("compilers", name, "not installed: the driver links", "", f"pip install {wheel}")
        tools = toolchain.toolchain(code_type)
    except ProgCacheError as error:
        if needed:
            return Finding("compilers", name, "not installed", str(error), f"pip install {wheel}")
        use = {"ptx": "linking", "nvvm": "NVVM IR"}[code_type]
        return Finding("compilers", name, f"not installed; only needed for {use}", "", f"pip install {wheel}")
    about = f"{tools[0].path} (build {tools[0].identity.split(':')[1][:12]})"
    try:
        options = ProgramOptions(arch=arch, name="doctor")
        made = Program(source, code_type, options).compile("cubin" if code_type == "ptx" else "ptx")
    except ProgCacheError as error:
        first = str(error).splitlines()[0]
        return Finding("compilers", name, about, f"doesn't work: {first}", f"reinstall {wheel}")
    version = _VERSION.search(bytes(made.code))
    return Finding("compilers", name, f"{version[1].decode()}  {about}" if version else about)


def _headers() -> Iterator[Finding]:
    from cuda_progcache.keys.toolchain import header_root

    for name, wheel in (("cuda", "nvidia-cuda-runtime"), ("cccl", "nvidia-cuda-cccl")):
        try:
            yield Finding("headers", name, header_root(name))
        except ProgCacheError:
            yield Finding(
                "headers", name, "not found; only programs that include them need them", "", f"pip install {wheel}"
            )


def _tools() -> Iterator[Finding]:
    from cuda_progcache.inspect import find_tool

    for name in ("nvdisasm", "cuobjdump"):
        try:
            yield Finding("tools", name, find_tool(name))
        except ProgCacheError:
            yield Finding(
                "tools", name, "not found; sass and diff need nvdisasm", "", f"pip install nvidia-cuda-{name}"
            )


def _driver() -> Finding:
    from cuda_progcache.compile.driver import driver_version

    version = driver_version()
    if version is None:
        return Finding("driver", "CUDA driver", "none: this machine can compile programs but not run them")
    return Finding("driver", "CUDA driver", f"CUDA {version // 1000}.{version % 1000 // 10}")


def _settings() -> Iterator[Finding]:
    from cuda_progcache._util import modes
    from cuda_progcache._util.suggest import did_you_mean
    from cuda_progcache.events import LOGS
    from cuda_progcache.service.settings import SETTINGS, unknown_settings, value_of

    known = [setting.name for setting in SETTINGS]
    yield _checked(
        "settings", "mode", modes.current, f"unset {modes.VARIABLE}, or give one of {', '.join(modes.MODES)}"
    )
    for name in known[1:]:
        if name in os.environ:
            odd = name == "CUDA_PROGCACHE_LOG" and os.environ[name] not in LOGS
            told = ("nothing is printed", f"set {' or '.join(filter(None, LOGS))}, or unset it") if odd else ("", "")
            yield Finding("settings", name, value_of(name) or "", *told)
    for name in unknown_settings():
        hint = did_you_mean(name, known, listing="there are").lstrip("; ")
        yield Finding("settings", name, value_of(name) or "", "nothing reads this variable", hint)


def _checked(topic: str, name: str, ask: Callable[[], object], advice: str) -> Finding:
    try:
        return Finding(topic, name, str(ask()))
    except (ProgCacheError, ValueError) as error:
        return Finding(topic, name, "", str(error), advice)


def _cache(cache_dir: str | os.PathLike[str] | None) -> Iterator[Finding]:
    from cuda_progcache._util import modes
    from cuda_progcache.errors import StoreError
    from cuda_progcache.store.default_cap import default_max_size
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.root import default_root

    root = os.path.abspath(os.path.expanduser(os.fspath(cache_dir or default_root())))
    above = root
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    free = shutil.disk_usage(above).free
    scarce = free < _SCARCE
    yield Finding(
        "cache",
        "free space",
        f"{free / 1e9:,.1f} GB at {above}",
        "almost full: soon, compiled programs can't be stored" if scarce else "",
        "free some space, or set CUDA_PROGCACHE_DIR to a directory on another disk" if scarce else "",
    )
    yield _checked("cache", "size cap", lambda: _cap_text(default_max_size()), "give a size such as 5GB, or 0 for none")
    elsewhere = "set CUDA_PROGCACHE_DIR to a directory that this user can write to"
    if not os.path.isdir(above):
        yield Finding("cache", "directory", root, f"{above} isn't a directory", elsewhere)
        return
    if above != root:
        may = os.access(above, os.W_OK | os.X_OK)
        problem = "" if may else f"it can't be created: this user can't write to {above}"
        yield Finding("cache", "directory", f"{root}, doesn't exist yet", problem, "" if may else elsewhere)
        return
    writable = os.access(root, os.W_OK | os.X_OK)
    try:
        wanted = modes.current() == "rw"
        with FileStreamProgramCache(root, strict=True) as cache:
            stats = cache.stats()
    except (StoreError, OSError, ValueError) as error:
        yield Finding("cache", "directory", root, str(error), f"fix that, or {elsewhere}")
        return
    yield Finding(
        "cache",
        "directory",
        f"{root}: {plural(stats.entries, 'entry')}, {size(stats.bytes)}",
        "" if writable or not wanted else "this user can't write to it: compiled programs aren't stored",
        "" if writable or not wanted else "make it writable for this user, or set CUDA_PROGCACHE=ro",
    )


def _tiers() -> Iterator[Finding]:
    from cuda_progcache.store.tiers.configuration import configured

    try:
        tiers = configured().tiers
    except ProgCacheError as error:
        yield Finding("tiers", "configuration", "", str(error), "cuda-progcache config shows where each value is from")
        return
    if not tiers:
        return
    from cuda_progcache.store.tiers.upkeep import health

    for settings in tiers:
        found = health(settings)
        if found.latency is None:
            advice = "until it answers, programs are compiled without it"
            yield Finding("tiers", found.url, f"mode {found.mode}", found.trouble, advice)
        else:
            yield Finding("tiers", found.url, f"mode {found.mode}, answers in {found.latency * 1e3:.1f} ms")


def _cap_text(cap: int | None) -> str:
    return "none" if cap is None else f"{cap / 1e9:,.1f} GB for the default cache"

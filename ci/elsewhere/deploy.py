# SPDX-License-Identifier: Apache-2.0
"""A deploy, from a recorded run to a frozen one, over three places of which the last has no compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci.elsewhere.places import Place, make_environment

APPLICATION = '''\
import json
from cuda_progcache import CompileService, FileStreamProgramCache, FrozenMissError, Program, ProgramOptions

SOURCE = """#include "size.h"
template <typename T> __global__ void fill(T *p) { p[threadIdx.x] = SIZE; }
"""
cache = FileStreamProgramCache()
service = CompileService(cache)
options = ProgramOptions(arch="sm_90", name="fill.cu", include_path=["include"], std="c++17")
told = {"hits": [], "digests": [], "refused": []}
for use in (
    lambda: service.kernel("saxpy_nvvm", arch="sm_90"),
    lambda: service.kernel("transpose", arch="sm_90"),
    lambda: Program(SOURCE, "c++", options).compiled("cubin", ["fill<int>"], cache=cache),
):
    try:
        done = use()
    except FrozenMissError as miss:
        told["refused"].append(miss.reasons)
    else:
        told["hits"].append(done.hit)
        told["digests"].append(done.digest)
with open("/proc/self/maps") as maps:
    text = maps.read()
told["compilers"] = [name for name in ("libnvrtc", "libnvvm", "libnvJitLink") if name in text]
print(json.dumps(told))
'''
HEADER = "#define SIZE 4\n"
LOCK = "progcache.lock"
COMPILERS = ("nvidia-cuda-nvrtc", "nvidia-nvjitlink", "nvidia-nvvm")


@dataclass
class Deploy:
    """What came of each step.

    Attributes
    ----------
    recorded, frozen, edited : dict
        What the application told: in the first place; in the third, frozen; there, after an edit of its header.
    lock : str
        The lockfile's text; ``again`` that of the second place's own.
    prewarmed, proved, stale : dict
        What ``prewarm`` and ``check`` said, in the second place; and ``check`` in the third, after the edit.
    compilers : list of str
        Compiler libraries that are installed in the third place.
    seconds : dict of str to float
        What each step took.
    """

    recorded: dict[str, Any] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)
    edited: dict[str, Any] = field(default_factory=dict)
    lock: str = ""
    again: str = ""
    prewarmed: dict[str, Any] = field(default_factory=dict)
    proved: dict[str, Any] = field(default_factory=dict)
    stale: dict[str, Any] = field(default_factory=dict)
    compilers: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def deploy(folder: Path, wheel: Path, first: Place, second: Place) -> Deploy:
    """Record, lock, prewarm elsewhere, prove, export, install in a third place, and run frozen there.

    Parameters
    ----------
    folder : Path
        An empty directory that every user can enter.
    wheel : Path
        The package's.
    first, second : Place
        Whose environments and users are used, in directories of their own.
    """
    done = Deploy()
    # What runs in the third place compiles nothing, so there is nothing there to compile with; only CUDA's headers.
    bare = make_environment(folder / "bare", wheel, without=("cuda-", *COMPILERS, "nvidia-cuda-cccl"))
    author = Place(first.environment, folder / "author", first.user)
    release = Place(second.environment, folder / "release", second.user)
    target = Place(bare, folder / "target", second.user)
    for place in (author, release, target):
        (place.directory / "home").mkdir(parents=True)
        (place.project / "include").mkdir(parents=True)
        (place.project / "include" / "size.h").write_text(HEADER, encoding="utf-8")
        (place.project / "application.py").write_text(APPLICATION, encoding="utf-8")
        place.own(place.directory)

    def step(
        name: str,
        place: Place,
        arguments: tuple[str, ...],
        allowed: tuple[int, ...] = (0,),
        variables: Mapping[str, str] | None = None,
    ) -> str:
        began = time.perf_counter()
        said = place.run(list(arguments), variables=variables, allowed=allowed).stdout
        done.seconds[name] = time.perf_counter() - began
        return said

    def command(name: str, place: Place, *arguments: str, code: int = 0) -> str:
        return step(name, place, ("-m", "cuda_progcache", *arguments), (code,))

    def application(name: str, place: Place, **variables: str) -> dict[str, Any]:
        told: dict[str, Any] = json.loads(step(name, place, ("application.py",), variables=variables))
        return told

    def carry(name: str, source: Place, to: Place) -> None:
        shutil.copyfile(source.project / name, to.project / name)
        to.own(to.project / name)

    done.recorded = application("record", author, CUDA_PROGCACHE_RECORD="run.json")
    command("lock", author, "lock", "--from", "run.json", "-o", LOCK)
    done.lock = (author.project / LOCK).read_text(encoding="utf-8")
    for place in (release, target):
        carry(LOCK, author, place)
    done.prewarmed = json.loads(command("prewarm", release, "prewarm", "--lock", LOCK, "--json"))
    done.proved = json.loads(command("check", release, "check", "--lock", LOCK, "--json"))
    application("run", release, CUDA_PROGCACHE_RECORD="run.json", CUDA_PROGCACHE="frozen")
    command("lock again", release, "lock", "--from", "run.json", "-o", "again.lock")
    done.again = (release.project / "again.lock").read_text(encoding="utf-8")
    command("export", release, "export", "--lock", LOCK, "--wheel", "dist", "--name", "my-kernels-sm90")
    built = next((release.project / "dist").glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "--python", bare.python, "install", "--quiet", "--no-deps", str(built)]
    began = time.perf_counter()
    subprocess.run(pip, check=True, capture_output=True)
    done.seconds["install"] = time.perf_counter() - began
    done.compilers = [name for _, _, names in os.walk(bare.site_packages) for name in names if "libnv" in name]
    done.frozen = application("frozen run", target, CUDA_PROGCACHE="frozen")
    header = target.project / "include" / "size.h"
    header.write_text(HEADER.replace("4", "5"), encoding="utf-8")
    done.stale = json.loads(command("check after an edit", target, "check", "--lock", LOCK, "--json", code=1))
    done.edited = application("frozen run after an edit", target, CUDA_PROGCACHE="frozen")
    return done

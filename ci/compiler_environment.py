# SPDX-License-Identifier: Apache-2.0
"""List the environment variables that a build's compilers ask for, and those that show in what they make.

    python -m ci.compiler_environment                                     the toolchain of this environment
    python -m ci.compiler_environment --nvrtc libnvrtc.so.12 --nvjitlink ... --nvvm ...

A library that is preloaded (``watch_getenv.c``, built with ``cc``) notes each call of ``getenv`` and who made it, while
NVRTC, nvJitLink and libNVVM do a few dozen jobs. Then each variable is set to some values, and what comes out is
compared. A compiler process is given those that are in the key, those that the loader and the C library need, and no
others; so a variable that shows must be in the key, or be one that isn't handed on. What is found goes into the tables
in ``cuda_progcache/keys/toolchain.py`` and ``cuda_progcache/compile/own_process.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ci.fresh_compiler import IR_KERNELS, KERNELS, Job, Toolchain, outcome, run, run_each
from cuda_progcache.compile.own_process import NEEDED
from cuda_progcache.keys.toolchain import VARIABLES

ARCH = "sm_90"
#: What a variable is set to: switches, flags, a name of an IR dialect, a path.
VALUES = ("0", "1", "3", "-G", "nvvm-latest", "/nowhere")
_WATCHER = Path(__file__).with_name("watch_getenv.c")


class NoWatcherError(Exception):
    """The library that notes calls of ``getenv`` can't be built here; the message says why."""


@dataclass(frozen=True)
class Variable:
    """What is known of a variable.

    ``shows`` are the values with which something else comes out than without it. ``use`` is what the package does:
    ``"in the key"``, ``"handed on"``, ``"the caller's"`` (PWD) or ``"kept away"``.
    """

    name: str
    asked_by: tuple[str, ...]
    shows: tuple[str, ...]
    use: str

    @property
    def right(self) -> bool:
        """Whether the package does the right thing with it."""
        return not self.shows or self.use != "handed on"


def jobs(tools: Toolchain, *, few: bool = False) -> list[Job]:
    """What the compilers are watched at: each target, and the options that bring in more of them."""
    sets = [[], ["-G"], ["-lineinfo"], ["--split-compile=2"], ["-Xptxas=-v"], ["--use_fast_math"], ["--pch"]]
    sets = sets[:2] if few else sets
    found = [
        tools.compile(KERNELS["calls"], target, ARCH, *flags) for target in ("ptx", "cubin", "ltoir") for flags in sets
    ]
    if tools.nvjitlink is not None:
        parts = run([tools.compile(KERNELS["calls"], kind, ARCH) for kind in ("ltoir", "ptx")])
        ltoir, ptx = (part["made"]["data"] for part in parts)
        sets = [[], ["-g"], ["-split-compile=2"]][: 1 if few else 3]
        found += [tools.link(ltoir, "ltoir", target, ARCH, *flags) for target in ("cubin", "ptx") for flags in sets]
        found.append(tools.link(ptx, "ptx", "cubin", ARCH))
    if tools.nvvm is not None:
        sets = [[], ["-g"]][: 1 if few else 2]
        floats = IR_KERNELS["floats"]
        found += [tools.compile_ir(floats, target, ARCH, *flags) for target in ("ptx", "ltoir") for flags in sets]
    return found


def watch(tools: Toolchain, done: Sequence[Job]) -> dict[str, tuple[str, ...]]:
    """The variables that the libraries ask for during jobs, and which of them do.

    Raises
    ------
    NoWatcherError
        If there is no C compiler, or no preloading.
    """
    names = {os.path.realpath(path): name for name, path in tools.paths.items()}
    with tempfile.TemporaryDirectory() as folder:
        library, notes = os.path.join(folder, "watch.so"), os.path.join(folder, "notes")
        _build(library)
        answers = run(done, {"LD_PRELOAD": library, "WATCH_GETENV": notes})
        if len(answers) < len(done) or not os.path.exists(notes):
            raise NoWatcherError("a compiler that is watched doesn't live, or nothing that is preloaded takes effect")
        found: dict[str, set[str]] = {}
        for line in Path(notes).read_text(encoding="utf-8", errors="replace").splitlines():
            library, _, variable = line.partition("\t")
            if (name := names.get(os.path.realpath(library))) is not None:
                found.setdefault(variable, set()).add(name)
    return {variable: tuple(sorted(found[variable])) for variable in sorted(found)}


def _build(library: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoWatcherError("there is no cc")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, str(_WATCHER), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise NoWatcherError(f"cc can't build {_WATCHER.name}: {built.stderr}")


def shows(names: Iterable[str], done: Sequence[Job], values: Sequence[str] = VALUES) -> dict[str, tuple[str, ...]]:
    """With which values each variable makes something else come out of jobs."""
    names = list(names)
    tried = [(name, value) for name in names for value in values]
    plain, *others = run_each([done] * (len(tried) + 1), [{}, *({name: value} for name, value in tried)])
    truth = [outcome(answer) for answer in plain]
    found: dict[str, tuple[str, ...]] = dict.fromkeys(names, ())
    for (name, value), answers in zip(tried, others, strict=True):
        if [outcome(answer) for answer in answers] != truth:
            found[name] += (value,)
    return found


def look(tools: Toolchain, *, few: bool = False) -> list[Variable]:
    """What a toolchain asks for; ``few``: in seconds, and only what is handed on is tried."""
    asked = watch(tools, jobs(tools, few=few))
    tried = [name for name in asked if name in NEEDED] if few else list(asked)
    seen = shows(tried, jobs(tools, few=True), VALUES[-1:] if few else VALUES)
    return [Variable(name, asked[name], seen.get(name, ()), _use(name)) for name in asked]


def _use(name: str) -> str:
    if name in VARIABLES:
        return "in the key"
    return "handed on" if name in NEEDED else "the caller's" if name == "PWD" else "kept away"


def reads_environ(path: str) -> bool | None:
    """Whether a library has access to the variables beside ``getenv``; None where ``nm`` doesn't tell."""
    if shutil.which("nm") is None:
        return None
    told = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=False)
    symbols = {line.split()[-1].partition("@")[0] for line in told.stdout.splitlines()}
    return None if told.returncode else not symbols.isdisjoint({"environ", "__environ", "_environ"})


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 where a variable shows that is handed on and isn't in the key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Toolchain.add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="write the findings there, too")
    parser.add_argument("--few", action="store_true", help="fewer jobs, and only what is handed on is tried: seconds")
    given = parser.parse_args(arguments)
    tools = Toolchain.given(given)
    try:
        found = look(tools, few=given.few)
    except NoWatcherError as error:
        print(error, file=sys.stderr)
        return 2
    print(tools)
    for name, path in tools.paths.items():
        print(f"{name} reads environ beside getenv: {reads_environ(path)}")
    for one in found:
        tail = f"shows with {', '.join(one.shows)}" if one.shows else ""
        print(f"{one.name:34} {','.join(one.asked_by):22} {one.use:12} {tail}{'' if one.right else '  <- wrong'}")
    if given.json:
        content = {"version": tools.version, "builds": tools.builds, "variables": [asdict(one) for one in found]}
        Path(given.json).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(one.right for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""List the environment variables that a build's compilers read, and those that affect their output.

    python -m ci.compiler_environment                                     the toolchain of this environment
    python -m ci.compiler_environment --nvrtc libnvrtc.so.12 --nvjitlink ... --nvvm ...

A preloaded library (``watch_getenv.c``, built with ``cc``) records each call of ``getenv`` and the calling library,
while NVRTC, nvJitLink and libNVVM do a few dozen jobs. Then each variable is set to several values, and the outputs are
compared. A compiler process is given the variables in the key and those that the loader and the C library need, and no
others. A variable that affects the output must therefore be in the key, or not be passed on. The findings go into the
tables in ``cuda_progcache/keys/toolchain.py`` and ``cuda_progcache/compile/own_process.py``.
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
#: The values that a variable is set to: switches, flags, the name of an IR dialect, a path.
VALUES = ("0", "1", "3", "-G", "nvvm-latest", "/nowhere")
_WATCHER = Path(__file__).with_name("watch_getenv.c")


class NoWatcherError(Exception):
    """The library that records calls of ``getenv`` can't be built or used; the message says why."""


@dataclass(frozen=True)
class Variable:
    """The findings about a variable.

    ``shows`` lists the values that change the output. ``use`` is how the package treats the variable: ``"in the key"``,
    ``"handed on"``, ``"the caller's"`` (PWD) or ``"kept away"``.
    """

    name: str
    asked_by: tuple[str, ...]
    shows: tuple[str, ...]
    use: str

    @property
    def right(self) -> bool:
        """Whether the package treats the variable correctly."""
        return not self.shows or self.use != "handed on"


def jobs(tools: Toolchain, *, few: bool = False) -> list[Job]:
    """Return the jobs to watch: each target, with options that make the compilers use more of their code."""
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
    """Return the variables that the libraries read during jobs, each with the libraries that read it.

    Raises
    ------
    NoWatcherError
        If there is no C compiler, or preloading doesn't work.
    """
    names = {os.path.realpath(path): name for name, path in tools.paths.items()}
    with tempfile.TemporaryDirectory() as folder:
        library, notes = os.path.join(folder, "watch.so"), os.path.join(folder, "notes")
        _build(library)
        answers = run(done, {"LD_PRELOAD": library, "WATCH_GETENV": notes})
        if len(answers) < len(done) or not os.path.exists(notes):
            raise NoWatcherError("a watched compiler crashes, or preloading a library has no effect")
        found: dict[str, set[str]] = {}
        for line in Path(notes).read_text(encoding="utf-8", errors="replace").splitlines():
            library, _, variable = line.partition("\t")
            if (name := names.get(os.path.realpath(library))) is not None:
                found.setdefault(variable, set()).add(name)
    return {variable: tuple(sorted(found[variable])) for variable in sorted(found)}


def _build(library: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        raise NoWatcherError("there is no C compiler 'cc' on PATH")
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, str(_WATCHER), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise NoWatcherError(f"cc can't build {_WATCHER.name}: {built.stderr}")


def shows(names: Iterable[str], done: Sequence[Job], values: Sequence[str] = VALUES) -> dict[str, tuple[str, ...]]:
    """Return, for each variable, the values that change the outcome of jobs."""
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
    """Return the findings for a toolchain; ``few`` takes seconds, and tries only variables that are passed on."""
    asked = watch(tools, jobs(tools, few=few))
    tried = [name for name in asked if name in NEEDED] if few else list(asked)
    seen = shows(tried, jobs(tools, few=True), VALUES[-1:] if few else VALUES)
    return [Variable(name, asked[name], seen.get(name, ()), _use(name)) for name in asked]


def _use(name: str) -> str:
    if name in VARIABLES:
        return "in the key"
    return "handed on" if name in NEEDED else "the caller's" if name == "PWD" else "kept away"


def reads_environ(path: str) -> bool | None:
    """Return whether a library accesses the environment other than by ``getenv``; None if ``nm`` can't tell."""
    if shutil.which("nm") is None:
        return None
    told = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=False)
    symbols = {line.split()[-1].partition("@")[0] for line in told.stdout.splitlines()}
    return None if told.returncode else not symbols.isdisjoint({"environ", "__environ", "_environ"})


def main(arguments: list[str] | None = None) -> int:
    """Print the table; return 1 if a variable affects the output, is passed on and isn't in the key."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    Toolchain.add_arguments(parser)
    parser.add_argument("--json", metavar="FILE", help="also write the findings to FILE")
    parser.add_argument("--few", action="store_true", help="fewer jobs, and only variables that are passed on: seconds")
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

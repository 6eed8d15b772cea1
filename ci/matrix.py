# SPDX-License-Identifier: Apache-2.0
"""Compile real programs with several releases of NVRTC and matching headers, each in a separate environment.

    python -m ci.matrix                  all programs with each release, and with this environment's
    python -m ci.matrix --release 12.9   with one release
    python -m ci.matrix --few            the programs that CI runs
    python -m ci.matrix --cccl           all programs that use CCCL, with each of its releases (minutes)

Environments are created once, in ``.venv-nvrtc-12.9`` and so on beside ``.venv``, and kept. Each program is compiled in
one folder, then looked up by another process in a second folder with copies of the headers; then a header is edited.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ci.matrix_programs import CASES

ROOT = Path(__file__).resolve().parent.parent
NEWEST = "newest"
_PACKAGE = ["jinja2", "msgspec", "platformdirs", "xxhash"]
#: The requirements of each release's environment.
RELEASES = {
    "12.9": [
        f"nvidia-{name}-cu12==12.9.*" for name in ("cuda-nvrtc", "nvjitlink", "cuda-cccl", "cuda-runtime", "cuda-nvcc")
    ],
    "13.0": [f"nvidia-{name}==13.0.*" for name in ("cuda-nvrtc", "nvjitlink", "cuda-cccl", "cuda-runtime", "cuda-crt")],
}
#: The releases of CCCL, each with the NVRTC release to test it with, and the wheel.
CCCL = {
    **{v: ("12.9", f"nvidia-cuda-cccl-cu12=={v}.*") for v in ("12.3", "12.4", "12.5", "12.6", "12.8", "12.9")},
    "13.0": ("13.0", "nvidia-cuda-cccl==13.0.*"),
    **{v: (NEWEST, f"nvidia-cuda-cccl=={v}.*") for v in ("13.1", "13.2", "13.3")},
}
HEADERS = {
    "cfg.cuh": "#pragma once\n#define CFG_N 3\n",
    "warns.cuh": "static __device__ int warned() { int unused; return 3.7; }\n",
    "asserts.cuh": "static __device__ void check(int x) { assert(x == 3); }\n",
}


#: Words in pip's message if no registry answers.
_UNREACHABLE = ("ConnectionPool", "HTTP error ")
#: pip's message for a package that has no wheel at all.
_UNKNOWN = re.compile(r"requirement ([\w.-]+)\S* \(from versions: none\)")


class UnavailableError(Exception):
    """An environment can't be created: no registry answers, or it lacks NVIDIA's wheels for this machine.

    If only one package or release is missing, the tables above are wrong (RuntimeError).
    """


def environment(release: str) -> Path:
    """Return the interpreter of a release's environment, created if necessary; may raise UnavailableError."""
    if release == NEWEST:
        return Path(sys.executable)
    folder = ROOT / f".venv-nvrtc-{release}"
    python = folder / "bin" / "python"
    wanted = {"requirements": [*RELEASES[release], *_PACKAGE], "python": sys.version}
    with _alone():
        stamp = folder / "progcache-matrix.json"
        if not stamp.exists() or json.loads(stamp.read_text(encoding="utf-8")) != wanted:
            venv.create(folder, clear=True, symlinks=True)
            _install(["--python", str(python)], wanted["requirements"])
            stamp.write_text(json.dumps(wanted), encoding="utf-8")
    return python


def cccl(release: str) -> Path:
    """Return the header folder of a CCCL release, installed if necessary; may raise UnavailableError."""
    nvrtc, wheel = CCCL[release]
    folder = environment(nvrtc).parent.parent / f"cccl-{release}"
    with _alone():
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as made:
                _install([], [wheel], "--target", made)
                os.rename(made, folder)
                os.mkdir(made)
    return next(path.parent.parent for path in folder.rglob("cub/version.cuh"))


@contextmanager
def _alone() -> Iterator[None]:
    """Make a second process wait, by a lock on the checkout's directory, as ``ci/environment.py`` does."""
    lock = os.open(ROOT, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _install(where: Sequence[str], requirements: Sequence[str], *more: str) -> None:
    pip = [sys.executable, "-m", "pip", *where, "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    command = [*pip, "--no-deps" if more else "--prefer-binary", "--retries=1", "--timeout=20", *more, *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        error = UnavailableError if _is_out_of_reach(done.stderr) else RuntimeError
        raise error(f"pip can't install {', '.join(requirements)}: {done.stderr.strip()[-500:]}")


def _is_out_of_reach(said: str) -> bool:
    """Return whether an installation failed because no registry has NVIDIA's wheels, and not because of the tables."""
    if any(words in said for words in _UNREACHABLE):
        return True
    unknown = _UNKNOWN.search(said)
    if unknown is None:
        return False
    others = {name.partition("==")[0] for names in RELEASES.values() for name in names} - {unknown[1]}
    return not any(_is_known(name) for name in sorted(others))


def _is_known(name: str) -> bool:
    """Return whether a registry has a wheel of a package for this machine."""
    command = [sys.executable, "-m", "pip", "index", "versions", "--quiet", "--retries=1", "--timeout=20", name]
    return not subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode


@dataclass(frozen=True)
class Row:
    """The outcome for a program; ``trouble`` describes the problem, or is None."""

    name: str
    seconds: float
    trouble: str | None


def check(python: Path, cases: Sequence[str], *, headers: Path | None = None, thorough: bool = True) -> list[Row]:
    """Compile programs with an environment's compilers and headers: a miss, a hit from elsewhere, a miss after an edit.

    Parameters
    ----------
    python : Path
        The environment's interpreter.
    cases : sequence of str
        Names of programs.
    headers : Path, optional
        CCCL headers to use instead of the environment's own.
    thorough : bool
        Compile every program again without a cache, and every program with the edited header. Otherwise, compile only
        programs with ``place`` without a cache, and only the first three with the edited header.
    """
    with tempfile.TemporaryDirectory(prefix="progcache-matrix-") as scratch:
        here, there = Path(scratch, "here"), Path(scratch, "there")
        roots = _include_roots(python)
        if headers is not None:
            roots[-1] = str(headers)
        copies = [str(Path(scratch, f"include{n}")) for n in range(len(roots))]
        for folder in (here, there):
            folder.mkdir()
            for name, text in HEADERS.items():
                (folder / name).write_text(text, encoding="utf-8")
                os.utime(folder / name, (1, 1))
        for root, copy in zip(roots, copies, strict=True):
            shutil.copytree(root, copy)
        cache = str(Path(scratch, "cache"))
        fresh = list(cases) if thorough else [name for name in cases if CASES[name].place]
        start = time.monotonic()
        made = _run(python, here, cache, cases, [str(here), *roots], [])
        seconds = (time.monotonic() - start) / max(len(cases), 1)
        served = _run(python, there, cache, cases, [str(there), *copies], fresh)
        (here / "cfg.cuh").write_text("#pragma once\n#define CFG_N 5\n", encoding="utf-8")
        os.utime(here / "cfg.cuh", (2, 2))
        edited = _run(python, here, cache, list(cases)[: None if thorough else 3], [str(here), *roots], [])
    return [Row(n, seconds, _trouble(CASES[n].place, made[n], served[n], edited.get(n))) for n in cases]


def _trouble(place: bool, made: dict[str, Any], served: dict[str, Any], edited: dict[str, Any] | None) -> str | None:  # noqa: FBT001
    for which, row in (("here", made), ("there", served), ("edited", edited or made)):
        if "refused" in row:
            return f"{which}: refused: {' '.join(row['refused'].split())[:300]}"
        if row["reason"] is not None:
            return f"{which}: isn't kept: {row['reason']}"
    if made["hit"]:
        return "here: a hit in an empty cache"
    if not served["hit"] and not place:
        return f"there: a miss: {'; '.join(served['why'])}"
    if served["hit"] and served["digest"] != made["digest"]:
        return "there: a hit with another output"
    if served["exactly"] != served.get("fresh", served["exactly"]):
        return "there: not what a fresh compile gives"
    if place and not served["hit"] and served.get("fresh") == made["exactly"]:
        return "there: a miss, though the output is the same"
    if edited is not None and (edited["hit"] or edited["digest"] == made["digest"]):
        return "edited: what was made before the edit"
    return None


def _include_roots(python: Path) -> list[str]:
    """Return the folders of CUDA's headers, of the compiler's if they are separate, and of CCCL's headers."""
    code = (
        "import os\nfrom cuda_progcache.keys.toolchain import header_root\ncuda = header_root('cuda')\n"
        "apart = os.path.join(os.path.dirname(os.path.dirname(cuda)), 'cuda_nvcc', 'include')\n"
        "print(*[cuda, *[apart] * os.path.isdir(apart), header_root('cccl')], sep='\\n')"
    )
    return _python(python, "-c", code).splitlines()


def _run(
    python: Path, folder: Path, cache: str, cases: Sequence[str], include_path: Sequence[str], fresh: Sequence[str]
) -> dict[str, Any]:
    given = {"cache": cache, "cases": list(cases), "include_path": list(include_path), "fresh": list(fresh)}
    answer = _python(python, str(ROOT / "ci" / "matrix_programs.py"), cwd=folder, text=json.dumps(given))
    found: dict[str, Any] = json.loads(answer)
    return found


def _python(python: Path, *arguments: str, cwd: Path | None = None, text: str = "") -> str:
    # Leave out this environment's variables, such as the paths of its compilers, and keep warnings out of the answers.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("CUDA_", "PYTHON"))}
    given = kept | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(python), *arguments], cwd=cwd, env=given, input=text, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{python}: {done.stderr[-2000:]}")
    return done.stdout


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def main(arguments: list[str] | None = None) -> int:
    """Print a table; return 1 if an outcome is wrong, 2 if an environment can't be created."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", action="append", choices=[*RELEASES, NEWEST, *CCCL], help="only this; repeatable")
    parser.add_argument("--few", action="store_true", help="fewer compiles; without --cccl, fewer programs, too")
    parser.add_argument("--cccl", action="store_true", help="run the releases of CCCL instead of NVRTC")
    given = parser.parse_args(arguments)
    wrong = 0
    for release in given.release or (CCCL if given.cccl else [*RELEASES, NEWEST]):
        cases = [
            name
            for name, case in CASES.items()
            if (case.cccl and _number(case.since) <= _number(release) if given.cccl else case.quick or not given.few)
        ]
        try:
            python = environment(CCCL[release][0] if given.cccl else release)
            headers = cccl(release) if given.cccl else None
        except UnavailableError as error:
            print(error, file=sys.stderr)
            return 2
        start = time.monotonic()
        rows = check(python, cases, headers=headers, thorough=not given.few)
        bad = [row for row in rows if row.trouble]
        wrong += len(bad)
        what = "CCCL" if given.cccl else "NVRTC"
        seconds = time.monotonic() - start
        print(f"{what} {release}: {len(rows) - len(bad)} of {len(rows)} right, {seconds:.0f} s", flush=True)
        for row in bad:
            print(f"  {row.name}: {row.trouble}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

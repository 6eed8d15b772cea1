# SPDX-License-Identifier: Apache-2.0
"""Places: each a directory, a virtual environment and a user."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ci.bench.programs import headers
from ci.elsewhere.programs import HEADERS, Asked

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("child.py")
OTHER_USER = 12345

# Where a wheel of the long run keeps its headers, below site-packages.
_INCLUDES = {
    "cutlass": "cutlass_library/source/include",
    "mathdx": "nvidia/mathdx/include",
    "mathdx_cutlass": "nvidia/mathdx/external/cutlass/include",
}


@dataclass(frozen=True)
class Environment:
    """A virtual environment with the package in it, as a wheel installs it.

    Attributes
    ----------
    prefix : Path
    site_packages : Path
    version : str
        Python's.
    """

    prefix: Path
    site_packages: Path
    version: str

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.prefix / "bin" / "python")


@dataclass(frozen=True)
class Place:
    """Where programs are compiled or asked for.

    Attributes
    ----------
    environment : Environment
    directory : Path
        The project lies in ``project`` below it, the user's home is ``home``.
    user : int or None
        To run as; None is who runs this.
    """

    environment: Environment
    directory: Path
    user: int | None = None

    @property
    def project(self) -> Path:
        """The project's directory, in which programs are compiled."""
        return self.directory / "project"

    def furnish(self) -> None:
        """Write the project's headers, and give everything to the user."""
        (self.directory / "home").mkdir(parents=True)
        for name, text in HEADERS.items():
            path = self.project / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        self.own(self.directory)

    def own(self, path: Path) -> None:
        """Give a tree to the place's user."""
        if self.user is not None:
            for folder, _, files in os.walk(path):
                for name in (folder, *(os.path.join(folder, file) for file in files)):
                    os.chown(name, self.user, self.user)

    def answers(self, programs: list[Asked], cache: tuple[str, Path] | None) -> dict[str, Any]:
        """Ask for programs here, with a cache (its kind and path) or with none.

        Returns
        -------
        dict
            ``answers``, a list as long as `programs`; ``compilers``, the compiler libraries that were loaded; and
            ``cuda_core``, whether that was imported.
        """
        asked = {
            "programs": [self.filled(program.to_dict()) for program in programs],
            "cache": None if cache is None else {"kind": cache[0], "path": str(cache[1])},
        }
        done = self.run([str(CHILD)], input=json.dumps(asked))
        answered: dict[str, Any] = json.loads(done.stdout)
        return answered

    def run(
        self,
        arguments: list[str],
        *,
        variables: Mapping[str, str] | None = None,
        allowed: tuple[int, ...] = (0,),
        **given: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run the environment's Python with `arguments`, here and as the user; an exit status but these raises."""
        command = [*_as_user(self.user), self.environment.python, "-I", *arguments]
        settings = {"HOME": str(self.directory / "home"), "PATH": os.environ.get("PATH", ""), "LANG": "C.UTF-8"}
        settings |= variables or {}
        done = subprocess.run(
            command, cwd=self.project, env=settings, capture_output=True, text=True, check=False, **given
        )
        if done.returncode not in allowed:
            raise RuntimeError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def filled(self, value: Any) -> Any:
        """Put the place's directories into a JSON value."""
        if isinstance(value, dict):
            return {name: self.filled(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [part for each in value for part in self._filled_part(each)]
        return value.replace("{here}", str(self.project)) if isinstance(value, str) else value

    def _filled_part(self, value: Any) -> list[Any]:
        site = self.environment.site_packages
        if value == "{headers}":
            return [str(site / folder) for folder in _header_folders()]
        if isinstance(value, str) and value[1:-1] in _INCLUDES:
            return [str(site / _INCLUDES[value[1:-1]])]
        return [self.filled(value)]


def two_users() -> bool:
    """Whether this machine lets the second place have a user of its own."""
    return os.getuid() == 0 and shutil.which("setpriv") is not None


def _as_user(user: int | None) -> list[str]:
    if user is None:
        return []
    # The interpreter may lie below a home that is closed to others: this much of root is kept, to read it.
    may_read = ["--inh-caps", "-all,+dac_read_search", "--ambient-caps", "-all,+dac_read_search"]
    return ["setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups", *may_read]


def _header_folders() -> list[str]:
    return [os.path.relpath(folder, sysconfig.get_path("purelib")) for folder in headers()]


def other_pythons() -> list[str]:
    """Interpreters of other versions that the package supports and that this machine has."""
    found = {}
    versions = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    for minor in (11, 12, 13):
        if sys.version_info[1] != minor:
            here = [str(path) for path in versions.glob(f"3.{minor}.*/bin/python3.{minor}")]
            path = next(iter(here), None) or shutil.which(f"python3.{minor}")
            if path is not None:
                found[minor] = path
    return list(found.values())


def built_wheel(folder: Path) -> Path:
    """Build the package's wheel."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", str(folder), str(ROOT)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def make_environment(
    prefix: Path,
    wheel: Path,
    python: str | None = None,
    wheels: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> Environment:
    """Make a virtual environment with the package and what it stands on.

    What fits the interpreter is copied from the environment that runs this, in the same versions; the rest is installed
    from the registry.

    Parameters
    ----------
    prefix : Path
        Where to.
    wheel : Path
        The package's.
    python : str, optional
        The interpreter; the running one by default.
    wheels : tuple of str
        Further wheels.
    without : tuple of str
        Beginnings of the names of distributions that are left out.

    Raises
    ------
    subprocess.CalledProcessError
        If something can't be installed.
    """
    if python is None:
        venv.create(prefix, with_pip=False, symlinks=True)
    else:
        subprocess.run([python, "-m", "venv", "--without-pip", str(prefix)], check=True)
    ask = "import sys, sysconfig; print(sysconfig.get_path('purelib'), sys.version.split()[0])"
    said = subprocess.run([prefix / "bin" / "python", "-I", "-c", ask], check=True, capture_output=True, text=True)
    site, version = said.stdout.split()
    environment = Environment(prefix, Path(site), version)
    same = version.split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    missing = list(wheels)
    for distribution in _requirements():
        if distribution.name.lower().startswith(without):
            continue
        if same or _fits_any(distribution):
            _copy(distribution, environment.site_packages)
        elif distribution.name not in {"cuda-core", "cuda-bindings", "cuda-python"}:  # a hit needs none of them
            missing.append(f"{distribution.name}=={distribution.version}")
    with zipfile.ZipFile(wheel) as packed:  # pure Python and data: this is all that installing it does
        packed.extractall(environment.site_packages)
    if missing:
        pip = [sys.executable, "-m", "pip", "--python", environment.python, "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--no-compile", *missing], check=True, capture_output=True)
    return environment


def _requirements() -> list[importlib.metadata.Distribution]:
    """What the package and its headers extra need, with all that these need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_ = [Requirement("cuda-progcache[headers]")]
    while open_:
        asked = open_.pop()
        distribution = importlib.metadata.distribution(asked.name)
        for text in distribution.requires or ():
            needed = Requirement(text)
            wanted = needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in asked.extras or {""}
            )
            name = canonicalize_name(needed.name)
            if wanted and name not in found and name != "cuda-progcache":
                found[name] = importlib.metadata.distribution(name)
                open_.append(needed)
    return list(found.values())


def _fits_any(distribution: importlib.metadata.Distribution) -> bool:
    tags = (distribution.read_text("WHEEL") or "").splitlines()
    return all("py3-none" in tag for tag in tags if tag.startswith("Tag:"))


def _copy(distribution: importlib.metadata.Distribution, site_packages: Path) -> None:
    for file in distribution.files or ():
        if ".." not in file.parts and "__pycache__" not in file.parts:
            target = site_packages / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)

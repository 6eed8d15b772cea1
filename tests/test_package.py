# SPDX-License-Identifier: Apache-2.0
"""The package as shipped: the sdist, the wheel built from it, and an installation of that wheel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

# Run in a single xdist worker, so that the wheel is built and installed once.

ROOT = Path(__file__).parent.parent
HEAVY = (
    "cuda",
    "jinja2",
    "numpy",
    "rich",
    "click",
    "platformdirs",
    "msgspec",
    "xxhash",
    "asyncio",
    "importlib.metadata",
    "subprocess",
    "tempfile",
)


def run(*command, cwd, **settings):
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def heavy_modules(python, statement, cwd):
    """Return the heavy modules that a statement imports in a new interpreter."""
    code = (
        "import json, sys\nbefore = set(sys.modules)\n"
        f"{statement}\n"
        f"print(json.dumps(sorted(m for m in {HEAVY!r} if m in sys.modules and m not in before)))"
    )
    return json.loads(run(python, "-c", code, cwd=cwd))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", directory, cwd=ROOT)
    (archive,) = directory.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """Build the wheel as a user does: from the sdist, outside the checkout."""
    directory = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    (source,) = directory.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", directory / "dist", cwd=source)
    (made,) = (directory / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Create an environment with the wheel that also sees this environment's packages; return its interpreter."""
    directory = tmp_path_factory.mktemp("installed") / "venv"
    venv.create(directory, with_pip=False, symlinks=True)
    python = directory / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    run(*pip, cwd=directory)
    # Not before pip runs, which would otherwise replace this environment's editable installation.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory).strip())
    (site / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_sdist_has_the_sources_and_nothing_else(sdist):
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "Makefile"} <= set(names)
    assert {name.partition("/")[0] for name in names if "/" in name} == {"cuda_progcache", "kernels", "tests", "ci"}
    assert not [name for name in names if "__pycache__" in name or "/results/" in name]


def test_wheel_carries_the_package_its_types_and_the_kernel_library(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cuda_progcache/__init__.py", "cuda_progcache/py.typed", "cuda_progcache/kernels/manifest.toml"} <= set(
        names
    )
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kernels").rglob("*.j2")}
    assert templates
    assert {f"cuda_progcache/{name}" for name in templates} <= set(names)
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"cuda_progcache"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_installed_package_finds_its_own_kernel_library(installed, tmp_path):
    code = "import cuda_progcache as p; library = p.KernelLibrary(); print(p.__file__, len(library), *library.names)"
    file, count, *names = run(installed, "-c", code, cwd=tmp_path).split()
    assert Path(file).is_relative_to(installed.parent.parent)
    assert int(count) == len(names) >= 10
    assert "axpby" in names


def test_installed_kernel_library_renders(installed, tmp_path):
    code = "import cuda_progcache as p; print(p.KernelLibrary().render('axpby').modules[0].source)"
    assert "__global__" in run(installed, "-c", code, cwd=tmp_path)


def test_installed_entry_points(installed, tmp_path):
    code = (
        "from importlib.metadata import entry_points, version\n"
        "(plugin,) = entry_points(group='pytest11', name='progcache')\n"
        "print(version('cuda-progcache'), plugin.load().__name__)"
    )
    version, plugin = run(installed, "-c", code, cwd=tmp_path).split()
    assert plugin == "cuda_progcache.pytest_plugin"
    assert re.search(rf"\b{re.escape(version)}\b", run(installed.parent / "cuda-progcache", "--version", cwd=tmp_path))
    code = "import cuda_progcache; print(cuda_progcache.__version__)"
    assert run(installed, "-c", code, cwd=tmp_path).strip() == version


def test_import_is_light(installed, tmp_path):
    assert heavy_modules(installed, "import cuda_progcache", tmp_path) == []


def test_the_light_import_check_sees_a_heavy_import(installed, tmp_path):
    assert "click" in heavy_modules(installed, "import cuda_progcache, click", tmp_path)


def test_every_public_name_is_there():
    import cuda_progcache

    assert len(set(cuda_progcache.__all__)) == len(cuda_progcache.__all__)
    assert set(cuda_progcache.__all__) <= set(dir(cuda_progcache))
    for name in cuda_progcache.__all__:
        assert getattr(cuda_progcache, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        cuda_progcache.no_such_name  # noqa: B018


def test_every_public_class_and_function_is_documented():
    import cuda_progcache

    public = {name: getattr(cuda_progcache, name) for name in cuda_progcache.__all__}
    assert [name for name, value in public.items() if callable(value) and not value.__doc__] == []

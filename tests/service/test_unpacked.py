# SPDX-License-Identifier: Apache-2.0
"""Kernel libraries in archives: as importlib.resources gives them, and the bundled one of a zipped package."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import pytest

import cuda_progcache
from cuda_progcache import KernelLibrary
from cuda_progcache.errors import ManifestError

MANIFEST = """
format = 1
[kernels.fill]
template = "parts/fill.cu.j2"
entry_points = ["fill"]
options = { include_path = ["inc"] }
[[kernels.fill.variants]]
"""
FILES = {
    "manifest.toml": MANIFEST,
    "parts/fill.cu.j2": '#include "value.h"\nextern "C" __global__ void fill(int* x) { x[threadIdx.x] = VALUE; }\n',
    "inc/value.h": "#define VALUE 3\n",
}
# A zipped application, as zipapp makes it: its own kernels, and the package with the bundled ones.
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from importlib.resources import files
import cuda_progcache
assert cuda_progcache.__file__.startswith(sys.argv[1])
from cuda_progcache import CompileService, KernelLibrary
library = KernelLibrary(files("application") / "kernels")
assert KernelLibrary(files("application") / "kernels").path == library.path, "unpacked once"
for made in (CompileService(sys.argv[2], library=library), CompileService(sys.argv[2])):
    print(made.kernel("fill" if made.library is library else "axpby", arch="sm_90").digest)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "application.zip"
    package = Path(cuda_progcache.__file__).parent
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("application/__init__.py", "")
        for name, text in FILES.items():
            packed.writestr(f"application/kernels/{name}", text)
        for file in package.rglob("*.py"):
            packed.write(file, f"cuda_progcache/{file.relative_to(package)}")
        for file in KernelLibrary().path.iterdir():
            packed.write(file, f"cuda_progcache/kernels/{file.name}")
    return path


def test_what_an_archive_holds_is_what_a_folder_holds(archive, tmp_path):
    """The same programs, by the same keys; and nothing is left of what was unpacked."""
    folder, temporary = tmp_path / "folder", tmp_path / "temporary"
    temporary.mkdir()
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    command = [sys.executable, "-c", SCRIPT, str(archive), str(tmp_path / "cache")]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    service = cuda_progcache.CompileService(tmp_path / "cache", library=folder)
    bundled = cuda_progcache.CompileService(tmp_path / "cache")
    made = [service.kernel("fill", arch="sm_90"), bundled.kernel("axpby", arch="sm_90")]
    assert [one.hit for one in made] == [True, True]
    assert [one.digest for one in made] == done.stdout.split()
    assert os.listdir(temporary) == []


def test_what_is_no_library_is_said(archive):
    with pytest.raises(ManifestError, match="a kernel library must be"):
        KernelLibrary(3)
    with zipfile.ZipFile(archive) as packed:
        for name in ("application/nothing", "application/kernels/manifest.toml"):
            with pytest.raises(ManifestError, match="is not a folder or doesn't exist"):
                KernelLibrary(zipfile.Path(packed, name))
    assert KernelLibrary(files("cuda_progcache").joinpath("..", "kernels")).names, "a path is one, too"

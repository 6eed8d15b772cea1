# SPDX-License-Identifier: Apache-2.0
"""``export``: what a lockfile needs, a difference, an image, a wheel whose layer the default cache finds."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What is asked of a layer: a hit of a program that only it has, then one of the cache's own, before which nothing may
# have looked for layers.
ASK = """
import sys
from cuda_progcache import CompileService
own = CompileService().kernel("fill", arch="sm_90") if "own" in sys.argv else None
print(own is not None and own.hit, "cuda_progcache.store.layers" in sys.modules)
"""


@pytest.fixture
def locked(cli, library, tmp_path):
    """The library's three programs in the cache, one more that nothing needs, and a lockfile."""
    manifest = ("--manifest", library, "--arch", "sm_90")
    cli("prewarm", *manifest)
    cli("lock", *manifest, "-o", tmp_path / "a.lock")
    (tmp_path / "other.cu").write_text('extern "C" __global__ void other() {}\n')
    cli("compile", tmp_path / "other.cu", "--arch", "sm_90")
    return ("--lock", tmp_path / "a.lock", "--manifest", library)


def test_exactly_what_a_lock_needs(cli, cli_json, locked, library, root, tmp_path):
    assert cli_json("export", tmp_path / "all.tar")["entries"] == 4
    assert cli_json("export", tmp_path / "lock.tar", *locked)["entries"] == 3
    assert cli_json("export", tmp_path / "m.tar", "--manifest", library, "--arch", "sm_90")["entries"] == 3
    assert (tmp_path / "m.tar").read_bytes() == (tmp_path / "lock.tar").read_bytes()
    assert cli_json("export", tmp_path / "new.tar", "--since", tmp_path / "a.lock")["entries"] == 1
    assert cli_json("export", tmp_path / "late.tar", "--since", "1h")["entries"] == 4
    assert "nothing to export" in cli("export", tmp_path / "no.tar", "--since", "2999-01-01", code=5).stderr
    assert "is neither a time" in cli("export", tmp_path / "no.tar", "--since", "then", code=2).stderr
    assert "--oci" in cli("export", code=2).stderr
    assert "must be given together" in cli("export", "--wheel", tmp_path, code=2).stderr
    (library / "fill.cu.j2").write_text((library / "fill.cu.j2").read_text() + "__device__ int edited;\n")
    error = cli("export", tmp_path / "no.tar", *locked, code=1).stderr
    assert "1 of 3 programs can't be exported" in error
    assert "template fill.cu.j2 changed" in error
    assert not (tmp_path / "no.tar").exists()


def test_an_image(cli, cli_json, locked, tmp_path):
    told = cli_json("export", *locked, "--oci", tmp_path / "image")
    assert told["entries"] == 3
    cli("export", *locked, "--oci", tmp_path / "again")
    files = sorted(path.relative_to(tmp_path / "image") for path in (tmp_path / "image").rglob("*") if path.is_file())
    assert all((tmp_path / "image" / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)

    def blob(about):
        data = (tmp_path / "image" / "blobs" / "sha256" / about["digest"].removeprefix("sha256:")).read_bytes()
        assert (f"sha256:{hashlib.sha256(data).hexdigest()}", len(data)) == (about["digest"], about["size"])
        return data

    index = json.loads((tmp_path / "image" / "index.json").read_text())
    manifest = json.loads(blob(index["manifests"][0]))
    config = json.loads(blob(manifest["config"]))
    (layer,) = manifest["layers"]
    plain = gzip.decompress(blob(layer))
    assert layer["mediaType"].endswith(".tar+gzip")
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(plain).hexdigest()}"]
    labels = config["config"]["Labels"]
    assert labels["cache.progcache.image/entry-count"] == "3"
    assert labels["cache.progcache.image/cache-size-bytes"] == str(told["bytes"])
    assert "3 compiled CUDA programs" in labels["cache.progcache.image/summary"]
    (tmp_path / "layer.tar").write_bytes(plain)
    with tarfile.open(tmp_path / "layer.tar") as tar:
        tar.extractall(tmp_path / "mounted", filter="data")
    assert cli_json("check", tmp_path / "mounted", *locked)["counts"]["hit"] == 3
    if shutil.which("skopeo"):
        said = subprocess.run(
            ["skopeo", "inspect", f"oci:{tmp_path / 'image'}"], capture_output=True, text=True, check=True
        )
        assert json.loads(said.stdout)["Labels"] == labels


def test_a_name_with_brackets_is_a_name(cli, cli_json, kept, root, tmp_path):
    from cuda_progcache import FileStreamProgramCache

    with FileStreamProgramCache() as cache:
        for name in ("k[3].cu", "k3.cu"):
            cache.publish(name, b"x", {"name": name})
    assert cli_json("export", tmp_path / "b.tar", "--kernel", "k[3].cu")["entries"] == 1
    assert cli_json("export", tmp_path / "b.tar", "--kernel", "k*")["entries"] == 2
    assert "no program is called" in cli("export", tmp_path / "b.tar", "--kernel", "k[0-9].cu", code=5).stderr


def test_what_is_there_is_not_written_over(cli, locked, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "nothing was written" in cli("export", *locked, "--oci", tmp_path / "full", code=1).stderr
    assert os.listdir(tmp_path / "full") == ["file"]
    assert "distribution name" in cli("export", *locked, "--wheel", tmp_path / "d", "--name", "../x", code=1).stderr
    assert not (tmp_path / "d").exists()


def test_a_wheel_is_a_layer_of_the_default_cache(cli, cli_json, locked, library, root, tmp_path):
    told = cli_json("export", *locked, "--wheel", tmp_path / "dist", "--name", "My.Kernels-sm90")
    wheel = Path(told["path"])
    assert wheel.name == "my_kernels_sm90-1.0-py3-none-any.whl"
    first = wheel.read_bytes()
    with zipfile.ZipFile(wheel) as archive:  # a layer says nothing of the machine that made it
        assert not any(
            platform.node().encode() in archive.read(name) for name in archive.namelist() if "/latest/" in name
        )
    cli("export", *locked, "--wheel", tmp_path / "dist", "--name", "My.Kernels-sm90")
    assert wheel.read_bytes() == first
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    info = site / "my_kernels_sm90-1.0.dist-info"
    distribution = PathDistribution(info)
    assert [(p.group, p.value) for p in distribution.entry_points] == [
        ("cuda_progcache.layers", "my_kernels_sm90.layer")
    ]
    assert Parser().parsestr((info / "METADATA").read_text())["Name"] == "My.Kernels-sm90"
    for file in distribution.files:
        data = (site / file).read_bytes()
        assert file.hash is None or file.size == len(data)

    ask = ASK.replace("CompileService()", f"CompileService(library={str(library)!r})")

    def asked(*arguments, **settings):
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"} | settings
        done = subprocess.run(
            [sys.executable, "-c", ask, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    # The cache's own hit looks for no layer; an empty cache hits in the layer, frozen, read-only or as it is.
    assert asked("own") == ["True", "False"]
    empty = {"CUDA_PROGCACHE_DIR": str(tmp_path / "empty")}
    for mode in ("rw", "ro", "frozen"):
        assert asked("own", CUDA_PROGCACHE=mode, **empty) == ["True", "True"], mode
    assert asked("own", CUDA_PROGCACHE="off", **empty) == ["False", "False"]
    if os.geteuid() == 0:
        (tmp_path / "file").write_text("")
        unusable = {"CUDA_PROGCACHE_DIR": str(tmp_path / "file" / "cache"), "PYTHONWARNINGS": "ignore"}
        assert asked("own", **unusable)[0] == "True"

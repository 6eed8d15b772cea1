# SPDX-License-Identifier: Apache-2.0
"""Layers in installed packages: declared by entry points, used by the default cache, and checked before use."""

import sys

import pytest

from cuda_progcache import FileStreamProgramCache, ProgCacheWarning
from cuda_progcache.store import layers


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages on ``sys.path``; the value is a function that installs a package with a layer there."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder), str(tmp_path / "absent"), __file__])

    def install(name, *, text=None, at=None, programs=(b"key",)):
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        lines = f"[console_scripts]\nx = y:z\n\n[{layers.GROUP}]\n# of kernels\n{name} = {name}.layer\n[other]\na = b\n"
        (info / "entry_points.txt").write_text(lines if text is None else text)
        place = at or folder / name / "layer"
        with FileStreamProgramCache(place, mode="rw") as cache:
            for key in programs:
                cache.publish(key, name.encode() + key, {"name": name})
        return place

    return install


def test_they_are_found_and_only_by_the_default_cache(site, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "own"))
    one, two = site("one"), site("two", programs=[b"key", b"more"])
    before = {path: path.stat().st_mtime_ns for path in one.rglob("*")}
    cache = FileStreamProgramCache()
    assert layers.directories() == (str(one), str(two))
    assert [cache.get(b"key"), cache[b"more"], cache.get(b"none")] == [b"onekey", b"twomore", None]
    assert cache.load(b"more").record["name"] == "two"
    assert (cache.stats().hits, cache.stats().misses) == (3, 1)
    assert len(cache) == 0
    assert [str(root) for root in cache.roots] == [str(tmp_path / "own"), str(one), str(two)]
    cache[b"key"] = b"own"
    assert cache.get(b"key") == b"own"
    assert FileStreamProgramCache(tmp_path / "other").get(b"key") is None
    assert {path: path.stat().st_mtime_ns for path in one.rglob("*")} == before


@pytest.mark.parametrize("value", ["three.absent", "nothing.layer", "not a path", "three.layer.entries"])
def test_one_that_is_not_there_is_told_of(value, site, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "own"))
    site("three", text=f"[{layers.GROUP}]\nx = {value}\n")
    good = site("four")
    with pytest.warns(ProgCacheWarning, match="isn't used: it isn't a cache directory"):
        assert FileStreamProgramCache().get(b"key") == b"fourkey"
    assert layers.directories() == (str(good),)


def test_one_of_an_editable_install_is_found_where_it_lies(site, tmp_path, monkeypatch):
    source = tmp_path / "source"
    place = site("five", at=source / "five" / "layer")
    (source / "five" / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.setattr(sys, "path", [*sys.path, str(source)])
    assert layers.directories() == (str(place),)
    assert "five" not in sys.modules


def test_a_damaged_entry_of_a_layer_is_a_miss_and_stays(site, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "own"))
    place = site("six")
    (entry,) = (path for path in (place / "entries").rglob("*") if path.is_file())
    entry.write_bytes(b"?" + entry.read_bytes()[1:])
    assert FileStreamProgramCache().get(b"key") is None
    assert entry.exists()

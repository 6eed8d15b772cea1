# SPDX-License-Identifier: Apache-2.0
"""Bundles: the same entries give the same bytes, and only a whole, valid bundle is imported."""

from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from cuda_progcache.errors import BundleError, ProgCacheError, StoreError
from cuda_progcache.store import FileStreamProgramCache, entry_digest
from cuda_progcache.store.bundle import write
from cuda_progcache.store.records import Version, encode

CUBIN = b"\x7fELF" + bytes(range(256)) * 8


def opened(path, **options):
    return FileStreamProgramCache(path, durability="none", **options)


@pytest.fixture
def cache(tmp_path):
    cache = opened(tmp_path / "cache")
    for i, arch in enumerate(("sm_80", "sm_90", "sm_90", "sm_100")):
        cache.publish(f"k{i}", CUBIN[i:], {"name": f"k{i}", "arch": arch, "log": 'line\n"\udc80"'})
    cache["plain"] = b"no record"
    return cache


@pytest.fixture
def bundle(cache, tmp_path):
    cache.export(tmp_path / "all.bundle")
    return tmp_path / "all.bundle"


def contents(cache):
    return {info.digest: (info.path.read_bytes(), info.record, info.created, info.checksum) for info in cache.entries()}


def test_there_and_back(cache, tmp_path):
    report = cache.export(tmp_path / "b")
    assert (report.entries, report.damaged, report.path) == (5, 0, str(tmp_path / "b"))
    assert report.bytes == (tmp_path / "b").stat().st_size
    other = opened(tmp_path / "other")
    assert other.import_(tmp_path / "b") == (5, sum(i.size for i in cache.entries()), 0, 0, 0)
    assert contents(other) == contents(cache)
    assert other.load("k1") == cache.load("k1")
    assert other.verify().clean
    assert other.import_(tmp_path / "b") == (0, 0, 5, 0, 0)


def test_the_same_entries_give_the_same_bytes(cache, bundle, tmp_path):
    time.sleep(0.01)
    cache.export(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == bundle.read_bytes()
    other = opened(tmp_path / "other", max_size_bytes=10**6)
    other.import_(bundle)
    for key in ("k2", "plain"):
        other.get(key)
    other["k9"] = b"gone again"
    del other["k9"]
    other.export(tmp_path / "from-other")
    assert (tmp_path / "from-other").read_bytes() == bundle.read_bytes()
    other.publish("k0", CUBIN[:50], {"name": "replaced", "arch": "sm_80"})
    other.publish("k0", CUBIN[0:], {"name": "k0", "arch": "sm_80"})
    other.export(tmp_path / "different")
    assert (tmp_path / "different").read_bytes() != bundle.read_bytes()


def test_tar_reads_a_bundle_and_unpacks_a_cache(cache, bundle, tmp_path):
    listed = subprocess.run(["tar", "-tvf", bundle], capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(listed) == 11
    assert all("1970-01-01" in line and line.startswith("-rw-r--r-- 0/0") for line in listed)
    assert listed[-1].endswith("bundle.json")
    (tmp_path / "unpacked").mkdir(mode=0o700)
    subprocess.run(["tar", "-xf", bundle, "-C", tmp_path / "unpacked"], check=True)
    assert contents(opened(tmp_path / "unpacked")) == contents(cache)


def test_merging(cache, bundle, tmp_path):
    other = opened(tmp_path / "other")
    other.publish("k0", b"mine", {"name": "mine"})
    other.publish("own", b"own", {})
    digest = entry_digest("k1")
    other.publish("k1", CUBIN, {})
    (other.path / "entries" / digest[:2] / digest[2:]).write_bytes(b"damaged")
    report = other.import_(bundle)
    assert (report.imported, report.present) == (4, 1)
    assert other["k0"] == b"mine"
    assert other["k1"] == CUBIN[1:]
    assert len(other) == 6


def test_filters(cache, bundle, tmp_path):
    assert cache.export(tmp_path / "90", archs=["sm_90"]).entries == 2
    assert cache.export(tmp_path / "many", archs=("sm_80", "sm_100", "sm_70")).entries == 2
    assert cache.export(tmp_path / "small", filter=lambda info: info.size < 100).entries == 1
    report = cache.export(tmp_path / "both", archs=["sm_90"], filter=lambda info: info.record["name"] == "k2")
    assert report.entries == 1
    other = opened(tmp_path / "other")
    assert other.import_(tmp_path / "90").imported == 2
    assert other.import_(bundle, archs=["sm_100", "sm_90"]) == (1, len(CUBIN) - 3, 2, 2, 0)
    assert sorted(info.record["arch"] for info in other.entries()) == ["sm_100", "sm_90", "sm_90"]
    assert cache.export(tmp_path / "none", archs=[]).entries == 0
    assert other.import_(tmp_path / "none").imported == 0


def test_damaged_entries_are_left_out_and_counted(cache, tmp_path):
    path = cache.info(entry_digest("k1")).path
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    report = cache.export(tmp_path / "b")
    assert (report.entries, report.damaged) == (4, 1)
    assert path.exists()
    assert opened(tmp_path / "other").import_(tmp_path / "b").imported == 4


def test_a_cap_refuses_what_is_larger(bundle, tmp_path):
    capped = opened(tmp_path / "capped", max_size_bytes=1000)
    report = capped.import_(bundle)
    assert (report.imported, report.refused) == (1, 4)
    assert capped["plain"] == b"no record"


def test_exports_replace_in_one_step_and_leave_nothing(cache, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "b").write_bytes(b"before")
    with pytest.raises(ZeroDivisionError):
        cache.export(out / "b", filter=lambda _: 1 / 0)
    assert (out / "b").read_bytes() == b"before"
    with pytest.raises(StoreError, match="none"):
        cache.export(out / "none" / "b")
    assert os.listdir(out) == ["b"]
    cache.export(out / "b")
    assert os.listdir(out) == ["b"]


def test_no_lookup_is_counted(cache, bundle, tmp_path):
    other = opened(tmp_path / "other")
    other.import_(bundle)
    other.import_(bundle)
    stats = other.stats()
    assert (stats.hits, stats.misses, stats.stored) == (0, 0, 5)
    assert cache.stats().hits == 0


# Bundles that are refused


def members(path):
    with tarfile.open(path) as tar:
        return [(member, tar.extractfile(member).read()) for member in tar]


def rebuild(path, items, *, kind=tarfile.USTAR_FORMAT, index=True):
    """Write the members to a new bundle, with a matching index unless ``index`` is False."""
    files = {}
    with tarfile.open(path, "w", format=kind) as tar:
        for member, given in items:
            ours = member.name == "bundle.json" and index
            data = json.dumps({"format": 1, "files": files}).encode() if ours else given
            member.size = len(data) if member.type == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(data))
            files[member.name] = {"size": member.size, "sha256": hashlib.sha256(data).hexdigest()}


def extra(name, data=b"x", **fields):
    member = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(member, field, value)
    return (member, data)


DIGEST = "ab" * 32
NAME = f"entries/ab/{DIGEST[2:]}"


def refused(tmp_path, path, match):
    """Assert that importing ``path`` raises an error that names the file and the reason, and writes nothing."""
    root = tmp_path / "target" / "cache"
    cache = opened(root)
    cache["mine"] = b"mine"
    gc.collect()  # earlier store objects write their counters when they are collected
    cache.close()
    before = sorted(str(p) for p in (tmp_path / "target").rglob("*"))
    with pytest.raises(BundleError, match=match) as excinfo:
        cache.import_(path)
    assert isinstance(excinfo.value, (ProgCacheError, ValueError))
    assert str(path) in str(excinfo.value)
    assert "nothing was imported" in str(excinfo.value)
    assert sorted(str(p) for p in (tmp_path / "target").rglob("*")) == before
    assert len(cache) == 1


HOSTILE = {
    "traversal": (extra("../../evil"), "not a path of a cache file"),
    "traversal in entries": (extra("entries/../../evil"), "not a path of a cache file"),
    "absolute": (extra("/tmp/evil"), "not a path of a cache file"),
    "short digest": (extra("entries/ab/cd"), "not a path of a cache file"),
    "upper case": (extra(NAME.upper().replace("ENTRIES", "entries")), "not a path of a cache file"),
    "link": (extra(NAME, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "regular file"),
    "hard link": (extra(NAME, type=tarfile.LNKTYPE, linkname="bundle.json"), "regular file"),
    "device": (extra(NAME, type=tarfile.CHRTYPE), "regular file"),
    "fifo": (extra(NAME, type=tarfile.FIFOTYPE), "regular file"),
    "directory": (extra(NAME, type=tarfile.DIRTYPE), "regular file"),
    "directory of ours": (extra("entries", type=tarfile.DIRTYPE), "not a path of a cache file"),
    "other file": (extra("README"), "not a path of a cache file"),
    "entry without record": (extra(NAME), "don't match"),
    "record without entry": (extra(NAME.replace("entries", "records")), "don't match"),
    "manifest that is none": (extra(NAME.replace("entries", "manifests")), "manifest"),
    "manifest bomb": (extra(NAME.replace("entries", "manifests"), b"[" * 100_000), "manifest"),
}


@pytest.mark.parametrize(("item", "match"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("place", ["first", "last"])
def test_hostile_members(tmp_path, bundle, item, match, place):
    items = members(bundle)
    items.insert(0 if place == "first" else -1, item)
    rebuild(tmp_path / "hostile", items)
    refused(tmp_path, tmp_path / "hostile", match)


def test_a_rebuilt_bundle_as_such_is_fine(tmp_path, bundle):
    rebuild(tmp_path / "rebuilt", members(bundle))
    assert opened(tmp_path / "other").import_(tmp_path / "rebuilt").imported == 5


def test_a_member_twice(tmp_path, bundle):
    items = members(bundle)
    rebuild(tmp_path / "b", [items[0], *items])
    refused(tmp_path, tmp_path / "b", "twice")


def test_files_after_the_index(tmp_path, bundle):
    items = members(bundle)
    rebuild(tmp_path / "b", [items[-1], *items[:-1]], index=False)
    refused(tmp_path, tmp_path / "b", "after bundle.json")


def test_pax_headers(tmp_path, bundle):
    """PAX headers could override the size or name in the header that is checked."""
    items = members(bundle)
    items[0][0].pax_headers = {"comment": "packed anew"}
    rebuild(tmp_path / "b", items, kind=tarfile.PAX_FORMAT)
    refused(tmp_path, tmp_path / "b", "regular file")


def record_of(data, record=b'{"name":"k"}', digest=DIGEST, created=1.0, **changes):
    return encode(digest, [Version.of(data, record, created)._replace(**changes)])


RECORDS = {
    "of another entry": record_of(b"x", digest="cd" * 32),
    "of other bytes": record_of(b"y"),
    "no JSON": record_of(b"x", b'{"name":'),
    "no object": record_of(b"x", b"[1]"),
    "a bomb": record_of(b"x", b"[" * 100_000),
    "of no time": record_of(b"x", created="yesterday"),
    "of a wrong checksum": record_of(b"x", record_checksum="0" * 32),
    "of two versions": encode(DIGEST, [Version.of(b"x", b"{}", 1.0), Version.of(b"y", b"{}", 1.0)]),
    "empty": b"",
}


@pytest.mark.parametrize("record", RECORDS.values(), ids=RECORDS)
def test_damaged_records(tmp_path, bundle, record):
    items = members(bundle)
    items[-1:-1] = [extra(NAME), extra(NAME.replace("entries", "records"), record)]
    rebuild(tmp_path / "b", items)
    refused(tmp_path, tmp_path / "b", r"record|vouches")
    items[-2] = extra(NAME.replace("entries", "records"), record_of(b"x"))
    rebuild(tmp_path / "b", items)
    assert opened(tmp_path / "other").import_(tmp_path / "b").imported == 6


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"[]",
        b'{"format": 2, "files": {}}',
        b'{"format": 1}',
        b'{"format": 1, "files": {}}',
        b"[" * 100_000,
        b"\xff",
    ],
)
def test_a_damaged_index(tmp_path, bundle, index):
    items = members(bundle)
    rebuild(tmp_path / "b", [*items[:-1], (items[-1][0], index)], index=False)
    refused(tmp_path, tmp_path / "b", r"bundle\.json|format")


def test_a_file_without_the_checksum_of_the_index(tmp_path, bundle):
    """A header manifest has no checksum except the one in the index."""
    items = members(bundle)
    items.insert(-1, extra(NAME.replace("entries", "manifests"), b'{"format":1,"sets":[1]}'))
    rebuild(tmp_path / "whole", items)
    items = members(tmp_path / "whole")
    items[-2] = extra(NAME.replace("entries", "manifests"), b'{"format":1,"sets":[2]}')
    rebuild(tmp_path / "b", items, index=False)
    refused(tmp_path, tmp_path / "b", "checksum")


def test_cut_anywhere(tmp_path, bundle):
    data = bundle.read_bytes()
    end = data.rindex(b"}", 0, len(data))
    for length in [*range(0, end, 997), 512, 1024, end]:
        (tmp_path / "cut").write_bytes(data[:length])
        refused(tmp_path, tmp_path / "cut", "can't be used as a bundle")
        shutil.rmtree(tmp_path / "target")


def test_a_byte_anywhere(tmp_path, bundle):
    """A flipped byte is refused, or has no effect (in padding or in unused parts of a header)."""
    data = bundle.read_bytes()
    whole = contents_of_import(tmp_path, bundle)
    outcomes = set()
    for at in range(7, len(data), 1009):
        damaged = bytearray(data)
        damaged[at] ^= 0x40
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            assert contents_of_import(tmp_path, tmp_path / "damaged") == whole
            outcomes.add("no consequence")
        except BundleError:
            outcomes.add("refused")
    assert "refused" in outcomes


def contents_of_import(tmp_path, path):
    cache = opened(tmp_path / "probe")
    try:
        cache.import_(path)
        return contents(cache)
    except BundleError:
        assert len(cache) == 0
        raise
    finally:
        shutil.rmtree(tmp_path / "probe")


def test_what_is_no_archive(tmp_path, cache):
    (tmp_path / "text").write_text("not an archive " * 1000)
    refused(tmp_path, tmp_path / "text", "can't be used")
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(__file__, "test.py")
    refused(tmp_path, tmp_path / "other.tar", "not a path of a cache file")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(__file__, "test.py")
    refused(tmp_path, tmp_path / "b.tar.gz", "can't be used")
    with pytest.raises(FileNotFoundError):
        cache.import_(tmp_path / "none")
    with pytest.raises(IsADirectoryError):
        cache.import_(tmp_path)


def test_a_disk_that_fills_up_half_way_keeps_whole_entries(tmp_path, bundle, monkeypatch):
    other = opened(tmp_path / "other")
    put, calls = other._put, []

    def full(*args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return put(*args)

    monkeypatch.setattr(other, "_put", full)
    with pytest.raises(StoreError, match="No space left"):
        other.import_(bundle)
    assert (len(other), other.verify().ok) == (2, 2)
    report = other.import_(bundle)
    assert (report.imported, report.present, len(other)) == (3, 2, 5)


# Header manifests


def test_header_manifests_go_along_and_are_merged(tmp_path):
    cache = opened(tmp_path / "cache")
    for key in ("a", "b", "c"):
        cache.publish(key, b"1", {"arch": "sm_80" if key == "c" else "sm_90"})
    of = {key: {"entry": entry_digest(key)} for key in ("a", "b", "c")}
    of["gone"] = {"entry": "cd" * 32}
    there, second = (Path("manifests") / name[:2] / name[2:] for name in (DIGEST, "cd" * 32))
    kept = {
        there: [of["gone"], of["a"], of["b"]],
        second: [of["c"], of["a"]],
        Path("manifests/ef/" + "0" * 62): [of["c"]],
    }
    for path, sets in kept.items():
        (cache.path / path).parent.mkdir(parents=True)
        (cache.path / path).write_text(json.dumps({"format": 5, "sets": sets}))
    for name, text in (("1" * 62, "none"), ("2" * 62, '{"format":5,"sets":[1, null]}'), ("no name", "{}")):
        (cache.path / "manifests" / "ef" / name).write_text(text)
    (tmp_path / "other" / there).parent.mkdir(parents=True)
    (tmp_path / "other" / there).write_text(json.dumps({"format": 5, "sets": [of["b"], of["gone"]]}))
    (tmp_path / "other").chmod(0o700)
    cache.export(tmp_path / "b", archs=["sm_90"])
    with tarfile.open(tmp_path / "b") as tar:
        assert [name for name in tar.getnames() if name.startswith("manifests")] == [str(there), str(second)]
    opened(tmp_path / "new").import_(tmp_path / "b")
    assert json.loads((tmp_path / "new" / there).read_text()) == {"format": 5, "sets": [of["a"], of["b"]]}
    assert json.loads((tmp_path / "new" / second).read_text()) == {"format": 5, "sets": [of["a"]]}
    other = opened(tmp_path / "other")
    other.import_(tmp_path / "b")
    assert json.loads((other.path / there).read_text()) == {"format": 5, "sets": [of["b"], of["gone"], of["a"]]}
    before = (other.path / there).stat().st_mtime_ns
    other.import_(tmp_path / "b")
    assert (other.path / there).stat().st_mtime_ns == before


SOURCE = '#include <cuda_fp16.h>\nextern "C" __global__ void b(__half* a) { *a = __float2half(1.f); }'


def test_header_manifests_travel_without_stamps_of_files(tmp_path):
    """File stamps mean nothing on another machine, so exports omit them; importing a known set doesn't duplicate it."""
    cache, other = opened(tmp_path / "cache"), opened(tmp_path / "other")
    cache.publish("a", b"1", {})
    plain = {"entry": entry_digest("a"), "source": "s"}
    stamped = {**plain, "stamps": [[1, 2, 3, 4, 5]]}
    there = Path("manifests") / DIGEST[:2] / DIGEST[2:]
    for place in (cache, other):
        (place.path / there).parent.mkdir(parents=True)
        (place.path / there).write_text(json.dumps({"format": 5, "sets": [stamped]}))
    cache.export(tmp_path / "b")
    other.import_(tmp_path / "b")
    assert json.loads((other.path / there).read_text())["sets"] == [stamped]
    new = opened(tmp_path / "new")
    new.import_(tmp_path / "b")
    assert json.loads((new.path / there).read_text())["sets"] == [plain]
    # A bundle written by a version that exported stamps.
    with open(tmp_path / "b", "wb") as file:
        version = Version.of(b"1", b"{}", 1.0)
        write(file, [(entry_digest("a"), b"1", version)], lambda _: [(DIGEST, (cache.path / there).read_bytes())])
    newer = opened(tmp_path / "newer")
    newer.import_(tmp_path / "b")
    assert json.loads((newer.path / there).read_text())["sets"] == [plain]


def test_a_program_with_headers_is_a_hit_where_its_bundle_was_imported(tmp_path):
    from cuda_progcache import CompileService, ProgramOptions
    from cuda_progcache.keys.toolchain import header_root

    options = ProgramOptions(arch="sm_90", include_path=header_root("cuda"))
    cache = opened(tmp_path / "cache")
    made = CompileService(cache).compile(SOURCE, options=options)
    cache.export(tmp_path / "b")
    other = opened(tmp_path / "other")
    other.import_(tmp_path / "b")
    found = CompileService(other).compile(SOURCE, options=options)
    assert (made.hit, found.hit) == (False, True)
    assert found.data == made.data

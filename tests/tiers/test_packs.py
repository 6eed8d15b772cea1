# SPDX-License-Identifier: Apache-2.0
"""Packs: a lockfile's programs in one object, fetched with one call; whatever is wrong with a pack is a miss."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import time
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    InMemoryProgramCache,
    ProgCacheWarning,
    ProgramCacheStack,
    StoreError,
)
from cuda_progcache.service.lock import Lock
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.tiers import behind, packs, sides, upkeep
from cuda_progcache.store.tiers.upkeep import collect, sync

LOCK, OTHER = "ab" * 32, "cd" * 32
LATER = 300.0
MADE_UP = "manifests/aa/" + "aa" * 31
MANIFEST = """
format = 1
[kernels.plain]
template = "plain.cu.j2"
entry_points = ["plain"]
[kernels.plain.parameters]
value = { type = "int", min = 0, max = 9, default = 1 }
[[kernels.plain.variants]]
[[kernels.plain.variants]]
value = 2
[kernels.headed]
template = "headed.cu.j2"
entry_points = ["headed"]
headers = ["cuda"]
"""
TEMPLATES = {
    "plain.cu.j2": 'extern "C" __global__ void plain(int *a) { *a = {{ value }}; }\n',
    "headed.cu.j2": '#include <vector_types.h>\nextern "C" __global__ void headed(float4 *a) { a->x = 1; }\n',
}


pytestmark = pytest.mark.usefixtures("own_tiers")


@pytest.fixture(scope="module")
def farm(tmp_path_factory):
    """A cache of three compiled programs, one of them with headers, and the lockfile that lists them."""
    folder = tmp_path_factory.mktemp("farm")
    library = folder / "library"
    library.mkdir()
    (library / "manifest.toml").write_text(MANIFEST)
    for name, text in TEMPLATES.items():
        (library / name).write_text(text)
    service = CompileService(FileStreamProgramCache(folder / "cache", durability="none", tiers=()), library=library)
    assert service.prewarm(archs=["sm_80"], jobs=1).compiled == 3
    lock = service.lock(archs=["sm_80"])
    lock.write(folder / "lock")
    return SimpleNamespace(path=folder / "cache", library=library, file=folder / "lock", lock=lock)


@pytest.fixture
def shelf(tmp_path):
    """A cache of four programs, with a manifest that leads to one of them."""
    keys = [f"key {number}".encode() for number in range(4)]
    with FileStreamProgramCache(tmp_path / "shelf", durability="none", tiers=()) as cache:
        for key in keys:
            cache.publish(key, key * 200, {"name": key.decode()})
    digests = [entry_digest(key) for key in keys]
    path = tmp_path / "shelf" / "manifests" / "ef" / ("ef" * 31)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"format": 3, "sets": [{"entry": digests[0]}, {"entry": "0" * 64}]}))
    return SimpleNamespace(path=tmp_path / "shelf", keys=keys, digests=digests)


@pytest.fixture
def pair(tmp_path):
    key = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()
    return f"sign_key={tmp_path}/key.pem", f"mode=ro&trust=signed&keys={public}"


def later():
    return time.monotonic() + LATER


def engine(url):
    return sides.side(url, writes=False).engine


def machine(path, url, **how):
    return FileStreamProgramCache(path, durability="none", tiers=[url], **how)


def fetched(cache, shelf, lock=LOCK):
    return packs.fetch_pack(cache, lambda: lock, shelf.digests)


def manifests(path):
    return [file.name for file in (path / "manifests").rglob("*") if file.is_file()]


def tampered(packed, change):
    """Return a pack whose files were changed and whose index matches them."""
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}
    index = json.loads(files.pop("bundle.json"))
    change(files)
    index["files"] = {
        name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
    }
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in [*files.items(), ("bundle.json", json.dumps(index).encode())]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return made.getvalue()


def test_a_fresh_machine_makes_one_call_and_compiles_nothing(tier_url, tmp_path, farm):
    report = sync(farm.path, tier_url, digests=farm.lock.keys, pack=farm.lock.digest)
    assert (report.copied, report.packed) == (3, 3)
    service = CompileService(machine(tmp_path / "fresh", tier_url), library=farm.library)
    report = service.prewarm(lock=farm.file, jobs=1)
    assert (report.hits, report.compiled) == (3, 0)
    (tier,) = behind.in_use()
    assert (tier.calls, tier.hits, tier.misses) == (1, 3, 0)
    assert manifests(tmp_path / "fresh")
    # The programs are now on the disk, byte for byte, and the pack isn't asked for again.
    for digest in farm.lock.keys:
        name = f"entries/{digest[:2]}/{digest[2:]}"
        assert (tmp_path / "fresh" / name).read_bytes() == (farm.path / name).read_bytes()
    assert service.prewarm(lock=farm.file, jobs=1).hits == 3
    assert behind.in_use()[0].calls == 1


def test_without_a_pack_they_are_asked_for_one_by_one(redis_url, tmp_path, farm):
    sync(farm.path, redis_url, digests=farm.lock.keys)
    report = CompileService(machine(tmp_path / "fresh", redis_url), library=farm.library).prewarm(lock=farm.lock)
    assert (report.hits, report.compiled) == (3, 0)
    (tier,) = behind.in_use()
    assert (tier.hits, tier.misses, tier.errors) == (3, 1, 0)


def test_a_lockfiles_digest_is_that_of_what_it_says(farm, tmp_path):
    told = json.loads(farm.file.read_text())
    (tmp_path / "again").write_text(json.dumps(told, indent=3))
    assert Lock.read(tmp_path / "again").digest == Lock.read(farm.file).digest == farm.lock.digest
    told["programs"][0]["key"] = "0" * 64
    (tmp_path / "other").write_text(json.dumps(told))
    assert Lock.read(tmp_path / "other").digest != farm.lock.digest


def test_the_commands(redis_url, tmp_path, farm, run):
    for wrong in (["sync", farm.path, redis_url], ["sync", farm.path, "there", "--lock", farm.file]):
        assert "--pack needs --lock and the URL of a tier as DST" in run(*wrong, "--pack", code=2)
    assert run("sync", farm.path, redis_url, "--lock", farm.file, "--pack", "--dry-run", "--json")["packed"] == 0
    assert list(engine(redis_url).list("packs/", until=time.monotonic() + 600)) == []
    assert "3 programs in the lockfile's pack" in run("sync", farm.path, redis_url, "--lock", farm.file, "--pack")
    assert [one.name for one in engine(redis_url).list("packs/", until=time.monotonic() + 600)] == [
        f"packs/{farm.lock.digest}.tar"
    ]
    told = run("gc", redis_url, "--older-than", "1d", "--json", "--yes")
    assert (told["removed"], told["packs"]) == (0, 0)


def test_a_pack_is_whole_or_none(redis_url, shelf, monkeypatch):
    report = sync(shelf.path, redis_url, digests=[*shelf.digests, "0" * 64], pack=LOCK)
    assert (report.copied, report.missing, report.packed) == (4, 1, 0)
    path = shelf.path / "entries" / shelf.digests[0][:2] / shelf.digests[0][2:]
    path.write_bytes(b"x" * path.stat().st_size)
    assert sync(shelf.path, redis_url, digests=shelf.digests, pack=LOCK).packed == 0
    monkeypatch.setattr(packs, "MAX_BYTES", 1000)
    with pytest.raises(StoreError, match="several lockfiles"):
        sync(shelf.path, redis_url, digests=shelf.digests[1:], pack=LOCK)
    assert list(engine(redis_url).list("packs/", until=time.monotonic() + 600)) == []


def test_few_that_are_missing_are_asked_for_one_by_one(redis_url, shelf, tmp_path):
    sync(shelf.path, redis_url, digests=shelf.digests, pack=LOCK)
    more = [f"more {number}".encode() for number in range(8)]
    with FileStreamProgramCache(tmp_path / "fresh", durability="none", tiers=()) as cache:
        for key in more:
            cache.publish(key, key, {})
    digests = [*shelf.digests, *map(entry_digest, more)]
    with machine(tmp_path / "fresh", redis_url) as cache:
        for come, asked in ((shelf.keys[:2], digests), (shelf.keys[2:3], shelf.digests)):
            assert cache.fetch(come) == len(come)
            before = behind.in_use()[0].calls
            assert packs.fetch_pack(cache, lambda: LOCK, asked) == 0  # 2 of 12 are missing, then 1 of 4
            assert behind.in_use()[0].calls == before
        cache.clear()
        assert fetched(cache, shelf) == 4
    assert len(manifests(tmp_path / "fresh")) == 1


def flipped(packed):
    at = packed.index(b"key 2key 2")
    return packed[:at] + b"K" + packed[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        lambda packed: packed[: len(packed) // 2],
        lambda _: b"",
        lambda _: b"<html>a proxy</html>" * 1000,
        lambda packed: tampered(packed, lambda files: files.update({"../../escaped": b"x"})),
        lambda packed: tampered(packed, lambda files: files.pop(next(name for name in files if "records" in name))),
        lambda packed: tampered(packed, lambda files: files.update({MADE_UP: b"[" * 100_000})),
        lambda packed: tampered(packed, lambda files: files.update({MADE_UP: b'{"format": [], "sets": {}}'})),
    ],
    ids=["flipped", "cut", "empty", "html", "escaping", "unrecorded", "deep", "shapeless"],
)
def test_a_damaged_pack_is_a_miss_that_is_told(redis_url, shelf, tmp_path, damage):
    sync(shelf.path, redis_url, digests=shelf.digests, pack=LOCK)
    name = packs.pack_name(LOCK)
    packed = engine(redis_url).get(name, limit=packs.MAX_BYTES, until=later())
    engine(redis_url).put(name, damage(packed), until=later())
    with machine(tmp_path / "fresh", redis_url) as cache:
        with pytest.warns(ProgCacheWarning, match="pack that isn't used"):
            assert fetched(cache, shelf) == 0
        assert len(cache) == 0
        assert manifests(tmp_path / "fresh") == []
        assert behind.in_use()[0].corrupt == 1
        assert cache.fetch(shelf.keys) == 4


def test_a_pack_of_another_lockfile_is_a_miss_and_no_more_is_taken_than_was_asked_for(redis_url, shelf, tmp_path):
    sync(shelf.path, redis_url, digests=shelf.digests, pack=LOCK)
    with machine(tmp_path / "fresh", redis_url) as cache:
        with pytest.warns(ProgCacheWarning, match="nothing of this lockfile"):
            assert packs.fetch_pack(cache, lambda: LOCK, ["0" * 64, "1" * 64]) == 0
        assert packs.fetch_pack(cache, lambda: LOCK, shelf.digests[2:]) == 2
        assert {one.digest for one in cache.entries()} == set(shelf.digests[2:])
    assert manifests(tmp_path / "fresh") == []  # the manifest leads to another program


def test_a_pack_that_is_too_large_is_not_read(tier_url, shelf, tmp_path, monkeypatch):
    sync(shelf.path, tier_url, digests=shelf.digests, pack=LOCK)
    monkeypatch.setattr(packs, "MAX_BYTES", 5000)
    with machine(tmp_path / "fresh", tier_url) as cache:
        with pytest.warns(ProgCacheWarning, match="too large"):
            assert fetched(cache, shelf) == 0
        assert (behind.in_use()[0].bytes_in, behind.in_use()[0].errors) == (0, 0)
        assert cache.fetch(shelf.keys) == 4


def test_a_stack_without_a_directory_takes_no_pack_and_one_with_it_counts_hits(redis_url, shelf, tmp_path, open_url):
    sync(shelf.path, redis_url, digests=shelf.digests, pack=LOCK)
    with ProgramCacheStack((InMemoryProgramCache(), open_url(redis_url))) as stack:
        assert fetched(stack, shelf) == 0
        assert fetched(InMemoryProgramCache(), shelf) == 0
    disk = FileStreamProgramCache(tmp_path / "fresh", durability="none", tiers=())
    with ProgramCacheStack((disk, open_url(redis_url))) as stack:
        assert fetched(stack, shelf) == 4
        assert [level.hits for level in stack.stats().levels] == [0, 4]


@pytest.mark.filterwarnings("ignore:.*has a pack that isn't used")
def test_a_sound_pack_is_a_sound_answer(redis_url, shelf, tmp_path):
    """A service that sends bad data three times in a row is left alone; a valid pack in between prevents that."""
    sync(shelf.path, redis_url, digests=shelf.digests, pack=LOCK)
    engine(redis_url).put(packs.pack_name(OTHER), b"rubbish", until=later())
    for number, lock in enumerate((OTHER, OTHER, LOCK, OTHER, OTHER)):
        with machine(tmp_path / f"fresh{number}", redis_url) as cache:
            assert fetched(cache, shelf, lock) == (4 if lock is LOCK else 0)
    (tier,) = behind.in_use()
    assert (tier.corrupt, tier.errors, tier.state) == (4, 0, "closed")


def test_a_manifest_of_the_wrong_shape_leads_nowhere(redis_url, shelf, tmp_path):
    sync(shelf.path, redis_url, digests=shelf.digests, pack=LOCK)
    packed = engine(redis_url).get(packs.pack_name(LOCK), limit=packs.MAX_BYTES, until=later())
    sets = b'{"format": 3, "sets": [{"entry": []}, {"entry": {}}, [], 7]}'
    packed = tampered(packed, lambda files: files.update({MADE_UP: sets}))
    engine(redis_url).put(packs.pack_name(LOCK), packed, until=later())
    with machine(tmp_path / "fresh", redis_url) as cache:
        assert fetched(cache, shelf) == 4
    assert manifests(tmp_path / "fresh") == ["ef" * 31]


def test_a_tier_that_is_gone_is_a_miss(shelf, tmp_path):
    with machine(tmp_path / "fresh", "redis://127.0.0.1:1") as cache, pytest.warns(ProgCacheWarning, match="failed"):
        assert fetched(cache, shelf) == 0


def test_what_nobody_who_is_trusted_has_signed_is_left_out(redis_url, shelf, tmp_path, pair):
    mark = "&" if "?" in redis_url else "?"
    writes, reads = (mark + options for options in pair)
    anyone = engine(redis_url)
    sync(shelf.path, redis_url + writes, digests=shelf.digests, pack=LOCK)
    signed = anyone.get(packs.pack_name(LOCK), limit=packs.MAX_BYTES, until=later())
    with machine(tmp_path / "signed", redis_url + reads) as cache:
        assert fetched(cache, shelf) == 4
        assert cache.load(shelf.keys[0]).record["name"] == "key 0"
    assert len(manifests(tmp_path / "signed")) == 1

    # Under another lockfile's name the programs are still trusted, but not the manifests that lead to them.
    anyone.put(packs.pack_name(OTHER), signed, until=later())
    renamed = machine(tmp_path / "renamed", redis_url + reads)
    with renamed, pytest.warns(ProgCacheWarning, match="not all is trusted"):
        assert fetched(renamed, shelf, OTHER) == 4
    assert manifests(tmp_path / "renamed") == []

    # An unsigned pack, as anybody can make it.
    sync(shelf.path, redis_url, digests=shelf.digests, pack=OTHER)
    unsigned = anyone.get(packs.pack_name(OTHER), limit=packs.MAX_BYTES, until=later())
    behind._opened.clear()
    with machine(tmp_path / "unsigned", redis_url + reads) as cache:
        with pytest.warns(ProgCacheWarning, match="isn't signed"):
            assert fetched(cache, shelf, OTHER) == 0
        assert behind.in_use()[0].untrusted == 4
    assert manifests(tmp_path / "unsigned") == []

    # An unsigned program and a manifest, added to signed ones.
    digest = shelf.digests[3]
    with tarfile.open(fileobj=io.BytesIO(unsigned)) as tar:
        record = tar.extractfile(f"records/{digest[:2]}/{digest[2:]}").read()

    def smuggle(files):
        files[f"records/{digest[:2]}/{digest[2:]}"] = record
        files[MADE_UP] = json.dumps({"format": 3, "sets": [{"entry": shelf.digests[1]}]}).encode()

    anyone.put(packs.pack_name(LOCK), tampered(signed, smuggle), until=later())
    behind._opened.clear()
    with machine(tmp_path / "smuggled", redis_url + reads) as cache:
        with pytest.warns(ProgCacheWarning, match="not all is trusted"):
            assert fetched(cache, shelf) == 3
        assert behind.in_use()[0].untrusted == 1
        assert {one.digest for one in cache.entries()} == set(shelf.digests[:3])
    assert manifests(tmp_path / "smuggled") == []


def test_gc_removes_old_packs_but_that_of_a_lockfile_to_keep(tier_url, shelf, monkeypatch):
    for lock in (LOCK, OTHER):
        sync(shelf.path, tier_url, digests=shelf.digests, pack=lock)
    engine(tier_url).put("packs/notes.txt", b"somebody's", until=later())
    assert collect(tier_url, older_than=86400, dry_run=False).packs == 0
    monkeypatch.setattr(upkeep, "time", SimpleNamespace(time=lambda: time.time() + 3 * 86400))
    for dry_run in (True, False):
        found = collect(tier_url, older_than=86400, keep=shelf.digests, keep_packs={LOCK}, dry_run=dry_run)
        assert (found.removed, found.packs, found.kept) == (0, 1, 4)
        assert found.bytes > 4000
    assert {one.name for one in engine(tier_url).list("packs/", until=time.monotonic() + 600)} == {
        packs.pack_name(LOCK),
        "packs/notes.txt",
    }
    found = collect(tier_url, older_than=86400, dry_run=False)
    assert (found.removed, found.packs) == (4, 1)

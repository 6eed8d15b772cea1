# SPDX-License-Identifier: Apache-2.0
"""The commands ``tiers``, ``sync`` and ``gc``, with real servers."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest

from ci.servers.faulty import FaultyServer
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions, ReadOnlyError, StoreError
from cuda_progcache.service import doctor
from cuda_progcache.service.lock import Lock, Locked
from cuda_progcache.store.base import entry_digest
from cuda_progcache.store.tiers import behind, sides, upkeep
from cuda_progcache.store.tiers.envelope import MANIFESTS, object_name, unpack
from cuda_progcache.store.tiers.layer import LayerEngine
from cuda_progcache.store.tiers.settings import parse_tier
from cuda_progcache.store.tiers.upkeep import collect, sync

SECRET = "geheim-7f3a"


pytestmark = pytest.mark.usefixtures("own_tiers")


def fill(path, count, size=1000):
    """Create a cache of ``count`` programs with records; return their digests."""
    keys = [f"{path.name}-{number}".encode() for number in range(count)]
    with FileStreamProgramCache(path, durability="none") as cache:
        for key in keys:
            cache.publish(key, key * (size // len(key)), {"name": key.decode()})
    return [entry_digest(key) for key in keys]


def held(path):
    with FileStreamProgramCache(path) as cache:
        return {info.digest: (info.checksum, info.record) for info in cache.entries()}


@pytest.fixture
def compiled(tmp_path):
    """A function that compiles a program with headers over a cache; the cache "here" already has the program."""
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "value.h").write_text("#define VALUE 7\n")
    source = '#include "value.h"\nextern "C" __global__ void headed(int *a) { *a = VALUE; }'
    options = ProgramOptions(arch="sm_80", include_path=[str(tmp_path / "include")])

    def over(path, **how):
        with FileStreamProgramCache(path, **how) as cache:
            return Program(source, "c++", options).compiled("cubin", cache=cache)

    over(tmp_path / "here")
    return over


def test_what_is_copied_out_and_back_is_the_same(tier_url, tmp_path, compiled):
    """A program with headers is found through the manifests that were copied with it."""
    digests = fill(tmp_path / "here", 70)
    seen = []
    assert sync(tmp_path / "here", tier_url, dry_run=True).copied == 71
    assert sync(tmp_path / "here", tmp_path / "unmade", dry_run=True).copied == 71
    assert not (tmp_path / "unmade").exists()
    report = sync(tmp_path / "here", tier_url, on_progress=lambda *told: seen.append(told))
    assert (report.copied, report.there, report.missing, report.unusable, report.refused) == (71, 0, 0, 0, 0)
    assert report.manifests >= 1
    assert seen[0][:2] == (0, 71)
    assert seen[-1] == (71, 71, report.bytes)
    again = sync(tmp_path / "here", tier_url)
    assert (again.copied, again.there, again.manifests) == (0, 71, 0)
    assert sync(tier_url, tmp_path / "there").copied == 71
    assert held(tmp_path / "there") == held(tmp_path / "here")
    assert compiled(tmp_path / "there").hit
    # Only some programs, as for a lockfile.
    some = [*digests[:3], "0" * 64]
    report = sync(tier_url, tmp_path / "some", digests=some)
    assert (report.copied, report.missing, report.manifests) == (3, 1, 0)
    assert set(held(tmp_path / "some")) == set(digests[:3])


def test_a_sync_that_was_stopped_goes_on(redis_url, tmp_path):
    fill(tmp_path / "here", 200)

    class Stopped(BaseException):
        pass

    def stop(done, *_):
        if done:
            raise Stopped

    with pytest.raises(Stopped):
        sync(tmp_path / "here", redis_url, on_progress=stop)
    report = sync(tmp_path / "here", redis_url)
    assert 0 < report.copied < 200
    assert report.copied + report.there == 200


def test_manifests_are_merged_and_have_no_stamps_of_other_machines(redis_url, tmp_path, compiled):
    (tmp_path / "include" / "value.h").write_text("#define VALUE 8\n")
    compiled(tmp_path / "other")
    for folder in ("here", "other"):
        sync(tmp_path / folder, redis_url)
    sync(redis_url, tmp_path / "there")
    assert compiled(tmp_path / "there").hit
    (tmp_path / "include" / "value.h").write_text("#define VALUE 7\n")
    assert compiled(tmp_path / "there").hit
    sync(redis_url, tmp_path / "untouched")
    for folder, _, names in os.walk(tmp_path / "untouched" / "manifests"):
        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                assert b"stamps" not in file.read()


def test_what_is_damaged_or_too_large_is_left_out_and_said(redis_url, tmp_path, run):
    digests = fill(tmp_path / "here", 3)
    path = tmp_path / "here" / "entries" / digests[0][:2] / digests[0][2:]
    path.write_bytes(b"x" * path.stat().st_size)
    told = run("sync", "here", redis_url, "--json", code=1)
    assert (told["copied"], told["unusable"]) == (2, 1)
    fill(tmp_path / "large", 1, size=100_000)
    assert "too large" in run("sync", "large", f"{redis_url}&max_bytes=50kB")


def test_what_is_too_large_hides_nothing_behind_it(redis_url, tmp_path):
    small = fill(tmp_path / "small", 12)
    for path, size in (("small", 1000), ("large", 9000)):
        fill(tmp_path / path, 12, size)
        sync(tmp_path / path, redis_url)
    mark = "&" if "?" in redis_url else "?"
    sync(f"{redis_url}{mark}max_bytes=3000", tmp_path / "copy")
    assert held(tmp_path / "copy").keys() == set(small)


def test_sides_that_cannot_be_read_or_written(redis_url, tmp_path):
    fill(tmp_path / "here", 1)
    with pytest.raises(ReadOnlyError):
        sync("here", f"{redis_url}&mode=ro")
    with pytest.raises(ReadOnlyError):
        sync("here", f"file://{tmp_path}/layer")
    with pytest.raises(ReadOnlyError, match="export --oci"):
        sync("here", "oci://127.0.0.1:1/team/kernels:v1")
    with pytest.raises(StoreError):
        sync("nowhere", "there")
    with pytest.raises(StoreError):
        sync("redis://127.0.0.1:1?connect_timeout=0.1", "there")
    with pytest.raises(StoreError, match="prune"):
        collect(f"file://{tmp_path}/here", older_than=1)


def test_what_another_try_may_mend_is_tried_again_and_nothing_else(redis_url, monkeypatch):
    monkeypatch.setattr(sides, "_PAUSE", 0.0)
    side = sides.side(redis_url, writes=True)
    for error, tries, told in (
        (OSError(errno.EIO, "no"), 4, errno.EIO),
        (OSError(errno.EACCES, "no"), 1, errno.EACCES),
        (TimeoutError("no"), 4, errno.ETIMEDOUT),
    ):
        asked = []

        def fail(*, until, error=error, asked=asked):
            asked.append(until)
            raise error

        with pytest.raises(OSError, match="no") as raised:
            side.call(60, fail)
        assert (raised.value.errno, len(asked)) == (told, tries)
    side.close()


def test_what_a_command_opens_it_closes(redis_url, tmp_path, monkeypatch):
    fill(tmp_path / "here", 1)
    closed, close = [], sides.TierSide.close
    monkeypatch.setattr(sides.TierSide, "close", lambda side: closed.append(side.name) or close(side))
    tier = parse_tier(redis_url)
    sync(tmp_path / "here", redis_url)
    collect(redis_url, older_than=0)
    upkeep.health(tier)
    assert closed == [tier.url] * 3
    monkeypatch.setattr(upkeep, "batches", None)  # so that each of these fails midway
    for command in (
        lambda: sync(redis_url, tmp_path / "there"),
        lambda: collect(redis_url, older_than=0, dry_run=False),
    ):
        with pytest.raises(TypeError):
            command()
    assert closed == [tier.url] * 5


def test_a_damaged_manifest_of_the_target_is_replaced(redis_url, tmp_path, compiled):
    sync(tmp_path / "here", redis_url)
    side = sides.side(redis_url, writes=True)
    names = {digest: object_name(MANIFESTS, digest) for digest in side.sizes(MANIFESTS)}
    for name in names.values():
        side.put(name, b"damaged")
    assert sync(tmp_path / "here", redis_url).manifests == len(names) > 0
    sync(redis_url, tmp_path / "there")
    assert compiled(tmp_path / "there").hit
    side.close()


def test_commands_know_a_configured_tier_by_its_url(redis_url, tmp_path, run, monkeypatch):
    """Its password and options need not be given, and are shown nowhere."""
    fill(tmp_path / "here", 2)
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"{redis_url}&mode=ro")
    assert "mode=ro" in run("sync", "here", redis_url.partition("?")[0], code=3)
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"redis://:{SECRET}@127.0.0.1:1?connect_timeout=0.2")
    assert sides.settings_of("redis://127.0.0.1:1").credentials.password.reveal() == SECRET
    for command in (["sync", "here", "redis://127.0.0.1:1"], ["gc", "redis://127.0.0.1:1", "--older-than", "1d"]):
        assert SECRET not in run(*command, code=3)
    for wrong in (f"redis://:{SECRET}@127.0.0.1:1x", f"redis://:{SECRET}@127.0.0.1:1?mod=ro", f"x://{SECRET}@h"):
        assert SECRET not in run("sync", wrong, "there", code=2)
        assert SECRET not in json.dumps(run("sync", wrong, "there", wrong, "--json", code=2))


def test_gc_removes_what_is_old_and_not_needed(redis_url, tmp_path, run, monkeypatch):
    """The clock of gc runs ahead, so that new objects count as old; objects are listed and not read."""
    digests = fill(tmp_path / "here", 5)
    (tmp_path / "lock").write_text("{}")
    monkeypatch.setattr("cuda_progcache.cli.tiers.locked", lambda _: Lock((Locked("k", key=digests[0]),)))
    sync("here", redis_url)
    told = run("gc", redis_url, "--older-than", "1d", "--json", "--yes")
    assert (told["removed"], told["kept"]) == (0, 5)
    monkeypatch.setattr(upkeep, "time", SimpleNamespace(time=lambda: time.time() + 3 * 86400))
    monkeypatch.setattr(sides.TierSide, "read", None)
    told = run("gc", redis_url, "--older-than", "1d", "--keep-lock", "lock", "--json", "--dry-run")
    assert (told["removed"], told["kept"], told["pinned"], told["manifests"]) == (4, 1, 1, 0)
    assert len(sides.side(redis_url, writes=False).sizes("v1/programs/")) == 5
    told = run("gc", redis_url, "--older-than", "1d", "--keep-lock", "lock", "--json", "--yes")
    assert told["removed"] == 4
    assert set(sides.side(redis_url, writes=False).sizes("v1/programs/")) == {digests[0]}
    assert "1 program" in run("gc", redis_url, "--older-than", "1d", "--yes")
    assert sides.side(redis_url, writes=False).sizes("v1/programs/") == {}


def test_a_lockfile_has_to_know_what_it_keeps(redis_url, tmp_path, run):
    """A program without a key would be left out of a copy, and removed by gc."""
    fill(tmp_path / "here", 2)
    sync("here", redis_url)
    told = run("lock", "--kernel", "axpby", "--arch", "sm_80", "-o", "lock")
    assert "without a key" in told
    for command in (["sync", "here", "there"], ["gc", redis_url, "--older-than", "0s", "--yes"]):
        option = "--lock" if command[0] == "sync" else "--keep-lock"
        assert "keys aren't known" in run(*command, option, "lock", code=2)
    assert len(sides.side(redis_url, writes=False).sizes("v1/programs/")) == 2


def test_gc_asks(redis_url, run):
    run("gc", redis_url, "--older-than", "1d", "--json", code=2)
    assert "0 programs" in run("gc", redis_url, "--older-than", "1d")
    run("gc", redis_url, "--older-than", "soon", code=2)


def test_gc_says_that_nobody_can_answer_where_it_is_run_by_cron(redis_url, run, tmp_path, monkeypatch):
    fill(tmp_path / "here", 1)
    sync(tmp_path / "here", redis_url)
    monkeypatch.setattr(upkeep, "time", SimpleNamespace(time=lambda: time.time() + 3 * 86400))
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "give --yes" in run("gc", redis_url, "--older-than", "1d", code=2)
    assert "removed 1 program" in run("gc", redis_url, "--older-than", "1d", "--yes")


def test_tiers_tells_what_all_processes_have_counted(redis_url, tmp_path, run, monkeypatch, compiled):
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", redis_url)
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "there"))
    assert not compiled(None).hit
    monkeypatch.setattr(behind, "_opened", {})
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "elsewhere"))
    assert compiled(None).hit
    told = run("tiers", "--json", "--count")
    (tier,) = told["tiers"]
    plain = redis_url.partition("?")[0]
    assert told["source"] == "CUDA_PROGCACHE_TIERS"
    assert (tier["url"], tier["ok"], tier["breaker"], tier["objects"]) == (plain, True, "closed", 1)
    assert tier["latency"] > 0
    counted = tier["all_time"]
    assert counted["hits"] == 1
    assert counted["bytes_in"] > 1000
    assert (counted["stored"], counted["errors"]) == (0, 0)
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "there"))
    counted = run("tiers", "--json")["tiers"][0]["all_time"]
    assert (counted["hits"], counted["stored"] > 1, counted["bytes_out"] > 1000) == (0, True, True)
    assert plain in run("tiers")


@pytest.mark.parametrize("place", ["redis", "http://ci:{}@127.0.0.1:1/p", "s3://ci:{}@b/p?region=x"])
def test_a_secret_that_can_not_be_had_is_told_by_its_place(run, request, place, tmp_path):
    """The error names its variable or its file, whatever the client library makes of it."""
    if place == "redis":  # redis asks for the password once it is connected
        place = request.getfixturevalue("redis_url").replace("//", "//ci:{}@")
    (tmp_path / "binary").write_bytes(b"\xff")
    plain = place.replace("ci:{}@", "")
    mark = "&" if "?" in plain else "?"
    for url, told in (
        (place.format("${NOT_SET_ANYWHERE}"), "NOT_SET_ANYWHERE"),
        (f"{plain}{mark}user=ci&password_file={tmp_path}/none", f"{tmp_path}/none (No such file or directory)"),
        (f"{plain}{mark}user=ci&password_file={tmp_path}/binary", f"{tmp_path}/binary (it is not UTF-8)"),
    ):
        trouble = run("tiers", url, "--json", code=1)["tiers"][0]["trouble"]
        assert told in trouble
        assert "None" not in trouble


def test_tiers_tells_of_one_that_does_not_answer(run, tmp_path, monkeypatch):
    url = f"redis://:{SECRET}@127.0.0.1:1?connect_timeout=0.2"
    told = run("tiers", url, "--json", code=1)
    assert (told["tiers"][0]["ok"], told["tiers"][0]["breaker"]) == (False, "open")
    assert told["tiers"][0]["trouble"]
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"{url} file://{tmp_path}/none")
    shown = run("tiers", code=1)
    assert "redis://127.0.0.1:1" in shown
    assert SECRET not in shown + json.dumps(told)
    monkeypatch.delenv("CUDA_PROGCACHE_TIERS")
    assert "no tiers" in run("tiers")


def test_a_server_that_answers_all_with_a_page_is_in_trouble(run, monkeypatch):
    with FaultyServer("http", "HTML in place of the object") as server:
        url = f"http://127.0.0.1:{server.port}/prefix?connect_timeout=300&timeout=300"
        (told,) = run("tiers", url, "--json", code=1)["tiers"]
        assert (told["ok"], told["breaker"]) == (False, "open")
        assert "something other than what was asked for" in told["trouble"]
        monkeypatch.setenv("CUDA_PROGCACHE_TIERS", url)
        assert "something other" in next(doctor._tiers()).problem


def test_a_layer_lists_its_manifests(tmp_path, compiled):
    """A sync of an image therefore copies them."""
    engine = LayerEngine(parse_tier(f"file://{tmp_path}/here"))
    found = list(engine.list("v1/manifests/", until=time.monotonic() + 600))
    for listed in found:
        digest = "".join(listed.name.rsplit("/", 2)[-2:])
        content, _ = unpack(digest, engine.get(listed.name, limit=1 << 20, until=time.monotonic() + 600))
        assert (listed.size, listed.modified > 0) == (len(content), True)
    assert len(found) == len(list((tmp_path / "here" / "manifests").glob("??/*"))) > 0
    assert len(list(engine.list("v1/programs/", until=time.monotonic() + 600))) == 1
    assert len(list(engine.list("v1/", until=time.monotonic() + 600))) == 1 + len(found)


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_is_no_regular_file_is_no_manifest_of_a_directory(tmp_path, kind):
    """Otherwise anyone who can write to a layer could have any file read, or make a reader wait forever."""
    digest = fill(tmp_path / "here", 1)[0]
    (tmp_path / "secret").write_text(json.dumps({"format": 4, "sets": [{"entry": digest}]}))
    path = tmp_path / "here" / "manifests" / "ab" / ("ab" * 31)
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(tmp_path / "secret")
    else:
        os.mkfifo(path)
    engine = LayerEngine(parse_tier(f"file://{tmp_path}/here"))
    assert engine.get(object_name(MANIFESTS, "ab" * 32), limit=1 << 20, until=time.monotonic() + 600) is None
    report = sync(tmp_path / "here", tmp_path / "there")
    assert (report.copied, report.manifests) == (1, 0)


def test_a_listing_that_takes_too_long_is_none(redis_url, tmp_path, monkeypatch):
    digests = fill(tmp_path / "here", 2)
    sync(tmp_path / "here", redis_url)

    def late(*_):
        raise TimeoutError("late")

    monkeypatch.setattr(sides.TierSide, "sizes", late)
    with pytest.raises(StoreError, match="--lock"):
        sync(redis_url, tmp_path / "there")
    assert sync(redis_url, tmp_path / "there", digests=digests).copied == 2
    assert sync(tmp_path / "here", redis_url).there == 2
    health = upkeep.health(parse_tier(redis_url), count=True)
    assert (health.ok, health.objects) == (True, None)


def test_doctor_tells_of_each_tier(redis_url, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"{redis_url} redis://:{SECRET}@127.0.0.1:1?connect_timeout=0.2")
    found = list(doctor._tiers())
    assert [bool(one.problem) for one in found] == [False, True]
    assert SECRET not in repr(found)
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", f"redis://:{SECRET}@")
    assert "tier 1" in next(doctor._tiers()).problem

# SPDX-License-Identifier: Apache-2.0
"""Tiers behind a directory: what another machine compiled is a hit, through every interface and in every mode."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import socket
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
import redis

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    FrozenMissError,
    FrozenProgramCache,
    KernelLibrary,
    ProgCacheWarning,
    Program,
    ProgramOptions,
    ReadOnlyProgramCache,
)
from cuda_progcache.service.cached_compiler import CachedCompiler
from cuda_progcache.service.wanted import Wanted
from cuda_progcache.service.worker import Worker
from cuda_progcache.store.root import Root
from cuda_progcache.store.tiers import behind, tally
from cuda_progcache.store.tiers.settings import parse_tier

SOURCE = '#include "value.h"\nextern "C" __global__ void headed(int *a) { *a = VALUE; }'
PLAIN = 'extern "C" __global__ void plain(int *a) { *a = 1; }'


pytestmark = pytest.mark.usefixtures("own_tiers")


@pytest.fixture
def other_machine(monkeypatch):
    """A function that forgets all opened tiers, as if this were another process."""
    return lambda: monkeypatch.setattr(behind, "_opened", {})


@pytest.fixture
def headers(tmp_path):
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "value.h").write_text("#define VALUE 7\n")
    return str(tmp_path / "include")


def compiled(cache, headers, source=SOURCE):
    options = ProgramOptions(arch="sm_80", include_path=[headers])
    return Program(source, "c++", options).compiled("cubin", cache=cache)


@pytest.fixture
def nobody():
    """The URL of a port that accepts connections and never answers, and a function that counts the connections."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as kept:
        server.setblocking(False)
        met = []

        def connections():
            """Return the number of connections; the system makes them before they are accepted."""
            with contextlib.suppress(BlockingIOError):
                while True:
                    met.append(kept.enter_context(server.accept()[0]))
            return len(met)

        yield f"redis://127.0.0.1:{server.getsockname()[1]}?connect_timeout=0.2&timeout=0.3", connections


WAYS = ("store", "service", "environment")


@pytest.mark.parametrize("way", WAYS)
def test_what_another_machine_has_compiled_is_a_hit(way, tier_url, tmp_path, headers, other_machine, monkeypatch):
    def cache(name, url):
        if way == "environment":
            monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / name))
            monkeypatch.setenv("CUDA_PROGCACHE_TIERS", url)
            return FileStreamProgramCache()
        if way == "service":
            return CompileService(tmp_path / name, tiers=[url]).cache
        return FileStreamProgramCache(tmp_path / name, tiers=[url])

    with cache("first", tier_url) as first:
        made = compiled(first, headers)
        assert not made.hit
    other_machine()
    with cache("second", tier_url) as second:
        found = compiled(second, headers)
        assert (found.hit, found.data, found.digest) == (True, made.data, made.digest)
        assert found.record["components"] == made.record["components"]
        assert (second.stats().hits, second.stats().misses) == (1, 0)
        assert second.stats().all_time.hits == 1  # the tier's own lookup doesn't count as a use of the directory
        assert [level.hits for level in second.stats().levels] == [1]
    other_machine()
    with cache("second", "redis://127.0.0.1:1") as alone:  # the program and its manifest are on the disk now
        assert compiled(alone, headers).hit


def test_cuda_core_finds_it_too(redis_url, tmp_path, other_machine):
    """``cuda.core`` uses a store as a mapping."""
    with FileStreamProgramCache(tmp_path / "first", tiers=[redis_url]) as first:
        first[b"key"] = b"program"
    other_machine()
    with FileStreamProgramCache(tmp_path / "second", tiers=[redis_url]) as second:
        assert second[b"key"] == b"program"
        assert second.get(b"none") is None
        del second[b"key"]
        with pytest.raises(KeyError):
            second[b"key"]
        with pytest.raises(KeyError):
            del second[b"key"]
    assert FileStreamProgramCache(tmp_path / "first")[b"key"] == b"program"


def test_what_proved_wrong_is_removed_from_the_tier_as_well(redis_url, tmp_path, headers, other_machine):
    with FileStreamProgramCache(tmp_path / "first", tiers=[redis_url]) as first:
        made = compiled(first, headers)
        first.quarantine(made.digest)
    other_machine()
    with FileStreamProgramCache(tmp_path / "second", tiers=[redis_url]) as second:
        assert second.load(made.digest) is None
        assert not compiled(second, headers).hit


#: Compiles a program that is a hit, and prints what was imported for it.
HIT = """
import sys
from cuda_progcache import {opened}, Program, ProgramOptions
cache = {made}
options = ProgramOptions(arch="sm_80", include_path=[sys.argv[2]])
assert Program(sys.argv[1], "c++", options).compiled("cubin", cache=cache).hit
print([name for name in ("redis", "tomllib", "urllib", "cuda_progcache.store.stack") if name in sys.modules])
print([name for name in sys.modules if name.startswith("cuda_progcache.store.tiers")])
"""


@pytest.mark.parametrize("made", ["FileStreamProgramCache()", "CompileService().cache"])
def test_a_hit_on_the_disk_imports_nothing_and_asks_nobody(made, nobody, tmp_path, headers, python):
    url, met = nobody
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        compiled(cache, headers)
    script = HIT.format(opened=made.partition("(")[0], made=made)
    told = python(script, SOURCE, headers, CUDA_PROGCACHE_DIR=str(tmp_path / "cache"), CUDA_PROGCACHE_TIERS=url)
    assert told.splitlines() == ["[]", "[]"]
    assert met() == 0


def test_a_hit_of_plain_redis_loads_no_tls(redis_url, tmp_path, headers, other_machine, python):
    """Importing ssl takes longer than the hit."""
    with FileStreamProgramCache(tmp_path / "first", tiers=[redis_url]) as first:
        compiled(first, headers)
    other_machine()
    script = HIT.format(opened="FileStreamProgramCache", made="FileStreamProgramCache()")
    script += "print('ssl' in sys.modules)"
    place = {"CUDA_PROGCACHE_DIR": str(tmp_path / "second"), "CUDA_PROGCACHE_TIERS": redis_url}
    assert python(script, SOURCE, headers, **place).splitlines()[-1] == "False"


def test_a_tier_that_answers_nobody_costs_no_program(nobody, tmp_path, headers, other_machine):
    """Another store of the process knows that the tier is out of use."""
    url, met = nobody
    tries = itertools.count()
    while not met():  # a busy machine may use up the time before it connects
        other_machine()
        place = tmp_path / f"try {next(tries)}"
        with pytest.warns(ProgCacheWarning, match=r"127\.0\.0\.1"):
            for folder in ("first", "second"):
                with FileStreamProgramCache(place / folder, tiers=[f"{url}&mode=ro"]) as cache:
                    assert compiled(cache, headers).digest
                    assert compiled(cache, headers).hit
    assert met() == 1


def test_the_end_of_a_store_waits_for_no_tier_that_is_out_of_use(nobody, tmp_path, headers):
    """Waiting for its writes is left to the writer thread and to the end of the process."""
    cache = FileStreamProgramCache(tmp_path, tiers=[nobody[0]])
    with pytest.warns(ProgCacheWarning):
        compiled(cache, headers)
    tier = cache._stack.levels[1]
    assert tier.breaker.state == "open"
    tier.close = None  # a call would fail
    cache.close()


def test_a_tier_that_cannot_be_opened_is_left_out(tmp_path, headers):
    layer = f"file://{tmp_path}/no-layer"
    with FileStreamProgramCache(tmp_path / "cache", tiers=[layer]) as cache:
        with pytest.warns(ProgCacheWarning, match="no-layer"):
            compiled(cache, headers)
        assert compiled(cache, headers).hit


@pytest.mark.parametrize("mode", ["rw", "ro", "frozen"])
def test_a_layer_that_is_missing_is_named_in_every_mode(mode, tmp_path, headers, monkeypatch):
    """A frozen host whose layer isn't mounted must not report only the missing program."""
    monkeypatch.setenv("CUDA_PROGCACHE", mode)
    outcome = pytest.raises(FrozenMissError) if mode == "frozen" else contextlib.nullcontext()
    cache = FileStreamProgramCache(tmp_path / "cache", tiers=[f"file://{tmp_path}/no-layer"])
    with pytest.warns(ProgCacheWarning, match="no-layer isn't used: can't open"), outcome:
        compiled(cache, headers, PLAIN)


@pytest.fixture
def filled(redis_url, tmp_path, headers, other_machine):
    """The URL of a tier that another machine has filled with one program."""
    with FileStreamProgramCache(tmp_path / "first", tiers=[redis_url]) as first:
        compiled(first, headers)
    other_machine()
    return redis_url


def files(folder):
    return sorted(os.path.join(at, name) for at, _, names in os.walk(folder) for name in names)


WAYS_TO_READ = {
    "mode": lambda path, url: FileStreamProgramCache(path, mode="ro", tiers=[url]),
    "service": lambda path, url: CompileService(path, mode="ro", tiers=[url]).cache,
    "wrapped": lambda path, url: ReadOnlyProgramCache(FileStreamProgramCache(path, tiers=[url])),
    "frozen": lambda path, url: CompileService(path, mode="frozen", tiers=[url]).cache,
    "frozen store": lambda path, url: FrozenProgramCache(FileStreamProgramCache(path, tiers=[url])),
}


@pytest.mark.parametrize("way", WAYS_TO_READ)
def test_modes_that_only_read_write_nothing_here_or_there(way, filled, tmp_path, headers, open_url):
    """A program in the tier is a hit; the directory stays as it was, and new programs are stored nowhere."""
    FileStreamProgramCache(tmp_path / "second").close()
    before = files(tmp_path / "second")
    cache = WAYS_TO_READ[way](tmp_path / "second", filled)
    assert compiled(cache, headers).hit
    if way.startswith("frozen"):
        with pytest.raises(FrozenMissError):
            compiled(cache, headers, PLAIN)
    else:
        assert not compiled(cache, headers, PLAIN).hit
    cache.close()
    assert files(tmp_path / "second") == before
    assert len(open_url(filled)) == 1


def test_mode_off_asks_nobody(nobody, tmp_path, headers):
    url, met = nobody
    cache = CompileService(tmp_path / "cache", mode="off", tiers=[url]).cache
    assert not compiled(cache, headers).hit
    assert met() == 0


def test_a_tier_that_only_reads_takes_nothing(filled, tmp_path, headers, open_url):
    with FileStreamProgramCache(tmp_path / "second", tiers=[f"{filled}&mode=ro"]) as second:
        assert compiled(second, headers).hit
        assert not compiled(second, headers, PLAIN).hit
        assert compiled(second, headers, PLAIN).hit
        with pytest.raises(KeyError):
            del second[b"none"]
    assert len(open_url(filled)) == 1


def test_a_layer_is_a_tier(tmp_path, headers):
    """A layer is a directory below the cache: in an image, or on a mount."""
    with FileStreamProgramCache(tmp_path / "layer") as layer:
        compiled(layer, headers)
    before = files(tmp_path / "layer")
    for _ in range(2):
        with FileStreamProgramCache(tmp_path / "cache", tiers=[f"file://{tmp_path}/layer"]) as cache:
            assert compiled(cache, headers).hit
    assert files(tmp_path / "layer") == before
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        assert compiled(cache, headers).hit


def test_where_the_default_directory_cannot_be_made_there_are_tiers_all_the_same(
    filled, tmp_path, headers, monkeypatch
):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CUDA_PROGCACHE_TIERS", filled)
    with pytest.warns(ProgCacheWarning, match="in memory only"):
        cache = FileStreamProgramCache()
    assert compiled(cache, headers).hit
    assert not compiled(cache, headers, PLAIN).hit
    assert compiled(cache, headers, PLAIN).hit
    cache.close()


def test_a_worker_process_reaches_the_tiers(redis_url, tmp_path, other_machine):
    """A prewarm's worker publishes its program before it answers, because it may be killed after that."""
    library = KernelLibrary()
    wanted = Wanted("axpby", {}, "sm_80")
    service = CompileService(tmp_path / "first", tiers=[redis_url])
    worker = Worker({"compiler": service._compiler.settings, "library": library.settings})
    try:
        assert worker.run(wanted.message())["hit"] is False
    finally:
        worker.close()
    other_machine()
    second = CompileService(tmp_path / "second", tiers=[redis_url])
    assert second.kernel("axpby", arch="sm_80").hit


def test_a_worker_gets_the_secrets_and_nobody_else(tmp_path, monkeypatch):
    secret = "geheim-7f3a"
    monkeypatch.setenv("TIER_PASSWORD", secret)  # workers don't have this variable
    service = CompileService(tmp_path, tiers=["redis://:${TIER_PASSWORD}@h", f"https://{secret}@i"])
    told = json.dumps(service._compiler.settings)
    monkeypatch.delenv("TIER_PASSWORD")
    cache = CachedCompiler.from_settings(json.loads(told)).cache
    first, second = cache.tiers
    assert first.credentials.password.reveal() == second.credentials.user.reveal() == secret
    assert secret not in repr([cache.tiers, cache, cache.settings, service.cache.settings, service.cache.stats()])


#: The command line, which waits at its end for all that it has published.
COMMAND = """
from cuda_progcache.cli import main
from cuda_progcache.store.tiers import write_back
write_back.AT_EXIT = 300.0
main()
"""


def test_a_command_reaches_the_tiers(redis_url, tmp_path, headers):
    (tmp_path / "program.cu").write_text(SOURCE)

    def run(folder):
        command = ["compile", str(tmp_path / "program.cu"), "--arch", "sm_80", "-I", headers, "--json"]
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *command, "--cache-dir", str(tmp_path / folder)],
            env={**os.environ, "CUDA_PROGCACHE_TIERS": redis_url},
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    assert [run("first")["hit"], run("second")["hit"]] == [False, True]


def test_what_is_sent_after_a_stores_end_is_counted(redis_url, tmp_path):
    def publish():
        FileStreamProgramCache(tmp_path, tiers=[redis_url]).publish(b"k", b"cubin", {})

    with redis.Redis(port=urlsplit(redis_url).port) as server:
        server.client_pause(600_000, all=False)  # only writes
        try:
            publish()
            gc.collect()
            (tier,) = behind.stores((parse_tier(redis_url),))
            assert tier.tier().stored == 0  # the write is still under way
        finally:
            server.client_unpause()
    assert tier.flush(300)
    counted = tally.counted(Root(str(tmp_path), shared=False), tier.name)
    assert (counted.stored, counted.bytes_out) == (1, tier.tier().bytes_out)


def test_counts_that_cannot_be_written_down_are_written_later(tier, tmp_path):
    with FileStreamProgramCache(tmp_path, tiers=()) as cache:
        assert cache.publish(b"k", b"v", {})
    root = Root(str(tmp_path), shared=False)
    written = tally.TierTally(root, tier)
    assert tier.get(b"a key") is None
    written._log.add = lambda counted: False  # as on a full disk
    written.write()
    del written._log.add
    assert tally.counted(root, tier.name) == tally.TierTotals()
    for _ in range(2):
        written.write()
        counted = tally.counted(root, tier.name)
        assert (counted.hits, counted.misses, counted.calls) == (0, 1, 1)

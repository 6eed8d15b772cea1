# SPDX-License-Identifier: Apache-2.0
"""Stores of compiled programs as caches of calls, with real compiles and real stores."""

from __future__ import annotations

import os

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, InMemoryProgramCache, ProgramCacheStack
from cuda_progcache.memo.caches import CacheStack, Rejected, SizeLimitedCache
from cuda_progcache.memo.call import Call
from cuda_progcache.memo.digest import digest
from cuda_progcache.provenance.programs import ProgramCallStorage, ProgramValueStorage, program_cache

SOURCE = 'extern "C" __global__ void {}(int *a) {{ *a = {}; }}'


def compiled(service, name="k", value=1, arch="sm_80"):
    options = {"arch": arch, "name": name}
    return service.compile(SOURCE.format(name, value), options=options)


def test_compiles_are_calls(service):
    one, two = compiled(service), compiled(service, arch="sm_90")
    calls = service.calls
    found = calls.query(name="k", arguments={"arch": "sm_90"}).only()
    assert found.to_lookup_key() == two.digest and found.result == two.data
    assert found.arguments["target_type"] == "cubin" and "-arch=sm_90" in found.arguments["options"]
    assert found.metadata["runtime"]["duration"] == two.record["duration"]
    assert calls.query().latest().to_lookup_key() in {one.digest, two.digest}
    assert calls.contains(one.digest) and calls.load(one.digest[:10]).result == one.data
    assert calls.expand(two.digest[:10]) == two.digest and one.digest.startswith(calls.shrink(one.digest))
    assert calls.load_value(one.digest) == one.data
    with pytest.raises(KeyError):
        calls.load("0" * 64)


def test_kernels_can_be_asked_for_by_their_parameters(files):
    wanted = files.kernel("add", arch="sm_80", by=2)
    files.kernel("add", arch="sm_80")
    found = files.calls.query(arguments={"kernel": "add", "by": 2}).only()
    assert found.result == wanted.data and found.arguments["code_type"] == "c++"


def test_a_query_sees_every_change(service):
    assert service.calls.query().empty()
    for value in range(3):
        compiled(service, value=value)
        assert service.calls.query(name="k").count() == value + 1
    gone = compiled(service, value=0)
    assert gone.hit
    service.calls.evict(gone.digest)
    assert service.calls.query(name="k").count() == 2
    assert not compiled(service, value=0).hit
    assert service.calls.query(name="k").count() == 3


def test_transfer_into_another_store(service, tmp_path):
    one, two = compiled(service), compiled(service, name="other")
    target = CompileService(FileStreamProgramCache(tmp_path / "target", durability="none"))
    service.calls.query(name="k").transfer(target.calls)
    again = compiled(target)
    assert again.hit and again.data == one.data and again.record == one.record
    assert not target.calls.contains(two.digest)
    service.calls.transfer(target.calls, pop=True, overwrite=True)
    assert compiled(target, name="other").hit and service.calls.query().empty()


def test_a_stack_of_stores(tmp_path):
    far, near = (CompileService(FileStreamProgramCache(tmp_path / name, durability="none")) for name in ("far", "near"))
    one = compiled(far)
    stack = CacheStack((near.calls, far.calls))
    assert stack.load(one.digest).result == one.data
    assert compiled(near).hit


def test_every_level_of_a_stack_is_asked(tmp_path):
    memory = InMemoryProgramCache()
    one = compiled(CompileService(memory))
    service = CompileService(ProgramCacheStack([memory, FileStreamProgramCache(tmp_path, durability="none")]))
    assert service.calls.query().only().result == one.data


def test_views_and_tables(service):
    pytest.importorskip("pandas")
    one, two = compiled(service), compiled(service, name="other")
    view = service.calls.filter(lambda call: call.name == "k")
    assert view.contains(one.digest) and not view.contains(two.digest)
    with pytest.raises(KeyError):
        view.load_value(two.digest)
    table = service.calls.table(arguments="code")
    assert sorted(table["name"]) == ["k", "other"] and set(table["size"]) == {len(one.data), len(two.data)}
    assert service.calls.gc() == set() and service.calls.contains(one.digest)


def test_programs_go_in_and_small_results(service):
    one = compiled(service)
    for value in (b"bytes", "text" * 1000):
        with pytest.raises(Rejected):
            service.calls.save(Call("f", {"x": 1}, result=value))
    forged = service.calls.load(one.digest).fetch()
    forged.key = type(forged.key)("0" * 64)
    with pytest.raises(Rejected, match="another program"):
        service.calls.save(forged)
    assert service.calls.query().count() == 1
    key = service.calls.save(Call("f", {"x": 1}, result="text"))
    assert service.calls.load(key[:10]).result == "text" == service.calls.find(key)[0]
    assert service.calls.query(name="f", arguments={"x": 1}).only().to_lookup_key() == key
    assert set(service.calls.calls.list()) == {key, one.digest} and service.calls.contains(key)
    service.calls.evict(key)
    assert not service.calls.contains(key) and service.calls.query().count() == 1
    assert len(service.cache) == 1


def test_small_values_can_be_had_by_their_digests(service):
    compiled(service)
    key = service.calls.save(Call("f", {"x": [1, 2]}, result="text"))
    for value in ("sm_80", [1, 2], "text"):
        assert service.calls.load_value(digest(value)) == value
        assert service.calls.expand(digest(value)[:20]) == digest(value)
    service.calls.evict(key)
    with pytest.raises(KeyError):
        service.calls.load_value(digest("text"))
    with pytest.raises(KeyError):
        service.calls.expand(digest("text")[:20])


def test_entries_put_there_by_hand_are_calls_without_arguments(service):
    service.cache[b"key"] = b"binary"
    found = service.calls.query().only()
    assert (found.name, dict(found.arguments)) == ("", {})
    if isinstance(service.cache, FileStreamProgramCache):
        assert found.result == b"binary"


def test_looking_counts_as_no_hit(tmp_path):
    store = FileStreamProgramCache(tmp_path, durability="none")
    one = compiled(CompileService(store))
    before = store.stats().hits
    assert program_cache(store).load(one.digest).result == one.data
    assert store.stats().hits == before


def test_a_damaged_binary_is_a_miss(tmp_path):
    service = CompileService(FileStreamProgramCache(tmp_path, durability="none"))
    one = compiled(service)
    path = service.cache.info(one.digest).path
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"\0" if path.read_bytes()[-1] else path.read_bytes()[:-1] + b"\1")
    with pytest.raises(KeyError):
        _ = service.calls.load(one.digest).result


def test_the_store_minds_its_own_files(tmp_path):
    store = FileStreamProgramCache(tmp_path, durability="none")
    service = CompileService(store)
    compiled(service)
    assert service.calls.query().count() == 1 and os.path.exists(tmp_path / "calls.sqlite")
    assert len(store) == 1 and store.stats().entries == 1
    store.clear()
    assert service.calls.query().empty()


def test_a_limit_on_programs(tmp_path):
    store = FileStreamProgramCache(tmp_path / "limited", durability="none")
    source = CompileService(FileStreamProgramCache(tmp_path / "source", durability="none"))
    values = ProgramValueStorage(store)
    limited = SizeLimitedCache(values, ProgramCallStorage(store, values), max_size=2)
    for value in range(4):
        compiled(source, value=value)
    source.calls.transfer(limited)
    assert len(store) == 2


def test_a_store_without_records(tmp_path):
    with pytest.raises(TypeError, match="keeps no records"):
        program_cache({})

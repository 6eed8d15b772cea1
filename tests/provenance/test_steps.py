# SPDX-License-Identifier: Apache-2.0
"""Renderings, links, analyses and prewarm runs as recorded calls, with real compiles in every kind of store."""

from __future__ import annotations

import hashlib
import pickle
import shutil
import threading

import pytest

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    InMemoryProgramCache,
    KernelLibrary,
    LinkerOptions,
    Program,
    ProgramCacheStack,
    ProgramOptions,
    ReadOnlyProgramCache,
    link,
    memoize,
)
from cuda_progcache._util.running import asked_by, here, note_child, run, running
from cuda_progcache.provenance import step_records as storage
from cuda_progcache.provenance import steps
from cuda_progcache.store.compile_record import CompileRecord

SOURCE = 'extern "C" __global__ void {}(int *a) {{ *a = {}; }}'


def calls(service, name):
    return list(service.calls.query(name=name))


def links(call, which):
    return list((call.metadata.get("links") or {}).get(which, ()))


def small(service, value=1, arch="sm_80"):
    return service.compile(SOURCE.format("k", value), options={"arch": arch, "name": "k"})


# Renderings


def test_a_rendering_is_the_parent_of_its_compiles(service, library):
    one = service.kernel("add", arch="sm_80", by=2)
    two = service.kernel("add", arch="sm_90", by=2)
    (rendering,) = calls(service, "render")
    assert rendering.arguments["template"] == "add" and rendering.arguments["parameters"] == {"by": 2}
    assert rendering.arguments["files"] == {
        name: hashlib.sha256((library / name).read_bytes()).hexdigest() for name in ("add.cu.j2", "by.cuh.j2")
    }
    source = service.library.render("add", by=2).modules[0].source
    about = rendering.metadata["render"]
    assert about["sha256"] == hashlib.sha256(source.encode()).hexdigest()
    assert (about["template"], about["lines"]) == ("add.cu.j2", source.count("\n"))
    assert rendering.metadata["runtime"]["duration"] > 0
    for done in (one, two):
        assert links(service.calls.load(done.digest), "parents") == [rendering.to_lookup_key()]
    assert service.calls.load(rendering.to_lookup_key()[:12]).name == "render"


def test_hits_record_nothing(files, monkeypatch):
    done = files.kernel("add", arch="sm_80")
    small(files)
    files.calls.evict(calls(files, "render")[0].to_lookup_key())
    monkeypatch.setattr(storage.Steps, "save", None)
    assert files.kernel("add", arch="sm_80").hit and small(files).hit
    assert done.digest and not calls(files, "render")


def test_each_module_of_a_linked_kernel_is_rendered(service):
    service = CompileService(service.cache)
    done = service.kernel("lto_pair", arch="sm_80")
    renderings = {call.arguments["module"]: call for call in calls(service, "render")}
    assert set(renderings) == {"lto_pair_activation", "lto_pair_kernel"}
    assert list(renderings["lto_pair_kernel"].arguments["files"]) == ["lto_pair_kernel.cu.j2"]
    whole = service.calls.load(done.digest)
    parts = [service.calls.load(key) for key in links(whole, "children")]
    assert whole.arguments["inputs"] == tuple(part.to_lookup_key() for part in parts)
    assert [links(part, "parents") for part in parts] == [
        [renderings[part.name.partition(".")[0]].to_lookup_key()] for part in parts
    ]
    assert service.calls.query(arguments={"part_of": "lto_pair"}).count() == 2
    assert service.calls.query(arguments={"kernel": "lto_pair"}).only().to_lookup_key() == done.digest


def test_a_link_names_the_programs_linked(service):
    parts = [
        service.compile(
            f'extern "C" __device__ int f{n}() {{ return {n}; }}' if n else SOURCE.format("k", 0),
            options=ProgramOptions(arch="sm_80", name=f"part{n}", relocatable_device_code=True),
        )
        for n in range(2)
    ]
    done = link([*parts, (parts[1].data, "cubin")][:2], LinkerOptions(arch="sm_80"), cache=service.cache)
    made = service.calls.load(done.digest)
    assert made.arguments["inputs"] == (parts[0].digest, parts[1].digest)
    assert links(made, "children") == [parts[0].digest, parts[1].digest]
    told = made.metadata["record"]["inputs"]
    assert [part["sha256"] for part in told] == [hashlib.sha256(part.data).hexdigest() for part in parts]


# Analyses


def test_analyses_are_recorded(service):
    pytest.importorskip("cuda.pathfinder")
    done = small(service)
    for _ in range(2):
        usage = done.resource_usage()
    call = service.calls.query(name="resource_usage", arguments={"program": done.digest}).only()
    assert call.result == usage and links(call, "parents") == [done.digest]
    again = small(service)
    assert again.hit and again.resource_usage() == usage
    assert calls(service, "resource_usage")[0].metadata == call.metadata  # the record of the first analysis
    listing = done.sass()
    (call,) = calls(service, "sass")
    assert call.metadata["sass"]["sha256"] == hashlib.sha256(listing.encode()).hexdigest()
    assert call.result is None  # the text is much larger than the binary, and can be recomputed


def test_a_program_without_a_service_is_analysed_and_can_be_pickled(files):
    done = small(files)
    copy = pickle.loads(pickle.dumps(done))
    assert copy == done and copy.resource_usage() == done.resource_usage()
    assert len(calls(files, "resource_usage")) == 1
    uncached = Program(SOURCE.format("k", 1), "c++", ProgramOptions(arch="sm_80")).compiled("cubin")
    assert uncached.resource_usage()


# Prewarm runs and other callers


def test_a_prewarm_run_and_what_it_asked_for(service, library):
    first = service.prewarm(library, archs=["sm_80"], kernels=["add"], jobs=2)
    assert first.compiled == 2
    (run_of_add,) = calls(service, "prewarm")
    report = service.prewarm(library, archs=["sm_80"], jobs=2)
    assert (report.compiled, report.hits) == (2, 2)
    found = {call.arguments["kernels"]: call for call in calls(service, "prewarm")}
    assert set(found) == {("add",), ()}
    whole = found[()]
    assert whole.arguments["archs"] == ("sm_80",)
    assert whole.result["compiled"] == 2 and whole.result["hits"] == 2
    assert links(whole, "children") == [item.digest for item in report.items]
    for item in report.items:
        asked = run_of_add if item.kernel == "add" else whole
        *_, parent = links(service.calls.load(item.digest), "parents")
        assert parent == asked.to_lookup_key()
    again = service.prewarm(library, archs=["sm_80"])
    assert again.call == report.call == whole.to_lookup_key()
    assert service.calls.load(report.call).result["compiled"] == 2  # a run with only hits doesn't replace the record
    service.cache.remove(report.items[3].digest)
    service.prewarm(library, archs=["sm_80"])
    assert len(calls(service, "prewarm")) == 2  # the second run is the same call
    assert service.calls.load(report.call).result["hits"] == 3


def test_a_worker_process_knows_who_asked(files, library):
    from cuda_progcache.service.worker import Worker

    opened = KernelLibrary(library)
    worker = Worker(
        {
            "compiler": {"cache": files.cache.settings},
            "library": opened.settings,
            "asked_by": [{"key": "ab" * 32, "name": "prewarm"}],
        }
    )
    try:
        answer = worker.run({"kernel": "add", "variant": {"by": 2}, "arch": "sm_80"})
    finally:
        worker.close()
    assert links(files.calls.load(answer["digest"]), "parents")[-1] == "ab" * 32
    assert files.cache.info(answer["digest"]).record["parents"] == [{"name": "prewarm", "key": "ab" * 32}]
    assert links(calls(files, "render")[0], "parents") == ["ab" * 32]


def test_a_memoized_call_and_its_compiles_know_each_other(service, tmp_path):
    @memoize(tmp_path / "memo")
    def registers(value):
        usage = small(service, value).resource_usage()
        service.kernel("add", arch=["sm_80", "sm_90"])  # compiles in threads
        return {name: each["registers"] for name, each in usage.items()}

    small(service, 1)  # a hit is a child, too
    registers(1)
    registers(2)
    one, two = (registers.query(value).only() for value in (1, 2))
    programs = {small(service, value).digest for value in (1, 2)}
    assert not running.get()
    kernels = {done.digest for done in service.kernel("add", arch=["sm_80", "sm_90"]).values()}
    for call, value in ((one, 1), (two, 2)):
        assert {small(service, value).digest, *kernels} <= set(links(call, "children"))
    assert links(service.calls.load(small(service, 2).digest), "parents") == [two.to_lookup_key()]
    assert not links(service.calls.load(small(service, 1).digest), "parents")
    assert programs.isdisjoint(kernels)
    for digest in kernels:
        record = service.calls.load(digest).metadata["record"]
        assert [part["key"] for part in record["parents"]] == [one.to_lookup_key()]


def test_who_runs_is_known_per_thread():
    seen = []
    with run("outer", "f") as outer, run("inner", "g"):
        threads = [
            threading.Thread(target=work) for work in (here(lambda: seen.append(asked_by())), asked_nobody(seen))
        ]
        for thread in threads:
            thread.start()
            thread.join(300)
        note_child("used")
        assert list(running.get().children) == ["used"]
    assert seen == [[{"name": "g", "key": "inner"}], []]
    assert list(outer.children) == ["inner"] and asked_by() == []


def asked_nobody(seen):
    return lambda: seen.append(asked_by())


# Where records are stored, and for how long


def test_they_are_found_through_every_level(tmp_path, library):
    image = CompileService(FileStreamProgramCache(tmp_path / "image", durability="none"), library=library)
    done = image.kernel("add", arch="sm_80")
    before = sorted(path for path in (tmp_path / "image").rglob("*") if path.suffix != ".sqlite")
    layer = ReadOnlyProgramCache(tmp_path / "image")
    near = FileStreamProgramCache(tmp_path / "near", durability="none")
    service = CompileService(ProgramCacheStack([near, layer]), library=library)
    again = service.kernel("add", arch="sm_80")
    assert again.hit and again.resource_usage()
    other = service.kernel("add", arch="sm_80", by=2)
    assert {call.arguments["parameters"]["by"] for call in calls(service, "render")} == {1, 2}
    parent = links(service.calls.load(other.digest), "parents")[0]
    assert service.calls.load(parent).name == "render"
    assert sorted(path for path in (tmp_path / "image").rglob("*") if path.suffix != ".sqlite") == before
    assert {call.name for call in CompileService(near).calls.query()} >= {"render", "resource_usage"}
    assert CompileService(layer).calls.query(name="render").count() == 1
    assert done.digest == again.digest


def test_two_caches_merge_by_copying(files, tmp_path, library):
    other = CompileService(FileStreamProgramCache(tmp_path / "other", durability="none"), library=library)
    files.kernel("add", arch="sm_80")
    other.kernel("add", arch="sm_80", by=2)
    for tree in ("entries", "records", "steps"):
        shutil.copytree(tmp_path / "other" / tree, tmp_path / "programs" / tree, dirs_exist_ok=True)
    assert len(calls(files, "render")) == 2


def test_they_go_with_a_transfer(service, tmp_path):
    done = service.kernel("add", arch="sm_80")
    done.resource_usage()
    target = CompileService(FileStreamProgramCache(tmp_path / "target", durability="none"))
    service.calls.transfer(target.calls)
    here_, there = ({call.to_lookup_key(): call.detach() for call in s.calls.query()} for s in (service, target))
    assert here_.keys() == there.keys()
    assert calls(service, "render")[0].detach() == calls(target, "render")[0].detach()


def test_collection_leaves_what_a_program_needs(service, library):
    kept, gone = service.kernel("add", arch="sm_80"), service.kernel("add", arch="sm_80", by=2)
    kept.resource_usage()
    gone.resource_usage()
    report = service.prewarm(library, archs=["sm_80"], kernels=["mul"])
    assert service.calls.gc() == set()
    service.cache.remove(gone.digest)
    removed = service.calls.gc()
    assert len(removed) == 2
    assert [call.arguments["program"] for call in calls(service, "resource_usage")] == [kept.digest]
    assert {call.arguments["parameters"]["by"] for call in calls(service, "render")} == {1, 2}
    for item in report.items:
        service.cache.remove(item.digest)
    service.calls.gc()
    assert not calls(service, "prewarm") and len(calls(service, "render")) == 1


def test_clearing_a_cache_clears_them(files, tmp_path):
    files.kernel("add", arch="sm_80")
    files.cache.clear()
    assert files.calls.query().empty() and not (tmp_path / "programs" / "steps").exists()


def test_there_are_never_too_many(files, monkeypatch):
    monkeypatch.setattr(storage, "MOST", 2)
    kept = files._compiler.steps
    keys = [
        kept.save(steps.call_as_recorded(steps.RESOURCE_USAGE, {"program": f"{n:064x}"}, {}, 0.0, 0.0, parents=[]))
        for n in range(2 * 256)
    ]
    shards = {}
    for key in kept.all():
        shards.setdefault(key[:2], []).append(key)
    assert max(map(len, shards.values())) <= 2
    assert kept.contains(keys[-1])
    memory = storage.Steps(InMemoryProgramCache())
    monkeypatch.setattr(storage, "MOST_IN_MEMORY", 8)
    for n in range(20):
        memory.save(steps.call_as_recorded(steps.RESOURCE_USAGE, {"program": f"{n:064x}"}, {}, 0.0, 0.0))
    assert len(list(memory.all())) == 8


def test_a_damaged_record_is_a_miss_and_put_aside(files, tmp_path):
    done = files.kernel("add", arch="sm_80")
    key = calls(files, "render")[0].to_lookup_key()
    path = tmp_path / "programs" / "steps" / key[:2] / f"{key}.json"
    path.write_bytes(path.read_bytes().replace(b'"add"', b'"ADD"'))
    with pytest.raises(KeyError):
        files.calls.load(key)
    assert not path.exists() and not calls(files, "render")
    assert list((tmp_path / "programs" / "steps" / "quarantine").iterdir())
    assert links(files.calls.load(done.digest), "parents") == [key]  # the compile's own record still has the key


def test_a_directory_that_cant_be_written_costs_no_compile(files, tmp_path):
    (tmp_path / "programs" / "steps").write_text("in the way")
    done = files.kernel("add", arch="sm_80")
    assert done.digest and files._compiler.steps.counters["dropped"] == 1
    assert [call.arguments["template"] for call in calls(files, "render")] == ["add"]  # the record is kept in memory


def test_what_cant_be_recorded_costs_no_compile(files, monkeypatch):
    from cuda_progcache.memo import tagged_json

    def refuse(value):
        raise tagged_json.SaveError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(steps, "encode_json", refuse)
        done = files.kernel("add", arch="sm_80")
        assert done.resource_usage()
    assert done.digest and files._compiler.steps.counters["dropped"] == 2 and not calls(files, "render")


def test_a_record_of_before_has_the_same_parent(files):
    done = files.kernel("add", arch="sm_80")
    record = dict(files.cache.info(done.digest).record)
    about = CompileRecord({"kernel": record["kernel"]})
    assert steps.render_key(about.kernel) == calls(files, "render")[0].to_lookup_key()
    assert steps.links_of(about)["parents"] == [calls(files, "render")[0].to_lookup_key()]
    assert steps.links_of(CompileRecord({"name": "k"})) == {}

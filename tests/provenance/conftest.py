# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a small kernel library, a service over each kind of store, and real results of every kind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    InMemoryProgramCache,
    LinkerOptions,
    ProgramCacheStack,
    ProgramOptions,
    link,
    memoize,
)
from cuda_progcache.memo.cache_file import cache_file, track_file
from cuda_progcache.memo.memoize import file_cache
from cuda_progcache.provenance.places import recorded_calls


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """Two small kernels, each with two variants; the template of the first one includes another template."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "by.cuh.j2").write_text("#define BY {{ by }}\n")
    (folder / "add.cu.j2").write_text(
        '{% include "by.cuh.j2" %}\nextern "C" __global__ void add(int *a) { *a += BY; }\n'
    )
    (folder / "mul.cu.j2").write_text('extern "C" __global__ void mul(int *a) { *a *= {{ by }}; }\n')
    (folder / "manifest.toml").write_text(
        "format = 1\n"
        + "".join(
            f'[kernels.{name}]\ndescription = "{name}"\ntemplate = "{name}.cu.j2"\nentry_points = ["{name}"]\n'
            f"variants = [{{by = 1}}, {{by = 2}}]\n"
            f'[kernels.{name}.parameters.by]\ndescription = "by"\ntype = "int"\ndefault = 1\n'
            for name in ("add", "mul")
        )
    )
    return folder


@pytest.fixture(params=["files", "memory", "stack"])
def service(request, tmp_path, library):
    stores = {
        "files": lambda: FileStreamProgramCache(tmp_path / "programs", durability="none"),
        "memory": InMemoryProgramCache,
        "stack": lambda: ProgramCacheStack(
            [InMemoryProgramCache(), FileStreamProgramCache(tmp_path / "far", durability="none")]
        ),
    }
    with stores[request.param]() as store:
        yield CompileService(store, library=library)


@pytest.fixture
def files(tmp_path, library):
    """A service over a store in files."""
    with FileStreamProgramCache(tmp_path / "programs", durability="none") as store:
        yield CompileService(store, library=library)


@pytest.fixture(scope="session")
def world(tmp_path_factory, library):
    """Results of every kind.

    A prewarm run, a link, programs with a header of the test, an entry stored by hand, and memoized calls that used
    the programs.
    """
    place = tmp_path_factory.mktemp("provenance")
    (place / "include").mkdir()
    (place / "include" / "scale.h").write_text("#define SCALE 3\n")
    (place / "weights.txt").write_text("1 2 3")
    with FileStreamProgramCache(place / "cache", durability="none") as cache:
        service = CompileService(cache, library=library)
        service.prewarm(archs=["sm_80"], kernels=["add"])

        def compiled(name, text):
            options = ProgramOptions(
                arch="sm_80", name=name, include_path=[str(place / "include")], relocatable_device_code=True
            )
            return service.compile('#include "scale.h"\n' + text, options=options)

        def both():
            return link([one, two], LinkerOptions(arch="sm_80", name="both"), cache=cache)

        one = compiled("one.cu", "__device__ int one() { return SCALE; }")
        source = '__device__ int one();\nextern "C" __global__ void two(int *a) { *a = one(); }'
        (place / "two.cu").write_text('#include "scale.h"\n' + source)
        two = compiled(str(place / "two.cu"), source)
        linked = both()

        @memoize(place / "memo")
        def registers(kernel):
            return service.kernel(kernel, arch="sm_80").resource_usage()

        @memoize(place / "memo")
        def report(kernel):
            return {**registers(kernel), "linked": both().hit}

        @cache_file(place / "kept", file_args=["path"])
        def load(path):
            return compiled("one.cu", "__device__ int one() { return SCALE; }").hit and track_file(path).read_text()

        report("add")
        load(str(place / "weights.txt"))
        cache["by hand"] = b"x"
        yield SimpleNamespace(
            place=place, header=place / "include" / "scale.h", library=library, cache=cache, service=service,
            one=one.digest, two=two.digest, linked=linked.digest, add=service.kernel("add", arch="sm_80").digest,
            pair=CompileService(cache).kernel("lto_pair", arch="sm_80").digest,
            hand=next(entry.digest for entry in cache.entries() if not entry.record),
            memo=file_cache(place / "memo"), kept=recorded_calls(place / "kept"),
            report=report.digest("add"), registers=registers.digest("add"),
        )  # fmt: skip

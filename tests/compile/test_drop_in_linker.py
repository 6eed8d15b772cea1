# SPDX-License-Identifier: Apache-2.0
"""The same calls against ``cuda.core.Linker`` and ours: everything that can be observed is compared."""

from __future__ import annotations

import re
import weakref

import cuda.core
import pytest

import cuda_progcache

CALLEE = "__device__ float f(float x) { return x * 3.f; }"
CALLER = (
    'extern __device__ float f(float);\nextern "C" __global__ void k(float *a) { a[threadIdx.x] = f(a[threadIdx.x]); }'
)
ARCH = {"arch": "sm_80"}
SIDES = {"cuda.core": (cuda.core.Linker, cuda.core.LinkerOptions),
         "ours": (cuda_progcache.Linker, cuda_progcache.LinkerOptions)}  # fmt: skip


class Codes(dict):
    """Object codes by kind, without a repr: cuda.core 1.2.2 waits forever in that of an ObjectCode without libcuda."""

    __repr__ = object.__repr__


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """Object codes by kind, those of cubins also as files."""

    def part(source, kind, name):
        options = cuda_progcache.ProgramOptions(**ARCH, name=name, relocatable_device_code=True)
        return cuda_progcache.Program(source, "c++", options).compile(kind)

    kinds = ("cubin", "ptx", "ltoir")
    made = Codes((kind, [part(CALLEE, kind, "callee"), part(CALLER, kind, "caller")]) for kind in kinds)
    folder = tmp_path_factory.mktemp("codes")
    made["files"] = []
    for index, code in enumerate(made["cubin"]):
        (folder / str(index)).write_bytes(bytes(code.code))
        made["files"].append(cuda.core.ObjectCode.from_cubin(str(folder / str(index))))
    return made


def observe(action):
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return error


def alike(ours, theirs):
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), (ours, theirs)
    else:
        assert ours == theirs


def linked(side, inputs, target, cached=None, **options):
    """Link; gives the ObjectCode's parts, and the logs."""
    linker_type, options_type = SIDES[side]
    made = observe(lambda: linker_type(*inputs, options=options_type(**ARCH | options)))
    if isinstance(made, Exception):
        return made, None
    given = {} if cached is None else {"cache": cached}

    def parts():
        code = made.link(target, **given)
        assert isinstance(code, cuda.core.ObjectCode)
        return code.code_type, code.name, dict(code.symbol_mapping), bytes(code.code)

    result = observe(parts)
    info = re.sub(r"INFO: \w+ LTOIR Container created .*\n", "", made.get_info_log())  # says nothing, and ours drops it
    return result, (info.rstrip("\0"), made.get_error_log().rstrip("\0"), made.is_closed)


LINKS = {
    "cubins": ("cubin", "cubin", {}),
    "files": ("files", "cubin", {}),
    "ptx": ("ptx", "cubin", {}),
    "lto": ("ltoir", "cubin", {"link_time_optimization": True}),
    "lto to ptx": ("ltoir", "ptx", {"link_time_optimization": True, "ptx": True}),
    "a name": ("cubin", "cubin", {"name": "both"}),
    "options": ("ptx", "cubin", {"max_register_count": 32, "debug": True, "lineinfo": True, "ptxas_options": ["-O1"]}),
    "kernels": ("ltoir", "cubin", {"link_time_optimization": True, "kernels_used": ["k"]}),
    "an option that doesn't go with it": ("cubin", "cubin", {"ptx": True}),
    "no target": ("cubin", None, {}),
    "a target that isn't one": ("cubin", "fatbin", {}),
    "ltoir": ("cubin", "ltoir", {}),
}


@pytest.mark.parametrize("with_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("name", LINKS)
def test_link(name, with_cache, codes, cache):
    kind, target, options = LINKS[name]
    theirs = linked("cuda.core", codes[kind], target, **options)
    for _ in range(1 + with_cache):  # the second is a hit, if it can be one
        ours = linked("ours", codes[kind], target, cache if with_cache else None, **options)
        alike(ours[0], theirs[0])
        if theirs[1] is not None and not isinstance(theirs[0], Exception):
            assert ours[1] == theirs[1]
    if with_cache and not isinstance(theirs[0], Exception):
        assert cache.stats().hits == 1


def test_what_the_linker_refuses(codes):
    theirs, ours = (linked(side, codes["cubin"][1:], "cubin") for side in SIDES)
    alike(ours[0], theirs[0])
    logs = [re.sub(r"ERROR \d", "ERROR", side[1][1]).splitlines() for side in (ours, theirs)]  # a number of nobody's
    assert "Undefined reference to '_Z1ff'" in logs[0][0]
    assert logs[0] == logs[1]


CONSTRUCTORS = {
    "nothing": (lambda make, _: make()),
    "nothing but options": (lambda make, _: make(options={"arch": "sm_80"})),
    "bytes": (lambda make, _: make(b"x", options={"arch": "sm_80"})),
    "options of a wrong type": (lambda make, codes: make(*codes, options=3)),
    "an argument that isn't one": (lambda make, codes: make(*codes, nope=3)),
    "an architecture that isn't one": (lambda make, codes: make(*codes, options={"arch": "99"})),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructor(name, codes):
    theirs, ours = (observe(lambda side=side: CONSTRUCTORS[name](SIDES[side][0], codes["cubin"])) for side in SIDES)
    assert isinstance(theirs, Exception)
    assert isinstance(ours, type(theirs))


USES = {
    "handle": lambda linker: type(linker.handle),
    "handle isn't null": lambda linker: bool(int(linker.handle)),
    "is_closed": lambda linker: linker.is_closed,
    "logs before": lambda linker: (linker.get_info_log(), linker.get_error_log()),
    "weak references": lambda linker: weakref.ref(linker)() is linker,
    "no target": lambda linker: linker.link(),
    "backend": lambda linker: str(type(linker).which_backend()),
}


@pytest.mark.parametrize("name", USES)
def test_other_uses(name, codes):
    theirs, ours = (
        observe(lambda side=side: USES[name](SIDES[side][0](*codes["cubin"], options=SIDES[side][1](**ARCH))))
        for side in SIDES
    )
    alike(ours, theirs)


@pytest.mark.parametrize(
    "then", [lambda linker: linker.link("cubin"), lambda linker: linker.is_closed, lambda linker: int(linker.handle)]
)
def test_after_close(then, codes):
    def closed(side):
        made = SIDES[side][0](*codes["cubin"], options=SIDES[side][1](**ARCH))
        made.close()
        made.close()
        return observe(lambda: then(made))

    alike(closed("ours"), closed("cuda.core"))


def test_public_names():
    public = [{name for name in dir(kind) if not name.startswith("_")} for kind, _ in SIDES.values()]
    assert public[0] == public[1]


def test_differs_a_second_link(codes):
    """cuda.core hands both to one nvJitLink handle, which refuses the second; ours makes one for each link."""
    theirs, ours = (SIDES[side][0](*codes["cubin"], options=SIDES[side][1](**ARCH)) for side in SIDES)
    first, second = (bytes(ours.link("cubin").code) for _ in range(2))
    assert first == second == bytes(theirs.link("cubin").code)
    assert isinstance(observe(lambda: theirs.link("cubin")), Exception)


def test_differs_our_own_programs_are_taken(codes):
    made = cuda_progcache.Program('extern "C" __global__ void k() {}', "c++", ARCH).compiled("ltoir")
    assert cuda_progcache.Linker(made, options=ARCH).link("CUBIN").code_type == "cubin"
    with pytest.raises(cuda_progcache.OptionError, match="takes no extra_flags"):
        assert cuda_progcache.Linker(made, options={**ARCH, "extra_flags": "-g"}).handle

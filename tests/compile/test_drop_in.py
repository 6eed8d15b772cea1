# SPDX-License-Identifier: Apache-2.0
"""The same calls against ``cuda.core.Program`` and ours: everything that can be observed is compared.

What differs on purpose has a test of its own at the end.
"""

from __future__ import annotations

import io
import weakref

import cuda.core
import cuda.core.utils
import pytest

import cuda_progcache
from cuda_progcache import FileStreamProgramCache

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'
TEMPLATE = "template <class T> __global__ void k(T *a) { *a = 1; }"
PTX = cuda_progcache.Program(SOURCE, "c++", {"arch": "sm_80"}).compiled("ptx").data.decode()
NVVM = """
target triple = "nvptx64-nvidia-cuda"
target datalayout = "e-p:64:64:64-i1:8:8-i8:8:8-i16:16:16-i32:32:32-i64:64:64-i128:128:128-f32:32:32-f64:64:64\
-v16:16:16-v32:32:32-v64:64:64-v128:128:128-n16:32:64"
declare double @__nv_sin(double)
define void @k(double* %p) {
  %x = load double, double* %p
  %y = call double @__nv_sin(double %x)
  store double %y, double* %p
  ret void
}
@llvm.used = appending global [1 x i8*] [i8* bitcast (void (double*)* @k to i8*)], section "llvm.metadata"
!nvvm.annotations = !{!0}
!0 = !{void (double*)* @k, !"kernel", i32 1}
!nvvmir.version = !{!1}
!1 = !{i32 2, i32 0}
"""

ARCH = {"arch": "sm_80"}
WARNING = "#warning careful\n" + SOURCE
SIDES = {"cuda.core": (cuda.core.Program, cuda.core.ProgramOptions),
         "ours": (cuda_progcache.Program, cuda_progcache.ProgramOptions)}  # fmt: skip


def observe(action):
    """What came of a call: its result, or the type of the error that a handler would catch and what it says."""
    try:
        return action()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is compared
        return error


def object_code(made):
    """All of an ObjectCode that can be read without a driver."""
    assert isinstance(made, cuda.core.ObjectCode)
    return made.code_type, made.name, dict(made.symbol_mapping), bytes(made.code)


def alike(ours, theirs):
    """Equal results; or an error that a handler written for theirs catches."""
    if isinstance(theirs, Exception):
        assert isinstance(ours, type(theirs)), (ours, theirs)
    else:
        assert ours == theirs


def compiled(side, code, code_type, target, names=(), cached=None, **options):
    """Compile; gives the ObjectCode's parts, the log, and the program's state afterwards."""
    program_type, options_type = SIDES[side]
    log = io.StringIO()
    given = {} if cached is None else {"cache": cached}
    programs = []

    def run():
        programs.append(program_type(code, code_type, options_type(**ARCH | options)))
        return object_code(programs[0].compile(target, names, log, **given))

    made = observe(run)  # cuda.core links PTX when the program is made, ours when it is compiled
    states = [(p.pch_status, p.is_closed, str(p.backend), repr(p)) for p in programs]
    return made, log.getvalue().rstrip("\0"), states if not isinstance(made, Exception) else []


COMPILES = {
    "cubin": (SOURCE, "c++", "cubin"),
    "upper case": (SOURCE, "C++", "CUBIN"),
    "lto": (SOURCE, "c++", "ltoir", (), {"link_time_optimization": True}),
    "name expressions": (TEMPLATE, "c++", "cubin", ("k<int>", b"k<float>")),
    "a name expression twice": (TEMPLATE, "c++", "cubin", ["k<int>", "k<int>"]),
    "one that doesn't exist": (TEMPLATE, "c++", "cubin", ("nope<int>",)),
    "one of a wrong type": (TEMPLATE, "c++", "cubin", (3,)),
    "a text of them": (SOURCE, "c++", "cubin", "k"),
    "a warning": (WARNING, "c++", "cubin"),
    "a name": (SOURCE, "c++", "cubin", (), {"name": "some/where.cu"}),
    "options": (SOURCE, "c++", "cubin", (), {"std": "c++20", "fma": False, "max_register_count": 32}),
    "lineinfo": (SOURCE, "c++", "cubin", (), {"lineinfo": True, "name": "k.cu"}),
    "debug": (SOURCE, "c++", "cubin", (), {"debug": True, "name": "k.cu"}),
    "refused": ("int x = nope;", "c++", "cubin"),
    "a missing header": ('#include "gone.h"', "c++", "cubin"),
    "an unknown architecture": (SOURCE, "c++", "cubin", (), {"arch": "sm_12"}),
    "no target": (SOURCE, "c++", None),
    "bytes for a target": (SOURCE, "c++", b"cubin"),
    "a target that isn't one": (SOURCE, "c++", "fatbin"),
    "ptx": (PTX, "ptx", "cubin", (), {"max_register_count": 32}),
    "ptx that isn't": ("nonsense", "ptx", "cubin"),
    "ptx to ltoir": (PTX, "ptx", "ltoir"),
    "nvvm": (NVVM, "nvvm", "ptx", (), {"use_libdevice": True}),
    "nvvm as bytes": (NVVM.encode(), "nvvm", "ltoir", (), {"use_libdevice": True}),
    "nvvm that isn't": ("nonsense", "nvvm", "ptx"),
    "nvvm to a cubin": (NVVM, "nvvm", "cubin"),
}


@pytest.mark.parametrize("with_cache", [False, True], ids=["plain", "cached"])
@pytest.mark.parametrize("name", COMPILES)
def test_compile(name, with_cache, tmp_path):
    code, code_type, target, *rest = COMPILES[name]
    names, options = rest[0] if rest else (), rest[1] if len(rest) > 1 else {}
    theirs = compiled("cuda.core", code, code_type, target, names, **options)
    cache = FileStreamProgramCache(tmp_path / "cache", durability="none") if with_cache else None
    for _ in range(2 if with_cache else 1):  # the second is a hit, if it can be one
        ours = compiled("ours", code, code_type, target, names, cache, **options)
        alike(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    if with_cache and not isinstance(theirs[0], Exception):
        assert cache.stats().hits == 1


@pytest.mark.parametrize(
    ("code", "said"),
    [("int x = nope;", 'default_program(1): error: identifier "nope" is undefined'), ('#include "gone.h"', "gone.h")],
)
def test_errors_say_as_much(code, said):
    theirs, ours = (compiled(side, code, "c++", "cubin")[0] for side in SIDES)
    assert isinstance(ours, type(theirs))
    for part in ("NVRTC_ERROR_COMPILATION", "compilation log:\n\n", said):
        assert part in str(theirs)
        assert part in str(ours)


CONSTRUCTORS = {
    "no options": ((SOURCE, "c++"), {}),
    "options by position": ((SOURCE, "c++", {"arch": "sm_80"}), {}),
    "all by name": ((), {"code": SOURCE, "code_type": "c++", "options": {"arch": "sm_80"}}),
    "no code": ((), {}),
    "no code type": ((SOURCE,), {}),
    "bytes of c++": ((b"x", "c++", {"arch": "sm_80"}), {}),
    "a code type that isn't one": ((SOURCE, "foo", {"arch": "sm_80"}), {}),
    "a number as code": ((3, "nvvm", {"arch": "sm_80"}), {}),
    "options of a wrong type": ((SOURCE, "c++", 3), {}),
    "a field that isn't one": ((SOURCE, "c++", {"arch": "sm_80", "nope": 1}), {}),
    "extra sources of c++": ((SOURCE, "c++", {"arch": "sm_80", "extra_sources": [("a", "b")]}), {}),
    "extra sources of ptx": ((PTX, "ptx", {"arch": "sm_80", "extra_sources": [("a", "b")]}), {}),
}


@pytest.mark.parametrize("name", [name for name in CONSTRUCTORS if name != "no options"])
def test_constructor(name):
    arguments, given = CONSTRUCTORS[name]
    theirs, ours = (observe(lambda side=side: repr(SIDES[side][0](*arguments, **given))) for side in SIDES)
    alike(ours, theirs)


def program(side, code=SOURCE, code_type="c++", **options):
    program_type, options_type = SIDES[side]
    return program_type(code, code_type, options_type(**ARCH | options))


def closed(side, then):
    made = program(side)
    made.close()
    made.close()
    return observe(lambda: then(made))


@pytest.mark.parametrize(
    "then",
    [
        lambda p: p.compile("cubin"),
        lambda p: p.is_closed,
        lambda p: str(p.backend),
        lambda p: p.pch_status,
        repr,
        lambda p: int(p.handle),
    ],
    ids=["compile", "is_closed", "backend", "pch_status", "repr", "handle"],
)
def test_after_close(then):
    alike(closed("ours", then), closed("cuda.core", then))


class Theirs(cuda.core.utils.ProgramCacheResource):
    """A store of somebody's, as cuda.core asks for it."""

    def __init__(self):
        self.kept = {}

    def __getitem__(self, key):
        return self.kept[key]

    def __setitem__(self, key, value):
        self.kept[key] = bytes(getattr(value, "code", value))

    def __delitem__(self, key):
        del self.kept[key]

    def __len__(self):
        return len(self.kept)

    def clear(self):
        self.kept.clear()


USES = {
    "type of handle": lambda p: type(p.handle),
    "handle isn't null": lambda p: bool(int(p.handle)),
    "handle stays": lambda p: int(p.handle) == int(p.handle),
    "is_closed": lambda p: p.is_closed,
    "pch_status": lambda p: p.pch_status,
    "backend": lambda p: (str(p.backend), type(p.backend)),
    "weak references": lambda p: weakref.ref(p)() is p,
    "hash": lambda p: hash(p) == hash(p),
    "equality": lambda p: p == p,
    "no target": lambda p: p.compile(),
    "cache of a wrong type": lambda p: p.compile("cubin", cache=3),
    "a dict as a cache": lambda p: object_code(p.compile("cubin", cache={})),
    "a cache made after cuda.core's": lambda p: object_code(p.compile("cubin", cache=Theirs())),
    "log of a wrong type, and no log": lambda p: p.compile("cubin", logs=3).code_type,
    "an argument that isn't one": lambda p: p.compile("cubin", nope=3),
    "no context manager": lambda p: p.__enter__,
    "backend is read-only": lambda p: setattr(p, "backend", 3),
}


@pytest.mark.parametrize("name", USES)
def test_other_uses(name):
    theirs, ours = (observe(lambda side=side: USES[name](program(side))) for side in SIDES)
    alike(ours, theirs)


@pytest.mark.parametrize(("code", "code_type"), [(SOURCE, "c++"), (NVVM, "nvvm"), (PTX, "ptx")])
def test_handles(code, code_type):
    theirs, ours = (observe(lambda side=side: program(side, code, code_type).handle) for side in SIDES)
    assert type(ours) is type(theirs)


def test_public_names():
    public = [{name for name in dir(program_type) if not name.startswith("_")} for program_type, _ in SIDES.values()]
    assert public[0] <= public[1]
    assert public[1] - public[0] == {"compiled"}


def test_a_pch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h.h").write_text("#define N 3\n")
    source = '#include "h.h"\n' + SOURCE
    statuses = {}
    for side in SIDES:
        made = program(side, source, create_pch=f"{side}.pch")
        observe(lambda made=made: made.compile("cubin"))
        statuses[side] = made.pch_status
    assert statuses["ours"] == "created"
    # cuda.core 1.2.2 raises TypeError where a PCH was made, after it was made.
    assert statuses["cuda.core"] in {None, "created"}


def test_differs_lto_without_saying_so():
    """cuda.core 1.2 gives an empty LTO-IR where link_time_optimization isn't set; ours sets the flag."""
    theirs, ours = (compiled(side, SOURCE, "c++", "ltoir")[0] for side in SIDES)
    assert theirs[3] == b""
    assert ours[3] == compiled("cuda.core", SOURCE, "c++", "ltoir", link_time_optimization=True)[0][3]


def test_differs_ptx_without_a_driver():
    """cuda.core asks the driver for its version; ours asks NVRTC alone."""
    theirs, ours = (compiled(side, SOURCE, "c++", "ptx")[0] for side in SIDES)
    assert ours[0] == "ptx"
    if isinstance(theirs, Exception):
        assert "cuda" in str(theirs)
    else:
        assert ours == theirs


def test_differs_a_second_compile_with_name_expressions():
    """cuda.core hands both to one NVRTC program, which refuses the second; ours makes one for each compile."""
    theirs, ours = (program(side, TEMPLATE) for side in SIDES)
    first, second = (object_code(ours.compile("cubin", ("k<int>",))) for _ in range(2))
    assert first == second == object_code(theirs.compile("cubin", ("k<int>",)))
    with pytest.raises(Exception, match="NO_NAME_EXPRESSIONS_AFTER_COMPILATION"):
        theirs.compile("cubin", ("k<int>",))


def test_differs_an_option_that_nvvm_has_not():
    """cuda.core raises its CUDAError, whose module is private; ours a ValueError and RuntimeError of the same words."""
    theirs, ours = (compiled(side, NVVM, "nvvm", "ptx", std="c++17")[0] for side in SIDES)
    assert isinstance(ours, ValueError)
    assert isinstance(ours, RuntimeError)
    assert str(ours) == str(theirs)

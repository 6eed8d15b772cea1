# SPDX-License-Identifier: Apache-2.0
"""One project in two directories, and under two users: an entry is shared exactly where the output is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cuda_progcache import FileStreamProgramCache, HeaderPolicy, Program, ProgramOptions

KERNEL = 'extern "C" __global__ void k(int *a) { a[threadIdx.x] = VALUE; }\n'
HEADERS = {
    "none": ("#define VALUE 3\n" + KERNEL, {}),
    "beside": ('#include "value.h"\n' + KERNEL, {}),
    "relative": ("#include <value.h>\n" + KERNEL, {"include_path": "inc"}),
    "absolute": ("#include <value.h>\n" + KERNEL, {"include_path": "{here}/inc"}),
    "pre_include": (KERNEL, {"include_path": "{here}/inc", "pre_include": "value.h"}),
    "file": ("#include <file.h>\n" + KERNEL, {"include_path": "{here}/inc"}),
}


@pytest.fixture
def places(project):
    """Two copies of a project, the second one deeper."""
    found = []
    for place in ("one", "somewhere/else/two"):
        for folder in ("", "inc/"):
            project(f"{place}/{folder}value.h", "#define VALUE 3\n__device__ int helper(int x) { return x * 3; }\n")
        project(f"{place}/inc/file.h", "__device__ const char *where = __FILE__;\n#define VALUE 3\n")
        found.append(str(project.folder / place))
    return found


def options_in(here, given):
    return {name: value.format(here=here) if isinstance(value, str) else value for name, value in given.items()}


@pytest.mark.parametrize("policy", [HeaderPolicy(), HeaderPolicy(hermetic=True)], ids=["plain", "hermetic"])
@pytest.mark.parametrize("how", HEADERS)
@pytest.mark.parametrize("lineinfo", [None, True], ids=["", "lineinfo"])
@pytest.mark.parametrize("target_type", ["cubin", "ptx", "ltoir"])
def test_shared_exactly_where_the_output_is_the_same(cache, places, monkeypatch, target_type, lineinfo, how, policy):
    source, given = HEADERS[how]
    fresh, cached = [], []
    for here in places:
        monkeypatch.chdir(here)
        options = ProgramOptions(arch="sm_80", lineinfo=lineinfo, **options_in(here, given))
        program = Program(source, "c++", options, header_policy=policy)
        fresh.append(program.compiled(target_type))
        cached.append(program.compiled(target_type, cache=cache))
        assert cached[-1].reason is None
        assert cached[-1].data == fresh[-1].data
    same = fresh[0].data == fresh[1].data
    assert cached[1].hit is same
    if target_type != "ltoir" and not lineinfo and how != "file":
        assert same, "nothing of the place is in there"


# What a header says about its own path, and whether that may be folded into other bytes.
SAYS = {
    "nothing": ("__device__ inline void say(int x) {}", False),
    "a macro that nobody uses": ("#define WHERE __FILE__\n__device__ inline void say(int x) {}", True),
    "assert": ("__device__ inline void say(int x) { assert(x == 3); }", False),
    "assert, never called": (
        "__device__ inline void other(int x) { assert(x == 3); }\n__device__ void say(int) {}",
        False,
    ),
    "printf": ('__device__ inline void say(int x) { printf("%s:%d", __FILE__, __LINE__); }', False),
    "joined": ('__device__ inline void say(int x) { printf("at " __FILE__ "!"); }', False),
    "builtin": ('__device__ inline void say(int x) { printf("%s", __builtin_FILE()); }', False),
    "macro": ('#define SAY(x) printf("%s %d", __FILE__, x)\n__device__ inline void say(int x) { SAY(x); }', False),
    "size": ("__device__ inline int say(int x) { return x + sizeof __FILE__; }", True),
    "letter": ("__device__ inline int say(int x) { return x + __FILE__[3]; }", True),
    "hash": (
        """\
__device__ constexpr int h(const char *s) { return *s ? *s + 31 * h(s + 1) : 0; }
__device__ inline int say(int x) { return x + h(__FILE__); }
""",
        True,
    ),
    "variable": ("__device__ const char *where = __FILE__;\n__device__ inline void say(int x) {}", True),
    "struct": (
        """\
struct S { const void *p; char path[400]; };
__device__ int other;
__device__ S where = {&other, __FILE__};
__device__ inline void say(int x) {}
""",
        True,
    ),
}
WAYS = {
    "relative": ("#include <say.h>\n", {"include_path": "inc"}),
    "dotted": ("#include <say.h>\n", {"include_path": "./inc"}),
    "absolute": ("#include <say.h>\n", {"include_path": "{here}/inc"}),
    "nested": ("#include <outer.h>\n", {"include_path": "{here}/inc"}),
    "beside": ('#include "say.h"\n', {}),
    "beside a named source": ('#include "say.h"\n', {"name": "{here}/inc/k.cu"}),
    "pre-included": ("", {"pre_include": "{here}/inc/say.h"}),
    "pre-included by name": ("", {"pre_include": "say.h", "include_path": "{here}/inc"}),
}
SAYING = 'extern "C" __global__ void k(int *a) { say(a[threadIdx.x]); }\n'


@pytest.mark.parametrize(
    ("target_type", "way"), [*(("cubin", way) for way in WAYS), ("ptx", "absolute"), ("ptx", "beside a named source")]
)
@pytest.mark.parametrize("says", SAYS)
def test_a_path_is_in_the_key_where_it_is_in_the_output(cache, project, monkeypatch, target_type, says, way):
    text, may_fold = SAYS[says]
    include, given = WAYS[way]
    fresh, cached = [], []
    for place in ("one", "somewhere/else/two", "one"):
        for folder in ("", "inc/"):
            project(f"{place}/{folder}say.h", text)
            project(f"{place}/{folder}outer.h", '#include "say.h"')
        here = str(project.folder / place)
        monkeypatch.chdir(here)
        program = Program(include + SAYING, "c++", ProgramOptions(arch="sm_80", **options_in(here, given)))
        # The third time is the first place again, whose output is known.
        fresh.append(program.compiled(target_type) if len(fresh) < 2 else fresh[0])
        cached.append(program.compiled(target_type, cache=cache))
        assert cached[-1].reason is None
        assert cached[-1].data == fresh[-1].data
        assert cached[-1].log == fresh[-1].log
    assert cached[2].hit
    if not may_fold:
        assert cached[1].hit is (fresh[0].data == fresh[1].data)


@pytest.mark.parametrize("says", ["assert", "printf"])
def test_hermetic_and_plain_compiles_share_what_has_no_path(cache, project, monkeypatch, says):
    """From memory a header has another path: the name in its #include."""
    project("inc/sub/say.h", SAYS[says][0])
    project("inc/outer.h", '#include "sub/say.h"')
    monkeypatch.chdir(project.folder)
    for source in ("#include <outer.h>\n" + SAYING, "#include <outer.h>\n" + KERNEL.replace("VALUE", "3")):
        options = ProgramOptions(arch="sm_80", include_path="inc")
        for policy in (HeaderPolicy(hermetic=True), HeaderPolicy(), HeaderPolicy(hermetic=True), HeaderPolicy()):
            program = Program(source, "c++", options, header_policy=policy)
            done = program.compiled("cubin", cache=cache)
            assert done.data == program.compiled("cubin").data
            assert done.reason is None


@pytest.mark.parametrize("name", ["k.cu", "./k.cu", "{here}/k.cu", "{here}/../k.cu", "deep/er/k.cu"])
def test_of_a_name_the_last_part_counts(cache, project, monkeypatch, name):
    """It alone is in cubin and PTX."""
    monkeypatch.chdir(project.folder)
    source = (
        "#define VALUE f(3)\nnamespace { __device__ __noinline__ int f(int x) { return x * *new int(x); } }\n" + KERNEL
    )
    for target_type in ("cubin", "ptx"):
        first = Program(source, "c++", ProgramOptions(arch="sm_80", name="k.cu")).compiled(target_type, cache=cache)
        options = ProgramOptions(arch="sm_80", name=name.format(here=project.folder))
        again = Program(source, "c++", options).compiled(target_type, cache=cache)
        assert again.hit
        assert again.data == first.data == Program(source, "c++", options).compiled(target_type).data
        other = ProgramOptions(arch="sm_80", name=name.format(here=project.folder).replace("k.cu", "l.cu"))
        assert not Program(source, "c++", other).compiled(target_type, cache=cache).hit, "mangled names hold it"
        cache.clear()


def test_the_log_of_a_hit_names_the_files_of_its_caller(cache, project, monkeypatch):
    warning = (
        "template <class T> __device__ T same(T t) { int unused; return t; }\n"
        "template <class T> struct twice { __device__ int of(T t) { return same(1) + t; } };\n"
    )
    source = """\
#include <w.h>
#include "beside.h"
extern "C" __global__ void k(int *a) { int here; *a = twice<int>().of(1); }
"""
    for place in ("one", "two"):
        project(f"{place}/inc/w.h", warning)
        project(f"{place}/src/beside.h", "inline __device__ int x() { int beside; return 2; }")
    for number, (place, name) in enumerate([("one", "src/k.cu"), ("two", "src/k.cu"), ("two", "{here}/src/k.cu")]):
        here = str(project.folder / place)
        monkeypatch.chdir(here)
        options = ProgramOptions(arch="sm_80", include_path=f"{here}/inc", name=name.format(here=here))
        done = Program(source, "c++", options).compiled("cubin", cache=cache)
        assert done.hit is (number > 0)
        fresh = Program(source, "c++", options).compiled("cubin")
        assert done.log == fresh.log
        assert f"{here}/inc/w.h(1): warning" in done.log
        assert f"at line 3 of {name.format(here=here)}\n" in done.log


@pytest.mark.parametrize("name", ["kernels/k.cu", "k.cu"])
def test_a_name_is_what_the_user_gave(cache, places, monkeypatch, name):
    hits = []
    for here in places:
        monkeypatch.chdir(here)
        options = ProgramOptions(arch="sm_80", name=name)
        hits.append(Program("#define VALUE 3\n" + KERNEL, "c++", options).compiled("cubin", cache=cache).hit)
    assert hits == [False, True]


AS_USER = """
import json, os, sys
from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.compile import compilers

def compile_all(project, cache):
    os.makedirs(os.path.join(project, "inc"))
    with open(os.path.join(project, "inc", "value.h"), "w") as file:
        file.write("#define VALUE 3\\n")
    os.utime(os.path.join(project, "inc", "value.h"), (1, 1))
    os.chdir(project)
    cache = FileStreamProgramCache(cache, durability="none", shared=True)
    for target_type, lineinfo in json.loads(sys.argv[3]):
        options = ProgramOptions(arch="sm_80", include_path=os.path.join(project, "inc"), lineinfo=lineinfo)
        done = Program(sys.argv[4], "c++", options).compiled(target_type, cache=cache)
        yield [done.hit, done.digest, done.reason, done.data.hex()]

user, folder = int(sys.argv[1]), sys.argv[2]
os.umask(0)
# As root, since the other user may not be able to read the interpreter's library: all is imported then, and compiled
# in this process, since it may not be able to start the interpreter either.
compilers.compiles_itself = True
list(compile_all(os.path.join(folder, f"before-{user}"), os.path.join(folder, f"cache-before-{user}")))
if user:
    os.setgroups([]); os.setgid(user); os.setuid(user)
os.environ["HOME"] = home = os.path.join(folder, f"home-{user}")
os.environ.pop("XDG_CACHE_HOME", None)
print(json.dumps([os.getuid(), list(compile_all(os.path.join(home, "project"), os.path.join(folder, "cache")))]))
"""


@pytest.fixture
def open_folder():
    """For everybody: pytest's own lies in one that each run of it closes to other users."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can be two users")
def test_two_users_share_entries(open_folder):
    """Each with a home, a project and a process; the cache is shared between them."""
    folder = open_folder
    FileStreamProgramCache(folder / "cache", shared=True).close()
    for path, _, _ in os.walk(folder / "cache"):
        os.chmod(path, 0o777)
    wanted = [("cubin", None), ("ptx", None), ("ltoir", None), ("cubin", True)]
    source = "#include <value.h>\n" + KERNEL
    runs = []
    for user in (0, 65534):
        command = [sys.executable, "-c", AS_USER, str(user), str(folder), json.dumps(wanted), source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    assert [run[0] for run in runs] == [0, 65534]
    assert [hit for hit, *_ in runs[0][1]] == [False] * 4
    assert [hit for hit, *_ in runs[1][1]] == [True, True, False, False], "LTO-IR and line tables name the place"
    for first, second in zip(runs[0][1], runs[1][1], strict=True):
        assert first[2] is second[2] is None
        assert (first[3] == second[3]) is second[0]

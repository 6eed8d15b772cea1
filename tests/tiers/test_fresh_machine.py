# SPDX-License-Identifier: Apache-2.0
"""A machine that has never compiled, with a tier that another machine filled: every program is a hit."""

from __future__ import annotations

from cuda_progcache import CompileService
from cuda_progcache.keys import headers

#: Compiles three programs, with the headers of each folder, over a tier; prints what happened to each.
MACHINE = """
import sys
from cuda_progcache import FileStreamProgramCache, Program, ProgramCacheStack, ProgramOptions
from cuda_progcache.store.tiers import open_tier
from cuda_progcache.store.tiers.settings import parse_tier

url, disk, *folders = sys.argv[1:]
tier = open_tier(parse_tier(url))
stack = ProgramCacheStack((FileStreamProgramCache(disk), tier))
PLAIN = 'extern "C" __global__ void plain(int *a) { *a = 1; }'
HEADED = '#include "value.h"\\nextern "C" __global__ void headed(int *a) { *a = VALUE; }'
TYPED = '#include <value.h>\\ntemplate <class T> __global__ void typed(T *a) { *a = VALUE; }'
PROGRAMS = ((PLAIN, ()), (HEADED, ()), (TYPED, ("typed<int>",)))
for folder, (code, names) in ((folder, program) for folder in folders for program in PROGRAMS):
    options = ProgramOptions(arch="sm_80", include_path=[folder])
    program = Program(code, "c++", options).compiled("cubin", names, cache=stack)
    assert stack.flush(300)
    print("hit" if program.hit else f"compiled {program.reason}", len(program.symbol_mapping), program.digest)
stack.close()
"""


def project(folder, value=1):
    folder.mkdir()
    (folder / "value.h").write_text(f"#define VALUE {value}\n")
    return folder


def test_nothing_is_compiled_that_was_compiled_elsewhere(tier_url, python, tmp_path):
    first = python(MACHINE, tier_url, tmp_path / "first", project(tmp_path / "here"))
    assert [line.split()[0] for line in first.splitlines()] == ["compiled"] * 3
    second = python(MACHINE, tier_url, tmp_path / "second", project(tmp_path / "there"))
    assert second == first.replace("compiled None", "hit")
    # The programs, and the manifests that lead to them, are now on this machine.
    third = python(MACHINE, "redis://127.0.0.1:1", tmp_path / "second", tmp_path / "there")
    assert third == second


def test_another_header_is_another_program_and_a_comment_is_none(redis_url, python, tmp_path):
    here, there = project(tmp_path / "here"), project(tmp_path / "there", value=2)
    python(MACHINE, redis_url, tmp_path / "first", here)
    second = python(MACHINE, redis_url, tmp_path / "second", there)
    assert [line.split()[0] for line in second.splitlines()] == ["hit", "compiled", "compiled"]
    # The manifests now have both sets.
    commented = MACHINE.replace("*a = 1;", "/* one */ *a = 1;").replace("*a = VALUE", "*a  =  VALUE")
    third = python(commented, redis_url, tmp_path / "third", here, there)
    assert [line.split()[0] for line in third.splitlines()] == ["hit"] * 6


LIBRARY = """
format = 1
[kernels.set]
template = "set.cu.j2"
entry_points = ["set"]
"""


def test_a_prewarm_looks_once_at_each_header_set_and_what_its_callers_compile_does_so_again(
    redis_url, tmp_path, monkeypatch
):
    library, made = project(tmp_path / "library"), project(tmp_path / "headers")
    (library / "manifest.toml").write_text(LIBRARY)
    (library / "set.cu.j2").write_text('#include "value.h"\nextern "C" __global__ void set(int *a) { *a = VALUE; }\n')
    archs = ["sm_80", "sm_90"]

    def machine(name):
        return CompileService(tmp_path / name, library=library, include_path=[made], tiers=[redis_url])

    def edit(item, done, total):
        if done == 1:
            (made / "value.h").write_text("#define VALUE 2\n")
        after.append(second.kernel("set", arch=item.arch))

    first, second, third = map(machine, ("first", "second", "third"))
    before, after = first.prewarm(archs=archs), []
    first.cache.close()  # its programs are in the tier now
    assert (before.compiled, second.prewarm(archs=archs, on_progress=edit).hits) == (2, 2)
    assert [program.hit for program in after] == [False, False], "a program from before the edit was served after it"
    assert [item.digest for item in second.prewarm(archs=archs).items] == [program.digest for program in after]
    second.cache.close()
    (made / "value.h").write_text("#define VALUE 1\n")
    asked, holds = [], headers.holds
    monkeypatch.setattr(headers, "holds", lambda *given: asked.append(given) or holds(*given))
    assert [item.digest for item in third.prewarm(archs=archs).items] == [item.digest for item in before.items]
    assert len(asked) == 2, "the manifests have two sets each, which are the same for both architectures"
    third.cache.close()

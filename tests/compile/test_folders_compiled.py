# SPDX-License-Identifier: Apache-2.0
"""A folder that becomes another one while a program is compiled: what was compiled isn't kept."""

from __future__ import annotations

import os

import pytest

from cuda_progcache.compile import miss

KERNEL = 'extern "C" __global__ void k(int *a) { *a = VALUE; }\n'


@pytest.fixture
def while_compiling(monkeypatch):
    """Do something once, when the compiler has read what it reads and nothing was looked at again."""

    def plan(action):
        original = miss._run

        def run(*arguments):
            output = original(*arguments)
            monkeypatch.setattr(miss, "_run", original)
            action()
            return output

        monkeypatch.setattr(miss, "_run", run)

    return plan


def swap(one, other):
    os.rename(one, f"{one}.old")
    os.rename(other, one)


def relink(link, target):
    os.symlink(target, f"{link}.new")
    os.rename(f"{link}.new", link)


CHANGES = {
    "the include directory": ("inc", "", lambda: swap("inc", "new")),
    "a link to it": ("current", "", lambda: relink("current", "new")),
    "a link on the way": ("way/inc", "", lambda: relink("way", "newer")),
    "a link that a link leads to": ("start", "", lambda: relink("current", "new")),
    "a folder above": ("top/inc", "", lambda: swap("top", "newer")),
    "a folder in it": ("inc", "sub/", lambda: swap("inc/sub", "new")),
    "a folder deeper in it": ("inc", "sub/deep/", lambda: swap("inc/sub", "newest")),
    "a link in it": ("inc", "linked/", lambda: relink("inc/linked", "../new")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("policy", ["absolute", "relative"])
def test_it_is_not_kept(compiled, project, while_compiling, change, policy):
    include, below, action = CHANGES[change]
    for folder in ("inc", "inc/sub", "inc/sub/deep", "top/inc"):
        project(f"{folder}/value.h", "#define VALUE 1")
    for folder in ("new", "newer/inc", "newest/deep"):
        project(f"{folder}/value.h", "#define VALUE 2")
    for link, target in (("current", "inc"), ("start", "current"), ("way", "top"), ("inc/linked", "sub")):
        os.symlink(target, project.folder / link)
    source = f"#include <{below}value.h>\n" + KERNEL
    options = {"include_path": str(project.folder / include) if policy == "absolute" else include}
    while_compiling(action)
    first = compiled(source, **options)
    assert first.reason is not None
    assert "changed while" in first.reason
    fresh = compiled(source, store=None, **options)
    assert fresh.data != first.data
    for hit in (False, True):
        again = compiled(source, **options)
        assert (again.hit, again.data) == (hit, fresh.data)


@pytest.mark.parametrize("where", ["value.h", "inc/value.h"])
def test_a_folder_beside_the_source(compiled, project, while_compiling, where):
    for folder in ("src", "src/inc"):
        project(f"{folder}/value.h", "#define VALUE 1")
        project(f"new/{folder[4:]}/value.h", "#define VALUE 2")
    while_compiling(lambda: swap("src", "new"))
    done = compiled(f'#include "{where}"\n' + KERNEL, name="src/k.cu")
    assert done.reason is not None
    assert not compiled(f'#include "{where}"\n' + KERNEL, name="src/k.cu").hit


def test_other_files_may_come_and_go(compiled, project, while_compiling):
    """In the working directory and in an include directory, where other programs write their output."""
    project("inc/value.h", "#define VALUE 1")

    def write():
        project("output.txt", "", old=False)
        project("inc/output.txt", "", old=False)

    while_compiling(write)
    options = {"include_path": ["inc", "."]}
    assert compiled("#include <value.h>\n" + KERNEL, **options).reason is None
    assert compiled("#include <value.h>\n" + KERNEL, **options).hit


def test_links_in_a_circle_are_no_trouble(compiled, project):
    project("inc/value.h", "#define VALUE 1")
    os.symlink("loop", project.folder / "loop")
    assert compiled("#include <value.h>\n" + KERNEL, include_path=["loop", "missing/a", "inc"]).reason is None

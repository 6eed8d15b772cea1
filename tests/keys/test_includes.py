# SPDX-License-Identifier: Apache-2.0
"""Learning headers from a time trace, and what texts test for. The include trace: test_headers.py."""

from __future__ import annotations

import json
import os
import time

import pytest

from cuda_progcache.keys.headers import SearchPath, holds
from cuda_progcache.keys.includes import UNKNOWN, header_set, parse_time_trace

FAR = 1 << 63


@pytest.fixture
def tree(tmp_path):
    """Two include directories and a source folder: ``tree("one/a.h", text)`` writes a file."""

    def write(name, text=""):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    for folder in ("one", "two", "src"):
        (tmp_path / folder).mkdir()
    write.root = tmp_path
    write.search = SearchPath.of([str(tmp_path / "one"), str(tmp_path / "two")], "k.cu", str(tmp_path / "src"))
    return write


def names(found):
    return [h.place for h in found.headers]


def event(path, start, name="Processing Header File"):
    return {"name": name, "ph": "X", "ts": start, "dur": 1, "args": {"detail": path}}


def test_time_trace():
    # As NVRTC 13.5 writes it: each event when it ends, so the inner one first; two that began in one microsecond.
    events = [{}, event("__nv_nvrtc_builtin_header.h", 10), event("b.h", 30), event("a.h", 30), event("c.h", 40)]
    events.append(event("k(int *)", 50, name="Scanning Function Body"))
    assert parse_time_trace(json.dumps({"traceEvents": events})) == [(UNKNOWN, p) for p in ("a.h", "b.h", "c.h")]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "{}", '{"traceEvents": 3}', '{"traceEvents": []}', '{"traceEvents": [3]}',
     json.dumps({"traceEvents": [event("a.h", 1)]}),
     json.dumps({"traceEvents": [{"name": "Processing Header File"}]})],
)  # fmt: skip
def test_what_is_no_time_trace_is_not_taken_for_one(text):
    assert parse_time_trace(text) is None


def test_without_depths_any_folder_may_hold_the_includer(tree):
    outer, inner = tree("two/sub/outer.h", '#include "a.h"'), tree("two/a.h")
    found = header_set([(UNKNOWN, outer), (UNKNOWN, inner)], b"", tree.search, FAR)
    assert holds(found, tree.search)
    tree("two/sub/a.h")
    assert not holds(found, tree.search)


def test_each_file_that_includes_a_header_counts(tree):
    """A trace says the same thing often; what differs is the folder of the file that includes."""
    outer, inner = tree("one/sub/outer.h"), tree("two/inner.h")
    other = tree("one/more/other.h")
    trace = [(0, outer), (1, inner), (1, inner), (0, other), (1, inner), (0, inner), (0, outer), (1, inner)]
    for shadow in ("one/sub/inner.h", "one/more/inner.h", "src/inner.h", "one/inner.h"):
        found = header_set(trace, b"", tree.search, FAR)
        assert names(found) == [("I", 0, "sub/outer.h"), ("I", 1, "inner.h"), ("I", 0, "more/other.h")]
        assert holds(found, tree.search)
        path = tree(shadow)
        assert not holds(found, tree.search), shadow
        os.unlink(path)


# What the texts of a compile test for


def read(tree, code, **texts):
    """The set of a source that includes these headers of the first directory, in this order."""
    paths = [tree(f"one/{name}.h", text) for name, text in texts.items()]
    return header_set([(0, path) for path in paths], code, tree.search, FAR)


PROBES = {
    "plain": ("#if __has_include(<opt.h>)\n#endif", {}),
    "quoted": ('#if __has_include("opt.h")\n#endif', {}),
    "a comment over lines": ("#if /* a\n b */ __has_include(<opt.h>)\n#endif", {}),
    "a comment within": ("#if __has_include/* a\n b */(<opt.h>)\n#endif", {}),
    "spliced": ("#if __has_\\\ninclude(<opt.h>)\n#endif", {}),
    "digraph": ("%:if __has_include(<opt.h>)\n%:endif", {}),
    "macro": ("#if HAS(<opt.h>)\n#endif", {"a": "#define HAS(x) __has_include(x)"}),
    "macro of a macro": ("#if B(<opt.h>)\n#endif", {"a": "#define B(x) A(x)", "b": "#define A(x) __has_include(x)"}),
    "constant": ("#if B\n#endif", {"a": "#define B __has_include(<opt.h>)"}),
    "in another header": ("", {"a": "#define HAS(x) __has_include(x)", "b": "#if 1 && HAS(<opt.h>)\n#endif"}),
    "older CCCL": ("#if HAS(<opt.h>)\n#endif", {"a": "#define __has_include(...) 0\n#define HAS(X) __has_include(X)"}),
}


@pytest.mark.parametrize("probe", PROBES)
def test_a_header_that_is_tested_for_may_come(tree, probe):
    code, texts = PROBES[probe]
    found = read(tree, code.encode(), **texts)
    assert found.uncacheable is None
    assert holds(found, tree.search)
    assert any("opt.h" in asked and asked.endswith("missing") for asked in found.probes)
    tree("two/opt.h")
    assert not holds(found, tree.search)


@pytest.mark.parametrize(
    "text",
    [
        "#define HAS(x) __has_include(x)",
        "#if 0\n#if __has_include(X)\n#endif\n#endif",
        "// __has_include(X)",
        "#if 1 // __has_include(X)\n#endif",
        '#define TEXT "__has_include(X)"',
        'const char *s = R"(\n#if __has_include(X)\n)";',
        "#ifdef __has_include\n#endif\n#if defined(__has_include)\n#endif",
        "#define __has_include(...) 0",
    ],
)
def test_what_tests_for_nothing_costs_nothing(tree, text):
    found = read(tree, text.encode(), a=text)
    assert found.uncacheable is None
    assert found.probes == ()


@pytest.mark.parametrize(
    "text",
    [
        "#if __has_include(X)\n#endif",
        "#define HAS(x) __has_include(x)\n#if HAS(X)\n#endif",
        "#define HAS(x) __has_include(x)\n#define USE(f) f(<a.h>)\n#if USE(HAS)\n#endif",
        "#define CAT(a, b) a##b\n#if CAT(__has_, include)(<opt.h>)\n#endif",
        "#define CAT(a, b) a##b\nconst char *s = CAT(__TI, ME__);",
        "const char *s = __TIME__;",
    ],
)
def test_what_a_text_does_not_tell_is_said(tree, text):
    assert read(tree, b"", a=text).uncacheable


def test_macros_that_options_define_count(tree):
    found = header_set([], b"#if HAS(<opt.h>)\n#endif", tree.search, FAR, None, ["HAS(x)=__has_include(x)"])
    assert len(found.probes) == 1


def test_one_file_by_two_names_is_not_two_files(tree):
    """#pragma once passes over the second one, while it is a link."""
    first = tree("one/a.h", "#pragma once")
    os.symlink(first, tree.root / "one" / "b.h")
    linked = header_set([(0, first), (0, str(tree.root / "one" / "b.h"))], b"", tree.search, FAR)
    assert holds(linked, tree.search)
    os.unlink(tree.root / "one" / "b.h")
    tree("one/b.h", "#pragma once")
    assert not holds(linked, tree.search)
    copied = header_set([(0, first), (0, str(tree.root / "one" / "b.h"))], b"", tree.search, FAR)
    assert copied.identity != linked.identity


def test_a_header_that_came_while_it_was_compiled(tree):
    """It would have won over the one that was read, had it been there."""
    found = header_set([(0, tree("two/a.h"))], b"", tree.search, time.time_ns() + 10**9)
    assert found.uncacheable is None
    path = tree("two/a.h")
    os.utime(path, (1, 1))
    before = time.time_ns()
    while os.stat(tree("one/a.h")).st_ctime_ns < before:  # the file system's clock may lag by a tick, which is some ms
        os.unlink(tree.root / "one/a.h")
    assert header_set([(0, path)], b"", tree.search, before).uncacheable


def test_bundled_headers_are_a_directory_of_their_own(tree):
    search = SearchPath.of([str(tree.root / "one")], "k.cu", str(tree.root / "src"), str(tree.root / "bundled"))
    path = tree("bundled/a.h")
    for found in (header_set([(0, path)], b"", search, 0),):
        assert names(found) == [("B", 0, "a.h")]
        assert found.uncacheable is None, "NVRTC may have written it just now"
        assert holds(found, search)
        shadow = tree("one/a.h")
        assert not holds(found, search)
        os.unlink(shadow)

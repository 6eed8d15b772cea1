# SPDX-License-Identifier: Apache-2.0
"""Learning headers from a time trace and from the text. The include trace: test_headers.py."""

from __future__ import annotations

import json
import os

import pytest

from cuda_progcache.keys.headers import SearchPath, holds
from cuda_progcache.keys.includes import UNKNOWN, header_set, included_names, parse_time_trace, probed_names, scan

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


def scanned(tree, code, pre_includes=()):
    return scan(code, pre_includes, tree.search, FAR)


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


def test_the_text_is_followed(tree):
    tree("one/a.h", '#include "sub/b.h"\n')
    tree("one/sub/b.h", "#include <c.h>\n")
    tree("two/c.h")
    found = scanned(tree, b"#include <a.h>\n")
    assert names(found) == [("I", 0, "a.h"), ("I", 0, "sub/b.h"), ("I", 1, "c.h")]
    assert holds(found, tree.search)
    tree("one/c.h")
    assert not holds(found, tree.search), "shadowed"


@pytest.mark.parametrize(
    "line",
    [
        b"#include <a.h>", b"  #  include<a.h>", b"#/* a */include/**/ <a.h>", b"%:include <a.h>", b"??=include <a.h>",
        b"#inc\\\nlude <a.h>", b"#inc??/\nlude <a.h>", b'#inc\\\r\nlude "a.h"', b"#include \\\n<a.h>",
        b"#if 0\n#include <a.h>\n#endif", b"/*\n#include <a.h>\n*/", b"#include_next <a.h>",
        b"int x; /* */ #include <a.h>",
    ],
)  # fmt: skip
def test_every_way_to_write_an_include(tree, line):
    tree("one/a.h")
    assert names(scanned(tree, b"int x;\n" + line + b"\nint y;\n")) == [("I", 0, "a.h")]
    assert included_names(line) == {"a.h"}


@pytest.mark.parametrize("line", [b"#define include <a.h>", b"// includes <a.h>", b"#pragma include_me", b'"<a.h>"'])
def test_what_is_no_include(tree, line):
    tree("one/a.h")
    assert names(scanned(tree, line)) == []


def test_comments_in_a_row_do_not_take_for_ever():
    """Where each of them could be parted from the next in two ways, this would not end."""
    assert included_names(b"#" + b"/* */" * 5000 + b"included\n" + b"#/*" * 5000) == set()


def test_every_directory_that_has_the_name_counts(tree):
    for place in ("one/a.h", "two/a.h", "src/a.h"):
        tree(place)
    assert names(scanned(tree, b"#include <a.h>")) == [("I", 0, "a.h"), ("I", 1, "a.h")]
    assert names(scanned(tree, b'#include "a.h"')) == [("S", 0, "a.h"), ("I", 0, "a.h"), ("I", 1, "a.h")]


def test_pre_includes(tree):
    tree("src/p.h", "#include <a.h>")
    tree("one/a.h")
    assert names(scanned(tree, b"", ["p.h"])) == [("S", 0, "p.h"), ("I", 0, "a.h")]


def test_headers_that_include_each_other_and_themselves(tree):
    tree("one/sub/a.h", '#include "../sub/a.h"\n#include "b.h"')
    tree("one/sub/b.h", '#include "link/a.h"')
    os.symlink(".", tree.root / "one/sub/link")
    found = scanned(tree, b"#include <sub/a.h>")
    assert [name for _, _, name in names(found)] == ["sub/a.h", "sub/b.h"]


def test_absolute_names(tree):
    path = tree("elsewhere/a.h")
    found = scanned(tree, f'#include "{path}"\n#include "/no/such/file.h"'.encode())
    assert names(found) == [("A", 0, path)]
    assert ("A", 0, "/no/such/file.h") in found.absent


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (b"#include HEADER\n", "the source includes HEADER: a macro decides"),
        (b"#include STR(a.h)", "the source includes STR(a.h): a macro decides"),
        (b"#include <a.h>", "a.h includes OTHER: a macro decides"),
        (b"#include <time.h>", "header time.h uses __TIME__"),
        (b"#if __has_include(X)", "the source tests __has_include(X): a macro decides"),
    ],
)
def test_what_the_text_does_not_tell(tree, code, reason):
    tree("one/a.h", "#include OTHER\n")
    tree("one/time.h", "__TIME__")
    assert scanned(tree, code).uncacheable == reason


def test_names_asked_for():
    code = b'#if __has_include(<a.h>) || __has_include("b.h") || __has_include_next( <c.h> ) || __has_include(M)'
    assert probed_names(code) == {("a.h", False), ("b.h", True), ("c.h", False)}


def test_bundled_headers_are_a_directory_of_their_own(tree):
    search = SearchPath.of([str(tree.root / "one")], "k.cu", str(tree.root / "src"), str(tree.root / "bundled"))
    path = tree("bundled/a.h")
    for found in (scan(b"#include <a.h>", (), search, FAR), header_set([(0, path)], b"", search, 0)):
        assert names(found) == [("B", 0, "a.h")]
        assert found.uncacheable is None, "NVRTC may have written it just now"
        assert holds(found, search)
        shadow = tree("one/a.h")
        assert not holds(found, search)
        os.unlink(shadow)

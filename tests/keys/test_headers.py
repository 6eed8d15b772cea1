# SPDX-License-Identifier: Apache-2.0
"""Traces, header sets and manifests, on files alone. With a real compiler: tests/compile/test_headers_compiled.py."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from cuda_progcache.errors import OptionError
from cuda_progcache.keys import headers
from cuda_progcache.keys.headers import Header, HeaderManifest, HeaderPolicy, HeaderSet, SearchPath, holds, looking_once
from cuda_progcache.keys.include_text import FOLDED, NO_PATH, PRINTED
from cuda_progcache.keys.includes import header_set, parse_trace

LONG_AGO = 1_000_000_000


@pytest.fixture
def tree(tmp_path):
    """Two include directories and a source folder, with old files."""

    def write(name, text="", age=LONG_AGO):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if age is not None:
            os.utime(path, (age, age))
        return str(path)

    for folder in ("one", "two", "src"):
        (tmp_path / folder).mkdir()
    write.root = tmp_path
    write.search = SearchPath.of([str(tmp_path / "one"), str(tmp_path / "two")], "k.cu", str(tmp_path / "src"))
    return write


@pytest.fixture
def clock(monkeypatch):
    """``clock(time_ns=, monotonic=)``: what the module under test is told of the time."""

    def turn(**told):
        given = {"time_ns": time.time_ns, "monotonic": time.monotonic} | told
        monkeypatch.setattr(headers, "time", SimpleNamespace(**given))

    return turn


def read_set(tree, opened, code=b"", search=None):
    trace = [(depth, str(tree.root / path)) for depth, path in opened]
    return header_set(trace, code, search or tree.search, time.time_ns() + 10**9)


def test_parse_trace():
    text = "__nv_nvrtc_builtin_header.h\nhdr.h\n sub/h2.h\n/abs/with space.h\n__nv_name_map\n"
    assert parse_trace(text) == [(0, "hdr.h"), (1, "sub/h2.h"), (0, "/abs/with space.h")]
    assert parse_trace("__nv_nvrtc_builtin_header.h\n") == []


@pytest.mark.parametrize("text", ["", "hdr.h\n", "k.cu(1): error: no\n"])
def test_what_is_no_trace_is_not_taken_for_one(text):
    assert parse_trace(text) is None


def test_places_are_relative_to_where_a_file_was_found(tree):
    tree("two/sub/a.h", "a")
    tree("src/b.h", "b")
    found = read_set(tree, [(0, "two/sub/a.h"), (0, "src/b.h")])
    assert [h.place for h in found.headers] == [("I", 1, "sub/a.h"), ("S", 0, "b.h")]
    assert [h.name for h in found.headers] == ["sub/a.h", "b.h"]
    assert found.uncacheable is None
    assert HeaderSet.from_json(found.to_json()) == found


def test_a_set_holds_in_another_place(tree, tmp_path):
    tree("two/a.h", "a")
    found = read_set(tree, [(0, "two/a.h")])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.h").write_text("a")
    moved = SearchPath.of([str(tmp_path / "none"), str(tmp_path / "elsewhere")], "k.cu", str(tmp_path))
    assert holds(found, tree.search)
    assert holds(found, moved)
    (tmp_path / "none").mkdir()
    (tmp_path / "none/a.h").write_text("shadow")
    assert not holds(found, moved)


def test_an_edit_is_seen(tree):
    tree("one/a.h", "a")
    found = read_set(tree, [(0, "one/a.h")])
    assert holds(found, tree.search)
    tree("one/a.h", "b")
    assert not holds(found, tree.search)
    tree("one/a.h", "a", age=LONG_AGO + 7)
    assert holds(found, tree.search), "touched, but equal"
    os.unlink(tree.root / "one/a.h")
    assert not holds(found, tree.search)


def test_an_edit_within_one_tick_of_the_clock_is_seen(tree):
    """Same size, same inode, same time stamps: only a file left alone for longer than a tick is remembered by stat."""
    path = tree("one/a.h", "a", age=None)
    found = read_set(tree, [(0, "one/a.h")])
    stamps = os.stat(path)
    with open(path, "r+") as file:  # keeps the inode
        file.write("b")
    os.utime(path, ns=(stamps.st_atime_ns, stamps.st_mtime_ns))
    assert not holds(found, tree.search)


def test_content_is_not_read_again_while_the_stat_stays(tree, monkeypatch, clock):
    path = tree("one/a.h", "a")
    old = time.time_ns() + 10 * headers._STAMP_RESOLUTION_NS
    clock(time_ns=lambda: old)  # ctime can't be set back: let the clock go on instead
    found = header_set([(0, path)], b"", tree.search, old)
    reads = []
    monkeypatch.setattr(headers, "read_file", reads.append)
    assert holds(found, tree.search)
    assert not reads


def test_a_header_modified_during_the_compile_is_not_trusted(tree):
    path = tree("one/a.h", "a", age=None)
    found = header_set([(0, path)], b"", tree.search, os.stat(path).st_mtime_ns)
    assert "modified while it was being compiled" in found.uncacheable


@pytest.mark.parametrize("shadow", ["one/sub/a.h", "two/sub/sub/a.h"])
def test_a_file_that_would_be_found_first_ends_the_set(tree, shadow):
    tree("two/sub/includer.h", '#include "sub/a.h"')
    tree("two/sub/a.h", "a")
    found = read_set(tree, [(0, "two/sub/includer.h"), (1, "two/sub/a.h")])
    assert holds(found, tree.search)
    tree(shadow, "other")
    assert not holds(found, tree.search)


def test_absent_paths_are_cut_to_the_first_missing_folder_below_their_directory(tree):
    tree("two/deep/er/a.h", "a")
    tree("two/deep/er/b.h", "b")
    found = read_set(tree, [(0, "two/deep/er/a.h"), (0, "two/deep/er/b.h")])
    assert set(found.absent) == {("S", 0, "deep"), ("C", 0, "deep"), ("I", 0, "deep")}


def test_has_include_is_part_of_the_set(tree):
    tree("one/there.h")
    code = b'#if __has_include(<there.h>) && !__has_include(<gone.h>) && !__has_include("quoted.h")\n'
    found = read_set(tree, [], code)
    assert holds(found, tree.search)
    path = tree("two/gone.h")
    assert not holds(found, tree.search)
    os.unlink(path)
    path = tree("src/quoted.h")
    assert not holds(found, tree.search)
    os.unlink(path)
    assert holds(found, tree.search)
    os.unlink(tree.root / "one/there.h")
    assert not holds(found, tree.search)


def test_has_include_in_a_header_looks_beside_it(tree):
    tree("two/sub/a.h", '#if __has_include("b.h")\n#endif')
    found = read_set(tree, [(0, "two/sub/a.h")])
    tree("two/sub/b.h")
    assert not holds(found, tree.search)


@pytest.mark.parametrize(
    "code",
    [
        b"#if __has_include(NAME)",
        b"#define HAS(x) __has_include(x)\n#if HAS(NAME)\n#endif",
        b"#define HAS __has_include\n#if HAS(NAME)\n#endif",
    ],
)
def test_has_include_behind_a_macro_is_not_cached(tree, code):
    assert "__has_include" in read_set(tree, [], code).uncacheable


@pytest.mark.parametrize(
    "code", [b"#ifdef __has_include\n#if __has_include (<a.h>)", b"#endif // __has_include(<a.h>)"]
)
def test_plain_uses_of_has_include_are_fine(tree, code):
    assert read_set(tree, [], code).uncacheable is None


@pytest.mark.parametrize("macro", ["__DATE__", "__TIME__", "__TIMESTAMP__"])
def test_a_header_with_the_time_in_it_is_not_cached(tree, macro):
    tree("one/a.h", f"const char *built = {macro};")
    assert macro in read_set(tree, [(0, "one/a.h")]).uncacheable


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", NO_PATH), ("assert(x);", PRINTED), ("char c = __FILE__[0];", FOLDED), ("// __FILE__", NO_PATH)],
)
def test_what_the_texts_say_of_paths(tree, text, expected):
    tree("one/a.h", text)
    tree("one/b.h", "assert")
    tree("one/c.h")
    assert read_set(tree, [(0, "one/a.h"), (0, "one/c.h")]).mentions_file == expected
    assert read_set(tree, [(0, "one/b.h"), (0, "one/a.h")]).mentions_file == max(expected, PRINTED)
    assert read_set(tree, [(0, "one/c.h")], text.encode()).mentions_file == expected, "the source's macros count"


def test_what_redefines_printing_makes_every_path_a_folded_one(tree):
    tree("one/a.h", 'inline void f() { printf("%s", __FILE__); }')
    tree("one/b.h", "#define printf(...) hash(__VA_ARGS__)")
    tree("one/c.h", "int x;")
    assert read_set(tree, [(0, "one/a.h"), (0, "one/c.h")]).mentions_file == PRINTED
    assert read_set(tree, [(0, "one/b.h"), (0, "one/a.h")]).mentions_file == FOLDED
    assert read_set(tree, [(0, "one/b.h"), (0, "one/c.h")]).mentions_file == NO_PATH


@pytest.mark.parametrize(
    ("path", "anchor"),
    [("cub/a.cuh", "cub/version.cuh"), ("cuda/std/a.h", "cuda/std/version"), ("nv/a.h", "nv/target"),
     ("thrust/a/b.h", "thrust/version.h"), ("cooperative_groups/a.h", "cooperative_groups.h"),
     ("crt/a.h", "crt/host_defines.h"), ("a.h", "cuda_runtime.h")],
)  # fmt: skip
def test_the_vendors_headers_only_print_paths(tree, path, anchor):
    tree(f"two/{path}", "#define F() __FILE__\n#define printf(...) mine(__VA_ARGS__)")
    assert read_set(tree, [(0, f"two/{path}")]).mentions_file == FOLDED, "a folder of this name may be the project's"
    tree(f"two/{anchor}")
    assert read_set(tree, [(0, f"two/{path}")]).mentions_file == PRINTED
    tree("one/mine.h", "assert(x);")
    assert read_set(tree, [(0, f"two/{path}"), (0, "one/mine.h")]).mentions_file == PRINTED
    tree("one/mine.h", "int n = F()[0]; char c = __FILE__[1];")
    assert read_set(tree, [(0, f"two/{path}"), (0, "one/mine.h")]).mentions_file == FOLDED


@pytest.mark.parametrize(
    ("path", "vendors"),
    [("cuda/std/detail/../a.h", True), ("cuda/../cuda/std/a.h", True), ("cuda/../a.h", False),
     ("cuda/std/../../mine/a.h", False)],
)  # fmt: skip
def test_the_vendors_headers_by_a_path_that_goes_up_and_down(tree, path, vendors):
    """libcu++ up to 12.4 includes its own headers so."""
    for folder in ("cuda/std/detail/a.h", "cuda/std/version", "mine/a.h"):
        tree(f"two/{folder}")
    tree(f"two/{path}", "#define F() __FILE__")
    assert read_set(tree, [(0, f"two/{path}")]).mentions_file == (PRINTED if vendors else FOLDED)


def test_a_header_that_is_gone_after_the_compile_is_not_trusted(tree):
    assert "can't be read" in read_set(tree, [(0, "one/gone.h")]).uncacheable


def test_manifest_keeps_several_sets_and_finds_the_one_that_holds(tree, tmp_path):
    file = tmp_path / "manifest"
    sets = []
    for text in ("a", "b", "c"):
        tree("one/a.h", text)
        sets.append(read_set(tree, [(0, "one/a.h")]))
        manifest = HeaderManifest.read(str(file))
        file.write_bytes(manifest.add(sets[-1]))
    for text, expected in zip("abc", sets, strict=True):
        tree("one/a.h", text)
        assert HeaderManifest.read(str(file)).match(tree.search) == expected
    tree("one/a.h", "d")
    assert HeaderManifest.read(str(file)).match(tree.search) is None


def test_a_look_sees_no_edit_and_the_next_one_does(tree):
    tree("one/a.h", "a")
    found = read_set(tree, [(0, "one/a.h")])
    look = looking_once()
    assert look(found, tree.search)
    tree("one/a.h", "b")
    assert look(found, tree.search)
    assert not looking_once()(found, tree.search)


def test_what_a_look_saw_earlier_is_not_taken_for_seen_just_now(tree):
    tree("one/a.h", "a")
    found, look = read_set(tree, [(0, "one/a.h")]), looking_once()
    manifest = HeaderManifest(None, [found])
    assert look(found, tree.search)
    tree("one/a.h", "b")
    assert manifest.match(tree.search, look=look) is found
    assert manifest.match(tree.search, recheck_after=3600) is None


#: What the second set has otherwise than the first, and whether that is another question.
SETS = [
    ({"headers": (Header(("I", 0, "a.h"), "1" * 64),)}, True),
    ({"absent": (("I", 0, "b.h"),)}, True),
    ({"perhaps": ((("I", 1, "a.h"), 0),)}, True),
    ({"present": (("I", 0, "a.h"),)}, True),
    ({"links": ((0, 0),)}, True),
    ({"paths": (("I", 1),)}, True),
    ({"linked_paths": (("I", 1),)}, True),
    ({"probes": ("<a.h> in k.cu: there",)}, False),
    ({"stamps": (None,), "entry": "1" * 64, "source": "s", "plain": ("1" * 64,), "stands_for": "1" * 64}, False),
]


@pytest.mark.parametrize(("differs", "asks"), SETS)
def test_a_look_asks_once_for_equal_files_and_again_for_others(tree, monkeypatch, differs, asks):
    asked = []
    monkeypatch.setattr(headers, "holds", lambda *given: asked.append(given) or len(asked) == 2)
    one = HeaderSet(headers=(Header(("I", 0, "a.h"), "0" * 64),))
    look = looking_once()
    assert [look(one, tree.search), look(HeaderSet.from_json(one.to_json()), tree.search)] == [False, False]
    assert look(headers.replace(one, **differs), tree.search) is asks
    assert len(asked) == 1 + asks
    look(one, SearchPath.of(["one"], "k.cu", str(tree.root)))
    assert len(asked) == 2 + asks


@pytest.fixture
def kept(tree, tmp_path, monkeypatch, clock):
    """A manifest of two headers, written long after they were; a new process matches it, and tells what it reads."""
    tree("one/a.h", "a")
    tree("two/b.h", "b")
    clock(time_ns=lambda: time.time_ns() + 10 * headers._STAMP_RESOLUTION_NS)
    file = tmp_path / "manifest"
    file.write_bytes(HeaderManifest(None).add(read_set(tree, [(0, "one/a.h"), (0, "two/b.h")])))

    def new_process():
        headers._digests.clear()
        read = []
        real = headers.read_file
        manifest = HeaderManifest.read(str(file))
        with monkeypatch.context() as patched:
            patched.setattr(headers, "read_file", lambda path: (read.append(os.path.basename(path)), real(path))[1])
            return manifest.match(tree.search) is not None, read

    new_process.file = file
    return new_process


def test_a_new_process_looks_at_headers_and_reads_none(kept):
    assert kept() == (True, [])
    assert kept() == (True, [])


def test_a_new_process_reads_what_another_status_has(tree, kept):
    path = tree.root / "one/a.h"
    before = path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:  # a tick of the file system's clock is some ms
        path.write_text("A")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and mtime are those of before
    assert kept() == (False, ["a.h"])
    other = tree.root / "one/other"
    other.write_text("a")
    os.replace(other, path)
    assert kept() == (True, ["a.h"])
    path.unlink()
    assert not kept()[0]


def test_the_status_of_a_young_header_is_not_kept(tree, tmp_path, clock):
    written = os.stat(tree("one/a.h", "a")).st_ctime_ns
    clock(time_ns=lambda: written + headers._STAMP_RESOLUTION_NS)
    found = read_set(tree, [(0, "one/a.h")])
    assert found.stamps == (None,)
    file = tmp_path / "manifest"
    file.write_bytes(HeaderManifest(None).add(found))
    assert HeaderManifest.read(str(file)).match(tree.search) == found


@pytest.mark.parametrize("stamps", [None, [], [None, None], [[1, 2, 3, 4, 5]], [["x"] * 5] * 2, [[1, 2]], 7])
def test_manifests_without_statuses_or_with_others(kept, stamps):
    content = json.loads(kept.file.read_text())
    content["sets"][0]["stamps"] = stamps
    if stamps is None:
        del content["sets"][0]["stamps"]  # of a version before
    kept.file.write_text(json.dumps(content))
    found, read = kept()
    assert (found, read) in [(True, ["a.h", "b.h"]), (False, [])]
    assert found or stamps in ([[1, 2]], 7), "only what is no status at all makes it a damaged manifest"


def test_a_manifest_doesnt_grow_for_ever(tree):
    manifest = HeaderManifest(None)
    for n in range(3 * headers.MAX_SETS):
        tree("one/a.h", str(n))
        manifest.add(read_set(tree, [(0, "one/a.h")]))
    assert len(manifest.sets) == headers.MAX_SETS
    assert manifest.match(tree.search) is manifest.sets[0]


def test_a_match_is_looked_at_again_after_the_interval_only(tree, clock):
    now = [100.0]
    clock(monotonic=lambda: now[0])
    tree("one/a.h", "a")
    found = read_set(tree, [(0, "one/a.h")])
    manifest = HeaderManifest(None, [found])
    assert manifest.match(tree.search, 10.0) is found
    tree("one/a.h", "b")
    now[0] += 9.9
    assert manifest.match(tree.search, 10.0) is found
    elsewhere = SearchPath.of([str(tree.root / "two")], "k.cu", str(tree.root / "src"))
    assert manifest.match(elsewhere, 10.0) is None, "another place was not looked at"
    assert manifest.match(tree.search, 10.0) is None
    tree("one/a.h", "a")
    assert manifest.match(tree.search, 10.0) is found
    tree("one/a.h", "b")
    now[0] += 0.1
    assert manifest.match(tree.search) is None, "off by default"
    tree("one/a.h", "a")
    assert manifest.match(tree.search, 10.0) is found
    tree("one/a.h", "b")
    now[0] += 10.0
    assert manifest.match(tree.search, 10.0) is None


@pytest.mark.parametrize("seconds", [-1.0, float("nan")])
def test_an_interval_that_makes_no_sense(seconds):
    with pytest.raises(OptionError, match="recheck_after"):
        HeaderPolicy(recheck_after=seconds)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format":99,"sets":[]}', b'{"format":1,"sets":[{}]}', b"\xff"]
)
def test_a_damaged_manifest_is_an_empty_one(tmp_path, content):
    file = tmp_path / "manifest"
    file.write_bytes(content)
    assert HeaderManifest.read(str(file)).sets == []
    assert HeaderManifest.read(str(tmp_path / "none")).sets == []

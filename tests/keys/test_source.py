# SPDX-License-Identifier: Apache-2.0
"""What a source's text alone says."""

from __future__ import annotations

import pytest

from cuda_progcache.keys import source
from cuda_progcache.keys.source import Source, may_include, read_source, time_macro


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (b"int x;", False),
        (b"# include <x>", True),
        (b"#inc\\\nlude <x>", True),
        (b"#inc\\\r\nlude <x>", True),
        (b"#define X 1\n#pragma once\nint include;", False),
        (b"#define X \\\n 1", True),
        (b"%:include <x>", True),
        (b"a % b; %:  include <x>", True),
        (b"# /* */ include <x>", True),
        (b"int a;\n#", False),
        (b"??=include <x>", True),
        (b"a ? b : c", False),
        (b"#if __has_include(<x>)", True),
        (b"%\\\n:include <x>", True),
        (b"#inc??/\nlude <x>", True),
        (b"a % b; c %d", False),
    ],
)
def test_may_include(code, expected):
    assert may_include(code) is expected


@pytest.mark.parametrize("macro", ["__DATE__", "__TIME__", "__TIMESTAMP__"])
def test_time_macros(macro):
    assert time_macro(f"int x; // {macro}".encode()) == macro
    assert time_macro(b"MD __TIMER__ __DATED") is None


@pytest.mark.parametrize("padding", [0, source._LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", [str, str.encode], ids=["text", "bytes"])
@pytest.mark.parametrize("cut", ["\\\n", "\\ \n", "\\\r\n", "??/\n"])
def test_time_macros_cut_in_two_by_a_continued_line(cut, kind, padding):
    text = f"auto x = __TI{cut}ME__;" + " " * padding
    assert Source(kind(text)).time_macro == "__TIME__"
    assert Source(kind(text.replace("ME__", "ME_R__"))).time_macro is None


def test_small_texts_are_remembered_by_content_and_large_ones_by_identity():
    small = "int a;" * 10
    assert read_source(small) is read_source("".join(["int a;"] * 10))
    large = "int a;" * source._LARGE
    known = read_source(large)
    assert read_source(large) is known
    other = "".join([large, ""][:1]) + "x"
    assert read_source(other).identity != known.identity
    assert read_source(large[:-1] + ";").identity == known.identity == Source(large).identity


def test_not_all_large_texts_are_kept():
    texts = ["x" * (source._LARGE + n) for n in range(3 * source._MAX_LARGE)]
    assert [len(read_source(text).code) for text in texts] == [len(text) for text in texts]
    assert len(source._large) <= source._MAX_LARGE


def test_text_and_bytes_are_told_apart():
    assert read_source("abc").text == "abc"
    assert read_source(b"abc").text == b"abc"

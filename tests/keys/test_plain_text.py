# SPDX-License-Identifier: Apache-2.0
"""Normal forms of texts. That equal forms compile to equal output: tests/compile/test_plain_text_compiled.py."""

from __future__ import annotations

import os
import re
from hashlib import sha256

import pytest

from cuda_progcache.keys import plain_text
from cuda_progcache.keys.plain_text import normalized, plain_digest
from cuda_progcache.keys.toolchain import header_root

ALIKE = [
    [b"a b", b" a  b ", b"\ta\tb\t", b"a/**/b", b"a /* x */ b", b"/* x */a b// y", b"a /*x*//*y*/ /***/ b // it's",
     b"a b//"],
    [b"a\nb", b"a // x\nb", b"a /* x */\n  b", b"a\n/* x */ b  ", b"/**/a\t\n\tb"],
    [b"a\n\nb", b"a\n// x\nb", b"a\n/* x */\nb", b"a\n    \nb"],
    [b"#define F(x) x", b"  #define  F(x)\tx /* y */", b"/**/#define F(x) x//"],
    [b"#define F(a) \\\n  a", b"#define  F(a)\t\\\n a", b"#define F(a) /* x */ \\\n\ta // y"],
    [b"a/* x\n y */b", b"a/*\n*/b", b"a/* /x\n**/b"],
    [b'"a  b" c', b'"a  b"   c', b' "a  b"/**/c'],
    [b'R"(a  b\n // c\n)" c', b'R"(a  b\n // c\n)"  c // d'],
    [b"1'0 a", b"1'0 /* ' */ a", b"1'0  a // '"],
    [b"'\"' '/*' a", b"'\"' '/*' /* */ a"],
    [b"a\r\nb\r\n", b"a // x\r\nb \r\n"],
    ["é /* ü */".encode(), "é // ö".encode()],
]  # fmt: skip
UNLIKE = [
    b"ab", b"a b", b"a\nb", b"a\n\nb", b"a + b", b"a+b", b"a +b", b"#define F (x)", b"#define F(x)", b'"a b"',
    b'"a  b"', b'"a\tb"', b'R"(a b)"', b'R"(a  b)"', b'R"(a // b)"', b"'a'", b"'  '", b"' '", b"a\\\nb", b"a \\\nb",
    b"a\\\n b", b'"a\\\nb"', b'"a\\\n b"', b"a\r\nb", b"#include <a>", b"#include < a>", b'#include "a"', b"1'000",
    b"1000", b"a//\n", b'"//"', b'"//" b', b"'//'",
]  # fmt: skip
UNUSUAL = [
    b"a ??/\nb", b"??=define A", b'"??="', b"a \\ \nb", b"a // x \\\nb", b'a "b', b"a 'b", b"a /* b", b"/* a /* b */",
    b"a\0",
    b"a\fb", b"a\rb", b"a\r\nb\n", b"/\\\n* a */", b"/* a *\\\n/", b'R\\\n"(a)"', b"/*NOTREACHED*/", b"// FALLTHROUGH",
    b"\xff", b"// \xe2\x80\xae x", b"#include <a  b>", b"#include <a//b>", b"#if __has_include(<it's>)",
    b"#error don't", b'R"(a',
    b'"a\\\\\nb"',
]  # fmt: skip


@pytest.mark.parametrize("texts", ALIKE)
def test_what_no_output_can_tell_disappears(texts):
    assert len({normalized(text) for text in texts}) == 1
    assert normalized(texts[0]) is not None


def test_anything_else_is_kept():
    forms = [normalized(text) for text in (*UNLIKE, *(texts[0] for texts in ALIKE[3:]))]
    assert None not in forms
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize("text", UNUSUAL)
def test_unusual_texts_are_left_alone(text):
    assert normalized(text) is None
    digest = sha256(text).hexdigest()
    assert plain_digest(digest, text) == digest


def test_lines_are_kept():
    text = b"a\n\n// b\n/* c\n\n*/ d \\\n e\n"
    form = normalized(text)
    assert sum(form.count(mark) for mark in (b"\n", b"\x01", b"\x06")) - 1 == text.count(b"\n")


def test_a_form_is_not_the_text_of_another():
    """Hashed as it is, the form of one text could be another text that has no form."""
    text = b"a/*\n*/b"
    other = normalized(text)
    assert plain_digest(sha256(text).hexdigest(), text) != plain_digest(sha256(other).hexdigest(), other)


def test_digests_are_remembered(monkeypatch):
    text = b"int once; // " + os.urandom(8).hex().encode()
    digest = sha256(text).hexdigest()
    first = plain_digest(digest, text)
    monkeypatch.setattr(plain_text, "normalized", None)
    assert plain_digest(digest, text) == first


def test_edits_of_comments_in_real_headers_are_recognized():
    """Each whole-line comment of CUDA's and CCCL's headers, reworded: the form stays but for one in a thousand."""
    edited = recognized = 0
    for root in (os.path.join(header_root("cccl"), "cub"), os.path.join(header_root("cuda"), "cooperative_groups")):
        for folder, _, names in os.walk(root):
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    text = file.read()
                other = re.sub(
                    rb"^[ \t]*//(?![^\n]*\\$)[^\n]*", b'  // Reworded: it\'s "other" words', text, flags=re.MULTILINE
                )
                other = re.sub(rb"^ \* [^*/\n]*$", b" *  Other words", other, flags=re.MULTILINE)
                edited += other != text
                recognized += other != text and normalized(text) is not None and normalized(other) == normalized(text)
    assert edited > 200
    assert recognized >= 0.999 * edited

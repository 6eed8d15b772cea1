# SPDX-License-Identifier: Apache-2.0
"""Texts with one normal form compile to the same output: random edits of comments and white space, compiled.

The edits are made anywhere in the text, within literals and directives too; those that change the normal form are
dropped, and the others must change no byte. ``PROGCACHE_EXAMPLES=2000 python -m pytest`` on this file for the long run.
"""

from __future__ import annotations

import os
import random
import re

import pytest

from cuda_progcache.compile import compilers
from cuda_progcache.compile.output import CompilerRefusal
from cuda_progcache.keys.plain_text import normalized
from cuda_progcache.keys.toolchain import header_root

ROUNDS = int(os.environ.get("PROGCACHE_EXAMPLES", "6"))

BITS = [
    b" ", b"  ", b"\t", b"\n", b"\\\n", b" \\\n ", b"/*", b"*/", b"//", b'"', b"'", b'R"(', b')"', b"x", b"#", b"*",
    b"/", b"\\", b"/**/", b"/* a */", b"// b", b"/* \n */", b"%:", b"??/", b"0", b"#include <x.h>\n", b"\r\n",
    b"\xc3\xa9", b"\xff", b"\0", b"/*\n#define k 7\n*/", b" // c\n", b"NOTREACHED", b"//\\\n", b"",
]  # fmt: skip
BLANKS = [b" ", b"\t", b"   ", b"/**/", b" /* x' */ ", b"/*a*//*b*/", b' /* "q */', b"", b"/* \n */", b"/*//*/"]
ENDS = [
    b" ",
    b"\t ",
    b" // foo",
    b"// it's \"x",
    b"/* e */",
    b" /* f */ // g /* h",
    b"\\",
    b" \\ ",
    b'// R"(',
    b"//\\",
    b"/*",
]
STARTS = [b" ", b"\t", b"/* s */ ", b"    ", b"/**/", b"//", b"\\"]
BLANK, COMMENT = re.compile(rb"[ \t]+"), re.compile(rb"//[^\n]*|/\*.*?\*/", re.DOTALL)

# Whatever white space and comments may have to do with; the log is empty.
SOURCE = rb"""/* A comment
 * over lines, with 'quotes" and R"( in it
 */
// it's "fine"
#define STR_(...) #__VA_ARGS__
#define STR(...) STR_(__VA_ARGS__)
#define CAT(a, b) a ## b
#define OBJ (1 + 2)
#define F(x) ((x) + 1) // trailing
#define G (x)
#define MULTI(a, b)   \
  do {                \
    int t = (a);      \
    (b) += t /* c */; \
  } while (0)
#define EMPTY
#define LINES STR(__LINE__) /* a
 comment in a directive */ "x"
#if defined(FOO) /* multi
line */ || 1
constexpr int first = __LINE__;
#else
constexpr int first = -1;
#endif
# pragma nv_diag_suppress 177 /* what */
%: define DIGRAPH 7
#ifdef __CUDACC__ // yes
static constexpr char raw[] = R"x(a  b // c
	/* d */ "e" \
)x";
static constexpr char raw2[] = R"(//)" /* x */ "  tail\t" "a\
b";
#endif
#if 0
int skipped = 1; /* x */
#endif
#include "value.h" // a header
__device__ constexpr int digits = 1'000'000 + 0xA'B + '\'' + '/' + 'a';
__device__ constexpr char s1[] = STR(a +  b /* c */ + d);
__device__ constexpr char s2[] = STR(a+b, "x  y" , 'c' );
__device__ constexpr char s3[] = STR( a
   b // c
   d );
template <class T, int N = (3 > 2)> struct S { T v[N]; };
template <int... I> __device__ int sum() { return (I + ... + 0); }
__device__ unsigned hash(const char *p) { unsigned h = 5381; while (*p) h = h * 33 ^ *p++; return h; }
extern "C" __global__ void k(unsigned *p, int n) {
  int at = 0;
  p[at++] = first;      // comment
  p[at++] = __LINE__;   /* comment */ p[at++] = __LINE__ + VALUE;
  p[at++] = hash(raw) + sizeof raw;
  p[at++] = hash(raw2);
  p[at++] = hash(s1) + sizeof(s1); p[at++] = hash(s2); p[at++] = hash(s3);
  p[at++] = digits + DIGRAPH + F(2) + CAT(1, 2) + OBJ;
  p[at++] = hash(LINES);
  int b = 0;
  MULTI(n + 1,
        b);
  p[at++] = b;
  S<int, 2> s{{n, n + 1}};
#pragma unroll 2 // twice
  for (int i = 0; i < n; ++i) { p[at + i] += s.v[i & 1] - -i + + i; }
  p[at++] = n / *&n * 2;
  asm volatile("mov.u32 %0,  %%laneid; // asm" : "=r"(p[at]) : /* none */ : "memory");
  if (n < 0) { printf("at %d: %s\n", __LINE__, STR(x   y)); assert(n  >  0); }
  p[at++] = sum<1, 2 EMPTY>() + \
            sum<3>();
  p[at++] = n-- > 1 ? n-
    -n : 0;
}
// the end
"""
REAL = {
    "cuda": "#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n"
    'extern "C" __global__ void k(__half *a, __nv_bfloat16 *b) {'
    " *a = __hadd(*a, __hmul(*a, *a)); b[1] = __hfma(*b, *b, *b); }",
    "cccl": '#include <cuda/std/cstdint>\nextern "C" __global__ void k(cuda::std::int16_t *a) { *a = INT16_MAX; }',
}


def apply(text, edits):
    parts, at = [], 0
    for start, end, new in sorted(edits):
        if start >= at:
            parts += [text[at:start], new]
            at = end
    return b"".join([*parts, text[at:]])


def random_edits(choose, text, count):
    """Edits of ``text``: where from, where to, and what stands there then."""
    for _ in range(count):
        at, kind = choose.randrange(len(text)), choose.randrange(7)
        end_of_line = text.find(b"\n", at)
        blank, comment = BLANK.search(text, at), COMMENT.search(text, at)
        if kind == 0:
            yield at, at + choose.randrange(2), choose.choice(BITS)
        elif kind == 1 and blank:
            yield blank.start(), blank.end(), choose.choice(BLANKS)
        elif kind in {2, 3} and end_of_line >= 0:
            yield end_of_line, end_of_line, choose.choice(ENDS)
        elif kind == 4 and end_of_line >= 0:
            yield end_of_line + 1, end_of_line + 1, choose.choice(STARTS)
        elif kind == 5 and comment:
            start = choose.randrange(comment.start() + 2, comment.end() + 1)
            yield start, min(comment.end(), start + choose.randrange(6)), choose.choice(BITS)
        elif kind == 6 and comment:
            lines = comment[0].count(b"\n")
            yield comment.start(), comment.end(), b"/*%b*/" % (b" words\n" * lines) if lines else choose.choice(BLANKS)


def unseen(text, edits, form):
    """Those of the edits that keep the normal form."""
    if not edits or normalized(apply(text, edits)) == form:
        return edits
    if len(edits) == 1:
        return []
    half = len(edits) // 2
    return unseen(text, edits[:half], form) + unseen(text, edits[half:], form)


def varied(choose, text, count):
    form = normalized(text)
    assert form is not None
    other = apply(text, unseen(text, list(random_edits(choose, text, count)), form))
    return other if normalized(other) == form else text  # edits may meet


def compiled(source, *flags, targets=("cubin", "ptx")):
    """What comes out, for each target; whether the log is empty."""
    made = []
    for target_type in targets:
        try:
            output = compilers.compile_cpp(
                source, name="k.cu", flags=["-arch=sm_80", *flags], target_type=target_type, trace=False
            )
        except CompilerRefusal as refusal:
            made.append(refusal.status)
        else:
            made += [output.data, bool(output.log)]
    return made


@pytest.mark.parametrize("std", ["c++14", "c++17", "c++20"])
def test_a_source_and_its_header(project, std):
    choose = random.Random(std)
    source = SOURCE if std != "c++14" else SOURCE.replace(b"(I + ... + 0)", b"sizeof...(I)")
    header = b"// A header\n#pragma once /* once */\n#define VALUE   (__LINE__ + /* x */ 3)  \n#undef  NONE\n"
    project("value.h", header.decode())
    expected = compiled(source, f"--std={std}")
    assert expected[1] is False, "no word in the log"
    edited = 0
    for _ in range(ROUNDS):
        new_source, new_header = varied(choose, source, 60), varied(choose, header, 12)
        edited += new_source != source
        with open("value.h", "wb") as file:
            file.write(new_header)
        assert compiled(new_source, f"--std={std}") == expected, new_source
    assert edited > ROUNDS / 2


@pytest.mark.parametrize("which", REAL)
def test_real_headers(project, which):
    choose = random.Random(which)
    source = REAL[which].encode()
    roots = [header_root("cuda"), header_root("cccl")]
    flags = ["-arch=sm_80", "--std=c++17", *(f"--include-path={root}" for root in roots)]
    traced = compilers.compile_cpp(source, name="k.cu", flags=flags, target_type="ptx").trace
    originals = {}
    for path in dict.fromkeys(path for _, path in traced):
        root = max((root for root in roots if path.startswith(root + "/")), key=len)
        with open(path, "rb") as file:
            originals[os.path.relpath(path, root)] = file.read()
    for name, text in originals.items():
        project(f"inc/{name}", text.decode())
    expected = compiled(source, "--std=c++17", "--include-path=inc", targets=["cubin"])
    assert expected[1] is False
    edited = 0
    for _ in range(ROUNDS // 3):
        for name, text in choose.sample(sorted(originals.items()), min(len(originals), 40)):
            new = varied(choose, text, 20)
            edited += new != text
            with open(f"inc/{name}", "wb") as file:
                file.write(new)
        assert compiled(source, "--std=c++17", "--include-path=inc", targets=["cubin"]) == expected
    assert edited


def test_what_a_column_or_a_line_is_counts(project):
    """The normal form keeps lines; columns it doesn't, which is why a text that asks for them has to be found."""
    from cuda_progcache.keys.include_text import asks_for_columns

    one, other = (
        f'extern "C" __global__ void k(int *p) {{{blanks} *p = __builtin_COLUMN(); }}'.encode() for blanks in ("", "  ")
    )
    assert normalized(one) == normalized(other)
    assert compiled(one) != compiled(other)
    assert asks_for_columns(one)
    one, other = (b"/*%b*/ __device__ int line = __LINE__;" % lines for lines in (b"", b"\n"))
    assert normalized(one) != normalized(other)
    assert compiled(one) != compiled(other)

# SPDX-License-Identifier: Apache-2.0
"""What the text of a file says, read as a preprocessor reads it."""

from __future__ import annotations

import pytest

from cuda_progcache.keys.include_text import (
    FOLDED,
    NO_PATH,
    PRINTED,
    included_names,
    path_macros,
    readings,
    redefines_printing,
)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (b"a // x \\\n y\nb", [b"a  \nb"]),
        (b"a/* x\n y*/b", [b"a b"]),
        (b"a/\\\n* x *\\\n/b", [b"a b"]),
        (b'"//" /**/ \'"\' // z', [b'"//"   \'"\'  ']),
        (b'x = R"a(//)" )a"; // y', [b'x = R"";  ']),
        (b'x = u8R"(//)" LR"(\\\n)" FOOR"(" // y', [b'x = u8R"" LR"" FOOR"("  ']),
        (b'R\\\n"(a"b\n)"c', [b'R""c']),
        (b'R"x()\\\nx")x"c', [b'R""c']),
        (b"1'000'000 'a' 0xA'B // x", [b"1'000'000 'a' 0xA'B  "]),
        (b"case'a': u8'a' 1'/*'", [b"case'a': u8'a' 1'/*'"]),
        (b"#error don't /* x\ny", [b"#error don't /* x\ny"]),
        (b'"a\\\\\n"b" // x', [b'"a\\"b"  ']),
        (b"#include <a//b.h> // c\n#include <a/*.h>", [b"#include <a//b.h>  \n#include <a/*.h>"]),
        (b"/* a", [b" "]),
        (b"a ??/\nb ??=", [b"a ??/\nb ??=", b"a b #"]),
        (b"a \\ \nb", [b"a \\ \nb", b"a b"]),
        (b"a \\\r\nb\r\nc", [b"a b\r\nc"]),
        (b"a", [b"a"]),
        (b"", [b""]),
    ],
)
def test_readings(code, expected):
    assert readings(code) == [b"\n" + text for text in expected]


@pytest.mark.parametrize("never", ["#if 0", " # if (0) // never", "%:if false", "#if /*\n*/ 0", "#\\\nif 0"])
def test_skipped_groups_are_left_out(never):
    skipped = 'b\n#if 1\nc\n#else\nd\n#endif\n/*\n#endif\n*/\nR"(\n#endif\n)"\n'
    (text,) = readings(f"a\n{never}\n{skipped}#else\ne\n#endif\nf\n#if X\ng\n#endif\n".encode())
    assert [line for line in text.split(b"\n") if line.isalpha()] == [b"a", b"e", b"f", b"g"]


@pytest.mark.parametrize("condition", ["0 + X", "00", "0 || X", "X", "1", "0x1", "!0"])
def test_other_groups_are_not(condition):
    assert b"\nb\n" in readings(f"#if {condition}\nb\n#endif\n".encode())[0]


PRINTING = [
    "assert(x);", "#define A assert", 'printf("%s", __FILE__);', 'printf("at " __FILE__ ":%d", __LINE__);',
    '#define CHECK(x) if (!(x)) printf("%s", __FILE__)',
    '#define CHECK(x) \\\n  do { if (!(x)) { printf("%s(%d)", __FILE__, __LINE__); } } while (0)',
    'printf(f(a, b[1]) + g("(", \')\'), x, __builtin_FILE());', "__assertfail(#x, __FILE__, __LINE__, __func__, 1);",
    'std::printf("%s", /* x */ __FILE__)', 'x; ::printf(__FILE__ " " STR(__LINE__) "\\n");',
    "__assert_fail(a, __FILE__)",
    'int f() { printf("%d %s", sizeof(int), __builtin_FILE ()); }', "#define A _wassert(x, __FILE__, __LINE__)",
]  # fmt: skip
FOLDING = [
    "__FILE__", "__FILE__[0]", "sizeof __FILE__", "sizeof(__FILE__)", 'printf("%c", __FILE__[0]);', "hash(__FILE__)",
    'printf("%s", __FILE__ + 3);', 'printf("%s", hash(__FILE__));', 'my::printf("%s", __FILE__);', "x.printf(__FILE__)",
    "p->printf(__FILE__)", "#define CHECK(x) check(x, __FILE__)", "std::source_location::current()",
    "auto x = __builtin_source_location();", "f(_CCCL_BUILTIN_FILE())", "int f(const char *p = __builtin_FILE());",
    'printf("%d", sizeof __FILE__);', 'printf("%s", x ? __FILE__ : "");', "assert(__FILE__[0] == 'a');",
    "__BASE_FILE__[1]",
    "#define CHECK printf(__FILE__\nint n = __FILE__[2];", 'printf("x"); char c = __FILE__[0];', "__FI\\\nLE__[1]",
    'printf("%s", (__FILE__));', "__FI??/\nLE__[1]", "#if 1\n#else\nauto x = __FILE__;\n#endif", "my_assert(__FILE__)",
]  # fmt: skip
SILENT = [
    "int x;", "static_assert(x);", "// assert(x) __FILE__", '"__FILE__"', "#if 0\n__FILE__\n#endif",
    "MY__FILE__", "/*\n__FILE__*/",
    'R"(__FILE__)"', "assertion", "__FILE_NAME__",
]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "expected"),
    [*((c, PRINTED) for c in PRINTING), *((c, FOLDED) for c in FOLDING), *((c, NO_PATH) for c in SILENT)],
)
def test_path_macros(code, expected):
    assert path_macros(code.encode()) == expected


def test_the_worst_use_of_a_path_counts():
    for text in PRINTING:
        for other in FOLDING:
            assert path_macros(f"{text}\n{other}\n".encode()) == FOLDED
        assert path_macros("\n".join([text, *SILENT]).encode()) == PRINTED


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('extern "C" int printf(const char *, ...);', False),
        ("using std::printf; using ::printf;", False),
        ("#undef printf\n#ifdef printf\n#endif", False),
        ("#define printf(...)", False),
        ("#define printf(...) ((void)0)", False),
        ("#define printf(...) hash(__VA_ARGS__)", True),
        ("#define __assertfail(m, file, ...) hash(file)", True),
        ("#define printf hash", True),
        ("constexpr int printf(const char *s, int n = f()) { return s[n]; }", True),
        ("struct S { int printf(const char *s) const { return s[0]; } };", True),
        ("auto printf = [](const char *s) { return s[0]; };", True),
        ("struct printf { constexpr printf(const char *s); };", True),
        ("template <class F> void f(F printf) { printf(__FILE__); }", True),
        ('#define CHECK(x) if (!(x)) { printf("%s", __FILE__); }', False),
        ("// #define printf(...) hash(__VA_ARGS__)", False),
        ('const char *s = "printf";', False),
    ],
)
def test_redefined_printing(code, expected):
    assert redefines_printing(code.encode()) is expected


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"", {}),
        (b"#include <a.h>", {"a.h": False}),
        (b'# include/* x */ <a.h> // "b.h"', {"a.h": False}),
        (b"#if 0\n#include <a.h>\n#endif", {}),
        (b'// #include "a.h"', {}),
        (b'#include "a.h"\n#include <a.h>', {"a.h": True}),
        (b'#include <a.h>\n#inc\\\nlude "sub/b.h"', {"a.h": False, "sub/b.h": True}),
        (b'%:include "a.h"', {"a.h": True}),
        (b'??=include "a.h"', {"a.h": True}),
        (b"#include NAME", None),
        (b"#include <a.h>\n#define N <b.h>\n#include N", None),
    ],
)
def test_names_of_included_headers(text, names):
    assert included_names(text) == names

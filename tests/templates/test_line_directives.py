# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import textwrap

from cuda_progcache import Program, ProgramOptions
from cuda_progcache.inspect import disassemble
from cuda_progcache.templates import KernelEnvironment, Location, SourceMap
from cuda_progcache.templates.line_directives import _openings, with_line_directives

KERNEL = """\
// a kernel
{% import "fma.cuh.j2" as m %}
{% include "load.cuh.j2" %}

extern "C" __global__ void k(const float* x,
                             float* y)
{
{% for i in range(2) %}
    y[{{ i }}] = load(x, {{ i }}) * 2.0f;
{% endfor %}
    {{ m.fma("y[2]") }}
}
"""
LOAD = "\n\n__device__ __noinline__ float load(const float* x, int i)\n{\n    return sqrtf(x[i]);\n}\n"
FMA = "{% macro fma(to) %}\n\n    {{ to }} = y[0] * y[1] + y[2];\n{% endmacro %}"


def kernel(tmp_path):
    for name, text in {"k.cu.j2": KERNEL, "load.cuh.j2": LOAD, "fma.cuh.j2": FMA}.items():
        (tmp_path / name).write_text(text)
    return KernelEnvironment(tmp_path).source_map("k.cu.j2")


def test_directives_stand_where_the_next_line_is_another(tmp_path):
    text = with_line_directives(kernel(tmp_path)).text
    assert text == textwrap.dedent(
        """\
        #line 1 "k.cu.j2"
        // a kernel


        #line 3 "load.cuh.j2"
        __device__ __noinline__ float load(const float* x, int i)
        {
            return sqrtf(x[i]);
        }

        #line 5 "k.cu.j2"
        extern "C" __global__ void k(const float* x,
                                     float* y)
        {
        #line 9 "k.cu.j2"
            y[0] = load(x, 0) * 2.0f;
        #line 9 "k.cu.j2"
            y[1] = load(x, 1) * 2.0f;

        #line 3 "fma.cuh.j2"
            y[2] = y[0] * y[1] + y[2];

        #line 12 "k.cu.j2"
        }
        """
    ).replace('\n\n#line 3 "fma', '\n    \n#line 3 "fma')


def test_no_directive_where_it_would_be_something_else():
    lines = [
        "#define TWICE(a) \\",
        "    (a + \\",
        "     a)",
        "/* comment",
        "*/ int a; // ( no",
        'const char* r = R"x(',
        ')" no',
        ')x"; int b;',
        "f(a,",
        "  b);",
        "char c = '(', d = '\\'', e = '\"';",
        'const char* s = "(\\"";',
        "int big = 1'000'000;",
        "end",
    ]
    assert [line for line, opens in zip(lines, _openings(lines), strict=True) if not opens] == [
        *("    (a + \\", "     a)", "*/ int a; // ( no", ')" no', ')x"; int b;', "  b);"),
    ]


def test_parentheses_of_one_branch_are_not_those_of_the_next():
    lines = [
        *("#ifdef A", "f(a,", "#elif B", "g(b,", "#else", "h(", "#endif", "  c);", "int d;"),
        *("# if X", "k((", "#  ifdef Y", "l(", "#  else", ")", "#  endif", "#else", "m(", "# endif", "  n);", "int e;"),
        *("/*", "#if Z (", "*/", "int g;", "#endif", ")", "int h;"),
    ]
    opens = [line for line, opens in zip(lines, _openings(lines), strict=True) if opens]
    assert {"int d;", "int e;", "int g;", "int h;", "g(b,", "h("} <= set(opens)
    assert not {"  c);", "*/", "#if Z ("} & set(opens)


def test_a_file_goes_on_after_parentheses_split_over_branches(tmp_path):
    (tmp_path / "k.cu.j2").write_text(
        "__device__ int f(int a\n#if {{ n }}\n, int b)\n#else\n)\n#endif\n{ return a; }\n"
        "{# one #}\n{# two #}\nint x = gone;\n"
    )
    text = KernelEnvironment(tmp_path, line_directives=True).render("k.cu.j2", n=1)
    assert '#line 10 "k.cu.j2"\nint x = gone;' in text


def test_a_line_of_another_place_waits_for_the_next_opening():
    lines = ["f(a,", "  b);", "int c;", "int d;"]
    places = tuple(Location("k.j2", number) for number in (1, 7, 9, 10))
    found = with_line_directives(SourceMap("\n".join(lines), places))
    assert found.text.split("\n") == ['#line 1 "k.j2"', "f(a,", "  b);", '#line 9 "k.j2"', "int c;", "int d;"]
    assert found.lines == (None, places[0], places[1], None, *places[2:])


def test_a_map_that_could_not_be_made_leaves_the_text():
    assert with_line_directives(SourceMap("a\nb", reason="no")) == SourceMap("a\nb", reason="no")


def test_names_are_quoted():
    text = with_line_directives(SourceMap("a\nb", (Location('k "1"\\.j2', 4), Location('k "1"\\.j2', 7)))).text
    assert text == '#line 4 "k \\"1\\"\\\\.j2"\na\n#line 7 "k \\"1\\"\\\\.j2"\nb'


def test_lineinfo_names_the_templates_lines(tmp_path):
    text = with_line_directives(kernel(tmp_path)).text
    code = Program(text, "c++", ProgramOptions(arch="sm_90", lineinfo=True)).compile("cubin")
    listing = disassemble(bytes(code.code), "--print-line-info", "--print-code")
    places = {(file.rpartition("/")[2], int(line)) for file, line in re.findall(r'File "([^"]*)", line (\d+)', listing)}
    written = {("load.cuh.j2", 5), ("k.cu.j2", 9), ("fma.cuh.j2", 3)}
    assert written <= places
    assert {file for file, _ in places} == {"load.cuh.j2", "k.cu.j2", "fma.cuh.j2"}

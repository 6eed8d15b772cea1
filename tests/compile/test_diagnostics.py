# SPDX-License-Identifier: Apache-2.0
"""Compiler logs, parsed and brought back to templates."""

from __future__ import annotations

from cuda_progcache.compile.diagnostics import Diagnostic, compile_error, parse_log
from cuda_progcache.compile.output import CompilerRefusal

LOG = """gemm.cu(2): error: identifier "x" is undefined
  a = x;
      ^

inc/util.h(7): warning #177-D: variable "y" was declared but never referenced

gemm.cu(9): catastrophic error: cannot open source file "gone.h"

2 errors detected in the compilation of "gemm.cu".
ptxas application ptx input, line 7; error   : Unknown symbol 'foo'
"""


def test_parse():
    found = parse_log(
        LOG, name="gemm.cu", source="one\n  a = x;\n", lookup=lambda line, column: ("gemm.cu.j2", line + 40)
    )
    assert found[0] == Diagnostic(
        "error", "gemm.cu", 2, 'identifier "x" is undefined', None, "gemm.cu.j2", 42, "  a = x;"
    )
    assert found[1] == Diagnostic(
        "warning", "inc/util.h", 7, 'variable "y" was declared but never referenced', "177-D", None, None, None
    )
    assert (found[2].severity, found[2].line, found[2].rendered) == ("catastrophic error", 9, None)
    assert (found[3].severity, found[3].line, found[3].message) == ("error", 7, "Unknown symbol 'foo'")
    assert len(found) == 4
    assert parse_log("nothing to see\n") == ()


def test_printed_as_editors_read_it():
    mapped, header, *_ = parse_log(
        LOG, name="gemm.cu", source="one\n  a = x;\n", lookup=lambda line, column: ("gemm.cu.j2", 42)
    )
    assert str(mapped) == ('gemm.cu.j2:42: error: identifier "x" is undefined\n    rendered as gemm.cu:2:  a = x;')
    assert str(header) == 'inc/util.h:7: warning #177-D: variable "y" was declared but never referenced'


def test_line_directives_name_the_place_themselves():
    source = 'int b;\n#line 40 "a \\"k\\".cu.j2"\n\n  a = x;\n# line 7 "inc.j2"\nint c;\n'
    log = 'a "k".cu.j2(41): error: identifier "x" is undefined\ngemm.cu(1): error: no\nother.h(7): error: no\n'
    mapped, own, header = parse_log(log, name="gemm.cu", source=source, lookup=lambda line, column: None)
    assert (mapped.template, mapped.template_line, mapped.rendered) == ('a "k".cu.j2', 41, "  a = x;")
    assert str(mapped) == 'a "k".cu.j2:41: error: identifier "x" is undefined\n    rendered as:  a = x;'
    assert (own.template, own.rendered, header.template, header.rendered) == (None, "int b;", None, None)
    (mapped, *_) = parse_log(log, name="gemm.cu", source=source)
    assert (mapped.template, mapped.rendered) == (None, "  a = x;")


def test_lines_without_a_known_origin_stay_as_they_are():
    found = parse_log(LOG, name="gemm.cu", source="one\n  a = x;\n", lookup=lambda line, column: None)
    assert str(found[0]).startswith("gemm.cu:2: error")


def test_the_message_says_what_with_what_and_where():
    refusal = CompilerRefusal("NVRTC_ERROR_COMPILATION", LOG)
    error = compile_error(
        refusal, name="gemm.cu", code_type="c++", target_type="cubin", flags=["-arch=sm_90", "--fmad=false"],
        source="one\n  a = x;\n", lookup=lambda line, column: ("gemm.cu.j2", 42) if line == 2 else None,
    )  # fmt: skip
    lines = str(error).splitlines()
    assert lines[0] == "gemm.cu: c++ -> cubin failed (NVRTC_ERROR_COMPILATION) with -arch=sm_90 --fmad=false"
    assert lines[1] == 'gemm.cu.j2:42: error: identifier "x" is undefined'
    assert LOG.strip() in str(error)
    empty = compile_error(CompilerRefusal("X", ""), name="n", code_type="ptx", target_type="cubin", flags=[])
    assert "the compiler left no log" in str(empty)

# SPDX-License-Identifier: Apache-2.0
"""Patterns of Python code that the template compiler fills in."""

from __future__ import annotations

import ast

import pytest

from cuda_progcache.templates.compiler.tree import Builder


def builder(*, asynchronous=False):
    made = Builder()
    made.asynchronous, made.context, made.line = asynchronous, "ctx", 7
    made.names, made.uses = {}, set()
    return made


def text(body):
    return ast.unparse(ast.Module(body, []))


FILLED = [
    ("$a = $b", {"a": "x", "b": ast.Constant(value=3, lineno=1, col_offset=0)}, "x = 3"),
    ("$a = 1", {"a": ["x", "y"]}, "x = y = 1"),
    ("$f($args, 1)", {"f": "f", "args": []}, "f(1)"),
    ("$f($args, 1)", {"f": "f", "args": ["x", "y"]}, "f(x, y, 1)"),
    ("$a.$name['$key']", {"a": "x", "name": "size", "key": "k"}, "x.size['k']"),
    ("f('$a', '$b')", {"a": None, "b": True}, "f(None, True)"),
    ("f($ctx)", {}, "f(ctx)"),
    ("if $a: $body", {"a": "x", "body": []}, "if x:\n    pass"),
    ("if $a: $body\nelse: $other", {"a": "x", "body": [], "other": []}, "if x:\n    pass"),
    (
        "if $a:\n    $body\n    b = 1",
        {"a": "x", "body": ast.Name("y", ast.Load(), lineno=1, col_offset=0)},
        "if x:\n    y\n    b = 1",
    ),
    (
        "if $a: $body",
        {"a": "x", "body": [ast.Pass(lineno=1, col_offset=0), ast.Return(None, lineno=1, col_offset=0)]},
        "if x:\n    pass\n    return",
    ),
    ("def $f($args): $body", {"f": "f", "args": ["x", "y"], "body": []}, "def f(x, y):\n    pass"),
    ("from $package import $name as n", {"package": "p.q", "name": "r"}, "from p.q import r as n"),
    ("for i in x: continue", {}, "for i in x:\n    continue"),
]


@pytest.mark.parametrize(("pattern", "parts", "filled"), FILLED)
def test_holes_are_filled_each_time_anew(pattern, parts, filled):
    made = builder()
    first, second = made.lines(pattern, **parts), made.lines(pattern, **parts)
    assert text(first) == text(second) == filled
    assert not {id(node) for node in first} & {id(node) for node in second}
    compile(ast.Module(made.lines("def f(): $body", body=[*first]), []), "<pattern>", "exec")


def test_nodes_are_at_the_builders_line():
    made = builder()
    for made.line in (7, 9, 8):
        for node in made.lines("for i in x:\n    if not i: continue\n    f(i + 1, '$a')", a=1):
            placed = [inner for inner in ast.walk(node) if isinstance(inner, ast.stmt | ast.expr)]
            assert {inner.lineno for inner in placed} == {made.line}


def test_async_falls_away_where_the_environment_is_not_async():
    pattern = "async def f():\n    async for i in await x: await g(i)"
    assert text(builder(asynchronous=True).lines(pattern)).replace("\n    ", " ").count("a") == pattern.count("a")
    assert text(builder().lines(pattern)) == "def f():\n    for i in x:\n        g(i)"


def test_a_hole_without_a_part_is_a_name_of_the_runtime():
    made = builder()
    assert ast.unparse(made.code("$_call($missing)")) == "_call(missing)"
    assert made.uses == {"_call", "missing"}
    with pytest.raises(KeyError, match="the runtime has no '_cal'"):
        made.code("$_cal(x)")

# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_progcache.errors import TemplateError
from cuda_progcache.templates import KernelEnvironment, Location, SourceMap


def where(source_map):
    """Return ``template:line`` of each line, with its callers; None for a line without an origin."""
    found = []
    for origin in source_map.lines:
        location, chain = origin, []
        while location is not None:
            chain.append(str(location))
            location = location.caller
        found.append(" < ".join(chain) or None)
    return found


def map_of(source, **params):
    found = KernelEnvironment(()).from_string(source).source_map(**params)
    assert found.reason == ""
    return where(found)


def test_lines_of_data_and_expressions():
    source = "a\n{% for i in (1, 2) %}\n  b{{ i }}\n{% endfor %}\n{{ x }}\n\n{#\n comment #}\n\tend"
    assert map_of(source, x="one\ntwo") == [
        "<string>:1",
        "<string>:3",
        "<string>:3",
        "<string>:5",
        "<string>:5",
        None,
        "<string>:9",
    ]


def test_an_expression_over_several_lines_is_where_it_starts():
    assert map_of("a\n{{ f(\n  1,\n  2\n) }}\nb", f=lambda *args: "x") == ["<string>:1", "<string>:2", "<string>:6"]
    assert map_of("a\n{{ x\n | upper }}", x="x") == ["<string>:1", "<string>:2"]


def test_each_piece_of_a_line_has_its_place(folder):
    environment = folder(
        k_j2='{% import "m.j2" as m %}\nx = {{ m.one() }} + {{ "a" ~ m.two(\n  n) }} + {{ n if n else\n\n 0 }};\n'
        "{{ 'é' ~\n m.one() ~\n '\\n  b' }}\n",
        m_j2="{% macro one() -%}\n one\n{%- endmacro %}\n{% macro two(n) -%}\n{{ n }}two\n{%- endmacro %}",
    )
    found = environment.source_map("k.j2", n=7)
    lines = found.text.split("\n")
    assert lines[:3] == ["x = one + a7two + 7;", "éone", "  b"]
    expected = {"x =": "k.j2:2", "one": "m.j2:2", "+ a": "k.j2:2", "7two": "m.j2:5", "two": "m.j2:5", "7;": "k.j2:3"}
    assert {piece: str(found.lookup(1, lines[0].index(piece))) for piece in expected} == expected
    assert [str(found.lookup(2, column)) for column in (0, 1, 3)] == ["k.j2:6", "m.j2:2", "m.j2:2"]
    assert [str(found.lookup(3, 2)), str(found.lookup(3))] == ["k.j2:8", "k.j2:8"]


def test_what_trimming_joins_is_where_its_first_character_is():
    assert map_of("a\n  {%- if true -%}\n  b\n{%- endif %}\nc {{- 1 }}\nd") == ["<string>:1", "<string>:6"]
    assert map_of("{% raw -%}\n\n {{ x }}\n{% endraw %}\ny") == ["<string>:3", "<string>:5"]


def test_macros_know_their_call_and_includes_the_including(folder):
    environment = folder(
        k_j2='{% import "m.j2" as m %}\nstart\n{{ m.f("x") }}\n{% include "i.j2" %}\n'
        "{% call m.wrap() %}\ninner\n{% endcall %}\n",
        m_j2="{% macro f(v) %}\nload {{ v }};\n{{ g() }}{% endmacro %}\n"
        "{% macro g() %}\nstore;\n{% endmacro %}\n{% macro wrap() %}\n{\n{{ caller() }}}\n{% endmacro %}",
        i_j2="\nincluded\n",
    )
    found = environment.source_map("k.j2")
    assert [line for line in zip(found.text.split("\n"), where(found), strict=True) if line[0]] == [
        ("start", "k.j2:2"),
        ("load x;", "m.j2:2 < k.j2:3"),
        ("store;", "m.j2:5 < m.j2:3 < k.j2:3"),
        ("included", "i.j2:2 < k.j2:4"),
        ("{", "m.j2:8 < k.j2:5"),
        ("inner", "k.j2:6 < m.j2:9 < k.j2:5"),
        ("}", "m.j2:9 < k.j2:5"),
    ]


def test_extends_and_super(folder):
    environment = folder(
        k_j2='{% extends "base.j2" %}\nnever\n{% block b %}\nchild\n{{ super() }}{% endblock %}\n',
        base_j2="top\n{% block b %}\nparent\n{% endblock %}\nbottom",
    )
    assert where(environment.source_map("k.j2")) == [
        "base.j2:1",
        "k.j2:4",
        "base.j2:3 < k.j2:5",
        "base.j2:5",
    ]


def test_filters_that_keep_lines_keep_locations():
    source = "{% macro body() %}\n\na;\n\n{% if true %}\n  b;\n{% endif %}\n{% endmacro %}\n"
    assert map_of(source + "{{ body() | indent(4, true) }}")[:4] == [
        None,
        "<string>:3 < <string>:9",
        None,
        "<string>:6 < <string>:9",
    ]
    assert map_of(source + "{{ body() | trim }}") == ["<string>:3 < <string>:9", None, "<string>:6 < <string>:9"]
    assert map_of(source + "x {{ body() | upper | replace('A', 'C') }}")[1] == "<string>:3 < <string>:9"
    assert map_of(source + "{{ body() | replace(';', ';\n') }}")[1:3] == ["<string>:9", None]
    inner = "{% macro inner() %}\n\nx\n{% endmacro %}\n{% macro outer() %}\n{{ inner() }}{% endmacro %}\n"
    assert map_of(inner + "{{ outer() | trim }}") == ["<string>:3 < <string>:6 < <string>:7"]
    assert map_of("{% filter indent(2) %}\na\nb\n{% endfilter %}")[:2] == ["<string>:2", "<string>:3"]
    assert map_of("{% set x %}\na\nb\n{% endset %}\n{{ x | trim }}") == [
        "<string>:2 < <string>:5",
        "<string>:3 < <string>:5",
    ]


def test_filters_tests_and_functions_never_see_marks():
    source = "{% macro two() %}2{% endmacro %}\n{{ two()|int + 1 }}\n"
    source += "{{ two() is eq('2') }}\n{{ vector_type('int', two()|int) }}"
    assert map_of(source) == ["<string>:2", "<string>:3", "<string>:4"]
    assert map_of("{% macro two() %}2{% endmacro %}{% if two() is eq('2') %}\nequal\n{% endif %}") == [
        "<string>:2",
        None,
    ]
    source = "{% macro name() %}int{% endmacro %}\n{{ vector_type(name(), 2) }}\n{{ name()|length }}"
    assert map_of(source) == ["<string>:2", "<string>:3"]


def test_tags_have_their_line():
    source = "{% for n in (2, 4) %}\n    {% unroll n %}\n    for;\n{% endfor %}"
    assert map_of(source)[:4] == ["<string>:2", "<string>:3", "<string>:2", "<string>:3"]


def test_a_map_that_cannot_be_made_is_empty_and_says_why():
    source = "{% macro a() %}x{% endmacro %}\n{% if a() == 'x' %}\nequal\n{% endif %}\n"
    found = KernelEnvironment(()).from_string(source).source_map()
    assert found == SourceMap("equal\n", (), "<string> computes with its own text, which marks would change")
    assert found.lookup(1) is None
    found = KernelEnvironment(()).from_string("{% macro a() %}k{% endmacro %}{{ {'k': 1}[a()] }}").source_map()
    assert found.text == "1"
    assert found.reason.startswith("<string> can't be rendered with marks: ")


def test_lookup_is_within_bounds():
    found = SourceMap("a\n", (Location("k.j2", 1), None))
    assert [found.lookup(n) for n in (-1, 0, 1, 2, 3)] == [None, None, Location("k.j2", 1), None, None]
    assert len(found) == 2


def test_an_error_of_the_template_is_not_hidden():
    with pytest.raises(TemplateError, match="<string>:1: 'x' is undefined"):
        KernelEnvironment(()).from_string("{{ x }}").source_map()


def test_a_map_leaves_the_environment_as_it_was():
    template = KernelEnvironment(()).from_string("{{ x }}\n")
    assert template.source_map(x=1).text == template.render(x=1) == "1\n"
    assert template.source_map(x=2).text == template.render(x=2) == "2\n"


TRIM = st.sampled_from(["", "-"])
TAG = "@"


@st.composite
def bodies(draw, depth=2):
    """Draw the lines of a template; each ``@`` stands for the name and number of its line."""
    lines = []
    for kind in draw(st.lists(st.integers(0, 9 if depth else 3), max_size=5)):
        left, right = draw(TRIM), draw(TRIM)
        if kind == 0:
            lines.append(draw(st.sampled_from(["@", "    @ int a;", "\t@ {{ v }}", "@ {{- v -}} @", "@ {{ '}' }};"])))
        elif kind == 1:
            lines += draw(st.sampled_from([[""], ["", "  "], ["{# a", " b #}"], ["@ {#- c", "-#} @"]]))
        elif kind == 2:
            lines += [f"@ {{{{{left} pick(", "  v,", f"  2) {right}}}}} @"]
        elif kind == 3:
            lines += ["{% set unused =", "   v %}", "@"]
        else:
            inner = draw(bodies(depth=depth - 1))
            opening, closing = {
                4: (["if", "  v"], "endif"),
                5: (["for i in range(2)"], "endfor"),
                6: (["filter indent(3)"], "endfilter"),
                7: (["call m()"], "endcall"),
                8: (["raw"], "endraw"),
                9: (["set text"], "endset"),
            }[kind]
            if kind == 8:
                inner = [line for line in inner if "%" not in line and "{" not in line and "}" not in line]
            lines += [
                "{%" + left + " " + opening[0],
                *opening[1:-1],
                (opening[-1] if opening[1:] else "") + " " + right + "%}",
            ]
            if kind == 8:
                lines[-2:] = ["{%" + left + " raw " + right + "%}"]
            lines += [*inner, "{%" + right + " " + closing + " " + left + "%}"]
            if kind == 9:
                lines.append("@ {{ text }}")
    return lines


@settings(max_examples=100, deadline=None)
@given(main=bodies(), included=bodies())
def test_every_visible_line_maps_to_the_line_that_wrote_it(tmp_path_factory, main, included):
    head = ["{% macro m() %}", "@ {", "{{ caller() }}", "@ }", "{% endmacro %}"]
    texts = {"main.j2": [*head, *main, '{% include "part.j2" %}', "@"], "part.j2": [*head, *included]}
    folder = tmp_path_factory.mktemp("map")
    for name, lines in texts.items():
        numbered = [line.replace(TAG, f"<{name}:{number}>") for number, line in enumerate(lines, 1)]
        (folder / name).write_text("\n".join(numbered))
    found = KernelEnvironment(folder, globals={"pick": lambda *args: args[0]}).source_map("main.j2", v="w")
    assert found.reason == ""
    for number, line in enumerate(found.text.split("\n"), 1):
        tag = re.match(r"\s*<([a-z.0-9]+:[0-9]+)>", line)
        for written in re.finditer(r"<([a-z.0-9]+:[0-9]+)>", line):
            assert str(found.lookup(number, written.start())) == written[1]
        if tag:
            assert str(found.lookup(number)) == tag[1]
        elif not line.strip():
            assert found.lookup(number) is None
        else:
            assert found.lookup(number) is not None

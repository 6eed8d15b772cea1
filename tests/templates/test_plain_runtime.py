# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (a template a line)
"""Rendering without Jinja2 compared with Jinja2 itself: text and errors are the same, with new and with stored code."""

from __future__ import annotations

import json
import subprocess
import sys

import jinja2
import pytest

from cuda_progcache.errors import TemplateError
from cuda_progcache.templates import KernelEnvironment
from cuda_progcache.templates.bytecode_cache import BytecodeCache
from cuda_progcache.templates.jinja_environment import JinjaEnvironment
from cuda_progcache.templates.plain_environment import PlainTemplate

FILES = {
    "macros.j2": "{% macro f(a, b=2, c=a) %}{{ a }}-{{ b }}-{{ c }};{% endmacro %}{% set exported = 7 %}{% set _own = 8 %}"
    "{% macro wrap(n=1) %}[{{ caller(n) if caller is defined else 'none' }}]{% endmacro %}text{{ n }}",
    "uses.j2": "{{ outer|default('-') }},{{ n }}{% set outer = 5 %}",
    "loop.j2": "{{ loop.index }}/{{ loop.length }} ",
    "base.j2": "<{% block head %}base head{% endblock %}|{% block body scoped %}{{ n }}{% endblock %}|{{ self.head() }}>",
    "middle.j2": '{% extends "base.j2" %}{% block head %}middle({{ super() }}){% endblock %}',
    "child.j2": '{% extends "middle.j2" %}{% set n = 9 %}{% block head %}child({{ super() }},{{ super.super() }})'
    "{% endblock %}{% block body %}{{ super() }}!{% endblock %}",
    "required.j2": "{% block need required %}{% endblock %}",
    "fills.j2": "{% extends 'required.j2' %}{% block need %}filled{% endblock %}",
    "leaves.j2": "{% extends 'required.j2' %}",
    "bad.j2": "\n\n{{ n / 0 }}",
}
SOURCES = r"""
{{ n }} {{ s }} {{ 1.5 }} {{ none }} {{ [1, 'a'] }} {{ {'k': n} }} {{ (1,) }} {{ true }}
{{ n + 1 }} {{ n // 2 }} {{ n % 3 }} {{ n ** 2 }} {{ -n }} {{ n / 4 }} {{ s ~ n ~ 1 }} {{ n > 3 and s or 4 }} {{ not n }}
{{ d.k }} {{ d['k'] }} {{ d.items()|list }} {{ d.missing is defined }} {{ items[1] }} {{ items[-1] }} {{ items[0:2] }} {{ s.upper() }}
{{ 'yes' if n > 3 else 'no' }} {{ 'yes' if n > 30 }}|{{ ('yes' if n > 30) is defined }}
{{ s|upper }} {{ s|lower|capitalize }} {{ items|join('-') }} {{ items|length }} {{ items|first }} {{ items|last }} {{ items|sum }}
{{ items|max }} {{ items|min }} {{ n|string }} {{ '7'|int }} {{ 'x'|int(3) }} {{ '2.5'|float }} {{ 2.567|round(1) }} {{ 5|abs }}
{{ 'a\nb'|indent(2) }} {{ ' x '|trim }} {{ s|replace('i', 'o') }} {{ nothing|default(3) }} {{ ''|d('e', true) }}
{{ items|map('string')|list }} {{ items|select('odd')|list }} {{ items|reject('odd')|list }} {{ items|sort(reverse=true) }}
{{ items|batch(2)|list }} {{ d|dictsort }} {{ rows|map(attribute='k')|join(',') }} {{ rows|groupby('k')|length }} {{ s|title }}
{{ items|unique|list }} {{ rows|selectattr('k', 'gt', 1)|list }} {{ rows|sum(attribute='k') }} {{ rows|join('+', attribute='k') }}
{{ '%d:%s'|format(n, s) }} {{ s|wordcount }} {{ s|center(9) }} {{ items|tojson }} {{ 5.0|round(0, 'floor') }} {{ s|reverse }}
{% if n is odd %}odd{% elif n is divisibleby(3) %}three{% else %}other{% endif %} {{ n is even }} {{ n is in items }} {{ s is string }}
{{ n is number }} {{ d is mapping }} {{ items is sequence }} {{ items is iterable }} {{ f is callable }} {{ n is sameas n }} {{ 3 is eq 3 }}
{{ nothing is undefined }} {{ n is none }} {{ n is boolean }} {{ n is integer }} {{ 1.0 is float }} {{ 'A' is upper }} {{ 'n' is filter }}
{% for i in items %}{{ loop.index }}:{{ i }}{{ ',' if not loop.last }}{% endfor %} {% for i in [] %}x{% else %}empty{% endfor %}
{% for i in items if i > 1 %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.length }}{% endfor %}
{% for i in items %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i // 2) }}{{ loop.previtem|default('-') }}{{ loop.nextitem|default('-') }} {% endfor %}
{% for i in items %}{% include 'loop.j2' %}{% endfor %} {% for i in items %}{{ show(loop) }}{{ loop|length }} {% endfor %}
{% for i in items %}{% set l = loop %}{{ l.index }}{{ l.depth }}{{ l.last }}{{ l.revindex }}{{ l.cycle(1, 2) }}{{ l.changed(i) }} {% endfor %}
{% for node in tree recursive %}{{ node.name }}{{ loop.depth }}({{ loop(node.children) }}){% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }}{% endfor %} {% for a, b in pairs %}{{ a }}{{ b }}{{ loop.index }}{% endfor %}
{% for i in range(3) %}{% for j in range(i) %}{{ i }}{{ j }}{{ loop.index }} {% endfor %}{{ loop.index }}{% endfor %}
{% for i in generator() %}{{ i }}{{ loop.last }}{% endfor %} {% for i in generator() %}{{ loop.length }}{% endfor %}
{% set a = 1 %}{% set b, c = 2, 3 %}{{ a }}{{ b }}{{ c }} {% set t %}text {{ n }}{% endset %}{{ t }}{% set u | upper %}up{% endset %}{{ u }}
{% set ns = namespace(x=1, y='a') %}{% for i in items %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ ns.z is defined }}
{% set ns = namespace({'items': 3}) %}{{ ns.items }} {{ ns }}
{% with q = n + 1, r = 2 %}{{ q }}{{ r }}{% endwith %}{{ q is defined }} {% filter upper %}shout {{ s }}{% endfilter %}
{% macro m(a, b=n, c=a) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, 2) }} {{ m(1, c=4) }} {{ m(b=1, a=2) }} {{ m.name }}
{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, x=3) }} {{ m() }} {{ m.arguments }}{{ m.catch_kwargs }}
{% macro m(x) %}{{ caller() }}{{ x }}{% endmacro %}{% call m(3) %}called {{ n }}{% endcall %} {{ m }}
{% macro m() %}{{ caller('p', q=2) }}{% endmacro %}{% call(p, q, r=5) m() %}{{ p }}{{ q }}{{ r }}{% endcall %}
{% macro m(a) %}{{ a }}{% endmacro %}{{ items|map('string')|map('upper')|join }}{{ apply(m, 4) }} {{ [m][0](5) }}
{% import 'macros.j2' as x %}{{ x.f(1) }} {{ x.exported }} {{ x._own is defined }} {{ x|string|trim }} {{ x.nope is defined }}
{% from 'macros.j2' import f, wrap as w, nope %}{{ f(3, c=1) }} {% call(v) w(6) %}{{ v }}{% endcall %} {{ w() }} {{ nope is defined }}
{% import 'macros.j2' as x with context %}{{ x }} {% include 'macros.j2' %} {% include 'macros.j2' without context %}
{% set outer = 1 %}{% include 'uses.j2' %} {% include 'uses.j2' without context ignore missing %} {{ outer }}
{% include 'absent.j2' ignore missing %} {% include ['absent.j2', 'loop_free.j2', 'uses.j2'] %} {% include ['a', 'b'] ignore missing %}
{% include which %} {% include [which, 'x'] %}
{% include 'child.j2' %} {% include 'middle.j2' %} {% include 'base.j2' %}
{% extends 'child.j2' %} {% extends which_base %}{% block head %}dynamic{% endblock %}
{% extends 'base.j2' %}{% block body %}{{ super() }}{{ self.head() }}{{ n }}{% endblock %}
{% if n %}{% extends 'base.j2' %}{% endif %}{% block head %}conditional{% endblock %} never
{% include 'fills.j2' %} {% block alone %}{{ n }}{% endblock %}{{ self.alone() }}
{% for i in items %}{% block inner scoped %}{{ i }}{{ loop.index }}{% endblock %}{% endfor %}
{{ range(3)|list }} {{ dict(a=1) }} {% set c = cycler('x', 'y') %}{{ c.next() }}{{ c.next() }}{{ c.current }} {% set j = joiner('|') %}{{ j() }}a{{ j() }}b
{{ f(1) }} {{ f(x=2) }} {{ f(*items) }} {{ f(**d) }} {{ with_context() }} {{ with_environment() }} {{ stops() is defined }}
{% set hidden = 3 %}{{ with_context() }} {% for i in [1] %}{% set inner = i %}{{ with_context() }}{% endfor %}
{{ vector_type('float', 4) }} {{ 'float16'|ctype }} {{ 0.1|cuda_literal }} {{ 4|define('N') }} {{ 4 is power_of_two }} {{ 6 is aligned(4) }}
{% require n > 1, "n" %}{% unroll 4 %}
{# comment #}{% raw %}{{ raw }}{% endraw %} {{ "quoted }}" }} {{ '''x''' }}
{{ caller is defined }} {{ loop is defined }} {{ self }} {{ namespace is defined }}
{{ nothing }}
{{ nothing.attribute }}
{{ d.missing.deeper }}
{{ n.missing }}
{{ items[99] }}
{{ n() }}
{{ nothing + 1 }}
{% for i in nothing %}{% endfor %}
{% if nothing %}{% endif %}
{% for i in n %}{% endfor %}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m() }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, z=2) }}
{% macro m() %}{{ caller() }}{% endmacro %}{{ m() }}
{% from 'macros.j2' import nope %}{{ nope }}
{% import 'macros.j2' as x %}{{ x.nope() }}
{% include 'absent.j2' %}
{% include ['absent.j2', 'gone.j2'] %}
{% include 'leaves.j2' %}
{% include 'bad.j2' %}
{% extends 'base.j2' %}{% block body %}{{ super.super() }}{% endblock %}
{% extends 'base.j2' %}{% block other %}{{ super() }}{% endblock %}{% block head %}{{ self.other() }}{% endblock %}
{% extends 'base.j2' %}{% extends 'base.j2' %}
{% set n.x = 1 %}
{{ items|join(nothing) }}
{{ 'x'|nosuch if n > 99 else 'skipped' }}
{% if n > 99 %}{{ 'x'|nosuch }}{% endif %}skipped
{% if n > 3 %}{{ 'x'|nosuch }}{% endif %}
{% set l = 1 %}{% for i in items %}{{ loop(i) }}{% endfor %}
{% require n > 99, "n is " ~ n %}
{{ []|first }}
{{ []|max }}
{{ raises() }}
{{ 5|ctype }}
{{ self.nope() }}
{% autoescape true %}{{ '<' }}{{ s|escape }}{% endautoescape %}
{{ '<'|e }} {{ '<'|safe }} {{ '<b>'|striptags }}
""".strip().splitlines()  # fmt: skip


def generator():
    yield from (1, 2, 3)


def raises():
    raise ValueError("its own")


def stops():
    raise StopIteration


@jinja2.pass_context
def with_context(context):
    names = {key for key in ("n", "hidden", "inner", "i") if key in context}
    return (
        f"{sorted(names)}{context['n']}{context.get('hidden')}{context.resolve('inner') is not None and context.name}"
    )


@jinja2.pass_environment
def with_environment(environment):
    return environment.filters["upper"]("a")


class Node:
    def __init__(self, name, *children):
        self.name, self.children = name, children


PARAMS = {
    "n": 7,
    "s": "Tile size",
    "items": [1, 2, 3],
    "d": {"k": 1, "x": 2},
    "rows": [{"k": 1}, {"k": 2}],
    "pairs": [("a", 1), ("b", 2)],
    "tree": [Node("a", Node("b", Node("c")), Node("d"))],
    "f": lambda *args, **kwargs: f"f{args}{kwargs}",
    "show": lambda loop: f"{loop.index}{loop.depth}",
    "apply": lambda function, *args: function(*args),
    "generator": generator,
    "raises": raises,
    "stops": stops,
    "with_context": with_context,
    "with_environment": with_environment,
    "which": "uses.j2",
    "which_base": "base.j2",
}


class Stock(jinja2.Environment):
    """A stock Jinja2 environment with the settings of ours."""

    def __init__(self, ours):
        super().__init__(
            loader=ours.digest_loader,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
            extensions=[type(extension) for extension in ours.extensions.values()],
        )
        self.filters.update(ours.filters)
        self.tests.update(ours.tests)
        self.globals.update(ours.globals)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def stock(folder, source):
    environment = KernelEnvironment(folder)
    try:
        return Stock(environment.jinja()).from_string(source).render(PARAMS)
    except Exception as error:  # noqa: BLE001  (whatever it is, it has to be the same)
        return environment._error(error, "<string>", PARAMS, source=source)


def ours(environment, source):
    try:
        return environment.from_string(source).render(**PARAMS)
    except TemplateError as error:
        return error


def told(outcome):
    if isinstance(outcome, str):
        return outcome
    return str(outcome).replace("cuda_progcache.templates.context.", "").replace("jinja2.runtime.", ""), outcome.line


@pytest.mark.parametrize("source", SOURCES)
def test_text_and_errors_are_jinja2s(folder, tmp_path, source):
    expected = told(stock(folder, source))
    environment = KernelEnvironment(folder, bytecode_cache=BytecodeCache(tmp_path / "cache"))
    assert told(ours(environment, source)) == expected
    again = KernelEnvironment(folder, bytecode_cache=BytecodeCache(tmp_path / "cache"))
    assert told(ours(again, source)) == expected
    if isinstance(expected, str):
        assert again.bytecode_cache.hits > 0
        assert again.bytecode_cache.misses == 0
    with_jinja2 = KernelEnvironment(folder, extensions=["jinja2.ext.loopcontrols"])
    assert told(ours(with_jinja2, source)) == expected


CHILD = """
import json, sys
from cuda_progcache.templates import BytecodeCache, KernelEnvironment
folder, cache, params = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
environment = KernelEnvironment(folder, bytecode_cache=BytecodeCache(cache))
texts = [environment.render(name, **params) for name in sys.argv[4:]]
traced = environment.get_template(sys.argv[4]).render_traced(**params)
assert traced[0] == texts[0]
value = environment.evaluate("n > 1 and s|upper == 'S'", params)
print(json.dumps([texts, traced[1], value, sorted(sys.modules)]))
"""
HEAVY = {
    "jinja2",
    "markupsafe",
    "re",
    "typing",
    "dataclasses",
    "hashlib",
    "pathlib",
    "json.decoder",
    "enum",
    "contextlib",
}


def test_a_hit_in_a_new_process_imports_no_jinja2(tmp_path):
    files = {
        "k.j2": '{% extends "base.j2" %}{% from "m.j2" import f %}{% block b %}{{ f(n) }}{% include "i.j2" %}{% endblock %}',
        "base.j2": "{% block b %}{% endblock %}{% for i in items %}{{ loop.index }}{% if not loop.last %},{% endif %}{% endfor %}",
        "m.j2": "{% macro f(x) %}{{ 'float32'|ctype }} {{ x|string|indent }}{% endmacro %}",
        "i.j2": "{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ s|upper }}{% require n > 1, 'n' %}{% unroll 2 %}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    params = {"n": 4, "s": "s", "items": [1, 2]}
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(tmp_path / "cache"), json.dumps(params), *files]
    command.remove("i.j2")
    outputs = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        outputs.append(json.loads(done.stdout))
    assert outputs[0][:3] == outputs[1][:3]
    assert outputs[1][0][0] == "float 42S#pragma unroll 2\n1,2"
    assert sorted(outputs[1][1]) == sorted(files)
    assert outputs[1][2] is True
    assert "jinja2" in outputs[0][3]
    # The script itself imports json, which imports re and others; the next test checks for those.
    assert not {"jinja2", "markupsafe", "typing", "dataclasses", "hashlib", "pathlib"} & set(outputs[1][3])


def test_a_hit_imports_little_else(tmp_path):
    (tmp_path / "k.j2").write_text("{{ dtype|ctype }} x[{{ n }}];")
    script = (
        "import sys; before = set(sys.modules); from cuda_progcache import KernelEnvironment\n"
        f"text = KernelEnvironment({str(tmp_path)!r}, bytecode_cache={str(tmp_path / 'c')!r}).render('k.j2', dtype='f4', n=2)\n"
        "assert text == 'float x[2];'\n"
        "print(*(name for name in set(sys.modules) - before))"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not HEAVY & loaded
    assert len(loaded) < 40


OWN = [
    "{% region tile(a, b=2, c=n) %}{{ a }}{{ b }}{{ c }}{{ s }};{% endregion %}{{ tile(1) }}{{ tile(1, c=3) }}{{ tile(b=0, a=9) }}",
    "{% globals %}{% set k = n * 2 %}{% macro m(x) %}{{ x }}{{ k }}{% endmacro %}{% endglobals %}{{ k }}{{ m(1) }}",
    "{% imports %}{% from 'macros.j2' import f %}{% endimports %}{{ f(4) }}{% region r() %}{{ f(n) }}{% endregion %}{{ r() }}",
    "{% region tile(a) %}{{ a }}{% endregion %}{{ tile() }}",
    "{% region tile(a) %}{{ missing }}{% endregion %}{{ tile(1) }}",
]


@pytest.mark.parametrize("source", OWN)
def test_our_own_statements(folder, tmp_path, source):
    expected = told(ours(KernelEnvironment(folder, extensions=["jinja2.ext.do"]), source))
    for _ in range(2):
        environment = KernelEnvironment(folder, bytecode_cache=tmp_path / "cache")
        assert told(ours(environment, source)) == expected
        assert environment._templates().from_string(source).__class__ is jinja2.Template
        assert type(environment._templates().from_string(source)) is PlainTemplate
    assert environment.bytecode_cache.hits
    if isinstance(expected, str):
        found = environment.from_string(source).source_map(**PARAMS)
        assert (found.text, found.reason) == (expected, "")


def test_extensions_and_context_functions_find_a_real_environment(folder):
    seen = []

    @jinja2.pass_environment
    def look(environment):
        seen.append(environment.policies["truncate.leeway"])
        return environment.call_filter("upper", "a")

    environment = KernelEnvironment(folder, globals={"look": look})
    assert environment.from_string("{{ look() }}").render() == "A"
    assert seen == [5]
    assert isinstance(environment.jinja(), JinjaEnvironment)


def test_extensions_work(folder, tmp_path):
    for _ in range(2):
        environment = KernelEnvironment(folder, extensions=["jinja2.ext.do"], bytecode_cache=tmp_path / "c")
        assert environment.from_string("{% do items.append(4) %}{{ items }}").render(items=[1]) == "[1, 4]"


def test_a_template_that_needs_jinja2_is_met_in_the_middle(folder, tmp_path):
    (tmp_path / "escaping.j2").write_text("{% autoescape true %}{{ '<' }}{% endautoescape %}")
    for _ in range(2):
        environment = KernelEnvironment([folder, tmp_path], bytecode_cache=tmp_path / "c")
        template = environment.from_string("{{ n }}{% include which %}")
        assert template.render(n=1, which="escaping.j2") == "1&lt;"
        assert template.render_traced(n=1, which="uses.j2")[0] == "1-,1"
        assert environment.evaluate("n + 1", {"n": 1}) == 2

# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501  (a template a line)
"""Jinja2's documented features one by one, and the shapes of real generators of source code."""

from __future__ import annotations

from typing import Any

import jinja2

from ci.differential.ways import Case

LIBRARY = {
    "macros.j2": "{% macro pair(a, b='B') %}<{{ a }}|{{ b }}>{% endmacro %}"
    "{% macro wrap(n=1) %}({{ caller(n) if caller is defined else 'none' }}){% endmacro %}"
    "{% macro f(a, b=2, c=a) %}{{ a }}-{{ b }}-{{ c }};{% endmacro %}"
    "{% set shown = 5 %}{% set _hidden = 1 %}",
    "part.j2": "[{{ x }}{{ loop.index if loop is defined }}{{ local|default('-') }}]",
    "uses.j2": "{{ outer|default('-') }},{{ n }}{% set outer = 5 %}",
    "loop.j2": "{{ loop.index if loop is defined }}/{{ n }} ",
    "broken.j2": "a\n{{ missing.attribute }}",
    "base.j2": "A{% block one %}1{{ x }}{% endblock %}B{% block two scoped %}2{{ y }}{% endblock %}{{ self.one() }}C",
    "middle.j2": "{% extends 'base.j2' %}{% block one %}m{{ super() }}{% endblock %}",
    "required.j2": "{% block need required %}{% endblock %}",
    "fills.j2": "{% extends 'required.j2' %}{% block need %}filled{% endblock %}",
    "leaves.j2": "{% extends 'required.j2' %}",
    "kernel.j2": "{% macro header(name, args) %}void {{ name }}({{ args|join(', ') }}){% endmacro %}"
    "{% macro body() %}{\n{{ caller()|indent(4, true) }}\n}{% endmacro %}",
    "row.j2": "v{{ i }} = {{ row.k }};\n",
}

_EXPRESSIONS = r"""
n + 1; n // 2; n % 3; n ** 2; -n; n / 4; s ~ n ~ 1; n > 3 and s or 4; not n; 1 if n > 3 else 2; ('yes' if n > 30) is defined
d.k; d['k']; d.items()|list; d.missing is defined; items[1]; items[-1]; items[0:2]; s.upper(); [1, 'a']; {'k': n}; (1,)
'a' in s; 3 not in numbers; n == 7 == 7.0; 1 < n < 9; s[0] ~ s[-1]; d.items; thing.a; thing['b']; thing[0]; thing.gone
range(3)|list; dict(a=1); lipsum(1, html=false, min=2, max=2)|length > 3; f(1); f(x=2); f(*xs); f(**d); thing.method(2)
sees(); looks(); with_environment(); with_environment(1); stops() is defined; theirs(1); theirs(b=3, a=1); apply(theirs, 4)
called(1); escaping(); self; caller is defined; loop is defined; undefd is defined; undefd|default(4); f(undefd is undefined)
namespace(x=1).x; their_namespace.q; [undefd]|length; d.nope is defined; rows|map(attribute='gone')|map('default', 0)|list
nothing; nothing.attribute; d.missing.deeper; n.missing; items[99]; n(); nothing + 1; fails(); 5|nosuch; 5 is nosuch
[3,1,3]|unique|map('string')|join(','); 2.5|items|list; {'a': 1}|items|list; [1,2,3]|batch(2)|map('first')|list; 'abc'|map('upper')|join
[1,2]|slice(2)|list; ([1]|select|list, [0]|reject|list); [[1,2],[3]]|map('sum')|list; [1,2]|reverse|list; 'abc'|reverse
[4,1]|sort|first; [3,1,2]|sort(reverse=true)|join; ['b','A']|sort|join; rows|sort(attribute='k', reverse=true)|map(attribute='k')|list
8 in ([32,16,8]|unique|select('gt', 4)); [1,2,3]|select('gt', 1)|list; [1,2,3]|reject('odd')|list; rows|selectattr('k', 'gt', 1)|list|length
rows|rejectattr('k', 'eq', 2)|map(attribute='k')|join('-'); rows|groupby('g')|length; rows|map(attribute='k')|sum; rows|sum(attribute='k')
lists|map('first')|map('default', 'z')|list; lists|map('last')|select('defined')|list; lists|map('length')|list; lists|map('min')|list
[]|first is defined; []|max is defined; []|last; []|min|default('none'); empty|first; empty|max; empty|sum; ''|first is defined
s|upper; s|lower|capitalize; s|title; s|center(20); s|wordcount; s|truncate(5); s|replace('i', 'I', 1); s|indent(2); s|trim; s|urlencode
'<b>'|e; '<b>'|safe; '<b>'|striptags; '<b>'|forceescape; s|wordwrap(4); 'a b'|urlize; {'a': none, 'b': 1}|xmlattr; s|list; s|length
'7'|int; 'x'|int(3); '0x10'|int(0, 16); '2.5'|float; 'x'|float(1.5); 2.567|round(1); 2.4|round(0, 'ceil'); -3|abs; 1000000|filesizeformat
{'b': 1, 'a': 2}|dictsort; {'b': 1, 'a': 2}|dictsort(by='value'); {'a': [1]}|tojson; [1]|pprint; '%s-%s'|format(1, 2); thing|attr('a'); thing|attr('gone') is defined
n is defined; n is odd; n is even; n is divisibleby(7); n is number; n is integer; 1.0 is float; s is string; d is mapping; xs is sequence; xs is iterable
none is none; flag is boolean; flag is true; flag is false; n is eq(7); n is sameas(n); nothing is sameas(nothing); 'upper' is filter; 'odd' is test; f is callable; 'a' is lower; 'A' is upper; 3 is in(xs); '<' is escaped
'float16'|ctype; 0.1|cuda_literal; 4|define('N'); 4 is power_of_two; 6 is aligned(4); vector_type('float', 4); 5|ctype; 'flot'|ctype
xs|map('multiply')|list; xs|map; xs|select('nosuch')|list; xs|map('string')|first; xs|map('round', 1)|list; xs|map('default', boolean=true)|list; xs|map(attribute='real')|list; xs|map('attr', 'real')|list
"""
_FOLDED = r"""
none[1:3] is iterable; none[1:3] == 1; not none[1:2]; none[1:] ~ 'a'; [none[1:2]]|length; none.x|default(3); none[1:3]|default('d')
none[1:3]; (1 if none[1:2] else 2); [1, none.x]|first; [none.x]|first is defined; {'k': none.x}.k is defined; none.x is none
none.x in [1]; none.x and 1; none.x or 1; (none.x, 1)|list|length; none.x|string|length; none.x == none.y; 1 < none.x; none.x + 1
"""
_STATEMENTS = r"""
{% if n == 1 %}a{% elif n == 7 %}b{% else %}c{% endif %} {% if x %}{% endif %} {% if nothing %}{% endif %}
{% for i in items %}{{ loop.index }}:{{ i }}{{ ',' if not loop.last }}{% endfor %} {% for i in [] %}x{% else %}empty{% endfor %}
{% for i in xs if i > 1 %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.length }}{% endfor %}
{% for i in xs %}{{ loop.cycle('a', 'b') }}{{ loop.changed(i // 2) }}{{ loop.previtem|default('-') }}{{ loop.nextitem|default('-') }} {% endfor %}
{% for i in xs %}{% include 'loop.j2' %}{% endfor %} {% for i in xs %}{{ show(loop) }}{{ loop|length }} {% endfor %}
{% for i in xs %}{% set l = loop %}{{ l.index }}{{ l.depth }}{{ l.last }}{{ l.revindex }}{{ l.cycle(1, 2) }}{{ l.changed(i) }} {% endfor %}
{% for i in [1, 2, 3] %}{{ loop.changed(nothing) }}{% endfor %}
{% for i in [1, 2] %}{{ [1,2]|batch(1)|map('first')|list }}{% endfor %}
{% for x in [[],[1]]|map('first') %}{{ x is defined }},{% endfor %}
{% for node in tree recursive %}{{ node.name }}{{ loop.depth }}({{ loop(node.children) }}){% else %}{{ leaf }}{{ x }}{% endfor %}
{% for node in tree recursive %}{{ node.name }}{{ x }}{{ loop(node.children) }}{% else %}.{{ sees() }}{{ x }}{% endfor %}
{% for k, v in d.items() %}{{ k }}={{ v }}{% endfor %} {% for a, b in pairs %}{{ a }}{{ b }}{{ loop.index }}{% endfor %}
{% for i in range(3) %}{% for j in range(i) %}{{ i }}{{ j }}{{ loop.index }} {% endfor %}{{ loop.index }}{% endfor %}
{% for i in produced %}{{ i }}{{ loop.last }}{% endfor %} {% for i in produced %}{{ loop.length }}{% endfor %}
{% for i in xs|select('odd') %}{{ i }}{{ loop.last }}{% endfor %}{% for i in xs|map('string') %}{{ i }}{% endfor %}
{% for i in xs %}{% set a = f(i) %}{{ a }}{{ sees('a') }}{% endfor %}{% for i in xs %}{% set _ = items.append(i) %}{% endfor %}{{ items }}
{% for i in xs %}{% if i == 1 %}{% set q = 1 %}{% endif %}{{ q is defined }}{% endfor %}
{% set a = 1 %}{% set b, c = 2, 3 %}{{ a }}{{ b }}{{ c }} {% set t %}text {{ n }}{% endset %}{{ t }}{% set u | upper %}up{% endset %}{{ u }}
{% set ns = namespace(x=1, y='a') %}{% for i in xs %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ ns.z is defined }}
{% set ns = namespace({'items': 3}) %}{{ ns.items }} {{ ns }} {% set their_namespace.q = 9 %}{{ their_namespace.q }} {% set n.x = 1 %}
{% with q = n + 1, r = 2 %}{{ q }}{{ r }}{% endwith %}{{ q is defined }} {% filter upper %}shout {{ s }}{% endfilter %}
{% if false %}{% with a = x|nofilter %}{{ a }}{% endwith %}{% endif %}{% if false %}{{ x|nofilter }}{% endif %}kept
{% if false %}{% for i in x|nofilter %}{% endfor %}{% endif %}{% if x is nosuch %}{% endif %}
{% macro m(a, b=n, c=a) %}{{ a }}{{ b }}{{ c }}{% endmacro %}{{ m(1) }} {{ m(1, 2) }} {{ m(1, c=4) }} {{ m(b=1, a=2) }} {{ m.name }}
{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, 2, x=3) }} {{ m() }} {{ m.arguments }}{{ m.catch_kwargs }}
{% macro m(x) %}{{ caller() }}{{ x }}{% endmacro %}{% call m(3) %}called {{ n }}{% endcall %} {{ m }}
{% macro m() %}{{ caller('p', q=2) }}{% endmacro %}{% call(p, q, r=5) m() %}{{ p }}{{ q }}{{ r }}{% endcall %}
{% macro m(a) %}{{ a }}{% endmacro %}{{ xs|map('string')|map('upper')|join }}{{ apply(m, 4) }} {{ [m][0](5) }}
{% macro m(a) %}{{ a is defined }}{{ a|default('-') }}{% endmacro %}{{ m() }}{{ m(nothing) }}{{ m(undefd) }}{{ m([]|first) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m() }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, 2) }}
{% macro m(a) %}{{ a }}{% endmacro %}{{ m(1, z=2) }}
{% macro m() %}{{ caller() }}{% endmacro %}{{ m() }}
{% macro m(n) %}{{ n }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}{% set m = f %}{{ m(1) }}
{% import 'macros.j2' as x %}{{ x.f(1) }} {{ x.shown }} {{ x._hidden is defined }} {{ x|string|trim }} {{ x.nope is defined }}
{% from 'macros.j2' import f, wrap as w, nope %}{{ f(3, c=1) }} {% call(v) w(6) %}{{ v }}{% endcall %} {{ w() }} {{ nope is defined }}
{% from 'macros.j2' import nope %}{{ nope }}
{% import 'macros.j2' as x %}{{ x.nope() }}
{% import 'macros.j2' as x with context %}{{ x }} {% include 'macros.j2' %} {% include 'macros.j2' without context %}
{% set outer = 1 %}{% include 'uses.j2' %} {% include 'uses.j2' ignore missing %} {{ outer }}
{% include 'absent.j2' ignore missing %} {% include ['absent.j2', 'loop.j2', 'uses.j2'] %} {% include ['a', 'b'] ignore missing %}
{% include which %} {% include [which, 'x'] %} {% include [undefd, 'part.j2'] %} {% include none ignore missing %}
{% include 'absent.j2' %}
{% include ['absent.j2', 'gone.j2'] %}
{% include [] %}
{% include nothing %}
{% include nothing ignore missing %}
{% include 'leaves.j2' %}
{% include 'broken.j2' %}
{% include 'fills.j2' %} {% block alone %}{{ n }}{% endblock %}{{ self.alone() }}
{% extends 'base.j2' %}{% block one %}{{ super() }}{{ n }}{% endblock %}{% block two %}{{ self.one() }}{{ super() }}{% endblock %}
{% extends 'middle.j2' %}{% block one %}child({{ super() }},{{ super.super() }}){% endblock %}
{% extends which_base %}{% block one %}dynamic{% endblock %}
{% if n %}{% extends 'base.j2' %}{% endif %}{% block one %}conditional{% endblock %} never
{% extends 'base.j2' %}{% block one %}{{ super.super() }}{% endblock %}
{% extends 'base.j2' %}{% extends 'base.j2' %}
{% extends nothing %}
{% for i in xs %}{% block inner scoped %}{{ i }}{{ loop.index }}{% endblock %}{% endfor %}
{% autoescape true %}{{ '<' }}{{ y }}{% set a = '<' %}{{ a }}{% endautoescape %}{% autoescape false %}{{ y }}{% endautoescape %}
{% autoescape flag %}{{ none }}{{ '<' }}{{ y }}{{ 1 }}{{ y ~ '<' }}{% endautoescape %}{{ y }}
{# comment #}{% raw %}{{ raw }}{% endraw %} {{ "quoted }}" }} {{ '''x''' }}{{- x -}} {%- if x -%} y {%- endif -%} z
{% set c = cycler('x', 'y') %}{{ c.next() }}{{ c.next() }}{{ c.current }} {% set j = joiner('|') %}{{ j() }}a{{ j() }}b
{% set hidden = 3 %}{{ sees('hidden') }} {% for i in [1] %}{% set inner = i %}{{ sees('inner') }}{{ sees('i') }}{% endfor %}
{{ changes() }}{{ x }}{% for i in xs %}{{ x }}{{ changes() }}{% endfor %}{% macro m() %}{{ x }}{{ changes('y') }}{{ y }}{% endmacro %}{{ m() }}
"""
#: What a kernel environment has otherwise, or not at all.
_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("{% for i in xs %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i == 3 %}{% break %}{% endif %}{% endfor %}", {"extensions": ["jinja2.ext.loopcontrols"]}),
    ("{% do xs.append(4) %}{{ xs }}{% for i in xs %}{% do items.append(i) %}{% endfor %}{{ items }}", {"extensions": ["jinja2.ext.do"]}),
    ("{% trans %}hello {{ x }}{% endtrans %}{% trans count=n %}one{% pluralize %}{{ count }} many{% endtrans %}", {"extensions": ["jinja2.ext.i18n"]}),
    ("{{ none }}{{ x }}{{ 1 }}{% autoescape flag %}{{ none }}{{ '<' }}{{ y }}{% endautoescape %}", {"finalize": lambda value: "-" if value is None else value}),
    ("{{ none }}{{ '<' }}{{ y }}", {"finalize": lambda value: "<-" if value is None else value, "autoescape": True}),
    ("{{ nothing }}{{ nothing.a.b }}{{ nothing|default('d') }}", {"undefined": jinja2.ChainableUndefined}),
    ("{{ nothing }}{{ d.gone }}", {"undefined": jinja2.DebugUndefined}),
    ("{{ y }}{{ '<' }}{{ ('<'|safe) ~ y }}", {"autoescape": lambda name: name is None}),
    ("{{ [3, 1]|sort|join }}{% set a = 1 + 1 %}{{ a }}{{ 'a'|upper }}", {"optimized": False}),
]  # fmt: skip

FEATURES = [
    *(Case(f"{{{{ {expression.strip()} }}}}", options)
      for line in (_EXPRESSIONS + _FOLDED).strip().splitlines() for expression in line.split(";")
      for options in ({}, {"autoescape": True, "undefined": jinja2.StrictUndefined})),
    *(Case(line, options) for line in _STATEMENTS.strip().splitlines()
      for options in ({}, {"autoescape": True, "undefined": jinja2.StrictUndefined})),
    *(Case(source, options, kernel=False) for source, options in _OPTIONS),
    Case("".join(f"{{{{ v{n} }}}}" for n in range(80)) + "{{ changes('x') }}{{ x }}{{ v3 is defined }}"),
]  # fmt: skip

_LINES = {"line_statement_prefix": "%%", "line_comment_prefix": "//%", "trim_blocks": True, "lstrip_blocks": True}
_OWN = {
    "block_start_string": "/*%", "block_end_string": "%*/", "variable_start_string": "@{", "variable_end_string": "}@",
    "comment_start_string": "/*#", "comment_end_string": "#*/", "undefined": jinja2.StrictUndefined,
}  # fmt: skip
_SHAPES: list[tuple[str, dict[str, Any], bool]] = [
    (
        """{%- macro arg(type, name) -%}{{ type ~ ' ' ~ name ~ '_' ~ n }}{%- endmacro -%}
{%- macro function(name, args) -%}
{{ 'static ' ~ 'void' }} {{ name }}({%- for t, v in args -%}{{ arg(t, v) }}{{ ', ' if not loop.last }}{%- endfor -%})
{
{{ caller()|indent(4, true) }}
}
{%- endmacro -%}
{% set ns = namespace(count=0, used=[]) %}
{% for i in range(n) %}
{% call function('step_' ~ i, [('int', 'a'), ('float*', 'b')]) %}
{% set reg = 'r' ~ ns.count %}
int {{ reg }} = {{ i * 2 }};
{% for j in range(2) %}
{% set ns.count = ns.count + 1 %}
{{ 'b[' ~ j ~ '] += ' ~ reg ~ ';' }}
{% endfor %}
{% set _ = ns.used.append(reg) %}
{%- endcall %}

{% endfor %}
// {{ ns.used|join(' ') }} {{ ns.count }}
""",
        {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True},
        True,
    ),
    (
        """{% from 'kernel.j2' import header, body %}
{% set args %}int a, int b{% endset %}
{{ header('k', [args, 'int c']) }}
{% call body() %}
{% for row in rows %}
{% set i = loop.index0 %}
{% include 'row.j2' %}
{% endfor %}
{% call body() %}inner {{ x }}{% endcall %}
{% endcall %}
{% import 'kernel.j2' as k with context %}{{ k.header('q', ['int']) }};
""",
        {"trim_blocks": True, "lstrip_blocks": True},
        True,
    ),
    (
        """%% set total = namespace(v=0)
%% for row in rows
  v[{{ loop.index0 }}] = {{ row.k }};  //% a comment
%%   set total.v = total.v + row.k
%% endfor
%% if total.v > 5
sum = {{ total.v }};
%% endif
%% macro twice(v)
{{ v ~ v }}
%% endmacro
{{ twice('ab') }}
""",
        _LINES,
        False,
    ),
    (
        """/*# header #*/
#define N @{ n }@
/*% for i in range(2) %*/
static int a@{ i }@[] = { /*% for v in xs %*/@{ v }@/*% if not loop.last %*/, /*% endif %*//*% endfor %*/ };
/*% endfor %*/
/*% macro m(a) %*/(@{ a }@)/*% endmacro %*/@{ m(1) ~ m(x) }@
@{ gone }@
""",
        _OWN,
        False,
    ),
    (
        """{% set fields = [] %}{% for row in rows %}{% do fields.append(row.g ~ loop.index) %}{% endfor %}
{% macro emit(names) %}{% for n in names recursive %}{% if n is string %}{{ n }};{% else %}{ {{ loop(n) }} }{% endif %}{% endfor %}{% endmacro %}
{{ emit([fields, 'last', [['deep']]]) }}
{% block decl %}{% for f in fields %}int {{ f }};{% endfor %}{% endblock %}
{{ self.decl() }}
""",
        {"extensions": ["jinja2.ext.do"]},
        False,
    ),
    (
        """{% macro outer(a) %}<{{ caller(a) }}{% for q in [1, 2] %}{{ caller(q) }}{% endfor %}>{% endmacro %}
{% macro inner(b) %}[{{ caller() }}{{ b }}]{% endmacro %}
{% for r in rows %}{% call(v) outer(r.k) %}{% call inner(v) %}{{ r.g }}{{ loop.index }}{{ v }}{% endcall %}{% endcall %}{% endfor %}
""",
        {},
        True,
    ),
]
SHAPES = [Case(source, options, kernel=kernel) for source, options, kernel in _SHAPES]

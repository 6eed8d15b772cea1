# SPDX-License-Identifier: Apache-2.0
"""Templates: our compiler compared with Jinja2's, in CPU time.

Both render the same text from the same variables; this is checked before the measurement.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, Benchmark, ratio

JINJA2 = "Jinja2"

GEMM = """\
// {{ name }}: tiles {{ cfg.tile_m }} x {{ cfg.tile_n }} x {{ cfg.tile_k }}
{% macro load(to, source, i, j) %}
    {{ to }}[{{ i }}][{{ j }}] = {{ source }}[{{ i }} * ld + {{ j }}];
{% endmacro %}
{% macro guarded(condition) -%}
    if ({{ condition }})
{%- endmacro %}
{% set threads = (cfg.tile_m // cfg.thread_m) * (cfg.tile_n // cfg.thread_n) %}
#define TILE_M {{ cfg.tile_m }}
#define TILE_N {{ cfg.tile_n }}
#define THREADS {{ threads }}
extern "C" __global__ void {{ name }}(const {{ cfg.dtype }}* a, const {{ cfg.dtype }}* b, {{ cfg.dtype }}* c, int n)
{
    {% for i in range(cfg.thread_m) %}
    {{ cfg.dtype }} a{{ i }};
    {% endfor %}
    {% for j in range(cfg.thread_n) %}
    {{ cfg.dtype }} b{{ j }};
    {% endfor %}
    {% for i in range(cfg.thread_m) %}
    {% for j in range(cfg.thread_n) %}
    {{ cfg.dtype }} c{{ i }}_{{ j }} = 0;
    {% endfor %}
    {% endfor %}
    for (int kk = 0; kk < k; kk += {{ cfg.tile_k }}) {
    {% for stage in range(cfg.stages) %}
        // stage {{ loop.index }} of {{ loop.length }}
        {% for i in range(cfg.thread_m) %}
        {{ load("as", "a", i, stage) }}
        {% endfor %}
        {% for j in range(cfg.thread_n) %}
        {{ load("bs", "b", stage, j) }}
        {% endfor %}
    {% endfor %}
    {% for q in range(cfg.tile_k) %}
        {% for i in range(cfg.thread_m) %}
        a{{ i }} = as[{{ q }}][threadIdx.y * {{ cfg.thread_m }} + {{ i }}];
        {% endfor %}
        {% for j in range(cfg.thread_n) %}
        b{{ j }} = bs[{{ q }}][threadIdx.x * {{ cfg.thread_n }} + {{ j }}];
        {% endfor %}
        {% for i in range(cfg.thread_m) %}
        {% for j in range(cfg.thread_n) %}
        c{{ i }}_{{ j }} += a{{ i }} * b{{ j }};
        {% endfor %}
        {% endfor %}
    {% endfor %}
    }
    {% for i in range(cfg.thread_m) %}
    {% for j in range(cfg.thread_n) %}
    {{ guarded("row + %d < n" % i) }} c[{{ i }} * n + {{ j }}] = {% if relu %}relu(c{{ i }}_{{ j }}){% endif %};
    {% endfor %}
    {% endfor %}
}
"""
SHAPE = {"tile_m": 128, "tile_n": 128, "tile_k": 16, "thread_m": 8, "thread_n": 8, "stages": 2, "dtype": "float"}
LOOP = """\
<ul>
{% for item in items %}
<li class="{{ loop.cycle("odd", "even") }}">{{ loop.index }}: {{ item.name }} {{ item.price }}</li>
{% if not loop.last %}, {% endif %}
{% endfor %}
</ul>
"""
PAGES = {
    "base": "<html>{% block head %}<title>{% block title %}T{% endblock %}</title>{% endblock %}"
    "<body>{% block body %}{% endblock %}</body></html>",
    "middle": "{% extends 'base' %}{% block body %}<div>{% block content %}{% endblock %}</div>{% endblock %}",
    "macros": "{% macro field(name, value='', type='text') %}"
    "<input name='{{ name }}' value='{{ value }}' type='{{ type }}'>{% endmacro %}",
    "part": "<p>{{ user }}</p>",
    "page": "{% extends 'middle' %}{% block title %}{{ super() }} - {{ title }}{% endblock %}"
    "{% block content %}{% include 'part' %}{% from 'macros' import field %}"
    "{{ field('a') }}{{ field('b', title) }}{% endblock %}",
}
MACROS = """\
{% macro cell(x, y=0) %}<td>{{ x }}{{ y }}</td>{% endmacro %}
{% macro row(xs) %}<tr>{% for x in xs %}{{ cell(x) }}{{ cell(x, y=1) }}{% endfor %}</tr>{% endmacro %}
{% for xs in rows %}{{ row(xs) }}{% endfor %}
"""


# Constructs of real generators of host code: call blocks in macros, chains of ~, counters in a namespace, lists that
# are appended to, captured text, includes in loops.
GENERATOR = """\
{% from "signature" import argument, function %}
{% set ns = namespace(count=0) %}
{% set used = [] %}
{% for op in ops %}
{% set body %}
{% for a in op.args if a.kind != "skip" %}
  {{ argument(a.type, a.name ~ "_" ~ loop.index) }};
{% endfor %}
{% endset %}
{% call(indent) function(op.name ~ "_" ~ op.dtype, op.args) %}
{{ body | indent(indent) }}
{% for a in op.args %}
{% set register = "r" ~ ns.count %}
{% set _ = used.append(register) %}
{% set ns.count = ns.count + 1 %}
{% if a.type is string and not loop.last %}
{{ register ~ " = " ~ a.name ~ "[" ~ (loop.index0 * 4) ~ "];" }}
{% endif %}
{% include "row" %}
{% endfor %}
{% endcall %}
{% endfor %}
// {{ used | join(" ") }} {{ ops | map(attribute="name") | unique | join(",") }}
"""
GENERATOR_PARTS = {
    "signature": """\
{% macro argument(type, name) %}{{ type }} {{ name }}{% endmacro %}
{% macro function(name, args) %}
static void {{ name }}({% for a in args %}{{ argument(a.type, a.name) }}{{ ", " if not loop.last }}{% endfor %})
{
{{ caller(4) }}
}
{% endmacro %}
""",
    "row": "emit({{ a.name }}, {{ register }}, {{ op.name | upper }});\n",
}
CALLS = """\
{% macro box(title) %}<{{ title }}>{{ caller(title) }}</{{ title }}>{% endmacro %}
{% macro line(n) %}[{{ caller() }}{{ n }}]{% endmacro %}
{% for i in numbers %}{% call(t) box(i) %}{% call line(t) %}{{ i ~ t }}{% endcall %}{% endcall %}{% endfor %}
"""
LISTS = """\
{% set found = [] %}
{% for i in numbers %}{% set _ = found.append(i) %}{% set twice = double(i) %}{{ twice }}{% endfor %}
{% for i in numbers | select("odd") %}{{ i }}{% endfor %}{{ numbers | map("string") | first }}{{ found | length }}
"""


@dataclass(frozen=True)
class Case:
    """A template and its variables, for either environment."""

    source: str
    variables: Mapping[str, Any]
    templates: Mapping[str, str] | None = None
    options: Mapping[str, Any] | None = None
    kernel: bool = False

    def environment(self, side: str) -> Any:
        """Return the environment of a side."""
        import jinja2

        from cuda_progcache.templates import Environment, KernelEnvironment

        if self.kernel and side == OURS:
            return KernelEnvironment(_folder(self.templates or {}))
        kind = Environment if side == OURS else jinja2.Environment
        loader: Any = jinja2.DictLoader(dict(self.templates or {}))
        if self.kernel:
            loader = jinja2.FileSystemLoader(_folder(self.templates or {}))
        return kind(loader=loader, trim_blocks=True, lstrip_blocks=True, **(self.options or {}))

    def rendering(self, side: str) -> Callable[[], str]:
        """Return a function that renders the template."""
        template = self.environment(side).from_string(self.source)
        variables = dict(self.variables)
        return lambda: str(template.render(**variables))

    def streaming(self, side: str) -> Callable[[], str]:
        """Return a function that streams the template to its end."""
        template = self.environment(side).from_string(self.source)
        stream = template.render_stream if side == OURS else template.generate
        return lambda: "".join(list(stream(self.variables)))

    def compiling(self, side: str) -> Callable[[], str]:
        """Return a function that compiles the template from text to a code object."""
        environment = self.environment(side)

        def compile_it() -> str:
            environment.compile(self.source)
            return ""

        return compile_it


def _folder(templates: Mapping[str, str]) -> str:
    """Write templates into a directory that lasts as long as the process; return its path."""
    import tempfile

    folder = tempfile.TemporaryDirectory(prefix="bench-templates-")
    _folders.append(folder)
    for name, source in templates.items():
        (Path(folder.name) / name).write_text(source, encoding="utf-8")
    return folder.name


_folders: list[Any] = []


def _samples(case: Case, what: str, calls: int, directory: Path, effort: float) -> Mapping[str, Sequence[float]]:
    """Return the CPU seconds of each call; a round calls one side and then the other."""
    del directory  # nothing is written
    sides = {side: getattr(case, what)(side) for side in (OURS, JINJA2)}
    ours, theirs = (side() for side in sides.values())
    assert ours == theirs, "both sides must give the same text"
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for side in sides.values():
        for _ in range(20):
            side()
    gc.collect()
    for _ in range(max(3, round(60 * effort))):
        for name, side in sides.items():
            start = time.process_time_ns()
            for _ in range(calls):
                side()
            seconds[name].append((time.process_time_ns() - start) * 1e-9 / calls)
    return seconds


def _benchmark(name: str, what: str, most: float, case: Case, kind: str, calls: int = 5) -> Benchmark:
    return Benchmark(f"templates.{name}", what, ratio(most, JINJA2), samples=partial(_samples, case, kind, calls))


_items = [{"name": f"item {number}", "price": number} for number in range(1000)]
_gemm = Case(GEMM, {"cfg": SHAPE, "name": "gemm", "relu": True})
_loop = Case(LOOP, {"items": _items})
_page = Case(PAGES["page"], {"title": "t", "user": "u"}, PAGES)
_strict = {"keep_trailing_newline": True}
_ops = [
    {"name": f"op{n % 5}", "dtype": "f32", "args": [{"kind": "k", "type": "int", "name": f"a{i}"} for i in range(6)]}
    for n in range(20)
]
_numbers = {"numbers": list(range(200)), "double": lambda n: n * 2}
_generator = Case(GENERATOR, {"ops": _ops}, GENERATOR_PARTS)
_kernel_generator = Case(GENERATOR, {"ops": _ops}, GENERATOR_PARTS, _strict, kernel=True)
_names = Case("".join(f"{{{{ v{number} }}}}" for number in range(3000)), {})
_macros = Case(MACROS, {"rows": [list(range(10))] * 50})

BENCHMARKS = tuple(
    starmap(
        _benchmark,
        (
            ("render_gemm", "render a GEMM of 70 lines to 1,600", 0.25, _gemm, "rendering"),
            ("render_loop", "render a loop over 1000 dicts", 0.2, _loop, "rendering"),
            (
                "render_loop_escaped",
                "the same with autoescape",
                0.2,
                Case(LOOP, {"items": _items}, options={"autoescape": True}),
                "rendering",
            ),
            ("render_inheritance", "render extends three deep, include, from-import", 0.75, _page, "rendering", 100),
            ("render_macros", "render 1000 calls of macros in macros", 0.75, _macros, "rendering"),
            ("render_generator", "render a generator of host code, of many macros", 1.0, _generator, "rendering"),
            ("render_generator_kernel", "the same in a KernelEnvironment", 1.0, _kernel_generator, "rendering"),
            ("render_calls", "render 400 call blocks, one in another", 1.0, Case(CALLS, _numbers), "rendering"),
            ("render_lists", "render loops that append, set and filter", 1.0, Case(LISTS, _numbers), "rendering"),
            (
                "render_lists_kernel",
                "the same in a KernelEnvironment",
                1.0,
                Case(LISTS, _numbers, options=_strict, kernel=True),
                "rendering",
            ),
            ("compile_generator", "compile the generator, text to code", 1.0, _generator, "compiling"),
            ("compile_names", "compile a template of 3000 names", 1.0, _names, "compiling", 1),
            ("stream_loop", "stream a loop over 1000 dicts, drained", 0.25, _loop, "streaming"),
            ("compile_gemm", "compile the GEMM, text to code", 0.9, _gemm, "compiling", 1),
            ("compile_loop", "compile the loop, text to code", 0.9, _loop, "compiling"),
        ),
    )
)

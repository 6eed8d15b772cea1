# SPDX-License-Identifier: Apache-2.0
"""Templates: our compiler beside Jinja2's, in CPU time.

Both render the same text from the same variables, which is checked before anything is timed.
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


@dataclass(frozen=True)
class Case:
    """A template with its variables, for either environment."""

    source: str
    variables: Mapping[str, Any]
    templates: Mapping[str, str] | None = None
    options: Mapping[str, Any] | None = None

    def environment(self, side: str) -> Any:
        """Make the environment of a side."""
        import jinja2

        from cuda_progcache.templates import Environment

        kind = Environment if side == OURS else jinja2.Environment
        loader = jinja2.DictLoader(dict(self.templates or {}))
        return kind(loader=loader, trim_blocks=True, lstrip_blocks=True, **(self.options or {}))

    def rendering(self, side: str) -> Callable[[], str]:
        """What renders."""
        template = self.environment(side).from_string(self.source)
        return lambda: str(template.render(self.variables))

    def streaming(self, side: str) -> Callable[[], str]:
        """What streams, drained."""
        template = self.environment(side).from_string(self.source)
        stream = template.render_stream if side == OURS else template.generate
        return lambda: "".join(list(stream(self.variables)))

    def compiling(self, side: str) -> Callable[[], str]:
        """What compiles, from text to code object."""
        environment = self.environment(side)

        def compile_it() -> str:
            environment.compile(self.source)
            return ""

        return compile_it


def _samples(case: Case, what: str, calls: int, directory: Path, effort: float) -> Mapping[str, Sequence[float]]:
    """CPU seconds a call; each round calls one side and then the other."""
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
            ("stream_loop", "stream a loop over 1000 dicts, drained", 0.25, _loop, "streaming"),
            ("compile_gemm", "compile the GEMM, text to code", 0.9, _gemm, "compiling", 1),
            ("compile_loop", "compile the loop, text to code", 0.9, _loop, "compiling"),
        ),
    )
)

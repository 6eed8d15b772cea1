# SPDX-License-Identifier: Apache-2.0
"""Random templates: statements within statements, with expressions that mix filters, tests, calls and operators."""

from __future__ import annotations

import re
from functools import partial
from random import Random

NAMES = ["x", "y", "items", "numbers", "xs", "d", "thing", "whole", "flag", "none", "unknown", "local", "i", "m"]
LITERALS = [
    "1",
    "2.5",
    "'t'",
    "'<&>'",
    "true",
    "none",
    "[1, 2]",
    "[3, 1, 3]",
    "{'a': 1}",
    "(1, 'z')",
    "''",
    "[[], [1]]",
]
ATTRIBUTES = ["a", "b", "n", "items", "missing", "a.b", "n.a"]
LOOP = ["index", "index0", "first", "last", "length", "revindex", "depth", "previtem", "nextitem"]
FILTERS = [
    *(
        "upper",
        "length",
        "default('dd')",
        "string",
        "e",
        "safe",
        "list",
        "first",
        "last",
        "sort",
        "reverse|list",
        "join",
    ),
    *("unique", "unique|list", "map('string')|join(',')", "select|list", "select('odd')|list", "reject('none')|list"),
    *("batch(2)", "batch(2)|map('first')|list", "slice(2)|list", "items", "items|list", "map('upper')", "max", "min"),
    *(
        "sum",
        "tojson",
        "replace('a', 'b')",
        "indent(2)",
        "int",
        "abs",
        "trim",
        "title",
        "center(9)",
        "pprint",
        "attr('a')",
    ),
    *("map('string')", "select('defined')", "map('default', 'z')|join", "groupby('k')|list", "dictsort", "xmlattr"),
    *("attr('a')", "join"),
]
TESTS = ["defined", "none", "number", "mapping", "odd", "undefined", "iterable", "string", "sameas none", "in [1, 3]"]
OPERATORS = ["+", "-", "*", "//", "%", "~", "and", "or", "==", "<", "in", "not in", "**"]
CALLS = [
    *("f(1)", "f(x, k=y)", "sees()", "sees('local')", "sees('i')", "changes()", "changes('local')", "escaping()"),
    *("stops()", "fails()", "thing.method(1)", "range(3)", "m(1)", "m(1, 2)", "m(x, b=y)", "m(b=1)", "m(1, 2, 3)"),
    *("m()", "m(c=1)", "caller()", "namespace(q=1).q", "dict(a=1).a", "super()", "self.one()", "loop.cycle('p', 'q')"),
    *("loop.changed(x)", "loop.changed(unknown)", "loop", "pair(1)", "lib.pair(1)", "lib.shown", "unknown()"),
    *("theirs(1)", "theirs(x, b=y)", "apply(m, 1)", "called(x)", "with_environment()", "looks()", "their_namespace.q"),
    *("xs.append(x)", "[x].append(1)", "xs.pop()", "apply(f, unknown)", "f(undefd)", "undefd", "undefd is defined"),
]
TEXTS = ["text", "<b>", "\n", " {# c #}", "a\nb", "{{ '' }}", "int a;\n", "#define "]
ITERABLES = [
    *("items", "numbers", "empty", "produced", "[1, 2, 3]", "pairs", "range(x)", "d", "none", "y", "xs|reverse"),
    *("lists|map('first')", "rows|selectattr('k')", "range(3)|select('odd')", "[1, 2]|batch(1)", "unknown"),
]
INCLUDES = ["'part.j2'", "'gone' ignore missing", "['gone', 'part.j2']", "'broken.j2'", "which", "[undefd, 'part.j2']"]
CHOICES = {
    "target": ["i", "i", "x", "(i, local)"],
    "iterable": ITERABLES,
    "set": ["x", "local", "i", "m"],
    "literal": LITERALS,
    "filter": ["upper", "indent", "trim"],
    "escape": ["true", "false", "flag"],
    "include": INCLUDES,
}
FORMS = [
    "{% if @expr %}@body{% endif %}",
    "{% if @expr %}@body{% elif @expr %}@body{% else %}@body{% endif %}",
    *["{% for @target in @iterable %}@body{% endfor %}"] * 3,
    "{% for i in @iterable if @expr %}@body{% else %}@body{% endfor %}",
    "{% for i in [1, [2, 3]] recursive %}@body{{ loop(i) if i is iterable }}{% endfor %}",
    "{% set @set = @expr %}",
    "{% set x, local = @expr, @expr %}",
    "{% set ns = namespace(v=0) %}{% for i in xs %}{% set ns.v = @expr %}{% endfor %}{{ ns.v }}",
    "{% set local %}@body{% endset %}",
    "{% set local | upper %}@body{% endset %}",
    "{% macro m(a, b=@literal) %}@body{{ a }}{{ b }}{% endmacro %}",
    "{% macro m(a) %}@body{{ caller(a) if caller }}{{ varargs }}{{ kwargs }}{% endmacro %}",
    "{% call(q) m(@expr) %}@body{{ q }}{% endcall %}",
    "{% call m(1) %}@body{% endcall %}",
    "{% filter @filter %}@body{% endfilter %}",
    "{% with local = @expr, i = x %}@body{% endwith %}",
    "{% autoescape @escape %}@body{% endautoescape %}",
    "{% include @include %}",
]
FIXED = [
    "{% from 'macros.j2' import pair, shown %}",
    "{% import 'macros.j2' as lib with context %}",
    "{% import 'macros.j2' as lib %}",
    "{% from 'macros.j2' import gone %}{{ gone }}",
    "{% include none ignore missing %}",
    "{% if false %}{% with q = x|nofilter %}{{ q }}{% endwith %}{% endif %}",
    "{% for i in [1, [2, 3]] recursive %}{{ loop(i) if i is iterable else i }}{% else %}{{ leaf }}{% endfor %}",
    "{% for i in lists|map('first') %}{{ i is defined }},{% endfor %}",
]


class Grammar:
    """Makes templates.

    Parameters
    ----------
    random : random.Random
        What decides; the same seed makes the same templates.
    """

    def __init__(self, random: Random) -> None:
        self.random = random
        self._budget = 0

    def template(self) -> str:
        """Return a template."""
        self._budget = self.random.randint(3, 26)
        body = self.body()
        kind = self.random.choice(["plain", "plain", "plain", "blocks", "child", "grandchild", "dynamic"])
        if kind == "plain":
            # Elsewhere, in a macro or a captured text, Jinja2's comes out as a generator.
            return body + self.random.choice([""] * 9 + ["{% include 'part.j2' without context %}"])
        first, second = self.body(), self.body()
        blocks = f"{{% block one %}}{first}{{% endblock %}}{{% block two scoped %}}{second}{{% endblock %}}"
        if kind == "blocks":
            return f"{body}{blocks}"
        if kind == "dynamic":
            return f"{body}{{% if flag %}}{{% extends 'base.j2' %}}{{% endif %}}{blocks}"
        return f"{{% extends '{'base' if kind == 'child' else 'middle'}.j2' %}}{body}{blocks}"

    def body(self) -> str:
        """Return some statements and outputs."""
        return "".join(self.piece() for _ in range(self.random.randint(1, 5)))

    def piece(self) -> str:
        """Return a text, an output or a statement."""
        self._budget -= 1
        kind = self.random.random()
        if self._budget <= 0 or kind < 0.15:
            return self.random.choice(TEXTS)
        if kind < 0.55:
            return f"{{{{ {self.expression()} }}}}"
        return self.statement()

    def expression(self, depth: int = 0) -> str:
        """Return an expression."""
        pick = self.random.random()
        if depth > 2 or pick < 0.35:
            return self.random.choice(self.random.choice([NAMES, NAMES, LITERALS, CALLS]))
        if pick < 0.45:
            return f"loop.{self.random.choice(LOOP)}"
        if pick < 0.55:
            return f"{self.random.choice(NAMES)}.{self.random.choice(ATTRIBUTES)}"
        if pick < 0.6:
            return (
                f"{self.random.choice(NAMES)}[{self.random.choice(['0', '-1', '1:3', chr(39) + 'a' + chr(39), 'x'])}]"
            )
        inner = self.expression(depth + 1)
        if pick < 0.8:
            return f"{inner}|{self.random.choice(FILTERS)}"
        if pick < 0.85:
            return f"({inner} is {self.random.choice(TESTS)})"
        if pick < 0.88:
            return f"(not {inner})"
        if pick < 0.96:
            return f"({inner} {self.random.choice(OPERATORS)} {self.expression(depth + 1)})"
        tail = f" else {self.expression(depth + 1)}" if self.random.random() < 0.7 else ""
        return f"({inner} if {self.expression(depth + 1)}{tail})"

    def statement(self) -> str:
        """Return a statement, with what is in it."""
        parts = {"@body": self.body, "@expr": self.expression}
        parts |= {f"@{name}": partial(self.random.choice, choices) for name, choices in CHOICES.items()}
        form = self.random.choice(FORMS + FIXED[: self.random.randint(1, len(FIXED))][-1:])
        return re.sub(r"@\w+", lambda match: parts[match[0]](), form)

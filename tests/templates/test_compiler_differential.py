# SPDX-License-Identifier: Apache-2.0
"""Our compiler beside Jinja2's: templates made from a grammar give the same text, or the same error at the same line.

``PROGCACHE_EXAMPLES=20000 python -m pytest tests/templates/test_compiler_differential.py`` for the long run.
"""

from __future__ import annotations

import asyncio
import os
from functools import cache

import jinja2
import jinja2.nativetypes
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markupsafe import Markup

from cuda_progcache.templates import Environment, Template
from cuda_progcache.templates.jinja_runtime import Context

EXAMPLES = int(os.environ.get("PROGCACHE_EXAMPLES", "400"))

LIBRARY = {
    "macros": (
        "{% macro pair(a, b='B') %}<{{ a }}|{{ b }}>{% endmacro %}"
        "{% macro wrap() %}({{ caller() if caller is defined else 'none' }}){% endmacro %}"
        "{% set shown = x %}{% set _hidden = 1 %}"
    ),
    "part": "[{{ x }}{{ loop.index if loop is defined }}{{ local }}]",
    "broken": "a\n{{ missing.attribute }}",
    "base": "A{% block one %}1{{ x }}{% endblock %}B{% block two scoped %}2{{ y }}{% endblock %}{{ self.one() }}C",
    "middle": "{% extends 'base' %}{% block one %}m{{ super() }}{% endblock %}",
}


class Thing:
    """Has attributes, items, and a text of its own."""

    def __init__(self):
        self.a = "<a>"
        self.b = 2

    def __getitem__(self, key):
        return f"item {key}" if isinstance(key, str) else [10, 20, 30][key]

    def __str__(self):
        return "thing & co"

    def __format__(self, spec):
        return "formatted"

    def method(self, *args):
        return f"method{args}"


class Whole(int):
    """An int that isn't quite one."""

    def __str__(self):
        return "<whole>"


@jinja2.pass_context
def sees(context, name="x"):
    return str(context.get(name, "nothing"))


@jinja2.pass_context
def changes(context, name="x"):
    context.vars[name] = "changed"
    return "!"


@jinja2.pass_eval_context
def escaping(eval_context):
    return eval_context.autoescape


def stops():
    raise StopIteration


def fails():
    raise ValueError("failed")


def variables():
    """Fresh ones for each render: generators are used up."""
    return {
        "x": 3,
        "y": "<y>",
        "items": [1, "b", {"a": "in <dict>", "b": 5}, Markup("<m>")],
        "numbers": range(4),
        "empty": [],
        "pairs": [(1, "one"), (2, "two")],
        "d": {"a": "A", "items": "shadowed", "n": {"a": 7}},
        "thing": Thing(),
        "whole": Whole(7),
        "flag": True,
        "none": None,
        "produced": (n * n for n in range(4)),
        "f": lambda *args, **kwargs: f"f{args}{sorted(kwargs.items())}",
        "stops": stops,
        "fails": fails,
        "sees": sees,
        "changes": changes,
        "escaping": escaping,
    }


# The grammar

names = st.sampled_from(
    ["x", "y", "items", "numbers", "d", "thing", "whole", "flag", "none", "unknown", "local", "i", "m"]
)
literals = st.sampled_from(["1", "2.5", "'t'", "'<&>'", "true", "none", "[1, 2]", "{'a': 1}", "(1, 'z')", "''"])
attributes = st.sampled_from(["a", "b", "n", "items", "missing", "a.b", "n.a"])
loops = st.sampled_from(
    ["loop.index", "loop.index0", "loop.first", "loop.last", "loop.length", "loop.revindex", "loop.depth"]
)


def unary(inner):
    return st.one_of(
        st.builds("{}.{}".format, names, attributes),
        st.builds("{}['{}']".format, names, attributes),
        st.builds("{}[{}]".format, names, st.sampled_from(["0", "-1", "1:3", "'a'", "x"])),
        st.builds(
            "{}|{}".format, inner, st.sampled_from(["upper", "length", "default('dd')", "string", "e", "safe", "list"])
        ),
        st.builds("({} is {})".format, inner, st.sampled_from(["defined", "none", "number", "mapping", "odd"])),
        st.builds("(not {})".format, inner),
        st.builds("-{}".format, st.sampled_from(["x", "whole", "1", "y"])),
    )


def binary(inner):
    return st.one_of(
        st.builds(
            "({} {} {})".format,
            inner,
            st.sampled_from(["+", "-", "*", "//", "%", "~", "and", "or", "==", "<", "in"]),
            inner,
        ),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("({} if {})".format, inner, inner),
    )


calls = st.sampled_from(
    ["f(1)", "f(x, k=y)", "sees()", "sees('local')", "sees('i')", "changes()", "changes('local')", "escaping()",
     "stops()", "fails()", "thing.method(1)", "range(3)", "m(1)", "m(1, 2)", "m(x, b=y)", "m(b=1)", "m(1, 2, 3)", "m()",
     "m(c=1)", "caller()", "namespace(q=1).q", "dict(a=1).a", "super()", "self.one()", "loop.cycle('p', 'q')",
     "loop.changed(x)", "loop", "pair(1)", "lib.pair(1)", "lib.shown", "unknown()"]
)  # fmt: skip
expressions = st.recursive(
    st.one_of(names, literals, loops, calls), lambda inner: st.one_of(unary(inner), binary(inner)), max_leaves=4
)
texts = st.sampled_from(["text", "<b>", "\n", " {# c #}", "a\nb", "{{ '' }}"])
outputs = st.builds("{{{{ {} }}}}".format, expressions)


def statements(inner):
    body = st.lists(inner, min_size=0, max_size=4).map("".join)
    iterables = st.sampled_from(
        ["items", "numbers", "empty", "produced", "[1, 2, 3]", "pairs", "range(x)", "d", "none", "y"]
    )
    targets = st.sampled_from(["i", "i", "x", "(i, local)"])
    e, b = expressions, body
    filled = [
        ("{{% if {} %}}{}{{% endif %}}", e, b),
        ("{{% if {} %}}{}{{% elif {} %}}{}{{% else %}}{}{{% endif %}}", e, b, e, b, b),
        ("{{% for {} in {} %}}{}{{% endfor %}}", targets, iterables, b),
        ("{{% for i in {} if {} %}}{}{{% else %}}{}{{% endfor %}}", iterables, e, b, b),
        ("{{% for i in [1, [2, 3]] recursive %}}{}{{{{ loop(i) if i is iterable }}}}{{% endfor %}}", b),
        ("{{% set {} = {} %}}", st.sampled_from(["x", "local", "i", "m"]), e),
        ("{{% set x, local = {}, {} %}}", e, e),
        ("{{% set ns = namespace(v=0) %}}{{% set ns.v = {} %}}{{{{ ns.v }}}}", e),
        ("{{% set local %}}{}{{% endset %}}", b),
        ("{{% set local | upper %}}{}{{% endset %}}", b),
        ("{{% macro m(a, b={}) %}}{}{{{{ a }}}}{{{{ b }}}}{{% endmacro %}}", literals, b),
        ("{{% macro m(a) %}}{}{{{{ caller(a) if caller }}}}{{{{ varargs }}}}{{{{ kwargs }}}}{{% endmacro %}}", b),
        ("{{% call(q) m({}) %}}{}{{{{ q }}}}{{% endcall %}}", e, b),
        ("{{% call m(1) %}}{}{{% endcall %}}", b),
        ("{{% filter upper %}}{}{{% endfilter %}}", b),
        ("{{% with local = {}, i = x %}}{}{{% endwith %}}", e, b),
        ("{{% autoescape {} %}}{}{{% endautoescape %}}", st.sampled_from(["true", "false", "flag"]), b),
        ("{{% include {} %}}", st.sampled_from(["'part'", "'gone' ignore missing", "['gone', 'part']", "'broken'"])),
    ]
    fixed = [
        "{% from 'macros' import pair, shown %}",
        "{% import 'macros' as lib with context %}",
        "{% import 'macros' as lib %}",
        "{% from 'macros' import gone %}{{ gone }}",
        "{% break %}",
        "{% continue %}",
    ]
    return st.one_of(*(st.builds(form.format, *parts) for form, *parts in filled), st.sampled_from(fixed))


pieces = st.recursive(st.one_of(texts, outputs), statements, max_leaves=12)
bodies = st.lists(pieces, min_size=1, max_size=6).map("".join)


@st.composite
def templates(draw):
    body = draw(bodies)
    if draw(st.integers(0, 9)) == 0:  # elsewhere, in a macro or a captured text, Jinja2's comes out as a generator
        body += "{% include 'part' without context %}"
    kind = draw(st.sampled_from(["plain", "plain", "plain", "blocks", "child", "grandchild", "dynamic"]))
    if kind == "plain":
        return body
    first, second = draw(bodies), draw(bodies)
    blocks = f"{{% block one %}}{first}{{% endblock %}}{{% block two scoped %}}{second}{{% endblock %}}"
    if kind == "blocks":
        return f"{body}{blocks}"
    if kind == "dynamic":
        return f"{body}{{% if flag %}}{{% extends 'base' %}}{{% endif %}}{blocks}"
    return f"{{% extends '{'base' if kind == 'child' else 'middle'}' %}}{body}{blocks}"


# The comparison

OPTIONS = {"loader": jinja2.DictLoader(LIBRARY), "extensions": ["jinja2.ext.loopcontrols", "jinja2.ext.do"]}


class NativeTemplate(Template, jinja2.nativetypes.NativeTemplate):
    render = jinja2.nativetypes.NativeTemplate.render
    render_async = jinja2.nativetypes.NativeTemplate.render_async


class NativeEnvironment(Environment, jinja2.nativetypes.NativeEnvironment):
    template_class = NativeTemplate


NativeTemplate.environment_class = NativeEnvironment


@cache
def made(kind, **options):
    """An environment; kept, so that the library is compiled once."""
    return kind(**OPTIONS, **options)


def outcome(environment, source, run):
    """The text, or the error with its message and the template lines of its traceback."""
    try:
        template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        return "syntax", type(error), error.message, error.lineno
    except Exception as error:  # noqa: BLE001  (whatever it is, the other has to raise it, too)
        return "compiler", repr(error)
    try:
        return "text", run(template)
    except RecursionError:
        return ("recursion",)
    except Exception as error:  # noqa: BLE001  (as above)
        lines = []
        traceback = error.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename == "<template>":
                lines.append(traceback.tb_lineno)
            traceback = traceback.tb_next
        return "error", type(error), str(error), lines[-1:]


def same(source, ours, theirs):
    if theirs[0] == "compiler":
        return True  # Jinja2's stumbles: over its bookkeeping, a break outside a loop, a constant that raises
    if ours[0] == theirs[0] == "error":
        # Jinja2 has no line for {% with %}: it names that of the statement before.
        return ours[1:3] == theirs[1:3] and (not theirs[3] or "{% with" in source or ours[3] == theirs[3])
    return ours == theirs and type(ours[-1]) is type(theirs[-1])


def agree(mode, source, ours, theirs, our_run, their_run=None):
    ours, theirs = outcome(ours, source, our_run), outcome(theirs, source, their_run or our_run)
    assert same(source, ours, theirs), f"{mode}\n{source!r}\nours:   {ours}\njinja2: {theirs}"


def text(template):
    return template.render(variables())


def pieces(template):
    return [piece for piece in template.generate(variables()) if piece]


def runs_of_pieces(template):
    return "".join(pieces(template))


def runs(template):
    return "".join(template.render_stream(variables()))


def waited(template):
    return asyncio.run(template.render_async(variables()))


async def gathered(template):
    return "".join([run async for run in template.render_stream_async(variables())])


def native(template):
    return repr(template.render(variables()))


def agree_in(mode, source, options):
    if mode == "native":
        ours, theirs = made(NativeEnvironment, **options), made(jinja2.nativetypes.NativeEnvironment, **options)
        agree(mode, source, ours, theirs, native)
        return
    if mode in {"async", "async stream"}:
        options = {**options, "enable_async": True}
    ours, theirs = made(Environment, **options), made(jinja2.Environment, **options)
    if mode == "generate":  # a module's text is one piece, of ours
        agree(mode, source, ours, theirs, runs_of_pieces if "without context" in source else pieces)
    else:
        our_run, their_run = MODES[mode]
        agree(mode, source, ours, theirs, our_run, their_run)


MODES = {
    "render": (text, text),
    "generate": (pieces, pieces),
    "stream": (runs, text),
    "native": (native, native),
    "async": (waited, waited),
    "async stream": (lambda template: asyncio.run(gathered(template)), waited),
}
modes = st.sampled_from(["render", "render", *MODES])
environments = st.fixed_dictionaries(
    {
        "autoescape": st.booleans(),
        "undefined": st.sampled_from([jinja2.Undefined, jinja2.Undefined, jinja2.StrictUndefined]),
    }
)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(modes, templates(), environments)
def test_generated_templates(mode, source, options):
    agree_in(mode, source, options)


@pytest.mark.parametrize("options", [{}, {"autoescape": True}])
def test_the_environment_is_ours(options):
    template = made(Environment, **options).from_string("{{ x }}")
    assert type(template) is Template and type(template.new_context()) is Context
    assert "render" in template._namespace

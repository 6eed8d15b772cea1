# SPDX-License-Identifier: Apache-2.0
"""The compiler's design rules, checked on its trees, and each point where a shortcut could differ from Jinja2."""

from __future__ import annotations

import ast
import asyncio
import marshal
import subprocess
import sys
import traceback
from typing import ClassVar

import jinja2
import jinja2.nativetypes
import jinja2.sandbox
import pytest
from jinja2 import nodes
from jinja2.ext import Extension
from markupsafe import Markup

from cuda_progcache.errors import ParameterError
from cuda_progcache.templates import Compiler, Environment, Template, patch_jinja2, unpatch_jinja2
from cuda_progcache.templates.jinja_runtime import Context


def tree(source, *, environment=None, name=None, form="render", **options):
    environment = environment or Environment(**options)
    return Compiler(environment, environment.static_context).tree(environment.parse(source), name, form=form)


def code(source, **options):
    return ast.unparse(tree(source, **options))


def both(source, variables=dict, **options):
    """Render with our environment and with Jinja2's, each with fresh variables; check that both texts are the same."""
    ours = Environment(**options).from_string(source).render(variables())
    theirs = jinja2.Environment(**options).from_string(source).render(variables())
    assert ours == theirs
    return ours


# 1: AST to AST, dispatch by type


def test_the_code_defines_what_the_interface_says():
    module = tree("{% block a %}{% endblock %}{% region r(x) %}{% endregion %}", name="t")
    assert type(module) is ast.Module
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    assert functions.keys() == {"render", "_block_a", "_region_r", "_block_r"}
    assert [arg.arg for arg in functions["render"].args.args] == ["ctx", "_blocks"]
    assert [arg.arg for arg in functions["_block_a"].args.args] == ["ctx", "_blocks"]
    assigned = {node.targets[0].id for node in module.body if isinstance(node, ast.Assign)}
    assert assigned == {"name", "source", "blocks"}


def test_a_code_object_can_be_marshalled_and_run_elsewhere():
    environment = Environment()
    source = "{% for x in xs %}{{ loop.index }}{{ x }}{% endfor %}"
    compiled = Compiler(environment).compile(environment.parse(source), "t", "t.j2", source=source)
    template = Template.from_code(environment, marshal.loads(marshal.dumps(compiled)), {})
    assert (template.name, template.filename) == ("t", "t.j2")
    assert template.render(xs="ab") == "1a2b" == "".join(template.render_stream(xs="ab"))


class Shout(Compiler):
    _NODE_DISPATCH_NAMES: ClassVar = {nodes.TemplateData: "data", nodes.Break: "shouted"}

    def shouted(self, node):
        self.text("BROKEN OFF")


def test_a_subclass_has_its_own_dispatch_table():
    assert Shout._methods[nodes.Break] == "shouted" and Compiler._methods[nodes.Break] == "break_node"
    assert Shout._methods[nodes.If] == "if_node"

    class ShoutEnvironment(Environment):
        compiler_class = Shout

    environment = ShoutEnvironment(extensions=["jinja2.ext.loopcontrols"])
    assert environment.from_string("{% if x %}{% break %}{% endif %}").render(x=1) == "BROKEN OFF"


Nap = type.__new__(
    nodes.NodeType,
    "Nap",
    (nodes.Stmt,),
    {"fields": ("length",), "attributes": nodes.Stmt.attributes, "abstract": False},
)


class NapExtension(Extension):
    tags: ClassVar = {"nap"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return Nap(parser.parse_expression(), lineno=line)

    def put_out(compiler, node):  # noqa: N805  (given the compiler)
        compiler.text("z")
        compiler.value(compiler.expr(node.length), 115)

    node_compilers: ClassVar = {Nap: put_out}


def test_an_extension_can_add_node_types():
    environment = Environment(extensions=[NapExtension])
    assert environment.from_string("{% nap 1 + n %}").render(n=2) == "z3"


def test_a_node_type_that_nobody_knows_is_an_error_with_its_line():
    class Unknown(NapExtension):
        node_compilers: ClassVar = {}

    with pytest.raises(jinja2.TemplateSyntaxError, match="no code for Nap nodes") as caught:
        Environment(extensions=[Unknown]).from_string("\n{% nap 1 %}")
    assert caught.value.lineno == 2


# 2: output


def test_runs_of_output_become_one_f_string():
    made = code("a{{ x }}b{{ y }}{# nothing #}c{% set z = 1 %}d")
    assert "f'a{c_x!s}b{c_y!s}c'" in made and "_a1('d')" in made
    assert made.count("_a1(") == 2 and "return ''.join(_b1)" in made


def test_output_that_is_one_string_needs_no_list():
    assert "return f'a{c_x!s}'" in code("a{{ x }}") and "_b1" not in code("a{{ x }}")
    assert "return ''" in code("{% set x = 1 %}")


def test_pieces_are_not_fused():
    made = code("a{{ x }}b", form="pieces")
    assert "render_pieces" in made and made.count("yield") == 4  # one is never reached


class Formats:
    def __str__(self):
        return "str"

    def __format__(self, spec):
        return "format"


class Whole(int):
    def __str__(self):
        return "whole"


class Text(str):
    __slots__ = ()

    def __str__(self):
        return "text"


@pytest.mark.parametrize("value", [Formats(), Whole(3), Text("<x>"), Markup("<m>"), True, 1.0, None, b"b"])
@pytest.mark.parametrize("autoescape", [True, False])
def test_str_not_format(value, autoescape):
    source = "{% for v in [v, v] %}{{ v }}{{ v }}{{ v ~ 1 }}{% endfor %}{{ v }}"
    both(source, lambda: {"v": value}, autoescape=autoescape)


def test_finalize():
    def finalize(value):
        return "-" if value is None else value

    assert both("{{ none }}{{ x }}{{ 1 }}", lambda: {"x": None}, finalize=finalize) == "--1"

    @jinja2.pass_context
    def with_context(context, value):
        return f"{value}{context['x']}"

    assert both("{{ 1 }}{{ y }}", lambda: {"x": "x"}, finalize=with_context) == "1xx"


# 3: locals, loops, macros


def test_a_name_is_looked_up_once_per_function():
    made = code("{% for i in xs %}{% for j in xs %}{{ a }}{{ b.c }}{% endfor %}{% endfor %}{{ a }}")
    assert made.count("'a' in _given") == 1 and made.count("'xs' in _given") == 1
    assert made.index("c_a =") < made.index("for l_1_i")


@jinja2.pass_context
def change(context, name, value):
    context.vars[name] = value
    return ""


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(3) %}{{ x }}{{ change('x', i) }}{% endfor %}",
        "{% for i in range(2) %}{% for j in range(2) %}{{ x }}{% endfor %}{{ change('x', i) }}{% endfor %}",
        "{{ x }}{{ change('x', 5) }}{{ x }}{% for i in [1] %}{{ x }}{% endfor %}",
        "{% macro m() %}{{ x }}{% endmacro %}{{ m() }}{{ change('x', 5) }}{{ m() }}",
        "{% macro m() %}{{ change('x', 7) }}{% endmacro %}{% for i in [1, 2] %}{{ x }}{{ m() }}{% endfor %}",
        "{% with y = change('x', 5) %}{{ x }}{% endwith %}",
        "{{ change('x', {'a': 1}) }}{% for i in [1, 2] %}{{ x.a }}{{ x.a }}{{ change('x', {'a': i}) }}{% endfor %}",
        "{% set f = change %}{% for i in [1, 2] %}{{ x }}{{ f('x', i) }}{% endfor %}",
        "{% for i in [1, 2] %}{{ x }}{{ ['x']|map('put')|list }}{% endfor %}",
    ],
)
def test_a_lookup_sees_what_a_function_changed(source):
    @jinja2.pass_context
    def put(context, name):
        context.vars[name] = "filtered"
        return name

    def environment(kind):
        made = kind()
        made.filters["put"] = put
        return made.from_string(source).render(x="given", change=change)

    assert environment(Environment) == environment(jinja2.Environment)


def test_loop_attributes_are_counters():
    made = code("{% for x in xs %}{{ loop.index }}{{ loop.index0 }}{{ loop.first }}{{ loop.cycle(1, 2) }}{% endfor %}")
    assert "LoopContext" not in made and "in enumerate(c_xs, 1)" in made
    both(
        "{% for x in xs %}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.last }}{{ loop.length }}"
        "{{ loop.depth }}{{ loop.depth0 }}{{ loop.cycle('a', 'b', 'c') }}{% endfor %}",
        lambda: {"xs": "abcd"},
    )


@pytest.mark.parametrize(
    "use", ["loop.changed(x)", "loop", "loop.previtem", "show(loop)", "loop['index']", "loop|string"]
)
def test_a_loop_object_that_is_used_as_such_is_there(use):
    assert "LoopContext" in code(f"{{% for x in xs %}}{{{{ {use} }}}}{{% endfor %}}")
    both(f"{{% for x in xs %}}{{{{ {use} }}}}{{% endfor %}}", lambda: {"xs": [1, 2], "show": repr})


def test_an_included_template_sees_the_loop():
    loader = jinja2.DictLoader({"part": "{{ loop.index }}{{ loop.last }}"})
    source = "{% for x in 'ab' %}{{ loop.first }}{% include 'part' %}{% endfor %}{% include 'part' ignore missing %}"
    with pytest.raises(jinja2.UndefinedError):
        both(source, loader=loader)
    assert both(source.partition("{% endfor")[0] + "{% endfor %}", loader=loader) == "True1FalseFalse2True"


def test_last_looks_one_item_ahead_and_only_when_asked():
    def drawn(kind, source):
        taken = []

        def produce():
            for number in range(4):
                taken.append(number)
                yield number

        return kind().from_string(source).render(xs=produce(), taken=taken, len=len)

    for source in (
        "{% for x in xs %}{{ len(taken) }}{% if x == 2 %}{{ loop.last }}{{ len(taken) }}{% endif %},{% endfor %}",
        "{% for x in xs %}{{ taken|length }}{{ loop.last }}{{ taken|length }},{% endfor %}",
        "{% for x in xs %}{{ taken|length }}{{ loop.length if x == 1 }}{{ taken|length }},{% endfor %}",
    ):
        assert drawn(Environment, source) == drawn(jinja2.Environment, source)
    assert (
        drawn(Environment, "{% for x in xs %}{{ taken|length }}{{ loop.last }},{% endfor %}")
        == "1False,2False,3False,4True,"
    )


@pytest.mark.parametrize("attribute", ["last", "length", "revindex"])
def test_a_list_that_its_loop_changes(attribute):
    source = "{% for x in xs %}{{ loop.last }}{{ xs.pop() if loop.first }}{{ loop.last }},{% endfor %}"
    both(source.replace("last", attribute), lambda: {"xs": [1, 2, 3, 4]})


def test_a_macro_bound_once_is_called_directly():
    made = code("{% macro m(a, b=2) %}{{ a }}{% endmacro %}{{ m(1) }}{{ m(b=x, a=1) }}{{ m(1, 2, 3) }}")
    assert "macro2(1, missing)" in made
    assert (
        "_call(ctx, l_0_m, b=environment.undefined(name='x') if c_x is missing else c_x, a=1)" in made
    )  # the arguments are in another order than the parameters, so x is evaluated first
    assert "_call(ctx, l_0_m, 1, 2, 3)" in made  # too many arguments: the call raises


@pytest.mark.parametrize(
    "source",
    [
        "{% macro m() %}1{% endmacro %}{% macro m() %}2{% endmacro %}{{ m() }}",
        "{% macro m() %}1{% endmacro %}{% set m = f %}{{ m() }}",
        "{% macro m() %}1{% endmacro %}{% if x %}{% macro m() %}2{% endmacro %}{% endif %}{{ m() }}",
        "{{ m() if m }}{% macro m() %}1{% endmacro %}{{ m() }}",
        "{% macro m() %}1{% endmacro %}{% for m in [f] %}{{ m() }}{% endfor %}{{ m() }}",
        "{% macro m() %}1{% endmacro %}{% with m = f %}{{ m() }}{% endwith %}",
        "{% macro m(n) %}{{ n }}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(3) }}",
        "{% for i in [1, 2] %}{% macro m() %}{{ i }}{% endmacro %}{{ m() }}{% endfor %}",
        "{% set n = namespace() %}{% for i in [1] %}{% macro m() %}{{ i }}{% endmacro %}{% set n.m = m %}{% endfor %}{{ n.m() }}",  # noqa: E501
        "{% macro m(a, b=a) %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m() }}",
        "{% macro m(a) %}{{ caller(a) }}{{ caller(b=2) }}{% endmacro %}{% call(b, c=3) m(1) %}{{ b ~ c }}{% endcall %}",
        "{% macro m(caller=none) %}{{ caller() if caller }}{% endmacro %}{{ m() }}{% call m() %}x{% endcall %}",
        "{% macro m() %}{{ kwargs }}{{ varargs }}{% endmacro %}{{ m(1, k=2) }}",
        "{% macro m() %}<b>{% endmacro %}{{ m() }}{{ m()|e }}{% set x = m() %}{{ x }}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("autoescape", [True, False])
def test_macros(source, autoescape):
    both(source, lambda: {"f": lambda: "<f>", "x": True}, autoescape=autoescape)


def test_stop_iteration_of_a_callable_is_undefined():
    def stop():
        raise StopIteration

    source = "[{{ stop() }}]{% for x in [1] %}{{ next(it) }}{{ next(it) }}{% endfor %}{{ stop() is defined }}"
    assert both(source, lambda: {"stop": stop, "it": iter("a"), "next": next}) == "[]aFalse"


def test_stop_iteration_of_a_filter_is_an_error():
    def stop(_):
        raise StopIteration

    for kind in (Environment, jinja2.Environment):
        environment = kind()
        environment.filters["stop"] = stop
        with pytest.raises(RuntimeError, match="generator raised StopIteration"):
            environment.from_string("{{ x|stop }}").render()


def test_attributes_of_dicts_are_read_in_line():
    made = code("{{ d.a }}")
    assert "c_d['a'] if type(c_d) is dict and 'a' in c_d" in made
    assert "'items' in" not in code("{{ d.items }}"), "a dict has an attribute of that name, which comes first"

    class Sub(dict):
        a = "attribute"

    for d in ({"a": 1}, Sub(a=1), {"items": 2}, {}):
        both("{{ d.a }}{{ d['a'] }}{{ d.items() if d else '' }}{{ d.missing }}{{ d['items'] }}", lambda d=d: {"d": d})


# Overridden methods take the exact path


def test_overridden_getattr_and_getitem():
    class Odd(Environment):
        def getattr(self, obj, attribute):
            return f"<{attribute}>"

        def getitem(self, obj, argument):
            return f"[{argument}]"

    assert "environment.getattr(" in code("{{ a.b }}", environment=Odd())
    assert Odd().from_string("{{ a.b }}{{ a['b'] }}{{ a[1] }}").render(a={"b": 1}) == "<b>[b][1]"
    environment = Environment()
    environment.getattr = lambda obj, attribute: "own"
    assert environment.from_string("{{ a.b }}").render(a={"b": 1}) == "own"


def test_overridden_resolve_or_missing():
    class Odd(Context):
        lean = False

        def resolve_or_missing(self, key):
            return f"<{key}>"

    class OddEnvironment(Environment):
        context_class = Odd

    template = OddEnvironment().from_string(
        "{{ a }}{% for i in [1] %}{{ b }}{% endfor %}{% macro m() %}{{ c }}{% endmacro %}{{ m() }}"
    )
    assert template.render() == "<a><b><c>"


def test_sandbox():
    class Ours(Environment, jinja2.sandbox.SandboxedEnvironment):
        pass

    source = "{{ f('x') }}|{{ f.__class__.__mro__ }}"
    theirs = jinja2.sandbox.SandboxedEnvironment().from_string(source)
    for template in (Ours().from_string(source), theirs):
        with pytest.raises(jinja2.exceptions.SecurityError):
            template.render(f=str)
    assert "environment.call(" in code("{{ f() }}", environment=Ours())


def test_intercepted_operators():
    class Ours(Environment, jinja2.sandbox.SandboxedEnvironment):
        intercepted_binops = frozenset("+")

        def call_binop(self, context, operator, left, right):
            return "intercepted"

    assert Ours().from_string("{{ 1 + 2 }}{{ 2 * 3 }}").render() == "intercepted6"


def test_undefined_that_counts_how_often_it_is_made():
    made = []

    class Counted(jinja2.Undefined):
        def __init__(self, *args, **kwargs):
            made.append(kwargs.get("name"))
            super().__init__(*args, **kwargs)

    Environment(undefined=Counted).from_string("{% if false %}{{ x }}{% endif %}{{ y }}").render()
    assert made == ["y"]


def test_a_code_generator_of_the_user_is_respected():
    class Odd(jinja2.compiler.CodeGenerator):
        def visit_Const(self, node, frame=None):  # noqa: N802  (Jinja2's)
            self.write("'odd'")

    class OddEnvironment(Environment):
        code_generator_class = Odd

    loader = jinja2.DictLoader({"base": "<{% block b %}{% endblock %}>{% include 'part' %}", "part": "part"})
    assert OddEnvironment(loader=loader).from_string("{% set x = 1 %}{{ x }}").render() == "odd"


# Templates written out as Python modules


def test_raw_code_of_a_module_loader(tmp_path):
    files = {
        "base": "<{% block a %}base {{ x }}{% endblock %}>",
        "child": "{% extends 'base' %}{% block a %}{{ super() }}"
        "{% for i in xs %}{{ loop.index }}{{ i.a|upper }}{% endfor %}{% endblock %}",
        "wrong": "a\nb\n{{ x }}{{ gone.gone }}\n",
    }
    Environment(loader=jinja2.DictLoader(files)).compile_templates(tmp_path, zip=None)
    environment = Environment(loader=jinja2.ModuleLoader(tmp_path))
    assert environment.get_template("child").render(x=1, xs=[{"a": "q"}]) == "<base 11Q>"
    with pytest.raises(jinja2.UndefinedError) as caught:
        environment.get_template("wrong").render()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].lineno == 3


# 4: inheritance


def test_blocks():
    loader = jinja2.DictLoader(
        {
            "base": "{% block a %}base{% endblock %}{% block need required %}{% endblock %}{{ self.a() }}",
            "middle": "{% extends 'base' %}{% block a %}middle({{ super() }}){% endblock %}"
            "{% block need %}n{% endblock %}",
        }
    )
    source = "{% extends 'middle' %}text{% block a %}child({{ super() }}|{{ super.super() }}){% endblock %}"
    assert both(source, loader=loader) == "child(middle(base)|base)nchild(middle(base)|base)"
    with pytest.raises(jinja2.TemplateRuntimeError, match="Required block 'need' not found"):
        Environment(loader=loader).from_string("{% extends 'base' %}").render()


def test_a_block_of_ours_is_callable_as_jinja2s():
    template = Environment().from_string("{% block a %}x{{ y }}{% endblock %}")
    assert "".join(template.blocks["a"](template.new_context({"y": 1}))) == "x1"
    assert "".join(template.root_render_func(template.new_context({"y": 1}))) == "x1"


# 5: lines


def test_lines_of_the_tree_are_the_templates():
    source = "a\n{% for x in xs %}\n\n{{ x.y }}\n{% if x %}\n{{ z\n|upper }}{% endif %}{% endfor %}"
    lines = {node.lineno for node in ast.walk(tree(source)) if isinstance(node, ast.Subscript)}
    assert {1, 4} <= lines
    assert all(1 <= node.lineno <= 7 for node in ast.walk(tree(source)) if hasattr(node, "lineno"))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("\n\n{{ fail() }}", 3),
        ("{{ 1 }}\n{{ x }}\n{{ fail() }}{{ y }}\n{{ x }}", 3),
        ("{% macro m() %}\n{{ fail() }}{% endmacro %}\n\n{{ m() }}", 2),
        ("{% if x %}\n{% elif fail() %}{% endif %}", 2),
        ("\n{% for i in\nfail() %}{% endfor %}", 3),  # Jinja2 reports the line of the tag
        ("{% set a %}\n{{ fail() }}{% endset %}", 2),
        ("{% block b %}\n\n{{ fail() }}{% endblock %}", 3),
    ],
)
def test_an_error_is_at_the_templates_line(source, line, tmp_path):
    def fail():
        raise ZeroDivisionError

    (tmp_path / "t.j2").write_text(source)
    template = Environment(loader=jinja2.FileSystemLoader(tmp_path)).get_template("t.j2")
    for run in (
        template.render,
        lambda **v: list(template.render_stream(**v)),
        lambda **v: list(template.generate(**v)),
    ):
        with pytest.raises(ZeroDivisionError) as caught:
            run(fail=fail)
        frames = [f for f in traceback.extract_tb(caught.value.__traceback__) if f.filename.endswith("t.j2")]
        assert frames[-1].lineno == line
        assert frames[0].name in {"top-level template code", "block 'b'", "template"}


# 6: partial evaluation


def test_static_context_is_folded():
    environment = Environment(static_context={"cfg": {"tile": 16, "fast": True}, "names": ("a", "b")})
    made = code(
        "{% if cfg.fast %}{{ cfg.tile * 2 }}{{ names|join('-') }}{% else %}{{ slow }}{% endif %}"
        "{{ 1 if cfg.fast else y }}{{ x }}",
        environment=environment,
    )
    assert "f'32a-b1{c_x!s}'" in made and "slow" not in made and "cfg" not in made and "c_y" not in made


def test_what_is_no_constant_is_precomputed():
    thing = Formats()
    environment = Environment(static_context={"thing": thing, "made": {"object": thing}})
    compiler = Compiler(environment, environment.static_context)
    made = ast.unparse(compiler.tree(environment.parse("{{ f(thing) }}{{ g(made.object) }}{{ thing }}")))
    assert compiler.precomputed == [thing, {"object": thing}] and made.count("_pc_0") == 2
    assert compiler.precomputed_names == ["thing", "made"]
    template = environment.from_string("{{ f(thing) }}{{ thing }}")
    assert template.render(f=type) == f"{Formats}str" == "".join(template.render_stream(f=type))


def test_a_static_name_that_the_template_sets_is_an_ordinary_one():
    environment = Environment(static_context={"x": 1, "y": 2})
    compiler = Compiler(environment, environment.static_context)
    assert "c_x" not in ast.unparse(compiler.tree(environment.parse("{{ x }}"))) and compiler.warnings == []
    compiler.tree(environment.parse("{{ x }}{% for x in [5] %}{{ x }}{% endfor %}{{ y }}"))
    assert [(w.code, w.line) for w in compiler.warnings] == [("static-assigned", 1)]
    template = environment.from_string("{{ x }}{% for x in [5] %}{{ x }}{% endfor %}{{ y }}")
    assert template.render() == "152"
    with pytest.raises(ParameterError, match="'x' can't be passed to a render"):
        template.render(x="given")


def test_constant_expressions_are_folded_and_those_that_raise_are_not():
    assert "return 'A3x'" in code("{{ 'a'|upper }}{{ 1 + 2 }}{{ ['x'][0] }}")
    with pytest.raises(ZeroDivisionError):
        Environment().from_string("{% if x %}{{ 1 // 0 }}{% endif %}").render(x=1)
    assert Environment().from_string("{% if x %}{{ 1 // 0 }}{% endif %}").render() == ""


def test_nested_constant_expressions_are_worked_out_once():
    called = []
    environment = Environment()
    environment.filters["seen"] = lambda value: called.append(value) or value + 1
    assert environment.from_string("{{ " + "1" + "|seen" * 30 + " }}").render() == "31"
    assert len(called) == 30


# 7: regions

LIBRARY = {
    "lib": "{% macro hi(x) %}hi {{ x }}{% endmacro %}",
    "base": "{% globals %}{% set g = 'base' %}{% endglobals %}<{% block a %}A{{ g }}{{ x }}{% endblock %}>"
    "{% block z %}z{% endblock %}",
}
REGION = """{% imports %}{% from 'lib' import hi %}{% endimports %}{% globals %}dropped{% set u = 5 %}{% endglobals -%}
{% region tile(n, size=4) %}[{{ n }}:{{ size }}:{{ u }}:{{ hi(other) }}]{% endregion -%}
{{ tile(1) }} {{ tile(2, size=8) }} {{ u }} {{ hi('q') }}"""


@pytest.mark.parametrize("asynchronous", [False, True])
def test_regions(asynchronous):
    environment = Environment(loader=jinja2.DictLoader(LIBRARY), enable_async=asynchronous)
    template = environment.from_string(REGION)
    assert template.list_blocks() == ["tile"]
    assert template.render(other="o") == "[1:4:5:hi o] [2:8:5:hi o] 5 hi q"
    assert template.render_block("tile", n=3, other="x") == "[3:4:5:hi x]"
    assert template.render_block("tile", n=3, size=0, other="x") == "[3:0:5:hi x]"
    assert template.render_block("tile", other="x") == "[:4:5:hi x]"


def test_regions_in_a_stream_and_escaped():
    environment = Environment(loader=jinja2.DictLoader(LIBRARY), autoescape=True)
    template = environment.from_string(REGION)
    assert (
        "".join(template.render_stream(other="<"))
        == template.render(other="<")
        == "[1:4:5:hi &lt;] [2:8:5:hi &lt;] 5 hi q"
    )
    assert "".join(template.generate(other="<")) == template.render(other="<")


def test_a_region_may_be_called_with_too_much():
    template = Environment().from_string("{% region r(a) %}{{ a }}{% endregion %}{{ r(1, 2) }}")
    with pytest.raises(TypeError, match="takes not more than 1 argument"):
        template.render()


@pytest.mark.parametrize("statement", ["{% region r() %}{% endregion %}", "{% globals %}{% endglobals %}"])
def test_regions_and_globals_stand_at_the_top(statement):
    for around in (
        "{{% if x %}}{}{{% endif %}}",
        "{{% for x in y %}}{}{{% endfor %}}",
        "{{% macro m() %}}{}{{% endmacro %}}",
    ):
        with pytest.raises(jinja2.TemplateSyntaxError, match="top level"):
            Environment().from_string(around.format(statement))


def test_render_block():
    environment = Environment(loader=jinja2.DictLoader(LIBRARY))
    template = environment.from_string("{% extends 'base' %}{% block a %}{{ super() }}+{{ g }}{% endblock %}")
    assert template.render_block("a", {"x": 1}) == "Abase1+base" and template.render_block("z") == "z"
    with pytest.raises(KeyError, match="no block 'b'; valid: a, z"):
        template.render_block("b")


# 8: nothing quadratic


def _calls(source):
    """Count the function calls of a compile; unlike its time, the count is the same on any machine."""
    environment = Environment()
    made = environment.parse(source)
    compiler = Compiler(environment)
    count = 0

    def counted(frame, event, argument):
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(counted)
    try:
        compiler.tree(made)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "make",
    [
        lambda n: "{% if x == 0 %}a" + "{% elif x == 1 %}{% set y = 2 %}{{ y }}{{ z }}" * n + "{% endif %}",
        lambda n: "{{ a.b.c|upper }}text{% for x in xs %}{{ x }}{{ loop.index }}{% endfor %}" * n,
        lambda n: "{{ 1" + "|abs" * n + " }}",
        lambda n: "{{ x" + ".y" * n + " }}",
        lambda n: "{% for a in b %}{{ loop.index }}" * (n // 8) + "{% endfor %}" * (n // 8),
        lambda n: "".join(f"{{% block b{i} %}}{{{{ x{i} }}}}{{% endblock %}}" for i in range(n)),
        lambda n: "".join(f"{{% set v{i} = v{i - 1} %}}" for i in range(1, n)),
        lambda n: "".join(f"{{% macro m{i}() %}}{{{{ caller() }}}}{{% endmacro %}}{{{{ m{i}() }}}}" for i in range(n)),
    ],
    ids=["arms", "statements", "constants", "attributes", "nesting", "blocks", "assignments", "macros"],
)
def test_twice_the_template_is_twice_the_work(make):
    assert _calls(make(128)) < 2.2 * _calls(make(64))


def test_a_thousand_arms():
    arms = "".join(f"{{% elif x == {n} %}}{{% set y = {n} %}}{{{{ y }}}}" for n in range(1, 1000))
    source = f"{{% if x == 0 %}}zero{arms}{{% else %}}none{{% endif %}}"
    template = Environment().from_string(source)
    assert [template.render(x=x) for x in (0, 1, 59, 60, 61, 500, 999, 1000)] == [
        "zero",
        "1",
        "59",
        "60",
        "61",
        "500",
        "999",
        "none",
    ]


def test_deep_nesting():
    source = "{% for a in [1] %}" * 15 + "{{ loop.index }}{{ x }}" + "{% endfor %}" * 15
    assert Environment().from_string(source).render(x=1) == "11"


# Warnings


def test_warnings():
    environment = Environment()
    compiler = Compiler(environment)
    compiler.tree(
        environment.parse("{% set n = 0 %}\n{% for x in xs %}{% set n = n + x %}{% set own = 1 %}{% endfor %}{{ n }}")
    )
    (warning,) = compiler.warnings
    assert (warning.code, warning.line) == ("lost-assignment", 2) and "namespace(n=…)" in warning.suggestion
    compiler.tree(environment.parse("{% extends 'b' %}\n\nlost\n{% block a %}kept{% endblock %} \n"))
    assert [(w.code, w.line) for w in compiler.warnings] == [("dropped-output", 3)]
    compiler.tree(environment.parse("{% for x in xs %}{{ x }}{% endfor %}"))
    assert compiler.warnings == []


# Streams


def test_streams_come_as_they_are_made():
    def items():
        yield from range(3)
        raise ZeroDivisionError

    runs = Environment().from_string("begin{% for x in xs %}<{{ x }}>{% endfor %}").render_stream(xs=items())
    assert [next(runs) for _ in range(4)] == ["begin", "<0>", "<1>", "<2>"]
    with pytest.raises(ZeroDivisionError):
        next(runs)


def test_stream_forms_are_compiled_when_asked_for():
    template = Environment().from_string("{% extends base %}{% block a %}{{ x }}{% endblock %}")
    assert template._forms == {}
    base = Environment().from_string("<{% block a %}{% endblock %}>")
    assert "".join(template.render_stream(base=base, x=1)) == "<1>"
    assert template._forms.keys() == {"stream"} and base._forms.keys() == {"stream"}


def test_async_stream():
    async def items():
        for number in range(3):
            yield number

    async def gather(template):
        return [run async for run in template.render_stream_async(xs=items())]

    template = Environment(enable_async=True).from_string("a{% for x in xs %}<{{ x }}>{% endfor %}")
    assert asyncio.run(gather(template)) == ["a", "<0>", "<1>", "<2>"]
    with pytest.raises(RuntimeError, match="render_stream_async"):
        next(template.render_stream())


def test_precomputed_values_belong_to_their_code():
    environment = Environment(static_context={"one": Formats(), "two": Whole(2)})
    compiled = [environment.compile("{{ type(" + name + ") }}") for name in ("one", "two")]
    for code_object, kind in zip([*compiled, *compiled], [Formats, Whole] * 2, strict=True):
        template = Template.from_code(environment, code_object, environment.make_globals(None))
        assert template.render(type=type) == str(kind)


@pytest.mark.parametrize("index", ["[1:3]", "[0]", "['a']", ".a", "()"])
@pytest.mark.parametrize("base", ["none", "1", "'ab'", "(1, 2)", "[1]", "{'a': 1}", "x"])
def test_python_warns_of_nothing_in_the_code(base, index):
    for source in ("{{ E }}", "{% autoescape x %}{{ E }}{% endautoescape %}", "{{ f(E) }}"):
        Environment().from_string("{% if false %}" + source.replace("E", base + index) + "{% endif %}").render(x=True)


def test_a_name_that_only_inner_scopes_start_from_is_looked_up():
    source = (
        "{% extends 'base' %}{% for i in [1] recursive %}{% set local %}{% endset %}{{ loop([]) if i is iterable }}"
        "{% endfor %}{% if x %}{% else %}{{ local.a }}{% endif %}"
    )
    assert both(source, loader=jinja2.DictLoader({"base": "base"})) == "base"


def test_native_blocks():
    class Native(Environment, jinja2.nativetypes.NativeEnvironment):
        pass

    loader = jinja2.DictLoader({"base": "{% block a %}{{ [1, 2] }}{% endblock %}"})
    template = Native(loader=loader).from_string("{% extends 'base' %}{% block a %}{{ super()[0] }}{% endblock %}")
    assert template.render_block("a") == 1 == template.render()


def test_a_concatenation_works_out_all_parts_first():
    assert "{c_a!s}{c_b!s}{1!s}" in code("{{ f(a ~ b ~ 1) }}")
    template = Environment(undefined=jinja2.StrictUndefined).from_string("{{ x.gone ~ x|length }}")
    with pytest.raises(TypeError, match="has no len"):
        template.render(x=1)


# Source maps


@pytest.mark.parametrize("asynchronous", [False, True])
def test_source_map(asynchronous):
    files = {"part": "p\n{{ x }}\n"}
    files["t"] = "a\n{% for i in [1, 2] %}\nb{{ i }}{% endfor %}\n\n{% include 'part' %}"
    template = Environment(loader=jinja2.DictLoader(files), enable_async=asynchronous).get_template("t")
    found = template.source_map(x="x")
    assert found.text == template.render(x="x") and not found.reason
    text = found.text.split("\n")
    where = {line: str(found.lookup(number)) for number, line in enumerate(text, 1) if line}
    assert where == {"a": "t:1", "b1": "t:3", "b2": "t:3", "p": "part:1", "x": "part:2"}
    assert Environment().from_string("{% set a %}x{% endset %}{{ a|length }}{{ a == 'x' }}").source_map().reason


# Jinja2 itself


def test_patch_and_unpatch():
    try:
        patch_jinja2()
        patch_jinja2()
        environment = jinja2.Environment(loader=jinja2.DictLoader(LIBRARY))
        template = environment.from_string(
            "{% for x in xs %}{{ loop.index }}{{ x }}{% endfor %}{% import 'lib' as l %}{{ l.hi(1) }}"
        )
        assert "render" in template._namespace and template.render(xs="ab") == "1a2bhi 1"
        assert "".join(template.render_stream(xs="ab")) == "1a2bhi 1"
    finally:
        unpatch_jinja2()
    template = jinja2.Environment().from_string("{{ x }}")
    assert (
        not hasattr(template, "_namespace") and not hasattr(template, "render_stream") and template.render(x=1) == "1"
    )


def test_the_runtime_imports_nothing_of_jinja2():
    names = "{name.partition('.')[0] for name in sys.modules} & {'jinja2', 'markupsafe'}"
    check = f"import sys, cuda_progcache.templates.runtime; print({names})"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("items", ["range(n)", "range(5, 0, -2)", "range(300)"])
def test_ranges_come_with_their_texts(items):
    source = f"{{% for i in {items} %}}{{{{ i }}}}{{{{ i + 1 }}}}{{{{ i ~ loop.index }}}},{{% endfor %}}"
    assert "_texts(" in code(source)
    both(source, lambda: {"n": 4})


def test_a_range_that_is_none():
    values = [1, "x", True, Whole(3), Formats()]
    both(
        "{% for i in range(n) %}{{ i }}{{ i }}{{ loop.last }}{% endfor %}", lambda: {"n": 1, "range": lambda _: values}
    )
    with pytest.raises(TypeError, match="not iterable"):
        both("{% for i in range(n) %}{{ i }}{% endfor %}", lambda: {"n": 1, "range": int})

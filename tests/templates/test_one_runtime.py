# SPDX-License-Identifier: Apache-2.0
"""The runtime: it has every name that compiled code may use, and objects that users see pass for Jinja2's own."""

from __future__ import annotations

import builtins
import dis
import gc
import hashlib
import subprocess
import sys
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import ClassVar

import jinja2
import pytest
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.nativetypes import NativeEnvironment

from ci.differential.features import FEATURES, LIBRARY, SHAPES
from cuda_progcache._util.lazy import take
from cuda_progcache.errors import TemplateError
from cuda_progcache.templates import (
    BytecodeCache,
    Compiler,
    Environment,
    KernelEnvironment,
    jinja_runtime,
    patch_jinja2,
    runtime,
    unpatch_jinja2,
)
from cuda_progcache.templates.plain_environment import PlainTemplate

FORMS = ("render", "stream", "pieces")
KNOWN = {*runtime.NAMES, *runtime.JINJA2_NAMES, *runtime.ENVIRONMENT_NAMES}


def globals_of(code):
    """Return the global names that code reads, and those that it defines."""
    read, defined = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in {"LOAD_GLOBAL", "LOAD_NAME"}:
            read.add(instruction.argval)
        elif instruction.opname in {"STORE_GLOBAL", "STORE_NAME"}:
            defined.add(instruction.argval)
    for constant in code.co_consts:
        if hasattr(constant, "co_code"):
            inner = globals_of(constant)
            read |= inner[0]
            defined |= inner[1]
    return read, defined


@pytest.mark.parametrize("asynchronous", [False, True])
def test_code_asks_for_names_of_the_table_alone(asynchronous):
    asked = set()
    for number, case in enumerate([*SHAPES, *FEATURES]):
        environment = Environment(enable_async=asynchronous, **case.options)
        for form in FORMS if number < len(SHAPES) else [FORMS[number % 3]]:
            compiler = Compiler(environment)
            try:
                code = compiler.compile(environment.parse(case.source), form=form)
            except jinja2.TemplateSyntaxError:
                continue
            read, defined = globals_of(code)
            foreign = {name for name in read - defined if not hasattr(builtins, name)}
            assert foreign <= KNOWN, case.source
            assert foreign - runtime.ENVIRONMENT_NAMES <= compiler.uses, case.source
            info = runtime.CodeInfo.of(code)
            assert not (info.plain and foreign & runtime.JINJA2_NAMES), case.source
            asked |= foreign
    other = {"LoopContext", "_ahead", "_sized", "_fixed", "_getattr", "_getitem"}
    if not asynchronous:
        other = {"AsyncLoopContext", "auto_aiter", "auto_await"}
    expected = KNOWN - other - {"_resolver"}
    assert expected - asked <= {"identity", "_texts", "_empty"}, "each entry of the table is met"


def test_the_runtimes_have_all_names_and_the_compiler_no_other():
    assert set(jinja_runtime.NAMES) == set(runtime.NAMES) | runtime.JINJA2_NAMES
    with pytest.raises(KeyError, match="the runtime has no 'nonesuch'"):
        Compiler(Environment()).runtime("nonesuch")


@pytest.fixture
def kernels(tmp_path):
    folder = tmp_path / "templates"
    folder.mkdir()
    for name, text in LIBRARY.items():
        (folder / name).write_text(text)
    return KernelEnvironment(folder)


@jinja2.pass_context
def described(context):
    kinds = jinja2.runtime.Context, Mapping
    return [isinstance(context, kind) for kind in kinds] + [isinstance(context.environment, jinja2.Environment)]


def test_what_users_meet_is_jinja2s(kernels):
    source = (
        "{% macro m(a) %}{{ a }}{% endmacro %}{% set ns = namespace(a=1) %}{% block b %}{% endblock %}"
        "{% for i in [1] %}{{ keep(m, loop, ns, self, self.b, d, lib) }}{% endfor %}"
    )
    for environment in (kernels, Environment()):
        kept = []
        template = environment.from_string(source)
        template.render(keep=lambda *objects, kept=kept: kept.extend(objects) or "", d=1, lib=2)
        classes = [jinja2.runtime.Macro, jinja2.runtime.LoopContext, jinja2.utils.Namespace]
        classes += [jinja2.runtime.TemplateReference, jinja2.runtime.BlockReference]
        assert [isinstance(one, kind) for one, kind in zip(kept, classes, strict=False)] == [True] * 5
    assert kernels.from_string("{{ f() }}").render(f=described) == "[True, True, True]"
    plain = kernels._templates()
    assert isinstance(plain, jinja2.Environment)
    assert isinstance(plain.get_template("part.j2"), jinja2.Template)
    assert (plain.filters.get("title") is None, plain.filters.get("nosuch")) == (False, None)
    assert {"title", "ctype", "upper"} <= set(plain.filters)
    assert plain.from_string("{{ q }}{{ g }}", globals={"g": 4}).render(q=1) == "14"
    assert str(plain.get_template("macros.j2").module.pair(1)) == "<1|B>"


def test_templates_of_both_runtimes_are_included_in_each_other(kernels):
    theirs = jinja2.Environment().from_string("[{{ n }}{{ loop.index if loop is defined }}]")
    ours = kernels._templates().get_template("part.j2")
    assert type(ours) is PlainTemplate
    source = "{% for i in [1] %}{% include t %}{% endfor %}{% include [t] %}{% include t ignore missing %}"
    assert kernels.from_string(source).render(t=theirs, n=7) == "[7][7][7]"
    assert kernels.from_string(source).render(t=ours, x=7) == "[7-][7-][7-]"
    both = "{% include t %}{% import t as m with context %}{{ m }}"
    for environment in (jinja2.Environment(), Environment()):
        assert environment.from_string(both).render(t=ours, x=7) == ("[7-][7-]")
    base = jinja2.Environment().from_string("<{% block b %}base{% endblock %}>")
    child = "{% extends t %}{% block b %}{{ super() }}!{% endblock %}"
    assert kernels.from_string(child).render(t=base) == "<base!>"


def test_a_template_that_escapes_joins_in_and_no_parameter_is_used_up(kernels, tmp_path):
    (tmp_path / "templates" / "escaping.j2").write_text("{% autoescape true %}{{ '<' ~ x }}{% endautoescape %}")
    template = kernels.from_string(
        "{% for x in xs %}{{ x }},{% endfor %}{% include which %}{% for x in xs %}!{% endfor %}"
    )
    for _ in range(2):
        assert template.render(xs=iter("ab"), x="&", which="escaping.j2") == "a,b,&lt;&amp;"
        text, digests = template.render_traced(xs=iter("ab"), x="&", which="escaping.j2")
        assert (text, set(digests)) == ("a,b,&lt;&amp;", {"escaping.j2"})


def test_line_directives_refuse_what_one_render_uses_up(tmp_path):
    (tmp_path / "k.cu.j2").write_text("{% for x in xs %}int a{{ x }};\n{% endfor %}")
    environment = KernelEnvironment(tmp_path, line_directives=True)
    assert "int a1;" in environment.render("k.cu.j2", xs=[1, 2])
    for render in (environment.render, lambda name, **params: environment.get_template(name).render_traced(**params)):
        with pytest.raises(TemplateError, match="parameter 'xs' is an iterator"):
            render("k.cu.j2", xs=iter([1, 2]))


def test_digests_are_of_what_was_rendered(tmp_path):
    def write(name, text):
        (tmp_path / name).write_text(text)
        return hashlib.sha256(text.encode()).hexdigest()

    main = write("m.j2", "{% import 'a.j2' as a %}{{ a.v }}{{ edit() }}")
    middle = write("a.j2", "{% import 'b.j2' as b %}{% set v = b.v %}")
    write("b.j2", "{% set v = 'old' %}")
    for extensions in ((), ["jinja2.ext.loopcontrols"]):
        environment = KernelEnvironment(tmp_path, extensions=extensions)
        template = environment.get_template("m.j2")
        for text in ("one", "another", "a third"):
            last = write("b.j2", f"{{% set v = '{text}' %}}")
            found = template.render_traced(edit=lambda: "")
            assert found == (text, {"m.j2": main, "a.j2": middle, "b.j2": last})
        # b.j2 is edited during the render: its digest is that of the text that was used.
        found = template.render_traced(edit=lambda: write("b.j2", "{% set v = 'too late' %}") and "")
        assert found == (text, {"m.j2": main, "a.j2": middle, "b.j2": last})


def test_templates_from_before_and_from_within_a_patch_render_on():
    before = jinja2.Environment().from_string("hi {{ x }}")

    class Own(jinja2.Template):
        def render(self, *args, **kwargs):
            return f"<{super().render(*args, **kwargs)}>"

    class OwnEnvironment(jinja2.Environment):
        template_class = Own

    patch_jinja2()
    try:
        assert before.render(x=1) == "hi 1"
        within = jinja2.Environment().from_string("{{ x ~ 1 }}")
        own = OwnEnvironment().from_string("{{ x }}")
        assert isinstance(own, Own) and own.render(x=1) == "<1>" and "".join(own.render_stream(x=1)) == "1"
        assert (within.render(x=1), before.render(x=2), jinja2.Template("{{ 3 }}").render()) == ("11", "hi 2", "3")
    finally:
        unpatch_jinja2()
    assert (within.render(x=1), before.render(x=2), own.render(x=4)) == ("11", "hi 2", "<4>")


def test_tracebacks_have_the_renders_variables():
    def fails():
        raise ZeroDivisionError

    for kind in (Environment, jinja2.Environment):
        template = kind().from_string(
            "{% set a = 5 %}{{ x }}{% block b %}{% for i in [7] %}{{ f() }}{% endfor %}{% endblock %}"
        )
        with pytest.raises(ZeroDivisionError) as caught:
            template.render(x=3, f=fails)
        frames = [entry.frame for entry in caught.traceback if entry.frame.code.raw.co_filename == "<template>"]
        seen = frames[-1].f_locals
        assert {name: seen.get(name) for name in ("x", "a", "i")} == {"x": 3, "a": 5, "i": 7}


class Mine(Extension):
    tags: ClassVar = {"region", "globals"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.Output([nodes.TemplateData("mine")], lineno=line)


def test_a_users_tag_comes_first():
    assert Environment(extensions=[Mine]).from_string("{% region %}{% globals %}").render() == "minemine"


class ByName(Compiler):
    _NODE_DISPATCH_NAMES: ClassVar = {"Output": "shout"}

    def shout(self, node):
        self.text("SHOUT")


def test_a_dispatch_table_takes_names_of_classes():
    class Shouting(Environment):
        compiler_class = ByName

    assert Shouting().from_string("x{{ y }}").render() == "SHOUT"
    with pytest.raises(TypeError, match="there is no node type 'Outputs'"):
        type("Wrong", (Compiler,), {"_NODE_DISPATCH_NAMES": {"Outputs": "output"}})


def test_a_block_by_itself_has_what_its_template_imports():
    loader = jinja2.DictLoader({"m": "{% macro f() %}F{{ x }}{% endmacro %}", "n": "m"})
    environment = Environment(loader=loader)
    for source in (
        "{% from 'm' import f %}{% block b %}[{{ f() }}]{% endblock %}",
        "{% import 'm' as m %}{% block b %}[{{ m.f() }}]{% endblock %}",
        "{% from 'm' import f as g with context %}{% block b %}[{{ g() }}]{% endblock %}",
    ):
        template = environment.from_string(source)
        assert template.render_block("b", x=1) == template.render(x=1)


def test_regions_have_self():
    template = Environment().from_string(
        "{% region r() %}{{ self.b() }}{% endregion %}{% block b %}B{% endblock %}{{ r() }}"
    )
    assert (template.render(), template.render_block("r")) == ("BB", "B")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_regions_begin_as_blocks_do(asynchronous):
    loader = jinja2.DictLoader(
        {
            "parent": "{% region r(a=1) %}parent {{ a }}{% endregion %}{% block b %}{% endblock %}",
            "child": "{% extends 'parent' %}{% region r(a=1) %}child {{ a }}, {{ super() }}{% endregion %}"
            "{% block b %}{% set x = 1 %}{{ self.r() }}{% endblock %}",
            "alone": "{% region r() %}{% set x = 1 %}{{ super is defined }}{{ sees() }}{% endregion %}{{ r() }}",
        }
    )
    environment = Environment(loader=loader, enable_async=asynchronous)
    environment.globals["sees"] = jinja2.pass_context(lambda context: context.get("x", "nothing"))
    assert environment.get_template("child").render_block("r", a=6) == "child 6, parent 6"
    assert environment.get_template("child").render() == "child 1, parent 1"
    assert environment.get_template("alone").render() == "False1"


def test_a_hit_of_an_environment_imports_no_compiler(tmp_path):
    (tmp_path / "k.j2").write_text("{% for i in [1, 2] %}{{ i ~ x }}{% endfor %}{% region r() %}{{ x }}{% endregion %}")
    script = (
        "import sys, jinja2; from cuda_progcache.templates import BytecodeCache, Environment\n"
        f"loader, cache = jinja2.FileSystemLoader({str(tmp_path)!r}), BytecodeCache({str(tmp_path / 'c')!r})\n"
        "t = Environment(loader=loader, bytecode_cache=cache).get_template('k.j2')\n"
        "print(t.render(x=3), t.render(x=4), t.render_block('r', x=5))\n"
        "print(*sorted(m.removeprefix('cuda_progcache.') for m in sys.modules if m.startswith('cuda_progcache.')))\n"
        "print(*sorted({'_sha2', '_sha256', 'platformdirs', 'jinja2.ext', 'jinja2.meta'} & set(sys.modules)))"
    )
    _, hit = (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split("\n")
        for _ in range(2)
    )
    assert hit[0] == "1323 1424 5"
    needed = "abi bytecode_cache compile_context context frames jinja_runtime objects runtime template undefined"
    ours = [f"_util{name}" for name in ("", ".digest", ".lazy", ".modes")]
    ours += ["templates", *(f"templates.{name}" for name in needed.split())]
    assert hit[1].split() == ours
    assert hit[2] == ""


@pytest.mark.parametrize("collecting", [True, False])
@pytest.mark.parametrize("home", ["undefined", "no_such_module"])
def test_an_import_leaves_the_programs_collector_alone(monkeypatch, collecting, home):
    before, seen = gc.isenabled(), []
    monkeypatch.setattr("builtins.__import__", _noting(seen, __import__))
    package = {"__name__": "cuda_progcache.templates"}
    (gc.enable if collecting else gc.disable)()
    try:
        with nullcontext() if home == "undefined" else pytest.raises(ModuleNotFoundError):
            take(package, {"missing": home}, "missing")
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if before else gc.disable)()
    assert seen[0] is collecting
    assert gc.get_freeze_count() == 0


def test_what_a_program_has_frozen_stays_so():
    script = (
        "import gc; gc.freeze(); before = gc.get_freeze_count()\n"
        "from cuda_progcache.templates import Environment; print(0 < gc.get_freeze_count() <= before, gc.isenabled())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "True True\n"


def _noting(seen, original):
    def noting(*args, **options):
        seen.append(gc.isenabled())
        return original(*args, **options)

    return noting


def test_a_kernels_template_is_asked_for_a_stream(kernels):
    template = kernels._templates().get_template("part.j2")
    assert "".join(template.stream(x=1)) == template.render(x=1)
    assert isinstance(template.stream(x=1), jinja2.environment.TemplateStream)


def test_many_names_are_what_few_are():
    source = "".join(f"{{{{ v{n} }}}}" for n in range(90)) + (
        "{% macro m() %}{{ v1 }}{{ v89 }}{% endmacro %}{{ m() }}{% for i in [1] %}{{ v3 }}{{ f() }}{{ v3 }}{% endfor %}"
    )

    @jinja2.pass_context
    def changes(context):
        context.vars["v3"] = "changed"
        return "!"

    for kind in (jinja2.Undefined, jinja2.StrictUndefined, jinja2.DebugUndefined):
        stock, ours = (one(undefined=kind).from_string(source) for one in (jinja2.Environment, Environment))
        for given in ({f"v{n}": n for n in range(90)}, {"v1": 5}):
            texts = []
            for template in (stock, ours, ours):
                try:
                    texts.append(template.render(given, f=changes))
                except jinja2.UndefinedError as error:
                    texts.append(str(error))
            assert texts[0] == texts[1] == texts[2]


def test_warnings_reach_the_user(kernels, tmp_path):
    source = "{% set n = 0 %}{% for i in [1] %}{% set n = i %}{% endfor %}"
    loader = jinja2.DictLoader({"w": source})
    for _ in range(2):
        environment = Environment(loader=loader, bytecode_cache=BytecodeCache(tmp_path / "c"))
        assert [warning[0] for warning in environment.get_template("w").warnings] == ["lost-assignment"]
    assert [warning[0] for warning in kernels.from_string(source).warnings] == ["lost-assignment"]


def test_no_environment_and_no_expression_is_kept(tmp_path, monkeypatch):
    (tmp_path / "k").write_text("{{ 1 }}")
    environment = Environment(loader=jinja2.FileSystemLoader(tmp_path), bytecode_cache=BytecodeCache(tmp_path / "c"))
    environment.get_template("k").render()
    gone = weakref.ref(environment)
    del environment
    gc.collect()
    assert gone() is None
    monkeypatch.setattr("cuda_progcache.templates.environment._MOST_EXPRESSIONS", 8)
    kernels = KernelEnvironment(())
    for number in range(20):
        assert kernels.evaluate(f"{number} + n", {"n": 1}) == number + 1
    assert len(kernels._expressions) <= 8


def test_a_syntax_tree_that_is_none_is_refused(tmp_path):
    cache = BytecodeCache(tmp_path / "c")
    with pytest.raises(TypeError, match=r"expected a jinja2\.nodes\.Template, got a int"):
        cache.set("k", "0" * 64, compile("", "k", "exec"), ast=3)
    assert cache.stats()["file_count"] == 0


def test_an_import_without_context_is_told(tmp_path):
    (tmp_path / "m.j2").write_text("{% macro f() %}{{ vec }}{% endmacro %}")
    (tmp_path / "k.j2").write_text("{% from 'm.j2' import f %}{{ f() }}")
    with pytest.raises(TemplateError, match=r"m\.j2:1: 'vec' is undefined here; .*\"with context\""):
        KernelEnvironment(tmp_path).render("k.j2", vec=4)


def test_compiled_elsewhere_means_the_same(tmp_path):
    """Templates that one process compiled render the same in another process, which doesn't load Jinja2."""
    sources = [
        '{{ "acc" ~ (n + 1) }}',
        "{% autoescape false %}{{ n }}{% endautoescape %}",
        "{{ [n]|first is defined }}",
    ]
    script = (
        "import sys; from cuda_progcache.templates import KernelEnvironment\n"
        f"k = KernelEnvironment({str(tmp_path)!r}, bytecode_cache={str(tmp_path / 'c')!r})\n"
        f"print(*[k.from_string(s).render(n=1) for s in {sources!r} for _ in 'ab'], 'jinja2' in sys.modules)"
    )
    said = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout for _ in "ab"
    ]
    assert said == ["acc2 acc2 1 1 True True True\n", "acc2 acc2 1 1 True True False\n"]


MODULES = {
    "base": "{{ x }}{% block b %}[{{ x }}]{% endblock %}{{ self.b() }}{% include 'part' %}"
    "{% import 'macros' as m %}{{ m.f(x) }}{% from 'macros' import f with context %}{{ f(2) }}",
    "child": "{% extends 'base' %}{% block b %}{{ super() }}!{% endblock %}",
    "part": "inc{{ x|e }}{% for i in [1, 2] %}{{ loop.last }}{% endfor %}",
    "macros": "{% macro f(y) %}<{{ y.real }}>{% endmacro %}",
}


@pytest.mark.parametrize("options", [{}, {"autoescape": True}, {"enable_async": True}, {"optimized": False}], ids=repr)
@pytest.mark.parametrize("kind", [jinja2.Environment, Environment, NativeEnvironment])
def test_modules_that_ours_wrote_serve_jinja2(tmp_path, kind, options):
    native = kind is NativeEnvironment
    if native and "enable_async" in options:
        pytest.skip("Jinja2's native templates have no render() in an async environment")
    stock = NativeEnvironment if native else jinja2.Environment
    loader = jinja2.DictLoader(MODULES)
    writer = type("Writer", (Environment, kind), {}) if native else Environment
    writer(loader=loader, **options).compile_templates(tmp_path, zip=None)
    environment, expected = kind(loader=jinja2.ModuleLoader(tmp_path), **options), stock(loader=loader, **options)
    for name in ("base", "child", "part"):
        for x in (3, 4):
            template, other = environment.get_template(name), expected.get_template(name)
            assert template.render(x=x) == other.render(x=x)
            assert "".join(map(str, template.generate(x=x))) == "".join(map(str, other.generate(x=x)))

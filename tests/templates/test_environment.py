# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import jinja2
import numpy as np
import pytest

from cuda_progcache.errors import ProgCacheError, TemplateError
from cuda_progcache.templates import KernelEnvironment
from cuda_progcache.templates.environment import evaluate, expression_names


def render(source, **params):
    return KernelEnvironment(()).from_string(source).render(**params)


def test_set_up_for_cuda_source():
    source = "{% if true %}\n    {% set x = '<&>' %}\n  {{ x }}\n{% endif %}\nend\n"
    assert render(source) == "  <&>\nend\n"


def test_filters_tests_and_globals():
    source = "{{ dtype|ctype }} {{ 0.1|cuda_literal(dtype) }} {{ vector_type('float', n) }} {{ 'int'|vector_type(2) }}"
    assert render(source, dtype=np.dtype("float32"), n=4) == "float 0.1f float4 int2"
    assert render("{{ n is power_of_two }} {{ n is aligned(4) }} {{ n|define('N') }}", n=6) == "False False #define N 6"


def test_our_additions_can_be_added_to_and_replaced(tmp_path):
    environment = KernelEnvironment(
        tmp_path,
        filters={"twice": lambda x: x * 2, "define": lambda v, n: f"{n}={v}"},
        tests={"odd_one": lambda x: x == 1},
        globals={"warp": 32},
    )
    assert (
        environment.from_string("{{ 2|twice }} {{ 1|define('A') }} {{ 1 is odd_one }} {{ warp }}").render()
        == "4 A=1 True 32"
    )


def test_a_parameter_may_have_any_name():
    assert render("{{ name }}{{ template_name }}{{ self_ }}", name=1, template_name=2, self_=3) == "123"


def test_unroll():
    source = (
        "{% for n in (4, 'TILE / 2') %}\n    {% unroll n %}\n    for (;;);\n{% endfor %}\n{% unroll %}\nfor (;;);\n"
    )
    loop = "    for (;;);\n"
    assert render(source) == f"#pragma unroll 4\n{loop}#pragma unroll TILE / 2\n{loop}#pragma unroll\nfor (;;);\n"


@pytest.mark.parametrize("factor", [0, -1, True, 1.5, ""])
def test_unroll_refuses_what_is_no_count(factor):
    with pytest.raises(TemplateError) as caught:
        render("\n{% unroll n %}\n", n=factor)
    assert str(caught.value) == f"<string>:2: unroll takes a positive integer or a C++ expression, not {factor!r}"


def test_require_passes_in_silence():
    assert render('{% require n > 1 and n is aligned(2), "n" %}\nx', n=2) == "x"


def test_require_says_line_message_and_values():
    source = '// tile\n\n{% require m % n == 0 and limit is undefined, "m must be a multiple of " ~ n %}\n'
    with pytest.raises(TemplateError) as caught:
        render(source, m=10, n=4)
    assert str(caught.value) == "<string>:3: m must be a multiple of 4 (limit is undefined, m = 10, n = 4)"
    assert (caught.value.template, caught.value.line) == ("<string>", 3)


def test_require_in_an_include_names_the_include(folder):
    environment = folder(k_j2='{% include "i.j2" %}', i_j2='\n{% require n is power_of_two, "n: a power of two" %}')
    with pytest.raises(TemplateError) as caught:
        environment.render("k.j2", n=6)
    assert str(caught.value) == "i.j2:2: n: a power of two (n = 6)"
    assert caught.value.template == "i.j2"


@pytest.mark.parametrize(
    ("source", "message", "line"),
    [
        ("\n{{ blok }}", "<string>:2: 'blok' is undefined; did you mean 'block'?", 2),
        ("{{ zzz }}", "<string>:1: 'zzz' is undefined; parameters: block, dtype", 1),
        ("\n\n{{ dtype.nam }}", "<string>:3: 'str object' has no attribute 'nam'", 3),
        ("{{ block|ctyp }}", "<string>:1: No filter named 'ctyp'; did you mean 'ctype'?", 1),
        ("{{ block is power_of_too }}", "<string>:1: No test named 'power_of_too'; did you mean 'power_of_two'?", 1),
        ("\n{% unrol 4 %}", "<string>:2: Encountered unknown tag 'unrol'; did you mean 'unroll'?", 2),
        ("{% require block %}", '<string>:1: require takes a condition and a message: {% require n > 0, "n must be', 1),
        ("\n{{ block / 0 }}", "<string>:2: ZeroDivisionError: division by zero", 2),
        ("\n{{ 'flot16'|ctype }}", "<string>:2: no CUDA C++ type for dtype 'flot16'; did you mean 'float16'?", 2),
        ("\n{{ t|ctype }}".replace("t|", "(dtype ~ 'x')|"), "<string>:2: no CUDA C++ type for dtype 'float32x'", 2),
        ("{% if block %}", "<string>:1: Unexpected end of template", 1),
        ("{% include 'k.cuh' %}", "<string>:1: no template 'k.cuh' in an empty search path", 1),
        ("{{ [1][block].x }}", "<string>:1: list object has no element 256", 1),
    ],
)
def test_errors_name_template_line_and_the_nearest_name(source, message, line):
    with pytest.raises(TemplateError) as caught:
        render(source, block=256, dtype="float32")
    assert str(caught.value).startswith(message)
    assert (caught.value.template, caught.value.line) == ("<string>", line)
    assert isinstance(caught.value, ProgCacheError)


def test_an_error_lies_where_its_text_is(folder):
    environment = folder(
        k_j2='{% import "m.j2" as m %}\nint a;\n{{ m.f(1) }}\n', m_j2="{% macro f(x) %}\n\n{{ x / 0 }}{% endmacro %}"
    )
    with pytest.raises(TemplateError) as caught:
        environment.render("k.j2")
    assert str(caught.value) == "m.j2:3: ZeroDivisionError: division by zero"


def test_syntax_errors_in_files_name_the_file(folder):
    environment = folder(k_j2='x\n{% include "bad.j2" %}\n', bad_j2="a\n\n{% endfor %}")
    with pytest.raises(TemplateError, match=r"^bad\.j2:3: Encountered unknown tag 'endfor'"):
        environment.render("k.j2")


def test_a_missing_template_names_the_nearest(folder):
    environment = folder(axpby_cu="x")
    with pytest.raises(TemplateError) as caught:
        environment.get_template("axpy.cu")
    assert str(caught.value) == f"axpy.cu: no template 'axpy.cu' in {folder.path}; did you mean 'axpby.cu'?"
    with pytest.raises(TemplateError, match=r"no template '\.\./axpby\.cu'"):
        environment.render("../axpby.cu")


def test_a_file_that_is_not_utf8(folder):
    environment = folder(k_j2="")
    (folder.path / "k.j2").write_bytes(b"ok\n\xff\n")
    with pytest.raises(TemplateError, match=r"^k\.j2:2: .*k\.j2 is not UTF-8"):
        environment.render("k.j2")


def test_the_first_folder_wins(tmp_path):
    for name, text in (("a", "from a"), ("b", "from b")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "k.j2").write_text(text)
    (tmp_path / "b" / "only.j2").write_text("only b")
    environment = KernelEnvironment([tmp_path / "a", tmp_path / "b"])
    assert environment.render("k.j2") + environment.render("only.j2") == "from aonly b"


def test_an_edited_template_is_read_again(folder):
    environment = folder(k_j2='{% include "i.j2" %}', i_j2="old")
    assert environment.get_template("k.j2").render_traced()[0] == "old"
    before = environment.digests("k.j2")
    stat = os.stat(folder.path / "i.j2")
    folder(i_j2="newer")
    os.utime(folder.path / "i.j2", ns=(stat.st_atime_ns, stat.st_mtime_ns))  # only the size differs
    text, digests = environment.get_template("k.j2").render_traced()
    assert text == "newer"
    assert digests["i.j2"] == hashlib.sha256(b"newer").hexdigest() != before["i.j2"]
    assert digests["k.j2"] == before["k.j2"]


def test_digests_cover_includes_imports_and_parents(folder):
    texts = {
        "k.j2": '{% extends "base.j2" %}{% import "m.j2" as m %}{% block b %}'
        '{% include "i.j2" %}{{ m.f() }}{% endblock %}',
        "base.j2": "{% block b %}{% endblock %}{% include 'none.j2' ignore missing %}",
        "m.j2": "{% from 'deep.j2' import g %}{% macro f() %}{{ g() }}{% endmacro %}",
        "deep.j2": "{% macro g() %}g{% endmacro %}",
        "i.j2": "i",
        "unrelated.j2": "",
    }
    environment = folder(**{name.replace(".", "_"): text for name, text in texts.items()})
    expected = {
        n: hashlib.sha256(texts[n].encode()).hexdigest() for n in ("base.j2", "deep.j2", "i.j2", "k.j2", "m.j2")
    }
    assert environment.digests("k.j2") == expected
    template = environment.get_template("k.j2")
    # The second render reuses the imported module, and must still list what that module imports.
    assert template.render_traced() == template.render_traced() == ("ig", expected)


def test_a_computed_include_is_in_the_digests_of_its_render(folder):
    environment = folder(k_j2="{% include which %}", a_j2="a", b_j2="b")
    template = environment.get_template("k.j2")
    assert set(template.render_traced(which="a.j2")[1]) == {"k.j2", "a.j2"}
    assert set(template.render_traced(which=["no.j2", "b.j2"])[1]) == {"k.j2", "b.j2"}
    string = environment.from_string('{% include "a.j2" %}{% if no %}{% include "b.j2" %}{% endif %}')
    assert set(string.render_traced(no=False)[1]) == {"a.j2", "b.j2"}


def test_undeclared_parameters_see_through_includes(folder):
    environment = folder(
        k_j2='{% set tile = block * 2 %}{% include "i.j2" %}{% macro m(x) %}{{ x + depth }}{% endmacro %}{{ m(1) }}',
        i_j2="{{ tile }}{{ range(n) }}{% for v in (1, 2) %}{{ v }}{{ loop.index }}{% endfor %}"
        "{{ vector_type('int', 2) }}",
    )
    assert environment.undeclared_parameters("k.j2") == {"block", "depth", "n"}


def test_undeclared_parameters_of_regions(folder):
    environment = folder(
        k_j2="{% region tile(a, b=depth) %}{{ a }}{{ b }}{{ n }}{% set own = 1 %}{{ own }}{% endregion %}{{ tile(m) }}"
        "{% globals %}{% set twice = k * 2 %}{% endglobals %}{{ twice }}"
    )
    assert environment.undeclared_parameters("k.j2") == {"depth", "k", "m", "n"}
    assert environment.get_template("k.j2").undeclared() == {"depth", "k", "m", "n"}


def test_threads_share_an_environment(folder):
    environment = folder(k_j2='{% include "i.j2" %}', i_j2="{% for i in range(n) %}{{ i }},{% endfor %}")
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda n: environment.get_template("k.j2").render_traced(n=n), range(64)))
    assert [text for text, _ in results] == ["".join(f"{i}," for i in range(n)) for n in range(64)]
    assert all(set(digests) == {"k.j2", "i.j2"} for _, digests in results)


def test_environment_and_template_pickle_without_what_they_compiled(folder):
    environment = folder(k_j2="{{ n }}")
    string = environment.from_string("s{{ n }}")
    assert environment.render("k.j2", n=1) + string.render(n=1) == "1s1"
    again = pickle.loads(pickle.dumps((environment, string)))
    assert again[0].render("k.j2", n=2) + again[1].render(n=2) == "2s2"


def test_evaluate():
    assert evaluate("block % 32 == 0 and block is power_of_two", {"block": 64}) is True
    assert evaluate("dtype|ctype", {"dtype": "int8"}) == "signed char"
    assert expression_names("block % warp == 0 and range(3)") == {"block", "warp"}
    for wrong, message in (
        ("blok > 1", "'blok' is undefined; did you mean 'block'?"),
        ("blok", "'blok' is undefined; did you mean 'block'?"),
        ("block >", "unexpected 'end of template'"),
        ("block / 0", "ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(TemplateError) as caught:
            evaluate(wrong, {"block": 1})
        assert str(caught.value).startswith(message)


def test_generated_from(folder):
    environment = folder(k_j2='#include "x.h"\n{% include "i.j2" %}', i_j2="int {{ n }};")
    marked = KernelEnvironment(folder.path, generated_from=True)
    digest = environment.digests("k.j2")["k.j2"]
    text = marked.render("k.j2", n="a")
    assert text == f"// GENERATED FROM k.j2 sha256:{digest}\n" + environment.render("k.j2", n="a")
    assert marked.get_template("k.j2").render_traced(n="a")[0] == text
    found = marked.source_map("k.j2", n="a")
    assert found.text == text
    assert [str(place) for place in found.lines] == ["None", "k.j2:1", "i.j2:1"]
    assert marked.from_string("{{ n }}").render(n=1) == "1"
    (folder.path / "k.ll.j2").write_text("ret void\n")
    assert marked.render("k.ll.j2").startswith("; GENERATED FROM k.ll.j2 sha256:")


def test_line_directives_on_request(folder):
    folder(k_j2='a\n{% include "i.j2" %}', i_j2="\nint {{ n }};")
    directed = KernelEnvironment(folder.path, line_directives=True, generated_from=True)
    text = directed.render("k.j2", n="b")
    assert text.splitlines()[1:] == ['#line 1 "k.j2"', "a", "", '#line 2 "i.j2"', "int b;"]
    assert directed.get_template("k.j2").render_traced(n="b")[0] == text
    found = directed.source_map("k.j2", n="b")
    assert [str(found.lookup(n)) for n in range(1, 7)] == ["None", "None", "k.j2:1", "None", "None", "i.j2:2"]
    assert directed.from_string("{{ n }}").render(n=1) == "1"
    (folder.path / "k.ll.j2").write_text("ret void\n")
    assert "#line" not in directed.render("k.ll.j2")


def test_errors_show_the_parameters_of_their_line(folder):
    environment = folder(
        k_j2="{{ n }}\n{{ dtype|ctype }} {{ n }} {{ 4 }}\n{% include 'i.j2' %}", i_j2="{{ (m / zero)\n if m }}"
    )
    for template in (environment.get_template("k.j2"), environment.from_string("\n{{ dtype|ctype }} x[{{ n }}];")):
        with pytest.raises(TemplateError) as caught:
            template.render(dtype="flot16", n=3, m=2, zero=0)
        assert str(caught.value) == (
            f"{template.name}:2: no CUDA C++ type for dtype 'flot16'; did you mean 'float16'? (dtype = 'flot16', n = 3)"
        )
    with pytest.raises(TemplateError) as caught:
        environment.render("k.j2", dtype="int8", n=3, m=2, zero=0)
    assert str(caught.value) == "i.j2:1: ZeroDivisionError: division by zero (m = 2, zero = 0)"


def test_a_static_context(folder, tmp_path):
    folder(k_j2="{% if arch >= 90 %}{{ tile.m * 2 }}{{ sizes }}{% else %}{{ missing }}{% endif %}{{ arch }}")
    cache = tmp_path / "cache"
    for arch, tile, expected in [(90, {"m": 4}, "8[1]90"), (100, {"m": 4}, "8[1]100"), (90, {"m": 5}, "10[1]90")]:
        for _ in range(2):
            static = {"arch": arch, "tile": tile, "sizes": [1]}
            environment = KernelEnvironment(folder.path, static_context=static, bytecode_cache=cache)
            assert environment.render("k.j2") == expected
            assert environment.from_string("{{ arch + n }}").render(n=1) == str(arch + 1)
            assert environment.evaluate("arch", {}) == arch
    assert environment.bytecode_cache.hits == 3


def test_what_can_not_be_told_is_not_kept(folder, tmp_path):
    folder(k_j2="{{ 1 if hidden }}")
    for _ in range(2):
        environment = KernelEnvironment(folder.path, static_context={"hidden": object()}, bytecode_cache=tmp_path / "c")
        assert environment.context_hash is None
        assert environment.render("k.j2") == "1"
        assert environment.bytecode_cache.stats()["file_count"] == 0


def test_a_changed_filter_is_another_text(folder, tmp_path):
    folder(k_j2="{{ 3|mine }}")

    def scaled(by):
        return lambda value: value * by

    for by in (2, 3, 2):
        environment = KernelEnvironment(folder.path, filters={"mine": scaled(by)}, bytecode_cache=tmp_path / "c")
        assert environment.render("k.j2") == str(3 * by)
    assert environment.bytecode_cache.hits == 1


def test_a_moved_folder_keeps_its_compiled_templates(folder, tmp_path):
    folder(k_j2="\n{{ n / zero }}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "k.j2").write_text("\n{{ n / zero }}")
    for place in (folder.path, tmp_path / "other"):
        environment = KernelEnvironment(place, bytecode_cache=tmp_path / "c")
        with pytest.raises(TemplateError, match=r"k\.j2:2: ZeroDivisionError") as caught:
            environment.render("k.j2", n=1, zero=0)
        innermost = caught.value.__cause__.__traceback__
        while innermost.tb_next is not None:
            innermost = innermost.tb_next
        assert innermost.tb_frame.f_code.co_filename == str(place / "k.j2")
    assert environment.bytecode_cache.hits == 1


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("{{ f(\n 1,\n gone\n) }}", 3),
        ("{{ a ~\n b ~\n gone }}", 3),
        ("{% for i in\n gone %}{% endfor %}", 2),
        ("{% call f(\n gone) %}{% endcall %}", 2),
        ("{% filter indent(\ngone) %}{% endfilter %}", 2),
        ("{{ a }}\n{{ a\n + 1\n + gone.b }}\n{{ gone }}", 4),
        ("{% set q = gone %}\n\n{{ q }}\n{{ gone }}", 3),
        ("{{ [1,\n a / 0\n]|join }}", 2),
    ],
)
def test_an_error_in_an_expression_over_several_lines_names_the_line(source, line):
    with pytest.raises(TemplateError) as caught:
        KernelEnvironment(()).from_string(source).render(a=1, b=2, f=lambda *args, **_: "".join(map(str, args)))
    assert (caught.value.line, str(caught.value).split(": ")[0]) == (line, f"<string>:{line}")


def test_an_undefined_value_that_is_passed_is_no_matter_of_imports():
    with pytest.raises(TemplateError) as caught:
        KernelEnvironment(()).from_string("{{ x + 1 }}").render(x=jinja2.Undefined(name="x"))
    assert str(caught.value) == "<string>:1: 'x' is undefined"

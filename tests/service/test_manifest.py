# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from cuda_progcache.errors import KernelNotFoundError, ManifestError, ParameterError, TemplateError
from cuda_progcache.events import subscribe
from cuda_progcache.service.compile_service import CompileService
from cuda_progcache.service.manifest import KernelLibrary, Launch, bundled_library
from cuda_progcache.templates import BytecodeCache

AXPBY = """\
format = 1
[kernels.axpby]
template = "axpby.cu.j2"
description = "y = a*x + b*y"
entry_points = ["axpby_{{ dtype }}", "plain"]
name_expressions = ["axpby<{{ dtype | ctype }}, {{ block }}>"]
headers = ["cuda"]
options = { std = "c++17" }
min_arch = 80
reference = "a * x + b * y"
tolerance = { rtol = 1e-5, atol = 0 }
constraints = [ { require = "block % 32 == 0", message = "block must be a multiple of the warp size" } ]
[kernels.axpby.parameters]
dtype = { type = "dtype", values = ["float32", "float64", "f2"], default = "float32", description = "element type" }
block = { type = "int", min = 32, max = 1024, default = 256 }
scale = { type = "float", default = 1 }
fast = { type = "bool", default = false }
label = { type = "str", values = ["sum", "max"], default = "sum" }
[[kernels.axpby.variants]]
[[kernels.axpby.variants]]
dtype = "<f2"
"""
SOURCE = '{% include "head.cuh.j2" %}\n{{ dtype|ctype }} x[{{ block }}]; // {{ scale }} {{ fast }} {{ label }}\n'


@pytest.fixture
def library(tmp_path):
    return make(tmp_path)


def make(folder, manifest=AXPBY, **templates):
    files = {
        "axpby.cu.j2": SOURCE,
        "head.cuh.j2": "// head\n",
        **{n.replace("_", "."): t for n, t in templates.items()},
    }
    for name, text in {**files, "manifest.toml": manifest}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return KernelLibrary(folder)


def test_a_library_is_its_manifest(library, tmp_path):
    assert (library.names, len(library), [spec.name for spec in library]) == (("axpby",), 1, ["axpby"])
    assert "axpby" in library
    assert "other" not in library
    assert (library.path, library.manifest) == (tmp_path, tmp_path / "manifest.toml")
    spec = library["axpby"]
    assert (spec.templates, spec.code_type, spec.headers, spec.min_arch) == (("axpby.cu.j2",), "c++", ("cuda",), 80)
    assert (spec.options, spec.tolerance) == ({"std": "c++17"}, {"rtol": 1e-5, "atol": 0})
    assert spec.variants == ({}, {"dtype": "float16"})
    dtype = spec.parameters["dtype"]
    assert (dtype.type, dtype.values, dtype.default, dtype.description) == (
        "dtype",
        ("float32", "float64", "float16"),
        "float32",
        "element type",
    )
    assert (spec.parameters["block"].min, spec.parameters["block"].max) == (32, 1024)
    assert KernelLibrary(tmp_path / "manifest.toml").names == library.names


def test_render(library, tmp_path):
    rendered = library.render("axpby", dtype=np.float16, block=np.int64(64))
    assert rendered.params == {"dtype": "float16", "block": 64, "scale": 1.0, "fast": False, "label": "sum"}
    (module,) = rendered.modules
    assert (module.name, module.template) == ("axpby", "axpby.cu.j2")
    assert module.source == "// head\n__half x[64]; // 1.0 False sum\n"
    assert rendered.entry_points == ("axpby_float16", "plain")
    assert rendered.name_expressions == ("axpby<__half, 64>",)
    assert rendered.template_digests == {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("axpby.cu.j2", "head.cuh.j2")
    }
    assert [str(location) for location in module.source_map().lines[:2]] == ["head.cuh.j2:1", "axpby.cu.j2:2"]


def test_several_templates_are_several_modules(tmp_path):
    manifest = 'format = 1\n[kernels.pair]\ntemplates = ["main.cu.j2", "part.cu.j2"]\nentry_points = ["k"]\n'
    library = make(tmp_path, manifest, main_cu_j2="a", part_cu_j2="b")
    assert [(m.name, m.source, m.template) for m in library.render("pair").modules] == [
        ("main", "a", "main.cu.j2"),
        ("part", "b", "part.cu.j2"),
    ]
    assert set(library.render("pair").template_digests) == {"main.cu.j2", "part.cu.j2"}


def test_a_source_map_of_an_edited_template_is_not_known(library, tmp_path):
    (module,) = library.render("axpby").modules
    (tmp_path / "axpby.cu.j2").write_text("other\n" + SOURCE)
    found = module.source_map()
    assert (found.text, found.lines, found.reason) == (
        module.source,
        (),
        "axpby.cu.j2 changed since it was rendered",
    )
    (tmp_path / "axpby.cu.j2").write_text("{{ nothing }}")
    assert module.source_map().reason.startswith("the template changed since it was rendered: axpby.cu.j2:1: 'nothing'")


def test_an_unknown_kernel_names_the_nearest(library):
    with pytest.raises(KernelNotFoundError) as caught:
        library.render("axpy")
    assert str(caught.value) == f"no kernel 'axpy' in {library.manifest}; did you mean 'axpby'?"
    with pytest.raises(KernelNotFoundError, match=r"there are: axpby$"):
        library["zzz"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"blok": 1}, "has no parameter 'blok'; did you mean 'block'?"),
        ({"zzz": 1}, "has no parameter 'zzz'; it has: block, dtype, fast, label, scale"),
        ({"block": "64"}, "block must be an int, not '64' (str)"),
        ({"block": 64.0}, "block must be an int, not 64.0 (float)"),
        ({"block": True}, "block must be an int, not True (bool)"),
        ({"scale": "1"}, "scale must be a float, not '1' (str)"),
        ({"scale": True}, "scale must be a float, not True (bool)"),
        ({"fast": 1}, "fast must be a bool, not 1 (int)"),
        ({"label": 1}, "label must be a str, not 1 (int)"),
        ({"label": "summ"}, "label = 'summ' is not one of sum, max; nearest: 'sum'"),
        ({"label": "qqq"}, "label = 'qqq' is not one of sum, max"),
        ({"block": 16}, "block = 16 is below its minimum; nearest: 32"),
        ({"block": 2048}, "block = 2048 is above its maximum; nearest: 1024"),
        ({"dtype": "int32"}, "dtype = 'int32' is not one of float32, float64, float16; nearest: "),
        ({"dtype": "flot32"}, "dtype: no CUDA C++ type for dtype 'flot32'; did you mean 'float32'?"),
        ({"dtype": 3}, "dtype: 3 is not a dtype; give a NumPy dtype"),
        ({"block": 100}, "block must be a multiple of the warp size (block % 32 == 0 is false for block = 100)"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_is_rendered(tmp_path, params, message):
    library = make(tmp_path, axpby_cu_j2="{{ would_fail }}")
    with pytest.raises(ParameterError) as caught:
        library.render("axpby", **params)
    assert str(caught.value).startswith("kernel 'axpby'")
    assert message in str(caught.value)


def test_parameters_become_plain_python(library):
    bound = library["axpby"].bind(
        {"scale": np.float32(0.5), "fast": np.bool_(1), "dtype": np.dtype("f8"), "label": "max"}
    )
    assert bound == {"dtype": "float64", "block": 256, "scale": 0.5, "fast": True, "label": "max"}
    assert [type(value) for value in bound.values()] == [str, int, float, bool, str]
    assert type(library["axpby"].bind({"scale": 2})["scale"]) is float


def test_a_number_has_a_nearest_value(tmp_path):
    manifest = """format = 1
[kernels.k]
template = "k.j2"
entry_points = ["k"]
[kernels.k.parameters]
n = { type = "int", values = [1, 2, 4, 8], default = 1 }
x = { type = "float", max = 1.5, default = 0.0 }
"""
    spec = make(tmp_path, manifest)["k"]
    with pytest.raises(ParameterError, match="n = 7 is not one of 1, 2, 4, 8; nearest: 8"):
        spec.bind({"n": 7})
    with pytest.raises(ParameterError, match="x = nan is above its maximum"):
        spec.bind({"x": float("nan")})
    with pytest.raises(ParameterError, match="kernel 'k' has no parameter 'm'"):
        spec.bind({"m": 7})


def test_a_parameter_without_default_has_to_be_given(tmp_path):
    manifest = AXPBY.replace(", default = 256 }", " }")
    with pytest.raises(ManifestError, match=r"kernel 'axpby', variant 1: parameter 'block' .int. has no default"):
        make(tmp_path, manifest)
    library = make(tmp_path, manifest.replace("variants]]\n", "variants]]\nblock = 64\n"))
    assert library.render("axpby", block=32).params["block"] == 32
    with pytest.raises(ParameterError, match=r"parameter 'block' .int. has no default; give it"):
        library.render("axpby")
    without = manifest[: manifest.index("[[kernels.axpby.variants]]")]
    with pytest.raises(ManifestError, match="no default for block; list a variant that sets them"):
        make(tmp_path, without)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("format = 1", "format = 2", "manifest.toml: the manifest needs the line format = 1, not format = 2"),
        ("format = 1", "", "manifest.toml: the manifest needs the line format = 1"),
        ("format = 1", "format = 1\nkernel = 3", "manifest.toml: unknown field 'kernel'; did you mean 'kernels'?"),
        ("[kernels.axpby]", "[kernels.axpby", "manifest.toml is not valid TOML: "),
        ("description =", "descripton =", "kernel 'axpby': unknown field 'descripton'; did you mean 'description'?"),
        ("description =", "name = 'x'\ndescription =", "kernel 'axpby': unknown field 'name'"),
        ("min_arch = 80", "min_arch = 'sm_80'", "kernel 'axpby', min_arch: expected `int | null`, got `str`"),
        ("template =", "templates = ['b']\ntemplate =", 'give either template = "file" or templates ='),
        ('template = "axpby.cu.j2"', "", "give either template"),
        ('template = "axpby.cu.j2"', "templates = []", "kernel 'axpby', templates: the list is empty"),
        ('template = "axpby.cu.j2"', "template = 3", "kernel 'axpby', templates[0]: expected `str`, got `int`"),
        (
            'headers = ["cuda"]',
            'headers = ["cudaa"]',
            "headers: 'cudaa' is not one of cuda, cccl; did you mean 'cuda'?",
        ),
        ("min_arch = 80", 'code_type = "c+"', "code_type: 'c+' is not one of c++, nvvm"),
        ("rtol", "rtoll", "kernel 'axpby', tolerance: unknown field 'rtoll'; did you mean 'rtol'?"),
        ("require =", "requires =", "kernel 'axpby', constraint 1: unknown field 'requires'; did you mean 'require'?"),
        ('message = "block', 'message = 3, x = "block', "constraint 1: unknown field 'x'"),
        ("min_arch = 80", "launch = 256", "kernel 'axpby', launch: must be an array, not 256"),
        ("min_arch = 80", "launch = [{}]", "kernel 'axpby', launch[0]: object missing required field `threads`"),
        (
            "min_arch = 80",
            'launch = [{ threads = "block", shared_byte = 0 }]',
            "kernel 'axpby', launch 1: unknown field 'shared_byte'; did you mean 'shared_bytes'?",
        ),
        (
            "min_arch = 80",
            "launch = [{ threads = 1 }, { threads = 1 }]",
            "kernel 'axpby', launch: give one launch for all entry points, or one for each of the 3",
        ),
        ("block = { type", "blöck! = { type", "is not valid TOML"),
        ("block = { type", '"blo ck" = { type', "parameter 'blo ck': the name must be a Python identifier"),
        (
            "block = { type",
            "arch = { type",
            "parameter 'arch': the name must be a Python identifier, not a keyword, and not one of",
        ),
        ('type = "int"', 'type = "integer"', "parameter 'block', type: 'integer' is not one of int, float,"),
        ('type = "int", ', "", "parameter 'block': object missing required field `type`"),
        ("max = 1024", "maxi = 1024", "parameter 'block': unknown field 'maxi'; did you mean 'max'?"),
        ("max = 1024", "max = 16", "parameter 'block': min 32 is above max 16"),
        ("default = 256", "default = 16", "parameter 'block': block = 16 is below its minimum; nearest: 32"),
        ("default = 256", 'default = "256"', "parameter 'block': block must be an int, not '256' (str)"),
        ('default = "sum"', 'default = "min"', "parameter 'label': label = 'min' is not one of sum, max"),
        (
            'default = "sum"',
            'min = 1, default = "sum"',
            "parameter 'label': min and max are for int and float, not str",
        ),
        ('values = ["sum", "max"]', "values = []", "parameter 'label': values is empty"),
        ('values = ["sum", "max"]', "values = ['sum', 3]", "parameter 'label': label must be a str, not 3 (int)"),
        ('"f2"]', '"f3"]', "parameter 'dtype': dtype: no CUDA C++ type for dtype 'f3'"),
        ('dtype = "<f2"', 'dtype = "int8"', "kernel 'axpby', variant 2: dtype = 'int8' is not one of float32,"),
        (
            'dtype = "<f2"',
            'dtyp = "float16"',
            "kernel 'axpby', variant 2: has no parameter 'dtyp'; did you mean 'dtype'?",
        ),
        (
            'fast = { type = "bool", default = false }',
            "fast = 3",
            "parameter 'fast': must be a table with a type, not 3",
        ),
        ('options = { std = "c++17" }', "options = 3", "kernel 'axpby', options: must be a table, not 3"),
        (
            'options = { std = "c++17" }',
            'options = { stdd = "c++17" }',
            "kernel 'axpby', options: there is no option 'stdd'; did you mean 'std'?",
        ),
        (
            'options = { std = "c++17" }',
            'options = { arch = "sm_90" }',
            "kernel 'axpby', options: 'arch' is set when the kernel is compiled, not in the manifest",
        ),
        *(
            ('options = { std = "c++17" }', f"options = {{ {option} }}", f"kernel 'axpby', options: {message}")
            for option, message in (
                ("std = 17", "'std' must be a str, not 17"),
                ("ftz = 'yes'", "'ftz' must be a bool, not 'yes'"),
                ("max_register_count = true", "'max_register_count' must be an int, not True"),
                ("define_macro = 3", "'define_macro' must be a str, not 3"),
                ("define_macro = [2026-11-21]", "'define_macro' must be a str, not [datetime.date(2026, 11, 21)]"),
                ("time = 2026-11-21", "'time' must be a str, not datetime.date(2026, 11, 21)"),
                ("std = ['c++17']", "'std' must be a str, not ['c++17']"),
            )
        ),
        *(
            (
                'fast = { type = "bool", default = false }',
                f'{name} = {{ type = "bool", default = false }}',
                f"parameter {name!r}: {name!r} has a meaning in every template; choose another name, such as {name}_",
            )
            for name in ("range", "self", "true", "none", "loop", "caller", "vector_type")
        ),
        ("tolerance = { rtol = 1e-5, atol = 0 }", "tolerance = 3", "kernel 'axpby', tolerance: must be a table, not 3"),
    ],
)
def test_a_wrong_manifest_names_file_kernel_and_field(tmp_path, old, new, message):
    assert old in AXPBY
    with pytest.raises(ManifestError) as caught:
        make(tmp_path, AXPBY.replace(old, new, 1))
    assert str(caught.value).startswith(str(tmp_path / "manifest.toml"))
    assert message in str(caught.value)


def test_a_kernel_needs_a_name_to_launch(tmp_path):
    with pytest.raises(ManifestError, match=r"kernel 'k': give entry_points .* or name_expressions"):
        make(tmp_path, 'format = 1\n[kernels.k]\ntemplate = "k.j2"\n')
    with pytest.raises(ManifestError, match=r"manifest.toml: no \[kernels.NAME\] table"):
        make(tmp_path, "format = 1\n")
    with pytest.raises(ManifestError, match="kernel 'k': must be a table, not 3"):
        make(tmp_path, "format = 1\nkernels = { k = 3 }\n")


def test_a_missing_manifest_names_the_file(tmp_path):
    with pytest.raises(ManifestError) as caught:
        KernelLibrary(tmp_path / "nowhere")
    file = tmp_path / "nowhere" / "manifest.toml"
    assert str(caught.value) == f"can't read the kernel manifest {file}: No such file or directory"


def test_names_that_do_not_render_blame_the_manifest(tmp_path):
    library = make(tmp_path, AXPBY.replace("{{ block }}>", "{{ blok }}>"))
    with pytest.raises(ManifestError) as caught:
        library.render("axpby")
    assert str(caught.value) == (
        f"{library.manifest}: kernel 'axpby', name_expressions 'axpby<{{{{ dtype | ctype }}}}, {{{{ blok }}}}>': "
        "<string>:1: 'blok' is undefined; did you mean 'block'?"
    )
    library = make(tmp_path, AXPBY.replace("block % 32 == 0", "block % warp == 0"))
    with pytest.raises(ManifestError, match="kernel 'axpby', constraint 'block % warp == 0': 'warp' is undefined"):
        library.render("axpby")


def test_a_missing_template_is_a_template_error(tmp_path):
    library = make(tmp_path, AXPBY.replace('"axpby.cu.j2"', '"axpy.cu.j2"'))
    with pytest.raises(TemplateError, match=r"no template 'axpy.cu.j2' in .*; did you mean 'axpby.cu.j2'\?"):
        library.render("axpby")
    assert library.check() == [
        f"axpby: axpy.cu.j2: no template 'axpy.cu.j2' in {tmp_path}; did you mean 'axpby.cu.j2'?"
    ]


def test_check_finds_nothing_where_all_is_well(library):
    assert library.check() == []
    assert library.undeclared("axpby") == ()


@pytest.mark.parametrize(
    ("old", "new", "template", "problems"),
    [
        ("", "", SOURCE + "{{ blok }}", ["a template uses 'blok', which is not a parameter; did you mean 'block'?"]),
        ("", "", SOURCE.replace("{{ label }}", ""), ["parameter 'label' is not used"]),
        ("", "", SOURCE + "{% endif %}", ["axpby.cu.j2:3: Encountered unknown tag 'endif'"]),
        (
            "block % 32",
            "blok % 32",
            SOURCE,
            ["a constraint uses 'blok', which is not a parameter; did you mean 'block'?"],
        ),
        ("block % 32", "block %% 32", SOURCE, ["unexpected '%'"]),
        (
            "min_arch = 80",
            'launch = [{ threads = "blok" }]',
            SOURCE,
            [
                "a launch uses 'blok', which is not a parameter; did you mean 'block'?",
                "variant 1: kernel 'axpby', launch, threads 'blok': ",
            ],
        ),
        (
            "min_arch = 80",
            'launch = [{ threads = "block", shared_bytes = "block * 1024" }]',
            SOURCE,
            ["variant 1: kernel 'axpby', launch, shared_bytes 'block * 1024' is 262144, not an int from 0 to 232448"],
        ),
        (
            "min_arch = 80",
            'launch = [{ threads = "block / 1" }]',
            SOURCE,
            ["variant 1: kernel 'axpby', launch, threads 'block / 1' is 256.0, not an int from 1 to 1024"],
        ),
        ('dtype = "<f2"', 'dtype = "float32"', SOURCE, ["variant 2 ({'dtype': 'float32'}) is a duplicate"]),
        (
            'dtype = "<f2"',
            "block = 48",
            SOURCE,
            ["variant 2: kernel 'axpby': block must be a multiple of the warp"],
        ),
        (
            "[[kernels.axpby.variants]]\n[[",
            "[[",
            SOURCE + "{{ 1 // 0 if dtype == 'float32' }}",
            ["the defaults: axpby.cu"],
        ),
        ('["axpby_{{ dtype }}"', '["axpby_{{ dtyp }}"', SOURCE, ["variant 1: ", "variant 2: "]),
    ],
)
def test_check_says_what_is_wrong(tmp_path, old, new, template, problems):
    library = make(tmp_path, AXPBY.replace(old, new, 1), axpby_cu_j2=template)
    found = library.check()
    for problem in problems:
        assert any(line.startswith(f"axpby: {problem}") for line in found), found


def test_how_each_entry_is_launched(tmp_path):
    assert make(tmp_path).launches("axpby") == {}
    launch = 'launch = [{ threads = "block", min_blocks = 1, shared_bytes = "block * 8 if fast else 0" }]'
    for _ in range(2):  # decoded, then as it was kept
        library = make(tmp_path, AXPBY.replace("min_arch = 80", launch))
        for params, expected in (
            ({}, Launch(256, 1, 0)),
            ({"block": 64, "fast": True}, Launch(64, 1, 512)),
        ):
            found = library.launches("axpby", **params)
            assert list(found) == ["axpby_float32", "plain", f"axpby<float, {expected.threads}>"]
            assert set(found.values()) == {expected}
    launch = "launch = [{ threads = 1 }, { threads = 2 }, { threads = 3, shared_bytes = 4 }]"
    found = make(tmp_path, AXPBY.replace("min_arch = 80", launch)).launches("axpby")
    assert list(found.values()) == [Launch(1), Launch(2), Launch(3, 0, 4)]
    with pytest.raises(ParameterError, match="block must be a multiple"):
        library.launches("axpby", block=33)


def test_undeclared_names(tmp_path):
    library = make(tmp_path, axpby_cu_j2=SOURCE + "{{ blok }}{{ other }}")
    assert library.undeclared("axpby") == ("blok", "other")


def test_libraries_and_rendered_kernels_pickle(library):
    rendered = library.render("axpby")
    again, kernel = pickle.loads(pickle.dumps((library, rendered)))
    assert again.render("axpby") == rendered == kernel
    assert kernel.modules[0].source_map().lines


def test_loading_a_library_imports_neither_jinja2_nor_numpy():
    code = (
        "import sys; from cuda_progcache.service.manifest import KernelLibrary; KernelLibrary();"
        "sys.exit(sorted({'numpy', 'jinja2', 'difflib', 'cuda.core'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_bundled_library_is_found_and_sound():
    library = KernelLibrary()
    assert library.path == bundled_library()
    assert len(library) >= 10
    assert library.check() == []


def test_the_bundled_library_maps_every_visible_line():
    library = KernelLibrary()
    for spec in library:
        for module in library.render(spec.name, **(spec.variants[0] if spec.variants else {})).modules:
            found = module.source_map()
            assert found.reason == "", module.template
            for number, line in enumerate(module.source.split("\n"), 1):
                location = found.lookup(number)
                assert (location is not None) == bool(line.strip()), (module.template, number, line)
                if location is None:
                    continue
                origin = (library.path / location.template).read_text(encoding="utf-8").split("\n")[location.line - 1]
                if "{{" not in origin and "{%" not in origin and "{#" not in origin:
                    # A tag with a minus sign after it joins more text to the line.
                    assert "".join(line.split()).startswith("".join(origin.split())), (module.template, number)


def test_without_a_library_both_places_are_named(monkeypatch, tmp_path):
    from cuda_progcache.service import manifest

    monkeypatch.setattr(manifest, "__file__", str(tmp_path / "cuda_progcache" / "service" / "manifest.py"))
    with pytest.raises(ManifestError) as caught:
        KernelLibrary()
    places = (tmp_path / "cuda_progcache" / "kernels", tmp_path / "kernels")
    assert str(caught.value) == (
        f"the bundled kernel library is neither in {places[0]} nor in {places[1]}; reinstall cuda-progcache"
    )
    for place in reversed(places):
        place.mkdir(parents=True)
        make(place)
        assert KernelLibrary().path == place


ALL_RENDERED = """
import hashlib, sys
from cuda_progcache.service.manifest import KernelLibrary
library = KernelLibrary()
digest = hashlib.sha256()
for spec in library:
    for variant in spec.variants or ({},):
        rendered = library.render(spec.name, **variant)
        digest.update(repr([(m.name, m.source) for m in rendered.modules]).encode())
        digest.update(repr((rendered.entry_points, rendered.name_expressions, rendered.template_digests)).encode())
print(digest.hexdigest(), "jinja2" in sys.modules)
"""


def test_a_second_process_renders_the_bundled_library_without_jinja2(monkeypatch, tmp_path):
    outputs = []
    for directory in (tmp_path / "compiled", tmp_path / "compiled", "off"):
        monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", str(directory))
        done = subprocess.run([sys.executable, "-c", ALL_RENDERED], capture_output=True, text=True, check=True)
        outputs.append(done.stdout.split())
    assert [jinja2 for _, jinja2 in outputs] == ["True", "False", "True"]
    assert len({digest for digest, _ in outputs}) == 1


def test_a_library_takes_a_bytecode_cache_or_none(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", str(tmp_path / "default"))
    own = BytecodeCache(tmp_path / "own")
    assert KernelLibrary(tmp_path, bytecode_cache=own).environment.bytecode_cache is own
    assert KernelLibrary(tmp_path, bytecode_cache=None).environment.bytecode_cache is None
    assert not (tmp_path / "default").exists()
    library = KernelLibrary(tmp_path)
    library.render("axpby")
    assert library.environment.bytecode_cache.directory == str(tmp_path / "default")
    # The manifest, two templates, two names that are templates, one constraint.
    assert library.environment.bytecode_cache.stats()["file_count"] == 6


@pytest.fixture
def decoded(monkeypatch):
    """How often a manifest's TOML is decoded."""
    from cuda_progcache.service import kernel_tables

    calls = []
    real = kernel_tables.decode
    monkeypatch.setattr(kernel_tables, "decode", lambda *given: (calls.append(given), real(*given))[1])
    return calls


def test_a_manifest_is_decoded_once(tmp_path, decoded):
    kept = BytecodeCache(tmp_path / "compiled")
    make(tmp_path)
    decoded.clear()
    first, again = (KernelLibrary(tmp_path, bytecode_cache=kept) for _ in "ab")
    assert len(decoded) == 1
    assert list(first) == list(again) == list(KernelLibrary(tmp_path, bytecode_cache=None))
    assert repr(list(first)) == repr(list(again))
    assert first.render("axpby", block=64) == again.render("axpby", block=64)
    assert (first.check(), again.check()) == ([], [])


def test_a_manifest_that_changed_is_decoded_again(tmp_path, decoded, monkeypatch):
    kept = BytecodeCache(tmp_path / "compiled")
    make(tmp_path)
    KernelLibrary(tmp_path, bytecode_cache=kept)
    (tmp_path / "manifest.toml").write_text(AXPBY.replace("default = 256", "default = 128"))
    assert KernelLibrary(tmp_path, bytecode_cache=kept)["axpby"].bind()["block"] == 128
    (tmp_path / "manifest.toml").write_text(AXPBY.replace("min_arch", "minarch"))
    for _ in "ab":
        with pytest.raises(ManifestError, match="minarch"):
            KernelLibrary(tmp_path, bytecode_cache=kept)
    decoded.clear()
    (tmp_path / "manifest.toml").write_text(AXPBY)
    KernelLibrary(tmp_path, bytecode_cache=kept)
    assert not decoded
    monkeypatch.setattr("cuda_progcache.service.manifest._decoder", lambda: "another release's")
    KernelLibrary(tmp_path, bytecode_cache=kept)
    assert len(decoded) == 1


def test_a_damaged_kept_manifest_is_decoded_again(tmp_path, decoded):
    kept = BytecodeCache(tmp_path / "compiled")
    make(tmp_path)
    expected = list(KernelLibrary(tmp_path, bytecode_cache=kept))
    (file,) = (path for path in (tmp_path / "compiled").iterdir() if "manifest" in path.name)
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    decoded.clear()
    assert list(KernelLibrary(tmp_path, bytecode_cache=kept)) == expected
    assert len(decoded) == 1


def test_an_unsafe_default_directory_is_not_used_and_said(library, tmp_path, monkeypatch):
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", str(open_to_all))
    events = []
    unsubscribe = subscribe(events.append)
    other = KernelLibrary(tmp_path)
    unsubscribe()
    assert other.environment.bytecode_cache is None
    assert other.render("axpby").modules == library.render("axpby").modules
    assert list(open_to_all.iterdir()) == []
    assert [event.kind for event in events] == ["drop"]
    assert "compiled templates are executed, but this directory is open to others (mode 0777)" in str(events[0])


def test_generated_from_and_line_directives(library, tmp_path):
    plain = library.render("axpby")
    marked = KernelLibrary(tmp_path, generated_from=True, line_directives=True).render("axpby")
    digest = plain.template_digests["axpby.cu.j2"]
    assert marked.modules[0].source == (
        f'// GENERATED FROM axpby.cu.j2 sha256:{digest}\n#line 1 "head.cuh.j2"\n// head\n#line 2 "axpby.cu.j2"\n'
        "float x[256]; // 1.0 False sum\n"
    )
    assert (marked.name_expressions, marked.entry_points) == (plain.name_expressions, plain.entry_points)
    assert marked.modules[0].source_map().reason == ""


def test_an_include_path_lies_in_the_library(tmp_path, monkeypatch):
    text = AXPBY.replace('options = { std = "c++17" }', 'options = { include_path = ["inc", "/abs"] }', 1)
    library = make(tmp_path, text)
    monkeypatch.chdir("/")
    again = KernelLibrary(tmp_path)
    for one in (library, again):
        assert one["axpby"].options["include_path"] == [str(tmp_path / "inc"), "/abs"]
        assert f"axpby: options, include_path: there is no folder {tmp_path / 'inc'}" in one.check()


ENTRY = """format = 1
[kernels.k]
template = "k.cu.j2"
entry_points = ["{name}"]
[kernels.k.parameters]
n = {{ type = "int", default = 1 }}
"""


def test_an_entry_point_that_is_not_there_is_noticed(tmp_path):
    (tmp_path / "k.cu.j2").write_text('extern "C" __global__ void good(int* x) { *x = {{ n }}; }\n{% set n = 2 %}')
    for name, problems in (
        ("good", []),
        *((wrong, [f"k: the defaults: the source has no entry point {wrong!r}"]) for wrong in ("god", "x", "goo")),
    ):
        (tmp_path / "manifest.toml").write_text(ENTRY.format(name=name))
        library = KernelLibrary(tmp_path)
        assert [line for line in library.check() if "entry point" in line] == problems
        service = CompileService(cache=None, library=library)
        for target in ("cubin", "ptx"):
            if not problems:
                assert service.kernel("k", arch="sm_80", target_type=target).data
                continue
            with pytest.raises(ManifestError, match=f"the compiled {target} has no '{name}'"):
                service.kernel("k", arch="sm_80", target_type=target)


def test_a_check_tells_what_is_likely_a_mistake_in_a_template(tmp_path):
    (tmp_path / "k.cu.j2").write_text('extern "C" __global__ void good() {}\n{% set a = 0 %}\n'
                                      "{% for i in [n] %}{% set a = i %}{% endfor %}{{ a }}")  # fmt: skip
    (tmp_path / "manifest.toml").write_text(ENTRY.format(name="good"))
    (problem,) = KernelLibrary(tmp_path).check()
    assert problem.startswith(
        "k: k.cu.j2:3: the value that the loop's body assigns to 'a' is lost after each iteration"
    )

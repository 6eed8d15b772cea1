# SPDX-License-Identifier: Apache-2.0
"""From a kernel's name to a binary on disk, and back."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from cuda_progcache import CompileService, FileStreamProgramCache, InMemoryProgramCache, KernelLibrary, ProgramOptions
from cuda_progcache.errors import ArchError, CompileError, KernelNotFoundError, ManifestError, ParameterError
from cuda_progcache.inspect import find_tool

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'


def test_from_a_name_to_a_cubin_that_cuobjdump_opens_and_back(service):
    made = service.kernel("fill", arch="sm_90", dtype="int32", block=128)
    assert not made.hit
    path = service.cache.info(made.digest).path
    done = subprocess.run(
        [find_tool("cuobjdump"), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
    )
    assert "Function fill" in done.stdout
    again = service.kernel("fill", arch="sm_90", dtype="int32", block=128)
    assert again.hit
    assert again.data == made.data == path.read_bytes()


def test_the_record_says_where_it_came_from(service):
    made = service.kernel("fill", arch="sm_90", block=128)
    kernel = service.cache.load(bytes.fromhex(made.record["key"])).record["kernel"]
    assert kernel["name"] == "fill"
    assert kernel["parameters"] == {"dtype": "float32", "block": 128}
    assert [t["name"] for t in kernel["templates"]] == ["fill.cu.j2"]
    assert [t["name"] for t in made.record["toolchain"]] == ["nvrtc", "nvrtc-builtins"]
    assert str(service.library.path) not in str(made.record)


def test_every_kind_of_kernel(service):
    typed = service.kernel("typed", arch="sm_80")
    assert typed.symbol_mapping == {"typed<__half>": b"_Z5typedI6__halfEvPT_"}
    pair = service.kernel("pair", arch="sm_80")
    assert list(pair.resource_usage()) == ["pair"], "the callee was inlined by the linker"
    ir = service.kernel("ir", arch="sm_80")
    assert list(ir.resource_usage()) == ["ir"]
    assert b".entry ir" in service.kernel("ir", arch="sm_80", target_type="ptx").data
    assert b".entry fill" in service.kernel("fill", arch="sm_80", target_type="ptx").data
    for name in ("typed", "pair", "ir"):
        assert service.kernel(name, arch="sm_80").hit
    assert pair.record["kernel"]["templates"][0]["name"] == "callee.cu.j2"


def test_an_edited_template_is_a_miss(service, library_dir):
    service.kernel("fill", arch="sm_80")
    path = library_dir / "fill.cu.j2"
    path.write_text(path.read_text().replace("= value", "= value + value"))
    assert not service.kernel("fill", arch="sm_80").hit


@pytest.mark.parametrize(
    ("name", "given", "error", "words"),
    [
        ("fil", {}, KernelNotFoundError, "fill"),
        ("fill", {"blok": 128}, ParameterError, "block"),
        ("fill", {"dtype": "int23"}, ParameterError, "int32"),
        ("fill", {"block": 2048}, ParameterError, "1024"),
        ("fill", {"block": "128"}, ParameterError, "must be an int"),
        ("fill", {"arch": "sm90"}, ArchError, "did you mean 'sm_90'"),
        ("fill", {"arch": "sm_91"}, ArchError, "did you mean 'sm_90'"),
        ("fill", {"arch": 90}, ArchError, "sm_90"),
        ("fill", {"arch": "gfx90a"}, ArchError, "compiles for sm_75"),
        ("typed", {"arch": "sm_75"}, ArchError, "needs sm_80 or later"),
        ("fill", {"target_type": "fatbin"}, ValueError, "'cubin'"),
    ],
    ids=str,
)
def test_errors_name_the_nearest_before_any_compile(service, name, given, error, words):
    with pytest.raises(error, match=words):
        service.kernel(name, **{"arch": "sm_90"} | given)
    assert len(service.cache) == 0


def test_an_architecture_that_this_compiler_lost(service):
    """sm_50 is well known, but no NVRTC 13 compiles for it."""
    with pytest.raises(ArchError, match="sm_75"):
        service.kernel("fill", arch="sm_50")
    with pytest.raises(ArchError, match="sm_75"):
        service.compile(SOURCE, options=ProgramOptions(arch="sm_50"))


def test_architecture_variants_pass(service):
    assert service.kernel("fill", arch="sm_90a").arch == "sm_90a"


def test_several_architectures_in_one_request(service):
    archs = ["sm_80", "sm_90", "sm_120"]
    made = service.kernel("fill", arch=archs, dtype="int32")
    assert list(made) == archs
    assert [m.arch for m in made.values()] == archs
    assert len({m.digest for m in made.values()}) == len(service.cache) == 3
    assert all(m.hit for m in service.kernel("fill", arch=archs, dtype="int32").values())
    assert service.kernel("fill", arch="sm_90", dtype="int32").data == made["sm_90"].data
    with pytest.raises(ArchError, match="sm_90"):
        service.kernel("fill", arch=["sm_80", "sm_91"])
    with pytest.raises(ArchError, match="no architecture"):
        service.kernel("fill", arch=[])


def test_a_compile_error_names_the_templates_line(service, library_dir):
    template = library_dir / "fill.cu.j2"
    template.write_text("{# a comment\n over lines #}\n" + template.read_text().replace("= value;", "= valeu;"))
    with pytest.raises(CompileError) as caught:
        service.kernel("fill", arch="sm_90")
    assert 'fill.cu.j2:5: error: identifier "valeu" is undefined' in str(caught.value)
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.template, diagnostic.template_line, diagnostic.file) == ("fill.cu.j2", 5, "fill.cu")
    assert "threadIdx.x] = valeu;" in diagnostic.rendered
    assert 'identifier "valeu" is undefined' in caught.value.log


def test_a_compile_error_in_a_linked_module_names_its_template(service, library_dir):
    (library_dir / "callee.cu.j2").write_text("__device__ float twice(float x) { return x + y; }\n")
    with pytest.raises(CompileError, match=r"callee\.cu\.j2:1: error: identifier"):
        service.kernel("pair", arch="sm_90")


def test_a_compile_error_in_the_middle_of_a_line_names_what_put_it_there(service, library_dir):
    (library_dir / "m.cuh.j2").write_text(
        "{% macro one() %}\n{{ '' }}valeu{% endmacro %}\n{% macro two() -%}\n  other\n{%- endmacro %}\n"
    )
    (library_dir / "fill.cu.j2").write_text(
        '{% import "m.cuh.j2" as m %}\nextern "C" __global__ void fill({{ dtype|ctype }} *a) {\n'
        '    /* é */ a[0] = {{ m.one() | trim }} + {{ m.two() }} + {{ "1 + " ~\n "third" }}; fourth;\n}\n'
    )
    for library in (library_dir, KernelLibrary(library_dir, line_directives=True)):
        with pytest.raises(CompileError) as caught:
            CompileService(service.cache, library=library).kernel("fill", arch="sm_90")
        found = {d.message.split('"')[1]: f"{d.template}:{d.template_line}" for d in caught.value.diagnostics}
        assert found == {
            "valeu": "m.cuh.j2:2",
            "other": "m.cuh.j2:4",
            "third": "fill.cu.j2:4",
            "fourth": "fill.cu.j2:4",
        }


def test_a_compile_error_in_an_include_and_in_a_macro_names_their_lines(service, library_dir):
    (library_dir / "body.cuh.j2").write_text("// body\n{% macro store(to) %}\n  {{ to }} = valeu;\n{% endmacro %}\n")
    (library_dir / "load.cuh.j2").write_text("{# #}\n\n__device__ int load() { return nothing; }\n")
    (library_dir / "fill.cu.j2").write_text(
        '{% from "body.cuh.j2" import store %}\n{% include "load.cuh.j2" %}\n'
        'extern "C" __global__ void fill({{ dtype|ctype }} *a) {\n{{ store("a[" ~ block ~ "]") }}}\n'
    )
    for library in (library_dir, KernelLibrary(library_dir, line_directives=True)):
        with pytest.raises(CompileError) as caught:
            CompileService(service.cache, library=library).kernel("fill", arch="sm_90")
        found = {(d.template, d.template_line, d.rendered.strip()) for d in caught.value.diagnostics}
        assert found == {
            ("load.cuh.j2", 3, "__device__ int load() { return nothing; }"),
            ("body.cuh.j2", 3, "a[256] = valeu;"),
        }
        assert 'body.cuh.j2:3: error: identifier "valeu" is undefined' in str(caught.value)


def test_line_directives_are_in_the_key_and_hit(service, library_dir):
    plain = service.kernel("fill", arch="sm_90")
    directed = CompileService(service.cache, library=KernelLibrary(library_dir, line_directives=True))
    assert not directed.kernel("fill", arch="sm_90").hit
    assert directed.kernel("fill", arch="sm_90").hit
    assert service.kernel("fill", arch="sm_90").digest == plain.digest
    assert directed.kernel("ir", arch="sm_90").digest == service.kernel("ir", arch="sm_90").digest


def test_compile(service):
    log = io.StringIO()
    source = "#warning careful\ntemplate <class T> __global__ void k(T *a) { *a = 1; }"
    given = {"options": ProgramOptions(arch="sm_80"), "name_expressions": ("k<int>",)}
    first = service.compile(source, logs=log, **given)
    again = service.compile(source, logs=log, **given)
    assert (first.hit, again.hit) == (False, True)
    assert again.symbol_mapping == {"k<int>": b"_Z1kIiEvPT_"}
    assert log.getvalue() == 2 * first.log
    assert "careful" in first.log
    assert service.compile(SOURCE, "C++", options={"arch": "sm_80"}, target_type="PTX").target_type == "ptx"


def test_where_the_cache_is(tmp_path, monkeypatch, library_dir):
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path / "by-environment"))
    CompileService().compile(SOURCE, options=ProgramOptions(arch="sm_80"))
    CompileService(tmp_path / "by-path").compile(SOURCE, options=ProgramOptions(arch="sm_80"))
    assert len(FileStreamProgramCache(tmp_path / "by-environment")) == 1
    assert len(FileStreamProgramCache(tmp_path / "by-path")) == 1
    memory = CompileService(InMemoryProgramCache(), library=KernelLibrary(library_dir))
    assert [memory.kernel("fill", arch="sm_80").hit for _ in range(2)] == [False, True]


def test_a_library_that_is_not_there(tmp_path):
    service = CompileService(InMemoryProgramCache(), library=tmp_path)
    with pytest.raises(ManifestError, match=str(tmp_path)):
        service.kernel("fill", arch="sm_80")


def test_the_bundled_library_is_the_default():
    assert "axpby" in CompileService(InMemoryProgramCache()).library.names


def test_a_hit_for_a_kernel_loads_no_compiler(tmp_path, library_dir):
    code = (
        "from cuda_progcache import CompileService\n"
        f"service = CompileService({str(tmp_path / 'c')!r}, library={str(library_dir)!r})\n"
        "done = [service.kernel(k, arch='sm_80').hit for k in ('fill', 'typed', 'pair', 'ir')]\n"
        "import sys\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert not any(lib in maps for lib in ('libnvrtc', 'libnvvm', 'libnvJitLink'))\n"
        "print(all(done), 'cuda_progcache.compile.own_process' in sys.modules)\n"
    )
    outputs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in "ab"]
    assert [o.stdout.split() for o in outputs] == [["False", "True"], ["True", "False"]]


def test_threads_share_a_service(service):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda n: service.kernel("fill", arch="sm_80", block=32 * (n % 4 + 1)), range(32)))
    assert len({m.data for m in made}) == 4
    assert len(service.cache) == 4


def test_what_the_service_compiles_has_one_name():
    """``code``, as everywhere; its earlier name is taken, and nothing is compiled without either."""
    service = CompileService(InMemoryProgramCache())
    options = {"arch": "sm_80"}
    made = service.compile(code=SOURCE, options=options)
    assert service.compile(source=SOURCE, options=options, name_expressions=iter(())).hit
    assert service.compile(SOURCE, options=options, name_expressions=None).hit
    assert (made.code, made.code_type) == (made.data, made.target_type)
    for given in ({}, {"code": SOURCE, "source": SOURCE}):
        with pytest.raises(TypeError, match="needs the source exactly once"):
            service.compile(**given, options=options)
    for wrong in (3, "sm_80", [("arch", "sm_80")]):
        with pytest.raises(TypeError, match="options must be ProgramOptions"):
            service.compile(SOURCE, options=wrong)

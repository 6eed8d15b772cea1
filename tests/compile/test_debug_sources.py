# SPDX-License-Identifier: Apache-2.0
"""A debugger finds the source of a program that has no name."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading

import pytest

from cuda_progcache import ProgCacheWarning, Program
from cuda_progcache.compile import debug_sources
from cuda_progcache.keys.inputs import normalize

SOURCE = 'extern "C" __global__ void k(int *a) {\n  int b = *a;\n  *a = b + 1;\n}\n'


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """The directory for the user's sources, a new one for each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))
    monkeypatch.setattr(debug_sources, "_told", set())
    return tmp_path / "user cache" / "cuda-progcache-sources"


def path_of(source, sources):
    return sources / f"program_{hashlib.sha256(source.encode()).hexdigest()[:16]}.cu"


@pytest.mark.parametrize(
    "options",
    [{"debug": True}, {"extra_flags": "-G"}, {"debug": True, "lineinfo": True}],
    ids=["field", "flag", "both"],
)
@pytest.mark.parametrize("target_type", ["cubin", "ptx"])
def test_the_file_that_is_named_has_the_source(compiled, sources, target_type, options):
    made = compiled(SOURCE, target_type=target_type, **options)
    path = path_of(SOURCE, sources)
    assert path.read_text() == SOURCE
    assert os.fsencode(sources if target_type == "cubin" else path) in made.data
    assert path.name.encode() in made.data
    path.unlink()
    assert compiled(SOURCE, target_type=target_type, **options).hit
    assert path.read_text() == SOURCE, "on a hit, too"
    path.write_text("cut off")
    compiled(SOURCE, store=None, target_type=target_type, **options)
    assert path.read_text() == SOURCE


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
def test_lines_are_those_of_the_file(compiled, sources, tmp_path):
    (tmp_path / "k.cubin").write_bytes(compiled(SOURCE, debug=True).data)
    shown = subprocess.run(
        ["readelf", "--debug-dump=decodedline", "-W", tmp_path / "k.cubin"], capture_output=True, text=True, check=False
    ).stdout
    assert f"CU: {path_of(SOURCE, sources)}:" in shown
    assert {line.split()[1] for line in shown.splitlines() if line.startswith("program_")} - {"-"} == {*"1234"}


def test_each_source_has_its_own(compiled, sources):
    for source in (SOURCE, SOURCE.replace("1", "2"), SOURCE + "// á"):
        compiled(source, debug=True)
        assert path_of(source, sources).read_text() == source
    assert len(list(sources.iterdir())) == 3
    assert sources.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("options", [{}, {"lineinfo": True}, {"debug": True, "name": "mine.cu"}], ids=str)
def test_others_have_none(compiled, sources, options):
    made = compiled(SOURCE, **options)
    assert not sources.exists()
    assert os.fsencode(sources) not in made.data


def test_headers_are_found_where_they_were(compiled, project):
    project("h.h", "#define N 3\n")
    source = '#include "h.h"\n' + SOURCE.replace("1", "N")
    made = compiled(source, debug=True)
    assert [header["name"] for header in made.record["headers"]] == ["h.h"]
    assert compiled(source, debug=True).hit
    project("h.h", "#define N 4\n")
    assert not compiled(source, debug=True).hit


@pytest.mark.parametrize("name", ['a "quoted" one', "back\\slash", "two\nlines"])
def test_a_path_that_nvrtc_cannot_write(compiled, tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
    assert compiled(SOURCE, debug=True).data
    assert not (tmp_path / name).exists()


def test_messages_keep_their_lines(compiled, sources):
    with pytest.raises(Exception, match="nope") as caught:
        compiled("\n\nint x = nope;", debug=True)
    diagnostic = caught.value.diagnostics[0]
    assert (diagnostic.line, diagnostic.rendered) == (3, "int x = nope;")
    assert diagnostic.file == str(path_of("\n\nint x = nope;", sources))


def test_of_another_user_it_is_another_program(compiled, tmp_path, monkeypatch):
    """Its path is in what comes out."""
    first = compiled(SOURCE, debug=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    other = compiled(SOURCE, debug=True)
    assert not other.hit
    assert other.data != first.data


def test_where_it_cannot_be_written(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(ProgCacheWarning, match="a debugger won't show it"):
        made = compiled(SOURCE, debug=True)
    assert made.data
    assert compiled(SOURCE, debug=True).hit, "and it is said once"


def test_threads_that_write_one_at_once_are_in_nobodys_way(sources, monkeypatch):
    options = Program(SOURCE, "c++", {"arch": "sm_80", "debug": True})._options
    inputs = normalize(code=SOURCE, code_type="c++", options=options, target_type="cubin")

    class Os:
        """The other thread does all of it before the first one puts its file in place."""

        def __getattr__(self, name):
            return getattr(os, name)

        def replace(self, *paths):
            monkeypatch.setattr(debug_sources, "os", os)
            other = threading.Thread(target=debug_sources.keep_debug_source, args=[inputs])
            other.start()
            other.join()
            os.replace(*paths)

    monkeypatch.setattr(debug_sources, "os", Os())
    debug_sources.keep_debug_source(inputs)
    assert [path.name for path in sources.iterdir()] == [path_of(SOURCE, sources).name]
    assert path_of(SOURCE, sources).read_text() == SOURCE


def test_not_all_are_kept(sources, monkeypatch):
    monkeypatch.setattr(debug_sources, "_KEPT", 20)
    monkeypatch.setattr(debug_sources, "_REMOVED", 10)
    options = Program(SOURCE, "c++", {"arch": "sm_80", "debug": True})._options
    for number in range(50):
        source = f"{SOURCE}// {number}"
        debug_sources.keep_debug_source(normalize(code=source, code_type="c++", options=options, target_type="cubin"))
        os.utime(path_of(source, sources), (number, number))
        assert path_of(source, sources).exists()
    assert 10 <= len(list(sources.iterdir())) <= 20
    assert path_of(f"{SOURCE}// 49", sources).exists()


def test_another_process_finds_it(tmp_path, sources):
    script = (
        "import sys\nfrom cuda_progcache import FileStreamProgramCache, Program\n"
        f"made = Program({SOURCE!r}, 'c++', {{'arch': 'sm_80', 'debug': True}}).compiled('cubin', "
        f"cache=FileStreamProgramCache({str(tmp_path / 'cache')!r}))\nprint(made.hit)"
    )
    said = []
    for _ in range(2):
        shutil.rmtree(sources, ignore_errors=True)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
        said.append(done.stdout.split()[-1])
        assert path_of(SOURCE, sources).read_text() == SOURCE
    assert said == ["False", "True"]

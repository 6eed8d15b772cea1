# SPDX-License-Identifier: Apache-2.0
"""``list``, ``show``, ``stats`` and ``clear`` on a cache with known entries."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from cuda_progcache import FileStreamProgramCache
from cuda_progcache.cli import output


def names(result):
    return [entry["name"] for entry in result["entries"]]


def test_list_shows_each_program(cli, kept):
    lines = cli("list", "--sort", "name").stdout.splitlines()
    assert lines[0].split() == ["digest", "name", "variant", "target", "arch", "size", "cost", "age", "last", "used"]
    rows = [line.replace(" dtype=float16 ", " ").split() for line in lines[1:]]
    assert [row[1:4] for row in rows] == [
        ["gemm.cu", "ptx", "sm_90"],
        ["saxpy.cu", "cubin", "sm_90"],
        ["softmax", "cubin", "sm_100"],
    ]
    assert "softmax   dtype=float16  cubin" in lines[3]
    assert [row[0] for row in rows] == [kept[name][:8] for name in ("gemm", "saxpy", "softmax")]
    assert rows[1][4:6] == ["5.0", "kB"]


def test_rows_in_a_pipe_are_as_rich_lays_them_out(capsys):
    from cuda_progcache.cli import output

    columns, rows = (
        ("digest", "name", "size"),
        [("12ab", "k.cu", "5.0 kB"), ("", "字 [b]x[/] longer", "7 B"), ("c", "é", "")],
    )
    output.show_rows(columns, rows, right=("size",))
    table = output.table(columns, right=("size",))
    for row in rows:
        table.add_row(*map(output.text, row))
    assert capsys.readouterr().out == output.plain(table)


def test_list_json(cli_json, kept, root):
    listed = cli_json("list", "--sort", "size")
    assert listed["root"] == str(root)
    assert names(listed) == ["saxpy.cu", "softmax", "gemm.cu"]
    first = listed["entries"][0]
    assert set(first) == {
        "digest", "name", "kernel", "parameters", "names", "options", "variant", "code_type", "target_type", "arch",
        "size", "seconds", "created", "last_used", "made_by", "path",
    }  # fmt: skip
    assert [one["parameters"] for one in listed["entries"]] == [None, {"dtype": "float16"}, None]
    assert Path(first["path"]).read_bytes() == b"x" * 5000
    assert [entry["kernel"] for entry in listed["entries"]] == [None, "softmax", None]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (["--kernel", "softmax"], ["softmax"]),
        (["--kernel", "*.cu"], ["gemm.cu", "saxpy.cu"]),
        (["--kernel", "softma?"], ["softmax"]),
        (["--kernel", "softma[x]"], []),
        (["--kernel", "softmax?dtype=float16@sm_100"], ["softmax"]),
        (["--kernel", "softmax?dtype=float32"], []),
        (["--kernel", "softmax@sm_90"], []),
        (["--since", "1h"], ["gemm.cu", "saxpy.cu", "softmax"]),
        (["--since", "2001-01-31T12:00", "--arch", "sm_100"], ["softmax"]),
        (["--since", "2999-01-01"], []),
        (["--arch", "sm_90"], ["gemm.cu", "saxpy.cu"]),
        (["--target", "ptx"], ["gemm.cu"]),
        (["--arch", "sm_90", "--target", "cubin"], ["saxpy.cu"]),
        (["--limit", "2"], ["gemm.cu", "saxpy.cu"]),
        (["--reverse"], ["softmax", "saxpy.cu", "gemm.cu"]),
        (["--arch", "sm_70"], []),
    ],
    ids=" ".join,
)
def test_list_filters(cli_json, kept, filters, expected):
    assert names(cli_json("list", "--sort", "name", *filters)) == expected


def test_list_sorts_by_time(cli_json, kept):
    with FileStreamProgramCache() as cache:
        cache.publish(b"four", b"!", {"name": "latest"})
    assert names(cli_json("list", "--sort", "age"))[0] == "latest"
    assert names(cli_json("list"))[0] == "latest"


def test_list_quiet_gives_digests(cli, kept):
    assert cli("list", "-q", "--kernel", "softmax").stdout == kept["softmax"] + "\n"
    assert cli("list", "-q", "--arch", "sm_70").stdout == ""


def test_a_program_that_cuda_core_stored_has_no_record_and_is_listed(cli, cli_json):
    with FileStreamProgramCache() as cache:
        cache[b"plain"] = b"bytes"
    entry = cli_json("list")["entries"][0]
    assert (entry["name"], entry["arch"], entry["size"]) == ("-", None, 5)
    assert re.search(r"^size +5 B \(5 bytes\)$", cli("show", entry["digest"]).stdout, re.MULTILINE)
    assert cli_json("stats")["by_target"] == {"unknown": 1}


def test_prefixes_in_the_table_tell_programs_apart():
    from cuda_progcache.cli.output import prefix_length

    assert prefix_length([]) == 8
    assert prefix_length(["a" * 64, "b" * 64]) == 8
    assert prefix_length(["0" * 20 + "a" * 44, "0" * 20 + "b" * 44, "c" * 64]) == 21
    assert prefix_length(["a" * 64, "a" * 64]) == 64


def test_show_tells_where_a_program_came_from(cli, kept, root):
    digest = kept["softmax"]
    text = cli("show", digest[:6]).stdout
    for expected in (
        "softmax",
        "dtype=float16",
        "softmax.cu.j2",
        "c++ to cubin for sm_100",
        "in 125 ms",
        digest,
        str(root / "entries" / digest[:2] / digest[2:]),
        "libnvrtc.so.13",
        "2 read; --headers lists them",
        "registers",
        "cuobjdump -sass $(",
        f" show --path {digest[:12]})",
    ):
        assert expected in text, expected
    assert "cuda_fp16.h" not in text


def test_show_lists_headers_components_log_and_symbols_as_they_are(cli, kept):
    text = cli("show", kept["saxpy"], "--headers", "--components").stdout
    assert "121212121212  cuda_fp16.h" in text
    assert "source = line one\\nline two" in text
    assert "saxpy<float> -> _Z5saxpyIfEvv" in text
    assert "variable [i] was declared" in text  # brackets aren't markup


def test_show_has_spills_and_shared_memory_as_ptxas_does(cli, cli_json, root):
    """From the binary: a record of an earlier version has neither spills nor the right shared memory."""
    from cuda_progcache import Program, ProgramOptions

    source = """extern "C" __global__ void __launch_bounds__(1024, 2) k(float *a, int n) {
      __shared__ float s[256];
      float v[60];
      #pragma unroll
      for (int i = 0; i < 60; ++i) v[i] = a[i * n + threadIdx.x];
      #pragma unroll
      for (int r = 0; r < 2; ++r)
        #pragma unroll
        for (int i = 0; i < 60; ++i) v[i] = v[i] * v[(i * 7 + 1) % 60] + v[(i + 3) % 60];
      s[threadIdx.x & 255] = v[0];
      __syncthreads();
      #pragma unroll
      for (int i = 0; i < 60; ++i) a[i] += v[i] * s[i];
    }"""
    made = Program(source, "c++", ProgramOptions(arch="sm_90", ptxas_options=["-v"])).compiled("cubin")
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", made.log).groups()
    assert int(stores) > 0 and "1024 bytes smem" in made.log
    old = {"k": {"registers": 32, "stack_bytes": 0, "shared_bytes": 2048}}
    with FileStreamProgramCache() as cache:
        cache.publish(b"spilling", made.data, {"name": "k", "target_type": "cubin", "resource_usage": old})
        digest = next(entry.digest for entry in cache.entries())
    assert re.search(
        r"registers +spill store bytes +spill load bytes +stack bytes +shared bytes", cli("show", digest).stdout
    )
    assert re.search(rf"k +32 +{stores} +{loads} +\d+ +1024 ", cli("show", digest).stdout)
    used = cli_json("show", digest)["resource_usage"]["k"]
    assert (used["spill_store_bytes"], used["spill_load_bytes"], used["shared_bytes"]) == (
        int(stores),
        int(loads),
        1024,
    )


def test_show_of_ptx_and_ltoir_says_how_to_open_them(cli, kept):
    assert re.search(r"open it: less \$\(.* show --path", cli("show", kept["gemm"]).stdout)
    with FileStreamProgramCache() as cache:
        cache.publish(b"lto", b"ir", {"name": "lto", "target_type": "ltoir"})
        digest = next(e.digest for e in cache.entries() if e.record.get("name") == "lto")
    assert "only nvJitLink can read LTO-IR" in cli("show", digest).stdout


def test_show_path_is_the_file_and_nothing_else(cli, kept):
    assert Path(cli("show", "--path", kept["saxpy"][:8]).stdout.removesuffix("\n")).read_bytes() == b"x" * 5000


def test_show_json_has_the_record(cli_json, kept):
    shown = cli_json("show", kept["saxpy"])
    assert shown["digest"] == kept["saxpy"]
    assert shown["record"]["symbol_mapping"] == {"saxpy<float>": "_Z5saxpyIfEvv"}
    assert len(shown["checksum"]) == 32


def test_show_takes_names_and_misses_what_is_not_there(cli, cli_json, kept):
    for name in ("softmax", "softmax?dtype=float16", "softmax@sm_100", "s*max?dtype=FLOAT16@sm_100"):
        assert cli_json("show", name)["digest"] == kept["softmax"]
    assert "is called sofmax; did you mean 'softmax'" in cli("show", "sofmax", code=5).stderr
    assert "no program" in cli("show", "softmax@sm_90", code=5).stderr
    assert "isn't PARAMETER=VALUE" in cli("show", "softmax?a=b,c", code=2).stderr
    several = cli("show", "*.cu")
    assert "2 programs match *.cu; this is the one compiled last" in several.stderr
    assert kept["gemm"] in several.stdout
    assert "give a digest prefix" in cli("pin", "*.cu", code=5).stderr
    absent = next(d for d in ("0000", "1111", "2222", "3333") if not any(k.startswith(d) for k in kept.values()))
    assert f"a digest that starts with {absent}" in cli("show", absent, code=5).stderr


def test_show_of_an_ambiguous_prefix_names_the_candidates(cli):
    from cuda_progcache.store.base import entry_digest

    seen, number = {}, 0
    while True:  # 16 bits: two of about 300 keys share four digits
        prefix = entry_digest(str(number))[:4]
        if prefix in seen:
            break
        seen[prefix] = str(number)
        number += 1
    with FileStreamProgramCache() as cache:
        for key in (seen[prefix], str(number)):
            cache.publish(key, b"x", {"name": key})
    error = cli("show", prefix, code=5).stderr
    assert "matches 2 entries" in error
    assert entry_digest(str(number))[:8] in error


def test_stats(cli, cli_json, kept, root, monkeypatch):
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", "off")
    text = cli("stats").stdout
    assert str(root) in text
    assert "5.1 kB" in text
    assert "compile time  375 ms in all" in text
    assert cli_json("stats") == {
        "root": str(root),
        "entries": 3,
        "bytes": 5120,
        "compile_seconds": 0.375,
        "by_target": {"cubin": 2, "ptx": 1},
        "by_arch": {"sm_90": 2, "sm_100": 1},
        "pinned": 0,
        "all_time": {
            "hits": 0, "misses": 0, "corrupt": 0, "evicted": 0, "dropped": 0, "refused": 0, "read_errors": 0,
            "stored": 3, "unkeyed": 0,
        },
        "unkept": {},
        "templates": {"directory": None, "file_count": 0, "total_bytes": 0, "refused": None},
    }  # fmt: skip


def test_stats_counts_compiled_templates(cli, cli_json, monkeypatch, tmp_path):
    folder = tmp_path / "templates"
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", str(folder))
    none = {"directory": str(folder), "file_count": 0, "total_bytes": 0, "refused": None}
    assert cli_json("stats")["templates"] == none
    assert not folder.exists()  # looking makes none
    cli("render", "axpby")
    size = sum(file.stat().st_size for file in folder.glob("*.pyc"))
    count = len(list(folder.glob("*axpby*.pyc"))) + len(list(folder.glob("*packs*.pyc")))
    assert count >= 2
    found = cli_json("stats")["templates"]
    assert found["total_bytes"] == size
    assert found["file_count"] >= count
    assert f"compiled, {output.size(size)}" in cli("stats").stdout
    folder.chmod(0o755)
    assert "open to others (mode 0755)" in cli_json("stats")["templates"]["refused"]
    assert "not kept: compiled templates are executed" in cli("stats").stdout
    cli("render", "axpby")  # renders all the same
    monkeypatch.setenv("CUDA_PROGCACHE_TEMPLATES", "off")
    assert cli_json("stats")["templates"]["directory"] is None


def test_looking_at_a_cache_that_is_not_there_makes_none(cli, cli_json, root):
    assert "there is no cache at" in cli("stats").stderr
    assert cli_json("list")["entries"] == []
    cli("show", "abcd", code=5)
    assert cli_json("clear", "--yes")["removed"] == 0
    assert not root.exists()


def test_a_cache_that_can_only_be_read_is_looked_at(cli_json, kept, monkeypatch):
    """For root every directory can be written, so the answer to "can it?" is injected."""
    monkeypatch.setattr("cuda_progcache.store.root.Root.writable", lambda _: False)
    assert len(cli_json("list")["entries"]) == 3
    assert cli_json("stats")["entries"] == 3


def test_clear_asks(cli, cli_json, kept, root):
    assert "Remove 3 entries" in cli("clear", stdin="n\n", code=130).stdout
    assert cli_json("stats")["entries"] == 3
    assert "needs --yes" in cli("clear", "--json", code=2).stderr
    assert "give --yes" in cli("clear", stdin="", code=2).stderr
    assert "removed 3 entries (5.1 kB)" in cli("clear", stdin="y\n").stdout
    assert cli_json("stats")["entries"] == 0
    assert not [path for path in (root / "entries").rglob("*") if path.is_file()]


def test_clear_removes_what_compiles_left(cli, kept, root):
    derived = [root / "failures" / "ab12", root / "latest" / "cd34", root / "manifests" / "ef" / "56"]
    for path in derived:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    cli("clear", "--yes", "--keep-pinned")
    assert not any(path.exists() for path in derived)


def test_clear_yes_does_not_ask(cli_json, kept, root):
    assert cli_json("clear", "--yes") == {"root": str(root), "removed": 3, "bytes": 5120}
    assert cli_json("stats")["entries"] == 0


def test_clear_counts_what_it_removes_and_reads_no_record(cli_json, kept, root):
    for path in (root / "records").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    assert cli_json("clear", "--yes") == {"root": str(root), "removed": 3, "bytes": 5120}


def test_an_unsafe_root_is_cache_trouble(cli, root):
    root.mkdir(parents=True)
    root.chmod(0o777)
    assert str(root) in cli("stats", code=3).stderr


def test_a_file_where_the_cache_should_be_is_cache_trouble(process, tmp_path):
    there = tmp_path / "file"
    there.write_text("")
    done = process("list", "--cache-dir", there)
    assert done.returncode == 3, done.stderr
    assert str(there) in done.stderr


@pytest.mark.parametrize(
    ("unit", "value", "text"),
    [
        ("size", 0, "0 B"),
        ("size", 999, "999 B"),
        ("size", 1000, "1.0 kB"),
        ("size", 6549, "6.5 kB"),
        ("size", 123456, "123 kB"),
        ("size", 999_499, "999 kB"),
        ("size", 999_501, "1.0 MB"),
        ("size", 2.5e9, "2.5 GB"),
        ("size", 7.1e12, "7.1 TB"),
        ("seconds", 0.0000042, "4 us"),
        ("seconds", 0.085, "85 ms"),
        ("seconds", 0.9994, "999 ms"),
        ("seconds", 0.9996, "1.00 s"),
        ("seconds", 9.5, "9.50 s"),
        ("seconds", 12.34, "12.3 s"),
        ("seconds", 200, "3 min 20 s"),
        ("seconds", 7260, "2 h 1 min"),
        ("age", -5, "now"),
        ("age", 0.4, "now"),
        ("age", 40, "40 s"),
        ("age", 180, "3 min"),
        ("age", 18000, "5 h"),
        ("age", 1036800, "12 d"),
        ("ago", 0, "just now"),
        ("ago", 40, "40 s ago"),
    ],
)
def test_numbers_for_people(unit, value, text):
    from cuda_progcache.cli import output

    assert getattr(output, unit)(value) == text


def test_hints_can_be_typed_as_they_are(cli, kept, root, monkeypatch, tmp_path):
    """By name where the command is on PATH, else as it was called; and for the same cache."""
    (tmp_path / "bin").mkdir()
    for name in ("cuda-progcache", "cuobjdump"):
        (tmp_path / "bin" / name).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / name).chmod(0o755)
    prefix = kept["saxpy"][:12]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
        shown = cli("show", prefix, "--cache-dir", root).stdout
        assert f"open it: cuobjdump -sass $(cuda-progcache show --cache-dir {root} --path {prefix})" in shown
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / "bin" / "cuda-progcache"), "show"])
    assert f"$(bin/cuda-progcache show --path {prefix})" in cli("show", prefix).stdout
    monkeypatch.setattr("sys.argv", ["__main__.py"])
    assert f"$(python -m cuda_progcache show --path {prefix})" in cli("show", prefix).stdout


def test_json_survives_any_log(cli, root):
    """A compiler's log may hold bytes that are no UTF-8."""
    with FileStreamProgramCache() as cache:
        cache.publish(b"odd", b"x", {"name": os.fsdecode(b"caf\xe9.cu"), "log": os.fsdecode(b"\xff\xfe")})
        digest = next(iter(cache.entries())).digest
    assert json.loads(cli("show", digest, "--json").stdout)["record"]["log"] == os.fsdecode(b"\xff\xfe")
    cli("show", digest)
    cli("list")


def test_what_came_without_a_record_is_known_by_its_binary(cli, cli_json, root):
    """As ``cuda.core`` puts it: name, type, architecture and registers are the binary's."""
    from cuda.core import Program as CudaProgram
    from cuda.core import ProgramOptions as CudaOptions

    from cuda_progcache import FileStreamProgramCache

    source = 'extern "C" __global__ void fill(float* x) { x[threadIdx.x] = 1; }'
    with FileStreamProgramCache() as cache:
        CudaProgram(source, "c++", CudaOptions(arch="sm_90")).compile("cubin", cache=cache)
        cache[b"ptx"] = b".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry fill()\n{\n\tret;\n}\n"
        cache[b"no binary"] = b"no binary"
        assert [entry.record for entry in cache.entries()] == [{}, {}, {}]
    listed = {(one["name"], one["target_type"], one["arch"]) for one in cli_json("list")["entries"]}
    assert listed == {("fill", "cubin", "sm_90"), ("fill", "ptx", "sm_80"), ("-", None, None)}
    assert len(cli("list", "--kernel", "fill", "--arch", "sm_90", "-q").stdout.split()) == 1
    (used,) = cli_json("resources", "--kernel", "fill")["kernels"]
    assert used["resources"]["registers"] > 0
    shown = cli_json("show", "fill@sm_90")
    assert (shown["record"], shown["resource_usage"]["fill"]["registers"]) == ({}, used["resources"]["registers"])
    told = cli("show", "fill@sm_90").stdout
    assert "cubin for sm_90" in told
    assert "what it was compiled from isn't known" in told

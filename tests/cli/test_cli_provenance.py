# SPDX-License-Identifier: Apache-2.0
"""``provenance`` and ``affected``, on real compiles."""

from __future__ import annotations

import json

import pytest

from cuda_progcache import CompileService, ProgramOptions


@pytest.fixture
def compiled(tmp_path, library):
    """A source of ours with a header, and a library kernel."""
    (tmp_path / "scale.h").write_text("#define SCALE 3\n")
    source = '#include "scale.h"\nextern "C" __global__ void k(int *a) { *a = SCALE; }\n'
    service = CompileService(library=None)
    options = ProgramOptions(arch="sm_80", name="k.cu", include_path=[str(tmp_path)])
    return service.compile(source, options=options).digest


@pytest.fixture
def kernel(cli_json, library):
    return cli_json("compile", "--manifest", library, "--kernel", "scale", "-p", "block=64", "--arch", "sm_80")[
        "digest"
    ]


def test_a_name_serves_as_a_digest_does(cli, compiled, kernel):
    for name, digest in (("k.cu", compiled), ("scale", kernel), ("scale?block=64@sm_80", kernel)):
        assert cli("provenance", name).stdout == cli("provenance", digest).stdout


def test_the_tree(cli, compiled, kernel):
    told = cli("provenance", compiled[:12]).stdout
    for part in (
        f"entry {compiled[:12]}",
        "compiled with nvrtc in",
        "options     -arch=sm_80",
        "source      k.cu",
        "header      scale.h",
        "compiler    nvrtc ",
    ):
        assert part in told
    told = cli("provenance", kernel).stdout
    assert "rendered from kernel scale in" in told
    assert "parameters  dtype=float32 block=64 fast=False" in told
    assert "template    scale.cu.j2" in told


def test_documents(cli, cli_json, compiled, tmp_path):
    graph = cli_json("provenance", compiled)
    assert graph == json.loads(cli("provenance", compiled, "--format", "json").stdout)
    assert graph["start"] == f"binary:{compiled}"
    assert json.loads(cli("provenance", compiled, "--format", "prov").stdout)["activity"]
    statement = json.loads(cli("provenance", compiled, "--format", "slsa").stdout)
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert cli("provenance", compiled, "--format", "dot").stdout.startswith("digraph")
    out = tmp_path / "graph.svg"
    assert cli("provenance", compiled, "--format", "svg", "-o", out).stdout == ""
    assert out.read_text().startswith("<svg")
    cli("provenance", compiled, "-o", tmp_path / "tree.txt")
    assert (tmp_path / "tree.txt").read_text() == cli("provenance", compiled).stdout


def test_signed(cli, compiled, tmp_path):
    pytest.importorskip("securesystemslib")
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    pem = tmp_path / "key.pem"
    private = Ed25519PrivateKey.generate()
    pem.write_bytes(private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    envelope = json.loads(cli("provenance", compiled, "--format", "slsa", "--sign", pem).stdout)
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert len(envelope["signatures"]) == 1


def test_wrong_calls(cli, compiled, tmp_path):
    (tmp_path / "key.pem").write_text("no key")
    assert "--sign needs --format slsa" in cli("provenance", compiled, "--sign", tmp_path / "key.pem", code=2).stderr
    assert "--format dot" in cli("provenance", compiled, "--json", "--format", "dot", code=2).stderr
    told = cli("provenance", "0000", code=5).stderr
    assert "no program or call has a digest that starts with 0000 in" in told
    assert "is called abc; " in cli("provenance", "abc", code=5).stderr
    assert "four or more hex digits" in cli("provenance", "abc", "--cache-dir", tmp_path / "none", code=2).stderr
    assert "no calls are recorded in" in cli("provenance", compiled, "--calls", tmp_path, code=1).stderr


def test_affected(cli, cli_json, compiled, kernel, library, tmp_path):
    header = tmp_path / "scale.h"
    told = cli("affected", header)
    assert compiled[:8] in told.stdout
    assert "current" in told.stdout
    assert "invalidates 1 program\n" in told.stderr
    assert cli("affected", "-q", header).stdout == f"{compiled}\n"
    assert cli("affected", "-q", library / "scale.cu.j2").stdout == f"{kernel}\n"
    (hit,) = cli_json("affected", header)["affected"]
    assert (hit["digest"], hit["as"], hit["named"], hit["current"]) == (compiled, "header", "scale.h", True)
    header.write_text("#define SCALE 4\n")
    told = cli("affected", header)
    assert "different" in told.stdout
    assert "invalidates 0 programs; 1 used different content under this name" in told.stderr


def test_nothing_affected(cli, cli_json, compiled, tmp_path, root):
    assert f"no program or call in {root} depends on" in cli("affected", tmp_path / "other.h").stderr
    assert cli_json("affected", tmp_path / "other.h")["affected"] == []


def test_no_cache_yet(cli):
    assert "there is no cache at" in cli("affected", "x.h").stderr


# Calls of every kind


@pytest.fixture
def calls(tmp_path, library, root):
    """A prewarm run, an analysis, a memoized call that used a program, one that read a file."""
    from cuda_progcache import KernelLibrary, memoize
    from cuda_progcache.memo.cache_file import cache_file

    service = CompileService(library=KernelLibrary(library))
    report = service.prewarm(archs=["sm_80"], kernels=["scale"])
    (tmp_path / "weights.txt").write_text("1 2 3")

    @memoize(tmp_path / "memo")
    def registers(kernel):
        return service.kernel(kernel, arch="sm_80").resource_usage()

    @cache_file(tmp_path / "kept", file_args=["path"])
    def load(path):
        return registers("scale") and path

    load(str(tmp_path / "weights.txt"))
    keys = {call.name: call.to_lookup_key() for call in service.calls.query() if "record" not in call.metadata}
    kept = next(iter((tmp_path / "kept").glob("*.pkl"))).name.split(".")[-2]
    return {**keys, "program": report.items[0].digest, "registers": registers.digest("scale"), "load": kept}


def test_every_call_is_found_by_its_first_digits(cli, cli_json, calls, tmp_path):
    known = ("--calls", tmp_path / "memo", "--calls", tmp_path / "kept")
    begins = {
        "render": "source      scale  ",
        "prewarm": "prewarm of 1 kernel for sm_80 in ",
        "resource_usage": "resource usage in ",
        "registers": "result of calls.<locals>.registers",
        "load": "result of load",
        "program": "scale (cubin, sm_80)  ",
    }
    for name, line in begins.items():
        told = cli("provenance", calls[name][:12], *known).stdout
        assert told.startswith(line), told
        assert not any(word in told for word in ("gone", "removed", "missing"))
        if name != "prewarm":
            assert "template    scale.cu.j2" in told, name
        for form in ("json", "dot", "prov", "svg"):
            assert cli("provenance", calls[name], *known, "--format", form).stdout
    told = cli("provenance", calls["program"], *known).stdout
    assert "requested by prewarm of 1 kernel for sm_80 in " in told
    below = told[told.index("used by") :]
    assert "resource usage in " in below and "kernel      scale  " in below and "registers" in below
    assert "call of calls.<locals>.registers in " in below
    assert "program     scale (cubin, sm_80)" in cli("provenance", calls["prewarm"], "--all").stdout


def test_a_directory_of_memoized_calls_alone(cli, calls, tmp_path):
    for folder, name in (("memo", "registers"), ("kept", "load")):
        before = sorted(path for path in (tmp_path / folder).rglob("*") if "sqlite" not in path.name)
        told = cli("provenance", calls[name][:8], "--cache-dir", tmp_path / folder).stdout
        assert told.startswith("result of") and "(record missing" in told
        assert sorted(path for path in (tmp_path / folder).rglob("*") if "sqlite" not in path.name) == before
    assert "no program or call has a digest that starts with" in cli(
        "provenance", calls["load"][:8], "--cache-dir", tmp_path / "memo", code=5
    ).stderr  # fmt: skip
    error = cli("provenance", calls["registers"], "--calls", tmp_path / "memo", "--format", "slsa", code=2).stderr
    assert "--format slsa needs a program; this is a value: result of" in error


def test_many_headers_are_one_line_unless_asked_for(cli, tmp_path):
    names = [f"cuda/part{n}.h" for n in range(30)] + ["cub/block/block_reduce.cuh"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("#pragma once\n")
    source = "".join(f"#include <{name}>\n" for name in names) + "__global__ void k() {}\n"
    options = ProgramOptions(arch="sm_80", name="k.cu", include_path=[str(tmp_path)])
    compiled = CompileService(library=None).compile(source, options=options).digest
    short, whole = cli("provenance", compiled).stdout, cli("provenance", compiled, "--all").stdout
    count = len(names)
    assert f"headers     {count}: " in short and " in cuda/, " in short and "--all lists them" in short
    assert f"{count} headers\n" in whole and "cub/block/block_reduce.cuh" in whole
    assert len(whole.splitlines()) == len(short.splitlines()) + count


def test_affected_calls(cli, cli_json, calls, library, tmp_path):
    known = ("--calls", tmp_path / "memo", "--calls", tmp_path / "kept")
    template = library / "scale.cu.j2"
    told = cli("affected", template, *known)
    assert "invalidates" in told.stderr and "programs and 2 memoized calls" in told.stderr
    assert "calls.<locals>.registers" in told.stdout and "load" in told.stdout
    found = cli_json("affected", template, *known)
    assert {(call["name"].rpartition(".")[2], call["as"], call["current"]) for call in found["calls"]} == {
        ("registers", "call", True), ("load", "call", True),
    }  # fmt: skip
    assert {hit["as"] for hit in found["affected"]} == {"template"}
    weights = tmp_path / "weights.txt"
    assert cli("affected", "-q", weights, *known).stdout.startswith(calls["load"])
    assert "invalidates 0 programs and 1 memoized call" in cli("affected", weights, *known).stderr
    assert cli("affected", "-q", weights, "--cache-dir", tmp_path / "kept").stdout.startswith(calls["load"])


def test_prune_takes_what_was_recorded_of_what_went(cli, calls, root):
    assert list((root / "steps").glob("*/*.json"))
    cli("prune", "--max-size", "0")
    assert not list((root / "steps").glob("*/*.json"))

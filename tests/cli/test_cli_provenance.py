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
    assert graph["root"] == f"binary:{compiled}"
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
    assert (
        "--sign goes with --format slsa" in cli("provenance", compiled, "--sign", tmp_path / "key.pem", code=2).stderr
    )
    assert "--format dot" in cli("provenance", compiled, "--json", "--format", "dot", code=2).stderr
    told = cli("provenance", "0000", code=5).stderr
    assert "no program and no call starts with 0000 in" in told
    assert "four or more hex digits" in cli("provenance", "abc", code=2).stderr
    assert "no calls are recorded in" in cli("provenance", compiled, "--calls", tmp_path, code=1).stderr


def test_affected(cli, cli_json, compiled, kernel, library, tmp_path):
    header = tmp_path / "scale.h"
    told = cli("affected", header)
    assert compiled[:8] in told.stdout
    assert "as it is" in told.stdout
    assert "invalidates 1 program\n" in told.stderr
    assert cli("affected", "-q", header).stdout == f"{compiled}\n"
    assert cli("affected", "-q", library / "scale.cu.j2").stdout == f"{kernel}\n"
    (hit,) = cli_json("affected", header)["affected"]
    assert (hit["digest"], hit["as"], hit["named"], hit["current"]) == (compiled, "header", "scale.h", True)
    header.write_text("#define SCALE 4\n")
    told = cli("affected", header)
    assert "another" in told.stdout
    assert "invalidates 0 programs; 1 had other content under this name" in told.stderr


def test_nothing_affected(cli, cli_json, compiled, tmp_path, root):
    assert f"no program or call in {root} depends on" in cli("affected", tmp_path / "other.h").stderr
    assert cli_json("affected", tmp_path / "other.h")["affected"] == []


def test_no_cache_yet(cli):
    assert "there is no cache at" in cli("affected", "x.h").stderr

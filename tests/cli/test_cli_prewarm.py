# SPDX-License-Identifier: Apache-2.0
"""``prewarm`` and ``demo``, with real compiles."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

ARCHS = ("--arch", "sm_80", "--arch", "sm_90")


def test_prewarm_compiles_then_hits(cli, cli_json, library):
    first = cli_json("prewarm", "--manifest", library, *ARCHS)
    assert {
        "ok", "call", "archs", "jobs", "kernels", "variants", "compiled", "hits", "failed", "skipped", "missing",
        "bytes", "seconds", "compile_seconds", "saved_seconds", "root", "items",
    } == set(first)  # fmt: skip
    assert (first["ok"], first["archs"], first["kernels"], first["variants"]) == (True, ["sm_80", "sm_90"], 2, 3)
    assert (first["compiled"], first["hits"], first["failed"]) == (6, 0, 0)
    assert first["bytes"] == sum(item["size"] for item in first["items"]) > 0
    second = cli_json("prewarm", "--manifest", library, *ARCHS)
    assert (second["compiled"], second["hits"]) == (0, 6)
    assert second["saved_seconds"] > 0
    assert [i["digest"] for i in second["items"]] == [i["digest"] for i in first["items"]]
    text = cli("prewarm", "--manifest", library, *ARCHS).stdout
    assert "100% hits: 6 programs from the cache" in text
    assert re.search(r"^scale +2 +2 +0 +4 ", text, re.MULTILINE)
    assert re.search(r"^all +3 +2 +0 +6 ", text, re.MULTILINE)


def test_progress_is_on_stderr_a_line_for_each_compile(cli, library):
    done = cli("prewarm", "--manifest", library, "--arch", "sm_90", "--jobs", 1)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 3
    assert re.match(r"\[1/3\] compiled scale .* for sm_90 in ", lines[0])
    assert "3 compiled in" in done.stdout
    assert cli("prewarm", "--manifest", library, "--arch", "sm_90").stderr == ""


def test_verbose_says_why(cli, library, monkeypatch):
    monkeypatch.delenv("CUDA_PROGCACHE_LOG", raising=False)
    arguments = ("prewarm", "--manifest", library, "--arch", "sm_90", "--kernel", "fill")
    lines = [line for line in cli(*arguments, "-v").stderr.splitlines() if line.startswith("miss")]
    assert len(lines) == 1
    assert re.fullmatch(r"miss: fill\.cu \(cubin, sm_90\) [0-9a-f]{12}: first compile of this program", lines[0])
    assert "miss" not in cli(*arguments, "--verbose").stderr, "all hits"
    (library / "fill.cu.j2").write_text((library / "fill.cu.j2").read_text() + "__device__ int edited;\n")
    assert re.search(r"^miss: .*template fill\.cu\.j2 changed", cli(*arguments, "-v").stderr, re.MULTILINE)
    assert "miss" not in cli("prewarm", "--manifest", library, "--arch", "sm_80").stderr


def test_kernels_can_be_chosen(cli, cli_json, library):
    chosen = cli_json("prewarm", "--manifest", library, "--arch", "sm_90", "--kernel", "fill")
    assert [item["kernel"] for item in chosen["items"]] == ["fill"]
    assert "scale" in cli("prewarm", "--manifest", library, "--kernel", "scal", code=2).stderr
    both = cli_json("prewarm", "--manifest", library, "--arch", "sm_90")
    assert (both["hits"], both["compiled"]) == (1, 2)
    text = cli("prewarm", "--manifest", library, "--arch", "sm_90", "--arch", "sm_80").stdout
    assert "3 compiled in" in text
    assert "3 hits (50%), which saved" in text


def test_a_failure_is_reported_and_the_rest_is_kept(cli, cli_json, broken_library):
    report = cli_json("prewarm", "--manifest", broken_library, "--arch", "sm_90", code=1)
    assert (report["ok"], report["compiled"], report["failed"]) == (False, 2, 1)
    failed = next(item for item in report["items"] if item["status"] == "failed")
    assert failed["kernel"] == "fill"
    assert "nothing_of_this_name" in failed["error"]
    again = cli("prewarm", "--manifest", broken_library, "--arch", "sm_90", code=1)
    assert "failed: fill (the defaults) for sm_90" in again.stdout
    assert "fill.cu.j2" in again.stdout
    assert "2 hits (66%), which saved" in again.stdout
    assert "1 failed" in again.stdout


def test_a_kernel_for_later_architectures_is_skipped(cli, cli_json, library):
    manifest = library / "manifest.toml"
    manifest.write_text(manifest.read_text().replace("[kernels.fill]\n", "[kernels.fill]\nmin_arch = 90\n"))
    report = cli_json("prewarm", "--manifest", library, *ARCHS)
    assert (report["ok"], report["compiled"], report["skipped"]) == (True, 5, 1)
    assert "100% hits: 5 programs" in cli("prewarm", "--manifest", library, *ARCHS).stdout


def test_an_unknown_architecture_is_usage(cli, library):
    assert "sm_90" in cli("prewarm", "--manifest", library, "--arch", "sm_9", code=2).stderr


def test_jobs_must_be_one_or_more(cli, library):
    cli("prewarm", "--manifest", library, "--jobs", 0, code=2)


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
def test_a_signal_ends_it_at_once_and_keeps_what_is_done(number, word, code, library, root, tmp_path):
    """Ctrl-C in a terminal reaches the whole process group, the workers too; SIGTERM is what CI servers send."""
    manifest = library / "manifest.toml"
    variants = "".join(
        f'[[kernels.scale.variants]]\nblock = {block}\ndtype = "{dtype}"\n'
        for block in range(32, 1025, 32)
        for dtype in ("float32", "float64")
    )
    manifest.write_text(manifest.read_text().replace("[kernels.fill]\n", variants + "[kernels.fill]\n"))
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "cuda_progcache", "prewarm", "--manifest", library, "--jobs", "1"]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True, env=environment
    )
    with running:
        # It tells of each program, and waits where nobody reads that: it doesn't end before the signal.
        fcntl.fcntl(running.stderr, fcntl.F_SETPIPE_SZ, 4096)
        first = running.stderr.readline()
        if number == signal.SIGINT:
            os.killpg(running.pid, number)
        else:
            running.send_signal(number)
        out, rest = running.communicate(timeout=600)
    assert first.startswith("[  1/")
    assert (running.returncode, out) == (code, "")
    last = rest.rstrip().splitlines()[-1]
    kept = re.fullmatch(
        rf"cuda-progcache: error: {word}; (\d+) programs? compiled so far are kept in (.*), "
        r"and the same command continues from there",
        last,
    )
    assert kept[2] == str(root)
    assert "Traceback" not in rest
    entries = [path for path in (root / "entries").rglob("*") if path.is_file()]
    assert 0 < int(kept[1]) <= len(entries) < 250
    assert os.listdir(tmp_path / "temporary") == []


def test_a_dry_run_compiles_nothing_and_says_why(cli, cli_json, library, root):
    told = cli("prewarm", "--manifest", library, "--arch", "sm_90", "--dry-run").stdout
    assert "missing: fill (the defaults) for sm_90: first compile of this program" in told
    assert "3 programs: 3 missing, which would be compiled." in told
    assert not root.exists()
    assert cli_json("prewarm", "--manifest", library, "--arch", "sm_90", "--require-hits", code=1)["missing"] == 3
    cli("prewarm", "--manifest", library, "--arch", "sm_90")
    assert "100% hits" in cli("prewarm", "--manifest", library, "--arch", "sm_90", "--require-hits").stdout
    (library / "fill.cu.j2").write_text((library / "fill.cu.j2").read_text() + "__device__ int edited;\n")
    told = cli("prewarm", "--manifest", library, "--arch", "sm_90", "--require-hits", code=1).stdout
    assert "missing: fill (the defaults) for sm_90: template fill.cu.j2 changed" in told


def test_reports_for_machines(cli, broken_library, tmp_path):
    arguments = ("prewarm", "--manifest", broken_library, "--arch", "sm_90", "--junit", tmp_path / "j.xml")
    cli(*arguments, "--report", tmp_path / "r.json", code=1)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["ok"], report["failed"]) == (False, 1)
    (suite,) = ET.parse(tmp_path / "j.xml").getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("3", "1")
    assert "nothing_of_this_name" in suite[2][0].text
    assert "there is no folder" in cli("prewarm", "--report", tmp_path / "no" / "r.json", code=2).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_fails_and_names_what_is_missing(cli, library, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], check=True)
    try:
        (disk / "ballast").write_bytes(b"x" * 52 * 1024)
        done = cli("prewarm", "--manifest", library, "--arch", "sm_90", "--cache-dir", disk / "cache", code=1)
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert "not stored" in done.stdout


# Those without heavy headers; tests/kernels compiles them all.
LIGHT = ("axpby", "softmax", "saxpy_nvvm", "lto_pair", "attention_combine")


def demo(*arguments, env=None):
    """The demo of a few kernels for one of its four architectures, to spare the others' time."""
    script = (
        "import functools\n"
        "import cuda_progcache.cli.prewarm as prewarm\n"
        "prewarm.DEMO_ARCHS = ('sm_90',)\n"
        f"prewarm.run_prewarm = functools.partial(prewarm.run_prewarm, kernels={LIGHT})\n"
        "from cuda_progcache.cli import main\n"
        f"main(['demo', *{list(arguments)}])\n"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})


def test_the_demo_is_for_four_architectures():
    from cuda_progcache.cli.prewarm import DEMO_ARCHS

    assert DEMO_ARCHS == ("sm_80", "sm_90", "sm_100", "sm_120")


def test_the_demo_twice(root):
    """The first run compiles the bundled library, the second finds all of it."""
    first = demo("--json")
    assert first.returncode == 0, first.stderr
    report = json.loads(first.stdout)
    assert report["kernels"] == len(LIGHT)
    assert (report["failed"], report["hits"]) == (0, 0)
    programs = report["compiled"]
    assert programs == len(report["items"]) - report["skipped"]

    second = demo(env={"MAKELEVEL": "1"})
    assert second.returncode == 0, second.stderr
    assert second.stderr == ""
    text = second.stdout
    assert f"100% hits: {programs} programs from the cache in" in text
    assert re.search(r"which saved [\d.]+ (s|min .*) of compile time", text)
    assert str(root / "entries") in text
    assert "make demo" not in text  # there is nothing to gain by a third run
    prefix = re.search(r" show ([0-9a-f]{8,64})$", text, re.MULTILINE)[1]
    assert any(item["digest"].startswith(prefix) for item in report["items"] if item["digest"])
    shown = subprocess.run(
        [sys.executable, "-m", "cuda_progcache", "show", prefix], capture_output=True, text=True, check=True
    )
    assert "registers" in shown.stdout


def test_the_demo_on_a_terminal_shows_progress(library, root):
    """Through a pseudo-terminal: a live line while it compiles, the table after it."""
    import pty

    script = (
        "import sys\n"
        "import cuda_progcache.cli.prewarm as prewarm\n"
        "from cuda_progcache import KernelLibrary\n"
        f"prewarm.library_at = lambda _: KernelLibrary({str(library)!r})\n"
        "prewarm.DEMO_ARCHS = ('sm_90',)\n"
        "from cuda_progcache.cli import main\n"
        "main(['demo'])\n"
    )
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "200"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen([sys.executable, "-c", script], stdout=child, stderr=child, env=environment) as running:
        os.close(child)
        text = b""
        try:
            while data := os.read(parent, 65536):
                text += data
        except OSError:
            pass  # Linux says EIO when the other side of a terminal closes
    os.close(parent)
    assert running.returncode == 0, text.decode()
    shown = text.decode()
    assert "3/3" in shown
    assert "sm_90" in shown
    assert "next:" in shown
    assert "run it again" in shown

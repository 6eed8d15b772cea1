# SPDX-License-Identifier: Apache-2.0
"""README.md and the documentation tell the truth: each block of code is run, in its page's order, in one directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_progcache.templates import unpatch_jinja2

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "ci" / "docs").rglob("*.md"))]
RUN = {"python", "console", "cuda"}

# These make environments and run this very suite.
NOT_RUN = {"make demo", "make test"}


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


def blocks(page):
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match[1] in RUN:
            yield Block(page.name, text.count("\n", 0, match.start()) + 1, match[1], match[2])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for all pages: what one compiles is a hit in the others."""
    return tmp_path_factory.mktemp("pages") / "cache"


@pytest.fixture
def environment(tmp_path, monkeypatch, cache):
    """A working directory as the checkout's root would be, a cache, and the tools on PATH."""
    from cuda_progcache.inspect import find_tool

    for name in ("ci", "kernels"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(cache))
    tools = (os.path.dirname(sys.executable), os.path.dirname(find_tool("cuobjdump")))
    monkeypatch.setenv("PATH", os.pathsep.join(tools), prepend=os.pathsep)
    # The run of pytest inside this one is a run of its own, but for where its temporary directory lies.
    own = {"PYTEST_DEBUG_TEMPROOT"}
    return {name: value for name, value in os.environ.items() if name in own or not name.startswith("PYTEST_")}


def test_there_is_something_to_run():
    languages = [block.language for block in blocks(PAGES[0])]
    assert languages.count("python") >= 3
    assert languages.count("console") >= 3
    assert len(README.splitlines()) <= 200
    # What stands in a page and isn't run: text, and directives.
    fences = {fence for page in PAGES for fence in re.findall(r"^```(\S+)$", page.read_text(), re.MULTILINE)}
    assert {fence for fence in fences if not fence.startswith("{")} <= RUN | {"text", "toml"}


@pytest.mark.parametrize("page", [p for p in PAGES if list(blocks(p))], ids=lambda p: p.name)
def test_every_block_runs(page, environment, capsys):
    """In one test: later blocks look at what earlier ones compiled."""
    try:
        for block in blocks(page):
            try:
                run(block, environment, capsys)
            except Exception as error:
                error.add_note(f"in the block at {block.page}:{block.line}")
                raise
    finally:
        unpatch_jinja2()  # one of them patches Jinja2, for tests after it as well


def run(block, environment, capsys):
    named = re.match(r"(?://|#) (\S+\.\w+)\n", block.text)
    if named:  # a file that later blocks use
        Path(named[1]).write_text(block.text)
    if block.language == "python":
        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), {"__name__": "readme"})
        printed = capsys.readouterr().out
        assert bool(printed) is ("print(" in block.text)
    elif block.language == "console":
        commands = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
        assert commands
        script = "\n".join(command for command in commands if command not in NOT_RUN)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (script, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        if "pytest" in script:
            assert re.findall(r"progcache: (\d+) hits?, (\d+) miss", done.stdout) == [("0", "1"), ("1", "0")]
    else:
        assert named, "a source that no block can use"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    for target in re.findall(r"\{doc\}`([^`<]+)`", text):
        assert (page.parent / f"{target}.md").exists(), target


def test_the_picture_is_there():
    picture = ET.parse(REPOSITORY / "ci" / "docs" / "how-it-works.svg").getroot()
    texts = ["".join(element.itertext()) for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"hit", "miss"} <= set(texts)


def test_the_benchmark_table_can_be_written(tmp_path):
    """From a report as ``python -m ci.bench`` writes it, into a README with the markers."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("bench_table", REPOSITORY / "ci" / "docs" / "bench_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    benchmarks = (REPOSITORY / "ci/docs/reference/benchmarks.md").read_text(encoding="utf-8")
    assert script.BEGIN in benchmarks
    assert script.END in benchmarks
    report = {
        "created": "2026-01-02T03:04:05Z",
        "python": "3.11.7",
        "machine": {"cpu": "a processor", "cpus": 2},
        "versions": {"cuda-core": "1.2.2", "missing": None},
        "benchmarks": [
            {
                "what": "get",
                "statistic": "median",
                "sides": {"ours": {"median": 8e-6}, "cuda.core": {"median": 1.6e-5}},
                "refused": {},
            },
            {
                "what": "headers",
                "statistic": "median",
                "sides": {"ours": {"median": 1.5e-3}},
                "refused": {"cuda.core": "no"},
            },
            {
                "what": "miss",
                "statistic": "mean",
                "sides": {"ours": {"mean": 1.25, "median": 9.0}, "bare": {"mean": 1.0}},
                "refused": {},
            },
        ],
    }
    table = script.table(report)
    assert "| get | 8 µs | 16 µs | 0.5× |" in table
    assert "| headers | 1.5 ms | refused |  |" in table
    assert "| miss | 1.25 s | (bare: 1 s) | 1.2× |" in table
    assert "cuda-core 1.2.2" in table
    assert "missing" not in table


def test_the_readme_counts_right():
    from cuda_progcache import KernelLibrary
    from cuda_progcache.cli.prewarm import DEMO_ARCHS
    from cuda_progcache.service.prewarm import variants

    (told,) = re.findall(r"a library of (\d+) kernels for four architectures \((\d+) programs", README)
    library = KernelLibrary()
    assert tuple(map(int, told)) == (len(library), len(variants(library, DEMO_ARCHS, None)))


def test_the_pages_name_kernels_that_exist():
    from cuda_progcache import KernelLibrary

    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"--kernel (\w+)(?: |$|\))", text)) | set(re.findall(r'\.kernel\("(\w+)"', text))
    assert named
    assert named <= set(KernelLibrary().names) | {"scale", "fill"}

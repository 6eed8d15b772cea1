# SPDX-License-Identifier: Apache-2.0
"""Run Jinja2's own test suite with our template compiler: ``python ci/jinja2_suite.py [pytest arguments]``.

The script downloads the source distribution of the installed Jinja2 with pip, and runs its tests in a separate process
that first calls ``cuda_progcache.templates.patch_jinja2``. It prints the passed and failed tests by file; the
exit status is pytest's. ``--stock`` runs the tests without the patch, ``--sdist FILE`` uses a downloaded distribution.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

_PLUGIN = """
import json, os

if os.environ["PROGCACHE_PATCH"] == "1":
    from cuda_progcache.templates import patch_jinja2

    patch_jinja2()

_outcomes = {}


def pytest_runtest_logreport(report):
    file = report.nodeid.partition("::")[0]
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.nodeid] = (file, report.outcome)


def pytest_sessionfinish(session):
    with open(os.environ["PROGCACHE_OUTCOMES"], "w") as file:
        json.dump(_outcomes, file)
"""


def main(arguments: list[str] | None = None) -> int:
    """Download and run the suite, and print the results; return pytest's exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stock", action="store_true", help="run without our compiler")
    parser.add_argument("--sdist", type=Path, help="use a downloaded source distribution of Jinja2")
    options, rest = parser.parse_known_args(arguments)
    with tempfile.TemporaryDirectory(prefix="jinja2-suite-") as directory:
        folder = Path(directory)
        archive = options.sdist or _download(folder)
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "source", filter="data")
        (tests,) = (folder / "source").glob("*/tests")
        _needs("trio", folder / "site")
        return _run(tests, folder, rest, patched=not options.stock)


def _download(folder: Path) -> Path:
    """Download the source distribution of the installed Jinja2."""
    version = importlib.metadata.version("jinja2")
    _pip("download", "--no-deps", "--no-binary", "jinja2", "--dest", str(folder / "download"), f"jinja2=={version}")
    (archive,) = (folder / "download").glob("*.tar.gz")
    return archive


def _needs(package: str, site: Path) -> None:
    """Install a package that the suite needs and the environment lacks, outside the environment."""
    site.mkdir()
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        _pip("install", "--target", str(site), package)


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)


def _run(tests: Path, folder: Path, rest: list[str], *, patched: bool) -> int:
    """Run pytest in the suite's folder, and print the counts by file."""
    plugin, outcomes = folder / "progcache_suite_plugin.py", folder / "outcomes.json"
    plugin.write_text(_PLUGIN, encoding="utf-8")
    repository = Path(__file__).resolve().parent.parent
    path = [str(folder), str(repository), str(folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PROGCACHE_PATCH": "1" if patched else "0",
        "PROGCACHE_OUTCOMES": str(outcomes),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "progcache_suite_plugin", "-p", "no:cacheprovider"]
    status = subprocess.run([*command, *rest], cwd=tests.parent, env=environment, check=False).returncode
    if outcomes.exists():
        _print(json.loads(outcomes.read_text(encoding="utf-8")))
    return status


def _print(outcomes: dict[str, tuple[str, str]]) -> None:
    """Print the numbers of passed, failed and skipped tests by file."""
    counts: dict[str, Counter[str]] = {}
    for file, outcome in outcomes.values():
        counts.setdefault(file, Counter())[outcome] += 1
    total: Counter[str] = Counter()
    for file in sorted(counts):
        total += counts[file]
        print(f"{Path(file).name:28} {_counted(counts[file])}")
    print(f"{'all':28} {_counted(total)}")


def _counted(count: Counter[str]) -> str:
    return f"{count['passed']:5} passed {count['failed']:4} failed {count['skipped']:4} skipped"


if __name__ == "__main__":
    sys.exit(main())

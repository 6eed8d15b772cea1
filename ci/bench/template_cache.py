# SPDX-License-Identifier: Apache-2.0
"""Compiled templates loaded from disk, compared with Jinja2's FileSystemBytecodeCache."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ci.bench.harness import OURS, Benchmark, Sides, at_most, ratio

JINJA2 = "Jinja2"
KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SMALL = "{{ dtype }} x[{{ n }}];\n"
PARAMETERS = {"dtype": "float32", "tile_m": 128, "tile_n": 128, "tile_k": 16, "thread_m": 8, "thread_n": 8, "vector": 4}

OUR_PROCESS = f"""
import os
from cuda_progcache import KernelEnvironment
from cuda_progcache.templates.bytecode_cache import BytecodeCache
environment = KernelEnvironment({str(KERNELS)!r}, bytecode_cache=BytecodeCache(os.environ["BYTECODE"]))
assert len(environment.render("sgemm.cu.j2", **{PARAMETERS!r})) > 5000
"""
JINJA2_PROCESS = f"""
import os
from jinja2 import Environment, FileSystemBytecodeCache, FileSystemLoader, StrictUndefined
environment = Environment(
    loader=FileSystemLoader({str(KERNELS)!r}), bytecode_cache=FileSystemBytecodeCache(os.environ["BYTECODE"]),
    undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
)
environment.filters["ctype"] = {{"float32": "float"}}.__getitem__
assert len(environment.get_template("sgemm.cu.j2").render(**{PARAMETERS!r})) > 5000
"""


ENVIRONMENT_PROCESS = JINJA2_PROCESS.replace(
    "from jinja2 import Environment, FileSystemBytecodeCache, FileSystemLoader, StrictUndefined",
    "from cuda_progcache.templates import BytecodeCache as FileSystemBytecodeCache, Environment\n"
    "from jinja2 import FileSystemLoader, StrictUndefined",  # sorted, as in real programs
)


def _cold(directory: Path, effort: float) -> Mapping[str, Sequence[float]]:
    """Run processes in turns; return the CPU seconds of each, which hardly depend on other load."""
    return _in_turns({OURS: OUR_PROCESS, JINJA2: JINJA2_PROCESS, "bare Python": "pass"}, directory, effort)


def _cold_environment(directory: Path, effort: float) -> Mapping[str, Sequence[float]]:
    """Do the same as `_cold` for a program that renders with an `Environment`."""
    sides = {OURS: ENVIRONMENT_PROCESS, JINJA2: JINJA2_PROCESS, "import jinja2": "import jinja2"}
    return _in_turns(sides, directory, effort)


def _in_turns(sides: Mapping[str, str], directory: Path, effort: float) -> Mapping[str, Sequence[float]]:
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(max(3, round(21 * effort))):
        for side, code in sides.items():
            took = _cpu_seconds(code, directory / side.replace(" ", "-"))
            if number:  # the first run compiles the templates, and Python's modules
                seconds[side].append(took)
    return seconds


def _cpu_seconds(code: str, bytecode: Path) -> float:
    bytecode.mkdir(mode=0o700, exist_ok=True)
    environment = {**os.environ, "BYTECODE": str(bytecode)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has .pyc files
    process = os.posix_spawn(sys.executable, [sys.executable, "-c", code], environment)
    _, status, used = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"the process failed with status {os.waitstatus_to_exitcode(status)}:\n{code}")
    return used.ru_utime + used.ru_stime


def _hit(name: str, source: str) -> Callable[[Path], Any]:
    @contextmanager
    def sides(directory: Path) -> Iterator[Sides]:
        import jinja2

        from cuda_progcache.templates.bytecode_cache import BytecodeCache, hash_source
        from cuda_progcache.templates.environment import KernelEnvironment

        (directory / "templates").mkdir()
        (directory / "templates" / name).write_text(source)
        for folder in ("ours", "theirs"):
            (directory / folder).mkdir(mode=0o700)

        ours = BytecodeCache(directory / "ours")
        kernels = KernelEnvironment([directory / "templates", KERNELS], bytecode_cache=ours)
        kernels.get_template(name)
        context = kernels.context_hash
        plain: Any = kernels._templates()
        assert plain is not None
        names = plain.names

        def our_hit() -> None:
            code, _, _ = ours.get(name, hash_source(source), context_hash=context)
            assert code is not None
            exec(code, dict(names))  # noqa: S102  (what our compiler made)

        theirs = jinja2.FileSystemBytecodeCache(str(directory / "theirs"))
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader([directory / "templates", KERNELS]),
            bytecode_cache=theirs,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["ctype"] = str
        path = environment.get_template(name).filename

        def their_hit() -> None:
            code = theirs.get_bucket(environment, name, path, source).code
            assert code is not None
            exec(code, {"environment": environment, "__file__": code.co_filename})  # noqa: S102  (what Jinja2 made)

        yield {OURS: our_hit, JINJA2: their_hit}

    return sides


BENCHMARKS = (
    Benchmark(
        "templates.cold_start",
        "new process to the text of sgemm, compiled templates on disk (CPU time)",
        at_most(20e-3),
        samples=_cold,
    ),
    Benchmark(
        "templates.cold_start_environment",
        "the same with an Environment (CPU time)",
        ratio(1.0, JINJA2),
        samples=_cold_environment,
    ),
    Benchmark(
        "templates.hit_small",
        "source hash, load, exec of a one-line template",
        ratio(0.4, JINJA2),
        _hit("small.cu.j2", SMALL),
        rounds=100,
    ),
    Benchmark(
        "templates.hit_gemm",
        "the same of the sgemm template",
        ratio(0.4, JINJA2),
        _hit("sgemm.cu.j2", (KERNELS / "sgemm.cu.j2").read_text(encoding="utf-8")),
        rounds=60,
        calls=20,
    ),
)

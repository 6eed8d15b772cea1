# SPDX-License-Identifier: Apache-2.0
"""Coverage of the GPU tests: each kernel of the library has one. It is read from the sources, without a GPU."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GPU_TESTS = HERE.parent / "gpu"


def functions(folder: Path, pattern: str) -> Iterator[ast.FunctionDef]:
    for file in sorted(folder.glob(pattern)):
        yield from (n for n in ast.parse(file.read_text()).body if isinstance(n, ast.FunctionDef))


def strings(tree: ast.AST) -> set[str]:
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def test_every_kernel_is_launched_on_a_gpu(library: Any) -> None:
    checks = {function.name: strings(function) for function in functions(HERE, "checks_*.py")}
    launched: set[str] = set()
    for test in functions(GPU_TESTS, "test_*.py"):
        used = {n.id for n in ast.walk(test) if isinstance(n, ast.Name)}
        launched |= strings(test).union(*(checks[name] for name in used & checks.keys()))
    assert set(library.names) <= launched


def test_every_gpu_test_is_marked() -> None:
    files = sorted(GPU_TESTS.glob("test_*.py"))
    assert files
    for file in files:
        assert "\npytestmark = pytest.mark.gpu\n" in file.read_text(), file.name

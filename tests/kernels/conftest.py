# SPDX-License-Identifier: Apache-2.0
"""Fixtures for the kernel tests: the repository's kernel library, emulated launches, and compiled cubins."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "inspect"):  # for emulate, launchers and checks_*; for ptxas_log
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

KERNELS = HERE.parents[1] / "kernels"


@pytest.fixture(scope="session")
def library() -> Any:
    """The kernel library of this checkout."""
    from cuda_progcache.service.manifest import KernelLibrary

    return KernelLibrary(KERNELS)


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def service(library: Any, session_folder: Path) -> Any:
    """A compile service with one cache for the whole run, so that each kernel is compiled once."""
    from cuda_progcache import CompileService

    return CompileService(session_folder / "kernels-cache", library=library)


@pytest.fixture(scope="session")
def compiled(library: Any, service: Any) -> Any:
    """``compiled(kernel, arch, **params)`` returns a compiled kernel whose log has the output of ``ptxas -v``.

    Each kernel is compiled once for all tests.
    """
    from verbose_unit import VerboseUnit

    def obtain(kernel: str, arch: str, **params: Any) -> Any:
        return VerboseUnit(library.render(kernel, **params), arch).obtain(service.cache)

    return obtain


@pytest.fixture(scope="session")
def launch(library: Any, session_folder: Path) -> Any:
    """A `launchers.HostLauncher`, which runs library kernels on the host."""
    import emulate
    import host_library
    import launchers

    if emulate.compiler() is None:
        pytest.skip("emulating kernels needs a C++ compiler for the host: install g++ or set CXX")
    emulate.prepare(session_folder / "emulated")
    return launchers.HostLauncher(host_library.HostLibrary(library))

# SPDX-License-Identifier: Apache-2.0
"""Fixtures for all tests: no test uses the user's cache or fails because it is slow; GPU tests need a GPU."""

from __future__ import annotations

import ast
import ctypes
import hashlib
import os
import sys
from functools import cache
from types import SimpleNamespace

import pytest
from _pytest.assertion import rewrite
from hypothesis import HealthCheck, settings

from cuda_progcache._util import syntax_tree

CUDA_ERROR_NO_DEVICE = 100

# The machine may be busy, so a slow example isn't a failure.
settings.register_profile("patient", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

if sys.version_info < (3, 11, 8):
    # pytest parses each module of the package when it is first imported, which a thread may do.
    rewrite.ast = SimpleNamespace(**{**vars(ast), "parse": syntax_tree.parse})


@pytest.fixture(scope="session", autouse=True)
def _session_cache_dir(tmp_path_factory):
    """Give session fixtures a default cache of this run, removed with its temporary directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path_factory.mktemp("session-progcache")))
        patch.setenv("CUDA_PROGCACHE_TEMPLATES", str(tmp_path_factory.getbasetemp() / "compiled-templates"))
        # At its end, pytest removes the directories of earlier runs; for a run inside a test, that would take minutes.
        patch.setenv("PYTEST_DEBUG_TEMPROOT", str(tmp_path_factory.getbasetemp()))
        yield


@pytest.fixture(autouse=True)
def _own_cache_dir(_session_cache_dir, monkeypatch, tmp_path_factory, request):
    """Give each test, and each process that it starts, a separate default cache."""
    name = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(tmp_path_factory.getbasetemp() / "progcache" / name))


@pytest.fixture(scope="session")
def oldest_release():
    """Return the interpreter of an environment with the matrix's oldest CUDA release; skip without a registry."""
    from ci import matrix

    try:
        return matrix.environment(next(iter(matrix.RELEASES)))
    except matrix.UnavailableError as error:
        pytest.skip(str(error))


@cache
def why_no_gpu():
    """Return why there is no CUDA device; None if there is one. A driver that fails in another way is an error."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no CUDA driver (libcuda.so.1)"
    status = driver.cuInit(0)
    if status == CUDA_ERROR_NO_DEVICE:
        return "no CUDA device"
    count = ctypes.c_int()
    if status or driver.cuDeviceGetCount(ctypes.byref(count)):
        raise RuntimeError(f"the CUDA driver doesn't start (cuInit: {status}); fix it, or deselect with -m 'not gpu'")
    return None if count.value else "no CUDA device"


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    # On a GPU runner, a missing device is a failure, not a reason to skip.
    if not on_gpu or os.environ.get("CUDA_PROGCACHE_REQUIRE_GPU"):
        return
    reason = why_no_gpu()
    if reason:
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))

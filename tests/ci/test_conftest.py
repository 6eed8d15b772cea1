# SPDX-License-Identifier: Apache-2.0
"""What ``tests/conftest.py`` promises to every test."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"

seen: set[str] = set()


@pytest.mark.parametrize("number", [1, 2])
def test_the_default_cache_is_a_new_one_in_a_temporary_directory(number, tmp_path_factory):
    from cuda_progcache import FileStreamProgramCache

    with FileStreamProgramCache() as cache:
        assert Path(cache.path).is_relative_to(tmp_path_factory.getbasetemp())
        assert len(cache) == 0
        cache[b"key"] = b"value"
        assert str(cache.path) not in seen
        seen.add(str(cache.path))


@pytest.fixture(scope="module")
def in_a_module_fixture():
    return os.environ["CUDA_PROGCACHE_DIR"]


def test_fixtures_of_modules_have_one_too(in_a_module_fixture, tmp_path_factory):
    assert Path(in_a_module_fixture).is_relative_to(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("required", [False, True])
def test_gpu_tests_skip_only_where_there_is_no_device(pytester, monkeypatch, required):
    shutil.copy(CONFTEST, pytester.path)
    pytester.makeini("[pytest]\nmarkers =\n    gpu: launches a kernel")
    pytester.makepyfile(
        "import conftest, pytest\n"
        "@pytest.mark.gpu\n"
        "def test_on_gpu(): print('ran')\n"
        "def test_elsewhere(): print('gpu:', conftest.why_no_gpu())\n"
    )
    if required:
        monkeypatch.setenv("CUDA_PROGCACHE_REQUIRE_GPU", "1")
    else:
        monkeypatch.delenv("CUDA_PROGCACHE_REQUIRE_GPU", raising=False)
    result = pytester.runpytest_subprocess("-s")
    has_device = "gpu: None" in result.stdout.str()
    result.assert_outcomes(passed=2 if has_device or required else 1, skipped=0 if has_device or required else 1)

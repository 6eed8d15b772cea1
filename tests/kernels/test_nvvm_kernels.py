# SPDX-License-Identifier: Apache-2.0
"""The saxpy_nvvm kernel: the PTX that libNVVM generates for each architecture, and its results."""

from __future__ import annotations

import re
from typing import Any

import pytest
from architectures import ARCHS
from checks_arrays import SIZES, check_saxpy
from ptx_machine import PtxLauncher


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saxpy(service: Any, dtype: str, arch: str) -> None:
    for n in SIZES:
        check_saxpy(PtxLauncher(service, arch), n, dtype=dtype, block=64)
    check_saxpy(PtxLauncher(service, arch), 300, blocks=10, dtype=dtype, block=32)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_saxpy_rounds_once_and_reads_x_through_the_read_only_cache(service: Any, dtype: str) -> None:
    bits = dtype.removeprefix("float")
    for arch in ARCHS:
        program = service.kernel("saxpy_nvvm", arch=arch, target_type="ptx", dtype=dtype)
        text = program.data.decode()
        assert not program.log
        assert f"fma.rn.f{bits}" in text, arch
        assert re.search(rf"ld\.global\.nc\.[bf]{bits}", text), arch
        assert ".maxntid 256" in text, arch

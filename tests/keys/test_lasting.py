# SPDX-License-Identifier: Apache-2.0
"""What a compiler's process doesn't forget, by option and by release."""

from __future__ import annotations

import pytest

from cuda_progcache.keys.lasting import lasting, tells_of_others


@pytest.mark.parametrize(
    ("library", "flags", "kept"),
    [
        ("nvrtc", ["-arch=sm_80", "--fmad=false", "-lineinfo", "-I", "x"], set()),
        ("nvrtc", ["-G", "--std=c++17"], {"-G"}),
        ("nvrtc", ["--restrict", "--no-such-option=3"], {"--restrict", "--no-such-option=3"}),
        ("nvrtc", ["--pch", "--pch-dir=x"], {"--pch"}),
        ("nvJitLink", ["-arch=sm_80", "-lto", "-O3"], set()),
        ("nvJitLink", ["-O0", "-g"], {"-O0", "-g"}),
        ("nvvm", ["-arch=compute_80", "-g"], set()),
    ],
)
def test_options(library, flags, kept):
    assert lasting(library, flags) == kept


@pytest.mark.parametrize(
    ("builtins", "tells"),
    [
        ("libnvrtc-builtins.so.12.0", True),
        ("libnvrtc-builtins.so.12.6.77", True),
        ("libnvrtc-builtins.alt.so.12.6", True),
        ("libnvrtc-builtins.so.12.8", False),
        ("libnvrtc-builtins.so.12.10", False),
        ("libnvrtc-builtins.so.13.0", False),
        ("libnvrtc-builtins.so", False),
    ],
)
def test_releases_that_number_calls_on(tmp_path, builtins, tells):
    (tmp_path / builtins).touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / builtins)
    for file in (tmp_path / builtins, link):
        assert tells_of_others([f"{tmp_path}/libnvrtc.so.12", str(file)], "ptx") is tells
        assert not tells_of_others([str(file)], "cubin")

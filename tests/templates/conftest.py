# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from cuda_progcache.templates import KernelEnvironment


@pytest.fixture
def folder(tmp_path):
    """``folder(a_j2="text")`` writes the template ``a.j2`` to a folder and returns the folder's environment."""

    def write(**files):
        for name, text in files.items():
            (tmp_path / name.replace("_", ".")).write_text(text, encoding="utf-8")
        return KernelEnvironment(tmp_path)

    write.path = tmp_path
    return write

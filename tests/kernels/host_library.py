# SPDX-License-Identifier: Apache-2.0
"""The kernel library for the host: includes with inline PTX are replaced by host C++."""

from __future__ import annotations

import dataclasses
from typing import Any

ELEMENT = {"float16": "__half", "bfloat16": "__nv_bfloat16"}

MMA_SYNC = """\
#include "mma_sync.hpp"
void load_matrices(unsigned (&fragment)[4], const void* row)
{
    cuda_host::load_matrices(fragment, row, false);
}
void load_matrices_transposed(unsigned (&fragment)[4], const void* row)
{
    cuda_host::load_matrices(fragment, row, true);
}
void multiply_add(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    cuda_host::multiply_add<%s>(c, a, b0, b1);
}
"""


class HostLibrary:
    """A kernel library whose renderings include host_include/*.hpp instead of inline PTX."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getitem__(self, kernel: str) -> Any:
        return self.library[kernel]

    def render(self, kernel: str, **params: Any) -> Any:
        rendered = self.library.render(kernel, **params)
        modules = [self._on_host(module, rendered.params.get("dtype")) for module in rendered.modules]
        return dataclasses.replace(rendered, modules=tuple(modules))

    def _on_host(self, module: Any, dtype: Any) -> Any:
        source = module.source
        for include in ("mma_sync.cuh.j2", "relaxed_words.cuh.j2"):
            if include in module.template_digests:
                in_ptx = self.library.environment.render(include, dtype=dtype)
                assert source.count(in_ptx) == 1, include
                on_host = (
                    MMA_SYNC % ELEMENT[dtype] if include == "mma_sync.cuh.j2" else '#include "relaxed_words.hpp"\n'
                )
                source = source.replace(in_ptx, on_host)
        assert "asm " not in source, f"{module.template}: inline PTX that nothing stands in for on the host"
        return dataclasses.replace(module, source=source)

# SPDX-License-Identifier: Apache-2.0
"""attention, emulated: host_include/mma_sync.hpp stands in for its PTX, with the layouts that the PTX ISA gives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from checks_attention import check_attention

ELEMENT = {"float16": "__half", "bfloat16": "__nv_bfloat16"}

ON_HOST = """\
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


class TensorCoresOnTheHost:
    """A kernel library whose renderings include host_include/mma_sync.hpp where they had mma_sync.cuh.j2."""

    def __init__(self, library: Any) -> None:
        self.library = library

    def __getitem__(self, kernel: str) -> Any:
        return self.library[kernel]

    def render(self, kernel: str, **params: Any) -> Any:
        from cuda_progcache.templates import KernelEnvironment

        rendered = self.library.render(kernel, **params)
        dtype = rendered.params["dtype"]
        (module,) = rendered.modules
        in_ptx = KernelEnvironment(self.library.path).render("mma_sync.cuh.j2", dtype=dtype)
        assert module.source.count(in_ptx) == 1
        source = module.source.replace(in_ptx, ON_HOST % ELEMENT[dtype])
        return dataclasses.replace(rendered, modules=(dataclasses.replace(module, source=source),))


@pytest.fixture(scope="session")
def tensor_cores(launch: Any) -> Any:
    """`launch` for kernels that use mma_sync.cuh.j2."""
    return type(launch)(TensorCoresOnTheHost(launch.library))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("seq_q", "seq_k"), [(1, 1), (31, 33), (33, 31), (64, 64), (65, 130), (1, 100), (130, 7)])
def test_any_sequence_length(tensor_cores: Any, seq_q: int, seq_k: int, causal: bool) -> None:
    check_attention(tensor_cores, seq_q, seq_k, causal=causal, block_n=32, warps=2)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"causal": True},
        {"head_dim": 128, "causal": True},
        {"dtype": "bfloat16", "head_dim": 128},
        {"dtype": "bfloat16", "block_n": 32, "warps": 4},
        {"warps": 8, "causal": True},
        {"head_dim": 128, "block_n": 32, "warps": 2},
    ],
    ids=str,
)
def test_parameters(tensor_cores: Any, params: dict[str, Any]) -> None:
    check_attention(tensor_cores, 70, 150, **params)


def test_heads_and_batches(tensor_cores: Any) -> None:
    check_attention(tensor_cores, 20, 40, batch=2, heads=6, kv_heads=3, causal=True, block_n=32, warps=2)


def test_weights_that_one_key_takes(tensor_cores: Any) -> None:
    check_attention(tensor_cores, 40, 200, spread=30.0, block_n=32, warps=2)


def test_no_keys_give_zeros(tensor_cores: Any) -> None:
    check_attention(tensor_cores, 40, 0, block_n=32, warps=2)

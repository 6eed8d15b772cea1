# SPDX-License-Identifier: Apache-2.0
"""Keys pinned to their bytes: whoever changes what is keyed, or how, has to change SCHEMA and these on purpose."""

from __future__ import annotations

import pytest

from cuda_progcache import ProgramOptions
from cuda_progcache._util.fields import replace
from cuda_progcache.keys import schema
from cuda_progcache.keys.headers import Header, HeaderSet
from cuda_progcache.keys.inputs import normalize
from cuda_progcache.keys.toolchain import ToolFile

SOURCE = 'extern "C" __global__ void k(int *a) { *a = 1; }'
HEADERS = HeaderSet(headers=(Header(("I", 0, "a.h"), "11" * 32), Header(("S", 0, "b.h"), "22" * 32)))


@pytest.fixture
def fixed_toolchain(monkeypatch):
    tools = {
        "c++": (
            ToolFile("nvrtc", "/x/libnvrtc.so", "build-id:aa:1"),
            ToolFile("nvrtc-builtins", "/x/b", "build-id:bb:2"),
        ),
        "ptx": (ToolFile("nvJitLink", "/x/libnvJitLink.so", "build-id:cc:3"),),
        "nvvm": (ToolFile("nvvm", "/x/libnvvm.so", "build-id:dd:4"),),
    }
    monkeypatch.setattr(schema, "toolchain", lambda code_type, *, libdevice: tools[code_type])
    monkeypatch.setattr(schema.os, "getcwd", lambda: "/somewhere")


def key(code=SOURCE, code_type="c++", target_type="cubin", names=(), extra=None, headers=schema.NO_HEADERS, **options):
    inputs = normalize(
        code=code,
        code_type=code_type,
        options=ProgramOptions(**{"arch": "sm_90"} | options),
        target_type=target_type,
        name_expressions=names,
        extra_digest=extra,
    )
    return schema.base_key(inputs).with_headers(headers)


def test_schema_version():
    assert schema.SCHEMA == "4"


@pytest.mark.usefixtures("fixed_toolchain")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {},
            "2742d78ccacdeab847556ffbedc553ab946176767e5bca1c61a31c2d5c423763",
        ),
        (
            {"target_type": "ptx", "arch": "compute_80"},
            "55beeb11f9479796be358dd34a15ebce2ceae21080fcfa4da84b27a6cc6c2c3c",
        ),
        (
            {"target_type": "ltoir"},
            "48a0a6ec55d6c7c4753c8ec257d067c053a55998f5d8e9ccd40e3edb0e136161",
        ),
        (
            {"names": ("b", b"b", "a"), "fma": False, "define_macro": ["A", ("B", "2")]},
            "bcb5cfd391fc1858036ae435ca42b385b706afa0dfca3db1876e526d68d91f40",
        ),
        (
            {"headers": HEADERS, "include_path": ["inc"]},
            "55efb16b12fcf18c65ea33c6526531549605b9176dbd72eef2dcb0df132d85d7",
        ),
        (
            {"headers": HeaderSet(probes=('"a.h" in the source: missing', "<b.h> in c.h: there"))},
            "a156b377f201b4986c8047c41d1f415e4e4798cb87bb330d6fc349c6ebb04928",
        ),
        (
            {"headers": replace(HEADERS, paths=(("I", 0), ("N", 0))), "include_path": ["inc"], "name": "a/k.cu"},
            "8c89c8d70865b0cd0224436068d8cdb32963fc8cb687ae27b3c35c0e7522d934",
        ),
        (
            {"code": ".version 8.0", "code_type": "ptx", "max_register_count": 32},
            "a38c68f1fcce256dfd6ed133e5b68b0d7b7273779c85a773bcc2cdf99e679f4d",
        ),
        (
            {"code": b"; ir", "code_type": "nvvm", "target_type": "ltoir", "extra_sources": [("m", "; more")]},
            "32d59faaa5ca677f5e18a81577b7edd150b679943952fd0ad715033fd1614e8c",
        ),
        (
            {"extra": b"digest", "name": "gemm.cu"},
            "a7ceeba12e950872cce43150f13684b5a6b3194a9f10102b484fdf195a0ee7cf",
        ),
    ],
)
def test_golden(arguments, expected):
    made = key(**arguments)
    assert made.digest.hex() == expected
    assert schema.digest(made.components) == made.digest, "the components are what was hashed, in that order"


@pytest.mark.usefixtures("fixed_toolchain")
def test_labels_and_order():
    labels = [c.label for c in key(names=("a", b"b"), headers=HEADERS, extra=b"e", lineinfo=True).components]
    assert labels == [
        "schema", "tool nvrtc", "tool nvrtc-builtins", "code_type", "target_type", "name", "option", "option",
        "name_expression", "name_expression", "extra_digest", "code", "headers", "cwd",
    ]  # fmt: skip

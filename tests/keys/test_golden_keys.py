# SPDX-License-Identifier: Apache-2.0
"""Keys pinned to their bytes: whoever changes what is keyed, or how, has to change SCHEMA and these on purpose."""

from __future__ import annotations

import pytest

from cuda_progcache import ProgramOptions
from cuda_progcache.keys import schema
from cuda_progcache.keys.headers import Header, HeaderSet
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
    inputs = schema.normalize(
        code=code,
        code_type=code_type,
        options=ProgramOptions(**{"arch": "sm_90"} | options),
        target_type=target_type,
        name_expressions=names,
        extra_digest=extra,
    )
    return schema.base_key(inputs).with_headers(headers)


def test_schema_version():
    assert schema.SCHEMA == "1"


@pytest.mark.usefixtures("fixed_toolchain")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {},
            "6428da094f35a5ec1516383736c9903551c06961424d217bb3df27cdb8093c89",
        ),
        (
            {"target_type": "ptx", "arch": "compute_80"},
            "8f9ae8096e94ce9e804d9c7e9b09efcfc9761ba8e26c9a1cd09cb86e77e25785",
        ),
        (
            {"target_type": "ltoir"},
            "d81aae61c902d591954b6117747a2cdd2b97d29d92347d226fe66bdc8764a8c9",
        ),
        (
            {"names": ("b", b"b", "a"), "fma": False, "define_macro": ["A", ("B", "2")]},
            "17b3eb182b2097871c4a36f91a51833a4e74b6aaeafe9a9c957bbeeb79f766a4",
        ),
        (
            {"headers": HEADERS, "include_path": ["inc"]},
            "8797127c48100b85ffda4ceb293c1b92b2923e3e6adf6a78d1b6b0d1d10bffb9",
        ),
        (
            {"code": "// __FILE__", "headers": HEADERS, "include_path": ["inc"]},
            "1f0eb387633465f54345c695f21e0bfd7ddec69d97d2f6d0a3f29ca71e73310e",
        ),
        (
            {"code": ".version 8.0", "code_type": "ptx", "max_register_count": 32},
            "021eb8e0ed7efa1c717252d04fcabdbe47a661da95626c93b7f39639827b216e",
        ),
        (
            {"code": b"; ir", "code_type": "nvvm", "target_type": "ltoir", "extra_sources": [("m", "; more")]},
            "c2b019809d2cf36bb18b801c8734a34b07ae87e5c43648fbe96f7564babdbf90",
        ),
        (
            {"extra": b"digest", "name": "gemm.cu"},
            "c86e901d850dc939634fd4df30f08e37db98f78ee7e79183eaa7fc6599fd8ef2",
        ),
    ],
)
def test_golden(arguments, expected):
    assert key(**arguments).digest.hex() == expected


@pytest.mark.usefixtures("fixed_toolchain")
def test_labels_and_order():
    labels = [c.label for c in key(names=("a", b"b"), headers=HEADERS, extra=b"e", lineinfo=True).components]
    assert labels == [
        "schema", "tool nvrtc", "tool nvrtc-builtins", "code_type", "target_type", "name", "code", "option", "option",
        "name_expression", "name_expression", "extra_digest", "headers", "cwd",
    ]  # fmt: skip

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
    assert schema.SCHEMA == "3"


@pytest.mark.usefixtures("fixed_toolchain")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            {},
            "c3dae90e6cbf42c292e7ad1f410af3d90bcc832e2ea8743c765549bbb0a31399",
        ),
        (
            {"target_type": "ptx", "arch": "compute_80"},
            "e7df31ef1a4a2aab7f440cc2750ed808e0850e206ae4fd6d538bfe3b3bda5426",
        ),
        (
            {"target_type": "ltoir"},
            "5bc7e2b6e4897691a2c730eb21276ae801e1ce37a5d9d4d3a3ed1dc2a51b67bf",
        ),
        (
            {"names": ("b", b"b", "a"), "fma": False, "define_macro": ["A", ("B", "2")]},
            "92c56b5549bc380ecd0bcdad4323ecc84e20f4970ac5570b401e66adad12a6d5",
        ),
        (
            {"headers": HEADERS, "include_path": ["inc"]},
            "58a0963ca10e27f573eddddf680c4388d7930985fabbfeeb98a301a5abde1093",
        ),
        (
            {"code": "// __FILE__", "headers": HEADERS, "include_path": ["inc"]},
            "0ffccb24161e26f2c704b74c697079bdaa8f182d80438f09876eb094d166a07b",
        ),
        (
            {"code": ".version 8.0", "code_type": "ptx", "max_register_count": 32},
            "4f14e958b9def121e033b8f1ef07e000b4ec82c12a8950463f84aa950ddb8c4e",
        ),
        (
            {"code": b"; ir", "code_type": "nvvm", "target_type": "ltoir", "extra_sources": [("m", "; more")]},
            "4d1a7556d1db66387ca60ffc273a1f06fd121752c1ffe41f566c11c7c052d5fb",
        ),
        (
            {"extra": b"digest", "name": "gemm.cu"},
            "10331eb87e977975f5266da9ae777d4ece009fd4f74063f4089d233312b9253f",
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

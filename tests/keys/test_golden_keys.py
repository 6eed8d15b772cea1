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
            "88d6ac4d70c4d60ce929b39d53b7161db12ac0edfdce51b10a3a3cf4f127743c",
        ),
        (
            {"target_type": "ptx", "arch": "compute_80"},
            "0fd54b78a6b7b9bf7a6f0a4cb66744bacbd79d658cf49f4e9f95d5e1f948b5f4",
        ),
        (
            {"target_type": "ltoir"},
            "c83200f632b73ca06bec702828cf41af93aadc97e599099d02053be89a5a6b5e",
        ),
        (
            {"names": ("b", b"b", "a"), "fma": False, "define_macro": ["A", ("B", "2")]},
            "52837bdd4c2c13ce034e11f05c59b0c2c1fbd894600be6702104b8d637c64d74",
        ),
        (
            {"headers": HEADERS, "include_path": ["inc"]},
            "06c9523f651e26cbf046ea1a239dee6cbf73c0ca511e5be6d725cc3f6c608c17",
        ),
        (
            {"headers": HeaderSet(probes=('"a.h" in the source: missing', "<b.h> in c.h: there"))},
            "3b98dbea9c423f55b4eb16f5d7600aa25a41d91b31bf073b4162d35fbc2b627b",
        ),
        (
            {"code": "// __FILE__", "headers": HEADERS, "include_path": ["inc"]},
            "9b943eb21677aa1ad5042c3ec4bfae512d387a4db243a2e9243e41edd4f5f0f2",
        ),
        (
            {"code": ".version 8.0", "code_type": "ptx", "max_register_count": 32},
            "ce6ca053f36813fd0662bc26aa4ef5b85367de774cb52ee04b79cc3a860eee83",
        ),
        (
            {"code": b"; ir", "code_type": "nvvm", "target_type": "ltoir", "extra_sources": [("m", "; more")]},
            "02e67c45de592b8d4f21e55c3d3506e72b60b612da23ceb7430a69b4fc6cff57",
        ),
        (
            {"extra": b"digest", "name": "gemm.cu"},
            "002909e9c0c273d5bea37ef8ae71d7ec6db55a57f6ddb668d8e59e7991e8436d",
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

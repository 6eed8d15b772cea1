# SPDX-License-Identifier: Apache-2.0
"""The command line in this process and in its own, a cache with known entries, a small kernel library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner


@pytest.fixture
def cli():
    """Call a command in this process; its exit code is checked."""
    from cuda_progcache.cli.app import app

    def run(*arguments, code=0, stdin=None):
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, prog_name="cuda-progcache")
        assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr, result.exception)
        assert "Traceback" not in result.stderr
        return result

    return run


@pytest.fixture
def cli_json(cli):
    """Call a command with --json; its stdout must be one JSON object and nothing else."""

    def run(*arguments, code=0, stdin=None):
        return json.loads(cli(*arguments, "--json", code=code, stdin=stdin).stdout)

    return run


@pytest.fixture
def process():
    """Call a command in a process of its own, as a shell would."""

    def run(*arguments, env=None, **options):
        return subprocess.run(
            [sys.executable, "-m", "cuda_progcache", *map(str, arguments)],
            env={**os.environ, **(env or {})},
            capture_output=True,
            timeout=600,
            check=False,
            **{"text": True, **options},
        )

    return run


@pytest.fixture
def root():
    """The directory that the environment names as the cache."""
    return Path(os.environ["CUDA_PROGCACHE_DIR"])


def record(name="saxpy.cu", *, kernel=None, arch="sm_90", target="cubin", **more):
    """What compile/ keeps beside a binary."""
    return {
        "name": name,
        "code_type": "c++",
        "target_type": target,
        "arch": arch,
        "key": "ab" * 32,
        "components": [["schema", "1"], ["source", "line one\nline two"]],
        "headers": [{"name": "cuda_fp16.h", "digest": "12" * 32}, {"name": "vector_types.h", "digest": "34" * 32}],
        "toolchain": [{"name": "libnvrtc.so.13", "digest": "56" * 32}],
        "log": "saxpy.cu(3): warning #177-D: variable [i] was declared but never referenced",
        "symbol_mapping": {"saxpy<float>": "_Z5saxpyIfEvv"},
        "duration": 0.125,
        "created": "2026-01-02T03:04:05+00:00",
        "resource_usage": {"saxpy": {"registers": 12, "shared": 0, "spill_stores": 0}},
        "kernel": kernel,
        **more,
    }


@pytest.fixture
def kept(root):
    """Three programs in the cache; gives their digests by name."""
    from cuda_progcache import FileStreamProgramCache

    softmax = {
        "name": "softmax",
        "parameters": {"dtype": "float16"},
        "templates": [{"name": "softmax.cu.j2", "digest": "78" * 32}],
    }
    with FileStreamProgramCache() as cache:
        cache.publish(b"one", b"x" * 5000, record())
        cache.publish(b"two", b"y" * 100, record("softmax", kernel=softmax, arch="sm_100", symbol_mapping={}, log=""))
        cache.publish(b"three", b"z" * 20, record("gemm.cu", target="ptx", resource_usage=None))
        assert Path(cache.path) == root
        digests = {entry.record["name"].partition(".")[0]: entry.digest for entry in cache.entries()}
    assert len(digests) == 3
    return digests


MANIFEST = """\
format = 1

[kernels.scale]
template = "scale.cu.j2"
description = "x *= a"
entry_points = ["scale"]
headers = []
reference = "a * x"
constraints = [{ require = "block % 32 == 0", message = "block must be a multiple of the warp size" }]

[kernels.scale.parameters]
dtype = { type = "dtype", values = ["float32", "float64"], default = "float32", description = "element type" }
block = { type = "int", min = 32, max = 1024, default = 256, description = "threads per block" }
fast = { type = "bool", default = false, description = "skip the bounds check" }

[[kernels.scale.variants]]
[[kernels.scale.variants]]
dtype = "float64"

[kernels.fill]
template = "fill.cu.j2"
description = "x = value"
entry_points = ["fill"]
reference = "np.full_like(x, 3)"

[[kernels.fill.variants]]
"""
SCALE = """\
// scales a vector
extern "C" __global__ void __launch_bounds__({{ block }}) scale({{ dtype | ctype }}* x, {{ dtype | ctype }} a, int n) {
    int i = blockIdx.x * {{ block }} + threadIdx.x;
{% if fast %}
    x[i] *= a;
{% else %}
    if (i < n) x[i] *= a;
{% endif %}
}
"""
FILL = 'extern "C" __global__ void fill(int* x) { x[threadIdx.x] = 3; }\n'
BROKEN = 'extern "C" __global__ void fill(int* x) {\n    x[0] = nothing_of_this_name;\n}\n'


@pytest.fixture
def library(tmp_path):
    """A folder with two small kernels."""
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "manifest.toml").write_text(MANIFEST)
    (folder / "scale.cu.j2").write_text(SCALE)
    (folder / "fill.cu.j2").write_text(FILL)
    return folder


@pytest.fixture
def broken_library(library):
    """The same, with a kernel that doesn't compile."""
    (library / "fill.cu.j2").write_text(BROKEN)
    return library

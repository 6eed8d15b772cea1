# SPDX-License-Identifier: Apache-2.0
"""What a run used, written down as it goes: by several processes, some of which are killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_progcache import (
    CompileService,
    FileStreamProgramCache,
    ProgCacheWarning,
    Program,
    ProgramOptions,
    RecordingError,
    link,
    record,
)
from cuda_progcache.compile.recording import read

ROOT = Path(__file__).parents[2]
SOURCE = '#include "size.h"\nextern "C" __global__ void fill(int *p) { p[threadIdx.x] = SIZE; }\n'
# Each process uses a program of its own and one that all use, says so, and waits to be killed.
WORKER = """
import sys, time
from cuda_progcache import CompileService
own = sys.argv[1]
service = CompileService()
service.kernel("axpby", arch="sm_90")
service.compile("extern \\"C\\" __global__ void own%s() {}" % own, options={"arch": "sm_90", "name": "own.cu"})
print("used", flush=True)
time.sleep(600)
"""


@pytest.fixture
def cache(tmp_path):
    return FileStreamProgramCache(tmp_path / "cache", mode="rw")


@pytest.fixture
def header(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "size.h").write_text("#define SIZE 4\n")
    return str(tmp_path / "include")


def test_what_is_used_is_noted(cache, header, tmp_path):
    service = CompileService(cache)
    options = ProgramOptions(arch="sm_90", name="fill.cu", include_path=[header], std="c++17")
    with service.record(tmp_path / "run.json") as recording:
        kernel = service.kernel("axpby", arch="sm_90", dtype="float16")
        fill = Program(SOURCE, "c++", options).compiled("cubin", cache=cache)
        service.kernel("axpby", arch="sm_90", dtype="float16")
        part = Program(SOURCE, "c++", options).compiled("ltoir", cache=cache)
        linked = link([part], {"arch": "sm_90"}, cache=cache)
        bare = Program(SOURCE, "c++", options).compiled("ptx")
    service.kernel("axpby", arch="sm_90")  # after the block
    noted = read(tmp_path / "run.json")
    assert [line["key"] for line in noted] == [kernel.digest, fill.digest, part.digest, linked.digest, None]
    assert noted[-1]["reason"] == "no cache was given"
    assert not bare.hit
    one, other = noted[:2]
    assert (one["kernel"], one["parameters"]["dtype"], one["arch"], one["target"]) == (
        "axpby",
        "float16",
        "sm_90",
        "cubin",
    )
    assert one["outcome"] == "compiled"
    assert set(one["source"]) == {"sha256"}
    assert other["kernel"] is None
    assert other["source"]["text"] == SOURCE
    assert other["fields"] == {"name": "fill.cu", "include_path": ["include"], "std": "c++17"}
    assert other["flags"] == ["-arch=sm_90", "--std=c++17"]
    assert {tool["name"] for tool in other["toolchain"]} == {"nvrtc", "nvrtc-builtins"}
    assert other["headers"] != one["headers"]
    assert [{**line, "source": None} for line in recording.programs] == [{**line, "source": None} for line in noted]
    with record() as again:
        service.kernel("axpby", arch="sm_90", dtype="float16")
    assert [line["outcome"] for line in again.programs] == ["hit"]
    assert again.path is None


def test_a_prewarm_uses_nothing(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_PROGCACHE_RECORD", str(tmp_path / "run.json"))
    CompileService(cache).prewarm(archs=["sm_90"], kernels=["axpby"])
    assert not (tmp_path / "run.json").exists()
    CompileService(cache).kernel("axpby", arch="sm_90")
    assert [line["outcome"] for line in read(tmp_path / "run.json")] == ["hit"]


def test_processes_append_and_nothing_is_lost_when_they_are_killed(tmp_path):
    run = tmp_path / "run.json"
    run.write_bytes(b'\n{"format": 1, "name": "cut sho')  # of a process whose write was cut short
    settings = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CUDA_PROGCACHE_RECORD": str(run),
        "CUDA_PROGCACHE_DIR": str(tmp_path / "cache"),
    }
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(n)], env=settings, stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "used\n"
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
    noted = read(run)
    assert sorted(line["source"]["text"][27:31] for line in noted if not line["kernel"]) == ["own0", "own1", "own2"]
    kernel = [line for line in noted if line["kernel"] == "axpby"]
    assert [line["outcome"] for line in kernel] == ["compiled"]


def test_a_recording_that_cannot_be_written_costs_no_compile(cache, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="absent"):
        record(tmp_path / "absent" / "run.json")
    monkeypatch.setenv("CUDA_PROGCACHE_RECORD", str(tmp_path))
    with pytest.warns(ProgCacheWarning, match="can't record programs in"):
        assert CompileService(cache).kernel("axpby", arch="sm_90").data


@pytest.mark.parametrize(
    ("text", "why"),
    [("something else\n", "is not a recording"), (json.dumps({"format": 2, "sha256": ""}), "of format 2")],
)
def test_what_is_no_recording_is_refused(text, why, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RecordingError, match=why):
        read(tmp_path / "run.json")

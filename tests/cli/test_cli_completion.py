# SPDX-License-Identifier: Apache-2.0
"""What a shell offers at Tab: digests, names, kernels, their parameters, architectures; and nothing where it can't."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.shell_completion import ShellComplete

from cuda_progcache import FileStreamProgramCache


def offered(*words):
    """The words that are offered for the last one, which is being typed."""
    from cuda_progcache.cli.app import app

    shell = ShellComplete(app, {}, "cuda-progcache", "_CUDA_PROGCACHE_COMPLETE")
    return [item.value for item in shell.get_completions([str(word) for word in words[:-1]], words[-1])]


@pytest.mark.parametrize("command", [["show"], ["explain"], ["sass"], ["provenance"], ["pin"], ["diff"], ["diff", "x"]])
def test_programs_by_digest_and_by_name(kept, command):
    digest = kept["softmax"]
    assert offered(*command, digest[:6]) == [digest[:12]]
    assert offered(*command, digest[:20]) == [digest[:20]]
    assert set(offered(*command, "s")) == {"softmax", "saxpy.cu"}
    assert offered(*command, "nothing") == []


def test_of_the_cache_that_is_named(kept, root, tmp_path):
    assert offered("--cache-dir", tmp_path, "show", "so") == []
    assert offered("show", "--cache-dir", root, "so") == ["softmax"]
    assert offered("list", "--kernel", "ge") == ["gemm.cu"]


def test_kernels_their_parameters_and_architectures(library):
    here = ("compile", "--manifest", library, "--kernel")
    assert offered(*here, "s") == ["scale"]
    assert offered("kernels", "--manifest", library, "") == ["scale", "fill"]
    assert offered(*here, "scale", "-p", "") == ["dtype=", "block=", "fast="]
    assert offered(*here, "scale", "-p", "dtype=") == ["dtype=float32", "dtype=float64"]
    assert offered(*here, "scale", "-p", "fast=t") == ["fast=true"]
    assert offered(*here, "scale", "-p", "block=") == ["block=256"]
    assert offered(*here, "none", "-p", "") == []
    assert offered("compile", "-p", "") == []
    assert "sm_90" in offered("compile", "--arch", "sm_9")
    assert "watch" in offered("wa")


def test_trouble_offers_nothing(root, library):
    (library / "manifest.toml").write_text("kernels = 3")
    assert offered("compile", "--manifest", library, "--kernel", "") == []
    root.mkdir(parents=True, mode=0o777)
    root.chmod(0o777)
    assert offered("show", "s") == []


def test_names_that_would_steer_a_terminal_are_not_offered(root):
    with FileStreamProgramCache(root) as cache:
        cache.publish(b"k", b"v", {"name": "evil\x1b]0;owned\x07"})
    assert offered("show", "ev") == []


def test_bash_is_told(kept):
    environment = {
        **os.environ, "_CUDA_PROGCACHE_COMPLETE": "bash_complete", "COMP_WORDS": "cuda-progcache show so",
        "COMP_CWORD": "2",
    }  # fmt: skip
    script = "from cuda_progcache.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("plain,softmax\n", "")

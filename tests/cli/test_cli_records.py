# SPDX-License-Identifier: Apache-2.0
"""A record of any shape fails no command, and is printed by none as it isn't meant."""

from __future__ import annotations

import copy
import itertools
import json
import re

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cuda_progcache import FileStreamProgramCache, Program, ProgramOptions
from cuda_progcache.cli.app import ExitCode, app
from cuda_progcache.compile import toolchains
from cuda_progcache.provenance.programs import program_cache
from cuda_progcache.service.watch import Watch
from tests.cli.conftest import record

SOFTMAX = {
    "name": "softmax",
    "parameters": {"dtype": "float16", "block": 256},
    "templates": [{"name": "softmax.cu.j2", "digest": "78" * 32}],
}
GOOD = [
    record(
        log_files=[["saxpy.cu", ["N", 0, ""]]],
        manifest="ab" * 32,
        toolchain=[{"name": "nvrtc", "digest": "build-id:1", "version": "13.5"}],
        components=[["schema", "1"], ["tool nvrtc", "a:b"], ["option", "-arch=sm_90"], ["name_expression", "s:f<int>"]],
    ),
    record("softmax", kernel=SOFTMAX, arch="sm_100"),
    record("softmax", kernel=None, part_of={**SOFTMAX, "module": "m"}, target="ltoir"),
    record(
        "linked",
        code_type="link",
        components=[["schema", "1"], ["input 0 code", "x"], ["input 0", "y"]],
        inputs=[{"name": "a", "target_type": "ltoir", "digest": "9" * 64, "sha256": "8" * 64}],
        parents=[{"key": "7" * 64, "name": "caller"}],
    ),
]


def places(value, so_far=()):
    """The way to each value in a JSON value; of a list, to its first."""
    if so_far:
        yield so_far
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for at, one in inner:
        yield from places(one, (*so_far, at))


def put(value, place, junk):
    """A copy of a JSON value with another one at a place."""
    made = copy.deepcopy(value)
    inner = made
    for at in place[:-1]:
        inner = inner[at]
    inner[place[-1]] = junk
    return made


PLACES = [(good, place) for good in GOOD for place in places(good)]
texts = st.sampled_from(["", "x", "\x1b[2J", "a\nb", "[/]", "[bold]x", "\ud800", "\udc80", "\u202e", "input x", "../x"])
numbers = st.sampled_from([0, 1, -1, 0.5, 1e308, -1e308, 5e-324, 10**400, -(10**400)])
scalars = st.none() | st.booleans() | numbers | texts
junk = st.recursive(
    scalars,
    lambda one: (
        st.lists(one, max_size=2)
        | st.tuples(texts, one).map(lambda pair: [list(pair)])
        | st.dictionaries(st.sampled_from(["name", "digest", "parameters", "templates", "key", "a"]), one, max_size=3)
    ),
    max_leaves=5,
) | st.sampled_from(["[" * 200 + "]" * 200]).map(json.loads)
records = st.builds(lambda at, value: put(*at, value), st.sampled_from(PLACES), junk)


@pytest.fixture(scope="module")
def cubin():
    return (
        Program('extern "C" __global__ void k(int *a) { *a = 1; }', "c++", ProgramOptions(arch="sm_80"))
        .compiled("cubin")
        .data
    )


def refuse(constant):
    raise ValueError(f"{constant} is no JSON")


def commands(folder, root, digests):
    """Every command that reads records, as typed."""
    cache = ("--cache-dir", root)
    whole = [
        *("list", "list --sort cost", "list --sort name --reverse", "list --kernel softmax?block=256@sm_90", "stats"),
        *("list --kernel soft* --arch sm_100", "list --limit 3 --sort size --target cubin", "top", "top largest"),
        *(
            "resources",
            "resources --kernel softmax",
            "explain --last",
            "affected cuda_fp16.h",
            "affected softmax.cu.j2",
        ),
        *(
            "affected libnvrtc.so.13",
            "check",
            "check --arch sm_90",
            "verify",
            "prune --dry-run --max-size 1",
            "pin --list",
        ),
        *("show softmax", "explain softmax", "show saxpy"),
    ]
    yield from ((*words.split(), *cache) for words in whole)
    yield from (("compare", *both) for both in ((folder / "good", root), (root, folder / "good")))
    yield ("export", folder / "all.tar", *cache)
    yield ("export", folder / "some.tar", "--kernel", "*", "--arch", "sm_100", *cache)
    yield ("check", folder / "all.tar")
    yield ("compare", folder / "good", folder / "all.tar")
    yield ("import", folder / "all.tar", "--cache-dir", folder / "imported")
    yield ("sync", root, folder / "synced")
    for digest in digests:
        yield ("show", digest, "--headers", "--components", *cache)
        yield ("explain", digest, *cache)
        yield ("provenance", digest, "--all", *cache)
        yield ("diff", "saxpy.cu", digest, "--stat", *cache)
        yield ("pin", digest, *cache)


ONCE = ("report -o {}/r.html --no-plots --listings 2", "export --oci {}/image", "export --wheel {}/w --name my-kernels")


def run(*words, json_too=True):
    """Run a command, as text and with --json: no defect, no broken JSON, nothing that would steer a terminal."""
    for more in ([], ["--json"])[: 1 + json_too]:
        done = CliRunner().invoke(app, [*map(str, words), *more], prog_name="cuda-progcache")
        assert done.exit_code != ExitCode.INTERNAL, done.stderr
        assert done.exception is None or isinstance(done.exception, SystemExit), (words, done.exception)
        if more:
            json.loads(done.stdout, parse_constant=refuse)
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", done.stdout + done.stderr), (words, done.stdout)


@settings(
    max_examples=2, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
@given(made=st.lists(records, min_size=16, max_size=16))
def test_a_record_of_any_shape_fails_no_command(made, cubin, tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("junk")
    root = folder / "cache"
    monkeypatch.setenv("CUDA_PROGCACHE_DIR", str(root))
    for name, kept in (("good", GOOD), ("cache", [*GOOD, *made])):
        with FileStreamProgramCache(folder / name) as cache:
            for number, one in enumerate(kept):
                assert cache.publish(f"{number}", cubin, one)
                assert cache.load(f"{number}").record == one
            seen = Watch(cache)
            digests = sorted(cache.digests())
            assert all(seen._stored(digest, _makers(cache), last=True) is not None for digest in digests)
    for words in commands(folder, root, digests[:: len(digests) // 3]):
        run(*words)
    for words in ONCE:
        run(*words.format(folder).split(), json_too=False)
    for format_, digest in zip(itertools.cycle(("dot", "svg", "prov", "slsa", "slsa")), digests, strict=False):
        run("provenance", digest, "--format", format_, json_too=False)
    for words, typed in (("show", ""), ("show", digests[0][:4]), ("list --kernel", ""), ("list --arch", "sm")):
        assert BashComplete(app, {}, "cuda-progcache", "_X").get_completions(words.split(), typed)
    with FileStreamProgramCache(root, mode="ro") as cache:
        assert {call.detach().to_lookup_key() for call in program_cache(cache).query()} <= set(digests)
        assert toolchains._of_records(cache)
        assert set(cache.digests()) == set(digests)


def test_a_record_that_nests_deeply_is_printed(cubin, cli_json, tmp_path):
    deep = json.loads("[" * 900 + "]" * 900)
    with FileStreamProgramCache(tmp_path / "cache") as cache:
        cache.publish(b"k", cubin, {**GOOD[0], "more": deep})
    found = cli_json("show", "saxpy.cu", "--cache-dir", tmp_path / "cache")["record"]["more"]
    while found:
        (found,), deep = found, deep[0]
    assert found == deep == []


def _makers(cache):
    from cuda_progcache.compile.history import Makers

    return Makers(cache)

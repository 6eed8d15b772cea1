# SPDX-License-Identifier: Apache-2.0
"""The package doesn't draw from the application's random numbers, and its own don't depend on the seed."""

from __future__ import annotations

import ast
import os
import random
from pathlib import Path

import pytest

import cuda_progcache
from cuda_progcache._util.chance import chance
from cuda_progcache.compile import manifests
from cuda_progcache.memo.caches.limited import SizeLimitedMixin
from cuda_progcache.service.hit_check import HitCheck
from cuda_progcache.store.tiers.leases import FleetLeases
from cuda_progcache.store.tiers.settings import parse_tier

PACKAGE = Path(cuda_progcache.__file__).parent
#: Names in :mod:`random` that don't use the shared generator.
OWN = {"Random", "SystemRandom"}


def shared_draws(source):
    """Yield the lines that use the generator shared by the whole process."""
    tree = ast.parse(source if "random" in source else "")  # most files don't mention it, and parsing is slow
    imported = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names = {alias.asname or alias.name for alias in imported if alias.name == "random"}
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="random") if {alias.name for alias in node.names} - OWN:
                yield node.lineno
            case ast.Attribute(value=ast.Name(id=name)) if name in names and node.attr not in OWN:
                yield node.lineno


def test_no_module_draws_from_the_shared_generator():
    found = [(str(path), list(shared_draws(path.read_text("utf-8")))) for path in PACKAGE.rglob("*.py")]
    assert len(found) > 100
    assert [(path, lines) for path, lines in found if lines] == []


def test_the_check_sees_what_it_looks_for():
    for line in ("import random\nrandom.choice(x)", "import random as r\nr.seed(1)", "from random import uniform"):
        assert list(shared_draws(line)), line
    assert not list(
        shared_draws("import random\nfrom random import Random\nrandom.Random(1).choice(random.SystemRandom())")
    )


def test_what_draws_leaves_the_programs_numbers_alone(tmp_path, monkeypatch):
    """Cover a thread that checks a server, an eviction, a check of hits, and a trimmed shard of manifests."""
    shard = tmp_path / "manifests" / "ab"
    shard.mkdir(parents=True)
    for n in range(manifests._FEW + 1):
        (shard / f"{n:062}").write_bytes(b"")
        os.utime(shard / f"{n:062}", (0, 0))
    out_of_order = FleetLeases(parse_tier("redis://127.0.0.1:1"))
    random.seed(1)
    before = random.getstate()
    assert not out_of_order._well_again()
    manifests._trim(str(shard))
    assert len(list(shard.iterdir())) == manifests._FEW + 1 - manifests._LOOKED_AT
    assert SizeLimitedMixin._pick_eviction_target(None, ["a", "b"]) in "ab"
    assert 0 <= HitCheck(None, 0.5)._owed < 1
    assert random.getstate() == before
    taken = [chance.random() for _ in range(3)]
    random.seed(1)
    assert [chance.random() for _ in range(3)] != taken, "it depends on the program's seed"


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_children_draw_other_numbers():
    """Otherwise, a fleet's processes forked from one parent would contact a server at the same moments."""
    drawn = set()
    for _ in range(2):
        reading, writing = os.pipe()
        pid = os.fork()
        if not pid:
            os.write(writing, repr(chance.random()).encode())
            os._exit(0)
        os.close(writing)
        os.waitpid(pid, 0)
        with open(reading) as answer:
            drawn.add(answer.read())
    assert len(drawn | {repr(chance.random())}) == 3

# SPDX-License-Identifier: Apache-2.0
"""``get_recursive_closure_hash``: which differences between two functions count, and which don't."""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib
import logging
import re
import sys
import threading
import types

import pytest

from cuda_progcache.memo.code import argument_digest, closure, get_recursive_closure_hash
from cuda_progcache.memo.digest import Indigestible
from cuda_progcache.memo.references import references_of
from cuda_progcache.memo.syntax import find_path_specs, tree_of


def made(source, name="f", **names):
    """Return a function from source text that isn't in a file."""
    namespace = {"__name__": "made", **names}
    exec(source, namespace)
    return namespace[name]


def module_from(tmp_path, source, name="job_module"):
    """Write a module's file, and return the module loaded from it."""
    path = tmp_path / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


digest = get_recursive_closure_hash


def test_layout_comments_and_name_dont_count_and_the_body_does(tmp_path):
    one = module_from(tmp_path, "def f(x):\n    return x + 1\n", "one")
    two = module_from(tmp_path, "\n\ndef g( x ):\n    # why\n    return (x\n        + 1)\n", "two")
    three = module_from(tmp_path, "def f(x):\n    return x + 2\n", "three")
    assert digest(one.f) == digest(two.g) != digest(three.f)


def test_source_that_was_edited_since_it_was_loaded_isnt_believed(tmp_path):
    import linecache

    module = module_from(tmp_path, "def f(x):\n    return x + 1\n")
    (tmp_path / "job_module.py").write_text("def f(x):\n    return x + 2\n")
    linecache.checkcache()
    assert tree_of(module.f) is None
    again = module_from(tmp_path, "def f(x):\n    return x + 2\n", "other")
    assert digest(module.f) != digest(again.f)


def test_functions_without_source():
    assert digest(made("def f(x): return x + 1")) == digest(made("\n\ndef f(x): return x + 1"))
    assert digest(made("def f(x): return x + 1")) != digest(made("def f(x): return x + 2"))
    assert digest(made("def f(x, y=1): return x")) != digest(made("def f(x, y=2): return x"))
    assert digest(made("def f(x): return {'a', 'b', 'c'}")) == digest(made("def f(x): return {'a', 'b', 'c'}"))


def test_lambdas_on_one_line(tmp_path):
    source = "a, b, c = (lambda x: x + 1), (lambda x: x + 2), (lambda x: (lambda y: y * x))\n"
    module = module_from(tmp_path, source)
    trees = [tree_of(f) for f in (module.a, module.b, module.c, module.c(3))]
    assert len({id(tree) for tree in trees}) == 4
    assert None not in trees
    assert len({digest(f) for f in (module.a, module.b, module.c, module.c(3), module.c(4))}) == 5
    again = module_from(tmp_path, "import sys\n\n" + source, "again")
    assert [digest(f) for f in (module.a, module.b)] == [digest(f) for f in (again.a, again.b)]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (1, 2),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}),
        (re.compile("a"), re.compile("b")),
        (functools.partial(int, base=2), functools.partial(int, base=8)),
        (-1.0, -2.0),
        (range(3), range(4)),
        (logging.getLogger("a"), logging.getLogger("b")),
        (lambda: 1, lambda: 2),
        (functools.lru_cache(lambda: 1), functools.lru_cache(lambda: 2)),
        (types.SimpleNamespace(value=1), types.SimpleNamespace(value=2)),
        ([lambda: 1], [lambda: 2]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_global_counts_by_value(before, after):
    source = "def f(): return value"
    first = digest(made(source, value=before))
    assert first == digest(made(source, value=before))
    assert first != digest(made(source, value=after))


def test_only_named_globals_and_attributes_count():
    module = types.ModuleType("a_module_of_ours")
    module.used, module.unused, module.__spec__ = 1, 1, None
    f = made("def f(): return module.used", module=module, other=1)
    first = digest(f)
    module.unused, f.__globals__["other"] = 2, 2
    assert digest(f) == first
    module.used = 2
    assert digest(f) != first


def test_classes_count_by_what_they_do():
    def build(body):
        return made(f"class C:\n    limit = 3\n    def m(self): return {body}\ndef f(): return C().m()")

    assert digest(build("1")) == digest(build("1")) != digest(build("2"))
    f = build("1")
    first = digest(f)
    f.__globals__["C"].limit = 4
    assert digest(f) != first


@dataclasses.dataclass
class Point:
    x: int = 0

    def far(self):
        return self.x > 10


class Colour(enum.Enum):
    RED = 1


class Own:
    def __init__(self, value):
        self.value = value


def test_instances_count_by_class_and_content():
    for one, same, other in (
        (Point(1), Point(1), Point(2)),
        (Own([1]), Own([1]), Own([2])),
        (Own(Own(1)), Own(Own(1)), Own(Own(2))),
        (Own(1).__init__, Own(1).__init__, Own(2).__init__),
    ):
        assert argument_digest(one) == argument_digest(same) != argument_digest(other)
    assert argument_digest(Colour.RED) == argument_digest(Colour.RED) != argument_digest(1)
    shared = [1]
    assert argument_digest([shared, shared]) == argument_digest([[1], [1]])


def test_cycles_end():
    names = types.SimpleNamespace()
    names.f = lambda x: names.g(x - 1)
    names.g = lambda x: names.f(x - 1)
    first = digest(names.f)
    names.g = lambda x: names.f(x + 1)
    assert digest(names.f) != first
    ring = [1]
    ring.append(ring)
    other = [2]
    other.append(other)
    assert digest(made("def f(): return ring", ring=ring)) != digest(made("def f(): return ring", ring=other))
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(Indigestible, match="nested too deep"):
        argument_digest(deep)
    while deep:
        deep = deep.pop()  # otherwise Python's deallocation would recurse


def test_what_has_no_content():
    for value in (threading.Lock(), iter([1])):
        assert closure(made("def f(): return value", value=value)).digest
        with pytest.raises(Indigestible):
            argument_digest(value)


def test_packages_by_version_and_the_standard_library_not_at_all():
    np = pytest.importorskip("numpy")
    f = made("def f(x):\n    import statistics\n    return np.linalg.norm(statistics.mean(x))", np=np)
    assert closure(f).packages == {"numpy": np.__version__}
    assert closure(made("def f(x):\n    import click.core\n    return 1")).packages.keys() == {"click"}


def test_a_local_module_counts_with_those_it_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "local_a_module.py").write_text("import local_b_module\nA = 1\n")
    (tmp_path / "local_b_module.py").write_text("B = 1\n")
    f = made("def f():\n    from local_a_module import A\n    return A")
    first = digest(f)
    assert digest(f) == first
    assert "local_a_module" not in sys.modules
    (tmp_path / "local_b_module.py").write_text("B = 1  # a comment\n")
    assert digest(f) == first
    (tmp_path / "local_b_module.py").write_text("B = 22\n")
    assert digest(f) != first


def test_what_code_says_once_and_for_all_is_remembered():
    def f(x):
        return x

    assert references_of(f) is references_of(f)


def test_paths_in_source(tmp_path):
    source = """
import os, glob
def reads(param, frame):
    os.listdir("folder"); os.walk(param); open("a.txt"); open("b.txt", "rb"); open(NAME, mode="r")
    frame.read_csv("c.csv"); glob.glob(PATTERN)
def writes(frame, handle):
    open("out.txt", "w"); open("log.txt", mode="a"); frame.to_csv("d.csv"); handle.read(); print("e.txt")
"""
    module = module_from(tmp_path, source)
    assert find_path_specs(module.reads) == {
        "literals": ["a.txt", "b.txt", "c.csv", "folder"], "symbols": ["NAME", "PATTERN", "param"],
    }  # fmt: skip
    assert find_path_specs(module.writes) == {"literals": [], "symbols": []}
    assert find_path_specs(len) == {"literals": [], "symbols": []}


def test_paths_in_code_without_source():
    space = {}
    exec("import os\ndef f(p):\n    return ','.join(os.listdir('data')), os.path.join('/tmp', p), print('x')\n", space)
    assert find_path_specs(space["f"]) == {"literals": ["data"], "symbols": []}

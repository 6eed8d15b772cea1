# SPDX-License-Identifier: Apache-2.0
"""``@memoize`` and the objects that code refers to: a change is never a hit; without a change, there is no miss."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

from cuda_progcache.memo.digest import digest
from cuda_progcache.memo.memoize import memoize

MODULE = """
import numpy as np
from dataclasses import dataclass

SCALE = 2
TABLE = {"a": 1, "b": [2]}
WEIGHTS = np.arange(3)
RUNS = []
COUNT = 0

@dataclass
class Options:
    step: int = 1

OPTIONS = Options()

class Shape:
    FACTOR = 3
    def area(self, x):
        return x * self.FACTOR

def deep(x):
    return x + 100

def helper(x):
    return deep(x)

def body(x):
    global COUNT
    COUNT += 1
    RUNS.append(x)
    return helper(x) * SCALE + TABLE["a"] + int(WEIGHTS.sum()) + OPTIONS.step + Shape().area(x)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module from MODULE, freshly imported for each test."""
    (tmp_path / "home.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("home", None)
    import home

    yield home
    sys.modules.pop("home", None)


CHANGES = {
    "a constant": lambda home: setattr(home, "SCALE", 5),
    "an item of a table": lambda home: home.TABLE.update(a=50),
    "something deep in a table": lambda home: home.TABLE["b"].append(1),
    "an array in place": lambda home: home.WEIGHTS.__setitem__(0, 9),
    "a field of a record": lambda home: setattr(home.OPTIONS, "step", 7),
    "an attribute of a class": lambda home: setattr(home.Shape, "FACTOR", 4),
    "a method": lambda home: setattr(home.Shape, "area", lambda self, x: x),
    "a helper": lambda home: setattr(home, "helper", lambda x: x),
    "a helper's helper": lambda home: setattr(home, "deep", lambda x: x),
    "the code of a helper, as a reloader does": lambda home: setattr(home.deep, "__code__", (lambda x: x - 1).__code__),
    "a built-in function, shadowed": lambda home: setattr(home, "int", lambda x: 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_body_refers_to_changes_in_this_process(module, cache, change):
    f = memoize(cache, module.body, state=("COUNT", "RUNS"))
    before = [f(1), f(1)]
    assert f.counters == {"misses": 1, "hits": 1}
    CHANGES[change](module)
    assert f(1) == module.body(1)
    assert f.counters["misses"] == 2, before


def test_what_is_set_back_hits_again(module, cache):
    f = memoize(cache, module.body, state=("COUNT", "RUNS"))
    f(1)
    module.SCALE, module.TABLE["a"] = 5, 6
    f(1)
    module.SCALE, module.TABLE["a"] = 2, 1
    f(1)
    assert f.counters == {"misses": 2, "hits": 1}


def test_what_the_code_changes_itself_is_declared_as_its_state_or_the_result_is_not_kept(cache):
    runs, table, count = [], {}, 0

    def note(x):
        runs.append(x)

    def body(x):
        nonlocal count
        count += 1
        table[x] = table.get(x, 0) + 1
        note(x)
        return x * 2

    f = memoize(cache, body, state=("runs", "table", "count"))
    assert [f(1), f(2), f(1), f(2)] == [2, 4, 2, 4]
    assert (runs, table, count) == ([1, 2], {1: 1, 2: 1}, 2)
    g = memoize(cache, body, state=("runs", "count"))
    with pytest.warns(RuntimeWarning, match=r"run changed table, which counts; .*state=\('table',\)"):
        assert [g(1), g(1)] == [2, 2]
    assert g.counters == {"misses": 2, "changed": 2} and count == 4


@pytest.mark.parametrize("through", ["itself", "a helper"])
def test_a_global_that_the_code_binds_anew_is_told_by_its_name(module, cache, through):
    body = module.body if through == "itself" else lambda x: module.body(x) + 0
    g = memoize(cache, body, state=("RUNS", "module.RUNS"))
    with pytest.warns(RuntimeWarning, match=r"run changed \S*COUNT, which counts"):
        assert g(1) == g(1) == module.body(1)
    assert g.counters == {"misses": 2, "changed": 2}


def test_an_attribute_of_a_function_that_the_run_changes_is_told(cache):
    def helper(x):
        helper.calls += 1
        return x

    helper.calls = 0
    f = memoize(cache, lambda x: helper(x) + 1)
    with pytest.warns(RuntimeWarning, match="run changed helper, which counts"):
        assert f(1) == f(1) == 2
    assert f.counters == {"misses": 2, "changed": 2}


def test_locks_events_and_mocks_do_not_make_misses(cache, at_once):
    from unittest.mock import Mock

    entered, lock, work = threading.Event(), threading.Lock(), Mock(return_value=7)

    def body(x):
        entered.set()
        with lock:
            return work(x)

    work(0)  # the mock records the call in an object that claims to have any attribute
    f = memoize(cache, body, state="work")
    assert at_once(4, lambda _: f(1)) == [7] * 4
    assert f(1) == 7 and work.call_count == 2


def test_a_cache_that_code_refers_to_is_no_input(cache):
    def body(x):
        return x + cache.query().count() * 0

    f = memoize(cache, body)
    key = f.digest(1)
    assert [f(1), f(2), f(1)] == [1, 2, 1]
    assert memoize(cache, body).digest(1) == key


def test_a_service_that_code_refers_to_counts_by_its_class(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from cuda_progcache import CompileService\n"
        "from cuda_progcache.memo.code import closure\n"
        "import logging, re, threading\n"
        "service, logger, pattern = CompileService(), logging.getLogger('x'), re.compile('a')\n"
        "def f(x): return service, logger, pattern\n"
        "before = closure(f).digest\n"
        "service.compile('__global__ void k() {}', options={'arch': 'sm_90'})\n"
        "print(closure(f).digest == before, before)\n"
        "pattern = re.compile('b')\n"
        "print(closure(f).digest == before)\n"
    )
    said = {
        subprocess.run(
            [sys.executable, str(script)], check=True, capture_output=True, text=True, timeout=600,
            env={**os.environ, "PYTHONHASHSEED": seed, "CUDA_PROGCACHE_DIR": str(tmp_path / "cache")},
        ).stdout
        for seed in "12"
    }  # fmt: skip
    assert len(said) == 1 and said.pop().split()[0::2] == ["True", "False"]


def test_data_that_another_thread_changes_never_fails_a_call(memory_cache):
    table = {0: 0}
    stop = threading.Event()

    def change():
        number = 0
        while not stop.is_set():
            number += 1
            table[number % 1000] = number
            table.pop((number + 500) % 1000, None)

    f = memoize(memory_cache, lambda x: x + len(table) * 0)
    thread = threading.Thread(target=change)
    thread.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a call may run uncached, with a warning
            assert [f(1) for _ in range(200)] == [1] * 200
    finally:
        stop.set()
        thread.join(300)


def test_calls_within_calls_count_by_their_code(cache):
    def make(body):
        inner = memoize(cache, body, code=False)
        return memoize(cache, lambda x: inner(x) + 0)

    one, two = make(lambda x: x + 1), make(lambda x: x + 2)
    assert one.digest(1) != two.digest(1)
    assert digest(memoize(cache, lambda x: x + 1)) != digest(memoize(cache, lambda x: x + 2))


def test_functions_as_arguments_count_by_what_they_refer_to(cache):
    step = 1

    def callback(x):
        return x + step

    def recursive(n):
        return n and recursive(n - 1)

    f = memoize(cache, lambda function, x: function(x))
    assert f(callback, 1) == 2
    step = 10
    assert f(callback, 1) == 11
    assert f(recursive, 3) == f(recursive, 3) == 0
    assert not f.counters["uncached"] and f.counters["hits"] == 1


def test_methods_with_super_and_their_class(cache):
    made = []
    for step in (1, 2):

        class Base:
            STEP = step

            def go(self, x):
                return x + self.STEP

        class Derived(Base):
            @memoize(cache)
            def go(self, x):
                return super().go(x)

            def __digest__(self):
                return digest("derived")

        made.append(Derived().go(1))
    assert made == [2, 3]


def test_a_generator_function_gives_every_caller_its_own(cache, at_once):
    barrier = threading.Barrier(4)

    def numbers(n):
        yield from range(n)

    def ask(_):
        barrier.wait(300)
        return list(f(3))

    f = memoize(cache, numbers)
    with pytest.warns(RuntimeWarning, match="returned but not kept"):
        assert at_once(4, ask) == [[0, 1, 2]] * 4


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[2])
from cuda_progcache.memo.memoize import memoize
import home
f = memoize(sys.argv[1], home.body, state=("COUNT", "RUNS"))
print(f(1) == home.body(1), dict(f.counters), f._now().code)
"""

# Runs SCRIPT for each of several texts of the module, each in a forked process.
FORKS = """
import json, os, pathlib, sys
import numpy
import cuda_progcache.memo.memoize
for text in json.load(sys.stdin):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    pathlib.Path(sys.argv[2], "home.py").write_text(text)
    exec(sys.argv[3])
    sys.stdout.flush()
    os._exit(0)
"""


def run(tmp_path, seed, folder, texts=None):
    folder.mkdir(exist_ok=True)
    script = tmp_path / ("script.py" if texts is None else "forks.py")
    script.write_text(SCRIPT if texts is None else FORKS)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "cache"), str(tmp_path), SCRIPT], cwd=folder, check=True,
        input=json.dumps(texts),
        # Python's bytecode cache misses an edit within the same second that keeps the file's size.
        env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.stdout


EDITS = [
    ("SCALE = 2", "SCALE = 3"),
    ("return x + 100", "return x + 200"),
    ("FACTOR = 3", "FACTOR = 4"),
    ('"a": 1', '"a": 2'),
    ("np.arange(3)", "np.arange(4)"),
]


def test_an_edit_of_the_module_is_seen_by_the_next_process(tmp_path):
    (tmp_path / "home.py").write_text(MODULE)
    first = run(tmp_path, "1", tmp_path)
    assert first.startswith("True {'misses': 1}")
    (tmp_path / "home.py").write_text("# moved down by a line\n" + MODULE.replace("RUNS = []", "RUNS = []  # told"))
    assert run(tmp_path, "2", tmp_path / "elsewhere") == first.replace("misses", "hits")
    assert all(MODULE.count(old) == 1 for old, _ in EDITS)
    texts = [MODULE, *(MODULE.replace(old, new) for old, new in EDITS)]
    same, *edited = run(tmp_path, "3", tmp_path, texts).splitlines(keepends=True)
    assert same == first.replace("misses", "hits")
    assert len(edited) == len(EDITS) and all(line.startswith("True {'misses': 1}") for line in edited)


def test_structured_arrays_by_their_fields_not_their_padding():
    layout = np.dtype([("a", "u1"), ("b", "<i4")], align=True)
    one, two = np.zeros(4, layout), np.zeros(4, layout)
    for array in (one, two):
        array["a"], array["b"] = 1, 2
    two.view(np.uint8).reshape(4, 8)[:, 1:4] = 0xAB
    assert one.tobytes() != two.tobytes()
    assert digest(one) == digest(two)
    two["b"][3] = 5
    assert digest(one) != digest(two)
    assert digest(one) != digest(one.astype([("a", "u1"), ("b", "<i4")]))

# SPDX-License-Identifier: Apache-2.0
"""Digests: they depend only on values, are the same everywhere, and differ if results could differ."""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import functools
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cuda_progcache.memo.code import argument_digest
from cuda_progcache.memo.digest import Digest, Indigestible, digest, register


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class OtherColour(enum.Enum):
    RED = 1


@dataclasses.dataclass
class Point:
    x: int
    y: int


Named = collections.namedtuple("Named", "x y")  # noqa: PYI024 - what users have

DISTINCT = [
    None, True, False, 0, 1, -1, 2, 1.0, -1.0, -2.0, 0.0, -0.0, math.inf, -math.inf, 314159, math.nan, 1 + 0j, "", "1",
    b"", b"1", bytearray(b"1"), (), [], {}, set(), frozenset(), (1, 2), [1, 2], {1, 2}, frozenset({1, 2}), {1: 2},
    [[1], 2], [1, [2]], [[1, 2]], ["a", "b"], ["ab"], range(2), slice(2), ..., Colour.RED, Colour.BLUE,
    OtherColour.RED, pathlib.Path("a"), pathlib.Path("b"), Point(1, 2), Point(2, 1), Named(1, 2), {"x": 1, "y": 2},
    decimal.Decimal("1.0"), decimal.Decimal("1.00"), dt.date(2024, 1, 1), dt.datetime(2024, 1, 1),  # noqa: DTZ001
    dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.time(1), dt.timedelta(1), int, float, len,
    np.float32(1), np.float64(1), np.int64(1), np.arange(2), np.arange(2.0), np.arange(2).reshape(1, 2), np.dtype("f4"),
    np.array([1, "a"], dtype=object), np.array([2, "a"], dtype=object), np.float32, collections.deque([1, 2]),
    functools.partial(max, 1), functools.partial(max, 2), 2**64, 2**70, "é", "\udc80",
]  # fmt: skip


def test_values_that_differ_have_digests_that_differ():
    digests = [digest(value) for value in DISTINCT]
    same = [(DISTINCT[i], DISTINCT[j]) for i in range(len(digests)) for j in range(i) if digests[i] == digests[j]]
    assert not same


def test_a_digest_is_64_hex_digits_and_its_own():
    found = digest("x")
    assert isinstance(found, Digest) and len(found) == 64 and not found.strip("0123456789abcdef")
    assert digest(found) == found


def test_order_counts_only_where_it_means_something():
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({3, 1, 2}) == digest({2, 3, 1})
    assert digest([1, 2]) != digest([2, 1])


def test_elements_may_be_replaced_by_their_digests():
    assert digest([1, digest([2, 3])]) == digest([1, [2, 3]])
    assert digest({"a": digest(1)}) == digest({"a": 1})
    assert digest(Point(digest(1), 2)) == digest(Point(1, 2))
    assert digest((digest({1, 2}),)) == digest(({1, 2},))


@settings(deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(st.none() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_equal_values_have_equal_digests(value):
    assert digest(value) == digest(eval(repr(value), {"inf": math.inf}))


def test_the_same_under_every_hash_seed_in_every_directory(tmp_path):
    program = (
        "import enum, pathlib\n"
        "from cuda_progcache.memo.digest import digest\n"
        "from cuda_progcache.memo.signature import code_digest\n"
        "def f(x): return [y for y in x if y in {'a', 'b', 'c'}]\n"
        "g = lambda x: (lambda y: y + x)\n"
        "print(digest({'a', 'b', 'c', 1, (2, 'x')}), digest({'k': {'x', 'y'}}), digest(pathlib.Path('p')),\n"
        "      code_digest(f), digest(g(1)), digest(frozenset({'a', 'b'})))\n"
    )
    printed = set()
    for seed in ("0", "424242"):
        folder = tmp_path / seed
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=folder, check=True,
            capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        printed.add(done.stdout)
    assert len(printed) == 1


def test_generators_and_files_are_refused_and_not_consumed(tmp_path):
    generator = (i for i in range(3))
    for value in (generator, iter([1]), map(str, [1]), [generator]):
        with pytest.raises(Indigestible):
            digest(value)
    assert list(generator) == [0, 1, 2]
    path = tmp_path / "f"
    path.write_text("line\n")
    with path.open() as file:
        with pytest.raises(Indigestible):
            digest(file)
        assert file.read() == "line\n"


def test_classes_of_one_name_in_two_modules_differ():
    made = {}
    for home in ("one", "two"):
        made[home] = dataclasses.make_dataclass("Same", [("x", int)])
        made[home].__module__ = home
    assert digest(made["one"](1)) != digest(made["two"](1))


def test_what_has_no_content_is_refused_by_name():
    class Thing:
        pass

    with pytest.raises(Indigestible, match=r"Thing.*__digest__"):
        digest(Thing())
    with pytest.raises(Indigestible):
        digest([1, {"a": Thing()}])


def test_code_has_one_digest_whoever_asks():
    class Thing:
        def method(self):
            return 1

    other = type("Thing", (), {"method": lambda self: 2, "__qualname__": Thing.__qualname__})
    held = {"f": Thing.method, "all": [functools.partial(Thing.method, 1), property(Thing.method), Thing]}
    for value in (Thing, Thing.method, len, math, [].append, held["all"][0], held["all"][1], Thing.method.__code__):
        assert digest(value) == argument_digest(value)
    assert digest(held) == digest({"all": list(held["all"]), "f": Thing.method})
    assert digest(Thing) != digest(other)


def test_a_value_that_contains_itself_is_refused():
    loop = []
    loop.append(loop)
    with pytest.raises(Indigestible, match="contains itself"):
        digest(loop)


def test_functions_by_code_defaults_and_closure():
    def make(n):
        return lambda x: x + n

    def f(x):
        return x + 1

    def g(x):
        return x + 1

    assert digest(f) == digest(g)
    assert digest(make(1)) == digest(make(1))
    assert digest(make(1)) != digest(make(2))
    assert digest(lambda x, y=1: x) != digest(lambda x, y=2: x)
    assert digest(lambda x: [i for i in x]) == digest(lambda x: [i for i in x])  # noqa: C416 - code within code


def test_subclasses_of_builtin_types_keep_class_and_attributes():
    class Words(list):
        pass

    plain, marked = Words("ab"), Words("ab")
    marked.note = "x"
    assert len({digest(plain), digest(marked), digest(["a", "b"])}) == 3


def test_classes_can_be_taught():
    class Matrix:
        def __init__(self, rows):
            self.rows = rows

        def __digest__(self):
            return digest(("Matrix", self.rows))

    class Foreign:
        value = 3

    assert digest([Matrix([1])]) == digest([Matrix([1])]) != digest([Matrix([2])])
    with pytest.raises(Indigestible):
        digest(Foreign())
    register(Foreign, lambda foreign: digest(("Foreign", foreign.value)))
    assert digest(Foreign()) == digest(("Foreign", 3))


def test_arrays_by_content_not_by_memory():
    base = np.arange(12).reshape(3, 4)
    assert digest(base.T) == digest(np.ascontiguousarray(base.T))
    assert digest(base[:, ::2]) == digest(base[:, ::2].copy())
    record = np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
    assert digest(record) != digest(record.astype([("a", "i4"), ("c", "f8")]))


def test_modules_of_values_and_of_functions():
    one, two = types.ModuleType("m"), types.ModuleType("m")
    one.__all__ = two.__all__ = ["x"]
    one.x, two.x = 1, 2
    assert digest(one) != digest(two)


def test_frames_by_everything_in_them():
    pd = pytest.importorskip("pandas")
    base = pd.DataFrame({"a": [1, 2], "b": ["x", None]})
    others = [
        base.astype({"a": float}), base.rename(columns={"a": "c"}), base[["b", "a"]], base.set_index(pd.Index([5, 6])),
        base.assign(a=[1, 3]), base.assign(b=["x", "y"]),
    ]  # fmt: skip
    assert len({digest(frame) for frame in [base, *others]}) == 7
    assert digest(base) == digest(base.copy())
    assert digest(base["a"]) != digest(base["a"].rename("z"))


def test_methods_of_classes_by_what_the_class_does():
    def make(step):
        class Home:
            STEP = step

            @classmethod
            def make(cls):
                return cls.STEP

        return Home.make

    assert digest(make(1)) == digest(make(1)) != digest(make(2))


class Tagged(np.ndarray):
    pass


def test_what_collections_have_besides_their_elements():
    od, dd, dq = collections.OrderedDict, collections.defaultdict, collections.deque
    values = [
        od([("a", 1), ("b", 2)]), od([("b", 2), ("a", 1)]), {"a": 1, "b": 2}, dd(int, a=1, b=2), dd(list, a=1, b=2),
        dq([1]), dq([1], 5), array.array("i", [1]), array.array("I", [1]), re.compile("a"), re.compile("a", re.DOTALL),
        re.compile(b"a"), pathlib.PurePosixPath("a"), pathlib.PureWindowsPath("a"), pathlib.Path("a"),
    ]  # fmt: skip
    assert len({digest(value) for value in values}) == len(values)
    assert digest(dd(int, a=1, b=2)) == digest(dd(int, b=2, a=1))
    assert digest(dd(Point)) != digest(dd(int))


def test_arrays_of_derived_classes():
    plain = np.array([[1, 2]])
    masked = np.ma.array([[1, 2]], mask=[[True, False]])
    filled = np.ma.array([[masked.fill_value, 2]], mask=[[False, False]])
    values = [
        plain,
        plain.view(np.matrix),
        plain.view(Tagged),
        masked,
        filled,
        np.ma.array([[1, 2]], mask=[[False, True]]),
    ]
    assert len({digest(value) for value in values}) == len(values)
    assert digest(masked) == digest(np.ma.array([[1, 2]], mask=[[True, False]]))


def test_categories_and_attributes_of_frames():
    pd = pytest.importorskip("pandas")
    kinds = [["a"], ["a", "b"], ["b", "a"]]
    columns = [pd.Series(pd.Categorical(["a"], kind)) for kind in kinds]
    columns.append(pd.Series(pd.Categorical(["a"], ["a", "b"], ordered=True)))
    columns.append(columns[0].astype(object))
    noted = columns[0].copy()
    noted.attrs["unit"] = "m"
    columns.append(noted)
    assert len({digest(column) for column in columns}) == len(columns)
    assert len({digest(column.to_frame()) for column in columns}) == len(columns)

    class Frame(pd.DataFrame):
        _metadata = ["place"]  # noqa: RUF012 - as pandas wants it

    here, there = Frame({"a": [1]}), Frame({"a": [1]})
    here.place, there.place = "here", "there"
    assert len({digest(frame) for frame in (here, there, pd.DataFrame({"a": [1]}))}) == 3

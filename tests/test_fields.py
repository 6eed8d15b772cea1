# SPDX-License-Identifier: Apache-2.0
"""Classes made by ``_util.fields`` equal those that ``dataclasses`` and ``typing`` make from the same declarations."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import typing

import pytest

from cuda_progcache._util import fields

MAKERS = {
    "ours": (fields.dataclass, fields.field, fields.NamedTuple),
    "theirs": (dataclasses.dataclass, dataclasses.field, typing.NamedTuple),
}


def declare(maker):
    dataclass, field, NamedTuple = MAKERS[maker]  # noqa: N806

    @dataclass
    class Plain:
        """Documented."""

        first: int
        second: str = "two"
        items: list = field(default_factory=list)
        hidden: int = field(default=3, repr=False, compare=False)

        def __post_init__(self):
            if self.first < 0:
                raise ValueError("negative")

        def twice(self):
            return 2 * self.first

    @dataclass(frozen=True)
    class Frozen:
        a: int
        b: tuple = ()

    @dataclass(frozen=True)
    class Own:
        a: int

        def __init__(self, a, more):
            self.__dict__["a"] = a + more

        def __repr__(self):
            return "own"

    @dataclass
    class WithEq:  # noqa: PLW1641  (and so no hash)
        a: int

        def __eq__(self, other):
            return True

    class Pair(NamedTuple):
        """Documented."""

        left: int
        right: str = "r"

        @property
        def both(self):
            return f"{self.left}{self.right}"

        @classmethod
        def of(cls, left):
            return cls(left)

    return Plain, Frozen, Own, WithEq, Pair


@pytest.fixture(params=MAKERS)
def made(request):
    return declare(request.param)


def test_plain(made):
    Plain = made[0]  # noqa: N806
    one, other = Plain(1), Plain(1, "two", hidden=9)
    assert one == other
    assert one != Plain(2)
    assert one != (1, "two", [])
    assert one.items == [] and one.items is not other.items
    assert repr(one) == repr(other) == f"{Plain.__qualname__}(first=1, second='two', items=[])"
    assert vars(Plain(second="b", hidden=0, items=[1], first=4)) == vars(Plain(4, "b", [1], 0))
    assert list(vars(Plain(second="b", first=4))) == ["first", "second", "items", "hidden"]
    assert (Plain.second, Plain.hidden, Plain.__doc__, one.twice()) == ("two", 3, "Documented.", 2)
    assert not hasattr(Plain, "items")
    one.first = 5
    assert one == Plain(5)
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)
    with pytest.raises(ValueError, match="negative"):
        Plain(-1)


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((), {"second": "b"}), ((1,), {"first": 1}), ((1,), {"third": 1}), ((1, "a", [], 3, 4), {})],
)
def test_wrong_arguments(made, values, named):
    with pytest.raises(TypeError):
        made[0](*values, **named)


def test_frozen(made):
    Frozen = made[1]  # noqa: N806
    one = Frozen(1, (2,))
    assert (one == Frozen(b=(2,), a=1), hash(one) == hash(Frozen(1, (2,)))) == (True, True)
    for change in (lambda: setattr(one, "a", 2), lambda: setattr(one, "new", 2), lambda: delattr(one, "a")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    with pytest.raises(TypeError):
        hash(Frozen(1, []))
    assert copy.copy(one) == copy.deepcopy(one) == one
    match one:
        case Frozen(a, b):
            assert (a, b) == (1, (2,))


def test_methods_of_the_class_stay(made):
    Own, WithEq = made[2:4]  # noqa: N806
    assert (repr(Own(1, 2)), Own(1, 2).a) == ("own", 3)
    assert WithEq(1) == WithEq(2)


def test_the_functions_of_dataclasses(made):
    Plain, Frozen = made[:2]  # noqa: N806
    one = Plain(1, items=[1])
    assert dataclasses.is_dataclass(Plain) and dataclasses.is_dataclass(one)
    described = [(f.name, f.default, f.default_factory, f.repr, f.compare) for f in dataclasses.fields(one)]
    missing = dataclasses.MISSING
    assert described == [
        ("first", missing, missing, True, True),
        ("second", "two", missing, True, True),
        ("items", missing, list, True, True),
        ("hidden", 3, missing, False, False),
    ]
    assert dataclasses.asdict(one) == {"first": 1, "second": "two", "items": [1], "hidden": 3}
    assert dataclasses.replace(one, second="b") == fields.replace(one, second="b") == Plain(1, "b", [1])
    assert dataclasses.replace(Frozen(1), a=2) == fields.replace(Frozen(1), a=2) == Frozen(2)
    with pytest.raises(TypeError):
        fields.replace(one, third=3)
    with pytest.raises(ValueError, match="negative"):
        fields.replace(one, first=-1)


def test_a_dataclass_may_derive_from_one(made):
    Derived = dataclasses.make_dataclass("Derived", [("extra", int, 7)], bases=(made[0],))  # noqa: N806
    assert [f.name for f in dataclasses.fields(Derived)] == ["first", "second", "items", "hidden", "extra"]
    assert fields.replace(Derived(1, extra=8), second="b") == Derived(1, "b", extra=8)


def test_named_tuples(made):
    Pair = made[4]  # noqa: N806
    pair = Pair(1)
    assert pair == (1, "r") == Pair(right="r", left=1) == Pair.of(1)
    assert isinstance(pair, tuple)
    assert (pair.both, pair[1], Pair.__doc__, Pair._fields) == ("1r", "r", "Documented.", ("left", "right"))
    assert (pair._asdict(), pair._replace(left=2), Pair._field_defaults) == (
        {"left": 1, "right": "r"},
        (2, "r"),
        {"right": "r"},
    )
    assert repr(pair) == "Pair(left=1, right='r')"
    assert Pair.__module__ == __name__
    assert not hasattr(pair, "__dict__")
    assert typing.get_type_hints(Pair) == {"left": int, "right": str}
    with pytest.raises(TypeError):
        Pair()
    with pytest.raises(AttributeError):
        pair.left = 2


@fields.dataclass(frozen=True)
class Shipped:
    a: int
    b: list = fields.field(default_factory=list)


class ShippedPair(fields.NamedTuple):
    a: int
    b: int = 2


@pytest.mark.parametrize("value", [Shipped(1, [2]), ShippedPair(1)])
def test_pickle_and_copy(value):
    assert pickle.loads(pickle.dumps(value)) == copy.deepcopy(value) == copy.copy(value) == value
    assert type(pickle.loads(pickle.dumps(value))) is type(value)


@pytest.mark.parametrize("name", ["HeaderPolicy", "ProgramOptions", "LinkerOptions", "CompiledProgram", "Diagnostic"])
def test_public_classes_are_dataclasses(name):
    import cuda_progcache

    cls = getattr(cuda_progcache, name)
    assert dataclasses.is_dataclass(cls)
    assert [f.name for f in dataclasses.fields(cls)] == list(inspect.get_annotations(cls))

# SPDX-License-Identifier: Apache-2.0
"""Pairs of values that a function can tell apart, and whether their digests do, too.

Each maker gives a value from numbers that it draws; two drawings that differ in one number are a pair. What tells two
values apart, whatever ``==`` says, is their exact form: class, type of data, unit, zone, frequency, names, attributes,
and for containers that of the elements. Sets, and dicts in another order, are equal.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import random
import types
import zoneinfo
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from cuda_progcache.memo.code import argument_digest
from cuda_progcache.memo.digest import Indigestible, digest


class Colour(enum.Enum):
    """An enumeration."""

    RED = 1
    BLUE = 2


class Size(enum.IntEnum):
    """Another one, whose members are numbers."""

    RED = 1
    BLUE = 2


class Bits(enum.Flag):
    """Flags, which combine."""

    A = 1
    B = 2


@dataclasses.dataclass
class Record:
    """A record."""

    a: Any = 0
    b: Any = 0


@dataclasses.dataclass
class RecordDict(dict):  # type: ignore[type-arg]
    """A record that is a dict, too."""

    a: Any = 0


@dataclasses.dataclass
class RecordList(list):  # type: ignore[type-arg]
    """A record that is a list, too."""

    a: Any = 0


class Text(str):  # noqa: SLOT000 - its instances take attributes
    """A text that takes attributes."""


class Plain:
    """An object of one's own class."""

    def __init__(self, a: Any) -> None:
        self.a = a


def _with(value: Any, **attributes: Any) -> Any:
    for name, given in attributes.items():
        setattr(value, name, given)
    return value


def _named_tuple(names: str, *values: Any) -> Any:
    made: Any = collections.namedtuple("N", names)  # type: ignore[misc]  # noqa: PYI024
    return made(*values)


def _frame(rng: random.Random) -> pd.DataFrame:
    rows = rng.choice((2, 3))
    frame = pd.DataFrame({"a": list(range(rows)), rng.choice("bc"): [rng.choice((0, 0.5))] * rows})
    frame.index.name = rng.choice((None, "i"))
    frame.attrs = {"n": rng.choice((1, 2))}
    return frame.set_flags(allows_duplicate_labels=rng.random() < 0.5)


def _record_dict(rng: random.Random) -> RecordDict:
    made = RecordDict(rng.choice((1, 2)))
    made["k"] = rng.choice((1, 2))
    return made


def _record_list(rng: random.Random) -> RecordList:
    made = RecordList(rng.choice((1, 2)))
    made.append(rng.choice((1, 2)))
    return made


def _objects(rng: random.Random) -> Any:
    found = np.empty(2, dtype=object)
    found[:] = [rng.choice((1, 1.0, "1")), [rng.choice((1, 2))]]
    return found


ZONES = (dt.UTC, dt.timezone(dt.timedelta(hours=1), "A"), dt.timezone(dt.timedelta(hours=1), "B"),
         zoneinfo.ZoneInfo("Europe/Berlin"), zoneinfo.ZoneInfo("Europe/Paris"), None)  # fmt: skip

MAKERS: dict[str, Callable[[random.Random], Any]] = {
    "numbers": lambda r: r.choice((0, 1, True, 1.0, -1.0, -2.0, -0.0, 0.0, 1j, 10**30, float("inf"), 314159, 0.1)),
    "texts": lambda r: r.choice(("1", b"1", bytearray(b"1"), "a\ud800", "a", "")),
    "containers": lambda r: r.choice(([1], (1,), {1}, frozenset({1}), {1: 1}, [[1]], [1, 1], [], (), {}, None)),
    "ranges": lambda r: r.choice((range(3), range(0, 3, 2), slice(3), slice(0, 3), slice(None, 3, 1))),
    "dicts": lambda r: {r.choice(("a", 1, "b")): r.choice((1, 1.0))},
    "deques": lambda r: collections.deque([1, 2][: r.choice((1, 2))], maxlen=r.choice((None, 2, 3))),
    "ChainMap": lambda r: collections.ChainMap(*({"a": r.choice((1, 2))} for _ in range(r.choice((1, 2, 3))))),
    "OrderedDict": lambda r: collections.OrderedDict(r.choice(([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))),
    "defaultdict": lambda r: collections.defaultdict(r.choice((int, list, None)), {"a": r.choice((1, 2))}),
    "UserString": lambda r: collections.UserString(r.choice(("a", "b"))),
    "named tuples": lambda r: _named_tuple(r.choice(("a b", "b a", "a c")), 1, r.choice((2, 3))),
    "proxies": lambda r: types.MappingProxyType({"a": r.choice((1, 2))}),
    "namespaces": lambda r: types.SimpleNamespace(a=r.choice((1, 2)), b=r.choice((1, 2))),
    "dates": lambda r: dt.date(2020, 1, r.choice((1, 2))),
    "times": lambda r: dt.time(1, r.choice((1, 2)), tzinfo=r.choice(ZONES), fold=r.choice((0, 1))),
    "datetimes": lambda r: dt.datetime(
        2020, 10, 25, 2, 30, 0, r.choice((0, 1)), r.choice(ZONES), fold=r.choice((0, 1))
    ),
    "timedeltas": lambda r: dt.timedelta(r.choice((0, 1)), r.choice((0, 1)), r.choice((0, 1))),
    "timezones": lambda r: r.choice(ZONES),
    "decimals": lambda r: decimal.Decimal(r.choice(("1", "1.0", "1.00", "-0", "0", "NaN"))),
    "fractions": lambda r: fractions.Fraction(r.choice((1, 2)), r.choice((3, 5))),
    "enums": lambda r: r.choice((*Colour, *Size, *Bits, Bits.A | Bits.B)),
    "dataclasses": lambda r: Record(r.choice((1, [1], "1")), r.choice((1, 2))),
    "dataclasses with more": lambda r: _with(Record(), c=r.choice((1, 2))),
    "dataclass dicts": _record_dict,
    "dataclass lists": _record_list,
    "texts with attributes": lambda r: _with(Text("a"), k=r.choice((1, 2))),
    "objects": lambda r: Plain(r.choice((1, [1], Plain(1), Plain(2)))),
    "arrays": lambda r: np.array(
        r.choice(([1, 2], [[1, 2]], [2, 1])), dtype=r.choice(("i4", "i8", ">i4", "f4", "M8[s]", "M8[ns]", "m8[s]"))
    ),
    "arrays of objects": _objects,
    "structured": lambda r: np.array([(1, 2)], dtype=[(r.choice("ab"), "i4"), ("z", r.choice(("i4", "i8")))]),
    "voids": lambda r: np.array([(1, 2)], dtype=[(r.choice("ab"), "i4"), (r.choice("yz"), "i4")])[0],
    "voids with objects": lambda r: np.array([([r.choice((1, 2))], 2)], dtype=[("a", "O"), ("b", "i4")])[0],
    "masked": lambda r: np.ma.array([1, 2], mask=[r.choice((True, False)), False], fill_value=r.choice((7, 8))),
    "scalars": lambda r: r.choice(
        (
            np.int32(1),
            np.int64(1),
            np.float32(1),
            np.bool_(1),
            np.str_("1"),
            np.datetime64(1, "s"),
            np.datetime64(1, "ms"),
            np.timedelta64(1, "s"),
        )
    ),
    "Timedelta": lambda r: pd.Timedelta(r.choice((1, 2, 1000)), unit=r.choice(("ns", "us", "s"))).as_unit("ns"),
    "Timedelta's unit": lambda r: pd.Timedelta(1, unit="s").as_unit(r.choice(("ns", "us", "ms", "s"))),
    "Timestamp": lambda r: pd.Timestamp(r.choice((1, 2)), tz=r.choice((None, "UTC", "Europe/Berlin"))),
    "Timestamp's unit": lambda r: pd.Timestamp("2020-01-01").as_unit(r.choice(("ns", "us", "ms", "s"))),
    "Period": lambda r: pd.Period("2020-01", freq=r.choice(("M", "D"))),
    "Interval": lambda r: pd.Interval(0, r.choice((1, 2)), closed=r.choice(("left", "right", "both"))),
    "Index": lambda r: pd.Index(r.choice(([1, 2], [1.0, 2.0], ["1", "2"])), name=r.choice((None, "n"))),
    "RangeIndex": lambda r: r.choice((pd.RangeIndex(2), pd.Index([0, 1]), pd.RangeIndex(0, 4, 2))),
    "DatetimeIndex": lambda r: r.choice(
        (
            pd.date_range("2020", periods=3),
            pd.date_range("2020", periods=3)._with_freq(None),
            pd.date_range("2020", periods=3, tz="UTC"),
            pd.date_range("2020", periods=3, unit="s"),
        )
    ),
    "MultiIndex": lambda r: pd.MultiIndex.from_arrays(
        [np.array([1, 2], dtype=r.choice(("i4", "i8"))), ["a", r.choice("bc")]], names=[r.choice((None, "n")), None]
    ),
    "Categorical": lambda r: pd.Series(
        pd.Categorical(["a"], categories=r.choice((["a", "b"], ["b", "a"], ["a"])), ordered=r.random() < 0.5)
    ),
    "Series": lambda r: pd.Series(
        [1, r.choice((2, 3))], dtype=r.choice(("i4", "i8", "Int64", "f8", "O")), name=r.choice((None, "n"))
    ),
    "texts in a Series": lambda r: pd.Series(r.choice((["ab", "c"], ["a", "bc"], ["ab", None]))),
    "DataFrame": _frame,
}


def form(value: Any) -> Any:
    """What tells a value from others, as something that can be compared."""
    kind = (type(value).__module__, type(value).__qualname__)
    extra = tuple(sorted((k, form(v)) for k, v in getattr(value, "__dict__", {}).items() if not k.startswith("_")))
    if isinstance(value, (pd.DataFrame, pd.Series, pd.Index)):
        parts: list[Any] = [repr(value.attrs), value.flags.allows_duplicate_labels] if hasattr(value, "attrs") else []
        if isinstance(value, pd.DataFrame):
            return (
                kind,
                *parts,
                form(value.columns),
                form(value.index),
                [form(value.iloc[:, i]) for i in range(value.shape[1])],
            )
        if isinstance(value, pd.MultiIndex):
            return kind, list(value.names), [str(x.dtype) for x in value.levels], list(value)
        dtype = value.dtype
        about = (list(dtype.categories), dtype.ordered) if isinstance(dtype, pd.CategoricalDtype) else str(dtype)
        index = form(value.index) if isinstance(value, pd.Series) else repr(getattr(value, "freq", None))
        return kind, *parts, value.name, about, index, [form(v) for v in value.tolist()]
    if isinstance(value, np.ma.MaskedArray):
        return kind, value.fill_value, np.ma.getmaskarray(value).tolist(), np.ma.getdata(value).tolist()
    if isinstance(value, (np.ndarray, np.generic)):
        return kind, repr(value.dtype), np.shape(value), repr(value.tolist())
    if isinstance(value, enum.Enum):
        return kind, value.name, value.value
    if isinstance(value, (pd.Timestamp, pd.Timedelta)):
        return kind, value.unit, value.value, repr(getattr(value, "tz", None))
    if isinstance(value, (dt.datetime, dt.time)):
        return kind, repr(value), value.tzname(), value.fold
    if isinstance(value, collections.ChainMap):
        return kind, [form(each) for each in value.maps]
    if isinstance(value, (dict, types.MappingProxyType)):
        pairs = [(form(k), form(v)) for k, v in value.items()]
        factory = getattr(value, "default_factory", None)
        return kind, extra, factory, pairs if isinstance(value, collections.OrderedDict) else sorted(pairs, key=repr)
    if isinstance(value, (list, tuple, collections.deque)):
        return kind, extra, getattr(value, "_fields", None), getattr(value, "maxlen", None), [form(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted((form(v) for v in value), key=repr)
    if extra and not isinstance(value, (str, dt.tzinfo)):
        return kind, extra
    return kind, extra, repr(value)


def differing(rng: random.Random, count: int) -> tuple[int, list[str], list[str]]:
    """Draw pairs.

    Returns
    -------
    tuple
        How many pairs differed; which of them have one digest; which values that don't differ have two.
    """
    pairs, collisions, needless = 0, [], []
    for number in range(count):
        name = sorted(MAKERS)[number % len(MAKERS)]
        one, two = MAKERS[name](rng), MAKERS[name](rng)
        same = repr(form(one)) == repr(form(two))
        equal = _digest(one) == _digest(two)
        pairs += not same
        if equal and not same:
            collisions.append(f"{name}: {one!r} | {two!r}")
        if same and not equal:
            needless.append(f"{name}: {one!r}")
    return pairs, collisions, needless


def _digest(value: Any) -> str:
    try:
        return digest(value)
    except Indigestible:
        return argument_digest(value)

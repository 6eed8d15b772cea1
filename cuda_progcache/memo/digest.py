# SPDX-License-Identifier: Apache-2.0
"""The digest of a value: SHA-256 over what the value is, the same in every process, interpreter run and hash seed.

Two values have one digest exactly if a function could not tell them apart by
content: ``1``, ``1.0`` and ``True`` differ, as do ``-1.0`` and ``-2.0``, a list
and a tuple, two classes of one name in different modules; two sets, or two
dicts, that were filled in different order don't.

A digest stands for its value: ``digest(digest(x)) == digest(x)``, and a
container has the same digest when some of its elements are replaced by
theirs. So a record that holds digests in place of values has the digest of the
values (a Merkle tree).

How a value is hashed
---------------------
``SHA-256(tag + payload)``, hexadecimal. The tag names the kind (``int:``,
``list:``, or the class as ``module.qualname:``), the payload is its content;
of containers the digests of the elements, sorted where order means nothing.
Functions, classes, modules and what holds such are digested by what they do:
see :mod:`~cuda_progcache.memo.code`. What has no content that can be trusted
(generators, open files, objects of unknown classes) is :class:`Indigestible`.
A class of your own says ``def __digest__(self) -> str``, or is taught with
:func:`register`.
"""

from __future__ import annotations

import array
import collections
import dataclasses
import datetime as dt
import enum
import functools
import gc
import hashlib
import pathlib
import re
import struct
import sys
import threading
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from cuda_progcache.errors import ProgCacheError

T = TypeVar("T")

#: Characters of a full digest.
DIGEST_LENGTH = 64


class Indigestible(ProgCacheError, TypeError):  # noqa: N818 - an established name
    """A value has no content that could be hashed; the message says which, and where to teach it."""

    def __init__(self, value: object, why: str = "") -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        super().__init__(why or f"can't digest a {name}: define a __digest__ method or register(...) one")
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (None, str(self)))  # the value itself may be what can't be pickled


class Digest(str):
    """A digest, 64 hex digits, or the first ones of it: tells a key from a value that is a string."""

    __slots__ = ()


def hash_tagged(tag: bytes, payload: bytes) -> bytes:
    """SHA-256 over the name of a kind and its content, as 64 hex digits in ASCII."""
    state = hashlib.sha256()
    state.update(tag + payload)
    return state.hexdigest().encode("ascii")


def digest(value: Any) -> Digest:
    """The digest of a value.

    Parameters
    ----------
    value : object
        Anything with content; a :class:`Digest` is its own.

    Returns
    -------
    Digest
        64 hex digits (SHA-256), or what the value's ``__digest__`` says.

    Raises
    ------
    Indigestible
        The value, or something in it, has no content that could be hashed, or it contains itself.
    """
    try:
        return Digest(_digest_bytes(value).decode("ascii"))
    except RecursionError:
        raise Indigestible(value, f"can't digest a {type(value).__qualname__} that contains itself") from None
    except RuntimeError as error:  # a dict or set that another thread changes
        raise Indigestible(value, f"can't digest a {type(value).__qualname__} while it changes: {error}") from None


def register(kind: type[T], function: Callable[[T], str]) -> None:
    """Teach how instances of a class, and of its subclasses, are digested.

    Parameters
    ----------
    kind : type
    function : callable
        Takes an instance and returns its digest, as a rule ``digest(...)`` of its content with the class's name.
    """
    _taught[kind] = function
    _of_type.clear()


#: What is met while a value is digested: the classes of instances, if somebody collects them, and a sign of looseness.
_met = threading.local()

Encoder = Callable[[Any], bytes]

_taught: dict[type, Callable[[Any], str]] = {}


def _digest_bytes(value: Any) -> bytes:
    """The digest as ASCII bytes; every element of every container passes through here."""
    encoder = _of_type.get(type(value))
    if encoder is None:
        encoder = _encoder(type(value))
        _of_type[type(value)] = encoder
        if len(_of_type) > 1000:  # classes made in a loop must not be kept for ever
            _of_type.clear()
            _of_type.update(_EXACT)
    return encoder(value)


def _loosely(told: object) -> bytes:
    """A digest that stands for other values, too."""
    _met.loose = True
    return str(told).encode("utf-8")


def child_bytes(value: Any) -> bytes:
    """The digest of an element as it goes into its container's, always 64 bytes."""
    found = _digest_bytes(value)
    return found if len(found) == DIGEST_LENGTH else hash_tagged(b"custom:", found)


def _class_tag(kind: type) -> bytes:
    return f"{kind.__module__}.{kind.__qualname__}:".encode("utf-8", "surrogatepass")


def digest_fields(kind: type, fields: Mapping[str, Any]) -> bytes:
    """The digest of a record (dataclass, attrs, msgspec) from its class and its fields."""
    return hash_tagged(_class_tag(kind), _pairs(fields))


def _pairs(mapping: Mapping[Any, Any]) -> bytes:
    if len(mapping) > 1:
        _met.loose = True
    return b",".join(sorted(child_bytes(key) + b"=" + child_bytes(value) for key, value in mapping.items()))


def _sequence(values: Iterable[Any]) -> bytes:
    return b",".join(map(child_bytes, values))


def _unordered(values: Iterable[Any]) -> bytes:
    return b",".join(sorted(map(child_bytes, values)))


# Built-in types


def _int(value: int) -> bytes:
    return hash_tagged(b"int:", b"%x" % value)


def _float(value: float) -> bytes:
    return hash_tagged(b"float:", struct.pack(">d", value))


def _str(value: str) -> bytes:
    return hash_tagged(b"str:", value.encode("utf-8", "surrogatepass"))


def _datetime(value: dt.datetime | dt.time) -> bytes:
    return hash_tagged(_class_tag(type(value)), f"{value.isoformat()} {value.fold}".encode() + _zone(value))


def _zone(value: dt.datetime | dt.time) -> bytes:
    """The identity of a time's zone; for a zone of an unknown class, its offset and name at that time."""
    zone = value.tzinfo
    if zone is None:
        return b""
    try:
        return child_bytes(zone)
    except Indigestible:
        return hash_tagged(_class_tag(type(zone)), f"{value.utcoffset()!r} {value.tzname()!r} {zone!r}".encode())


def _timezone(value: dt.timezone) -> bytes:
    return hash_tagged(b"timezone:", f"{value.utcoffset(None)!r} {value.tzname(None)}".encode())


#: What digests functions, classes, modules and what holds such: :mod:`~cuda_progcache.memo.code`, which knows them.
_of_code: list[Callable[[Any], str]] = []


def digest_code_by(function: Callable[[Any], str]) -> None:
    """Say how functions, classes, modules and what holds such are digested."""
    _of_code[:] = [function]


def _code(value: Any) -> bytes:
    """Digest of code by what it does: not by its name or place."""
    if not _of_code:
        raise Indigestible(value)
    return _loosely(_of_code[0](value))


def _ordered(value: collections.OrderedDict[Any, Any]) -> bytes:
    """Two of them are equal only in one order."""
    return hash_tagged(b"OrderedDict:", _sequence(part for pair in value.items() for part in pair))


def _defaultdict(value: collections.defaultdict[Any, Any]) -> bytes:
    return hash_tagged(b"defaultdict:", child_bytes(value.default_factory) + _pairs(value))


_CODE_LIKE = (
    types.FunctionType, types.CodeType, types.MethodType, types.ModuleType, types.BuiltinFunctionType,
    functools.partial, staticmethod, classmethod, property,
)  # fmt: skip
_EXACT: dict[type, Encoder] = {
    Digest: _loosely,
    int: _int,
    float: _float,
    str: _str,
    bytes: lambda value: hash_tagged(b"bytes:", value),
    bytearray: lambda value: hash_tagged(b"bytearray:", bytes(value)),
    type(None): lambda _: hash_tagged(b"none:", b""),
    bool: lambda value: hash_tagged(b"bool:", b"1" if value else b"0"),
    complex: lambda value: hash_tagged(b"complex:", struct.pack(">dd", value.real, value.imag)),
    type(...): lambda _: hash_tagged(b"ellipsis:", b""),
    type(NotImplemented): lambda _: hash_tagged(b"notimplemented:", b""),
    list: lambda value: hash_tagged(b"list:", _sequence(value)),
    tuple: lambda value: hash_tagged(b"tuple:", _sequence(value)),
    dict: lambda value: hash_tagged(b"dict:", _pairs(value)),
    set: lambda value: hash_tagged(b"set:", _unordered(value)),
    frozenset: lambda value: hash_tagged(b"frozenset:", _unordered(value)),
    range: lambda value: hash_tagged(b"range:", _sequence((value.start, value.stop, value.step))),
    slice: lambda value: hash_tagged(b"slice:", _sequence((value.start, value.stop, value.step))),
    collections.OrderedDict: _ordered,
    collections.defaultdict: _defaultdict,
    collections.deque: lambda value: hash_tagged(b"deque:", child_bytes(value.maxlen) + _sequence(value)),
    array.array: lambda value: hash_tagged(b"array:", value.typecode.encode() + value.tobytes()),
    re.Pattern: lambda value: hash_tagged(b"pattern:", _sequence((value.pattern, value.flags))),
    memoryview: lambda value: hash_tagged(b"memoryview:", _sequence((value.format, value.shape, value.tobytes()))),
    dt.datetime: _datetime,
    dt.time: _datetime,
    dt.date: lambda value: hash_tagged(b"date:", value.isoformat().encode()),
    dt.timedelta: lambda v: hash_tagged(b"timedelta:", f"{v.days} {v.seconds} {v.microseconds}".encode()),
    dt.timezone: _timezone,
    **dict.fromkeys(_CODE_LIKE, _code),
}
_of_type: dict[type, Encoder] = dict(_EXACT)
_EXACT_DATES = frozenset({dt.datetime, dt.time, dt.date, dt.timedelta, dt.timezone, array.array, memoryview})


# Other types: looked at once, then remembered


def _encoder(kind: type) -> Encoder:
    """How instances of a class that was not met yet are hashed."""
    encoder = _encoder_of(kind)
    if not kind.__flags__ & _HEAP or kind.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return encoder

    def encode(value: Any) -> bytes:
        met = getattr(_met, "classes", None)
        if met is not None:
            met.add(kind)
        return encoder(value)

    return encode


_HEAP = 1 << 9  # a class made by a class statement, or by C code at run time


def digest_loosely(value: Any) -> tuple[Digest, bool]:
    """The digest of a value, and whether others may have it: dicts in another order, or what a class says."""
    _met.loose = False
    found = digest(value)
    return found, bool(_met.loose)


class classes_met:  # noqa: N801 - used as a function
    """Collect the classes, but for the standard library's, of which instances are digested: ``with classes_met()``."""

    def __enter__(self) -> set[type]:
        self._around = getattr(_met, "classes", None)
        found: set[type] = set()
        _met.classes = found
        return found

    def __exit__(self, *exc_info: object) -> None:
        _met.classes = self._around


def is_taught(kind: type) -> bool:
    """Whether a class says itself how its instances are digested, or was registered."""
    return hasattr(kind, "__digest__") or any(issubclass(kind, known) for known in _taught)


def is_foreign(kind: type) -> bool:
    """Whether it is a class of a library whose content is known here."""
    return kind in _EXACT or any(_foreign_name(base) in _FOREIGN or base in _EXACT_DATES for base in kind.__mro__)


def _foreign_name(kind: type) -> str:
    # By package and name: classes move between a package's modules from version to version.
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def content_as(value: Any) -> bytes:
    """Digest of an instance of a built-in type's subclass as of the built-in type: without class and attributes."""
    return next(_EXACT[base] for base in type(value).__mro__ if base in _EXACT)(value)


def _encoder_of(kind: type) -> Encoder:
    for known, function in _taught.items():
        if issubclass(kind, known):
            return lambda value: _loosely(function(value))
    if issubclass(kind, type):
        return _code
    if issubclass(kind, Digest):
        return _EXACT[Digest]
    if hasattr(kind, "__digest__"):
        return lambda value: _loosely(value.__digest__())
    if kind in _EXACT:
        return _EXACT[kind]
    if issubclass(kind, enum.Enum):
        return lambda value: hash_tagged(_class_tag(kind), _sequence((value.name, value.value)))
    for base in kind.__mro__:
        foreign = _FOREIGN.get(_foreign_name(base))
        if foreign is not None:
            return foreign if base is kind else functools.partial(_derived, kind, foreign)
    inner = next((_EXACT[base] for base in kind.__mro__[1:] if base in _EXACT and base is not type(None)), None)
    names = field_names(kind)
    if names is not None:
        collected = inner if inner is not None else _collection_of(kind)
        return functools.partial(_record, kind, names, collected)
    if inner is not None:
        return functools.partial(_subclassed, kind, inner)
    collection = _collection_of(kind)
    return _refuse if collection is None else functools.partial(_subclassed, kind, collection)


def field_names(kind: type) -> list[str] | None:
    """The fields of a dataclass, attrs class, msgspec struct; None if it is none."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    attributes = getattr(kind, "__attrs_attrs__", None)
    if attributes is not None:
        return [attribute.name for attribute in attributes]
    fields = getattr(kind, "__struct_fields__", None)
    return None if fields is None else list(fields)


def _subclassed(kind: type, encode: Encoder, value: Any) -> bytes:
    """A subclass of a built-in type: its class, its content, and attributes that instances were given."""
    attributes = getattr(value, "__dict__", None)
    fields = getattr(kind, "_fields", None)  # of a named tuple
    named = repr(fields).encode("utf-8", "surrogatepass") if isinstance(fields, tuple) else b""
    return hash_tagged(_class_tag(kind), named + encode(value) + (_pairs(attributes) if attributes else b""))


def _record(kind: type, names: list[str], encode: Encoder | None, value: Any) -> bytes:
    """A dataclass and its like: its fields, other attributes, and what it holds where it is a collection, too."""
    fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
    more = {name: held for name, held in getattr(value, "__dict__", {}).items() if name not in fields}
    if encode is None and not more:
        return digest_fields(kind, fields)
    content = b"" if encode is None else encode(value)
    return hash_tagged(_class_tag(kind), _pairs(fields) + b";" + content + b";" + _pairs(more))


def _derived(kind: type, encode: Encoder, value: Any) -> bytes:
    """An instance of a class derived from a library's: its class, content, and what its author counts as content."""
    names = getattr(kind, "_metadata", None)  # as pandas has it
    more = {name: getattr(value, name, None) for name in names} if isinstance(names, list) else {}
    return hash_tagged(_class_tag(kind), encode(value) + _pairs(more))


def _collection_of(kind: type) -> Encoder | None:
    """The function that hashes the content of a collection class; None if the class is no collection."""
    if issubclass(kind, collections.ChainMap):
        return lambda value: _sequence(value.maps)
    if issubclass(kind, (collections.UserDict, collections.UserList, collections.UserString)):
        return lambda value: child_bytes(value.data)
    if issubclass(kind, Mapping):
        return lambda value: _pairs(dict(value))
    if issubclass(kind, AbstractSet):
        return _unordered
    if issubclass(kind, (Sequence, ValuesView)):  # iterating may use up, or not show, what others hold
        return _sequence
    return None


def _refuse(value: Any) -> bytes:
    raise Indigestible(value)


# Types of libraries that are not imported here: whoever has an instance has imported them


def _dtype(value: Any) -> bytes:
    return _sequence((value.str, repr(value), dict(value.metadata) if value.metadata else None))


def _ndarray(value: Any) -> bytes:
    layout = _dtype(value.dtype) + child_bytes(tuple(value.shape))
    if value.dtype.names is not None:  # what lies between the fields is no content
        return hash_tagged(b"numpy.ndarray:", layout + _sequence(value[name] for name in value.dtype.names))
    if value.dtype.hasobject:
        return hash_tagged(b"numpy.ndarray:", layout + _elements(value.ravel().tolist()))
    state = hashlib.sha256()
    state.update(b"numpy.ndarray:" + layout)
    state.update(value.data if value.flags.c_contiguous and value.dtype.kind in "biufc" else value.tobytes())
    return state.hexdigest().encode("ascii")


def _elements(values: list[Any]) -> bytes:
    """Digest of the elements of a list; of nothing but texts at once, with their lengths."""
    if values and all(type(value) is str for value in values):
        joined = "".join(values).encode("utf-8", "surrogatepass")
        lengths = array.array("Q", map(len, values))
        if sys.byteorder == "big":
            lengths.byteswap()
        return hash_tagged(b"texts:", lengths.tobytes() + joined)
    return hash_tagged(b"elements:", _sequence(values))


def _masked_array(value: Any) -> bytes:
    import numpy as np

    parts = (np.ma.getdata(value), np.ma.getmaskarray(value), value.fill_value)
    return hash_tagged(b"numpy.ma.MaskedArray:", _sequence(parts))


def _numpy_scalar(value: Any) -> bytes:
    if value.dtype.names is not None:
        fields = _sequence(value[name] for name in value.dtype.names)
        return hash_tagged(b"numpy.scalar:", _dtype(value.dtype) + fields)
    if value.dtype.hasobject:
        raise Indigestible(value)
    return hash_tagged(b"numpy.scalar:", value.dtype.str.encode() + b" " + value.tobytes())


def _column(values: Any) -> bytes:
    """What a pandas column or index holds, exactly, and its type."""
    kind = values.dtype
    if type(kind).__name__ == "CategoricalDtype":
        codes = values.cat.codes if hasattr(values, "cat") else values.codes
        return hash_tagged(b"pandas.categories:", _sequence((kind.categories, kind.ordered, _plain_array(codes))))
    if type(values.array).__name__ in {"NumpyExtensionArray", "PandasArray"}:
        return child_bytes(values.to_numpy())
    if kind.kind in "mM" and type(values.array).__name__ in {"DatetimeArray", "TimedeltaArray"}:
        return hash_tagged(b"pandas.times:", str(kind).encode() + child_bytes(values.array.asi8))
    return hash_tagged(b"pandas.values:", str(kind).encode() + _elements(list(values.astype(object))))


def _plain_array(values: Any) -> Any:
    return values.to_numpy() if hasattr(values, "to_numpy") else values


def _index(value: Any) -> bytes:
    if value.nlevels > 1:
        parts = (list(value.names), list(value.levels), [_plain_array(codes) for codes in value.codes])
        return hash_tagged(b"pandas.MultiIndex:", _sequence(parts))
    spacing = getattr(value, "freq", None)
    about = _sequence((type(value).__name__, value.name, None if spacing is None else repr(spacing)))
    return hash_tagged(b"pandas.Index:", about + _column(value))


def _flags(value: Any) -> bytes:
    return _sequence((value.attrs, value.flags.allows_duplicate_labels))


def _series(value: Any) -> bytes:
    return hash_tagged(b"pandas.Series:", _sequence((value.name, value.index)) + _column(value) + _flags(value))


def _frame(value: Any) -> bytes:
    columns = b"".join(_column(value.iloc[:, i]) for i in range(value.shape[1]))
    return hash_tagged(b"pandas.DataFrame:", _sequence((value.columns, value.index)) + columns + _flags(value))


def _moment(value: Any) -> bytes:
    """A pandas Timestamp or Timedelta: to its unit, and in its zone."""
    zone = _zone(value) + f" {value.fold}".encode() if hasattr(value, "tzinfo") else b""
    return hash_tagged(_class_tag(type(value)), _numpy_scalar(value.asm8) + zone)


def _repr(value: Any) -> bytes:
    return hash_tagged(_class_tag(type(value)), repr(value).encode())


def _path(value: Any) -> bytes:
    flavour = "windows" if isinstance(value, pathlib.PureWindowsPath) else "posix"
    return hash_tagged(b"path:", _sequence((flavour, isinstance(value, pathlib.Path), str(value))))


def _ufunc(value: Any) -> bytes:
    """NumPy's own by name; one that was made of a function is that function, and no value."""
    if any(callable(held) for held in gc.get_referents(value)):
        raise Indigestible(value)
    return _repr(value)


_PATHS = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath")
_FOREIGN: dict[str, Encoder] = {
    "decimal.Decimal": _repr,
    "fractions.Fraction": _repr,
    "numpy.dtype": _repr,
    "numpy.MaskedArray": _masked_array,
    "numpy.generic": _numpy_scalar,
    "numpy.memmap": _ndarray,
    "numpy.ndarray": _ndarray,
    "numpy.ufunc": _ufunc,
    "pandas.DataFrame": _frame,
    "pandas.Index": _index,
    "pandas.Series": _series,
    "pandas.Timedelta": _moment,
    "pandas.Timestamp": _moment,
    **dict.fromkeys((f"pathlib.{kind}" for kind in _PATHS), _path),
    "pandas.NAType": _repr,
    "pandas.NaTType": _repr,
    "uuid.UUID": _repr,
    "zoneinfo.ZoneInfo": lambda value: hash_tagged(b"zoneinfo:", str(value.key).encode()),
}

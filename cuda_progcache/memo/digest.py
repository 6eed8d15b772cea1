# SPDX-License-Identifier: Apache-2.0
"""The digest of a value: a SHA-256 of its content, the same in every process, interpreter run and hash seed.

Two values have the same digest exactly if a function couldn't tell them apart
by content. ``1``, ``1.0`` and ``True`` have different digests, and so have
``-1.0`` and ``-2.0``, a list and a tuple, and two classes of the same name in
different modules. Two sets or two dicts that were filled in a different order
have the same digest.

A digest stands for its value: ``digest(digest(x)) == digest(x)``, and a
container keeps its digest if some of its elements are replaced by their
digests. So a record that holds digests in place of values has the digest of
the record with the values (a Merkle tree).

How a value is hashed
---------------------
``SHA-256(tag + payload)``, hexadecimal. The tag names the kind (``int:``,
``list:``, or the class as ``module.qualname:``). The payload is the content; a
container's is the digests of its elements, sorted if their order has no
meaning. Functions, classes, modules and objects that hold them are digested by
what they do: see :mod:`~cuda_progcache.memo.code`. A value without content that
can be trusted (a generator, an open file, an object of an unknown class) is
:class:`Indigestible`. A class of your own defines
``def __digest__(self) -> str``, or is registered with :func:`register`.
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
    """A value has no content that could be hashed. The message names its class and says how to make it digestible."""

    def __init__(self, value: object, why: str = "") -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        super().__init__(why or f"can't digest a {name}: define a __digest__ method or register(...) one")
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (None, str(self)))  # the value itself may not be picklable


class Digest(str):
    """A digest of 64 hex digits, or a prefix of one; the type distinguishes a key from a string value."""

    __slots__ = ()


def hash_tagged(tag: bytes, payload: bytes) -> bytes:
    """Return the SHA-256 of a kind's tag and a payload, as 64 hex digits in ASCII."""
    state = hashlib.sha256()
    state.update(tag + payload)
    return state.hexdigest().encode("ascii")


def digest(value: Any) -> Digest:
    """Return the digest of a value.

    Parameters
    ----------
    value : object
        Anything with content; a :class:`Digest` is its own digest.

    Returns
    -------
    Digest
        64 hex digits (SHA-256), or the result of the value's ``__digest__``.

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
    """Register a function that digests the instances of a class and of its subclasses.

    Parameters
    ----------
    kind : type
    function : callable
        Takes an instance and returns its digest, usually ``digest(...)`` of its content and the class's name.
    """
    _taught[kind] = function
    _of_type.clear()


#: Per thread, while a value is digested: ``classes``, a set of the classes met, if a caller collects them; ``loose``,
#: see :func:`digest_loosely`.
_met = threading.local()

Encoder = Callable[[Any], bytes]

_taught: dict[type, Callable[[Any], str]] = {}


def _digest_bytes(value: Any) -> bytes:
    """Return the digest as ASCII bytes; every element of every container passes through here."""
    encoder = _of_type.get(type(value))
    if encoder is None:
        encoder = _encoder(type(value))
        _of_type[type(value)] = encoder
        if len(_of_type) > 1000:  # classes made in a loop must not be kept forever
            _of_type.clear()
            _of_type.update(_EXACT)
    return encoder(value)


def _loosely(told: object) -> bytes:
    """Encode a digest that other values may have too, and note that."""
    _met.loose = True
    return str(told).encode("utf-8")


def child_bytes(value: Any) -> bytes:
    """Return the digest of an element as its container hashes it, always 64 bytes."""
    found = _digest_bytes(value)
    return found if len(found) == DIGEST_LENGTH else hash_tagged(b"custom:", found)


def _class_tag(kind: type) -> bytes:
    return f"{kind.__module__}.{kind.__qualname__}:".encode("utf-8", "surrogatepass")


def digest_fields(kind: type, fields: Mapping[str, Any]) -> bytes:
    """Return the digest of a record (dataclass, attrs, msgspec) made from its class and its fields."""
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
    """Return the digest of a time's zone; for a zone of an unknown class, of its offset and name at that time."""
    zone = value.tzinfo
    if zone is None:
        return b""
    try:
        return child_bytes(zone)
    except Indigestible:
        return hash_tagged(_class_tag(type(zone)), f"{value.utcoffset()!r} {value.tzname()!r} {zone!r}".encode())


def _timezone(value: dt.timezone) -> bytes:
    return hash_tagged(b"timezone:", f"{value.utcoffset(None)!r} {value.tzname(None)}".encode())


#: The function that digests functions, classes, modules and objects that hold them; set by
#: :mod:`~cuda_progcache.memo.code`.
_of_code: list[Callable[[Any], str]] = []


def digest_code_by(function: Callable[[Any], str]) -> None:
    """Set the function that digests functions, classes, modules and objects that hold them."""
    _of_code[:] = [function]


def _code(value: Any) -> bytes:
    """Digest code by what it does, not by its name or location."""
    if not _of_code:
        raise Indigestible(value)
    return _loosely(_of_code[0](value))


def _ordered(value: collections.OrderedDict[Any, Any]) -> bytes:
    """Digest an OrderedDict; the order counts, as it does in a comparison of two of them."""
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


# Other types: the encoder is chosen once per type and cached


def _encoder(kind: type) -> Encoder:
    """Make the function that hashes instances of a class, and reports the class to :class:`classes_met`."""
    encoder = _encoder_of(kind)
    if not kind.__flags__ & _HEAP or kind.__module__.partition(".")[0] in sys.stdlib_module_names - {"__main__"}:
        return encoder

    def encode(value: Any) -> bytes:
        met = getattr(_met, "classes", None)
        if met is not None:
            met.add(kind)
        return encoder(value)

    return encode


_HEAP = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement, or by C code at run time


def digest_loosely(value: Any) -> tuple[Digest, bool]:
    """Return a value's digest, and whether distinguishable values may share it.

    The second is True if the value contains a dict of several items (their order doesn't count), code, a
    :class:`Digest`, or an object with a digest function of its own.
    """
    _met.loose = False
    found = digest(value)
    return found, bool(_met.loose)


class classes_met:  # noqa: N801 - used as a function
    """A context manager that collects the classes of digested instances, except the standard library's classes."""

    def __enter__(self) -> set[type]:
        self._around = getattr(_met, "classes", None)
        found: set[type] = set()
        _met.classes = found
        return found

    def __exit__(self, *exc_info: object) -> None:
        _met.classes = self._around


def is_taught(kind: type) -> bool:
    """Return whether a class defines how its instances are digested, or was registered."""
    return hasattr(kind, "__digest__") or any(issubclass(kind, known) for known in _taught)


def is_foreign(kind: type) -> bool:
    """Return whether this module knows the content of a class: a built-in type, or a library's class."""
    return kind in _EXACT or any(_foreign_name(base) in _FOREIGN or base in _EXACT_DATES for base in kind.__mro__)


def _foreign_name(kind: type) -> str:
    # By package and name: a class's module within its package differs between versions.
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def content_as(value: Any) -> bytes:
    """Digest an instance of a built-in type's subclass as the built-in type, without class and attributes."""
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
    """Return the fields of a dataclass, attrs class or msgspec struct; None for other classes."""
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    attributes = getattr(kind, "__attrs_attrs__", None)
    if attributes is not None:
        return [attribute.name for attribute in attributes]
    fields = getattr(kind, "__struct_fields__", None)
    return None if fields is None else list(fields)


def _subclassed(kind: type, encode: Encoder, value: Any) -> bytes:
    """Hash an instance of a built-in type's subclass: its class, content and attributes."""
    attributes = getattr(value, "__dict__", None)
    fields = getattr(kind, "_fields", None)  # of a named tuple
    named = repr(fields).encode("utf-8", "surrogatepass") if isinstance(fields, tuple) else b""
    return hash_tagged(_class_tag(kind), named + encode(value) + (_pairs(attributes) if attributes else b""))


def _record(kind: type, names: list[str], encode: Encoder | None, value: Any) -> bytes:
    """Hash a dataclass, attrs or msgspec instance: its fields, other attributes, and its elements if a collection."""
    fields = {name: getattr(value, name) for name in names if hasattr(value, name)}
    more = {name: held for name, held in getattr(value, "__dict__", {}).items() if name not in fields}
    if encode is None and not more:
        return digest_fields(kind, fields)
    content = b"" if encode is None else encode(value)
    return hash_tagged(_class_tag(kind), _pairs(fields) + b";" + content + b";" + _pairs(more))


def _derived(kind: type, encode: Encoder, value: Any) -> bytes:
    """Hash an instance of a subclass of a library's class: class, content, and attributes named in ``_metadata``."""
    names = getattr(kind, "_metadata", None)  # pandas's list of the attributes that a subclass adds to the content
    more = {name: getattr(value, name, None) for name in names} if isinstance(names, list) else {}
    return hash_tagged(_class_tag(kind), encode(value) + _pairs(more))


def _collection_of(kind: type) -> Encoder | None:
    """Return the function that hashes the content of a collection class; None if the class isn't a collection."""
    if issubclass(kind, collections.ChainMap):
        return lambda value: _sequence(value.maps)
    if issubclass(kind, (collections.UserDict, collections.UserList, collections.UserString)):
        return lambda value: child_bytes(value.data)
    if issubclass(kind, Mapping):
        return lambda value: _pairs(dict(value))
    if issubclass(kind, AbstractSet):
        return _unordered
    if issubclass(kind, (Sequence, ValuesView)):  # other iterables may be used up, or not show their whole content
        return _sequence
    return None


def _refuse(value: Any) -> bytes:
    raise Indigestible(value)


# Types of libraries that aren't imported at the top: if there is an instance, its library has been imported


def _dtype(value: Any) -> bytes:
    return _sequence((value.str, repr(value), dict(value.metadata) if value.metadata else None))


def _ndarray(value: Any) -> bytes:
    layout = _dtype(value.dtype) + child_bytes(tuple(value.shape))
    if value.dtype.names is not None:  # the padding between the fields isn't content
        return hash_tagged(b"numpy.ndarray:", layout + _sequence(value[name] for name in value.dtype.names))
    if value.dtype.hasobject:
        return hash_tagged(b"numpy.ndarray:", layout + _elements(value.ravel().tolist()))
    state = hashlib.sha256()
    state.update(b"numpy.ndarray:" + layout)
    state.update(value.data if value.flags.c_contiguous and value.dtype.kind in "biufc" else value.tobytes())
    return state.hexdigest().encode("ascii")


def _elements(values: list[Any]) -> bytes:
    """Hash the elements of a list; a list of strings only is hashed in one go, with the lengths."""
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
    """Hash the exact content of a pandas column or index, and its type."""
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
    """Hash a pandas Timestamp or Timedelta with its unit and time zone."""
    zone = _zone(value) + f" {value.fold}".encode() if hasattr(value, "tzinfo") else b""
    return hash_tagged(_class_tag(type(value)), _numpy_scalar(value.asm8) + zone)


def _repr(value: Any) -> bytes:
    return hash_tagged(_class_tag(type(value)), repr(value).encode())


def _path(value: Any) -> bytes:
    flavour = "windows" if isinstance(value, pathlib.PureWindowsPath) else "posix"
    return hash_tagged(b"path:", _sequence((flavour, isinstance(value, pathlib.Path), str(value))))


def _ufunc(value: Any) -> bytes:
    """Hash one of NumPy's own ufuncs by name; a ufunc made from a function isn't a value."""
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

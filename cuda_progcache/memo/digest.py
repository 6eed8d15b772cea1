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
What has no content that can be trusted (generators, open files, objects of
unknown classes, user-defined classes themselves) is :class:`Indigestible`.
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
import hashlib
import pathlib
import re
import struct
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, ValuesView
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, TypeVar

from cuda_progcache.errors import ProgCacheError

if TYPE_CHECKING:
    from cuda_progcache.memo.caches import BaseCache

T = TypeVar("T")

#: Characters of a full digest.
DIGEST_LENGTH = 64


class Indigestible(ProgCacheError, TypeError):  # noqa: N818 - an established name
    """A value has no content that could be hashed; the message says which, and where to teach it."""

    def __init__(self, value: object, why: str = "") -> None:
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}"
        super().__init__(why or f"can't digest a {name}: give it a __digest__ method, or register(...) one")
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (None, str(self)))  # the value itself may be what can't be pickled


class Digest(str):
    """A digest, 64 hex digits, or the first ones of it: tells a key from a value that is a string."""

    __slots__ = ()

    def expand(self, cache: BaseCache) -> Digest:
        """The full digest that this prefix stands for in ``cache``; see :meth:`BaseCache.expand`."""
        return cache.expand(self)

    def shrink(self, cache: BaseCache) -> Digest:
        """The shortest prefix that is unambiguous in ``cache``; see :meth:`BaseCache.shrink`."""
        return cache.shrink(self)


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
        raise Indigestible(value, f"can't digest a {type(value).__qualname__} just now: {error}") from None


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


def _hash(tag: bytes, payload: bytes) -> bytes:
    state = hashlib.sha256()
    state.update(tag + payload)
    return state.hexdigest().encode("ascii")


def child_bytes(value: Any) -> bytes:
    """The digest of an element as it goes into its container's, always 64 bytes."""
    found = _digest_bytes(value)
    return found if len(found) == DIGEST_LENGTH else _hash(b"custom:", found)


def _class_tag(kind: type) -> bytes:
    return f"{kind.__module__}.{kind.__qualname__}:".encode("utf-8", "surrogatepass")


def digest_fields(kind: type, fields: Mapping[str, Any]) -> bytes:
    """The digest of a record (dataclass, attrs, msgspec) from its class and its fields."""
    return _hash(_class_tag(kind), _pairs(fields))


def _pairs(mapping: Mapping[Any, Any]) -> bytes:
    return b",".join(sorted(child_bytes(key) + b"=" + child_bytes(value) for key, value in mapping.items()))


def _sequence(values: Iterable[Any]) -> bytes:
    return b",".join(map(child_bytes, values))


def _unordered(values: Iterable[Any]) -> bytes:
    return b",".join(sorted(map(child_bytes, values)))


# Built-in types


def _int(value: int) -> bytes:
    return _hash(b"int:", b"%x" % value)


def _float(value: float) -> bytes:
    return _hash(b"float:", struct.pack(">d", value))


def _str(value: str) -> bytes:
    return _hash(b"str:", value.encode("utf-8", "surrogatepass"))


def _datetime(value: dt.datetime | dt.time) -> bytes:
    zone = getattr(value.tzinfo, "key", "")
    return _hash(_class_tag(type(value)), f"{value.isoformat()} {value.fold} {zone}".encode())


def _timezone(value: dt.timezone) -> bytes:
    return _hash(b"timezone:", f"{value.utcoffset(None)!r} {value.tzname(None)}".encode())


def _function(value: types.FunctionType | types.MethodType) -> bytes:
    """By what it does, not by its name or place: code, defaults, and all that it refers to."""
    from cuda_progcache.memo.code import argument_digest  # which digests values by this module

    return argument_digest(value).encode("ascii")


_CODE = [
    "co_code",
    "co_consts",
    "co_names",
    "co_varnames",
    "co_freevars",
    "co_cellvars",
    "co_argcount",
    "co_posonlyargcount",
    "co_kwonlyargcount",
    "co_flags",
    "co_exceptiontable",
]


def _code(value: types.CodeType) -> bytes:
    return _hash(b"code:", _sequence(getattr(value, name) for name in _CODE))


def _method(value: types.MethodType) -> bytes:
    if isinstance(value.__self__, type):
        return _function(value)
    return _hash(b"method:", _sequence((value.__func__, value.__self__)))


def _module(value: types.ModuleType) -> bytes:
    """By what it offers; most real modules offer something indigestible."""
    names = getattr(value, "__all__", None)
    return _hash(b"module:", _pairs({name: getattr(value, name) for name in (dir(value) if names is None else names)}))


def _builtin(value: types.BuiltinFunctionType) -> bytes:
    owner = value.__self__
    if owner is None or isinstance(owner, types.ModuleType):
        return _hash(b"builtin:", f"{value.__module__}.{value.__qualname__}".encode())
    return _hash(b"builtin:", _sequence((value.__qualname__, owner)))


def _type(value: type) -> bytes:
    """Classes of Python and NumPy by name; a user's class may change under its name."""
    home = value.__module__.partition(".")[0]
    if home != "numpy" and (home not in sys.stdlib_module_names or home == "__main__"):
        raise Indigestible(value, f"can't digest the class {value.__module__}.{value.__qualname__} itself")
    return _hash(b"type:", _class_tag(value))


def _ordered(value: collections.OrderedDict[Any, Any]) -> bytes:
    """Two of them are equal only in one order."""
    return _hash(b"OrderedDict:", _sequence(part for pair in value.items() for part in pair))


def _defaultdict(value: collections.defaultdict[Any, Any]) -> bytes:
    return _hash(b"defaultdict:", child_bytes(value.default_factory) + _pairs(value))


def _partial(value: functools.partial[Any]) -> bytes:
    return _hash(b"partial:", _sequence((value.func, value.args, value.keywords)))


_EXACT: dict[type, Encoder] = {
    Digest: lambda value: value.encode("utf-8"),
    int: _int,
    float: _float,
    str: _str,
    bytes: lambda value: _hash(b"bytes:", value),
    bytearray: lambda value: _hash(b"bytearray:", bytes(value)),
    type(None): lambda _: _hash(b"none:", b""),
    bool: lambda value: _hash(b"bool:", b"1" if value else b"0"),
    complex: lambda value: _hash(b"complex:", struct.pack(">dd", value.real, value.imag)),
    type(...): lambda _: _hash(b"ellipsis:", b""),
    list: lambda value: _hash(b"list:", _sequence(value)),
    tuple: lambda value: _hash(b"tuple:", _sequence(value)),
    dict: lambda value: _hash(b"dict:", _pairs(value)),
    set: lambda value: _hash(b"set:", _unordered(value)),
    frozenset: lambda value: _hash(b"frozenset:", _unordered(value)),
    range: lambda value: _hash(b"range:", _sequence((value.start, value.stop, value.step))),
    slice: lambda value: _hash(b"slice:", _sequence((value.start, value.stop, value.step))),
    collections.OrderedDict: _ordered,
    collections.defaultdict: _defaultdict,
    collections.deque: lambda value: _hash(b"deque:", child_bytes(value.maxlen) + _sequence(value)),
    array.array: lambda value: _hash(b"array:", value.typecode.encode() + value.tobytes()),
    re.Pattern: lambda value: _hash(b"pattern:", _sequence((value.pattern, value.flags))),
    memoryview: lambda value: _hash(b"memoryview:", _sequence((value.format, value.shape, value.tobytes()))),
    dt.datetime: _datetime,
    dt.time: _datetime,
    dt.date: lambda value: _hash(b"date:", value.isoformat().encode()),
    dt.timedelta: lambda v: _hash(b"timedelta:", f"{v.days} {v.seconds} {v.microseconds}".encode()),
    dt.timezone: _timezone,
    types.FunctionType: _function,
    types.CodeType: _code,
    types.MethodType: _method,
    types.ModuleType: _module,
    types.BuiltinFunctionType: _builtin,
    functools.partial: _partial,
    staticmethod: lambda value: _hash(b"staticmethod:", child_bytes(value.__func__)),
    classmethod: lambda value: _hash(b"classmethod:", child_bytes(value.__func__)),
    property: lambda value: _hash(b"property:", _sequence((value.fget, value.fset, value.fdel))),
}
_of_type: dict[type, Encoder] = dict(_EXACT)


# Other types: looked at once, then remembered


def _encoder(kind: type) -> Encoder:
    """How instances of a class that was not met yet are hashed."""
    for known, function in _taught.items():
        if issubclass(kind, known):
            return lambda value: str(function(value)).encode("utf-8")
    if issubclass(kind, type):
        return _type
    if issubclass(kind, Digest):
        return _EXACT[Digest]
    if hasattr(kind, "__digest__"):
        return lambda value: str(value.__digest__()).encode("utf-8")
    if kind in _EXACT:
        return _EXACT[kind]
    if issubclass(kind, enum.Enum):
        return lambda value: _hash(_class_tag(kind), _sequence((value.name, value.value)))
    for base in kind.__mro__:
        # By package and name: classes move between a package's modules from version to version.
        foreign = _FOREIGN.get(f"{base.__module__.partition('.')[0]}.{base.__qualname__}")
        if foreign is not None:
            return foreign if base is kind else functools.partial(_derived, kind, foreign)
    names = _field_names(kind)
    if names is not None:
        return lambda value: digest_fields(kind, {name: getattr(value, name) for name in names})
    for base in kind.__mro__[1:]:
        if base in _EXACT and base is not type(None):
            return functools.partial(_subclassed, kind, _EXACT[base])
    return _collection(kind)


def _field_names(kind: type) -> list[str] | None:
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
    return _hash(_class_tag(kind), encode(value) + (_pairs(attributes) if attributes else b""))


def _derived(kind: type, encode: Encoder, value: Any) -> bytes:
    """An instance of a class derived from a library's: its class, content, and what its author counts as content."""
    names = getattr(kind, "_metadata", None)  # as pandas has it
    more = {name: getattr(value, name, None) for name in names} if isinstance(names, list) else {}
    return _hash(_class_tag(kind), encode(value) + _pairs(more))


def _collection(kind: type) -> Encoder:
    if issubclass(kind, Mapping):
        return lambda value: _hash(_class_tag(kind), _pairs(dict(value)))
    if issubclass(kind, AbstractSet):
        return lambda value: _hash(_class_tag(kind), _unordered(value))
    if issubclass(kind, (Sequence, ValuesView)):  # iterating may use up, or not show, what others hold
        return lambda value: _hash(_class_tag(kind), _sequence(value))
    return _refuse


def _refuse(value: Any) -> bytes:
    raise Indigestible(value)


# Types of libraries that are not imported here: whoever has an instance has imported them


def _ndarray(value: Any) -> bytes:
    layout = _sequence((value.dtype.str, repr(value.dtype), tuple(value.shape)))
    if value.dtype.names is not None:  # what lies between the fields is no content
        return _hash(b"numpy.ndarray:", layout + _sequence(value[name] for name in value.dtype.names))
    if value.dtype.hasobject:
        return _hash(b"numpy.ndarray:", layout + _sequence(value.ravel().tolist()))
    state = hashlib.sha256()
    state.update(b"numpy.ndarray:" + layout)
    state.update(value.tobytes())
    return state.hexdigest().encode("ascii")


def _masked_array(value: Any) -> bytes:
    import numpy as np

    parts = (np.ma.getdata(value), np.ma.getmaskarray(value), value.fill_value)
    return _hash(b"numpy.ma.MaskedArray:", _sequence(parts))


def _numpy_scalar(value: Any) -> bytes:
    return _hash(b"numpy.scalar:", value.dtype.str.encode() + b" " + value.tobytes())


def _pandas_values(values: Any) -> Any:
    """What a column holds, exactly: its array, or a list where the array is pandas' own."""
    array = values.array
    plain = getattr(array, "_ndarray", None) if type(array).__name__ == "NumpyExtensionArray" else None
    return values.to_numpy() if plain is not None else list(values.astype(object))


def _column_type(values: Any) -> Any:
    kind = values.dtype
    return (kind.categories, kind.ordered) if type(kind).__name__ == "CategoricalDtype" else str(kind)


def _index(value: Any) -> bytes:
    if value.nlevels > 1:
        return _hash(b"pandas.MultiIndex:", _sequence((list(value.names), list(value))))
    return _hash(b"pandas.Index:", _sequence((value.name, _column_type(value), _pandas_values(value))))


def _series(value: Any) -> bytes:
    parts = (value.name, _column_type(value), value.index, _pandas_values(value), value.attrs)
    return _hash(b"pandas.Series:", _sequence(parts))


def _frame(value: Any) -> bytes:
    columns = [value.iloc[:, i] for i in range(value.shape[1])]
    return _hash(b"pandas.DataFrame:", _sequence((value.columns, value.index, columns, value.attrs)))


def _repr(value: Any) -> bytes:
    return _hash(_class_tag(type(value)), repr(value).encode())


def _path(value: Any) -> bytes:
    flavour = "windows" if isinstance(value, pathlib.PureWindowsPath) else "posix"
    return _hash(b"path:", _sequence((flavour, isinstance(value, pathlib.Path), str(value))))


_PATHS = ("PurePath", "PurePosixPath", "PureWindowsPath", "Path", "PosixPath", "WindowsPath")
_FOREIGN: dict[str, Encoder] = {
    "decimal.Decimal": _repr,
    "fractions.Fraction": _repr,
    "numpy.dtype": _repr,
    "numpy.MaskedArray": _masked_array,
    "numpy.generic": _numpy_scalar,
    "numpy.memmap": _ndarray,
    "numpy.ndarray": _ndarray,
    "numpy.ufunc": _repr,
    "pandas.DataFrame": _frame,
    "pandas.Index": _index,
    "pandas.Series": _series,
    **dict.fromkeys((f"pathlib.{kind}" for kind in _PATHS), _path),
    "pandas.NAType": _repr,
    "pandas.NaTType": _repr,
    "uuid.UUID": _repr,
    "zoneinfo.ZoneInfo": lambda value: _hash(b"zoneinfo:", str(value.key).encode()),
}

# SPDX-License-Identifier: Apache-2.0
"""Digests of the data, classes and instances that code refers to; functions and modules are digested elsewhere.

For an instance of a user's own class, the class with its bases and methods counts, and everything that the instance
holds. For an instance of a package's class, the class's name counts, and either the content of a known type (arrays,
tables, dates), or the recipe by which pickle would rebuild the instance, or its attributes. An object that has none of
these has no content to digest.
"""

from __future__ import annotations

import contextlib
import contextvars
import copyreg
import enum
import functools
import gc
import operator
import re
import sys
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from cuda_progcache.memo import watching
from cuda_progcache.memo.digest import Indigestible, content_as, digest, is_foreign, is_taught
from cuda_progcache.memo.modules import (
    STANDARD_LIBRARY,
    Package,
    hash_parts,
    package_of_file,
    package_of_module,
)

_MISSING = watching.MISSING
#: Members that Python itself adds to a class, or derives from the other members.
_FURNITURE = frozenset(
    ["__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__",
     "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__slotnames__",
     "__abstractmethods__", "_abc_impl", "__dataclass_fields__", "__dataclass_params__", "__orig_bases__",
     "__parameters__", "__type_params__", "_is_protocol", "__protocol_attrs__", "_is_runtime_protocol",
     "__non_callable_proto_members__", "__classdictcell__", "__classcell__"]
)  # fmt: skip
#: Members that the metaclass of an enumeration derives from the enumeration's members.
_ENUM_FURNITURE = frozenset(
    ["_member_names_", "_member_map_", "_value2member_map_", "_member_type_", "_value_repr_", "_unhashable_values_",
     "_unhashable_values_map_", "_hashable_values_", "_use_args_", "_flag_mask_", "_singles_mask_", "_all_bits_",
     "_boundary_", "_inverted_", "_new_member_", "__new_member__", "_sunder_names_", "_add_alias_", "_add_value_alias_"]
)  # fmt: skip
#: Methods that ``dataclasses`` generates from the fields.
_GENERATED = frozenset(
    ["__init__", "__repr__", "__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__", "__setattr__",
     "__delattr__", "__replace__", "__getstate__", "__setstate__"]
)  # fmt: skip
#: Classes of the standard library whose instances are tools, not inputs, by module and name.
_TOOLS = frozenset(
    ["_thread.lock", "_thread.RLock", "threading._RLock", "threading.Condition", "threading.Event",
     "threading.Semaphore", "threading.Barrier", "threading.Thread", "io._IOBase", "_io._IOBase", "io.IOBase",
     "_socket.socket", "socket.socket", "concurrent.futures._base.Executor", "concurrent.futures._base.Future",
     "asyncio.events.AbstractEventLoop", "asyncio.locks.Lock", "asyncio.locks.Event", "asyncio.locks.Semaphore",
     "_asyncio.Future", "_asyncio.Task", "subprocess.Popen", "sqlite3.Connection", "_ssl._SSLContext", "ssl.SSLContext",
     "weakref.WeakKeyDictionary", "weakref.WeakSet", "weakref.WeakValueDictionary", "builtins.frame",
     "builtins.traceback", "logging.Handler", "logging.Filterer", "multiprocessing.synchronize.SemLock",
     "multiprocessing.pool.Pool", "contextvars.Context", "_contextvars.Context", "builtins.Context"]
)  # fmt: skip
#: Types whose values don't change, though they are compared by identity.
_FIXED = (operator.itemgetter, operator.attrgetter, operator.methodcaller, re.Pattern)
_LRU_CACHE = type(functools.lru_cache(len))
_DESCRIPTORS = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_MUTABLE = 1 << 8  # Py_TPFLAGS_IMMUTABLETYPE, set in types that C code made
_HEAP = 1 << 9


class Instances:
    """The part of a walk that digests data, classes and instances."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.packages: dict[str, str] = {}
        self.watches: list[watching.Watch] = []
        self.state: frozenset[tuple[int, str] | int] = frozenset()
        self.subclasses = False
        self._name = ""
        self._met: dict[int, int] = {}
        self._active: dict[int, int] = {}
        self._done: dict[int, bytes] = {}
        self._kept: list[Any] = []  # keeps objects alive, so that no id is reused during the walk
        self._apart: set[int] = set()
        self._reach = 0

    # Packages and watches

    def note(self, package: Package) -> None:
        """Note that a package is used."""
        if package.name:
            self.packages[package.name] = package.version

    def watch(self, ask: Callable[[], Any], *, by_value: bool = False) -> Any:
        """Add a watch on what an object holds (see :class:`~watching.Watch`); return what it holds now."""
        found = ask() if by_value else tuple(ask())
        self.watches.append(watching.Watch(ask, found, by_value, self._name))
        return found

    def watch_items(self, mapping: Mapping[Any, Any]) -> None:
        """Add a watch on the keys and values of a mapping."""
        if self.watch(lambda: mapping):
            self.watch(mapping.values)

    def watch_name(self, namespace: Mapping[str, Any], name: str) -> Any:
        """Add a watch on what a name is bound to; return the object, or ``MISSING``."""
        return self.watch(lambda: (namespace.get(name, _MISSING),))[0]

    @contextlib.contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Record that everything met inside this block is reached through a name."""
        around = self._name
        self._name = f"{around}.{name}" if around and around.count(".") < 3 else around or name
        try:
            yield
        finally:
            self._name = around

    def again(self, value: Any) -> bytes | None:
        """Return the digest that stands for a function or class met before; None if it wasn't met before."""
        number = self._met.get(id(value))
        if number is not None:
            return hash_parts("again", str(number))
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        return None

    def data(self, value: Any, parts: Callable[[], Iterable[str | bytes]]) -> bytes:
        """Digest data that may contain itself; one shared part or several equal parts give the same digest."""
        slot, depth = id(value), len(self._active)
        if slot in self._done:
            return self._done[slot]
        if slot in self._active:
            self._reach = min(self._reach, self._active[slot])
            return hash_parts("cycle", str(depth - self._active[slot]))
        self._active[slot] = depth
        outside, self._reach = self._reach, depth
        try:
            made = hash_parts(*parts())
        finally:
            del self._active[slot]
        if self._reach >= depth:  # no part refers to an enclosing object, so the digest is the same everywhere
            self._done[slot] = made
            self._kept.append(value)
        self._reach = min(outside, self._reach)
        return made

    def alone(self, value: Any) -> bytes:
        """Digest an element of an unordered collection as if it were the first object met."""
        if type(value) in watching.ATOMS:
            return digest(value).encode()
        if id(value) in self._apart:
            return hash_parts("cycle")
        self._apart.add(id(value))
        around = self._met, self._active, self._done, self._reach
        self._met, self._active, self._done, self._reach = {}, {}, {}, 0
        try:
            return self.value(value)
        finally:
            self._met, self._active, self._done, self._reach = around
            self._apart.discard(id(value))

    def value(self, value: Any) -> bytes:
        """Digest any value except functions and modules, as 64 hex digits."""
        kind = type(value)
        if kind in watching.ATOMS:
            return digest(value).encode()
        handler = _HANDLERS.get(kind)
        if handler is not None:
            found: bytes = handler(self, value)
            return found
        return self.kind(value) if isinstance(value, type) else self.instance(value)

    # Data

    def _collection(self, value: Any) -> bytes:
        if value is sys.modules:
            return hash_parts("sys.modules")
        return self.data(value, lambda: self._builtin_content(value, type(value)))

    def _pairs(self, value: Any, *, ordered: bool = False) -> Iterable[bytes]:
        # In the order of the keys' digests, so that the order of encounters doesn't depend on the order of insertion.
        pairs = [(self.alone(key), item) for key, item in dict.items(value)]
        for key, item in pairs if ordered else sorted(pairs, key=operator.itemgetter(0)):
            yield key
            yield self.value(item)

    def variables(self, names: Iterable[str] | None) -> bytes:
        """Digest environment variables; all of them if ``names`` is None."""
        known = None if names is None else tuple(sorted(names))
        found = self.watch(lambda: watching.variables(known), by_value=True)
        return hash_parts("environment", digest(found))

    # Callables that hold others

    def _method(self, value: types.MethodType) -> bytes:
        if self._is_a_modules_own(value, getattr(value.__func__, "__name__", "")):
            return hash_parts("name of a module", type(value.__self__).__module__, value.__func__.__name__)
        return hash_parts("method", self.value(value.__func__), self.value(value.__self__))

    def _builtin(self, value: types.BuiltinFunctionType) -> bytes:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            package = package_of_module(str(value.__module__))
            if package is not None:
                self.note(package)
            # The module of C code differs between versions: open() was in io and is in _io.
            return hash_parts("builtin", str(value.__module__).lstrip("_"), value.__qualname__)
        if self._is_a_modules_own(value, value.__name__):
            return hash_parts("name of a module", type(owner).__module__, value.__name__)
        return hash_parts("builtin", value.__qualname__, self.value(owner))

    def _is_a_modules_own(self, value: Any, name: str) -> bool:
        """Return whether a package's module has this bound method as an attribute, such as ``random.sample``.

        Such a method counts as a function of the module; the object that it is bound to is the package's internal
        state.
        """
        module = sys.modules.get(type(value.__self__).__module__)
        package = None if module is None else package_of_module(module.__name__, module)
        if package is None or getattr(module, name, None) != value:
            return False
        self.note(package)
        return True

    def _partial(self, value: functools.partial[Any]) -> bytes:
        return hash_parts("partial", self.value(value.func), self.value(value.args), self.value(value.keywords))

    def _wrapped(self, value: Any) -> bytes:
        return hash_parts(type(value).__name__, self.value(value.__func__))

    def _property(self, value: property) -> bytes:
        return hash_parts("property", self.value(value.fget), self.value(value.fset), self.value(value.fdel))

    def _descriptor(self, value: Any) -> bytes:
        owner = value.__objclass__
        return hash_parts("descriptor", f"{owner.__module__}.{owner.__qualname__}", value.__name__)

    def _lru_cache(self, value: Any) -> bytes:
        # Not __wrapped__, which anyone can set. The cached results aren't an input.
        inner = [held for held in gc.get_referents(value) if callable(held) and not isinstance(held, type)]
        return hash_parts("lru_cache", *map(self.value, inner))

    def _reference(self, value: Any) -> bytes:
        (found,) = self.watch(lambda: (value(),))
        return hash_parts("weak reference", self.value(found))

    def _context_variable(self, value: contextvars.ContextVar[Any]) -> bytes:
        def ask() -> tuple[Any]:
            try:
                return (value.get(),)
            except LookupError:
                return (_MISSING,)

        (found,) = self.watch(ask)
        return hash_parts("context variable", "" if found is _MISSING else self.value(found))

    def _alias(self, value: Any) -> bytes:
        return self.data(value, lambda: ("alias", self.value(value.__origin__), self.value(value.__args__)))

    def _sentinel(self, value: object) -> bytes:
        """Digest an ``object()``, which has an identity but no content."""
        if self.strict:
            raise Indigestible(value)
        return self.again(value) or hash_parts("object", str(self._met[id(value)]))

    # Classes

    def kind(self, kind: type) -> bytes:
        """Digest a class: by its members if it is the user's own, otherwise by its name."""
        label = f"{kind.__module__}.{kind.__qualname__}"
        package = package_of_class(kind)
        if package is not None:
            self.note(package)
            return hash_parts("class", label)
        again = self.again(kind)
        if again is not None:
            return again
        self.watch(lambda: kind.__bases__)
        self.watch_items(vars(kind))
        strict, self.strict = self.strict, False  # objects that a class uses, such as a lock, needn't be values
        try:
            return hash_parts(*self._class(kind, label))
        finally:
            self.strict = strict

    def _class(self, kind: type, label: str) -> list[str | bytes]:
        parts: list[str | bytes] = ["class", label, self.kind(type(kind))]
        parts += [self.kind(base) for base in kind.__bases__]
        for parameter in ("init", "eq", "order", "unsafe_hash", "frozen"):
            params = vars(kind).get("__dataclass_params__")
            parts.append(str(getattr(params, parameter, None)))
        for name, field in (vars(kind).get("__dataclass_fields__") or {}).items():
            flags = f"{field.init} {field.compare} {field.hash} {field.kw_only} {field._field_type}"
            parts += [name, flags, self.value(field.default), self.value(field.default_factory)]
        with self.under(kind.__name__):
            for name, member in _own_members(kind):
                if (id(kind), name) in self.state:
                    continue
                with self.under(name):
                    parts += [name, self.value(member)]
        if self.subclasses:
            parts += sorted(map(self.alone, self.watch(lambda: type.__subclasses__(kind))))
        return parts

    # Instances

    def instance(self, value: Any) -> bytes:
        """Digest an object: its class and its content."""
        kind = type(value)
        told = getattr(kind, watching.COUNTS, None)
        if told is not None:
            return self.data(value, lambda: ("cached", self.value(told(value))))
        if _is_tool(kind):
            if self.strict:
                raise Indigestible(value)
            # The content of a logger, lock, open file or connection isn't an input that could be compared.
            return hash_parts(
                "tool", self.kind(kind), str(getattr(value, "name", "")) if "Logger" in kind.__name__ else ""
            )
        if self.strict and isinstance(value, Iterator):  # a look at its content may use it up
            raise Indigestible(value)
        return self.data(value, lambda: ("instance", self.kind(kind), *self._content(value, kind)))

    def _content(self, value: Any, kind: type) -> Iterable[str | bytes]:
        if is_taught(kind):
            return [self._leaf(value)]
        if isinstance(value, enum.Enum):
            return ["member", str(value.name), self.value(value._value_)]
        if kind.__name__ == "ufunc" and kind.__module__ == "numpy":
            return [repr(value), *(self.value(held) for held in gc.get_referents(value) if callable(held))]
        package = package_of_class(kind)
        parts: list[str | bytes] = list(self._builtin_content(value, kind))
        if not parts and is_foreign(kind):
            try:
                parts = [self._leaf(value)]
            except Indigestible:  # an array that holds objects
                parts = []
        if package is not None and parts:
            return [*parts, *self._state(value, kind)]
        made = None if package is None and (parts or not _has_foreign_base(kind)) else self._recipe(value)
        if package is None:
            return [*parts, *(made or ()), *self._state(value, kind)]
        if made is not None:
            return [*parts, *made]
        if package.name == __name__.partition(".")[0]:
            if self.strict:
                raise Indigestible(value)
            return ["service"]  # an object of this package, whose content isn't an input
        if not hasattr(value, "__dict__") and not _slots(kind):
            raise Indigestible(value)
        return [*parts, *self._state(value, kind)]

    def _leaf(self, value: Any) -> bytes:
        def take() -> bytes:
            return digest(value).encode()

        found: bytes = self.watch(take, by_value=True) if _can_change(value) or is_taught(type(value)) else take()
        return found

    def _builtin_content(self, value: Any, kind: type) -> Iterable[str | bytes]:
        """Yield the content that an instance of a built-in type, or of its subclass, has as that type."""
        if isinstance(value, dict):
            self.watch_items(value)
            yield b"mapping"
            yield self.value(getattr(value, "default_factory", None))
            yield from self._pairs(value, ordered=isinstance(value, OrderedDict))
        elif isinstance(value, (list, tuple, deque)):
            if not isinstance(value, tuple):
                self.watch(lambda: value)
            fields = getattr(kind, "_fields", "")
            yield f"{'tuple' if isinstance(value, tuple) else 'list'} {fields!r} {getattr(value, 'maxlen', '')}"
            yield from map(self.value, tuple(value))
        elif isinstance(value, (set, frozenset)):
            if isinstance(value, set):
                self.watch(lambda: value)
            yield "set" if isinstance(value, set) else "frozenset"
            yield from sorted(map(self.alone, value))
        elif isinstance(value, (str, bytes, bytearray, int, float, complex)):
            yield from ("scalar", content_as(value))
        elif isinstance(value, types.MappingProxyType):
            self.watch_items(value)
            yield from ("proxy", self.value(dict(value)))

    def _state(self, value: Any, kind: type) -> list[str | bytes]:
        """Return the digests of an instance's attributes, by name."""
        attributes = getattr(value, "__dict__", None)
        attributes = attributes if isinstance(attributes, dict) else {}
        slots = _slots(kind)

        self.watch(
            lambda: (type(value), getattr(value, "__dict__", None), *(getattr(value, name, _MISSING) for name in slots))
        )
        self.watch_items(attributes)
        everything = attributes | {name: getattr(value, name) for name in slots if hasattr(value, name)}
        parts: list[str | bytes] = ["state"]
        for name, held in sorted(everything.items(), key=lambda item: str(item[0])):
            if (id(attributes), name) not in self.state and name != "__orig_class__":
                parts += [str(name), self.value(held)]
        return parts

    def _recipe(self, value: Any) -> list[str | bytes] | None:
        """Digest the recipe by which pickle would rebuild an object; None if there is none or it can't be digested."""
        recipe = _pickled(value)
        if recipe is None:
            return None
        strict, active, reach = self.strict, dict(self._active), self._reach
        self.strict = True
        try:
            made = [self.value(part) for part in recipe]
        except Indigestible:
            self._active, self._reach = active, reach
            return None
        finally:
            self.strict = strict

        def take() -> bytes:
            walker = type(self)(strict=True)
            return hash_parts(*map(walker.value, _pickled(value) or ()))

        if not isinstance(value, _FIXED) and _can_change(value):
            self.watch(take, by_value=True)
        return ["recipe", *made]


_HANDLERS: dict[type, Any] = {
    types.MethodType: Instances._method,
    types.BuiltinFunctionType: Instances._builtin,
    functools.partial: Instances._partial,
    staticmethod: Instances._wrapped,
    classmethod: Instances._wrapped,
    property: Instances._property,
    **dict.fromkeys((list, tuple, dict, set, frozenset), Instances._collection),
    object: Instances._sentinel,
    _LRU_CACHE: Instances._lru_cache,
    weakref.ref: Instances._reference,
    contextvars.ContextVar: Instances._context_variable,
    types.GenericAlias: Instances._alias,
    **dict.fromkeys(_DESCRIPTORS, Instances._descriptor),
    **dict.fromkeys((bytearray, range, slice), Instances._leaf),
}


def _can_change(value: Any) -> bool:
    """Return whether a value may change in place: it isn't hashable by content (arrays, tables, records)."""
    by_content: object = type(value).__hash__
    return by_content is None or by_content is object.__hash__


def _is_tool(kind: type) -> bool:
    return any(f"{base.__module__}.{base.__qualname__}" in _TOOLS for base in kind.__mro__)


_classes: weakref.WeakKeyDictionary[type, Package | None] = weakref.WeakKeyDictionary()


def package_of_class(kind: type) -> Package | None:
    """Return the package that a class belongs to; None if it is the user's own, whatever its ``__module__`` says."""
    if kind not in _classes:
        _classes[kind] = _find_package(kind)
    return _classes[kind]


def _find_package(kind: type) -> Package | None:
    module = sys.modules.get(kind.__module__)
    package = package_of_module(kind.__module__, module)
    if package is None:
        return None
    found: Any = module
    for part in kind.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if found is kind or not kind.__flags__ & _HEAP or kind.__flags__ & _MUTABLE:
        return package
    # The class isn't found under its name: it is private to the package, or not the package's. Its methods' files tell.
    for member in vars(kind).values():
        code = getattr(getattr(member, "__func__", member), "__code__", None)
        if code is not None and not code.co_filename.startswith("<string"):
            return package_of_file(code.co_filename)
    return None


def _has_foreign_base(kind: type) -> bool:
    """Return whether a user's class has a package's class as a base, which may hold content outside its attributes."""
    return any(base is not object and package_of_class(base) is not None for base in kind.__mro__)


def _own_members(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the members that a class's author wrote, without those that Python, ``dataclasses`` and ``enum`` add."""
    members = kind.__members__ if issubclass(kind, enum.Enum) else {}
    yield from ((name, member._value_) for name, member in members.items())
    fields = "__dataclass_fields__" in vars(kind)
    for name, member in sorted(vars(kind).items()):
        code = getattr(member, "__code__", None)
        if name in _FURNITURE or name in members:
            continue
        if fields and name in _GENERATED and (code is None or _is_generated(code.co_filename)):
            continue
        if issubclass(kind, enum.Enum) and (name in _ENUM_FURNITURE or _of_enum(member)):
            continue
        yield name, member


def _is_generated(filename: str) -> bool:
    return filename.startswith("<") or package_of_file(filename) == STANDARD_LIBRARY


def _of_enum(member: Any) -> bool:
    code = getattr(getattr(member, "__func__", member), "__code__", None)
    return type(member) is enum.property or (
        code is not None and code.co_filename == enum.Enum.__init__.__code__.co_filename
    )


def _pickled(value: Any) -> tuple[Any, ...] | None:
    """Return the recipe by which pickle would rebuild an object, such as a compiled pattern; None if there is none."""
    taught = copyreg.dispatch_table.get(type(value))
    try:
        made = value.__reduce_ex__(4) if taught is None else taught(value)
    except Exception:  # noqa: BLE001 - the class's own code may raise anything; such an object has no recipe
        return None
    if not isinstance(made, tuple):
        return (made,)
    return tuple(list(part) if isinstance(part, Iterator) else part for part in made[:5])


@functools.lru_cache(maxsize=1000)
def _slots(kind: type) -> tuple[str, ...]:
    found = []
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            if name not in {"__dict__", "__weakref__"}:
                private = name.startswith("__") and not name.endswith("__")
                found.append(f"_{base.__name__.lstrip('_')}{name}" if private else name)
    return tuple(found)

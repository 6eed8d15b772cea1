# SPDX-License-Identifier: Apache-2.0
"""What a function does, as a digest: its code, and all that the code refers to, recursively.

What counts: the body, defaults, closure variables and globals that it names;
of those the values, and of functions and classes again what they do. Of a
module, the attributes that are named. The standard library doesn't count, an
installed package by its version, a module of one's own that is imported inside
the function by its source and that of the modules it imports. A variable that
the code itself binds or changes (``global n; n += 1``, ``seen.append(x)``,
``table[x] = y``) is its state and no input, and doesn't count.

No name of a file, line number, memory address or order of a set goes in, so
the digest is the same in every process, and, where the source is at hand, from
every interpreter.
"""

from __future__ import annotations

import builtins
import copyreg
import enum
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from cuda_progcache.memo.digest import Digest, Indigestible, digest
from cuda_progcache.memo.modules import _hash, local_source, version_of
from cuda_progcache.memo.references import references_of

#: Of wrappers that add caching and nothing else (a function's attribute, a class's method): what counts is the function
#: inside, and what this holds or gives.
TRANSPARENT = "__cache_file__"

_MISSING = object()


def get_recursive_closure_hash(function: Any) -> str:
    """Digest of all that decides what a function does, but for its arguments and files.

    Parameters
    ----------
    function : callable
        A function, lambda, bound method, class, partial, built-in function or an instance with ``__call__``.

    Returns
    -------
    str
        64 hex digits (SHA-256).

    Raises
    ------
    Indigestible
        It refers to data nested too deep to be walked.
    """
    return closure(function).digest


class Closure(NamedTuple):
    """What a function depends on.

    Attributes
    ----------
    digest : str
        SHA-256 (hex) over all of it.
    packages : dict
        Versions of the packages that it uses, by top-level module name.
    bindings : tuple
        What names are bound to: a getter, its arguments, and what it gave.
    contents : tuple
        Data among it that can change in place, and its digest.
    """

    digest: str
    packages: dict[str, str]
    bindings: tuple[tuple[Callable[..., Any], tuple[Any, ...], Any], ...] = ()
    contents: tuple[tuple[Any, Digest], ...] = ()

    @property
    def with_packages(self) -> Digest:
        """The digest, with the packages' versions."""
        return digest((self.digest, self.packages)) if self.packages else Digest(self.digest)

    def holds(self) -> bool:
        """Whether all of it is as it was, as far as this process can change it: bindings, code, content of data.

        Of instances of unknown classes (locks, models, connections) the content is looked at once, not again.
        """
        for get, arguments, value in self.bindings:
            if get(*arguments) is not value:
                return False
        try:
            return all(digest(value) == before for value, before in self.contents)
        except Indigestible:
            return False


def closure(function: Any) -> Closure:
    """As :func:`get_recursive_closure_hash`, with the packages met on the way."""
    walker = _Walker()
    try:
        found = walker.value(function)
    except RecursionError:
        raise Indigestible(function, f"can't digest what {function!r} refers to: it is nested too deep") from None
    except RuntimeError as error:  # a dict or set that another thread changes
        raise Indigestible(function, f"can't digest what {function!r} refers to just now: {error}") from None
    contents = []
    for value in walker.contents.values():
        try:
            contents.append((value, digest(value)))
        except Indigestible:
            continue  # it holds something of which the content can't be trusted
    bindings = tuple(walker.bindings.values())
    return Closure(found.decode(), dict(sorted(walker.packages.items())), bindings, tuple(contents))


def argument_digest(value: Any) -> Digest:
    """Digest of an argument: as :func:`~cuda_progcache.memo.digest.digest`, with functions by all they refer to.

    Raises
    ------
    Indigestible
        It, or something in it, has no content that could be hashed.
    """
    walker = _Walker(strict=True)
    try:
        return Digest(walker.value(value).decode())
    except RecursionError:
        raise Indigestible(value, f"can't digest a {type(value).__qualname__} that is nested too deep") from None


class _Walker:
    """One walk. Functions and classes met again are named by when they were met first; data by its content."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.packages: dict[str, str] = {}
        self.bindings: dict[tuple[Any, ...], tuple[Callable[..., Any], tuple[Any, ...], Any]] = {}
        self.contents: dict[int, Any] = {}
        self._changeable = False  # whether data that can change in place was met below the name that is looked at
        self._met: dict[int, int] = {}
        self._active: dict[int, int] = {}
        self._done: dict[int, bytes] = {}
        self._kept: list[Any] = []  # so that no id is used twice during the walk
        self._reach = 0

    def _again(self, value: Any) -> bytes | None:
        """What stands for a function or class met before; None for a new one."""
        number = self._met.get(id(value))
        if number is not None:
            return _hash("again", str(number))
        self._met[id(value)] = len(self._met)
        self._kept.append(value)
        return None

    def _data(self, value: Any, parts: Callable[[], Iterable[str | bytes]]) -> bytes:
        """Digest of data that may contain itself; whether parts of it are one object or equal ones makes no odds."""
        slot, depth = id(value), len(self._active)
        if slot in self._done:
            return self._done[slot]
        if slot in self._active:
            self._reach = min(self._reach, self._active[slot])
            return _hash("cycle", str(depth - self._active[slot]))
        self._active[slot] = depth
        outside, self._reach = self._reach, depth
        made = _hash(*parts())
        del self._active[slot]
        if self._reach >= depth:  # nothing in it refers to what is around it: it is the same wherever it stands
            self._done[slot] = made
            self._kept.append(value)
        self._reach = min(outside, self._reach)
        return made

    def value(self, value: Any) -> bytes:
        """Digest of any value, as 64 hex digits."""
        handler = _HANDLERS.get(type(value))
        if handler is not None:
            found: bytes = handler(self, value)
            return found
        if isinstance(value, type):
            return self.type(value)
        if isinstance(value, types.ModuleType):
            return self.module(value, ())
        return self.instance(value)

    def function(self, function: types.FunctionType) -> bytes:
        told = getattr(function, TRANSPARENT, None)
        if told is not None:
            return _hash("cached", self.value(told), self.value(function.__wrapped__))  # type: ignore[attr-defined]
        if self.external(function.__module__):
            return _hash("function", str(function.__module__), function.__qualname__)
        again = self._again(function)
        if again is not None:
            return again
        read = references_of(function)
        self._bound(function, getattr, function, "__code__")
        parts: list[str | bytes] = ["function", read.identity]
        parts.append(self.attributes(function.__defaults__, ()))
        parts.append(self.attributes(function.__kwdefaults__, ()))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        for name, attributes in read.names:
            found = self.name(name, cells, function.__globals__)
            parts += [name, ".".join(attributes), self.attributes(found, attributes)]
        for name in read.imports:
            parts += ["import", name, self.imported(name)]
        return _hash(*parts)

    def name(self, name: str, cells: Mapping[str, types.CellType], namespace: Mapping[str, Any]) -> Any:
        if name in cells:
            return self._bound(cells[name], _content, cells[name])
        found = self._bound(namespace, namespace.get, name, _MISSING)
        return getattr(builtins, name, _MISSING) if found is _MISSING else found

    def _bound(self, owner: object, get: Callable[..., Any], *arguments: Any) -> Any:
        """What a name of a function, cell, namespace, module or class is bound to; noted."""
        value = get(*arguments)
        self.bindings[id(owner), *(name for name in arguments if type(name) is str)] = (get, arguments, value)
        return value

    def attributes(self, value: Any, attributes: tuple[str, ...]) -> bytes:
        """Digest of a value of which only some attributes are read."""
        if value is _MISSING:
            return _hash("missing")
        if isinstance(value, types.ModuleType):
            return self.module(value, attributes)
        if attributes and type(value) is types.SimpleNamespace:
            return self.attributes(self._bound(value, getattr, value, attributes[0], _MISSING), attributes[1:])
        around, self._changeable = self._changeable, False
        made = self.value(value)
        if self._changeable:
            self.contents[id(value)] = value
        self._changeable = around
        return made

    def module(self, module: types.ModuleType, attributes: tuple[str, ...]) -> bytes:
        name = module.__name__
        if self.external(name, module):
            return _hash("module", name)
        if attributes:
            return self.attributes(self._bound(module, getattr, module, attributes[0], _MISSING), attributes[1:])
        return _hash("module", name, self.imported(name))

    def imported(self, name: str) -> bytes:
        """Digest of a module that code imports when it runs."""
        if self.external(name, sys.modules.get(name)):
            return _hash("external")
        return local_source(name)

    def external(self, name: str | None, module: types.ModuleType | None = None) -> bool:
        """Whether a module is of the standard library or an installed package; notes the package's version."""
        top = (name or "").partition(".")[0]
        if top in sys.stdlib_module_names or top == "builtins":
            return True
        if not top or top == "__main__":
            return False
        version = version_of(top)
        if version is None:
            given = getattr(module, "__version__", None) if module is not None and module.__spec__ is None else None
            if given is None:
                return False  # a module of one's own
            version = str(given)
        self.packages[top] = version
        return True

    def type(self, kind: type) -> bytes:
        label = f"{kind.__module__}.{kind.__qualname__}"
        if self.external(kind.__module__):
            return _hash("class", label)
        again = self._again(kind)
        if again is not None:
            return again
        parts: list[str | bytes] = ["class", label]
        parts += [self.type(base) for base in kind.__bases__]
        fields = vars(kind).get("__dataclass_fields__")
        if fields is not None:
            params = vars(kind)["__dataclass_params__"]
            parts.append(f"{params.eq} {params.order} {params.frozen} {params.unsafe_hash}")
        for name, field in (fields or {}).items():
            parts += [name, self.value(field.default), self.value(field.default_factory)]
        for name, member in _own_members(kind):
            self._bound(kind, vars(kind).get, name)
            parts += [name, self.attributes(member, ())]
        return _hash(*parts)

    def method(self, method: types.MethodType) -> bytes:
        return _hash("method", self.value(method.__func__), self.value(method.__self__))

    def instance(self, value: Any) -> bytes:
        """An object: its class, and its content as far as that can be known."""
        kind = type(value)
        # Not by getattr: there are objects, as unittest.mock.call, that have every attribute they are asked for.
        inner = getattr(value, "__dict__", {}).get("__wrapped__")
        told = getattr(kind, TRANSPARENT, None)
        if told is not None:
            return self._data(value, lambda: ("cached", self.value(told(value)), self.value(inner)))
        own = not self.external(kind.__module__)
        behind = self.type(kind)
        try:
            content = digest(value)
        except Indigestible:
            content = None
        if callable(inner):  # functools.lru_cache and its like
            return self._data(value, lambda: ("wrapper", behind, content or "", self.value(inner)))
        if content is not None:
            # What can't be hashed by content can change in place: arrays, tables, records.
            by_content: object = kind.__hash__
            self._changeable |= by_content is None or by_content is object.__hash__
            return _hash("instance", behind, content)
        state = _state(value) if own else None
        if state is not None:
            return self._data(value, lambda: ("object", behind, *(p for n, v in state for p in (n, self.value(v)))))
        made = self._by_recipe(value, behind)
        if made is not None:
            return made
        if self.strict:
            raise Indigestible(value)
        # A lock, an open file, a connection: what it holds is no input that could be compared.
        return _hash("opaque", behind)

    def _by_recipe(self, value: Any, behind: bytes) -> bytes | None:
        """Digest of what pickle would make an object of again; None where it can't, or part of that has no content.

        What holds a lock or a connection somewhere is a service, and no value.
        """
        recipe = _recipe(value)
        if recipe is None:
            return None
        strict, active, reach = self.strict, dict(self._active), self._reach
        self.strict = True
        try:
            return self._data(value, lambda: ("recipe", behind, *(self.value(part) for part in recipe)))
        except Indigestible:
            self._active, self._reach = active, reach
            return None
        finally:
            self.strict = strict

    def sequence(self, value: Any) -> bytes:
        self._changeable |= type(value) is list
        return self._data(value, lambda: (type(value).__name__, *(self.value(element) for element in value)))

    def mapping(self, value: dict[Any, Any]) -> bytes:
        self._changeable = True
        # In the order of the keys' digests: what is met first must not depend on the order of filling.
        pairs = sorted(((_Walker(strict=self.strict).value(key), item) for key, item in value.items()), key=_first)
        return self._data(value, lambda: ("dict", *(part for key, item in pairs for part in (key, self.value(item)))))

    def unordered(self, value: Any) -> bytes:
        self._changeable |= type(value) is set
        return _hash(type(value).__name__, *sorted(_Walker(strict=self.strict).value(element) for element in value))

    def partial(self, value: functools.partial[Any]) -> bytes:
        return _hash("partial", self.value(value.func), self.value(value.args), self.value(value.keywords))

    def wrapped(self, value: Any) -> bytes:
        return _hash(type(value).__name__, self.value(value.__func__))

    def property(self, value: property) -> bytes:
        return _hash("property", self.value(value.fget), self.value(value.fset), self.value(value.fdel))

    def builtin(self, value: types.BuiltinFunctionType) -> bytes:
        owner = value.__self__
        if owner is None or isinstance(owner, types.ModuleType):
            self.external(value.__module__)
            # Where C code lives moves between versions: open() was of io, and is of _io.
            return _hash("builtin", str(value.__module__).lstrip("_"), value.__qualname__)
        return _hash("builtin", value.__qualname__, self.value(owner))

    def plain(self, value: Any) -> bytes:
        self._changeable |= type(value) is bytearray
        return digest(value).encode()


def _first(pair: tuple[bytes, Any]) -> bytes:
    return pair[0]


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING  # not filled yet


#: Of a class: what Python puts there by itself.
_CLASS_FURNITURE = {
    "__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__slotnames__",
    "__abstractmethods__", "_abc_impl", "__dataclass_fields__", "__dataclass_params__",
    "__match_args__", "__replace__",
}  # fmt: skip

_HANDLERS: dict[type, Any] = {
    types.FunctionType: _Walker.function,
    types.MethodType: _Walker.method,
    types.BuiltinFunctionType: _Walker.builtin,
    functools.partial: _Walker.partial,
    staticmethod: _Walker.wrapped,
    classmethod: _Walker.wrapped,
    property: _Walker.property,
    list: _Walker.sequence,
    tuple: _Walker.sequence,
    dict: _Walker.mapping,
    set: _Walker.unordered,
    frozenset: _Walker.unordered,
    **dict.fromkeys((int, float, str, bytes, bool, complex, type(None), bytearray, range, slice), _Walker.plain),
}


def _own_members(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class's author wrote: not what Python, ``dataclasses`` and ``enum`` add, which differs by version."""
    members = kind.__members__ if issubclass(kind, enum.Enum) else {}
    yield from ((name, member.value) for name, member in members.items())
    made = "__dataclass_fields__" in vars(kind)
    for name, member in sorted(vars(kind).items()):
        if name in _CLASS_FURNITURE or name in members or (made and _filename(member) == "<string>"):
            continue  # a dataclass's methods follow from its fields
        of_enum = getattr(member, "__module__", None) == "enum" or (name[0] == name[-1] == "_" != name[1])
        if not (issubclass(kind, enum.Enum) and of_enum):
            yield name, member


def _filename(function: Any) -> str | None:
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    return getattr(code, "co_filename", None)


def _recipe(value: Any) -> tuple[Any, ...] | None:
    """How pickle would make an object again, such as a compiled pattern; None where it can't or must not be asked."""
    if isinstance(value, Iterator):
        return None  # asking may use it up
    taught = copyreg.dispatch_table.get(type(value))
    try:
        made = value.__reduce_ex__(4) if taught is None else taught(value)
    except Exception:  # noqa: BLE001 - any class's own code; what can't be taken apart is opaque
        return None
    return tuple(made[:3]) if isinstance(made, tuple) else (made,)


def _state(value: Any) -> list[tuple[str, Any]] | None:
    """Attributes of an instance of a class of one's own, sorted; None where it hasn't any place for them."""
    slots = [n for kind in type(value).__mro__ for n in _slots(kind)]
    attributes = getattr(value, "__dict__", None)
    if attributes is None and not slots:
        return None
    found = dict(attributes or {})
    found.update({name: getattr(value, name) for name in slots if hasattr(value, name)})
    return sorted(found.items())


def _slots(kind: type) -> Iterable[str]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else slots
    return [name for name in names if name not in {"__dict__", "__weakref__"}]

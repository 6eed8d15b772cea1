# SPDX-License-Identifier: Apache-2.0
"""The digest of what a function does: its code and, recursively, everything that the code refers to.

These parts count: the function's body, defaults and attributes, and the closure variables and globals that the body
names. Data count by value; functions, classes and instances count in turn by what they do and hold. All of them count
as they are loaded; ``__module__``, ``__wrapped__`` and the source that is on disk now make no difference.

A user's own module counts by the attributes that the code names, or as a whole if the code uses it in another way. The
same is true of a module that the function imports in its body; until it is loaded, it counts by its source. An
installed package counts by its version; the standard library doesn't count. Environment variables count if the code
reads them by name; if the names can't be determined, all variables count.

Nothing is left out because the code changes it; objects that are only the code's own state must be declared
(``state``). Comments, layout, docstrings and annotations that aren't read, file names, line numbers, memory addresses
and the order of a set don't count. So the digest is the same in every process and, if the source is available, in
every interpreter. Locks, files, threads and the like count only by their class: they are tools, not inputs.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import os
import sys
import types
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from cuda_progcache.memo import watching
from cuda_progcache.memo.digest import Digest, Indigestible, digest, digest_code_by
from cuda_progcache.memo.instances import Instances
from cuda_progcache.memo.modules import (
    Package,
    hash_parts,
    locate,
    package_of_file,
    package_of_module,
    source_of,
    stamp_of,
)
from cuda_progcache.memo.references import Import, References, bytecode, references_of

_MISSING = watching.MISSING
#: Built-in functions through which code can reach every name of its module.
_REACH_ALL = tuple(getattr(builtins, name) for name in ("globals", "eval", "exec"))
#: Names in :mod:`os` that give access to the environment.
_ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb"})
#: Attributes that Python itself adds to a module.
_MODULE_FURNITURE = frozenset(
    ["__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__cached__", "__builtins__",
     "__path__", "__annotations__", "__warningregistry__", "__annotate__", "__conditional_annotations__"]
)  # fmt: skip


def get_recursive_closure_hash(function: Any) -> str:
    """Return a digest of everything that decides what a function does, except arguments, files and package versions.

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
        The function refers to something that has no content to digest, or that is nested too deeply.
    """
    return closure(function).digest


class Closure(NamedTuple):
    """What a function depends on: a digest, the versions of packages, and watches on everything that can change.

    ``unloaded`` is true if some of the user's own modules count by their source because they aren't loaded yet.
    """

    digest: str
    packages: dict[str, str]
    watches: tuple[watching.Watch, ...] = ()
    unloaded: bool = False

    @property
    def with_packages(self) -> Digest:
        """The digest, combined with the packages' versions."""
        return digest((self.digest, self.packages)) if self.packages else Digest(self.digest)

    def holds(self) -> bool:
        """Return whether nothing has changed: the objects that names are bound to, code, and the content of data."""
        return watching.hold(self.watches)

    def changed(self) -> list[str]:
        """Return the names through which the function reaches objects that have changed."""
        return watching.changed(self.watches)


def closure(function: Any, state: Iterable[str] = ()) -> Closure:
    """Return what a function depends on now, without the names in ``state`` (``"stats"``, ``"module.table"``).

    Raises Indigestible; see :func:`get_recursive_closure_hash`.
    """
    walker = _Walker(_declared(function, state))
    found = _walked(walker, function)
    if walker.asks_subclasses:
        walker = _Walker(walker.state, subclasses=True)
        found = _walked(walker, function)
    return Closure(found.decode(), dict(sorted(walker.packages.items())), tuple(walker.watches), walker.unloaded)


def argument_digest(value: Any) -> Digest:
    """Digest an argument: as :func:`~cuda_progcache.memo.digest.digest` does, or otherwise by class and attributes.

    Raises Indigestible if the argument, or something in it, has no content that could be hashed.
    """
    return Digest(_walked(_Walker(strict=True), value).decode())


def _walked(walker: _Walker, value: Any) -> bytes:
    try:
        return walker.value(value)
    except RecursionError:
        raise Indigestible(value, f"can't digest what {_named(value)} refers to: it is nested too deeply") from None
    except RuntimeError as error:  # a dict or set that another thread changes
        raise Indigestible(
            value, f"can't digest what {_named(value)} refers to: it changed in the meantime ({error})"
        ) from None


def _named(value: Any) -> str:
    return getattr(value, "__qualname__", None) or f"a {type(value).__qualname__}"


def _declared(function: Any, state: Iterable[str]) -> frozenset[tuple[int, str] | int]:
    """Return where the declared state is found: namespaces with names, and objects, all by their ids."""
    found: set[tuple[int, str] | int] = set()
    plain = getattr(function, "__func__", function)
    for dotted in state:
        name, *attributes = dotted.split(".")
        namespace = getattr(plain, "__globals__", {})
        code = getattr(plain, "__code__", None)
        cells = dict(zip(code.co_freevars if code else (), getattr(plain, "__closure__", None) or (), strict=False))
        if not attributes:
            found.add((id(namespace), name))  # also stands for a closure variable shared with neighbouring functions
        value = watching.content(cells[name]) if name in cells else namespace.get(name, _MISSING)
        for position, attribute in enumerate(attributes, 1):
            if position == len(attributes):
                owner = value if isinstance(value, type) else getattr(value, "__dict__", value)
                found.add((id(owner), attribute))
            value = getattr(value, attribute, _MISSING)
        if value is not _MISSING and type(value) not in watching.ATOMS:
            found.add(id(value))
    return frozenset(found)


class _Walker(Instances):
    """A walk over what a function refers to.

    A function or class that was met before counts by its position in the order of first encounters; data always count
    by content.
    """

    def __init__(
        self, state: frozenset[tuple[int, str] | int] = frozenset(), *, strict: bool = False, subclasses: bool = False
    ) -> None:
        super().__init__(strict=strict)
        self.state = state
        self.subclasses = subclasses
        self.asks_subclasses = False
        self.unloaded = False

    def value(self, value: Any) -> bytes:
        """Return the digest of any value, as 64 hex digits."""
        if self.state and id(value) in self.state:
            return hash_parts("state")
        kind = type(value)
        if kind is types.FunctionType:
            return self.function(value)
        if isinstance(value, types.ModuleType):
            return self.module(value)
        if kind is types.CodeType:
            return bytecode(value)
        return super().value(value)

    def instance(self, value: Any) -> bytes:
        """Return the digest of an object; the declared state of a memoized function doesn't count."""
        told = getattr(type(value), "__state__", None) if hasattr(type(value), watching.COUNTS) else None
        around = self.state
        if told is not None:
            self.state |= _declared(*told(value))
        try:
            return super().instance(value)
        finally:
            self.state = around

    def function(self, function: types.FunctionType) -> bytes:
        told = getattr(function, watching.COUNTS, None)
        if told is not None:
            return self.data(function, lambda: ("cached", self.value(told())))
        again = self.again(function)
        if again is not None:
            return again
        package = package_of_file(function.__code__.co_filename)
        if package is not None:
            return self._foreign_function(function, package)
        read = references_of(function)
        own = function.__dict__
        self.watch(lambda: (function.__code__, function.__defaults__, function.__kwdefaults__, *own, *own.values()))
        around = self.strict, self._name
        self.strict = False  # objects that code uses, such as a lock, needn't be values
        self._name = ""  # a change is reported under the name that this function has for the object
        try:
            return hash_parts(*self._function(function, read))
        finally:
            self.strict, self._name = around

    def _function(self, function: types.FunctionType, read: References) -> list[str | bytes]:
        parts: list[str | bytes] = ["function", read.identity]
        parts.append(self.value(function.__defaults__))
        parts.append(self.value(function.__kwdefaults__))
        cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        self.asks_subclasses |= "__subclasses__" in read.attributes
        for name, attributes in read.names:
            with self.under(name):
                if name in cells:
                    found = self._cell(cells[name], (id(function.__globals__), name))
                else:
                    found = self._global(function.__globals__, name)
                parts += [name, ".".join(attributes), self.attributes(found, attributes, (name, *attributes), read)]
                if any(found is reach for reach in _REACH_ALL):
                    parts.append(self._namespace(function.__globals__))
        attributes_of = {
            name: value for name, value in function.__dict__.items() if name not in {"__wrapped__", "__signature__"}
        }
        for name in sorted(attributes_of):
            with self.under(f"{function.__name__}.{name}"):
                parts += [name, self.value(attributes_of[name])]
        for wanted in read.imports:
            parts += ["import", wanted.name, *self._imported(wanted)]
        return parts

    def _foreign_function(self, function: types.FunctionType, package: Package) -> bytes:
        """Return the digest of a package's function: its name and closure.

        The closure may hold the user's own objects, such as the function that a decorator wraps.
        """
        self.note(package)
        # The code's own name: a function's module differs between versions, and a decorator may have renamed it.
        parts: list[str | bytes] = ["function", package.name, function.__code__.co_qualname]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name not in {"dispatch_cache", "cache_token"}:  # caches of functools.singledispatch
                parts += [name, self.value(self._cell(cell, (0, name)))]
        return hash_parts(*parts)

    def _cell(self, cell: types.CellType, name: tuple[int, str]) -> Any:
        return _State if name in self.state else self.watch(lambda: (watching.content(cell),))[0]

    def _global(self, namespace: Mapping[str, Any], name: str) -> Any:
        if (id(namespace), name) in self.state:
            return _State
        found = self.watch_name(namespace, name)
        return getattr(builtins, name, _MISSING) if found is _MISSING else found

    def attributes(
        self, value: Any, attributes: tuple[str, ...], chain: tuple[str, ...], read: References | None
    ) -> bytes:
        """Return the digest of a value of which the code reads only some attributes."""
        if value is _MISSING:
            return hash_parts("missing")
        if value is _State or (self.state and id(value) in self.state):
            return hash_parts("state")
        place = len(chain) - len(attributes)
        environment = self._environment(value, attributes, chain[:place], read)
        if environment is not None:
            return environment
        if value is importlib.import_module or value is builtins.__import__:
            return self._import_calls(chain[:place], read)
        if isinstance(value, types.ModuleType):
            package = package_of_module(value.__name__, value)
            if package is not None:
                if value is importlib and attributes[:1] == ("import_module",):
                    return self._import_calls(chain[: place + 1], read)
                self.note(package)
                return hash_parts("module", value.__name__)
            if attributes:
                namespace = vars(value)
                if (id(namespace), attributes[0]) in self.state:
                    return hash_parts("state")
                found = self.watch_name(namespace, attributes[0])
                if found is _MISSING:
                    found = getattr(value, attributes[0], _MISSING)  # a module's own __getattr__
                with self.under(attributes[0]):
                    return self.attributes(found, attributes[1:], chain, read)
            return self.module(value)
        if attributes and type(value) is types.SimpleNamespace:
            found = self.watch_name(vars(value), attributes[0])
            with self.under(attributes[0]):
                return self.attributes(found, attributes[1:], chain, read)
        return self.value(value)

    def _environment(
        self, value: Any, attributes: tuple[str, ...], chain: tuple[str, ...], read: References | None
    ) -> bytes | None:
        """Return the digest of the environment variables that code reads; None if the value isn't the environment."""
        if value is os and attributes[:1] and attributes[0] in _ENVIRONMENT:
            value, chain, attributes = vars(os).get(attributes[0]), (*chain, attributes[0]), attributes[1:]
        if value is os.environ:
            if attributes[:1] not in {("get",), ("__getitem__",), ("__contains__",)}:
                if attributes:
                    return self.variables(None)
            else:
                chain = (*chain, attributes[0])
        elif value is not os.getenv:
            in_bytes = any(value is not None and value is vars(os).get(name) for name in ("environb", "getenvb"))
            return self.variables(None) if in_bytes else None
        return self.variables(None if read is None or read.constants is None else read.constants.get(chain))

    def _import_calls(self, chain: tuple[str, ...], read: References | None) -> bytes:
        known = None if read is None or read.constants is None else read.constants.get(chain)
        if known is None:
            raise Indigestible(
                importlib, f"can't tell in advance what {'.'.join(chain)}() imports: import it by name, or pass "
                "code=False and a version",
            )  # fmt: skip
        parts = ["imported", *sorted(known)]
        return hash_parts(*parts, *(part for name in sorted(known) for part in self._imported(Import(name, ()))))

    def module(self, module: types.ModuleType) -> bytes:
        """Return the digest of a module: its name if it belongs to a package, otherwise everything in it."""
        package = package_of_module(module.__name__, module)
        if package is not None:
            self.note(package)
            return hash_parts("module", module.__name__)
        return hash_parts("module", module.__name__, self._namespace(vars(module)))

    def _namespace(self, namespace: dict[str, Any]) -> bytes:
        again = self.again(namespace)
        if again is not None:
            return again
        self.watch_items(namespace)
        parts: list[str | bytes] = ["namespace"]
        for name in sorted(namespace):
            if name not in _MODULE_FURNITURE and (id(namespace), name) not in self.state:
                with self.under(name):
                    parts += [name, self.attributes(namespace[name], (), (name,), None)]
        return hash_parts(*parts)

    # Modules that code imports when it runs

    def _imported(self, wanted: Import) -> list[bytes]:
        """Return the digests of an imported module, or of the names that the code imports from it."""
        top, _, rest = wanted.name.partition(".")
        module = sys.modules.get(wanted.name)
        package = package_of_module(top)
        if package is not None:
            self.note(package)
            by_hand = sys.modules.get(top)
            if by_hand is not None and by_hand.__spec__ is None:  # its version is its own attribute, which can change
                self.watch_name(sys.modules, top)
                self.watch_name(vars(by_hand), "__version__")
            return [hash_parts("external")]
        if module is None:
            return [self._unloaded(wanted.name)]
        self.watch_name(sys.modules, wanted.name)
        if not wanted.wanted:
            found = [self.module(module)]
            return found + (self._imported(Import(wanted.name.rpartition(".")[0], ())) if rest else [])
        made = []
        for name in wanted.wanted:
            if name not in vars(module) and package_of_module(full := f"{wanted.name}.{name}") is None:
                made.append(self._imported(Import(full, ()))[0])
                continue
            made.append(self.attributes(module, (name,), (wanted.name, name), None))
        return made

    def _unloaded(self, name: str) -> bytes:
        """Return the digest of a user's module that isn't loaded yet and of its imports, made from their source."""
        found: dict[str, bytes] = {}
        pending = [name]
        while pending:
            module = pending.pop()
            top = module.partition(".")[0]
            if module in found:
                continue
            package = package_of_module(top)
            if package is not None:
                self.note(package)
                continue
            loaded = sys.modules.get(module)
            if loaded is not None and module != "__main__":
                self.watch_name(sys.modules, module)
                found[module] = self.module(loaded)
                continue
            self.watch_name(sys.modules, module)
            spec = locate(module)
            if spec is None or spec.origin is None or not spec.has_location:
                continue  # a name in a module, a directory, or nothing
            self.unloaded = True
            self.watch(functools.partial(stamp_of, spec.origin), by_value=True)
            source = source_of(module, spec.origin)
            if source is None:
                found[module] = b"unreadable"
                continue
            found[module] = source.digest
            pending += source.imports
            pending += [".".join(module.split(".")[:depth]) for depth in range(1, module.count(".") + 1)]
        return hash_parts("unloaded", *(part for module, source in sorted(found.items()) for part in (module, source)))


class _State:
    """The stand-in for a value that is declared as state."""


digest_code_by(argument_digest)

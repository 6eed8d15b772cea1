# SPDX-License-Identifier: Apache-2.0
"""What a function does, as a digest: its code, and all that the code refers to, recursively.

What counts: the body, defaults, closure variables and globals that it names, and the function's own attributes; of
those the values, and of functions, classes and instances again what they do and hold, as they are loaded: not as
``__module__`` or ``__wrapped__`` say, nor as the source lies on disk now. Of a module of one's own, the attributes that
are named, or all of it where it is used in another way. The standard library doesn't count, an installed package by its
version. A module of one's own that is imported inside counts likewise; while it isn't loaded, by its source. Of the
environment, the variables that are read by name; all of them where that can't be seen.

Nothing is left out because the code changes it: what is only the code's own state is declared as such (``state``).
What doesn't count: comments, layout, docstrings and annotations that aren't read, names of files, line numbers, memory
addresses, the order of a set. So the digest is the same in every process, and, where the source is at hand, from every
interpreter. Locks, files, threads and the like count by their class: they are tools, and no input.
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
#: Built-in functions with which code can reach every name of its module.
_REACH_ALL = tuple(getattr(builtins, name) for name in ("globals", "eval", "exec"))
#: Names of :mod:`os` that lead to the environment.
_ENVIRONMENT = frozenset({"environ", "environb", "getenv", "getenvb"})
#: Of a module: what Python puts there by itself.
_MODULE_FURNITURE = frozenset(
    ["__name__", "__doc__", "__package__", "__loader__", "__spec__", "__file__", "__cached__", "__builtins__",
     "__path__", "__annotations__", "__warningregistry__", "__annotate__", "__conditional_annotations__"]
)  # fmt: skip


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
        It refers to something whose content can't be known, or is nested too deep to be walked.
    """
    return closure(function).digest


class Closure(NamedTuple):
    """What a function depends on: a digest of all of it, versions of packages, and watches of what can change.

    ``unloaded`` says that modules of one's own count by their source, since they aren't loaded yet.
    """

    digest: str
    packages: dict[str, str]
    watches: tuple[watching.Watch, ...] = ()
    unloaded: bool = False

    @property
    def with_packages(self) -> Digest:
        """The digest, with the packages' versions."""
        return digest((self.digest, self.packages)) if self.packages else Digest(self.digest)

    def holds(self) -> bool:
        """Whether nothing has changed: the objects that names are bound to, code, and the content of data."""
        return watching.hold(self.watches)

    def changed(self) -> list[str]:
        """The names through which the function reaches what is no longer as it was."""
        return watching.changed(self.watches)


def closure(function: Any, state: Iterable[str] = ()) -> Closure:
    """What a function depends on, as it is now, but for the names in ``state`` (``"stats"``, ``"module.table"``).

    Raises Indigestible, see :func:`get_recursive_closure_hash`.
    """
    walker = _Walker(_declared(function, state))
    found = _walked(walker, function)
    if walker.asks_subclasses:
        walker = _Walker(walker.state, subclasses=True)
        found = _walked(walker, function)
    return Closure(found.decode(), dict(sorted(walker.packages.items())), tuple(walker.watches), walker.unloaded)


def argument_digest(value: Any) -> Digest:
    """Digest of an argument: as :func:`~cuda_progcache.memo.digest.digest`, or else by class and attributes.

    Raises Indigestible where it, or something in it, has no content that could be hashed.
    """
    return Digest(_walked(_Walker(strict=True), value).decode())


def _walked(walker: _Walker, value: Any) -> bytes:
    try:
        return walker.value(value)
    except RecursionError:
        raise Indigestible(value, f"can't digest what {_named(value)} refers to: it is nested too deeply") from None
    except RuntimeError as error:  # a dict or set that another thread changes
        raise Indigestible(
            value, f"can't digest what {_named(value)} refers to: it changed meanwhile ({error})"
        ) from None


def _named(value: Any) -> str:
    return getattr(value, "__qualname__", None) or f"a {type(value).__qualname__}"


def _declared(function: Any, state: Iterable[str]) -> frozenset[tuple[int, str] | int]:
    """Where what is declared as state lies: namespaces with names, and objects."""
    found: set[tuple[int, str] | int] = set()
    plain = getattr(function, "__func__", function)
    for dotted in state:
        name, *attributes = dotted.split(".")
        namespace = getattr(plain, "__globals__", {})
        code = getattr(plain, "__code__", None)
        cells = dict(zip(code.co_freevars if code else (), getattr(plain, "__closure__", None) or (), strict=False))
        if not attributes:
            found.add((id(namespace), name))  # also as a variable that functions beside it close over
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
    """One walk. Functions and classes met again are named by when they were met first; data by its content."""

    def __init__(
        self, state: frozenset[tuple[int, str] | int] = frozenset(), *, strict: bool = False, subclasses: bool = False
    ) -> None:
        super().__init__(strict=strict)
        self.state = state
        self.subclasses = subclasses
        self.asks_subclasses = False
        self.unloaded = False

    def value(self, value: Any) -> bytes:
        """Digest of any value, as 64 hex digits."""
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
        """An object; of a memoized function its state doesn't count."""
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
        self.strict = False  # what code uses, as a lock, needn't be a value
        self._name = ""  # what it changes is told of by the name that it has there
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
        """A function of a package: by name; what it closes over may be one's own, as what a decorator wraps."""
        self.note(package)
        # Where a function lives moves between versions, and a decorator may have renamed it: its code knows.
        parts: list[str | bytes] = ["function", package.name, function.__code__.co_qualname]
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name not in {"dispatch_cache", "cache_token"}:  # of functools.singledispatch: filled as it is used
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
        """Digest of a value of which only some attributes are read."""
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
        """Digest of what code reads of the environment; None where it is something else that is looked at."""
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
                importlib, f"what {'.'.join(chain)}() imports can't be known in advance: import it by name, or pass "
                "code=False and a version",
            )  # fmt: skip
        parts = ["imported", *sorted(known)]
        return hash_parts(*parts, *(part for name in sorted(known) for part in self._imported(Import(name, ()))))

    def module(self, module: types.ModuleType) -> bytes:
        """A module: by name and version if it is a package's; of one's own all that it has."""
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
        """Digests of what code imports: of a module, or of what it takes from it."""
        top, _, rest = wanted.name.partition(".")
        module = sys.modules.get(wanted.name)
        package = package_of_module(top)
        if package is not None:
            self.note(package)
            by_hand = sys.modules.get(top)
            if by_hand is not None and by_hand.__spec__ is None:  # it says itself which version it is
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
        """A module of one's own that isn't loaded yet, and those it imports: by their source."""
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
                continue  # a name in a module, a folder, or nowhere
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
    """Stands for a value that is declared as state."""


digest_code_by(argument_digest)

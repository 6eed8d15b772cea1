# SPDX-License-Identifier: Apache-2.0
"""Named tuples and dataclasses, created without importing :mod:`typing` and :mod:`dataclasses`.

A process that only needs a cached kernel would spend a third of its time on importing these two (and ``inspect``, which
dataclasses imports) and on the code that they generate. This module's :func:`dataclass` and :class:`NamedTuple` create
the same classes from the same declarations, as far as this package uses them. Type checkers see the originals. The
functions of :mod:`dataclasses` work, too: the attributes that ``fields``, ``replace`` and ``asdict`` need are created
when they are first accessed.

Annotations must be strings (``from __future__ import annotations``): this module doesn't evaluate them.
"""

from __future__ import annotations

try:
    from _collections import _tuplegetter as _getter  # type: ignore[import-not-found]  # as collections itself does
except ImportError:  # not CPython
    from operator import itemgetter

    def _getter(index: int, doc: str) -> Any:
        return property(itemgetter(index), doc=doc)


TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

__all__ = ["NamedTuple", "dataclass", "field", "replace"]

_FIELDS = "__dataclass_fields__"


class _TupleType(type):
    """The metaclass that turns a class body into the class that :class:`typing.NamedTuple` would create from it."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(cls, name, bases, body)
        names = tuple(body["__annotations__"])
        defaults = {field: body.pop(field) for field in names if field in body}
        made = {field: _getter(number, f"Alias for field number {number}") for number, field in enumerate(names)}
        return type(name, (tuple,), {**_methods(names, defaults), **made, **body})


def _methods(names: tuple[str, ...], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the methods that :func:`collections.namedtuple` would give a class.

    namedtuple compiles its methods from source text, which takes a quarter of a millisecond per class; a hit in a new
    process creates two dozen classes.
    """
    number = len(names)

    def __new__(cls: Any, *given: Any, **named: Any) -> Any:  # noqa: N807
        if len(given) != number:
            if len(given) > number:
                raise TypeError(f"{cls.__name__} takes {number} values, got {len(given)}")
            try:
                given += tuple([named.pop(name) if name in named else defaults[name] for name in names[len(given) :]])
            except KeyError as exc:
                raise TypeError(f"{cls.__name__} is missing a value for {exc.args[0]!r}") from None
        if named:
            name = next(iter(named))
            what = "two values for" if name in names else "no field"
            raise TypeError(f"{cls.__name__} has {what} {name!r}")
        return tuple.__new__(cls, given)

    def _make(cls: Any, values: Any) -> Any:
        made = tuple.__new__(cls, values)
        if len(made) != number:
            raise TypeError(f"Expected {number} arguments, got {len(made)}")
        return made

    def _replace(self: Any, /, **named: Any) -> Any:
        made = self._make(
            [named.pop(name) if name in named else value for name, value in zip(names, self, strict=True)]
        )
        if named:
            raise ValueError(f"Got unexpected field names: {list(named)!r}")
        return made

    def __repr__(self: Any) -> str:  # noqa: N807
        return f"{type(self).__name__}({', '.join([f'{n}={v!r}' for n, v in zip(names, self, strict=True)])})"

    def _asdict(self: Any) -> dict[str, Any]:
        return dict(zip(names, self, strict=True))

    def __getnewargs__(self: Any) -> tuple[Any, ...]:  # noqa: N807
        return tuple(self)

    return {
        "__slots__": (),
        "__new__": __new__,
        "__repr__": __repr__,
        "__getnewargs__": __getnewargs__,
        "__match_args__": names,
        "__replace__": _replace,
        "__signature__": _Signature(names, defaults),
        "_asdict": _asdict,
        "_field_defaults": defaults,
        "_fields": names,
        "_make": classmethod(_make),
        "_replace": _replace,
    }


class _Signature:
    """The signature of a class of named fields, created on access."""

    def __init__(self, names: tuple[str, ...], defaults: dict[str, Any]) -> None:
        self._names, self._defaults = names, defaults

    def __get__(self, instance: object, owner: type) -> Any:
        from inspect import Parameter, Signature

        kind, empty = Parameter.POSITIONAL_OR_KEYWORD, Parameter.empty
        return Signature([Parameter(name, kind, default=self._defaults.get(name, empty)) for name in self._names])


class _Tuple(metaclass=_TupleType):
    """The base class to declare; :class:`_TupleType` replaces it with ``tuple``."""


class _Field:
    """The options of a field declared with :func:`field`."""

    def __init__(self, default: Any, make: Callable[[], Any] | None, *, shown: bool, compared: bool) -> None:
        self.default = default
        self.make = make
        self.shown = shown
        self.compared = compared


_NONE: Any = object()
_PLAIN = _Field(_NONE, None, shown=True, compared=True)


class _Declaration:
    """The declared fields of a class, from which its methods are made."""

    def __init__(self, cls: type, *, frozen: bool) -> None:
        given = {name: vars(cls)[name] for name in cls.__annotations__ if name in vars(cls)}
        self._cls, self._frozen = cls, frozen
        self._special = {name: value for name, value in given.items() if isinstance(value, _Field)}
        self._defaults = {name: value.default if name in self._special else value for name, value in given.items()}
        self._defaults = {name: value for name, value in self._defaults.items() if value is not _NONE}
        self._twin: Any = None
        for name in self._special:
            if name in self._defaults:
                setattr(cls, name, self._defaults[name])
            else:
                delattr(cls, name)
        self.names = tuple(cls.__annotations__)

    def twin(self) -> Any:
        """Return the class that :mod:`dataclasses` creates from the fields alone."""
        if self._twin is None:
            import dataclasses

            body: dict[str, Any] = dict(self._defaults)
            for name, special in self._special.items():
                given = {"default_factory": special.make} if special.make else {}
                given |= {"default": self._defaults[name]} if name in self._defaults else {}
                make: Any = dataclasses.field
                body[name] = make(repr=special.shown, compare=special.compared, **given)
            body |= {"__annotations__": dict(self._cls.__annotations__), "__module__": self._cls.__module__}
            twin: Any = type(self._cls.__name__, (), body)
            self._twin = dataclasses.dataclass(frozen=self._frozen)(twin)
        return self._twin

    def methods(self) -> dict[str, Any]:
        """Return ``__init__``, ``__repr__``, ``__eq__`` and ``__hash__``, and what makes an instance frozen."""
        shown = [name for name in self.names if self._special.get(name, _PLAIN).shown]
        compared = [name for name in self.names if self._special.get(name, _PLAIN).compared]

        def value(self: object) -> tuple[Any, ...]:
            return tuple([getattr(self, name) for name in compared])

        def repr_(self: object) -> str:
            return f"{type(self).__qualname__}({', '.join([f'{name}={getattr(self, name)!r}' for name in shown])})"

        def eq(self: object, other: object) -> bool:
            return value(self) == value(other) if type(other) is type(self) else NotImplemented

        def hash_(self: object) -> int:
            return hash(value(self))

        made: dict[str, Any] = {"__init__": self._init(), "__repr__": repr_, "__eq__": eq, "__hash__": None}
        if self._frozen:
            made |= {"__hash__": hash_, "__setattr__": _refuse, "__delattr__": _refuse}
        return made

    def _init(self) -> Callable[..., None]:
        names = self.names
        makers = {name: special.make for name, special in self._special.items() if special.make}
        required = [name for name in names if name not in self._defaults and name not in makers]
        # All fields in declaration order, which is the order of an instance's state however arguments are ordered.
        blank = {name: self._defaults.get(name) for name in names}

        def init(self: object, *values: Any, **named: Any) -> None:
            state = blank.copy()
            if values:
                positional = dict(zip(names, values, strict=False))
                if len(values) > len(names) or positional.keys() & named.keys():
                    raise TypeError(f"{type(self).__name__} takes {', '.join(names)}, each at most once")
                named = positional | named
            state.update(named)
            if len(state) > len(names):
                unknown = next(name for name in named if name not in blank)
                raise TypeError(f"{type(self).__name__} got an unexpected argument {unknown!r}")
            for name in required:
                if name not in named:
                    raise TypeError(f"{type(self).__name__} is missing an argument: {name}")
            for name, make in makers.items():
                if name not in named:
                    state[name] = make()
            vars(self).update(state)
            check = getattr(self, "__post_init__", None)
            if check is not None:
                check()

        return init


class _OfTwin:
    """An attribute that :mod:`dataclasses` looks up, taken from the twin on access."""

    def __init__(self, declared: _Declaration, name: str) -> None:
        self.declared = declared
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        return getattr(self.declared.twin(), self._name)


def _refuse(self: object, name: str, *_: object) -> None:
    from dataclasses import FrozenInstanceError

    raise FrozenInstanceError(f"{type(self).__name__} is immutable: can't set or delete {name!r}")


def _dataclass(cls: type | None = None, /, *, frozen: bool = False) -> Any:
    """Work like :func:`dataclasses.dataclass`, for a class without a dataclass as a base."""
    if cls is None:
        return lambda cls: _dataclass(cls, frozen=frozen)
    declared = _Declaration(cls, frozen=frozen)
    own = vars(cls)
    for name, method in declared.methods().items():
        if own.get(name) is None:  # a class that defines only __eq__ has __hash__ = None
            setattr(cls, name, method)
    for name in (_FIELDS, "__dataclass_params__"):
        setattr(cls, name, _OfTwin(declared, name))
    cls.__match_args__ = declared.names  # type: ignore[misc, attr-defined]
    return cls


def _field(
    *,
    default: Any = _NONE,
    default_factory: Callable[[], Any] | None = None,
    repr: bool = True,  # noqa: A002
    compare: bool = True,
) -> Any:
    """Work like :func:`dataclasses.field`."""
    return _Field(default, default_factory, shown=repr, compared=compare)


def _replace(instance: Any, /, **changes: Any) -> Any:
    """Work like :func:`dataclasses.replace`, for dataclasses of this module and of the standard library."""
    ours = vars(type(instance)).get(_FIELDS)
    if not isinstance(ours, _OfTwin):
        import dataclasses

        return dataclasses.replace(instance, **changes)
    return type(instance)(**{name: getattr(instance, name) for name in ours.declared.names} | changes)


if TYPE_CHECKING:
    from dataclasses import dataclass, field, replace
    from typing import NamedTuple
else:
    dataclass, field, replace, NamedTuple = _dataclass, _field, _replace, _Tuple

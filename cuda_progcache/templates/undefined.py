# SPDX-License-Identifier: Apache-2.0
"""Missing and undefined values: ``missing`` marks a local without a value; the undefined types work as Jinja2's do.

The module doesn't import Jinja2. Once Jinja2 is loaded, our undefined values pass for Jinja2's.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, NoReturn


class Missing:
    """The type of ``missing``, the value of a local whose name has no value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "missing"

    def __reduce__(self) -> str:
        return "missing"


missing = Missing()


def public_missing() -> Any:
    """Return ``missing`` as Jinja2's interfaces know it: Jinja2's own object once Jinja2 is loaded, otherwise ours."""
    return getattr(sys.modules.get("jinja2.utils"), "missing", missing)


def passes_for(module: str, name: str | None = None) -> Any:
    """Return a ``__class__`` property whose value is Jinja2's class once Jinja2 is loaded.

    `module` and `name` are those of Jinja2's class; `name` defaults to the name of the object's own class.
    """

    def kind(self: object) -> type:
        own = type(self)
        found: type = getattr(sys.modules.get(module), name or own.__name__, own)
        return found

    return property(kind)


class Undefined:
    """An undefined value: it renders as empty text, and operations on it raise.

    Parameters
    ----------
    hint : str, optional
        The error message; the default message names `obj` and `name`.
    obj : object, optional
        The object that has no attribute or item `name`. Without it, `name` is a variable.
    name : str, optional
        The name that is undefined.
    exc : type, optional
        The exception to raise; by default ``jinja2.UndefinedError``.
    """

    __slots__ = ("_undefined_exception", "_undefined_hint", "_undefined_name", "_undefined_obj")
    __class__ = passes_for("jinja2.runtime")

    def __init__(
        self, hint: str | None = None, obj: Any = missing, name: Any = None, exc: type[Exception] | None = None
    ) -> None:
        self._undefined_hint = hint
        self._undefined_obj = obj
        self._undefined_name = name
        self._undefined_exception = exc

    @property
    def _undefined_message(self) -> str:
        from jinja2 import Undefined as Theirs  # the messages are Jinja2's

        obj = public_missing() if self._undefined_obj is missing else self._undefined_obj
        message: str = Theirs(self._undefined_hint, obj, self._undefined_name)._undefined_message
        return message

    def _fail_with_undefined_error(self, *_args: object, **_kwargs: object) -> NoReturn:
        if self._undefined_exception is not None:
            raise self._undefined_exception(self._undefined_message)
        from jinja2 import UndefinedError

        raise UndefinedError(self._undefined_message)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __floordiv__ = (
        _fail_with_undefined_error
    )
    __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = __pos__ = __neg__ = __int__ = __float__ = __complex__ = (
        _fail_with_undefined_error
    )
    __call__ = __getitem__ = __lt__ = __le__ = __gt__ = __ge__ = _fail_with_undefined_error

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # a protocol checks whether the object supports it
        self._fail_with_undefined_error()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return id(type(self))

    def __str__(self) -> str:
        return ""

    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "Undefined"


class StrictUndefined(Undefined):
    """An undefined value on which every operation raises, except the tests ``is defined`` and ``is undefined``."""

    __slots__ = ()

    __iter__ = __str__ = __len__ = __eq__ = __ne__ = __bool__ = __hash__ = __contains__ = (
        Undefined._fail_with_undefined_error
    )


def _theirs() -> Any:
    return getattr(sys.modules.get("jinja2.runtime"), "Undefined", Undefined)


def is_undefined(value: object) -> bool:
    """Whether a value is undefined, of our type or Jinja2's."""
    kind = type(value)
    if kind in _NEVER:
        return False
    return kind is StrictUndefined or isinstance(value, (Undefined, _theirs()))


_NEVER = frozenset({int, str, float, bool, list, tuple, dict, type(None)})

# SPDX-License-Identifier: Apache-2.0
"""Jinja2's names as a kernel template sees them, without Jinja2: undefined values, filters, tests and globals.

What templates of CUDA source use most is here, for text that is never escaped; results and errors are Jinja2's. Every
other name, and every unusual call of one that is here, takes Jinja2's own function, which imports it.
"""

from __future__ import annotations

import _operator as operator  # the module around it would have to be loaded
import sys
from itertools import chain

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any, NoReturn

_MISSING = object()


class Undefined:
    """The value of what isn't there, which puts out nothing; an operation on it raises.

    Once Jinja2 is loaded it passes for Jinja2's class of that name, so that Jinja2's filters and tests know it.

    Parameters
    ----------
    hint : str, optional
        The message, in place of the one that names `obj` and `name`.
    obj : object, optional
        What had no such attribute or item; without it `name` is a variable.
    name : str, optional
    exc : type, optional
        The exception in place of ``jinja2.UndefinedError``.
    """

    __slots__ = ("_undefined_exception", "_undefined_hint", "_undefined_name", "_undefined_obj")

    def __init__(
        self, hint: str | None = None, obj: Any = _MISSING, name: Any = None, exc: type[Exception] | None = None
    ) -> None:
        self._undefined_hint = hint
        self._undefined_obj = obj
        self._undefined_name = name
        self._undefined_exception = exc

    @property
    def _undefined_message(self) -> str:
        if self._undefined_hint:
            return self._undefined_hint
        name, obj = self._undefined_name, self._undefined_obj
        if obj is _MISSING:
            return f"{name!r} is undefined"
        described = _describe(obj)
        if not isinstance(name, str):
            return f"{described} has no element {name!r}"
        return f"{described!r} has no attribute {name!r}"

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
            raise AttributeError(name)  # protocols that ask whether they are supported
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

    @property  # type: ignore[misc]  # typeshed lets it be assigned to
    def __class__(self) -> type:
        runtime = sys.modules.get("jinja2.runtime")
        found: type = type(self) if runtime is None else getattr(runtime, type(self).__name__)
        return found

    def __repr__(self) -> str:
        return "Undefined"


class StrictUndefined(Undefined):
    """The value of a name, attribute or item that isn't there: all but asking whether it is defined raises."""

    __slots__ = ()

    __iter__ = __str__ = __len__ = __eq__ = __ne__ = __bool__ = __hash__ = __contains__ = (
        Undefined._fail_with_undefined_error
    )


def _describe(obj: object) -> str:
    """Name an object as Jinja2's messages do."""
    if obj is None:
        return "None"
    if obj is Ellipsis:
        return "Ellipsis"
    kind = type(obj)
    where = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{where}{kind.__name__} object"


def _table(name: str) -> dict[str, Callable[..., Any]]:
    from jinja2 import defaults

    found: dict[str, Callable[..., Any]] = getattr(defaults, f"DEFAULT_{name}")
    return found


def _theirs(table: str, name: str) -> Callable[..., Any]:
    return _table(table)[name]


class Names(dict[str, "Callable[..., Any]"]):
    """Filters, tests or globals by name: those given, and Jinja2's own, imported when one is asked for.

    Parameters
    ----------
    table : {"FILTERS", "TESTS", "NAMESPACE"}
        Which of Jinja2's.
    """

    def __init__(self, table: str, *given: Mapping[str, Callable[..., Any]]) -> None:
        for names in given:
            self.update(names)
        self._table = table

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in _table(self._table)

    def __missing__(self, name: str) -> Callable[..., Any]:
        found = self[name] = _theirs(self._table, name)
        return found


# Filters. The first parameters `_eval_ctx` and `_environment` are what Jinja2's own filters of these names are passed.


def _text(value: object) -> str:
    return value if isinstance(value, str) else str(value)


def _join(eval_ctx: Any, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> Any:
    if attribute is not None or eval_ctx.autoescape:
        return _theirs("FILTERS", "join")(eval_ctx, value, d, attribute)
    return str(d).join(map(str, value))


def _replace(eval_ctx: Any, s: str, old: str, new: str, count: int | None = None) -> Any:
    if eval_ctx.autoescape:
        return _theirs("FILTERS", "replace")(eval_ctx, s, old, new, count)
    return str(s).replace(str(old), str(new), -1 if count is None else count)


def _indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:  # noqa: FBT001, FBT002
    if type(s) is not str:
        return _theirs("FILTERS", "indent")(s, width, first, blank)
    margin = width if isinstance(width, str) else " " * width
    head, *rest = f"{s}\n".splitlines()
    return "\n".join(chain([margin + head if first else head], (margin + t if t or blank else t for t in rest)))


def _trim(value: object, chars: str | None = None) -> str:
    return _text(value).strip(chars)


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:  # noqa: FBT001, FBT002
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _int(value: Any, default: int = 0, base: int = 10) -> int:
    try:
        return int(value, base) if isinstance(value, str) else int(value)
    except (TypeError, ValueError):
        try:
            return int(float(value))
        except (TypeError, ValueError, OverflowError):
            return default


def _float(value: Any, default: float = 0.0) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def _first(environment: Any, seq: Iterable[Any]) -> Any:
    for item in seq:
        return item
    return environment.undefined("No first item, sequence was empty.")


def _last(environment: Any, seq: Any) -> Any:
    for item in reversed(seq):
        return item
    return environment.undefined("No last item, sequence was empty.")


def _extreme(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def extreme(
        environment: Any,
        value: Iterable[Any],
        case_sensitive: bool = False,  # noqa: FBT001, FBT002
        attribute: str | int | None = None,
    ) -> Any:
        if attribute is not None:
            return _theirs("FILTERS", name)(environment, value, case_sensitive, attribute)
        items = list(value)
        if not items:
            return environment.undefined("No aggregated item, sequence was empty.")
        return function(items) if case_sensitive else function(items, key=_folded)

    return extreme


def _folded(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _sum(environment: Any, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    if attribute is not None:
        return _theirs("FILTERS", "sum")(environment, iterable, attribute, start)
    return sum(iterable, start)


def _round(value: float, precision: int = 0, method: str = "common") -> Any:
    if method != "common":
        return _theirs("FILTERS", "round")(value, precision, method)
    return round(value, precision)


FILTERS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "capitalize": lambda s: _text(s).capitalize(),
    "count": len,
    "d": _default,
    "default": _default,
    "first": _first,
    "float": _float,
    "indent": _indent,
    "int": _int,
    "join": _join,
    "last": _last,
    "length": len,
    "list": lambda _eval_ctx, value: list(value),
    "lower": lambda s: _text(s).lower(),
    "max": _extreme("max", max),
    "min": _extreme("min", min),
    "replace": _replace,
    "round": _round,
    "string": _text,
    "sum": _sum,
    "trim": _trim,
    "upper": lambda s: _text(s).upper(),
}


# Tests


def _is_number(value: object) -> bool:
    if isinstance(value, (int, float, complex)):
        return True
    numbers = sys.modules.get("numbers")  # whoever registers a class of numbers has imported it
    return numbers is not None and isinstance(value, numbers.Number)


def _is_iterable(value: Any) -> bool:
    try:
        iter(value)
    except TypeError:
        return False
    return True


TESTS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("==", "eq", "equalto"), operator.eq),
    **dict.fromkeys(("!=", "ne"), operator.ne),
    **dict.fromkeys((">", "gt", "greaterthan"), operator.gt),
    **dict.fromkeys(("<", "lt", "lessthan"), operator.lt),
    **dict.fromkeys((">=", "ge"), operator.ge),
    **dict.fromkeys(("<=", "le"), operator.le),
    "boolean": lambda value: value is True or value is False,
    "callable": callable,
    "defined": lambda value: not isinstance(value, Undefined),
    "divisibleby": lambda value, num: value % num == 0,
    "even": lambda value: value % 2 == 0,
    "false": lambda value: value is False,
    "float": lambda value: isinstance(value, float),
    "in": lambda value, seq: value in seq,
    "integer": lambda value: isinstance(value, int) and value is not True and value is not False,
    "iterable": _is_iterable,
    "lower": lambda value: str(value).islower(),
    "none": lambda value: value is None,
    "number": _is_number,
    "odd": lambda value: value % 2 == 1,
    "sameas": lambda value, other: value is other,
    "string": lambda value: isinstance(value, str),
    "true": lambda value: value is True,
    "undefined": lambda value: isinstance(value, Undefined),
    "upper": lambda value: str(value).isupper(),
}

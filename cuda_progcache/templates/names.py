# SPDX-License-Identifier: Apache-2.0
"""Jinja2's filters, tests and globals for kernel templates, without Jinja2.

This module implements the names that templates of CUDA source use most, for text that is never escaped, with the same
results and errors as Jinja2. Other names, and unusual calls of these, use Jinja2's own functions and import Jinja2.
"""

from __future__ import annotations

import _operator as operator  # importing operator would load another module
import sys
from _collections_abc import MutableMapping as _MutableMapping  # loaded by every Python

from cuda_progcache.templates.objects import Namespace
from cuda_progcache.templates.undefined import is_undefined

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import Any


def _table(name: str) -> dict[str, Callable[..., Any]]:
    from jinja2 import defaults

    found: dict[str, Callable[..., Any]] = getattr(defaults, f"DEFAULT_{name}")
    return found


def _theirs(table: str, name: str) -> Callable[..., Any]:
    return _table(table)[name]


class NameTable(_MutableMapping[str, "Callable[..., Any]"]):
    """A table of filters or tests by name: the given functions, and Jinja2's own, which are imported on first use.

    Parameters
    ----------
    table : {"FILTERS", "TESTS"}
        The table of Jinja2's own functions.
    *given : mapping
        Tables of functions by name; later ones override earlier ones and Jinja2's own.
    """

    def __init__(self, table: str, *given: Mapping[str, Callable[..., Any]]) -> None:
        self._known = {name: function for names in given for name, function in names.items()}
        self._table = table

    def __contains__(self, name: object) -> bool:
        return name in self._known or name in _table(self._table)

    def __getitem__(self, name: str) -> Callable[..., Any]:
        if name not in self._known:
            self._known[name] = _theirs(self._table, name)
        return self._known[name]

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        self._known[name] = function

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_table(self._table) | self._known)

    def __len__(self) -> int:
        return len(_table(self._table) | self._known)

    def copy(self) -> dict[str, Callable[..., Any]]:
        """Return the table as a plain dict."""
        return _table(self._table) | self._known


# Filters. A first parameter `eval_ctx` or `environment` is passed as to Jinja2's own filter of the same name.


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
    lines = f"{s}\n".splitlines()
    head = margin + lines[0] if first else lines[0]
    return "\n".join([head, *[margin + line if line or blank else line for line in lines[1:]]])


def _trim(value: object, chars: str | None = None) -> str:
    return _text(value).strip(chars)


def _default(value: Any, default_value: Any = "", boolean: bool = False) -> Any:  # noqa: FBT001, FBT002
    return default_value if is_undefined(value) or (boolean and not value) else value


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
    numbers = sys.modules.get("numbers")  # code that registers a class of numbers has imported it
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
    "defined": lambda value: not is_undefined(value),
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
    "undefined": is_undefined,
    "upper": lambda value: str(value).isupper(),
}


# Globals


def _global(name: str) -> Callable[..., Any]:
    """Return a global function that imports and calls Jinja2's function of the same name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return _theirs("NAMESPACE", name)(*args, **kwargs)

    return call


GLOBALS: dict[str, Any] = {
    "range": range,
    "dict": dict,
    "namespace": Namespace,
    **{name: _global(name) for name in ("cycler", "joiner", "lipsum")},
}

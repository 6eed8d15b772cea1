# SPDX-License-Identifier: Apache-2.0
"""What a closure holds that can change in this process, and whether it has changed.

A closure is a structure of objects. As long as each place in it (a name of a module, an item of a list, an attribute)
holds the very object that it held, and no object of another kind (an array, a table) has other content, nothing has
changed. That is asked of each object in turn, without digesting anything that can't change in place.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

from cuda_progcache.memo.modules import stamp_of

if TYPE_CHECKING:
    from cuda_progcache._util.files import Signature

MISSING = object()
#: A function's attribute, or a class's method, that gives what counts of a wrapper in place of all that it holds.
COUNTS = "__counts__"
#: Types whose values can't change, and hold nothing that can.
ATOMS = frozenset({int, float, str, bytes, bool, complex, type(None), type(...), type(NotImplemented)})

Items = tuple[tuple[Any, ...], tuple[Any, ...]]


class Watch(NamedTuple):
    """An object, what it held, and what tells whether it still does; ``name`` is through which code reaches it."""

    check: Callable[[Any, Any], bool]
    owner: Any
    before: Any
    name: str


def hold(watches: Iterable[Watch]) -> bool:
    """Whether nothing has changed."""
    try:
        for check, owner, before, _ in watches:
            if not check(owner, before):
                return False
    except Exception:  # noqa: BLE001 - an object's own code; what can't be looked at may have changed
        return False
    return True


def changed(watches: Iterable[Watch]) -> list[str]:
    """The names under which something has changed, each once."""
    return list(dict.fromkeys(watch.name for watch in watches if watch.name and not hold((watch,))))


def items(mapping: Mapping[Any, Any]) -> Items:
    """Keys and values as they are."""
    return tuple(mapping), tuple(mapping.values())


def same_names(namespace: Mapping[str, Any], before: tuple[tuple[str, Any], ...]) -> bool:
    """Whether names are bound to the same objects."""
    get = namespace.get
    return all(get(name, MISSING) is value for name, value in before)


def same_items(mapping: Mapping[Any, Any], before: Items) -> bool:
    """Whether a mapping has the same keys and values, the objects themselves."""
    keys, values = before
    return len(mapping) == len(keys) and all(map(is_, mapping.values(), values)) and all(map(is_, mapping, keys))


def same_elements(collection: Collection[Any], before: tuple[Any, ...]) -> bool:
    """Whether a collection has the same elements, the objects themselves."""
    return len(collection) == len(before) and all(map(is_, collection, before))


def same_state(value: Any, before: tuple[type, Items, tuple[tuple[str, Any], ...]]) -> bool:
    """Whether an instance has the same class and attributes."""
    kind, attributes, slots = before
    if type(value) is not kind or not same_items(getattr(value, "__dict__", {}), attributes):
        return False
    return all(getattr(value, name, MISSING) is slot for name, slot in slots)


def same_class(kind: type, before: tuple[tuple[type, ...], Items]) -> bool:
    """Whether a class has the same bases and members."""
    return kind.__bases__ is before[0] and same_items(vars(kind), before[1])


def same_subclasses(kind: type, before: list[type]) -> bool:
    """Whether a class has the same subclasses."""
    found: list[type] = type.__subclasses__(kind)
    return found == before


def same_function(function: types.FunctionType, before: tuple[Any, Any, Any]) -> bool:
    """Whether a function has the same code and defaults."""
    code, defaults, keyword_defaults = before
    return (
        function.__code__ is code and function.__defaults__ is defaults and function.__kwdefaults__ is keyword_defaults
    )


def content(cell: types.CellType) -> Any:
    """What a variable of a closure is bound to."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING  # not filled yet


def same_content(cell: types.CellType, before: Any) -> bool:
    """Whether a variable of a closure is bound to the same object."""
    return content(cell) is before


def same_result(ask: Callable[[], Any], before: Any) -> bool:
    """Whether asking gives the same object, as for what a weak reference or a context variable leads to."""
    return ask() is before


def same_digest(take: Callable[[], bytes], before: bytes) -> bool:
    """Whether data that changes in place has the same digest."""
    return take() == before


def same_source(path: str, before: Signature | None) -> bool:
    """Whether a source file is unchanged."""
    return stamp_of(path) == before


def variables(names: Iterable[str] | None) -> dict[str, str | None]:
    """Variables of the environment; None: all of them."""
    return dict(os.environ) if names is None else {name: os.environ.get(name) for name in names}


def same_variables(names: tuple[str, ...] | None, before: dict[str, str | None]) -> bool:
    """Whether variables of the environment are unchanged."""
    return variables(names) == before

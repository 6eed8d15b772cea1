# SPDX-License-Identifier: Apache-2.0
"""What a closure holds that can change in this process, and whether it has changed.

A closure is a structure of objects. As long as each place in it (a name of a module, an item of a list, an attribute)
holds the very object that it held, and no object of another kind (an array, a table) has other content, nothing has
changed. That is asked of each object in turn, without digesting anything that can't change in place.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NamedTuple

MISSING = object()
#: A function's attribute, or a class's method, that gives what counts of a wrapper in place of all that it holds.
COUNTS = "__counts__"
#: Types whose values can't change, and hold nothing that can.
ATOMS = frozenset({int, float, str, bytes, bool, complex, type(None), type(...), type(NotImplemented)})


class Watch(NamedTuple):
    """What is asked about an object, and the answer at first; ``name`` is that by which code reaches the object.

    The answer is a collection, and the same while that has the very objects that it had, in their order; or it is any
    value (``by_value``), and the same while it is equal.
    """

    ask: Callable[[], Any]
    before: Any
    by_value: bool
    name: str


def hold(watches: Iterable[Watch]) -> bool:
    """Whether nothing has changed."""
    try:
        for ask, before, by_value, _ in watches:
            now = ask()
            if by_value:
                if now != before:
                    return False
            elif len(now) != len(before) or not all(map(is_, now, before)):
                return False
    except Exception:  # noqa: BLE001 - an object's own code; what can't be looked at may have changed
        return False
    return True


def changed(watches: Iterable[Watch]) -> list[str]:
    """The names under which something has changed, each once."""
    return list(dict.fromkeys(watch.name for watch in watches if watch.name and not hold((watch,))))


def content(cell: types.CellType) -> Any:
    """What a variable of a closure is bound to."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING  # not filled yet


def variables(names: Iterable[str] | None) -> dict[str, str | None]:
    """Variables of the environment; None: all of them."""
    return dict(os.environ) if names is None else {name: os.environ.get(name) for name in names}

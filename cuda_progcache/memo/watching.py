# SPDX-License-Identifier: Apache-2.0
"""Watches on the parts of a closure that can change in this process.

A closure is a structure of objects. It hasn't changed if each place in it (a name of a module, an item of a list, an
attribute) holds the same object as before, and if the content of objects without such places (an array, a table) is
the same. Each watch checks one object; nothing that can't change in place is digested again.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any, NamedTuple

MISSING = object()
#: A function's attribute, or a class's method, that returns the parts of a wrapper that count, instead of everything in
#: it.
COUNTS = "__counts__"
#: Types whose values can't change and contain nothing that can change.
ATOMS = frozenset({int, float, str, bytes, bool, complex, type(None), type(...), type(NotImplemented)})


class Watch(NamedTuple):
    """A question about an object, and the first answer; ``name`` is the name through which code reaches the object.

    With ``by_value``, the answer is any value, and later answers must be equal to it. Otherwise it is a collection, and
    later answers must contain the same objects in the same order.
    """

    ask: Callable[[], Any]
    before: Any
    by_value: bool
    name: str


def hold(watches: Iterable[Watch]) -> bool:
    """Return whether nothing has changed."""
    try:
        for ask, before, by_value, _ in watches:
            now = ask()
            if by_value:
                if now != before:
                    return False
            elif len(now) != len(before) or not all(map(is_, now, before)):
                return False
    except Exception:  # noqa: BLE001 - an object's own code; an object that can't be examined may have changed
        return False
    return True


def changed(watches: Iterable[Watch]) -> list[str]:
    """Return the names through which something changed is reached, each once."""
    return list(dict.fromkeys(watch.name for watch in watches if watch.name and not hold((watch,))))


def content(cell: types.CellType) -> Any:
    """Return the object that a closure variable is bound to, or ``MISSING``."""
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING  # the cell is empty


def variables(names: Iterable[str] | None) -> dict[str, str | None]:
    """Return environment variables; all of them if ``names`` is None."""
    return dict(os.environ) if names is None else {name: os.environ.get(name) for name in names}

# SPDX-License-Identifier: Apache-2.0
"""Lazy evaluation: names of a package that are imported, and properties that are computed, on first access."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes 9 ms, and every package imports this module
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from functools import cached_property
    from typing import Any

    kept_property = cached_property
else:

    class kept_property:  # noqa: N801 - named like functools.cached_property, which it replaces
        """A property whose value is computed once and kept in the object.

        :class:`functools.cached_property` holds a lock per class while it computes a value (up to Python 3.11), and a
        child forked at that moment waits for it forever. With this class, two threads may both compute a value; the
        first is kept.
        """

        def __init__(self, make: Callable[[Any], Any]) -> None:
            self._make = make
            self.__doc__ = make.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: type | None = None) -> Any:
            if instance is None:
                return self
            return instance.__dict__.setdefault(self._name, self._make(instance))


def take(package: dict[str, Any], homes: Mapping[str, str], name: str) -> Any:
    """Import a name for a package's ``__getattr__``, and store it in the package for the next access.

    Parameters
    ----------
    package : dict
        The package's globals.
    homes : Mapping of str to str
        The package's names, and the submodules that define them.
    name : str
        The name to import.

    Raises
    ------
    AttributeError
        The package has no such name.
    """
    home = homes.get(name)
    if home is None:
        raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
    module = __import__(f"{package['__name__']}.{home}", fromlist=[name])  # importing importlib takes time
    value = package[name] = getattr(module, name)
    return value

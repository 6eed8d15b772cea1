# SPDX-License-Identifier: Apache-2.0
"""What is made when it is first asked for: names of a package, properties of an object."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes 9 ms, and this is imported with every package
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from functools import cached_property
    from typing import Any

    kept_property = cached_property
else:

    class kept_property:  # noqa: N801 - as functools.cached_property, whose place it takes
        """A property whose value is kept in the object.

        :class:`functools.cached_property` holds a lock of the class while it makes a value (up to Python 3.11), and a
        child forked at that moment waits for it for ever. Here two threads may both make a value; the first is kept.
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
    """Import a name, for a package's ``__getattr__``; the next time it is there.

    Parameters
    ----------
    package : dict
        The package's globals.
    homes : Mapping of str to str
        Its names, and the modules below it that they come from.
    name : str
        Which.

    Raises
    ------
    AttributeError
        The package has no such name.
    """
    home = homes.get(name)
    if home is None:
        raise AttributeError(f"module {package['__name__']!r} has no attribute {name!r}")
    module = __import__(f"{package['__name__']}.{home}", fromlist=[name])  # importlib itself takes a while to import
    value = package[name] = getattr(module, name)
    return value

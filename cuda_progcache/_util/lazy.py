# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported when they are first used."""

from __future__ import annotations

TYPE_CHECKING = False  # importing typing takes 9 ms, and this is imported with every package
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any


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

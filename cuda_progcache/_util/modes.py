# SPDX-License-Identifier: Apache-2.0
"""The mode of the cache: one switch for programs, header manifests, compiled templates and memoized calls.

========== ================================ ============================ =====================
mode       looked up                        kept                         a missing program
========== ================================ ============================ =====================
``rw``     yes                              yes                          is compiled and kept
``ro``     yes                              nothing, on any disk         is compiled
``off``    no                               nothing, on any disk         is compiled
``frozen`` yes                              nothing, on any disk         is an error
========== ================================ ============================ =====================

Templates are rendered and memoized functions run in every mode; for them, ``frozen`` is the same as ``ro``. A mode set
in code (``CompileService(mode=...)``, ``FileStreamProgramCache(mode=...)``) or with ``--mode`` applies to that object
or command. Otherwise ``CUDA_PROGCACHE`` applies, and is read at each use. Memoized functions follow the variable alone:
they belong to no service, and a service's mode applies to its programs, templates and recorded calls.

``cuda.core`` uses a store only as a mapping, so a miss in a frozen store raises the error that ends the compile. A
store in memory is a plain object of the application: it accepts entries in every mode.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MODES = ("rw", "ro", "off", "frozen")
VARIABLE = "CUDA_PROGCACHE"

# Each hit checks the variable. Testing an unset variable takes 1 us in os.environ, and 30 ns in its dictionary.
_variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_raw: str | bytes = VARIABLE if os.name == "nt" else VARIABLE.encode()


def current() -> str:
    """Return the mode set by ``CUDA_PROGCACHE``, ``rw`` if it is unset or empty; raise ModeError if it is invalid."""
    if _raw not in _variables:
        return "rw"
    return checked(os.environ[VARIABLE].strip() or "rw", VARIABLE)


def chosen(mode: str | None) -> str:
    """Return the given mode, or that of the environment if it is None; raise ModeError if it is invalid."""
    return current() if mode is None else checked(mode, "mode")


def of(cache: object) -> str:
    """Return the mode in which a cache is used: its own if it has one, otherwise that of the environment."""
    own = getattr(cache, "mode", None)
    return own if own in MODES else current()


def why_dropped(cache: object) -> str:
    """Return the reason why a cache didn't keep a program that was compiled for it."""
    mode = of(cache)
    return "the cache dropped it (see its warning)" if mode == "rw" else f"nothing is kept in mode {mode!r}"


def checked(mode: str, where: str) -> str:
    """Return the mode if it is valid.

    Raises
    ------
    ModeError
        The mode is invalid.
    """
    if mode in MODES:
        return mode
    from cuda_progcache._util.suggest import nearest
    from cuda_progcache.errors import ModeError

    near = nearest(str(mode), MODES)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ModeError(f"{where}={mode!r} isn't a mode of the cache ({', '.join(MODES)}){hint}")

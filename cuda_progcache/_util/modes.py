# SPDX-License-Identifier: Apache-2.0
"""The mode of the cache: one switch over programs, header manifests, compiled templates and memoized calls.

========== ================================ ============================ =====================
mode       looked up                        kept                         a program that isn't there
========== ================================ ============================ =====================
``rw``     yes                              yes                          is compiled and kept
``ro``     yes                              nothing, on any disk         is compiled
``off``    no                               nothing, on any disk         is compiled
``frozen`` yes                              nothing, on any disk         is an error
========== ================================ ============================ =====================

Templates are rendered and memoized functions run in every mode; ``frozen`` is ``ro`` to them. What code asks for
(``CompileService(mode=...)``, ``FileStreamProgramCache(mode=...)``, ``--mode``) holds where it is asked for;
``CUDA_PROGCACHE`` holds everywhere else, and is read at each use. Memoized functions follow the variable alone: they
belong to no service, and a service's mode is that of its programs, templates and recorded calls.

To ``cuda.core``, which knows a store as a mapping alone, a miss in a frozen store is the error that ends the compile.
A store in memory is a variable of the program's own: it takes what it is given in every mode.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

MODES = ("rw", "ro", "off", "frozen")
VARIABLE = "CUDA_PROGCACHE"

# To say that one isn't set takes os.environ 1 us, and this, its dictionary, 30 ns: each hit asks.
_variables: Mapping[Any, Any] = getattr(os.environ, "_data", os.environ)
_raw: str | bytes = VARIABLE if os.name == "nt" else VARIABLE.encode()


def current() -> str:
    """The mode that ``CUDA_PROGCACHE`` names; ``rw`` where it is unset or empty (ModeError: there is no such mode)."""
    if _raw not in _variables:
        return "rw"
    return checked(os.environ[VARIABLE].strip() or "rw", VARIABLE)


def chosen(mode: str | None) -> str:
    """The mode that was asked for; None: that of the environment (ModeError: there is no such mode)."""
    return current() if mode is None else checked(mode, "mode")


def of(cache: object) -> str:
    """The mode in which a cache is used: its own, where it was given one, else that of the environment."""
    own = getattr(cache, "mode", None)
    return own if own in MODES else current()


def why_dropped(cache: object) -> str:
    """Why a cache didn't take a program that was compiled for it."""
    mode = of(cache)
    return "the cache dropped it (see its warning)" if mode == "rw" else f"nothing is kept in mode {mode!r}"


def checked(mode: str, where: str) -> str:
    """The mode, if it is one.

    Raises
    ------
    ModeError
        It is none.
    """
    if mode in MODES:
        return mode
    from cuda_progcache._util.suggest import nearest
    from cuda_progcache.errors import ModeError

    near = nearest(str(mode), MODES)
    hint = f"; did you mean {near!r}?" if near else ""
    raise ModeError(f"{where}={mode!r} isn't a mode of the cache ({', '.join(MODES)}){hint}")

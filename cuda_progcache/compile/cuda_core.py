# SPDX-License-Identifier: Apache-2.0
"""Compiles by ``cuda.core`` itself, told as ours are.

:func:`watch` puts a subclass in the place of :class:`cuda.core.Program`, and one in that of :class:`cuda.core.Linker`,
when ``cuda.core`` is imported. They do what they did; and they emit ``hit``, ``miss``, ``compile`` and ``refused``
events, of what is compiled past every cache, too. What goes to one of our stores gets a record there, so that a later
miss can be explained. Where nobody listens, a call goes straight through.

``cuda.core`` is compiled: its methods can't be replaced in place, and nothing else of it can be seen from outside.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence

from cuda_progcache import events

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

#: The modules in which the classes are made, and the classes.
_HOMES = {"cuda.core._program": "Program", "cuda.core._linker": "Linker"}


def watch() -> None:
    """Have ``cuda.core`` tell of its compiles from now on, in this process; whether it is imported or not.

    Names that were taken out of it before (``from cuda.core import Program``) stay what they are.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for home in _HOMES:
        if home in sys.modules:
            _watch_in(sys.modules[home])


class _Finder:
    """Finds the two modules as they would be found, and has them changed once they are loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """What the finders after this one say."""
        if name not in _HOMES:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # all that importing asks of one
                return spec
        return None


class _Loader:
    """Loads a module as its own loader does, and puts that back."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader does."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Load it, and put the subclass in."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _watch_in(module)


def _watch_in(module: ModuleType) -> None:
    name = _HOMES[module.__name__]
    theirs = getattr(module, name, None)
    if theirs is None or getattr(theirs, "_cuda_progcache_watched", False):
        return  # another version of cuda.core
    ours = _program(theirs) if name == "Program" else _linker(theirs)
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(ours, attribute, getattr(theirs, attribute))
    setattr(module, name, ours)
    package = sys.modules.get("cuda.core")
    if getattr(package, name, None) is theirs:
        setattr(package, name, ours)


def _program(theirs: Any) -> type:
    class Program(theirs):  # type: ignore[misc]
        _cuda_progcache_watched = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._made_of = (args, kwargs)

        @functools.wraps(theirs.compile)
        def compile(self, *args: Any, **kwargs: Any) -> Any:
            if not events.wanted("compile"):
                return super().compile(*args, **kwargs)
            from cuda_progcache.compile.watched_call import WatchedCall

            call = WatchedCall(self._made_of, args, kwargs)
            try:
                # Returned at once: a frame that can raise holds no ObjectCode, whose repr deadlocks without a driver.
                return super().compile(*args, **call.keywords())
            except Exception as error:
                call.failed(error)
                raise
            finally:
                call.tell()

    return Program


def _linker(theirs: Any) -> type:
    class Linker(theirs):  # type: ignore[misc]
        _cuda_progcache_watched = True

        def __init__(self, *object_codes: Any, options: Any = None) -> None:
            super().__init__(*object_codes, options=options)
            self._made_for = (str(getattr(options, "name", None) or ""), str(getattr(options, "arch", None) or ""))

        @functools.wraps(theirs.link)
        def link(self, target_type: Any, *args: Any, **kwargs: Any) -> Any:
            clock, failed = time.perf_counter(), False
            try:
                return super().link(target_type, *args, **kwargs)
            except Exception:
                failed = True
                raise
            finally:
                if not failed and events.wanted("compile"):
                    name, arch = self._made_for
                    about = (name or "a link by cuda.core", str(target_type).lower(), arch)
                    events.emit(events.Event("compile", *about, seconds=time.perf_counter() - clock))

    return Linker

# SPDX-License-Identifier: Apache-2.0
"""Events and records for compiles by ``cuda.core`` itself.

:func:`watch` replaces :class:`cuda.core.Program` by a subclass when ``cuda.core`` is imported. The subclass behaves the
same, and emits ``hit``, ``miss``, ``compile`` and ``refused`` events, also for compiles without a cache. A program that
goes to one of our stores is compiled once, however many processes ask for it, and gets a record, so that a later miss
can be explained. Without subscribers, a call goes straight through.

``cuda.core`` is a compiled extension: its methods can't be replaced in place, and the class is the only hook.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

from cuda_progcache import events

TYPE_CHECKING = False
if TYPE_CHECKING:
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

#: The module in which the class is made.
_HOME = "cuda.core._program"


def watch() -> None:
    """Make ``cuda.core`` report its compiles in this process from now on, whether it is imported already or later.

    Names that were imported from it before (``from cuda.core import Program``) keep the original class.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if _HOME in sys.modules:
        _watch_in(sys.modules[_HOME])


class _Finder:
    """Finds the module with the other finders, and patches it once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        """Return the spec that the other finders return, with our loader."""
        if name != _HOME:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]  # has all that importing uses
                return spec
        return None


class _Loader:
    """Loads the module with its own loader, patches it, and restores its loader."""

    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module with its own loader."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and replace the class."""
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        module.__loader__ = self._inner
        self._inner.exec_module(module)
        _watch_in(module)


def _watch_in(module: ModuleType) -> None:
    theirs = getattr(module, "Program", None)
    if theirs is None or getattr(theirs, "_cuda_progcache_watched", False):
        return  # another version of cuda.core, or already replaced
    ours = _watched(theirs)
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(ours, attribute, getattr(theirs, attribute))
    module.__dict__["Program"] = ours
    package = sys.modules.get("cuda.core")
    if package is not None and package.__dict__.get("Program") is theirs:
        package.__dict__["Program"] = ours


def _watched(theirs: Any) -> type:
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

            call = WatchedCall(super().compile, self._made_of, args, kwargs)
            # A kept error keeps this frame alive, and a Program freed only by the garbage collector is cleaned up too
            # late.
            del self
            try:
                # Returned at once: a frame that can raise holds no ObjectCode, whose repr deadlocks without a driver.
                return call.run()
            except Exception as error:
                call.failed(error)
                raise
            finally:
                call.tell()

    return Program

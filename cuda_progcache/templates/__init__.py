# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: parameters to CUDA source, with a map from each generated line back to its template.

Each name is imported when it is first used: a kernel whose templates lie compiled in the cache needs few of them.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.templates.bytecode_cache import BytecodeCache as BytecodeCache
    from cuda_progcache.templates.bytecode_cache import hash_source as hash_source
    from cuda_progcache.templates.environment import KernelEnvironment as KernelEnvironment
    from cuda_progcache.templates.environment import KernelTemplate as KernelTemplate
    from cuda_progcache.templates.source_map import Location as Location
    from cuda_progcache.templates.source_map import SourceMap as SourceMap

_HOME = {
    "BytecodeCache": "bytecode_cache",
    "KernelEnvironment": "environment",
    "KernelTemplate": "environment",
    "Location": "source_map",
    "SourceMap": "source_map",
    "hash_source": "bytecode_cache",
}

__all__ = ["BytecodeCache", "KernelEnvironment", "KernelTemplate", "Location", "SourceMap", "hash_source"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

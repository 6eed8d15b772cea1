# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: parameters to CUDA source, with a map from each generated line back to its template.

Jinja2's syntax with a compiler of our own: `KernelEnvironment` for CUDA source, `Environment` and `Template` for any
text, `patch_jinja2` for programs that use Jinja2 itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cuda_progcache.templates.environment import KernelEnvironment, KernelTemplate
from cuda_progcache.templates.source_map import Location, SourceMap

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler import Compiler
    from cuda_progcache.templates.template import Environment, Template, patch_jinja2, unpatch_jinja2

__all__ = [
    "Compiler",
    "Environment",
    "KernelEnvironment",
    "KernelTemplate",
    "Location",
    "SourceMap",
    "Template",
    "patch_jinja2",
    "unpatch_jinja2",
]

# These import jinja2, which a hit in the bytecode cache must not.
_LAZY = {
    "Compiler": "compiler",
    "Environment": "template",
    "Template": "template",
    "patch_jinja2": "template",
    "unpatch_jinja2": "template",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})

# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: they turn parameters into CUDA source and can map each generated line back to its template.

The syntax is Jinja2's; the compiler is our own. `KernelEnvironment` renders CUDA source, `Environment` and `Template`
render any text, `patch_jinja2` serves programs that use Jinja2 itself, and `BytecodeCache` stores compiled templates.
Each name is imported on first use, because a kernel whose templates are already compiled needs only a few of them.
"""

from __future__ import annotations

from cuda_progcache._util.lazy import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.templates.bytecode_cache import BytecodeCache as BytecodeCache
    from cuda_progcache.templates.bytecode_cache import hash_source as hash_source
    from cuda_progcache.templates.compiler import Compiler as Compiler
    from cuda_progcache.templates.environment import KernelEnvironment as KernelEnvironment
    from cuda_progcache.templates.environment import KernelTemplate as KernelTemplate
    from cuda_progcache.templates.patch import patch_jinja2 as patch_jinja2
    from cuda_progcache.templates.patch import unpatch_jinja2 as unpatch_jinja2
    from cuda_progcache.templates.source_map import Location as Location
    from cuda_progcache.templates.source_map import SourceMap as SourceMap
    from cuda_progcache.templates.template import Environment as Environment
    from cuda_progcache.templates.template import Template as Template

_HOME = {
    "BytecodeCache": "bytecode_cache",
    "Compiler": "compiler",
    "Environment": "template",
    "KernelEnvironment": "environment",
    "KernelTemplate": "environment",
    "Location": "source_map",
    "SourceMap": "source_map",
    "Template": "template",
    "hash_source": "bytecode_cache",
    "patch_jinja2": "patch",
    "unpatch_jinja2": "patch",
}

__all__ = [
    "BytecodeCache",
    "Compiler",
    "Environment",
    "KernelEnvironment",
    "KernelTemplate",
    "Location",
    "SourceMap",
    "Template",
    "hash_source",
    "patch_jinja2",
    "unpatch_jinja2",
]


def __getattr__(name: str) -> Any:
    return take(globals(), _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

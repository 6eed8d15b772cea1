# SPDX-License-Identifier: Apache-2.0
"""What is inside a binary: bytes in, named values out.

`resource_usage` gives registers, spills and memory of each kernel of a cubin, `spills` the instructions that spill,
`Cubin` the parts of the file that both are read from, and `sass` the disassembly. `sass` takes a tool of the CUDA
toolkit; nothing here takes a GPU or a cache. Each name is imported when it is first used.
"""

from __future__ import annotations

from cuda_progcache._util.lazy import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.inspect.elf import Cubin as Cubin
    from cuda_progcache.inspect.nvdisasm import disassemble as disassemble
    from cuda_progcache.inspect.nvdisasm import find_tool as find_tool
    from cuda_progcache.inspect.nvdisasm import sass as sass
    from cuda_progcache.inspect.occupancy_calculator import Multiprocessor as Multiprocessor
    from cuda_progcache.inspect.occupancy_calculator import Occupancy as Occupancy
    from cuda_progcache.inspect.occupancy_calculator import multiprocessor as multiprocessor
    from cuda_progcache.inspect.occupancy_calculator import occupancy as occupancy
    from cuda_progcache.inspect.resources import Resources as Resources
    from cuda_progcache.inspect.resources import resource_record as resource_record
    from cuda_progcache.inspect.resources import resource_usage as resource_usage
    from cuda_progcache.inspect.spilling import Spill as Spill
    from cuda_progcache.inspect.spilling import spills as spills

_HOME = {
    "Cubin": "elf",
    "Multiprocessor": "occupancy_calculator",
    "Occupancy": "occupancy_calculator",
    "Resources": "resources",
    "Spill": "spilling",
    "disassemble": "nvdisasm",
    "find_tool": "nvdisasm",
    "multiprocessor": "occupancy_calculator",
    "occupancy": "occupancy_calculator",
    "resource_record": "resources",
    "resource_usage": "resources",
    "sass": "nvdisasm",
    "spills": "spilling",
}

__all__ = [
    "Cubin",
    "Multiprocessor",
    "Occupancy",
    "Resources",
    "Spill",
    "disassemble",
    "find_tool",
    "multiprocessor",
    "occupancy",
    "resource_record",
    "resource_usage",
    "sass",
    "spills",
]


def __getattr__(name: str) -> Any:
    return take(globals(), _HOME, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})

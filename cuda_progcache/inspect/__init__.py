# SPDX-License-Identifier: Apache-2.0
"""Inspection of binaries: functions from bytes to named values.

`resource_usage` returns registers, spills and memory of each kernel in a cubin, `occupancy` how many blocks of a kernel
run at once, `instructions` the machine code with its source lines, `diff` the differences between two binaries, and
`Cubin` the parts of the file. Functions that show machine code need nvdisasm; none needs a GPU or a cache. Each name is
imported when it is first used.
"""

from __future__ import annotations

from cuda_progcache._util.lazy import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from cuda_progcache.inspect.differences import BinaryDiff as BinaryDiff
    from cuda_progcache.inspect.differences import KernelDiff as KernelDiff
    from cuda_progcache.inspect.differences import diff as diff
    from cuda_progcache.inspect.elf import Cubin as Cubin
    from cuda_progcache.inspect.listing import Instruction as Instruction
    from cuda_progcache.inspect.listing import Source as Source
    from cuda_progcache.inspect.listing import instructions as instructions
    from cuda_progcache.inspect.listing import live_peak as live_peak
    from cuda_progcache.inspect.listing import mix as mix
    from cuda_progcache.inspect.listing import normalised as normalised
    from cuda_progcache.inspect.nvdisasm import disassemble as disassemble
    from cuda_progcache.inspect.nvdisasm import find_tool as find_tool
    from cuda_progcache.inspect.nvdisasm import sass as sass
    from cuda_progcache.inspect.occupancy_calculator import Cliff as Cliff
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
    "BinaryDiff": "differences",
    "Cliff": "occupancy_calculator",
    "Cubin": "elf",
    "Instruction": "listing",
    "KernelDiff": "differences",
    "Multiprocessor": "occupancy_calculator",
    "Occupancy": "occupancy_calculator",
    "Resources": "resources",
    "Source": "listing",
    "Spill": "spilling",
    "diff": "differences",
    "disassemble": "nvdisasm",
    "find_tool": "nvdisasm",
    "instructions": "listing",
    "live_peak": "listing",
    "mix": "listing",
    "multiprocessor": "occupancy_calculator",
    "normalised": "listing",
    "occupancy": "occupancy_calculator",
    "resource_record": "resources",
    "resource_usage": "resources",
    "sass": "nvdisasm",
    "spills": "spilling",
}

__all__ = [
    "BinaryDiff",
    "Cliff",
    "Cubin",
    "Instruction",
    "KernelDiff",
    "Multiprocessor",
    "Occupancy",
    "Resources",
    "Source",
    "Spill",
    "diff",
    "disassemble",
    "find_tool",
    "instructions",
    "live_peak",
    "mix",
    "multiprocessor",
    "normalised",
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

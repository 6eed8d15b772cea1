# SPDX-License-Identifier: Apache-2.0
"""A fresh process that renders templates: ``python -m ci.differential.child FOLDER CACHE KIND``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

from ci.differential.ways import Outcome, kernel_outcomes, outcomes, text
from cuda_progcache.templates import BytecodeCache, Environment, KernelEnvironment, patch_jinja2


def kernels(folder: str, cache: str, sources: list[str]) -> Iterator[list[Outcome]]:
    """Render with a kernel environment."""
    environment = KernelEnvironment(folder, bytecode_cache=cache)
    return (kernel_outcomes(partial(environment.from_string, source)) for source in sources)


def environments(folder: str, cache: str, asked: list[list[bool]], *, patched: bool) -> Iterator[list[Outcome]]:
    """Render the files ``0.txt``, ``1.txt``, ... with environments that escape, or have strict undefined values."""
    kind: Any = Environment
    if patched:
        patch_jinja2()
        kind = jinja2.Environment
    made: dict[tuple[bool, ...], Any] = {}
    for number, (autoescape, strict) in enumerate(asked):
        environment = made.get((autoescape, strict))
        if environment is None:
            undefined = jinja2.StrictUndefined if strict else jinja2.Undefined
            made[autoescape, strict] = environment = kind(
                loader=jinja2.FileSystemLoader(folder),
                bytecode_cache=BytecodeCache(cache),
                autoescape=autoescape,
                undefined=undefined,
            )
        name = f"{number}.txt"
        yield outcomes(partial(environment.get_template, name), text, str(Path(folder) / name))


if __name__ == "__main__":
    folder, cache, kind = sys.argv[1:]
    asked = json.load(sys.stdin)
    if kind == "kernels":
        rendered = kernels(folder, cache, asked)
    else:
        rendered = environments(folder, cache, asked, patched=kind == "patched")
    print(json.dumps(list(rendered)))

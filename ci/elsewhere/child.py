# SPDX-License-Identifier: Apache-2.0
"""Compiles programs in one place: run by that place's interpreter, as its user, in its directory.

Reads ``{"programs": [...], "cache": {"kind", "path"} | null}`` from stdin and writes a list of answers to stdout, one
for each program. Needs nothing but the installed package.
"""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def main() -> int:
    """Answer for every program."""
    from cuda_progcache import subscribe

    asked = json.load(sys.stdin)
    missed: dict[str | None, tuple[str, ...]] = {}
    subscribe(lambda event: missed.update({event.digest: event.reasons}) if event.kind == "miss" else None)
    cache = _opened(asked["cache"])
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda program: _answer(program, cache), asked["programs"]))
    for answer in answers:
        answer["why"] = missed.get(answer.get("digest"), ())
    loaded = {line.split("/")[-1].strip() for line in _maps() if "/" in line}
    compilers = sorted(n for n in loaded if n.startswith(("libnvrtc", "libnvJitLink", "libnvvm", "libcuda.")))
    with open("/proc/thread-self/children", encoding="ascii") as children:
        compiling = bool(children.read().strip())
    found = {"compilers": compilers, "compiling": compiling, "cuda_core": "cuda.core" in sys.modules}
    json.dump({"answers": answers, **found}, sys.stdout)
    return 0


def _opened(cache: dict[str, str] | None) -> Any:
    from cuda_progcache import FileStreamProgramCache, InMemoryProgramCache, ProgramCacheStack, ReadOnlyProgramCache

    if cache is None:
        return None
    if cache["kind"] == "layer":
        return ProgramCacheStack([InMemoryProgramCache(), ReadOnlyProgramCache(cache["path"])])
    return FileStreamProgramCache(cache["path"])


def _answer(program: dict[str, Any], cache: Any) -> dict[str, Any]:
    from cuda_progcache import ProgCacheError, Program, ProgramOptions

    try:
        given = {name: _hashable(value) for name, value in program["options"].items()}
        options = ProgramOptions(arch="sm_80", **given)
        done = Program(program["source"], program["code_type"], options).compiled(
            program["target_type"], program["names"], cache=cache
        )
    except ProgCacheError as error:
        return {"name": program["name"], "error": str(error)}
    return {
        "name": program["name"],
        "hit": done.hit,
        "digest": done.digest,
        "reason": done.reason,
        "bytes": hashlib.sha256(done.data).hexdigest(),
        "symbols": {str(name): symbol.decode() for name, symbol in done.symbol_mapping.items()},
        "log": done.log,
    }


def _hashable(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(_hashable(each) for each in value) if isinstance(value, list) else value


def _maps() -> list[str]:
    with open("/proc/self/maps", encoding="utf-8") as file:
        return file.readlines()


if __name__ == "__main__":
    sys.exit(main())

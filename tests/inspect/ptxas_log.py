# SPDX-License-Identifier: Apache-2.0
"""The output of ``ptxas -v`` for each kernel, read from a compile's log."""

from __future__ import annotations

import re
from typing import Any

ENTRY = re.compile(r"Compiling entry function '(\S+)'")
FUNCTION = re.compile(r"Function properties for (\S+)")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers, used (\d+) barriers")
OTHERS = {
    "stack_bytes": re.compile(r"(\d+) bytes cumulative stack size"),
    "shared_bytes": re.compile(r"(\d+) bytes smem"),
    "constant_bytes": re.compile(r"(\d+) bytes cmem\[0\]"),
    "literal_bytes": re.compile(r"(\d+) bytes cmem\[2\]"),
}
REMARK = re.compile(r"ptxas (info    :|        \.) |$")


def read(log: str, *, linked: bool = True) -> dict[str, dict[str, Any]]:
    """Return what ptxas prints for each kernel, by kernel name and by the names of ``Resources``.

    In a linked program, functions that weren't inlined follow their kernel in the log, and their spills are added to
    the kernel's. Constant banks are left out if ptxas doesn't print any (from sm_90 on).
    """
    found: dict[str, dict[str, Any]] = {}
    of: dict[str, Any] = {}
    function = ""
    for line in log.splitlines():
        if entry := ENTRY.search(line):
            of = found[entry[1]] = {"spill_store_bytes": 0, "spill_load_bytes": 0, "stack_bytes": None}
        elif named := FUNCTION.search(line):
            function = named[1]
        elif (spills := SPILLS.search(line)) and (linked or function in found):
            frame, stores, loads = map(int, spills.groups())
            if of["stack_bytes"] is None:
                of["stack_bytes"] = frame
            of["spill_store_bytes"] += stores
            of["spill_load_bytes"] += loads
        elif used := USED.search(line):
            of["registers"], of["barriers"] = map(int, used.groups())
            told = {name: int(match[1]) for name, pattern in OTHERS.items() if (match := pattern.search(line))}
            if "constant_bytes" in told:
                told.setdefault("literal_bytes", 0)
            of |= {"shared_bytes": 0} | told
    return found


def differences(usage: dict[str, Any], log: str, *, linked: bool = True) -> dict[str, Any]:
    """Return where resources differ from the output of ptxas, as {kernel: {name: (ours, theirs)}}.

    A kernel that only one of them has is a difference: {kernel: (ours has it, theirs has it)}.
    """
    theirs = read(log, linked=linked)
    assert theirs, f"ptxas said nothing: {log!r}"
    wrong: dict[str, Any] = {name: (name in usage, name in theirs) for name in usage.keys() ^ theirs.keys()}
    for name in usage.keys() & theirs.keys():
        differing = {key: (usage[name][key], told) for key, told in theirs[name].items() if usage[name][key] != told}
        if differing:
            wrong[name] = differing
    return wrong


def warnings(log: str) -> list[str]:
    """Return the lines of a log that ``-v`` didn't add."""
    return [line for line in log.splitlines() if not REMARK.match(line)]

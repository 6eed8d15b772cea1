# SPDX-License-Identifier: Apache-2.0
"""The reasons why programs were compiled more than once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ci.fleet.log import Happened


class Extra(NamedTuple):
    """The numbers of extra compiles, by reason: compiles of programs that were compiled before, or being compiled.

    Attributes
    ----------
    needless : int
        The tier had the program, or a living process was compiling it or sending it to the tier.
    away : int
        The server was away.
    gone : int
        The tier lacked the program, and nobody was compiling or sending it: it was lost with its process or the server.
    """

    needless: int
    away: int
    gone: int


def judge(happened: Iterable[Happened]) -> Extra:
    """Judge every compile that ended, except the first of each program, by what it could have known when it began."""
    at_it: dict[int, set[int]] = defaultdict(set)  # processes that compile or send a program, by program
    begun: dict[int, dict[int, str]] = defaultdict(dict)  # verdicts by program and process, in order
    ended: dict[int, set[int]] = defaultdict(set)
    for line in happened:
        key, process = line.key, line.process
        if line.what in {"begin", "there", "away"}:
            idle = line.what == "begin" and not at_it[key]
            begun[key][process] = "gone" if idle else "away" if line.what == "away" else "needless"
            at_it[key].add(process)
        elif line.what == "end":
            ended[key].add(process)
        elif line.what == "landed":
            at_it[key].discard(process)
        elif line.what == "killed":
            for those in at_it.values():
                those.discard(process)
    found = Counter[str]()
    for key, verdicts in begun.items():
        found.update([verdict for process, verdict in verdicts.items() if process in ended[key]][1:])
    return Extra(**{name: found[name] for name in Extra._fields})

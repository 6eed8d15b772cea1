# SPDX-License-Identifier: Apache-2.0
"""Why a call had to be run: its key against that of the nearest earlier call of the function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cuda_progcache.memo.call import NO_RESULT, Call, DigestedCall, Home, LazyCall, Unstored
from cuda_progcache.memo.digest import Digest, Indigestible, digest

#: Calls of a function that are looked at for the nearest one: the latest.
_CONSIDERED = 1000
_SHOWN = 60


def explain(cache: Home, call: str | Call | LazyCall | DigestedCall) -> tuple[str, ...]:
    """What tells a call from the nearest one that ran before it.

    Parameters
    ----------
    cache : BaseCache
        Where the earlier calls are.
    call : str or call
        A call, recorded or not, or the key of one that is recorded, or its first digits.

    Returns
    -------
    tuple of str
        A sentence per difference; or that it was the first call, or that nothing differs: then it is in the cache, or
        was removed from it.

    Raises
    ------
    KeyError
        No call has this key.
    """
    asked = cache.load(cache.expand(call)) if isinstance(call, str) else call
    key = asked.to_lookup_key()
    mine = _components(asked)
    before = _runtime(asked).get("timestart")
    nearest: dict[str, Any] | None = None
    differing = 0
    earlier = [
        other for other in cache.query(name=asked.name)
        if other.to_lookup_key() != key and (before is None or _runtime(other).get("timestop", 0.0) <= before)
    ]  # fmt: skip
    earlier.sort(key=lambda other: -_runtime(other).get("timestop", 0.0))
    for other in earlier[:_CONSIDERED]:
        theirs = _components(other)
        count = sum(_digest_of(mine.get(name)) != _digest_of(theirs.get(name)) for name in mine.keys() | theirs.keys())
        if nearest is None or count < differing:
            nearest, differing = {"call": other, "components": theirs}, count
    if nearest is None:
        return (f"first call of {asked.name}",)
    found = tuple(_sentences(asked, mine, nearest["call"], nearest["components"]))
    return found or ("nothing differs",)


def _runtime(call: Any) -> Mapping[str, Any]:
    found: Mapping[str, Any] = (call.metadata or {}).get("runtime", {})
    return found


def _components(call: Call | LazyCall | DigestedCall) -> dict[str, Any]:
    """What a key is made of, values or digests, by name."""
    arguments, _, _ = call._parts()
    return {
        "module": call.module, "version": call.version, "code": call.code_digest,
        **{f"argument {name}": value for name, value in arguments.items()},
    }  # fmt: skip


def _digest_of(value: Any) -> Digest | None:
    try:
        return digest(value)
    except Indigestible:
        return None


def _sentences(asked: Any, mine: Mapping[str, Any], other: Any, theirs: Mapping[str, Any]) -> list[str]:
    found = []
    for name in dict.fromkeys([*mine, *theirs]):
        if name in mine and name in theirs and _digest_of(mine[name]) == _digest_of(theirs[name]):
            continue
        if name not in theirs:
            found.append(f"{name} is new")
        elif name not in mine:
            found.append(f"{name} is no longer there")
        elif name == "code":
            found.append("the function's code, or something it refers to, differs")
        else:
            found.append(f"{name} {_shown(other, name, theirs)} → {_shown(asked, name, mine)}")
    return found


def _shown(call: Any, name: str, components: Mapping[str, Any]) -> str:
    """A component for people: its value where that can be had, else its digest."""
    value = components[name]
    if name.startswith("argument "):
        have = call.arguments
        try:
            value = have[name.removeprefix("argument ")]
        except KeyError:
            value = components[name]
    if isinstance(value, (Digest, Unstored)) or value is NO_RESULT:
        return f"<{str(value)[:12]}>"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"

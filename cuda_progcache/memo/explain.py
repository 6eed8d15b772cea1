# SPDX-License-Identifier: Apache-2.0
"""Explanations of misses: how a call's key differs from that of the nearest earlier call of the function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cuda_progcache.memo.call import NO_RESULT, Call, DigestedCall, Home, LazyCall
from cuda_progcache.memo.digest import Digest, Indigestible, digest

#: How many of a function's latest calls are searched for the nearest one.
_CONSIDERED = 1000
_SHOWN = 60
#: The other inputs of a key, by their name in records, with the name shown.
_INPUTS = {
    "files": "file", "environment": "environment variable", "depends_on": "depends_on_vars", "classes": "code of class",
}  # fmt: skip

AnyCall = Call | LazyCall | DigestedCall


def explain(cache: Home, call: str | AnyCall) -> tuple[str, ...]:
    """Explain how a call differs from the nearest call that ran before it.

    Parameters
    ----------
    cache : BaseCache
        The cache that holds the earlier calls.
    call : str or call
        A call, recorded or not, or the key of a recorded call, or the key's first digits.

    Returns
    -------
    tuple of str
        A sentence per difference; or a sentence that says that the call was the first one, or that nothing differs: no
        difference between the two keys' inputs is recorded.

    Raises
    ------
    KeyError
        No recorded call has this key.
    """
    asked = cache.load(cache.expand(call)) if isinstance(call, str) else call
    found = differences(cache, asked)
    if found is None:
        return (f"first call of {asked.name}",)
    return tuple(found) or ("nothing differs",)


def differences(cache: Home, call: AnyCall) -> list[str] | None:
    """Return how a call differs from the nearest one that ran before it, as sentences; None for the first call."""
    key, mine, before = call.to_lookup_key(), _components(call), call.runtime.get("timestart")
    earlier = [
        other for other in cache.query(name=call.name)
        if other.to_lookup_key() != key and (before is None or other.runtime.get("timestop", 0.0) <= before)
    ]  # fmt: skip
    earlier.sort(key=lambda other: -other.runtime.get("timestop", 0.0))
    nearest = min(
        ((other, _components(other)) for other in earlier[:_CONSIDERED]),
        key=lambda found: len(_differing(mine, found[1])), default=None,
    )  # fmt: skip
    if nearest is None:
        return None
    other, theirs = nearest
    return [_sentence(name, call, mine, other, theirs) for name in _differing(mine, theirs)]


def _components(call: AnyCall) -> dict[str, Any]:
    """Return the inputs of a key by name: values, or digests in their place."""
    arguments, _, metadata = call._parts()
    found: dict[str, Any] = {"module": call.module, "version": call.version, "code": call.code_digest}
    known = getattr(call, "digests", {})  # the arguments' digests in the key, which may leave out parts of a value
    for name, value in arguments.items():
        found[f"argument {name}"] = Digest(known[name].decode()) if name in known else value
    inputs = metadata.get("inputs") or {}
    for part, label in _INPUTS.items():
        made = str if part == "environment" else Digest
        found.update((f"{label} {name}", made(value)) for name, value in (inputs.get(part) or {}).items())
    found.update((f"package {name}", version) for name, version in (metadata.get("packages") or {}).items())
    return found


def _digest_of(value: Any) -> Digest | None:
    try:
        return digest(value)
    except Indigestible:
        return None


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    return [
        name for name in {**mine, **theirs}
        if name not in mine or name not in theirs or _digest_of(mine[name]) != _digest_of(theirs[name])
    ]  # fmt: skip


def _sentence(name: str, call: Any, mine: Mapping[str, Any], other: Any, theirs: Mapping[str, Any]) -> str:
    if name not in theirs:
        return f"{name} is new"
    if name not in mine:
        return f"{name} was removed"
    if name == "code":
        return "the function's code, or something it refers to, has changed"
    before, now = _shown(other, name, theirs[name]), _shown(call, name, mine[name])
    return f"{name} changed" if before is None or now is None else f"{name} {before} → {now}"


def _shown(call: Any, name: str, value: Any) -> str | None:
    """Return a key's input as text for display; None if only its digest is known."""
    if name.startswith("argument "):
        try:
            value = call.arguments[name.removeprefix("argument ")]
        except KeyError:
            return None
    if isinstance(value, Digest) or value is NO_RESULT:
        return None
    text = value if name.startswith("environment") else repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"

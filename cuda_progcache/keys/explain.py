# SPDX-License-Identifier: Apache-2.0
"""Sentences that explain why two compiles have different keys."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

from cuda_progcache.errors import OptionError
from cuda_progcache.keys import option_tables as tables
from cuda_progcache.keys.tool_versions import difference, named

_PATHS = {
    "cwd": "the working directory differs, and reaches the output",
    "pwd": "the working directory has another name ($PWD), which reaches the output",
    "include_path": "the include directories differ, and reach the output",
    "bundled_headers": "the folder of NVRTC's own headers differs, and reaches the output",
    "pre_include": "the folder of a pre-included header differs, and reaches the output",
    "source_folder": "the source's folder differs, and reaches the output",
    "debug_source": "the directory of sources for debuggers differs, and reaches the output",
    "name_path": "the path in the program's name differs, and reaches the output",
    "path": "the path of a header differs, and reaches the output",
}

#: Labels of the components that are known only once the headers are known.
OF_HEADERS = frozenset({*_PATHS, "headers", "has_include", "hermetic"})

Pairs = Sequence[Sequence[str]]
"""Printable components: ``[[label, value], ...]``."""

Versions = Mapping[tuple[str, str], str]
"""Versions of compiler files, by name and identity."""

_NONE: Versions = {}


def explain(new: Pairs, old: Pairs, new_headers: Mapping[str, str], old_headers: Mapping[str, str]) -> list[str]:
    """Explain the differences between two compiles.

    Parameters
    ----------
    new, old : sequence of (label, value)
        The printable components of each key, as records store them.
    new_headers, old_headers : mapping of str to str
        Header names and their digests.

    Returns
    -------
    list of str
        One sentence per difference; empty if there is none.
    """
    return [sentence for _, sentence in differing(new, old, new_headers, old_headers)]


def differing(
    new: Pairs,
    old: Pairs,
    new_headers: Mapping[str, str],
    old_headers: Mapping[str, str],
    versions: Versions = _NONE,
) -> list[tuple[str, str]]:
    """Like :func:`explain`, but return pairs of label and sentence; labels of link inputs have no input number.

    ``versions`` has the known versions of the compiler files, by name and identity.

    If only one key has some path component, and there are other differences, the path isn't reported: the other
    difference is the reason why the path is in the key.
    """
    found: list[tuple[str, str]] = []
    only_one: list[tuple[str, str]] = []
    for label in dict.fromkeys(label for label, _ in [*new, *old]):
        mine, theirs = ([value for name, value in parts if name == label] for parts in (new, old))
        if mine == theirs:
            continue
        prefix, plain = of_input(label)
        told = only_one if plain in _PATHS and not (mine and theirs) else found
        if plain.startswith("tool "):
            sentences: Iterable[str] = _tool(plain.removeprefix("tool "), mine, theirs, versions)
        else:
            sentences = _differences(plain, mine, theirs, new_headers, old_headers)
        told += [(plain, prefix + sentence) for sentence in sentences]
    return found or only_one


def of_input(label: str) -> tuple[str, str]:
    """Split the label of a link input's component, such as ``"input 0 code"``, into the input's name and the rest."""
    input_, _, rest = label.partition(" ")
    index, blank, plain = rest.partition(" ")
    return (f"input {index}: ", plain) if input_ == "input" and blank else ("", label)


def _differences(
    label: str, mine: list[str], theirs: list[str], new_headers: Mapping[str, str], old_headers: Mapping[str, str]
) -> Iterable[str]:
    if label == "code":
        yield "the source differs"
    elif label == "headers":
        yield _headers(new_headers, old_headers)
    elif label == "option":
        yield from _options(mine, theirs)
    elif label in _PATHS:
        yield _PATHS[label]
    elif label == "hermetic":
        yield "it is compiled hermetically now" if mine else "it is no longer compiled hermetically"
    elif label == "has_include":
        yield from _probes(mine, theirs)
    elif label == "extra_source":
        yield "an extra source differs"
    elif label == "input" and set(mine) != set(theirs):
        yield "an input of the link differs"
    else:
        gone = ", ".join(shown(label, value) for value in theirs if value not in mine) or "unset"
        added = ", ".join(shown(label, value) for value in mine if value not in theirs) or "unset"
        yield f"{label}: order or count differs" if gone == added else f"{label} {gone} → {added}"


def _tool(name: str, mine: list[str], theirs: list[str], versions: Versions) -> Iterable[str]:
    if not (mine and theirs):
        yield f"{name} {'is used now' if mine else 'is no longer used'}"
        return
    now, before = ([named(each, versions.get((name, each))) for each in builds] for builds in (mine, theirs))
    yield f"{name} build differs: {difference(now, before)}"


def shown(label: str, value: str) -> str:
    """Return a component's value for display, without the tag that distinguishes ``"k"`` from ``b"k"`` in a key."""
    if label.rpartition(" ")[2] != "name_expression":
        return value
    kind, _, expression = value.partition(":")
    return f"b'{expression}'" if kind == "b" else expression


def _options(mine: list[str], theirs: list[str]) -> Iterable[str]:
    def by_field(flags: list[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for flag in flags:
            name, equals, value = flag.partition("=")
            found.setdefault(_fields().get(name, name), []).append(value if equals else "on")
        return found

    now, before = by_field(mine), by_field(theirs)
    changed = [field for field in dict.fromkeys([*before, *now]) if now.get(field) != before.get(field)]
    if not changed:
        yield "options: the order differs"
    for field in changed:
        was, is_ = (", ".join(values.get(field, ["unset"])) for values in (before, now))
        yield f"option {field} {was} → {is_}"


def _probes(mine: list[str], theirs: list[str]) -> Iterable[str]:
    now, before = (
        {probe.rpartition(": ")[0]: probe.rpartition(": ")[2] for probe in probes} for probes in (mine, theirs)
    )
    for asked in dict.fromkeys([*before, *now]):
        name, _, where = asked.partition(" in ")
        was, is_ = before.get(asked, "not asked"), now.get(asked, "not asked")
        if was != is_:
            yield f"__has_include({name}) in {where}: {was} → {is_}"


@functools.cache
def _fields() -> dict[str, str]:
    """Return the mapping from flags to the option fields that produce them."""
    found = {"-arch": "arch"}
    for field, emit in [*tables.NVRTC.items(), *tables.NVVM.items(), *tables.NVJITLINK.items()]:
        for sample in (True, 1, "x"):
            try:
                for flag in emit(sample):
                    found.setdefault(flag.partition("=")[0], field)
            except OptionError:
                continue
    return found


def _headers(now: Mapping[str, str], before: Mapping[str, str]) -> str:
    changed = [name for name in now if name in before and now[name] != before[name]]
    added, gone = [n for n in now if n not in before], [n for n in before if n not in now]
    found = [
        f"header {', '.join(names[:3])}{' ...' if len(names) > 3 else ''} {verb}"
        for names, verb in ((changed, "changed"), (added, "is read now"), (gone, "is no longer read"))
        if names
    ]
    differing, total = len(changed) + len(added) + len(gone), len({*now, *before})
    return f"{'; '.join(found)} ({differing} of {total} headers differ)" if found else "headers: the order differs"

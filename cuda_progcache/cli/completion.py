# SPDX-License-Identifier: Apache-2.0
"""Shell completion of programs, kernels, parameters and architectures.

The shell starts a new process at each Tab, so slow lookups stop after a fixed time and offer what they have found.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from click.shell_completion import CompletionItem

from cuda_progcache._util.digest import is_hex
from cuda_progcache.errors import ProgCacheError

if TYPE_CHECKING:
    import click

    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.store.base import EntryInfo

#: The time limit for reading records in seconds, and the number of digest digits offered.
_MOMENT, _DIGITS = 0.3, 12


def programs(ctx: click.Context, _param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the programs in the cache: their names and, after two digits, their digests."""
    digits = len(typed) >= 2 and is_hex(typed)
    with _nothing_on_trouble() as found:
        found.extend(_by_digest(ctx, typed) if digits else ())
        found.extend(_by_name(ctx, typed))
    return found


def names(ctx: click.Context, _param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the names of the programs in the cache."""
    with _nothing_on_trouble() as found:
        found.extend(_by_name(ctx, typed))
    return found


def kernels(ctx: click.Context, _param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the kernels of the library."""
    with _nothing_on_trouble() as found:
        found.extend(CompletionItem(k.name, help=k.description) for k in _library(ctx) if k.name.startswith(typed))
    return found


def parameters(ctx: click.Context, _param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return ``name=value`` for the given kernel: parameter names first, then the values of the typed name."""
    with _nothing_on_trouble() as found:
        declared = _library(ctx)[str(ctx.params["kernel"])].parameters
        name, equals, value = typed.partition("=")
        if not equals:
            fitting = [(n, one) for n, one in declared.items() if n.startswith(name)]
            found.extend(CompletionItem(f"{n}=", help=one.description) for n, one in fitting)
        elif name in declared:
            one = declared[name]
            values = one.values or (("true", "false") if one.type == "bool" else (one.default,))
            found.extend(CompletionItem(f"{name}={v}") for v in map(str, values) if v.startswith(value))
    return found


def archs(_ctx: click.Context, _param: click.Parameter, typed: str) -> list[CompletionItem]:
    """Return the known architectures."""
    from cuda_progcache.inspect import occupancy_calculator

    return [CompletionItem(arch) for arch in occupancy_calculator.archs() if arch.startswith(typed)]


def _by_digest(ctx: click.Context, typed: str) -> Iterator[CompletionItem]:
    cache = _cache(ctx)
    if cache is None:
        return
    end = time.monotonic() + _MOMENT
    for digest in filter(lambda digest: digest.startswith(typed), cache.digests()):
        if time.monotonic() > end:
            return
        yield CompletionItem(digest[: max(_DIGITS, len(typed))], help=_told(cache.info(digest)))


def _by_name(ctx: click.Context, typed: str) -> Iterator[CompletionItem]:
    from cuda_progcache.service.described import all_described

    cache = _cache(ctx)
    if cache is None:
        return
    end, seen = time.monotonic() + _MOMENT, set()
    for entry in all_described(cache.entries()):
        name = entry.about.title
        if name not in seen and name.startswith(typed) and name.isprintable():
            seen.add(name)
            yield CompletionItem(name)
        if time.monotonic() > end:
            return


def _told(entry: EntryInfo) -> str:
    from cuda_progcache.cli.output import one_line

    about = entry.about
    return one_line(" ".join(filter(None, (about.title, about.variant, about.target_type, about.arch))))


def _cache(ctx: click.Context) -> Any:
    from cuda_progcache.store.file_stream import FileStreamProgramCache

    root = ctx.obj.root()  # of the Session that the preceding words set up
    return FileStreamProgramCache(root, mode="ro") if root.exists() else None


def _library(ctx: click.Context) -> KernelLibrary:
    from cuda_progcache.service.manifest import KernelLibrary

    return KernelLibrary(ctx.params.get("manifest"))


@contextmanager
def _nothing_on_trouble() -> Iterator[list[CompletionItem]]:
    """Suppress errors, keeping the items found so far: a shell can't show a message."""
    found: list[CompletionItem] = []
    try:
        yield found
    except (ProgCacheError, OSError, LookupError, ValueError):
        return

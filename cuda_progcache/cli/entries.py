# SPDX-License-Identifier: Apache-2.0
"""``list`` and ``show``: what lies in the cache, and where one program came from."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.app import NoEntryError
from cuda_progcache.cli.session import Session, common_options

if TYPE_CHECKING:
    from rich.table import Table

    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache

_SORTS: dict[str, Callable[[EntryInfo], Any]] = {
    "used": lambda entry: -entry.last_used,
    "age": lambda entry: -entry.created,
    "size": lambda entry: -entry.size,
    "name": lambda entry: (program_name(entry.record), str(entry.record.get("arch"))),
}


#: Orders in which the store gives the first few without reading everything.
_FIRST = {"used": "used", "age": "created", "size": "size"}


def program_name(record: Mapping[str, Any]) -> str:
    """Give what people know a program by: the library kernel's name, else the program's."""
    kernel = record.get("kernel") or {}
    return str(kernel.get("name") or record.get("name") or "-")


def entry_json(entry: EntryInfo) -> dict[str, Any]:
    """Give the part of an entry's JSON form that ``list`` and ``show`` share."""
    record = entry.record
    return {
        "digest": entry.digest,
        "name": program_name(record),
        "kernel": (record.get("kernel") or {}).get("name"),
        "code_type": record.get("code_type"),
        "target_type": record.get("target_type"),
        "arch": record.get("arch"),
        "size": entry.size,
        "created": _iso(entry.created),
        "last_used": _iso(entry.last_used),
        "path": None if entry.path is None else str(entry.path),
    }


def _iso(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


def matches(entry: EntryInfo, kernel: str | None, arch: str | None, target: str | None) -> bool:
    """Whether an entry is of this name (a pattern), architecture and target; None: any."""
    record = entry.record
    if kernel is not None and not fnmatch.fnmatchcase(program_name(record), kernel):
        return False
    if arch is not None and record.get("arch") != arch:
        return False
    return target is None or record.get("target_type") == target


LIST_JSON = """\b
--json: {"root": str, "entries": [{"digest", "name", "kernel" (null for a program that isn't a library kernel),
"code_type", "target_type", "arch", "size" (bytes), "created", "last_used" (ISO 8601, UTC), "path"}]}
with --unkept: {"root": str, "unkept": [{"digest" (that it would have), "name", "code_type", "target_type", "arch",
"kind", "reason", "when", "advice"}]}
"""


@click.command("list", short_help="The programs in the cache.", epilog=LIST_JSON)
@click.option("--kernel", metavar="NAME", help="Only programs of this name; may hold * and ?.")
@click.option("--arch", metavar="ARCH", help="Only programs for this architecture, such as sm_90.")
@click.option("--target", type=click.Choice(["cubin", "ptx", "ltoir"]), help="Only binaries of this type.")
@click.option("--sort", type=click.Choice(list(_SORTS)), default="used", show_default=True, help="What comes first.")
@click.option("--reverse", is_flag=True, help="The other way round.")
@click.option("-q", "--quiet", is_flag=True, help="Print the digests alone, for scripts.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="No more than N programs.")
@click.option("--unkept", is_flag=True, help="Programs that were compiled here and not kept, and why.")
@common_options
@click.pass_obj
def list_command(
    session: Session,
    kernel: str | None,
    arch: str | None,
    target: str | None,
    *,
    sort: str,
    reverse: bool,
    quiet: bool,
    limit: int | None,
    unkept: bool,
) -> None:
    """List the programs in the cache, the last used first."""
    cache = session.existing_cache()
    if unkept:
        _list_unkept(session, cache, kernel, arch, target, limit)
        return
    shown = [] if cache is None else _chosen(cache, kernel, arch, target, sort=sort, reverse=reverse, limit=limit)
    if session.json:
        output.emit({"root": session.root(), "entries": [entry_json(entry) for entry in shown]})
        return
    if quiet:
        output.write("".join(f"{entry.digest}\n" for entry in shown))
        return
    if not shown:
        output.note_line(
            "no program fits" if cache is not None and cache else f"the cache at {session.root()} is empty"
        )
        return
    digits = output.prefix_length(() if cache is None else cache.digests())
    now = time.time()
    made = output.table(
        ("digest", "name", "target", "arch", "size", "age", "last used"), right=("size", "age", "last used")
    )
    for entry in shown:
        record = entry.record
        made.add_row(
            entry.digest[:digits],
            output.text(program_name(record)),
            str(record.get("target_type", "-")),
            str(record.get("arch") or "-"),
            output.size(entry.size),
            output.age(now - entry.created),
            output.age(now - entry.last_used),
        )
    output.show(made)


def _chosen(
    cache: FileStreamProgramCache,
    kernel: str | None,
    arch: str | None,
    target: str | None,
    *,
    sort: str,
    reverse: bool,
    limit: int | None,
) -> list[EntryInfo]:
    def fits(entry: EntryInfo) -> bool:
        return matches(entry, kernel, arch, target)

    if limit is not None and sort in _FIRST and not reverse:
        return cache.first(limit, by=_FIRST[sort], matches=fits)
    return sorted(filter(fits, cache.entries()), key=_SORTS[sort], reverse=reverse)[:limit]


def _list_unkept(
    session: Session,
    cache: FileStreamProgramCache | None,
    kernel: str | None,
    arch: str | None,
    target: str | None,
    limit: int | None,
) -> None:
    from cuda_progcache.compile.unkept import listed

    shown = [
        one
        for one in (() if cache is None else listed(cache))
        if (kernel is None or fnmatch.fnmatchcase(one.name, kernel))
        and arch in {None, one.arch}
        and target in {None, one.target_type}
    ][:limit]
    if session.json:
        found = [{**one._asdict(), "when": _iso(one.when), "advice": one.advice} for one in shown]
        output.emit({"root": session.root(), "unkept": found})
        return
    if not shown:
        output.note_line("every program that was compiled here, and fits, was kept")
        return
    now = time.time()
    made = output.table(("name", "target", "arch", "age", "why it isn't kept"), right=("age",))
    for one in shown:
        made.add_row(
            output.text(one.name), one.target_type, one.arch, output.age(now - one.when), output.text(one.reason)
        )
    output.show(made)
    for advice in dict.fromkeys(one.advice for one in shown):
        output.line(advice)


SHOW_JSON = """\b
--json: what list gives of an entry, and "checksum", "resource_usage" ({kernel: {"registers", "spill_store_bytes",
"spill_load_bytes", "stack_bytes", "shared_bytes" (static), "local_bytes", "constant_bytes", "literal_bytes",
"barriers", "max_threads", "code_bytes"}}, the figures of ptxas -v; null where there is none, as in PTX) and "record":
the record as it was kept (name, code_type, target_type, arch, key, components, headers, toolchain, log,
symbol_mapping, duration in seconds, created, resource_usage, kernel)

\b
For scripts:
  cuobjdump -sass $(cuda-progcache show --path 3f2a91c0)
"""


@click.command(
    "show", short_help="All that is known about one program: where it came from, what it uses.", epilog=SHOW_JSON
)
@click.argument("key")
@click.option("--headers", is_flag=True, help="List every header that was read, with its digest.")
@click.option("--components", is_flag=True, help="List what went into the key, field by field.")
@click.option("--path", "path_only", is_flag=True, help="Print the path of the binary alone.")
@common_options
@click.pass_obj
def show_command(session: Session, key: str, *, headers: bool, components: bool, path_only: bool) -> None:
    """Show one program. KEY is the start of its digest, as list prints it: four digits or more."""
    entry = find_entry(session, key)
    if session.json:
        usage = resource_usage(entry)
        found = usage if isinstance(usage, dict) else None
        output.emit({**entry_json(entry), "checksum": entry.checksum, "resource_usage": found, "record": entry.record})
    elif path_only:
        click.echo(str(entry.path))
    else:
        _describe(session, entry, headers=headers, components=components)


def find_entry(session: Session, prefix: str) -> EntryInfo:
    """Give the one entry whose digest starts with a prefix.

    Raises
    ------
    NoEntryError
        The cache is missing or has none.
    AmbiguousDigestError
        More than one fits.
    """
    cache = session.existing_cache()
    wanted = prefix.strip().lower()
    if len(wanted) < 4 or len(wanted) > 64 or set(wanted) - set("0123456789abcdef"):
        raise click.BadParameter(f"{prefix!r} isn't the start of a digest: four or more hex digits", param_hint="KEY")
    try:
        if cache is not None:
            return cache.info(cache.resolve(wanted))
    except KeyError:
        pass  # said below, in words
    raise NoEntryError(f"no entry starts with {wanted} in {session.root()}; cuda-progcache list prints what is there")


def _describe(session: Session, entry: EntryInfo, *, headers: bool, components: bool) -> None:
    """Print an entry's provenance for people."""
    from cuda_progcache.keys.explain import shown

    record, now = entry.record, time.time()
    about = output.fields()
    kernel = record.get("kernel") or {}
    about.add_row("program", output.text(program_name(record), "bold"))
    if kernel:
        about.add_row("parameters", output.text(parameters_text(kernel.get("parameters") or {})))
        templates = [f"{t['name']} ({_digest(t['digest'])})" for t in kernel.get("templates") or ()]
        about.add_row("templates", output.text("\n".join(templates) or "-"))
    about.add_row(
        "compiled",
        f"{record.get('code_type', '-')} to {record.get('target_type', '-')} for {record.get('arch') or '-'}",
    )
    if record.get("duration") is not None:
        about.add_row("", f"in {output.seconds(record['duration'])}, {output.ago(now - entry.created)}")
    about.add_row("last used", output.ago(now - entry.last_used))
    about.add_row("size", f"{output.size(entry.size)} ({entry.size:,} bytes)")
    about.add_row("digest", entry.digest)
    if record.get("key"):
        about.add_row("key", str(record["key"]))
    about.add_row("checksum", str(entry.checksum))
    about.add_row("entry", output.text(str(entry.path)))
    for expression, symbol in (record.get("symbol_mapping") or {}).items():
        about.add_row("symbol", output.text(f"{expression} -> {symbol}"))
    for part in record.get("toolchain") or ():
        about.add_row("toolchain", output.text(f"{part['name']} ({_digest(part['digest'])})"))
    read = record.get("headers") or ()
    about.add_row("headers", f"{len(read):,} read" + ("" if headers or not read else "; --headers lists them"))
    if headers:
        for header in read:
            about.add_row("", output.text(f"{_digest(header['digest'])}  {header['name']}"))
    parts = record.get("components") or ()
    if parts:
        about.add_row("key made of", f"{len(parts)} fields" + ("" if components else "; --components lists them"))
    for label, value in parts if components else ():
        about.add_row("", output.text(f"{label} = {_short(shown(label, value))}"))
    usage = resource_usage(entry)
    if isinstance(usage, str):
        about.add_row("resources", output.text(usage))
    output.show(about)
    if isinstance(usage, dict):
        output.show(output.text(""), _resources(usage))
    if str(record.get("log") or "").strip():
        output.line(click.style("\ncompiler log", bold=True))
        output.line(output.printable(str(record["log"]).rstrip()))
    output.line("\n" + _how_to_open(session, entry))


def resource_usage(entry: EntryInfo) -> dict[str, dict[str, Any]] | str | None:
    """Give registers, spills and memory of each kernel: from the binary, else from the record.

    Records of earlier versions have other figures, and those of cuda.core have none.

    Returns
    -------
    dict, str or None
        A str says why it can't be had; None: there is nothing to ask for, as in PTX.
    """
    from cuda_progcache.errors import InspectError

    kept = entry.record.get("resource_usage") or None
    if entry.record.get("target_type") != "cubin" or entry.path is None:
        return kept
    from cuda_progcache.inspect import resource_record

    try:
        return resource_record(entry.path.read_bytes())
    except (InspectError, OSError) as error:
        return kept or str(error)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Write parameters as they are typed: ``dtype=float16 block=256``."""
    return " ".join(f"{name}={value}" for name, value in parameters.items()) or "(the defaults)"


def _short(value: object, limit: int = 160) -> str:
    written = str(value).replace("\n", "\\n")
    return written if len(written) <= limit else f"{written[:limit]}… ({len(written):,} characters)"


def _digest(identity: object) -> str:
    """Shorten a digest for reading; its kind, as in ``build-id:``, stays."""
    return ":".join(part[:12] for part in str(identity).split(":"))


def _resources(usage: Mapping[str, Mapping[str, Any]]) -> Table:
    """Make the table of registers, memory and spills per kernel."""
    every = dict.fromkeys(name for each in usage.values() for name in each)
    columns = [name for name in every if name in _ALWAYS or any(each.get(name) for each in usage.values())]
    made = output.table(
        ("kernel", *(c.replace("_", " ") for c in columns)), right=[c.replace("_", " ") for c in columns]
    )
    for kernel, each in usage.items():
        made.add_row(output.text(kernel), *("-" if each.get(c) is None else str(each[c]) for c in columns))
    return made


_ALWAYS = ("registers", "spill_store_bytes", "spill_load_bytes", "stack_bytes", "shared_bytes")


def _how_to_open(session: Session, entry: EntryInfo) -> str:
    target, prefix = entry.record.get("target_type"), entry.digest[:12]
    if target == "ptx":
        return f"open it: less $({session.command('show')} --path {prefix})"
    if target == "ltoir":
        return "open it: LTO-IR is for nvJitLink alone; cuobjdump and nvdisasm don't read it"
    return f"open it: {cuobjdump()} -sass $({session.command('show')} --path {prefix})"


def cuobjdump() -> str:
    """Give the command as it can be typed: by name where it is on PATH, else by its path in the wheel."""
    import shutil

    from cuda_progcache.errors import InspectError
    from cuda_progcache.inspect import find_tool

    if shutil.which("cuobjdump"):
        return "cuobjdump"
    try:
        return output.here(find_tool("cuobjdump"))
    except InspectError:
        return "cuobjdump"

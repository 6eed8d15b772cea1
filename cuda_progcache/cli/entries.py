# SPDX-License-Identifier: Apache-2.0
"""``show``: where one program came from; how an entry is named and found."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache._util.digest import is_digest_prefix
from cuda_progcache.cli import output
from cuda_progcache.cli.app import NoEntryError
from cuda_progcache.cli.completion import programs
from cuda_progcache.cli.session import Session, common_options
from cuda_progcache.compile.record import names_of, options_of, program_name, variant_text
from cuda_progcache.service.described import all_described, described
from cuda_progcache.service.selection import Selection, fits

if TYPE_CHECKING:
    from rich.table import Table

    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.file_stream import FileStreamProgramCache


def entry_json(entry: EntryInfo, made_by: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Give the part of an entry's JSON form that ``list`` and ``show`` share.

    Parameters
    ----------
    entry : EntryInfo
    made_by : mapping, optional
        Who compiled it (:class:`cuda_progcache.compile.history.Makers`).
    """
    record = entry.record
    kernel = record.get("kernel") or {}
    return {
        "digest": entry.digest,
        "name": program_name(record),
        "kernel": kernel.get("name"),
        "parameters": kernel.get("parameters"),
        "names": names_of(record),
        "options": options_of(record),
        "variant": variant_text(record),
        "code_type": record.get("code_type"),
        "target_type": record.get("target_type"),
        "arch": record.get("arch"),
        "size": entry.size,
        "seconds": record.get("duration"),
        "created": iso(entry.created),
        "last_used": iso(entry.last_used),
        "made_by": None if made_by is None else {**made_by, "at": iso(made_by["at"])},
        "path": None if entry.path is None else str(entry.path),
    }


def iso(moment: float) -> str:
    """Write a moment in UTC, to the millisecond."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


SHOW_JSON = """
--json: the fields that list gives of an entry, and "checksum", "resource_usage" ({kernel: {"registers",
"spill_store_bytes", "spill_load_bytes", "stack_bytes", "shared_bytes" (static), "local_bytes", "constant_bytes",
"literal_bytes", "barriers", "max_threads", "code_bytes"}}, the figures of ptxas -v; null where there is none, as in
PTX) and "record": the record as it was kept (name, code_type, target_type, arch, key, components, headers, toolchain,
log, symbol_mapping, duration in seconds, created, resource_usage, kernel)

\b
For scripts:
  cuobjdump -sass $(cuda-progcache show --path 3f2a91c0)
"""


@click.command("show", short_help="Everything about one program: its origin, and what it uses.", epilog=SHOW_JSON)
@click.argument("key", shell_complete=programs)
@click.option("--headers", is_flag=True, help="List every header that was read, with its digest.")
@click.option("--components", is_flag=True, help="List what went into the key, field by field.")
@click.option("--path", "path_only", is_flag=True, help="Print only the path of the binary.")
@common_options
@click.pass_obj
def show_command(session: Session, key: str, *, headers: bool, components: bool, path_only: bool) -> None:
    """Show one program. KEY is the start of its digest, as list prints it (four digits or more), or its name.

    softmax, 'softmax?dtype=float16,block=256@sm_90' and scale.cu are names; of several programs, the one compiled last
    is shown.
    """
    from cuda_progcache.compile.history import Makers

    entry = find_entry(session, key, newest=True, looking=True)
    if path_only and not session.json:
        click.echo(str(entry.path))
        return
    cache = session.existing_cache(looking=True)
    by = Makers(cache).of(entry.record, entry.digest)
    if session.json:
        usage = resource_usage(entry)
        found = usage if isinstance(usage, dict) else None
        kept = {} if cache is None else cache.info(entry.digest).record
        output.emit({**entry_json(entry, by), "checksum": entry.checksum, "resource_usage": found, "record": kept})
    else:
        _describe(session, entry, by, headers=headers, components=components)


def find_entry(session: Session, key: str, *, newest: bool = False, looking: bool = False) -> EntryInfo:
    """Give the one entry that is meant.

    Parameters
    ----------
    session : Session
    key : str
        The start of its digest (four digits or more), or ``kernel?param=value@arch``
        (:class:`~cuda_progcache.service.selection.Selection`).
    newest : bool
        Of several that fit by name, give the one compiled last, and say how many there are; else that is an error.
    looking : bool
        As for :meth:`Session.existing_cache`.

    Raises
    ------
    NoEntryError
        The cache is missing or has none, or several fit by name.
    AmbiguousDigestError
        More than one starts with these digits.
    """
    cache = session.existing_cache(looking=looking)
    wanted = key.strip().lower()
    digits = is_digest_prefix(wanted)
    if digits and cache is not None:
        try:
            return described(cache.info(cache.resolve(wanted)))
        except KeyError:
            pass  # a name may look like digits
    if not wanted:
        raise click.BadParameter("give the start of a digest, or a name", param_hint="KEY")
    try:
        selection = Selection.parse(key.strip())
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="KEY") from None
    seen: dict[str, None] = {}

    def meant(entry: EntryInfo) -> bool:
        seen[program_name(entry.record)] = None
        return selection.includes(entry.record)

    fitting = [] if cache is None else [entry for entry in all_described(cache.entries()) if meant(entry)]
    if not fitting:
        raise NoEntryError(_nothing_called(session, key, selection, seen, digits=digits))
    if len(fitting) > 1:
        told = f"{len(fitting):,} programs are called {output.one_line(key)}"
        more = f"{session.command('list')} --kernel {selection.name} tells them apart"
        if not newest:
            raise NoEntryError(f"{told}; give the start of a digest, or kernel?param=value@arch: {more}")
        output.note_line(f"{told}; this is the one compiled last ({more})")
    now = time.time() + 1
    return max(fitting, key=lambda entry: (entry.created <= now, entry.created))


def _nothing_called(session: Session, key: str, selection: Selection, names: Iterable[str], *, digits: bool) -> str:
    """Say that nothing has a digest or name, and what to type instead."""
    from cuda_progcache._util.suggest import nearest

    listing = session.command("list")
    if (selection.parameters or selection.arch) and any(fits(name, selection.name) for name in names):
        named = f"no program in {session.root()} fits {key}"
        return output.one_line(f"{named}; {listing} --kernel {shlex.quote(selection.name)} shows what is there")
    told = f"is called {key}"
    if digits:
        told = f"has a digest that starts with {key.strip().lower()}, or that name"
    near = nearest(selection.name, names)
    hint = f" did you mean {near!r}?" if near else ""
    return output.one_line(f"no program in {session.root()} {told};{hint} {listing} shows what is there")


def note_nothing(session: Session, cache: FileStreamProgramCache | None, name: str | None = None) -> None:
    """Say why nothing is listed; of a missing cache, opening it has said so.

    Parameters
    ----------
    session : Session
    cache : FileStreamProgramCache or None
    name : str, optional
        The program's name that was asked for; if it is misspelt, the nearest is named.
    """
    from cuda_progcache._util.suggest import nearest

    if cache is None:
        return
    if not cache:
        output.note_line(f"the cache at {session.root()} is empty")
        return
    there = {program_name(entry.record) for entry in all_described(cache.entries())} if name else set()
    near = None if name is None or any(fits(one, name) for one in there) else nearest(name, there)
    output.note_line("no program matches" + (f"; did you mean {near!r}?" if near else ""))


def _describe(
    session: Session, entry: EntryInfo, made_by: Mapping[str, Any] | None, *, headers: bool, components: bool
) -> None:
    """Print an entry's provenance for people."""
    record, now = entry.record, time.time()
    about = output.fields()
    kernel = record.get("kernel") or {}
    about.add_row("program", output.text(program_name(record), "bold"))
    if kernel:
        about.add_row("parameters", output.text(parameters_text(kernel.get("parameters") or {})))
        templates = [f"{t['name']} ({_digest(t['digest'])})" for t in kernel.get("templates") or ()]
        about.add_row("templates", output.text("\n".join(templates) or "-"))
    target = f"{record.get('target_type') or '-'} for {record.get('arch') or '-'}"
    if record.get("components"):
        about.add_row("compiled", f"{record.get('code_type', '-')} to {target}")
    else:
        about.add_row("binary", target)
        about.add_row("", "put here without a record, as cuda.core does: what it was compiled from isn't known")
    if record.get("duration") is not None:
        about.add_row("", f"in {output.seconds(record['duration'])}, {output.ago(now - entry.created)}")
    if made_by:
        about.add_row("compiled by", output.text(output.made_by(made_by)))
    about.add_row("last used", output.ago(now - entry.last_used))
    about.add_row("size", f"{output.size(entry.size)} ({entry.size:,} bytes)")
    about.add_row("digest", entry.digest)
    if record.get("key"):
        about.add_row("key", str(record["key"]))
    about.add_row("checksum", str(entry.checksum))
    about.add_row("entry", output.text(str(entry.path)))
    for expression, symbol in (record.get("symbol_mapping") or {}).items():
        about.add_row("symbol", output.text(f"{expression} -> {symbol}"))
    if record.get("components"):
        _describe_inputs(about, record, headers=headers, components=components)
    usage = resource_usage(entry)
    if isinstance(usage, str):
        about.add_row("resources", output.text(usage))
    output.show(about)
    if isinstance(usage, dict):
        asked = {symbol: name for name, symbol in (record.get("symbol_mapping") or {}).items()}
        output.show(output.text(""), _resources({asked.get(symbol, symbol): each for symbol, each in usage.items()}))
    if str(record.get("log") or "").strip():
        output.line(click.style("\ncompiler log", bold=True))
        output.line(output.printable(str(record["log"]).rstrip()))
    output.line("\n" + _how_to_open(session, entry))


def _describe_inputs(about: Table, record: Mapping[str, Any], *, headers: bool, components: bool) -> None:
    """Add what a program was compiled with: compiler, headers, key."""
    from cuda_progcache.keys.explain import shown

    for part in record.get("toolchain") or ():
        version = f"{part['version']} " if part.get("version") else ""
        about.add_row("toolchain", output.text(f"{part['name']} {version}({_digest(part['digest'])})"))
    read = record.get("headers") or ()
    about.add_row("headers", f"{len(read):,} read" + ("" if headers or not read else "; --headers lists them"))
    for header in read if headers else ():
        about.add_row("", output.text(f"{_digest(header['digest'])}  {header['name']}"))
    parts = record["components"]
    about.add_row("key made of", f"{len(parts)} fields" + ("" if components else "; --components lists them"))
    for label, value in parts if components else ():
        about.add_row("", output.text(f"{label} = {_short(shown(label, value))}"))


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
        return "LTO-IR can only be read by nvJitLink, not by cuobjdump or nvdisasm"
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

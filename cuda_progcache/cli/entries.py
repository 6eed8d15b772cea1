# SPDX-License-Identifier: Apache-2.0
"""``show``: describe one program. Also finds the entry that a digest or a name refers to."""

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
from cuda_progcache.service.described import all_described, described
from cuda_progcache.service.selection import Selection, fits

if TYPE_CHECKING:
    from rich.table import Table

    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.compile_record import CompileRecord
    from cuda_progcache.store.file_stream import FileStreamProgramCache


def entry_json(entry: EntryInfo, made_by: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the fields of an entry's JSON form that ``list`` and ``show`` share.

    Parameters
    ----------
    entry : EntryInfo
    made_by : mapping, optional
        The process that compiled it (:class:`cuda_progcache.compile.history.Makers`).
    """
    about = entry.about
    return {
        "digest": entry.digest,
        "name": about.title,
        "kernel": None if about.kernel is None else about.kernel.name,
        "parameters": None if about.kernel is None else about.kernel.parameters,
        "names": about.name_expressions,
        "options": about.options,
        "variant": about.variant,
        "code_type": about.code_type or None,
        "target_type": about.target_type or None,
        "arch": about.arch or None,
        "size": entry.size,
        "seconds": about.duration,
        "created": iso(entry.created),
        "last_used": iso(entry.last_used),
        "made_by": None if made_by is None else {**made_by, "at": iso(made_by["at"])},
        "path": None if entry.path is None else str(entry.path),
    }


def iso(moment: float) -> str:
    """Format a time in UTC as ISO 8601, to the millisecond."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds")


SHOW_JSON = """
--json: the fields that list gives for an entry, and "checksum", "resource_usage" ({kernel: {"registers",
"spill_store_bytes", "spill_load_bytes", "stack_bytes", "shared_bytes" (static), "local_bytes", "constant_bytes",
"literal_bytes", "barriers", "max_threads", "code_bytes"}}, as ptxas -v reports them; null if there is none, as for
PTX) and "record": the stored record (name, code_type, target_type, arch, key, components, headers, toolchain, log,
symbol_mapping, duration in seconds, created, resource_usage, kernel)

\b
For scripts:
  cuobjdump -sass $(cuda-progcache show --path 3f2a91c0)
"""


@click.command("show", short_help="Show one program: its origin and the resources it uses.", epilog=SHOW_JSON)
@click.argument("key", shell_complete=programs)
@click.option("--headers", is_flag=True, help="List every header that was read, with its digest.")
@click.option("--components", is_flag=True, help="List the components of the key, field by field.")
@click.option("--path", "path_only", is_flag=True, help="Print only the path of the binary.")
@common_options
@click.pass_obj
def show_command(session: Session, key: str, *, headers: bool, components: bool, path_only: bool) -> None:
    """Show one program: what it was compiled from and with, and the resources it uses.

    KEY is a prefix of the program's digest (four digits or more, as list prints them) or a name such as softmax,
    'softmax?dtype=float16,block=256@sm_90' or scale.cu. If several programs match a name, the one compiled last is
    shown.
    """
    from cuda_progcache.compile.history import Makers

    entry = find_entry(session, key, newest=True, looking=True)
    if path_only and not session.json:
        click.echo(str(entry.path))
        return
    cache = session.existing_cache(looking=True)
    by = Makers(cache).of(entry)
    if session.json:
        usage = resource_usage(entry)
        found = usage if isinstance(usage, dict) else None
        kept = {} if cache is None else cache.info(entry.digest).record
        output.emit({**entry_json(entry, by), "checksum": entry.checksum, "resource_usage": found, "record": kept})
    else:
        _describe(session, entry, by, headers=headers, components=components)


def find_entry(session: Session, key: str, *, newest: bool = False, looking: bool = False) -> EntryInfo:
    """Return the entry that a digest prefix or a name refers to.

    Parameters
    ----------
    session : Session
    key : str
        A prefix of the digest (four digits or more), or ``kernel?param=value@arch``
        (:class:`~cuda_progcache.service.selection.Selection`).
    newest : bool
        If several entries match a name, return the one compiled last and print how many match; otherwise this is an
        error.
    looking : bool
        As for :meth:`Session.existing_cache`.

    Raises
    ------
    NoEntryError
        There is no cache, no entry matches, or several match a name.
    AmbiguousDigestError
        More than one digest starts with these digits.
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
        raise click.BadParameter("give a digest prefix or a name", param_hint="KEY")
    try:
        selection = Selection.parse(key.strip())
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="KEY") from None
    seen: dict[str, None] = {}

    def meant(entry: EntryInfo) -> bool:
        about = entry.about
        seen[about.title] = None
        return selection.includes(about)

    fitting = [] if cache is None else [entry for entry in all_described(cache.entries()) if meant(entry)]
    if not fitting:
        raise NoEntryError(_nothing_called(session, key, selection, seen, digits=digits))
    if len(fitting) > 1:
        told = f"{len(fitting):,} programs match {output.one_line(key)}"
        more = f"{session.command('list')} --kernel {selection.name} shows them"
        if not newest:
            raise NoEntryError(f"{told}; give a digest prefix or kernel?param=value@arch: {more}")
        output.note_line(f"{told}; this is the one compiled last ({more})")
    now = time.time() + 1
    return max(fitting, key=lambda entry: (entry.created <= now, entry.created))


def _nothing_called(session: Session, key: str, selection: Selection, names: Iterable[str], *, digits: bool) -> str:
    """Return the message that no program matches, with a suggestion of what to type instead."""
    from cuda_progcache._util.suggest import nearest

    listing = session.command("list")
    if (selection.parameters or selection.arch) and any(fits(name, selection.name) for name in names):
        named = f"no program in {session.root()} matches {key}"
        return output.one_line(f"{named}; {listing} --kernel {shlex.quote(selection.name)} shows the programs")
    told = f"is called {key}"
    if digits:
        told = f"has a digest that starts with {key.strip().lower()}, or that name"
    near = nearest(selection.name, names)
    hint = f" did you mean {near!r}?" if near else ""
    return output.one_line(f"no program in {session.root()} {told};{hint} {listing} shows the programs")


def note_nothing(session: Session, cache: FileStreamProgramCache | None, name: str | None = None) -> None:
    """Print why nothing is listed; for a missing cache, opening it has already printed a note.

    Parameters
    ----------
    session : Session
    cache : FileStreamProgramCache or None
    name : str, optional
        The requested program name; if no program has it, the nearest name is suggested.
    """
    from cuda_progcache._util.suggest import nearest

    if cache is None:
        return
    if not cache:
        output.note_line(f"the cache at {session.root()} is empty")
        return
    there = {entry.about.title for entry in all_described(cache.entries())} if name else set()
    near = None if name is None or any(fits(one, name) for one in there) else nearest(name, there)
    output.note_line("no program matches" + (f"; did you mean {near!r}?" if near else ""))


def _describe(
    session: Session, entry: EntryInfo, made_by: Mapping[str, Any] | None, *, headers: bool, components: bool
) -> None:
    """Print an entry's provenance and resource usage as text."""
    about, now = entry.about, time.time()
    told = output.fields()
    told.add_row("program", output.text(about.title, "bold"))
    if about.kernel is not None:
        told.add_row("parameters", parameters_text(about.kernel.parameters))
        templates = [f"{name} ({_digest(digest)})" for name, digest in about.kernel.templates]
        told.add_row("templates", "\n".join(templates) or "-")
    target = f"{about.target_type or '-'} for {about.arch or '-'}"
    if about.is_compile:
        told.add_row("compiled", f"{about.code_type or '-'} to {target}")
    else:
        told.add_row("binary", target)
        told.add_row("", "stored without a record, as cuda.core does: what it was compiled from isn't known")
    if about.duration is not None:
        told.add_row("", f"in {output.seconds(about.duration)}, {output.ago(now - entry.created)}")
    if made_by:
        told.add_row("compiled by", output.made_by(made_by))
    told.add_row("last used", output.ago(now - entry.last_used))
    told.add_row("size", f"{output.size(entry.size)} ({entry.size:,} bytes)")
    told.add_row("digest", entry.digest)
    if about.key:
        told.add_row("key", about.key)
    told.add_row("checksum", entry.checksum)
    told.add_row("entry", str(entry.path))
    for expression, symbol in about.symbol_mapping.items():
        told.add_row("symbol", f"{expression} -> {symbol}")
    if about.is_compile:
        _describe_inputs(told, about, headers=headers, components=components)
    usage = resource_usage(entry)
    if isinstance(usage, str):
        told.add_row("resources", usage)
    output.show(told)
    if isinstance(usage, dict):
        asked = about.expressions
        output.show(output.text(""), _resources({asked.get(symbol, symbol): each for symbol, each in usage.items()}))
    if about.log.strip():
        output.line(click.style("\ncompiler log", bold=True))
        output.line(output.printable(about.log.rstrip()))
    output.line("\n" + _how_to_open(session, entry))


def _describe_inputs(told: Table, about: CompileRecord, *, headers: bool, components: bool) -> None:
    """Add the compiler, the headers and the key's components."""
    from cuda_progcache.keys.explain import shown

    for name, digest, version in about.toolchain:
        told.add_row("toolchain", f"{name} {version}{' ' if version else ''}({_digest(digest)})")
    read, parts = about.headers, about.components
    told.add_row("headers", f"{len(read):,} read" + ("" if headers or not read else "; --headers lists them"))
    for name, digest in read if headers else ():
        told.add_row("", f"{_digest(digest)}  {name}")
    told.add_row("components", f"{len(parts)} in the key" + ("" if components else "; --components lists them"))
    for label, value in parts if components else ():
        told.add_row("", f"{label} = {_short(shown(label, value))}")


def resource_usage(entry: EntryInfo) -> dict[str, dict[str, Any]] | str | None:
    """Return the registers, spills and memory of each kernel, from the binary or, if it can't be read, the record.

    The binary comes first because records of earlier versions have different figures and those of cuda.core have none.

    Returns
    -------
    dict, str or None
        The usage; a str that says why it can't be read; or None if the binary has none, as for PTX.
    """
    from cuda_progcache.errors import InspectError

    kept = entry.about.resource_usage or None
    if entry.about.target_type != "cubin" or entry.path is None:
        return kept
    from cuda_progcache.inspect import resource_record

    try:
        return resource_record(entry.path.read_bytes())
    except (InspectError, OSError) as error:
        return kept or str(error)


def parameters_text(parameters: Mapping[str, Any]) -> str:
    """Format parameters as they are typed: ``dtype=float16 block=256``."""
    return " ".join(f"{name}={value}" for name, value in parameters.items()) or "(the defaults)"


def _short(value: object, limit: int = 160) -> str:
    written = str(value).replace("\n", "\\n")
    return written if len(written) <= limit else f"{written[:limit]}… ({len(written):,} characters)"


def _digest(identity: str) -> str:
    """Shorten a digest for display, keeping a prefix such as ``build-id:``."""
    return ":".join(part[:12] for part in identity.split(":"))


def _resources(usage: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return the table of registers, memory and spills per kernel."""
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
    target, prefix = entry.about.target_type, entry.digest[:12]
    if target == "ptx":
        return f"open it: less $({session.command('show')} --path {prefix})"
    if target == "ltoir":
        return "only nvJitLink can read LTO-IR; cuobjdump and nvdisasm can't"
    return f"open it: {cuobjdump()} -sass $({session.command('show')} --path {prefix})"


def cuobjdump() -> str:
    """Return the cuobjdump command to type: its name if it is on PATH, otherwise its path in the wheel."""
    import shutil

    from cuda_progcache.errors import InspectError
    from cuda_progcache.inspect import find_tool

    if shutil.which("cuobjdump"):
        return "cuobjdump"
    try:
        return output.here(find_tool("cuobjdump"))
    except InspectError:
        return "cuobjdump"

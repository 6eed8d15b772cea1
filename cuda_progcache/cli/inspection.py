# SPDX-License-Identifier: Apache-2.0
"""``resources``, ``sass`` and ``top``: commands that inspect compiled programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.compile import SUFFIXES
from cuda_progcache.cli.completion import archs, names, programs
from cuda_progcache.cli.entries import entry_json, find_entry, note_nothing, parameters_text
from cuda_progcache.cli.session import (
    Session,
    common_options,
    library_at,
    manifest_option,
    parse_parameters,
)
from cuda_progcache.service.described import all_described, described
from cuda_progcache.service.selection import Selection, fits

if TYPE_CHECKING:
    from cuda_progcache.inspect import Cliff, Instruction, Occupancy, Resources, Source
    from cuda_progcache.service.comparison import KernelUse, ProgramDiff
    from cuda_progcache.store.base import EntryInfo
    from cuda_progcache.store.compile_record import CompileRecord

#: Suffixes of source files. An argument with such a suffix names a program in the cache, since a source has no code.
_SOURCES = frozenset(suffix for suffix, code_type in SUFFIXES.items() if code_type != "ptx")

block_option = click.option(
    "--block-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Threads per block. [default: the kernel's declared maximum, or 256]",
)
shared_option = click.option(
    "--dynamic-shared", type=click.IntRange(min=0), default=0, metavar="BYTES", help="Dynamic shared memory per block."
)

RESOURCES_JSON = """
--json: {"root": str, "kernels": [{"digest", "program", "parameters", "arch", "kernel", "resources" (as in show),
"occupancy": {"block_size", "dynamic_shared_bytes", "blocks", "warps", "most_warps", "limiters", "cliffs":
[{"resource", "fewer", "warps"}]} or null}]}
"""


@click.command(
    "resources",
    short_help="Show registers, spills, shared memory and occupancy.",
    epilog=RESOURCES_JSON,
)
@click.option("--kernel", metavar="NAME", shell_complete=names, help="Only programs of this name; may contain * and ?.")
@click.option(
    "--arch", metavar="ARCH", shell_complete=archs, help="Only programs for this architecture, such as sm_90."
)
@block_option
@shared_option
@common_options
@click.pass_obj
def resources_command(
    session: Session, kernel: str | None, arch: str | None, block_size: int | None, dynamic_shared: int
) -> None:
    """Show the resources that the kernels in the cache use, with one row per variant and architecture.

    The column "next" shows how much less of one resource would let more warps run. No GPU is needed: the figures are
    read from the binaries, and occupancy is computed by the rules of NVIDIA's calculator.
    """
    from cuda_progcache.service.comparison import kernel_uses

    cache = session.existing_cache(looking=True)
    chosen = Selection(kernel or "*", (), arch)
    entries = (
        []
        if cache is None
        else [
            one
            for one in all_described(cache.entries())
            if one.about.target_type == "cubin" and chosen.includes(one.about)
        ]
    )
    entries.sort(key=lambda one: (one.about.title, _parameters(one), one.about.arch))

    def unreadable(entry: EntryInfo, error: Exception) -> None:
        output.warning_line(f"{entry.digest[:12]} ({entry.about.title}) is skipped: {error}")

    found = kernel_uses(entries, block_size, dynamic_shared, unreadable)
    if session.json:
        output.emit({"root": session.root(), "kernels": [_use_json(one) for one in found]})
    elif found:
        output.show(_uses(found))
    else:
        note_nothing(session, cache, kernel)


def _parameters(entry: EntryInfo) -> str:
    kernel = entry.about.kernel
    return "" if kernel is None else parameters_text(kernel.parameters)


def _use_json(one: KernelUse) -> dict[str, Any]:
    about = one.entry.about
    return {
        "digest": one.entry.digest,
        "program": about.title,
        "parameters": None if about.kernel is None else about.kernel.parameters,
        "arch": about.arch or None,
        "kernel": one.kernel,
        "resources": one.resources._asdict(),
        "occupancy": None if one.occupancy is None else _occupancy_json(one.occupancy),
    }


def _occupancy_json(runs: Occupancy) -> dict[str, Any]:
    return {**runs._asdict(), "cliffs": [cliff._asdict() for cliff in runs.cliffs]}


_NUMBERS = ("registers", "spills", "shared", "code", "block", "occupancy")


def _uses(found: Sequence[KernelUse]) -> Any:
    """Return the table; names and parameters that repeat the row above are left out."""
    made = output.table(
        ("kernel", "parameters", "arch", *_NUMBERS, "limited by", "next"),
        right=_NUMBERS,
    )
    before: tuple[str, str] | None = None
    for one in found:
        used, runs, about = one.resources, one.occupancy, one.entry.about
        name = about.title
        shown = name if one.kernel in {name, name.removesuffix(".cu")} else f"{name}: {one.kernel}"
        now = (shown, _parameters(one.entry))
        repeated, before = now == before, now
        made.add_row(
            *(output.text("" if repeated else part) for part in now),
            about.arch or "-",
            str(used.registers),
            spills_text(used),
            output.size(used.shared_bytes) if used.shared_bytes else "0",
            output.size(used.code_bytes),
            "-" if runs is None else str(runs.block_size),
            "-" if runs is None else f"{runs.ratio:.0%}",
            "-" if runs is None else limiters_text(runs),
            "" if runs is None else "; ".join(cliff_text(cliff, runs) for cliff in runs.cliffs),
        )
    return made


def spills_text(used: Resources) -> str:
    """Format the bytes of a thread's spill stores and loads: ``0``, ``24+16``, or ``-`` if unknown."""
    if used.spill_store_bytes is None or used.spill_load_bytes is None:
        return "-"
    if not used.spill_store_bytes and not used.spill_load_bytes:
        return "0"
    return f"{used.spill_store_bytes}+{used.spill_load_bytes}"


def limiters_text(runs: Occupancy) -> str:
    """Name the resources that limit the number of blocks; ``nothing`` if all warps can run."""
    if runs.warps == runs.most_warps:
        return "nothing"
    words = {"shared_bytes": "shared memory", "threads": "the block's size"}
    named = ", ".join(words.get(name, name) for name in runs.limiters)
    return named if runs.blocks else f"{named}: such a block can't be launched"


def cliff_text(cliff: Cliff, runs: Occupancy) -> str:
    """Format the occupancy that using less of a resource would allow: ``4 registers fewer: 75%``."""
    less = f"{output.plural(cliff.fewer, 'register')} fewer"
    if cliff.resource == "shared_bytes":
        less = f"{output.size(cliff.fewer)} less shared memory"
    return f"{less}: {cliff.warps / runs.most_warps:.0%}"


SASS_JSON = """
--json: {"kernels": {name: {"instructions": [{"offset", "labels", "text", "live" (live registers, or null), "source":
{"file", "line"} or null}], "mix": {class: count}, "live_peak": int}}}
"""


@click.command("sass", short_help="Print the machine code of a program.", epilog=SASS_JSON)
@click.argument("program", shell_complete=programs)
@click.option("--kernel", metavar="NAME", help="Only kernels of this name; may contain * and ?.")
@click.option("--source", is_flag=True, help="Print each source line above the instructions compiled from it.")
@click.option("--mix", "mix_only", is_flag=True, help="Print only the number of instructions of each class.")
@manifest_option
@common_options
@click.pass_obj
def sass_command(
    session: Session, program: str, kernel: str | None, *, source: bool, mix_only: bool, manifest: Path | None
) -> None:
    """Print a program's machine code, with the number of live registers at each instruction.

    PROGRAM is a file, a digest or name as for show, or a library kernel with parameters or an architecture, such as
    'softmax?dtype=float16@sm_90'. --source needs a program compiled with line information (-O lineinfo=true); a library
    kernel is compiled that way, and its lines are those of its template. Needs nvdisasm.
    """
    from cuda_progcache.inspect import instructions, live_peak, mix

    data, about = program_at(session, program, manifest, lines=source)
    asked = {} if about is None else about.expressions
    found = {
        asked.get(name, name): code
        for name, code in instructions(data).items()
        if kernel is None or any(fits(one, kernel) for one in (name, asked.get(name, name)))
    }
    if not found:
        raise click.BadParameter(f"no kernel of {program} matches {kernel!r}", param_hint="--kernel")
    if session.json:
        output.emit({"kernels": {name: _code_json(code, mix(code), live_peak(code)) for name, code in found.items()}})
        return
    folder = library_at(manifest).path if of_library(program) else Path()
    if source and not any(one.source for code in found.values() for one in code):
        output.warning_line("the program has no line information: compile it with -O lineinfo=true")
    for name, code in found.items():
        output.line(click.style(f"{output.printable(name)}  ({_mix_text(mix(code), code)})", bold=True))
        if not mix_only:
            output.write("".join(f"{line}\n" for line in _listing(code, folder, with_source=source)))


def _mix_text(counts: Mapping[str, int], code: Sequence[Instruction]) -> str:
    total = len(code)
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    return f"{output.plural(total, 'instruction')}: {parts}"


def _code_json(code: Sequence[Instruction], counts: Mapping[str, int], peak: int) -> dict[str, Any]:
    listed = [{**one._asdict(), "source": None if one.source is None else one.source._asdict()} for one in code]
    return {"instructions": listed, "mix": counts, "live_peak": peak}


def _listing(code: Sequence[Instruction], folder: Path, *, with_source: bool) -> Iterable[str]:
    texts: dict[str, list[str]] = {}
    before = None
    for one in code:
        if with_source and one.source is not None and one.source != before:
            before = one.source
            line = _source_line(texts, folder, before)
            yield f"  {output.printable(output.here(before.file))}:{before.line}  {line}".rstrip()
        for label in one.labels:
            if not label.startswith(".text."):
                yield f"{output.printable(label)}:"
        live = "" if one.live is None else str(one.live)
        yield f"    {one.offset:05x}  {live:>3}  {output.printable(one.text)}"


def _source_line(texts: dict[str, list[str]], folder: Path, place: Source) -> str:
    """Return a line of a source file or a template; empty if the file or the line doesn't exist."""
    file, number = place
    if file not in texts:
        # The compiler prepends its working directory to a template's name, but templates are in the library's folder.
        parts = Path(file).parts
        candidates = (Path(file), *(folder.joinpath(*parts[start:]) for start in range(1, len(parts))))
        found = next((path for path in candidates if path.is_file()), None)
        texts[file] = [] if found is None else found.read_text("utf-8", "replace").splitlines()
    lines = texts[file]
    return output.printable(lines[number - 1].strip()) if 0 < number <= len(lines) else ""


def program_at(
    session: Session, program: str, manifest: Path | None = None, *, lines: bool = False
) -> tuple[bytes, CompileRecord | None]:
    """Return the binary and the compile record of a file, a library kernel or a cache entry.

    A library kernel that isn't in the cache is compiled; with ``lines``, it has line information for its templates. A
    file has no record.

    Raises
    ------
    NoEntryError
        ``program`` is none of these.
    """
    from cuda_progcache.compile.arch import with_arch
    from cuda_progcache.keys.options import ProgramOptions
    from cuda_progcache.service.comparison import binary_of

    path = Path(program)
    if path.is_file() and path.suffix.lower() not in _SOURCES:
        return path.read_bytes(), None
    asked = of_library(program)
    if asked is None:
        entry = find_entry(session, program, looking=True)
        return binary_of(entry), entry.about
    library = library_at(manifest, lines=lines)
    pairs = tuple(f"{name}={value}" for name, value in asked.parameters)
    values = parse_parameters(library, asked.name, pairs)
    arch = asked.arch or with_arch(ProgramOptions()).arch
    done = session.service(library).kernel(asked.name, arch=arch, **values)
    return done.data, done.about


def of_library(program: str) -> Selection | None:
    """Parse a library kernel; None if it has neither parameters nor an architecture, since it may be another name."""
    try:
        asked = Selection.parse(program.removesuffix("?"))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="PROGRAM") from None
    return asked if asked.parameters or asked.arch or program.endswith("?") else None


def diff_json(found: ProgramDiff) -> dict[str, Any]:
    """Return the differences as ``diff --json`` prints them."""
    kernels = [
        {"name": one.name, "kind": one.kind, "deltas": one.deltas, "lines": one.lines} for one in found.binary.kernels
    ]
    return {
        "equal": found.binary.equal,
        "same_code": found.binary.same_code,
        "key": found.key,
        "kernels": kernels,
        "lines": found.binary.lines,
    }


_TOPS = {
    "largest": "largest",
    "costliest": "longest compile times",
    "newest": "compiled last",
    "unused": "least recently used",
}

TOP_JSON = """
--json: {"root": str, "by": str, "entries": [the fields that list gives for an entry; "seconds" is its compile time, or
null]}
"""


@click.command("top", short_help="Rank programs by size, compile time, age or last use.", epilog=TOP_JSON)
@click.argument("by", type=click.Choice(list(_TOPS)), default="costliest")
@click.option(
    "-n", "--limit", type=click.IntRange(min=1), default=10, show_default=True, metavar="N", help="Show N programs."
)
@common_options
@click.pass_obj
def top_command(session: Session, by: str, limit: int) -> None:
    """Show the largest, the costliest, the newest or the least recently used programs.

    The default is costliest: the longest compile times.
    """
    import heapq
    import time

    orders: dict[str, Any] = {
        "largest": lambda entry: entry.size,
        "costliest": lambda entry: entry.about.seconds,
        "newest": lambda entry: entry.created,
        "unused": lambda entry: -max(entry.last_used, entry.created),
    }
    cache = session.existing_cache(looking=True)
    found = [] if cache is None else [described(one) for one in heapq.nlargest(limit, cache.entries(), key=orders[by])]
    if session.json:
        output.emit({"root": session.root(), "by": by, "entries": [entry_json(one) for one in found]})
        return
    if not found:
        note_nothing(session, cache)
        return
    numbers = ("size", "cost", "age", "last used")
    made = output.table(("digest", "name", "variant", "target", "arch", *numbers), right=numbers, title=_TOPS[by])
    now = time.time()
    for entry in found:
        about = entry.about
        made.add_row(
            entry.digest[:12],
            about.title,
            about.variant,
            about.target_type or "-",
            about.arch or "-",
            output.size(entry.size),
            "-" if about.duration is None else output.seconds(about.duration),
            output.age(now - entry.created),
            output.age(now - entry.last_used),
        )
    output.show(made)

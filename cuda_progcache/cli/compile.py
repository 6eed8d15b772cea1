# SPDX-License-Identifier: Apache-2.0
"""``compile``: compile one program, from a file or the kernel library, through the cache."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cuda_progcache.cli import output
from cuda_progcache.cli.completion import archs, kernels
from cuda_progcache.cli.session import (
    OutputFile,
    Session,
    common_options,
    include_option,
    library_at,
    manifest_option,
    parameter_option,
    parse_parameters,
    parse_value,
    verbose_option,
)

if TYPE_CHECKING:
    from cuda_progcache import CompiledProgram

SUFFIXES = {
    ".cu": "c++",
    ".cuh": "c++",
    ".cpp": "c++",
    ".cc": "c++",
    ".cxx": "c++",
    ".ptx": "ptx",
    ".ll": "nvvm",
    ".bc": "nvvm",
    ".nvvm": "nvvm",
}
"""File suffixes and their code types."""

COMPILE_JSON = """
--json: {"name", "kernel", "code_type", "target_type", "arch", "hit": bool, "digest" (null: not cached), "reason" (why
it isn't cached), "path", "size" (bytes), "seconds" (this call), "compile_seconds" (the compile; for a hit, the
original compile), "symbol_mapping", "log", "output"}

\b
Examples:
  cuda-progcache compile saxpy.cu --arch sm_90
  cuda-progcache compile gemm.cu --arch sm_90 --std c++17 -D TILE=32 --name-expression 'gemm<float>' -o gemm.cubin
  cuda-progcache compile --kernel softmax -p dtype=float16 --arch sm_90
"""


class _CompileCommand(click.Command):
    """The command; if a compiler option is given as an option of the command, the error names the -O form."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            from cuda_progcache import ProgramOptions

            field = error.option_name.lstrip("-").replace("-", "_")
            kinds = {one.name: str(one.type) for one in dataclasses.fields(ProgramOptions)}
            if field not in kinds:
                raise
            value = "true" if "bool" in kinds[field] else "VALUE"
            raise click.UsageError(
                f"there is no option {error.option_name}; to set it for the compiler, use -O {field}={value}", ctx
            ) from error


@click.command(
    "compile",
    cls=_CompileCommand,
    short_help="Compile a source file or a library kernel, through the cache.",
    epilog=COMPILE_JSON,
)
@click.argument("file", required=False, type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option("--code-type", type=click.Choice(["c++", "ptx", "nvvm"]), help="FILE's type. [default: by its suffix]")
@click.option(
    "--arch",
    metavar="ARCH",
    shell_complete=archs,
    help="The architecture to compile for, such as sm_90. [default: that of the first GPU]",
)
@click.option(
    "--target",
    "target_type",
    type=click.Choice(["cubin", "ptx", "ltoir"]),
    default="cubin",
    show_default=True,
    help="The type of binary to produce.",
)
@click.option("-D", "--define", "defines", multiple=True, metavar="NAME[=VALUE]", help="Define a macro; repeatable.")
@include_option
@click.option("--std", metavar="STD", help="The C++ dialect, such as c++17.")
@click.option(
    "--name-expression",
    "name_expressions",
    multiple=True,
    metavar="EXPR",
    help="Instantiate a template, such as 'scale<float>'; repeatable.",
)
@click.option(
    "-O",
    "--option",
    "fields",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Set a field of ProgramOptions, such as lineinfo=true; repeatable.",
)
@click.option(
    "--kernel", metavar="NAME", shell_complete=kernels, help="Compile this kernel of the library instead of a file."
)
@parameter_option
@manifest_option
@click.option(
    "-o",
    "--output",
    "target",
    type=OutputFile(allow_dash=True),
    metavar="FILE",
    help="Write the binary to this file; - is stdout.",
)
@verbose_option
@common_options
@click.pass_obj
def compile_command(
    session: Session,
    file: str | None,
    code_type: str | None,
    arch: str | None,
    target_type: str,
    defines: tuple[str, ...],
    include_paths: tuple[str, ...],
    std: str | None,
    name_expressions: tuple[str, ...],
    fields: tuple[str, ...],
    kernel: str | None,
    parameters: tuple[str, ...],
    manifest: Path | None,
    target: str | None,
) -> None:
    """Compile FILE (- is stdin) or a library kernel, unless the cache already has the binary."""
    if session.json and target == "-":
        raise click.UsageError("--json and -o - both write to stdout: use one of them")
    from cuda_progcache import ProgramOptions
    from cuda_progcache.compile.arch import with_arch

    start = time.perf_counter()
    if kernel is not None and file is None:
        if defines or std or name_expressions or fields or code_type:
            raise click.UsageError(
                "the manifest sets a library kernel's options: with --kernel, use only -p, -I, --arch, --target and -o"
            )
        library = library_at(manifest)
        values = parse_parameters(library, kernel, parameters)
        arch = arch or with_arch(ProgramOptions()).arch
        program = session.service(library, include_paths).kernel(kernel, arch=arch, target_type=target_type, **values)
    elif file is not None and kernel is None:
        if parameters or manifest is not None:
            raise click.UsageError("-p and --manifest need --kernel; with a FILE, use -D and -O")
        code_type = code_type or _code_type(file)
        own = {"arch": arch, "std": std, "include_path": list(include_paths), "define_macro": _macros(defines)}
        options = program_options({"name": _name(file)} | _joined(own, parse_options(fields)))
        program = session.service().compile(
            _read(file, code_type),
            code_type,
            options=options,
            target_type=target_type,
            name_expressions=name_expressions,
        )
    else:
        raise click.UsageError("give either FILE or --kernel NAME")
    elapsed = time.perf_counter() - start
    if target == "-":
        output.write(program.data)
    elif target is not None:
        Path(target).write_bytes(program.data)
    _tell(session, program, kernel=kernel, code_type=code_type, elapsed=elapsed, target=target)


def _joined(own: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Merge fields set by dedicated options such as ``--std`` with fields set by ``-O``; concatenate lists."""
    given = {field: value for field, value in own.items() if value}
    for field in given.keys() & fields.keys():
        if not isinstance(given[field], list):
            raise click.BadParameter(f"given twice, here and with --{field}", param_hint=f"-O {field}")
        given[field] += fields[field]
    return fields | given


def _code_type(file: str) -> str:
    suffix = Path(file).suffix.lower()
    if suffix not in SUFFIXES:
        what = "stdin has no suffix" if file == "-" else f"the suffix {suffix!r} of {file} isn't known"
        raise click.UsageError(f"{what}: give --code-type c++, ptx or nvvm (known suffixes: {' '.join(SUFFIXES)})")
    return SUFFIXES[suffix]


def _name(file: str) -> str:
    """Return the program's name: its file, as in compilers, so that diagnostics and relative includes work."""
    return "stdin" if file == "-" else file


def _read(file: str, code_type: str) -> str | bytes:
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    if code_type == "nvvm" and data[:4] in (b"BC\xc0\xde", b"\xde\xc0\x17\x0b"):
        return data  # LLVM bitcode
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{file} isn't UTF-8 text (byte {error.start}): is it {code_type}?") from None


def _macros(defines: tuple[str, ...]) -> list[str | tuple[str, str]]:
    """Split each ``NAME=VALUE``; the compiler defines a bare NAME as 1."""
    return [(name, value) if equals else name for name, equals, value in (text.partition("=") for text in defines)]


def parse_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse ``FIELD=VALUE`` texts into ProgramOptions fields of the declared types.

    A list field may be given more than once.

    Raises
    ------
    click.BadParameter
        The field is unknown (the message suggests the nearest), has the wrong type, is given twice, or has no text
        form.
    """
    from cuda_progcache import ProgramOptions

    types = {field.name: str(field.type) for field in dataclasses.fields(ProgramOptions)}
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        name = name.replace("-", "_")
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise click.BadParameter(f"ProgramOptions has no field '{name}'{hint}", param_hint="-O")
        kind = types[name]
        if name == "extra_sources":
            raise click.BadParameter("extra_sources takes (name, source) pairs: use the Python API", param_hint="-O")
        hint = f"-O {name}"
        if not equals:
            if "bool" not in kind:
                raise click.BadParameter(f"needs a value: -O {name}=VALUE", param_hint=hint)
            text = "true"
        value = _option_value(text, kind, hint)
        if "Sequence" in kind:
            values.setdefault(name, []).append(value)
        elif name in values:
            raise click.BadParameter("given twice", param_hint=hint)
        else:
            values[name] = value
    return values


def _option_value(text: str, kind: str, hint: str) -> Any:
    if text.lower() == "none":
        return None
    if kind.startswith("bool"):
        return parse_value(text, "bool", hint)
    if kind.startswith("int"):
        return parse_value(text, "int", hint)
    return text


def program_options(fields: dict[str, Any]) -> Any:
    """Return ProgramOptions with these fields; an invalid value is a usage error."""
    from cuda_progcache import ProgramOptions, errors

    try:
        return ProgramOptions(**fields)
    except errors.ProgCacheError:
        raise
    except (TypeError, ValueError) as error:
        raise click.UsageError(str(error)) from error


def _tell(
    session: Session,
    program: CompiledProgram,
    *,
    kernel: str | None,
    code_type: str | None,
    elapsed: float,
    target: str | None,
) -> None:
    """Report the result: as JSON on stdout, or as lines (on stderr if stdout carries the binary)."""
    about = program.about
    duration = about.duration
    path = _entry_path(session, program.digest)
    symbols = {_text(expression): _text(symbol) for expression, symbol in program.symbol_mapping.items()}
    if session.json:
        output.emit(
            {
                "name": program.name,
                "kernel": kernel,
                "code_type": about.code_type or code_type,
                "target_type": program.target_type,
                "arch": program.arch,
                "hit": program.hit,
                "digest": program.digest,
                "reason": program.reason,
                "path": path,
                "size": len(program.data),
                "seconds": elapsed,
                "compile_seconds": duration,
                "symbol_mapping": symbols,
                "log": program.log,
                "output": target,
            }
        )
        return
    if program.log.strip():
        output.line(program.log.rstrip(), err=True)
    aside = target == "-"
    verb = click.style("hit", fg="green", bold=True) if program.hit else click.style("compiled", fg="cyan", bold=True)
    if program.hit:
        saved = f", which saved {output.seconds(duration)} of compiling" if duration else ""
        took = f"in {output.seconds(elapsed)}{saved}"
    else:
        took = f"in {output.seconds(duration or elapsed)}"
    lines = [
        f"{verb} {program.name} -> {program.target_type} for {program.arch}, {output.size(len(program.data))}, {took}"
    ]
    lines += [f"  symbol  {expression} -> {symbol}" for expression, symbol in symbols.items()]
    if target is not None and not aside:
        lines.append(f"  output  {target}")
    if path is None or program.digest is None:
        lines.append(f"  not cached: {program.reason or _why_not(session)}")
    else:
        lines.append(f"  entry   {path}")
        lines.append(f"  next    {session.command('show')} {program.digest[:12]}")
    for line in lines:
        output.line(line, err=aside)
    if about.resource_usage == {} and program.target_type == "cubin":
        output.note_line(
            "the binary has no kernel: declare kernels __global__, and instantiate templates with --name-expression, "
            "such as 'scale<float>' (in a manifest: name_expressions)"
        )


def _why_not(session: Session) -> str:
    """Return the reason why a program that can be kept has no entry on disk."""
    from cuda_progcache._util import modes

    mode = modes.current()
    return f"{session.root()} can't be written" if mode == "rw" else f"nothing is kept in mode {mode!r}"


def _text(name: str | bytes) -> str:
    return name.decode("utf-8", "replace") if isinstance(name, bytes) else name


def _entry_path(session: Session, digest: str | None) -> Path | None:
    """Return an entry's path; None if it isn't on disk (a memory store replaces a root that can't be written)."""
    path = None if digest is None else session.root() / "entries" / digest[:2] / digest[2:]
    return path if path is not None and path.is_file() else None

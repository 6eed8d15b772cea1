# SPDX-License-Identifier: Apache-2.0
"""The command group: it imports commands lazily, reports errors in one line and sets the exit code."""

from __future__ import annotations

import difflib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from importlib import import_module
from typing import Any, NoReturn

import click

from cuda_progcache import errors
from cuda_progcache._util.secrets import masked
from cuda_progcache.cli.help import GROUPS, Context
from cuda_progcache.cli.output import emit, fail_line, line, warning_line
from cuda_progcache.cli.session import common_options


class ExitCode(IntEnum):
    """The exit codes of ``cuda-progcache``."""

    OK = 0
    FAILED = 1
    USAGE = 2
    CACHE = 3
    TOOLCHAIN = 4
    NO_ENTRY = 5
    INTERNAL = 70
    INTERRUPTED = 130
    BROKEN_PIPE = 141
    TERMINATED = 143


EXIT_CODES = """\b
Exit codes:
    0  success
    1  a compile, a render or part of a prewarm failed; a check found a problem; the compared programs or caches \
differ; a bundle is damaged; or the output can't be written
    2  wrong usage: an unknown command, option, kernel, parameter or architecture, or an invalid setting or manifest
    3  the cache can't be used: it is unsafe, unreadable or not a directory, or the disk is full
    4  a compiler library, header package or inspection tool is missing
    5  no program in the cache matches, or more than one does
   70  an internal error; CUDA_PROGCACHE_TRACEBACK=1 shows the traceback
  130  interrupted (SIGINT); 141: the reader closed the output; 143: terminated (SIGTERM)

With --json, stdout carries one JSON object and nothing else. If the command fails before it has a result, the object
is {"error": {"type", "message", "exit_code", "log"}}. The --help of each command describes its object.

\b
Completion in bash (in zsh: zsh_source, in fish: fish_source):
    eval "$(_CUDA_PROGCACHE_COMPLETE=bash_source cuda-progcache)"
"""

COMMANDS: dict[str, tuple[str, str]] = {
    "compile": ("compile", "Compile a source file or a library kernel, through the cache."),
    "render": ("library", "Print the source rendered from a kernel template."),
    "kernels": ("library", "List the library's kernels and their parameters."),
    "prewarm": ("prewarm", "Compile a library's variants before they are needed."),
    "demo": ("prewarm", "Compile the bundled kernels for four architectures."),
    "list": ("listing", "List the programs in the cache."),
    "show": ("entries", "Show one program: its origin and the resources it uses."),
    "explain": ("explain", "Explain why a program had to be compiled."),
    "compare": ("compare", "Show what differs between two caches, and why."),
    "resources": ("inspection", "Show registers, spills, shared memory and occupancy."),
    "sass": ("inspection", "Print the machine code of a program."),
    "diff": ("diff", "Show what differs between two programs or two lockfiles."),
    "top": ("inspection", "Rank programs by size, compile time, age or last use."),
    "provenance": ("provenance", "Trace a program or another result to its inputs."),
    "affected": ("provenance", "List the programs and calls that depend on a file."),
    "doctor": ("doctor", "Check the installation, the settings and the cache."),
    "config": ("doctor", "Show the settings: their values, sources and meanings."),
    "watch": ("watch", "Show live what other processes do with the cache."),
    "stats": ("cache", "Show the size, hit rate and compile time of the cache."),
    "report": ("report", "Write a report on the cache as one HTML file."),
    "verify": ("maintenance", "Check every byte of the cache."),
    "prune": ("maintenance", "Remove the least recently used entries."),
    "pin": ("maintenance", "Protect programs from eviction and pruning."),
    "export": ("export", "Write programs to a bundle, an image or a wheel."),
    "import": ("maintenance", "Add a bundle's programs to the cache."),
    "tiers": ("tiers", "Check the tiers and show their traffic."),
    "sync": ("tiers", "Copy programs between caches and tiers."),
    "gc": ("tiers", "Remove old programs from a tier."),
    "lock": ("proof", "Write a lockfile of the programs that a deployment needs."),
    "check": ("proof", "Check which programs are usable here, and which are missing."),
    "clear": ("cache", "Remove every entry."),
}
"""Command names, each with the module under ``cuda_progcache.cli`` that defines it and its line in ``--help``."""

_CODES: tuple[tuple[type[Exception], ExitCode], ...] = (
    (errors.AmbiguousDigestError, ExitCode.NO_ENTRY),
    (errors.StoreError, ExitCode.CACHE),
    (errors.ToolchainError, ExitCode.TOOLCHAIN),
    (errors.InspectError, ExitCode.TOOLCHAIN),
    (errors.CompileError, ExitCode.FAILED),
    (errors.TemplateError, ExitCode.FAILED),
    (errors.KernelNotFoundError, ExitCode.USAGE),
    (errors.ParameterError, ExitCode.USAGE),
    (errors.ArchError, ExitCode.USAGE),
    (errors.ManifestError, ExitCode.USAGE),
    (errors.UncacheableError, ExitCode.USAGE),
    (errors.OptionError, ExitCode.USAGE),
    (errors.ConfigError, ExitCode.USAGE),
    (errors.ModeError, ExitCode.USAGE),
    (errors.RecordingError, ExitCode.USAGE),
    (errors.LockError, ExitCode.USAGE),
    (errors.ProgCacheError, ExitCode.FAILED),
    (OSError, ExitCode.FAILED),
)


class NoEntryError(click.ClickException):
    """No program in the cache matches the request, or more than one does."""

    exit_code = ExitCode.NO_ENTRY


class ReaderLeftError(click.ClickException):
    """The reader has closed the output, as ``head`` does."""

    exit_code = ExitCode.BROKEN_PIPE


class Terminated(KeyboardInterrupt):
    """SIGTERM, which CI servers and Kubernetes send: the command and its workers end as on Ctrl-C."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(_number: int, _frame: object) -> NoReturn:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: the caller handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class CommandGroup(click.Group):
    """A group that imports each command when it is called and reports errors as one line on stderr."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the command names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Import and return the command; None if there is no command of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"cuda_progcache.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        command.context_class = Context
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - as above
        """Write the list of commands without importing them."""
        width = max(map(len, COMMANDS))
        for group, names in GROUPS.items():
            with formatter.section(group):
                formatter.write_dl([(name.ljust(width), COMMANDS[name][1]) for name in names])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; the error for an unknown name suggests the nearest."""
        name: str | None = args[0]
        if name and not name.startswith("-") and name not in COMMANDS and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"commands: {', '.join(COMMANDS)}"
            raise click.UsageError(f"there is no command '{name}'; {hint}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_repeated(click.Context(command, parent=ctx, info_name=name), rest)
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, and exit with 141 if the pipe is closed; click would exit with 1, as for a failure."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise ReaderLeftError("the reader closed the output") from error
            raise

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command and exit with a documented code; an error prints one line and no traceback."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", errors.ProgCacheWarning)  # the package already warns only once
            try:
                code = super().main(arguments, prog_name, standalone_mode=False, **extra)
                sys.stdout.flush()
            except Exception as error:  # noqa: BLE001 - outermost frame: every error becomes a line and a code
                code = _report(error, arguments)
        sys.exit(code if isinstance(code, int) else ExitCode.OK)


def _refuse_repeated(ctx: click.Context, arguments: Sequence[str]) -> None:
    """Refuse a repeated option that takes one value; click would silently use the last value."""
    try:
        _, _, order = ctx.command.make_parser(ctx).parse_args(list(arguments))
    except click.UsageError:
        return  # reported when the command parses its arguments
    for parameter in {p.name: p for p in order}.values():
        single = isinstance(parameter, click.Option) and not (parameter.multiple or parameter.is_flag)
        if single and order.count(parameter) > 1:
            raise click.UsageError(f"{parameter.opts[0]} takes one value and is given more than once", ctx)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    warning_line(str(message))


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Report an error on stderr, and as JSON on stdout with ``--json``; return the exit code."""
    if isinstance(error, ReaderLeftError):
        # Python flushes stdout at exit, which would fail on the closed pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.BROKEN_PIPE
    if isinstance(error, click.Abort):
        terminated = isinstance(error.__cause__, Terminated)
        fail_line(f"{'terminated' if terminated else 'interrupted'}; programs that were already stored are kept")
        return ExitCode.TERMINATED if terminated else ExitCode.INTERRUPTED
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        line(error.format_message(), err=True)  # the help
        return int(error.exit_code)
    log = str(getattr(error, "log", "") or "")
    if isinstance(error, click.ClickException):
        code, message = int(error.exit_code), error.format_message()
        if isinstance(error, click.UsageError) and error.ctx is not None:
            message += f"\nTry '{error.ctx.command_path} --help'."
    else:
        code = next((int(c) for kind, c in _CODES if isinstance(error, kind)), int(ExitCode.INTERNAL))
        # str() of a KeyError is the repr of its message.
        message = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if code == ExitCode.INTERNAL:
            if os.environ.get("CUDA_PROGCACHE_TRACEBACK"):
                raise error
            message = f"internal error: {type(error).__name__}: {message} (CUDA_PROGCACHE_TRACEBACK=1 shows where)"
    for word in arguments:
        if (shown := masked(word)) != word:  # click quotes the arguments that it rejects
            message = message.replace(word, shown)
    fail_line(message)
    if log.strip() and log.strip() not in message:
        line(log.rstrip(), err=True)
    if "--json" in arguments:
        emit({"error": {"type": type(error).__name__, "message": message, "exit_code": code, "log": log}})
    return code


def _print_version(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    if value and not ctx.resilient_parsing:
        from cuda_progcache import __version__

        click.echo(f"cuda-progcache {__version__}")
        ctx.exit()


@click.group(
    cls=CommandGroup,
    name="cuda-progcache",
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 118},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
@common_options
def app() -> None:
    """Compile CUDA programs once, and keep, explain and share them."""

# SPDX-License-Identifier: Apache-2.0
"""The command group: lazily imported commands, errors as one line, exit codes."""

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
    """What the process's exit code means."""

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
    0  done
    1  a compile, a render or part of a prewarm failed; verify or check found something; what was compared differs; a \
bundle is damaged; or the output can't be written
    2  wrong usage: an unknown command, option, kernel, parameter or architecture, a bad setting or manifest
    3  the cache can't be used: unsafe, unreadable, not a directory, disk full
    4  a compiler library, header package or inspection tool is missing
    5  nothing in the cache fits, or more than one program does
   70  a defect in cuda-progcache itself (CUDA_PROGCACHE_TRACEBACK=1 shows where)
  130  interrupted; 143: terminated; 141: the reader of the output went away

With --json, stdout carries one JSON object and nothing else; when the command fails before it has a result, that
object is {"error": {"type", "message", "exit_code", "log"}}. Every command's --help gives its shape.

\b
Completion in bash (zsh_source and fish_source for these):
    eval "$(_CUDA_PROGCACHE_COMPLETE=bash_source cuda-progcache)"
"""

COMMANDS: dict[str, tuple[str, str]] = {
    "compile": ("compile", "Compile a source file or a library kernel, through the cache."),
    "render": ("library", "Print the source of a kernel template with its parameters."),
    "kernels": ("library", "The library's kernels and their parameters."),
    "prewarm": ("prewarm", "Compile a library's variants before they are needed."),
    "demo": ("prewarm", "Compile the bundled kernels for four architectures."),
    "list": ("listing", "The programs in the cache."),
    "show": ("entries", "Everything about one program: its origin, and what it uses."),
    "explain": ("explain", "Why a program had to be compiled."),
    "compare": ("compare", "What differs between two caches, and why."),
    "resources": ("inspection", "Registers, spills, shared memory and occupancy of kernels."),
    "sass": ("inspection", "The machine code of a program."),
    "diff": ("diff", "What differs between two programs, or two lockfiles."),
    "top": ("inspection", "The largest, costliest, newest or least used programs."),
    "provenance": ("provenance", "Everything that a program or another result was made from."),
    "affected": ("provenance", "The programs and calls that an edit of a file would invalidate."),
    "doctor": ("doctor", "What is installed here, and what is wrong with it."),
    "config": ("doctor", "The settings: what is set, where, and what each means."),
    "watch": ("watch", "Show what other processes do with the cache, live."),
    "stats": ("cache", "Size, hit rate and compile time of the cache."),
    "report": ("report", "Write the cache as one HTML file."),
    "verify": ("maintenance", "Check every byte of the cache."),
    "prune": ("maintenance", "Remove the least recently used entries."),
    "pin": ("maintenance", "Keep programs from being evicted or pruned."),
    "export": ("export", "Write programs to a bundle, an image or a wheel."),
    "import": ("maintenance", "Add a bundle's programs to the cache."),
    "tiers": ("tiers", "Whether the tiers answer, and what they gave."),
    "sync": ("tiers", "Copy programs between caches and tiers."),
    "gc": ("tiers", "Remove old programs from a tier."),
    "lock": ("proof", "Write down the programs that a deploy needs."),
    "check": ("proof", "Which programs can be used here, and which are missing."),
    "clear": ("cache", "Remove every entry."),
}
"""Command name: the module under ``cuda_progcache.cli`` that has it, and its line in ``--help``."""

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
    """Nothing in the cache fits what was asked for."""

    exit_code = ExitCode.NO_ENTRY


class ReaderLeftError(click.ClickException):
    """Whoever read the output has closed it, as ``head`` does."""

    exit_code = ExitCode.BROKEN_PIPE


class Terminated(KeyboardInterrupt):
    """SIGTERM, which CI servers and Kubernetes send: what runs ends as at Ctrl-C, and so do its workers."""


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(_number: int, _frame: object) -> NoReturn:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever started this looks after signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class CommandGroup(click.Group):
    """A group whose commands are imported when they are called and whose errors are one line on stderr."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Give the command names in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - as above
        """Import and give the command; None when there is none of this name."""
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
        """Find the command; the error for an unknown one names the nearest."""
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
        """Run the command; click would answer a closed pipe with exit code 1, as if the command had failed."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise ReaderLeftError("nobody reads the output") from error
            raise

    def main(  # type: ignore[override]
        self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra: Any
    ) -> NoReturn:
        """Run a command and exit: no traceback, one clear line, a documented code."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra.pop("standalone_mode", None)
        with _terminable(), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            warnings.simplefilter("always", errors.ProgCacheWarning)  # each is said once as it is
            try:
                code = super().main(arguments, prog_name, standalone_mode=False, **extra)
                sys.stdout.flush()
            except Exception as error:  # noqa: BLE001 - the last frame of the process: all become a line and a code
                code = _report(error, arguments)
        sys.exit(code if isinstance(code, int) else ExitCode.OK)


def _refuse_repeated(ctx: click.Context, arguments: Sequence[str]) -> None:
    """Refuse an option that takes one value and is given twice: click would take the last, and drop the others."""
    try:
        _, _, order = ctx.command.make_parser(ctx).parse_args(list(arguments))
    except click.UsageError:
        return  # told when the command itself reads them
    for parameter in {p.name: p for p in order}.values():
        single = isinstance(parameter, click.Option) and not (parameter.multiple or parameter.is_flag)
        if single and order.count(parameter) > 1:
            raise click.UsageError(f"{parameter.opts[0]} is given more than once, and takes one value", ctx)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    warning_line(str(message))


def _report(error: Exception, arguments: Sequence[str]) -> int:
    """Say what went wrong on stderr (and as JSON on stdout when asked); give the exit code."""
    if isinstance(error, ReaderLeftError):
        # Python flushes stdout at exit and would complain: give it a place to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.BROKEN_PIPE
    if isinstance(error, click.Abort):
        terminated = isinstance(error.__cause__, Terminated)
        fail_line(f"{'terminated' if terminated else 'interrupted'}; what was stored before is kept")
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
        # KeyError and its kin print the repr of their message.
        message = str(error.args[0]) if isinstance(error, LookupError) and error.args else str(error)
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
        if code == ExitCode.INTERNAL:
            if os.environ.get("CUDA_PROGCACHE_TRACEBACK"):
                raise error
            message = f"internal error: {type(error).__name__}: {message} (CUDA_PROGCACHE_TRACEBACK=1 shows where)"
    for word in arguments:
        if (shown := masked(word)) != word:  # click repeats what it can't use
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
    """CUDA programs compiled from Python: compiled once, kept, explained and shared."""

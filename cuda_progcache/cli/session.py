# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the options ``--json``, ``--cache-dir`` and ``--mode``; cache, service and library."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cuda_progcache._util.modes import MODES, VARIABLE
from cuda_progcache.cli.completion import archs, kernels, parameters
from cuda_progcache.errors import UnsafeRootError

if TYPE_CHECKING:
    from cuda_progcache.service.compile_service import CompileService
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.store.file_stream import FileStreamProgramCache

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Session:
    """The common options of one call, and the cache and service that they select.

    Attributes
    ----------
    cache_dir : Path or None
        ``--cache-dir``; None selects ``CUDA_PROGCACHE_DIR`` or the user's cache directory.
    json : bool
        Whether to print one JSON object on stdout.
    """

    cache_dir: Path | None = None
    json: bool = False

    def root(self) -> Path:
        """Return the directory of the cache, whether or not it exists."""
        from cuda_progcache.store.root import default_root

        return Path(self.cache_dir or default_root()).expanduser().absolute()

    def command(self, name: str) -> str:
        """Return the command line that runs a ``cuda-progcache`` command on the same cache, ready to be typed."""
        from cuda_progcache.cli.output import here, own_command

        where = "" if self.cache_dir is None else f" --cache-dir {shlex.quote(here(str(self.cache_dir)))}"
        return f"{own_command()} {name}{where}"

    def cache(self) -> FileStreamProgramCache:
        """Open the cache, and create it if it doesn't exist."""
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        return FileStreamProgramCache(self.cache_dir, tiers="configured")

    def existing_cache(self, *, looking: bool = False) -> FileStreamProgramCache | None:
        """Open the cache if it exists; otherwise print a note on stderr and return None. Never create it.

        Parameters
        ----------
        looking : bool
            Whether the cache is only read; another user's cache can then be opened too, and nothing is written to it.
        """
        from cuda_progcache._util import modes
        from cuda_progcache.cli.output import note_line

        root = self.root()
        if modes.current() == "off":
            note_line(f"the cache at {root} is off ({modes.VARIABLE}, --mode)")
            return None
        if not root.exists():
            note_line(f"there is no cache at {root} yet")
            return None
        # Given its path, the store doesn't replace a default root that can't be written by memory.
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        # strict: report errors of the disk instead of warning, since the user asked for this cache.
        try:
            return FileStreamProgramCache(root, strict=True)
        except UnsafeRootError:
            if not looking or root.stat().st_uid == os.geteuid():
                raise
            from cuda_progcache.store.readonly import look_into

            note_line(f"{root} belongs to {_owner(root)}; it is only read")
            return look_into(root)

    def service(
        self, library: KernelLibrary | None = None, include_path: Sequence[str] = (), *, make: bool = True
    ) -> CompileService:
        """Return a compile service on the cache.

        Parameters
        ----------
        library : KernelLibrary, optional
        include_path : sequence of str
            Header directories for the library's kernels.
        make : bool
            Whether to create the cache if it doesn't exist; otherwise the cache is only read.
        """
        from cuda_progcache.service.compile_service import CompileService

        cache = self.cache() if make else self.looked_at()
        return CompileService(cache, library=library, include_path=include_path)

    def looked_at(self) -> FileStreamProgramCache:
        """Open the cache for lookups only; it is neither created nor written."""
        from cuda_progcache._util import modes
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        return FileStreamProgramCache(
            self.cache_dir, mode="ro" if modes.current() == "rw" else None, tiers="configured"
        )


def _owner(path: Path) -> str:
    """Return the name of a directory's owner."""
    import pwd

    user = path.stat().st_uid
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user id {user}"


def library_at(manifest: Path | None, *, lines: bool = False) -> KernelLibrary:
    """Open the kernel library of a manifest.

    Parameters
    ----------
    manifest : Path or None
        A folder with a ``manifest.toml``, or that file itself; None selects the bundled library.
    lines : bool
        Whether to compile with line information, so that machine code refers to template lines.
    """
    from cuda_progcache.service.manifest import KernelLibrary

    return KernelLibrary(manifest, line_directives=lines, options={"lineinfo": True} if lines else None)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    session = ctx.ensure_object(Session)
    if value:
        setattr(session, str(param.name), value)


def _set_mode(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Set the cache mode for the whole run, including worker processes."""
    if value is None:
        return
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = value

    @ctx.call_on_close
    def put_back() -> None:
        if before is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = before


def common_options(command: F) -> F:
    """Add ``--json``, ``--cache-dir`` and ``--mode``, which may precede or follow the command's name."""
    command = click.option(
        "--json", is_flag=True, expose_value=False, callback=_remember, help="Print one JSON object on stdout."
    )(command)
    command = click.option(
        "--mode",
        type=click.Choice(MODES),
        expose_value=False,
        callback=_set_mode,
        help="The cache mode: rw (read and write), ro (read only), off (neither), or frozen (read only; a miss is an "
        "error). [default: $CUDA_PROGCACHE, or rw]",
    )(command)
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=_remember,
        help="The cache directory. [default: $CUDA_PROGCACHE_DIR, or one in the user's cache directory]",
    )(command)


class OutputFile(click.Path):
    """An output file, or ``-`` for stdout; a missing folder is reported before any work is done."""

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=allow_dash, path_type=None if allow_dash else Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Convert the value, and check that its folder exists."""
        found = super().convert(value, param, ctx)
        folder = Path(os.fsdecode(found)).absolute().parent
        if not folder.is_dir():
            self.fail(f"there is no folder {folder}", param, ctx)
        return found


def _explain_misses(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    """Print the reason for every miss on stderr while the command runs, including misses in worker processes."""
    if not value or os.environ.get("CUDA_PROGCACHE_LOG") in {"explain", "all"}:
        return  # CUDA_PROGCACHE_LOG already prints them
    from cuda_progcache.cli.output import line
    from cuda_progcache.events import Event, subscribe

    def tell(event: Event) -> None:
        if event.kind in {"miss", "drop"}:
            line(str(event), err=True)

    ctx.call_on_close(subscribe(tell))


verbose_option = click.option(
    "--verbose",
    "-v",
    is_flag=True,
    expose_value=False,
    callback=_explain_misses,
    help="Print the reason for every miss on stderr.",
)


def library_option(meaning: str) -> Callable[[F], F]:
    """Return the option ``--manifest`` with a command's own help text."""
    return click.option("--manifest", type=click.Path(exists=True, path_type=Path), help=meaning)


def archs_option(meaning: str) -> Callable[[F], F]:
    """Return the repeatable option ``--arch`` with a command's own help text."""
    return click.option("--arch", "archs", multiple=True, metavar="ARCH", shell_complete=archs, help=meaning)


def kernels_option(meaning: str) -> Callable[[F], F]:
    """Return the repeatable option ``--kernel`` with a command's own help text."""
    return click.option("--kernel", "kernels", multiple=True, metavar="NAME", shell_complete=kernels, help=meaning)


manifest_option = library_option("The kernel library: a manifest.toml or its folder. [default: the bundled library]")
include_option = click.option(
    "-I", "--include-path", "include_paths", multiple=True, metavar="DIR", help="Search DIR for headers; repeatable."
)

parameter_option = click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=parameters,
    help="Set a kernel parameter; repeatable.",
)


def parse_parameters(library: KernelLibrary, kernel: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` texts into values of the types that the manifest declares for the kernel.

    Unknown names are kept as text; the library rejects them and suggests the nearest.

    Raises
    ------
    click.BadParameter
        A text has no ``=``, or a value isn't of the parameter's type.
    KernelNotFoundError
        The library has no such kernel.
    """
    declared = library[kernel].parameters
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{pair!r} isn't KEY=VALUE", param_hint="-p")
        kind = declared[name].type if name in declared else "str"
        values[name] = parse_value(text, kind, f"-p {name}")
    return values


def parse_value(text: str, kind: str, hint: str) -> Any:
    """Parse text as an int (with any base prefix), a float or a bool, or return it unchanged.

    Parameters
    ----------
    text : str
        The text that the user typed.
    kind : str
        ``int``, ``float`` or ``bool``; any other kind leaves the text unchanged.
    hint : str
        The option's name, for the error message.
    """
    try:
        if kind == "int":
            return int(text, 0)
        if kind == "float":
            return float(text)
        if kind == "bool":
            return {
                "true": True,
                "yes": True,
                "on": True,
                "1": True,
                "false": False,
                "no": False,
                "off": False,
                "0": False,
            }[text.lower()]
    except (ValueError, KeyError):
        want = {"bool": "true or false", "int": "an integer", "float": "a number"}[kind]
        raise click.BadParameter(f"{text!r} isn't {want}", param_hint=hint) from None
    return text

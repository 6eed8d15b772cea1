# SPDX-License-Identifier: Apache-2.0
"""What every command shares: ``--json``, ``--cache-dir``, ``--mode``; the way to cache, service and library."""

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
    """The common options of one call, and what they lead to.

    Attributes
    ----------
    cache_dir : Path or None
        ``--cache-dir``; None: ``CUDA_PROGCACHE_DIR`` or the user's cache directory.
    json : bool
        Whether stdout is to carry one JSON object.
    """

    cache_dir: Path | None = None
    json: bool = False

    def root(self) -> Path:
        """Give the directory of the cache, whether or not it is there yet."""
        from cuda_progcache.store.root import default_root

        return Path(self.cache_dir or default_root()).expanduser().absolute()

    def command(self, name: str) -> str:
        """Write a command of ours as it can be typed here, for the same cache."""
        from cuda_progcache.cli.output import here, own_command

        where = "" if self.cache_dir is None else f" --cache-dir {shlex.quote(here(str(self.cache_dir)))}"
        return f"{own_command()} {name}{where}"

    def cache(self) -> FileStreamProgramCache:
        """Open the cache, made where it isn't there yet."""
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        return FileStreamProgramCache(self.cache_dir, tiers="configured")

    def existing_cache(self, *, looking: bool = False) -> FileStreamProgramCache | None:
        """Open the cache as it is; None, and a note on stderr, where there is none: this makes nothing.

        Parameters
        ----------
        looking : bool
            It is only looked at: another user's, too, is shown, and nothing is written there.
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
        # By its path: a default root that can't be written would be replaced by memory, and this one is to be read.
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        # What is asked for by hand, and the disk refuses, is said.
        try:
            return FileStreamProgramCache(root, strict=True)
        except UnsafeRootError:
            if not looking or root.stat().st_uid == os.geteuid():
                raise
            from cuda_progcache.store.readonly import look_into

            note_line(f"{root} is {_owner(root)}'s: it is looked at, and nothing is written there")
            return look_into(root)

    def service(
        self, library: KernelLibrary | None = None, include_path: Sequence[str] = (), *, make: bool = True
    ) -> CompileService:
        """Make a compile service over the cache.

        Parameters
        ----------
        library : KernelLibrary, optional
        include_path : sequence of str
            For the library's kernels.
        make : bool
            Make the cache where it isn't there yet; else it is only looked at.
        """
        from cuda_progcache.service.compile_service import CompileService

        cache = self.cache() if make else self.looked_at()
        return CompileService(cache, library=library, include_path=include_path)

    def looked_at(self) -> FileStreamProgramCache:
        """Open the cache for lookups, in which it isn't made or written."""
        from cuda_progcache._util import modes
        from cuda_progcache.store.file_stream import FileStreamProgramCache

        return FileStreamProgramCache(
            self.cache_dir, mode="ro" if modes.current() == "rw" else None, tiers="configured"
        )


def _owner(path: Path) -> str:
    """Name the user whom a directory belongs to."""
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
        A folder with a ``manifest.toml``, or that file itself; None: the bundled library.
    lines : bool
        Whether the machine code is to name the lines of the templates.
    """
    from cuda_progcache.service.manifest import KernelLibrary

    return KernelLibrary(manifest, line_directives=lines, options={"lineinfo": True} if lines else None)


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    session = ctx.ensure_object(Session)
    if value:
        setattr(session, str(param.name), value)


def _set_mode(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Have the whole run, its worker processes too, use the cache in this mode."""
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
    """Add ``--json``, ``--cache-dir`` and ``--mode``; they may stand before or after the command's name."""
    command = click.option(
        "--json", is_flag=True, expose_value=False, callback=_remember, help="Print one JSON object on stdout."
    )(command)
    command = click.option(
        "--mode",
        type=click.Choice(MODES),
        expose_value=False,
        callback=_set_mode,
        help="How to use the caches: rw; ro (write nothing); off (neither read nor write); frozen (compile nothing). "
        "[default: $CUDA_PROGCACHE, or rw]",
    )(command)
    return click.option(
        "--cache-dir",
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=_remember,
        help="The cache to use. [default: $CUDA_PROGCACHE_DIR, or the user's cache directory]",
    )(command)


class OutputFile(click.Path):
    """A file that will be written, or ``-`` for stdout; a missing folder is an error before any work."""

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(dir_okay=False, allow_dash=allow_dash, path_type=None if allow_dash else Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Check the folder as well."""
        found = super().convert(value, param, ctx)
        folder = Path(os.fsdecode(found)).absolute().parent
        if not folder.is_dir():
            self.fail(f"there is no folder {folder}", param, ctx)
        return found


def _explain_misses(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    """Print the reason of every miss on stderr while the command runs, those of worker processes too."""
    if not value or os.environ.get("CUDA_PROGCACHE_LOG") in {"explain", "all"}:
        return  # printed where they happen
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
    help="Print the reason of every miss on stderr.",
)


def library_option(meaning: str) -> Callable[[F], F]:
    """``--manifest``, with what it means to a command."""
    return click.option("--manifest", type=click.Path(exists=True, path_type=Path), help=meaning)


def archs_option(meaning: str) -> Callable[[F], F]:
    """``--arch``, given any number of times."""
    return click.option("--arch", "archs", multiple=True, metavar="ARCH", shell_complete=archs, help=meaning)


def kernels_option(meaning: str) -> Callable[[F], F]:
    """``--kernel``, given any number of times."""
    return click.option("--kernel", "kernels", multiple=True, metavar="NAME", shell_complete=kernels, help=meaning)


manifest_option = library_option("A folder with a manifest.toml, or that file. [default: the bundled kernel library]")
include_option = click.option(
    "-I", "--include-path", "include_paths", multiple=True, metavar="DIR", help="Look for headers here; repeatable."
)

parameter_option = click.option(
    "-p",
    "--parameter",
    "parameters",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=parameters,
    help="A kernel parameter; repeatable.",
)


def parse_parameters(library: KernelLibrary, kernel: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Turn ``KEY=VALUE`` texts into values of the types that the kernel's manifest declares.

    Unknown names pass as text: the library refuses them and names the nearest.

    Raises
    ------
    click.BadParameter
        No ``=``, or a text that isn't of the parameter's type.
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
    """Turn text into an int (any base prefix), a float, a bool or leave it a str.

    Parameters
    ----------
    text : str
        What the user typed.
    kind : str
        ``int``, ``float``, ``bool``; anything else is text.
    hint : str
        The option's name, for the error.
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

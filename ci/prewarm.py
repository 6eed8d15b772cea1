# SPDX-License-Identifier: Apache-2.0
"""Fill a cache before a deployment: every variant of a kernel library, for every architecture.

    python ci/prewarm.py --arch sm_80 --arch sm_90 --manifest my_kernels --cache-dir /srv/progcache --json summary.json

No GPU and no driver is needed. Progress goes to stderr (a bar on a terminal, one line per program elsewhere); stdout
carries the JSON summary when ``--json -`` asks for it, and nothing otherwise: PrewarmReport.to_dict() with
"exit_status" and "cache_dir", or {"ok": false, "exit_status", "error"} where nothing could be started.

Exit status:
  0    every program is in the cache (but those that the manifest's min_arch rules out: they are told as skipped)
  1    a program did not compile, or the cache did not keep it (full disk)
  2    wrong usage: options, manifest, unknown kernel or architecture
  3    the cache can't be used
  4    a compiler library or header package is missing
  130  interrupted
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuda_progcache import errors

if TYPE_CHECKING:
    from cuda_progcache.service.prewarm import PrewarmItem

OK, FAILED, USAGE, CACHE, TOOLCHAIN, INTERRUPTED = 0, 1, 2, 3, 4, 130

_STATUS: tuple[tuple[type[errors.ProgCacheError], int], ...] = (
    (errors.ManifestError, USAGE),
    (errors.KernelNotFoundError, USAGE),
    (errors.ParameterError, USAGE),
    (errors.ArchError, USAGE),
    (errors.StoreError, CACHE),
    (errors.ToolchainError, TOOLCHAIN),
    (errors.ProgCacheError, FAILED),
)


def main(arguments: list[str] | None = None) -> int:
    """Prewarm as the command line says.

    Parameters
    ----------
    arguments : list of str, optional
        The command line after the program's name; ``sys.argv[1:]`` by default.

    Returns
    -------
    int
        The exit status; the module's docstring lists them.
    """
    options = _parser().parse_args(arguments)
    try:
        return _prewarm(options)
    except errors.ProgCacheError as error:
        status = next(status for kind, status in _STATUS if isinstance(error, kind))
        _complain(str(error))
        _write_summary(options.json, {"ok": False, "exit_status": status, "error": str(error)})
        return status
    except KeyboardInterrupt:
        _complain("interrupted; what was compiled so far is in the cache")
        return INTERRUPTED


def _prewarm(options: argparse.Namespace) -> int:
    from cuda_progcache.service.compile_service import CompileService
    from cuda_progcache.service.manifest import KernelLibrary
    from cuda_progcache.store.file_stream import FileStreamProgramCache
    from cuda_progcache.store.root import default_root

    library = KernelLibrary(options.manifest)
    # The root by its path: for the default one a store would fall back to memory, which no deployment can use.
    with FileStreamProgramCache(options.cache_dir or default_root()) as cache, _progress() as on_progress:
        report = CompileService(cache, library=library).prewarm(
            archs=tuple(options.arch), jobs=options.jobs, kernels=options.kernel, on_progress=on_progress
        )
    for item in report.items:
        if item.status == "failed":
            _complain(f"{_title(item)} failed: {item.error}")
    _say(
        f"{len(report.items)} programs for {', '.join(report.archs)}: {report.compiled} compiled, {report.hits} hits, "
        f"{report.skipped} skipped, {report.failed} failed in {report.seconds:.1f} s; "
        f"{report.bytes / 1e6:.1f} MB at {cache.path}"
    )
    status = OK if report.ok else FAILED
    _write_summary(options.json, {**report.to_dict(), "exit_status": status, "cache_dir": str(cache.path)})
    return status


@contextmanager
def _progress() -> Iterator[Callable[[PrewarmItem, int, int], None]]:
    """Give the callback that shows each program as it is done."""
    if not sys.stderr.isatty():
        yield lambda item, done, total: _say(f"[{done}/{total}] {item.status} {_title(item)} ({item.seconds:.2f} s)")
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("prewarm"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda item, done, total: bar.update(
            task, completed=done, total=total, description=f"{item.status} {_title(item)}"
        )


def _title(item: PrewarmItem) -> str:
    variant = " ".join(f"{name}={value}" for name, value in item.variant.items())
    return " ".join(filter(None, (item.kernel, variant, item.arch)))


def _write_summary(target: str | None, summary: dict[str, Any]) -> None:
    if target is None:
        return
    text = json.dumps(summary, indent=2, default=str) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf-8")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _complain(message: str) -> None:
    _say(f"prewarm: {message}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _manifest(text: str) -> Path:
    path = Path(text)
    return path.parent if path.name == "manifest.toml" else path


def _writable(text: str) -> str:
    # Seen now, not after an hour of compiling.
    if text != "-" and not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {Path(text).absolute().parent}")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prewarm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--manifest",
        type=_manifest,
        metavar="DIR",
        help="folder with a manifest.toml, or that file (default: the bundled kernel library)",
    )
    parser.add_argument(
        "--arch", action="append", required=True, metavar="ARCH", help="architecture, such as sm_90; repeatable"
    )
    parser.add_argument("--kernel", action="append", metavar="NAME", help="only this kernel; repeatable")
    parser.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="the cache (default: $CUDA_PROGCACHE_DIR, or the user's cache directory)",
    )
    parser.add_argument(
        "--jobs", type=_positive, metavar="N", help=f"compiles at once (default: one per CPU, here {os.cpu_count()})"
    )
    parser.add_argument("--json", type=_writable, metavar="FILE", help="write the summary as JSON; - is stdout")
    return parser


if __name__ == "__main__":
    sys.exit(main())

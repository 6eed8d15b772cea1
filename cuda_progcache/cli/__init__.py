# SPDX-License-Identifier: Apache-2.0
"""The ``cuda-progcache`` command.

:func:`main` is the console script's entry point. Each command is in a module of
its own, which is imported when the command is called: ``--help`` and ``stats``
don't pay for the imports of ``prewarm``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``cuda-progcache`` and exit with its exit code.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments after the program's name; ``sys.argv[1:]`` by default.

    Raises
    ------
    SystemExit
        Always; its code is one of :class:`cuda_progcache.cli.app.ExitCode`.
    """
    try:
        from cuda_progcache.cli.app import app

        app.main(None if argv is None else list(argv), prog_name="cuda-progcache")
    except KeyboardInterrupt:  # before the command runs, or after
        sys.stderr.write("cuda-progcache: error: interrupted\n")
        raise SystemExit(130) from None
    raise SystemExit(0)

# SPDX-License-Identifier: Apache-2.0
"""Fill a cache before a deployment: ``cuda-progcache prewarm``, run from a checkout.

    python ci/prewarm.py --arch sm_80 --arch sm_90 --manifest my_kernels --cache-dir /srv/progcache --json summary.json
    python ci/prewarm.py --lock progcache.lock --cache-dir /srv/progcache --junit report.xml

Options and exit codes are those of the command, except that ``--json FILE`` stands for its ``--report FILE`` and
``--json -`` for its ``--json``.
"""

from __future__ import annotations

import sys

from cuda_progcache.cli import main


def arguments(given: list[str]) -> list[str]:
    """Convert the arguments of this script to those of ``cuda-progcache``."""
    words = iter(given)
    told = ["prewarm"]
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--json":
            told.append(word)
            continue
        target = value if equals else next(words, "-")
        told += ["--json"] if target == "-" else ["--report", target]
    if not {"--arch", "--lock"} & {word.partition("=")[0] for word in told}:
        sys.exit("prewarm.py: give --lock FILE, or --arch for each architecture of the deployment")
    return told


if __name__ == "__main__":
    main(arguments(sys.argv[1:]))

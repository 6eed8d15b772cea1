# SPDX-License-Identifier: Apache-2.0
"""A fresh process that renders kernel templates: ``python -m ci.differential.child FOLDER CACHE``."""

from __future__ import annotations

import json
import sys
from functools import partial

from ci.differential.ways import kernel_outcomes
from cuda_progcache.templates import KernelEnvironment

if __name__ == "__main__":
    environment = KernelEnvironment(sys.argv[1], bytecode_cache=sys.argv[2])
    sources = json.load(sys.stdin)
    print(json.dumps([kernel_outcomes(partial(environment.from_string, source)) for source in sources]))

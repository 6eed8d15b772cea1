# SPDX-License-Identifier: Apache-2.0
"""The command ``python -m cuda_progcache``, the same as ``cuda-progcache``."""

from __future__ import annotations

from cuda_progcache.cli import main

main()

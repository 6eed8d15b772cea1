# SPDX-License-Identifier: Apache-2.0
"""``python -m cuda_progcache`` is ``cuda-progcache``."""

from __future__ import annotations

from cuda_progcache.cli import main

main()

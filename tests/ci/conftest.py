# SPDX-License-Identifier: Apache-2.0
"""Tests of the project's own tools; github_runner.py is shared by those of the workflows."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = str(Path(__file__).resolve().parent)
if HERE not in sys.path:
    sys.path.insert(0, HERE)

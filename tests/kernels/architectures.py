# SPDX-License-Identifier: Apache-2.0
"""The architectures that the kernels are compiled for in tests."""

from __future__ import annotations

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")

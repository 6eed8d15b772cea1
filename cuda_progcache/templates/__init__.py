# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: parameters to CUDA source, with a map from each generated line back to its template."""

from __future__ import annotations

from cuda_progcache.templates.environment import KernelEnvironment, KernelTemplate
from cuda_progcache.templates.source_map import Location, SourceMap

__all__ = ["KernelEnvironment", "KernelTemplate", "Location", "SourceMap"]

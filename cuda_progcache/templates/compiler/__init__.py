# SPDX-License-Identifier: Apache-2.0
"""The template compiler: from Jinja2's nodes to a Python syntax tree to a code object.

`Compiler.compile` runs in three steps, each linear in the template's size: the `analysis` walks once over the nodes
and notes scopes, loops, constants; the code generator (the classes of this package, one on top of the other) makes
Python nodes; Python compiles these. What the code needs to run is in `cuda_progcache.templates.runtime`, where its
interface is described.
"""

from __future__ import annotations

from cuda_progcache.templates.compiler.generator import Compiler
from cuda_progcache.templates.compiler.warnings import CompilerWarning

__all__ = ["Compiler", "CompilerWarning"]

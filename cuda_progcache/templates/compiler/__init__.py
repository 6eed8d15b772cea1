# SPDX-License-Identifier: Apache-2.0
"""The template compiler: it turns Jinja2's nodes into a Python syntax tree, and the tree into a code object.

`Compiler.compile` has three steps, each linear in the template's size. First, `analysis` walks over the nodes once and
records scopes, loops and constants. Then the code generator, a chain of classes in this package that derive from one
another, creates Python nodes. Finally, Python compiles the nodes. `cuda_progcache.templates.runtime` has the runtime of
the code and describes its interface.
"""

from __future__ import annotations

from cuda_progcache.templates.compiler.generator import Compiler
from cuda_progcache.templates.compiler.warnings import CompilerWarning

__all__ = ["Compiler", "CompilerWarning"]

# SPDX-License-Identifier: Apache-2.0
"""The state of the code generator: what is known of the template that is being compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jinja2.nodes import EvalContext

from cuda_progcache.templates.compiler.analysis import Analysis
from cuda_progcache.templates.compiler.scopes import Function, FunctionState, Scope
from cuda_progcache.templates.compiler.settings import Settings
from cuda_progcache.templates.compiler.tree import Builder

if TYPE_CHECKING:
    import ast
    from collections.abc import Callable, Mapping

    from jinja2 import Environment, nodes

    from cuda_progcache.templates.compiler.warnings import CompilerWarning


class Unit(Builder):
    """What the classes on top of this one share; `begin` is where each template begins.

    Attributes
    ----------
    methods : dict
        Node types to the methods that make their code.
    static : dict
        The names whose values are known, of which `plain_static` have plain data as their values.
    precomputed, precomputed_names : list
        Values of the static context that code can't write down (the code finds number n as the global ``_pc_n``), and
        their names.
    known : dict
        Ids of expressions to their values, constants.
    shared : bool
        Whether the value just worked out may be, or hold, one of the static context's that can be changed.
    reference : str
        The name of the context in which names are looked up.
    pending : list
        Parts of the f-string that will be put out before the next statement.
    buffer : int or None
        The number of the list that output is appended to; None where it is yielded.
    buffers : int
        How many numbers have been given to lists, functions and the like.
    appends : list of int
        How often output was appended to each of the lists that are open.
    strings : set of int
        Ids of the expressions that give text.
    captured : ast.expr
        The code for what the filter block around has put out.
    counters : dict
        The ids of loops that are taken apart to the numbers in the names of what stands for their objects.
    direct_macros : dict
        Scope and name to function, node and analysis of the macros that may be called directly.
    unbound : set of str
        Locals of arguments that may not have been given.
    filter_names, test_names, import_names : dict
        What is looked up or imported once, with the names that it has in the code.
    parent : str or None
        The template that this one extends, if that is a constant.
    extends_seen, known_extends
        How many ``{% extends %}`` came before, and whether one of them certainly took place.
    in_block : bool
        Whether this is a function of a block, not of the template.
    """

    captured: ast.expr
    methods: dict[type[nodes.Node], Callable[[Any], Any]]

    def __init__(self, env: Environment, static_context: Mapping[str, Any] | None = None) -> None:
        self.environment = env
        self.static_context = dict(static_context or {})
        self.warnings: list[CompilerWarning] = []
        self.precomputed: list[Any] = []
        self.precomputed_names: list[str] = []

    def begin(self, name: str | None, filename: str | None, form: str, *, raw: bool) -> None:
        """Forget the last template."""
        self.template_name, self.filename = name, filename
        self.settings = settings = Settings(self.environment, form, raw=raw)
        self.asynchronous = settings.asynchronous
        self.context = self.reference = "context" if raw else "ctx"
        self.eval_ctx = EvalContext(self.environment, name)
        self.analysis = Analysis(
            self.environment,
            self.static_context,
            hoist=settings.fast_context and settings.fuse,
            inline_loops=not settings.asynchronous,
        )
        self.warnings, self.precomputed, self.precomputed_names = [], [], []
        self.names, self.uses = {}, set()
        self.static: dict[str, Any] = {}
        self.plain_static: frozenset[str] = frozenset()
        self.known: dict[int, Any] = {}
        self.shared = False
        self.state = FunctionState(Function())
        self.scope = Scope(None, self.state.function)
        self.out: list[ast.stmt] = []
        self.pending: list[ast.expr] = []
        self.buffer: int | None = None
        self.buffers = 0
        self.appends: list[int] = []
        self.strings: set[int] = set()
        self.counters: dict[int, int] = {}
        self.direct_macros: dict[tuple[int, str], tuple[str, nodes.Macro, Function]] = {}
        self.unbound: set[str] = set()
        self.filter_names: dict[str, str] = {}
        self.test_names: dict[str, str] = {}
        self.import_names: dict[str, str] = {}
        self.parent: str | None = None
        self.extends_seen = 0
        self.known_extends = self.in_block = False

    def numbered(self, what: str) -> str:
        """Return a name for something that the template's names can't name."""
        self.buffers += 1
        return f"{what}{self.buffers}"

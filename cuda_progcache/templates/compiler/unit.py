# SPDX-License-Identifier: Apache-2.0
"""The state of the code generator for the template that is being compiled."""

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
    """The state that all classes of the code generator share; `begin` resets it for each template.

    Attributes
    ----------
    methods : dict
        The methods that make the code of a node, by node type.
    static : dict
        The values of names that are known at compile time.
    plain_static : frozenset of str
        The names in `static` whose values are plain data.
    precomputed, precomputed_names : list
        The values of the static context that can't be written as code, and their names. The code reads value n from the
        global ``_pc_n``.
    known : dict
        The values of constant expressions, by the id of the expression.
    shared : bool
        Whether the value just computed may be, or contain, a mutable value of the static context.
    reference : str
        The variable with the context in which names are looked up.
    pending : list
        The parts of the f-string that will be put out before the next statement.
    buffer : int or None
        The number of the list that output is appended to; None if output is yielded.
    buffers : int
        The number of names given so far to lists, functions and other things; see `numbered`.
    appends : list of int
        How often output was appended to each open list.
    strings : set of int
        The ids of expressions whose values are text.
    captured : ast.expr
        The code for the output of the enclosing filter block.
    counters : dict
        For each loop without a loop object, by its id, the number in the names of the locals that replace the object.
    direct_macros : dict
        The function, node and analysis of each macro that may be called directly, by scope and name.
    unbound : set of str
        The locals of arguments that may have no value yet.
    filter_names, test_names, import_names : dict
        The names in the code of filters, tests and imports, each of which is looked up only once.
    parent : str or None
        The template that this one extends, if its name is constant.
    extends_seen : int
        The number of ``{% extends %}`` so far.
    known_extends : bool
        Whether one of them is certainly executed.
    in_block : bool
        Whether the current function is that of a block, not of the template.
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
        """Reset the state for a new template."""
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
        """Return a new name that begins with `what`, and that no variable of the template can have."""
        self.buffers += 1
        return f"{what}{self.buffers}"

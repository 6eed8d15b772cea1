# SPDX-License-Identifier: Apache-2.0
"""The compiler: it generates the functions of a template and the module that contains them."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from types import CodeType
from typing import TYPE_CHECKING, Any, ClassVar

from jinja2 import Environment, nodes

from cuda_progcache.templates.compiler.folding import is_plain
from cuda_progcache.templates.compiler.inheritance import Inheritance
from cuda_progcache.templates.compiler.loops import Loops
from cuda_progcache.templates.compiler.warnings import warnings_of
from cuda_progcache.templates.regions import Globals, Region
from cuda_progcache.templates.runtime import NAMES, CodeInfo

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler.scopes import Function

_BEGIN = """
from cuda_progcache.templates import jinja_runtime as _rt
globals().update(_rt.NAMES)
"""


class Compiler(Loops, Inheritance):
    """A compiler of templates for an environment.

    A subclass can handle additional node types: its ``_NODE_DISPATCH_NAMES`` maps them to the names of the methods that
    emit their code. An extension of the environment can do the same with ``node_compilers = {NodeType: function}``; the
    function takes the compiler and the node.

    Parameters
    ----------
    env : jinja2.Environment
        The environment of the templates.
    static_context : mapping, optional
        Names with the same value in every render; expressions of these names are evaluated when a template is compiled.
        If a template itself sets such a name anywhere, the name is an ordinary variable in that template.

    Attributes
    ----------
    warnings : list of CompilerWarning
        The warnings of the last template.
    precomputed : list
        The values of the static context that can't be written as code; the last code needs them as ``_pc_0``,
        ``_pc_1``, ….
    """

    _NODE_DISPATCH_NAMES: ClassVar[Mapping[type[nodes.Node], str]] = {
        nodes.Output: "output",
        nodes.If: "if_node",
        nodes.For: "for_node",
        nodes.Macro: "macro",
        nodes.CallBlock: "call_block",
        nodes.FilterBlock: "filter_block",
        nodes.With: "with_node",
        nodes.Block: "block_node",
        Region: "region_node",
        Globals: "globals_node",
        nodes.Extends: "extends_node",
        nodes.Include: "include",
        nodes.Import: "import_node",
        nodes.FromImport: "from_import",
        nodes.ExprStmt: "expression_statement",
        nodes.Assign: "assign_node",
        nodes.AssignBlock: "assign_block",
        nodes.Scope: "scope_node",
        nodes.OverlayScope: "overlay_scope",
        nodes.EvalContextModifier: "modify_eval_context",
        nodes.ScopedEvalContextModifier: "scoped_eval_context",
        nodes.Break: "break_node",
        nodes.Continue: "continue_node",
        nodes.Name: "name",
        nodes.Const: "const",
        nodes.TemplateData: "data",
        nodes.Tuple: "tuple_",
        nodes.List: "list_",
        nodes.Dict: "dict_",
        nodes.CondExpr: "conditional",
        nodes.Filter: "filter",
        nodes.Test: "test",
        nodes.Call: "called",
        nodes.Getitem: "item_of",
        nodes.Getattr: "attribute_of",
        nodes.Concat: "concat",
        nodes.Compare: "comparison",
        **dict.fromkeys((nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Pow), "binary"),
        **dict.fromkeys((nodes.And, nodes.Or), "binary"),
        **dict.fromkeys((nodes.Not, nodes.Neg, nodes.Pos), "unary"),
        nodes.EnvironmentAttribute: "environment_attribute",
        nodes.ExtensionAttribute: "extension_attribute",
        nodes.ImportedName: "imported_name",
        nodes.InternalName: "internal_name",
        nodes.MarkSafe: "mark_safe",
        nodes.MarkSafeIfAutoescape: "mark_safe_if_autoescape",
        nodes.ContextReference: "context_reference",
        nodes.DerivedContextReference: "derived",
    }
    _methods: ClassVar[Mapping[type[nodes.Node], str]] = _NODE_DISPATCH_NAMES

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        names: dict[type[nodes.Node], str] = {}
        for base in reversed(cls.__mro__):
            own: Mapping[Any, str] = base.__dict__.get("_NODE_DISPATCH_NAMES", {})
            names.update((_node_type(kind, base), method) for kind, method in own.items())
        cls._methods = names

    def __init__(self, env: Environment, static_context: Mapping[str, Any] | None = None) -> None:
        super().__init__(env, static_context)
        self.methods = {kind: getattr(self, name) for kind, name in self._methods.items()}
        for extension in env.extensions.values():
            for kind, function in getattr(extension, "node_compilers", {}).items():
                self.methods[kind] = function.__get__(self)

    def compile(
        self,
        node: nodes.Template,
        name: str | None = None,
        filename: str | None = None,
        *,
        source: str | None = None,
        form: str = "render",
    ) -> CodeType:
        """Compile a template.

        Parameters
        ----------
        node : jinja2.nodes.Template
            The syntax tree. Constant expressions in the tree are replaced by their values.
        name : str, optional
            The template's name.
        filename : str, optional
            The file name in tracebacks; the lines are the template's.
        source : str, optional
            The template's text. It is stored in the code, and the other forms are compiled from it on first use.
        form : {"render", "stream", "pieces"}
            The functions to generate; see `cuda_progcache.templates.runtime`.

        Raises
        ------
        jinja2.TemplateSyntaxError
            If the template is invalid.
        """
        tree = self.tree(node, name, filename, source=source, form=form)
        return self._compiled(tree, filename)

    def compile_all(self, node: nodes.Template, name: str | None = None, filename: str | None = None) -> CodeType:
        """Compile a tree without text to two forms, "render" and "pieces", as it can't be compiled again later."""
        tree = self.tree(node, name, filename)
        pieces = self.tree(node, name, filename, form="pieces")
        tree.body[-1:] = [*pieces.body[:-1], tree.body[-1]]
        return self._compiled(tree, filename)

    def tree(
        self,
        node: nodes.Template,
        name: str | None = None,
        filename: str | None = None,
        *,
        source: str | None = None,
        form: str = "render",
        raw: bool = False,
    ) -> ast.Module:
        """Return the Python tree that `compile` compiles; with `raw`, a tree to write as Python text."""
        if not isinstance(node, nodes.Template):
            raise TypeError("Can't compile non template nodes")
        self.begin(name, filename, form, raw=raw)
        analysis = self.analysis
        analysis.run(node)
        for message, line in analysis.fails[:1]:
            self.fail(message, line)
        self.static = {k: v for k, v in self.static_context.items() if k not in analysis.assigned}
        self.plain_static = frozenset(name for name, value in self.static.items() if is_plain(value))
        self.warnings = warnings_of(node, analysis, self.static_context)
        self._number_names()
        functions = self._function(self.entry("render"), node, in_block=False)
        for block_name, block in analysis.blocks.items():
            if isinstance(block, Region):
                functions += self.region_functions(block_name, block)
            else:
                functions += self._function(self.entry(f"_block_{block_name}"), block, in_block=True)
        functions += self.setup_function("_globals_setup", analysis.setup)
        if form == "render":
            functions += self.setup_function("_imports_setup", analysis.import_setup)
        self.line = 1
        begin = self.lines("name = '$name'\nsource = '$source'", name=name, source=source)
        body = [*self._imports(raw=raw), *begin, *functions, *self._tables(raw=raw)]
        self.names, self.out = {}, []  # a compiler is freed only by garbage collection: release its nodes
        return ast.Module(body=body, type_ignores=[])

    def _compiled(self, tree: ast.Module, filename: str | None) -> CodeType:
        code = compile(tree, filename or "<template>", "exec", dont_inherit=True)
        code = code.replace(co_consts=tuple(map(_named_for_people, code.co_consts)))
        warned = tuple((one.code, one.message, one.line, one.suggestion) for one in self.warnings)
        plain = NAMES.keys() >= self.uses
        return CodeInfo(tuple(self.analysis.references), plain, tuple(self.precomputed_names), warned).put_into(code)

    # One template

    def _number_names(self) -> None:
        functions = [f for f in self.analysis.functions.values() if f.outer is None]
        self.filter_names = {n: f"_f{i}" for i, n in enumerate(dict.fromkeys(n for f in functions for n in f.filters))}
        self.test_names = {n: f"_is{i}" for i, n in enumerate(dict.fromkeys(n for f in functions for n in f.tests))}
        self.import_names = {name: f"_import{i}" for i, name in enumerate(self.analysis.imports)}

    def _function(self, name: str, node: Any, *, in_block: bool) -> list[ast.stmt]:
        """Return the function of the template's body or of a block."""
        analysis = self.analysis
        self.line = line = node.lineno or 1
        function = self.begin_function(node, in_block=in_block)
        if self.settings.form == "render":
            with self.buffered():
                self._body(node, function)
                self.return_contents(self.out, 0)
        else:
            self._body(node, function)
            self.flush()
        self.line = line
        begin: list[ast.stmt] = []
        if self.context != "context":  # Jinja2's tracebacks show the variables of `context`
            begin += self.lines("context = $ctx")
        if self.settings.form != "render":
            begin += self.lines("if False: yield None")  # makes it a generator even without output
        if in_block or analysis.blocks or analysis.extends:
            begin += self.lines("if _blocks is None: _blocks = $ctx.blocks")
        if analysis.setup is not None and not in_block:
            begin += self.lines("await _globals_setup($ctx)")
        begin += self.prologue(function, outermost=True)
        begin += self.self_reference(function)
        return self.lines("async def $name($ctx, _blocks=None): $body", name=name, body=begin + self.out)

    def _body(self, node: Any, function: Function) -> None:
        extends = self.analysis.extends and not self.in_block
        if self.in_block:
            self.begin_block(node.name, function)
        if extends:
            self.state.guard_output = True
            self.emit("parent_template = None")
        with self.entered(self.scope, leave=False, first=True):
            self.body(node.body)
        if extends:
            self.parent_body()

    # The module

    def _imports(self, *, raw: bool) -> list[ast.stmt]:
        made: list[ast.stmt] = []
        if raw:
            made += self.lines(_BEGIN)
        for name, local in self.import_names.items():
            package, _, obj = name.rpartition(".")
            pattern = "from $package import $name as $local" if package else "import $name as $local"
            made += self.lines(pattern, package=package, name=obj, local=local)
        return made

    def _tables(self, *, raw: bool) -> list[ast.stmt]:
        pairs = [(name, self.load(self.entry(f"_block_{name}"))) for name in self.analysis.blocks]
        made = self.lines("blocks = $blocks", blocks=self.dict_of(pairs))
        if self.parent is not None:
            made += self.lines("parent = '$parent'", parent=self.parent)
        if raw:
            made += self.lines("_rt.serve_jinja2(globals())")
        return made


def _node_type(kind: type[nodes.Node] | str, where: type) -> type[nodes.Node]:
    """Return the node type that an entry of a dispatch table gives as a class or by name."""
    if not isinstance(kind, str):
        return kind
    waiting: list[type[nodes.Node]] = [nodes.Node]
    while waiting:
        found = waiting.pop()
        if found.__name__ == kind:
            return found
        waiting += found.__subclasses__()
    raise TypeError(f"{where.__name__}._NODE_DISPATCH_NAMES: there is no node type {kind!r}")


def _named_for_people(constant: Any) -> Any:
    """Return a function's code with the name that Jinja2 expects in tracebacks: ``root`` or ``block_…``."""
    if not isinstance(constant, CodeType):
        return constant
    name = constant.co_name
    if name.startswith("_block_"):
        return constant.replace(co_name=name[1:])
    return constant.replace(co_name="root") if name in _ROOTS else constant


_ROOTS = frozenset({"render", "render_stream", "render_pieces"})

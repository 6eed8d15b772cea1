# SPDX-License-Identifier: Apache-2.0
"""Expressions: from ``jinja2.nodes`` to Python's."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateAssertionError
from jinja2.utils import _PassArg

from cuda_progcache.templates.compiler.folding import Folding
from cuda_progcache.templates.compiler.scopes import GIVEN, READ, Function, FunctionState, Loop, Scope
from cuda_progcache.templates.compiler.settings import JINJA2_UNDEFINED
from cuda_progcache.templates.compiler.tree import BINARY, COMPARE, EQ, GE, IN, IS, IS_NOT, STR, UNARY

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler.settings import Settings

_DICT_HAS = frozenset(dir(dict))


@dataclass(slots=True, eq=False)
class Counters:
    """The locals that stand for an inlined loop object."""

    index: str
    size: str
    items: str


class Expressions(Folding):
    """Code for expressions; each method takes a node and returns a Python expression.

    Attributes
    ----------
    captured : ast.expr
        The code for what the filter block around has put out.
    counters : dict
        The ids of loops that are taken apart to what stands for their objects.
    """

    template_name: str | None
    filename: str | None
    captured: ast.expr
    counters: dict[int, Counters]
    settings: Settings
    scope: Scope
    state: FunctionState
    context: str
    reference: str
    unbound: set[str]
    import_names: dict[str, str]
    filter_names: dict[str, str]
    test_names: dict[str, str]
    direct_macros: dict[tuple[int, str], tuple[str, nodes.Macro, Function]]
    expression_methods: dict[type[nodes.Node], Callable[[Any], ast.expr]]

    def fail(self, message: str, line: int) -> NoReturn:
        """Raise the error of a template that is wrong."""
        raise TemplateAssertionError(message, line, self.template_name, self.filename)

    def position(self, node: nodes.Node) -> str:
        """Where a node stands, for people."""
        where = f"line {node.lineno}"
        return where if self.template_name is None else f"{where} in {self.template_name!r}"

    def expr(self, node: nodes.Node) -> ast.expr:
        """Return the code for an expression."""
        if id(node) in self.analysis.constant:
            known = self.folded(node)
            if known is not None:
                return known
        try:
            method = self.expression_methods[type(node)]
        except KeyError:
            self.fail(f"no code for {type(node).__name__} nodes", node.lineno)
        line = node.lineno
        if not line or line == self.line:
            return method(node)
        outer, self.line = self.line, line
        made = method(node)
        self.line = outer
        return made

    def waited(self, value: ast.expr) -> ast.expr:
        """Return `value`, awaited if it is an awaitable, in an async environment."""
        if self.settings.asynchronous:
            return self.awaits(self.call_runtime("auto_await", value))
        return value

    # Names and constants

    def name(self, node: nodes.Name) -> ast.expr:
        """A variable; where it isn't sure to have a value, with a look whether it has."""
        name = node.name
        if name in self.static:
            return self.static_value(name)
        local = self.local(name)
        if local in self.state.defined:
            return self.load(local)
        owner = self.scope.owner(name)
        if owner is not None:
            if owner.resolve()[name][1] == GIVEN:
                if local not in self.unbound:
                    return self.load(local)
            elif self.early(name) and owner.notes[name] == READ:
                return self.load(local)
        return self.choose(
            self.compare(self.load(local), IS, self.runtime("missing")), self.undefined(name), self.load(local)
        )

    def early(self, name: str) -> bool:
        """Whether the undefined object of a name may be made once, where the name is looked up."""
        return self.settings.undefined_early and name not in self.analysis.kept

    def local(self, name: str) -> str:
        """Return the local that holds a template variable."""
        local = self.scope.find(name)
        if local is None:
            raise AssertionError(f"the analysis has not seen {name!r}")
        self.use_hoisted(self.scope, name, local)
        return local

    def use_hoisted(self, scope: Scope | None, name: str, local: str | None) -> None:
        """Note that a name which its function may look up where it begins is needed."""
        owner = scope.owner(name) if scope is not None and local is not None and local[:2] == "c_" else None
        if owner is not None:
            owner.function.used.add(name)

    def undefined(self, name: str, hint: str | None = None) -> ast.expr:
        """Code for the undefined object of a name."""
        args = [] if hint is None else [self.constant(hint)]
        return self.call(self.dotted("environment", "undefined"), args, [self.keyword("name", self.constant(name))])

    def const(self, node: nodes.Const) -> ast.expr:
        """A literal."""
        return self.literal(node.value)

    def data(self, node: nodes.TemplateData) -> ast.expr:
        """Text of the template, safe by nature."""
        if self.eval_ctx.volatile:
            return self.marked(self.constant(node.data))
        return self.literal(node.as_const(self.eval_ctx))

    def marked(self, value: ast.expr) -> ast.expr:
        """`value` as markup if the moment's escaping says so."""
        autoescape = self.dotted(self.context, "eval_ctx", "autoescape")
        return self.call(self.choose(autoescape, self.runtime("Markup"), self.runtime("identity")), [value])

    def tuple_(self, node: nodes.Tuple) -> ast.expr:
        """A tuple."""
        return self.tuple_of([self.expr(item) for item in node.items])

    def list_(self, node: nodes.List) -> ast.expr:
        """A list."""
        return ast.List([self.expr(item) for item in node.items], ast.Load(), lineno=self.line, col_offset=0)

    def dict_(self, node: nodes.Dict) -> ast.expr:
        """A dict."""
        keys: list[ast.expr | None] = [self.expr(item.key) for item in node.items]
        values = [self.expr(item.value) for item in node.items]
        return ast.Dict(keys, values, lineno=self.line, col_offset=0)

    # Operators

    def binary(self, node: nodes.BinExpr) -> ast.expr:
        """``+ - * / // % **``, ``and``, ``or``."""
        left, right = self.expr(node.left), self.expr(node.right)
        operator = node.operator
        if operator in self.settings.intercepted_binops:
            called = self.dotted("environment", "call_binop")
            return self.call(called, [self.load(self.context), self.constant(operator), left, right])
        if operator in BINARY:
            return ast.BinOp(left, BINARY[operator], right, lineno=self.line, col_offset=0)
        op = ast.And() if operator == "and" else ast.Or()
        return ast.BoolOp(op, [left, right], lineno=self.line, col_offset=0)

    def unary(self, node: nodes.UnaryExpr) -> ast.expr:
        """``not``, ``-`` and ``+``."""
        operand = self.expr(node.node)
        operator = node.operator
        if operator in self.settings.intercepted_unops:
            called = self.dotted("environment", "call_unop")
            return self.call(called, [self.load(self.context), self.constant(operator), operand])
        return ast.UnaryOp(UNARY[operator], operand, lineno=self.line, col_offset=0)

    def comparison(self, node: nodes.Compare) -> ast.expr:
        """A chain of comparisons."""
        left = self.expr(node.expr)
        comparators = [self.expr(operand.expr) for operand in node.ops]
        ops = [COMPARE[operand.op] for operand in node.ops]
        return ast.Compare(left, ops, comparators, lineno=self.line, col_offset=0)

    def concat(self, node: nodes.Concat) -> ast.expr:
        """``a ~ b``."""
        parts = [self.expr(part) for part in node.nodes]
        if self.eval_ctx.volatile:
            volatile = self.dotted(self.context, "eval_ctx", "volatile")
            join = self.choose(volatile, self.runtime("markup_join"), self.runtime("str_join"))
        elif self.eval_ctx.autoescape:
            join = self.runtime("markup_join")
        elif self.settings.fuse and all(isinstance(part, (ast.Name, ast.Constant)) for part in parts[1:]):
            # All parts are worked out before the first becomes text, which could raise another error.
            return self.joined([self.formatted(part, STR) for part in parts])
        else:
            join = self.runtime("str_join")
        return self.call(join, [self.tuple_of(parts)])

    def conditional(self, node: nodes.CondExpr) -> ast.expr:
        """``a if test else b``; Jinja2's own undefined without the else."""
        soft, self.state.soft = self.state.soft, True
        try:
            if id(node.test) in self.analysis.constant or type(node.test) is nodes.Name:
                chosen = self.decided(node.test)
                if chosen is True:
                    return self.expr(node.expr1)
                if chosen is False and node.expr2 is not None:
                    return self.expr(node.expr2)
            test = self.expr(node.test)
            body = self.expr(node.expr1)
            if node.expr2 is not None:
                return self.choose(test, body, self.expr(node.expr2))
            hint = (
                f"the inline if-expression on {self.position(node)} evaluated to false and no else section was defined."
            )
            return self.choose(test, body, self.call_runtime("Undefined", self.constant(hint)))
        finally:
            self.state.soft = soft

    def decided(self, test: nodes.Node) -> bool | None:
        """Return what a test comes to if that is known now."""
        if self.eval_ctx.volatile or not self.static:
            return None
        if type(test) is nodes.Not:
            inner = self.decided(test.node)
            return None if inner is None else not inner
        if id(test) not in self.analysis.constant and not (type(test) is nodes.Name and test.name in self.static):
            return None
        try:
            value = self.fold(test)
            return None if type(value) in JINJA2_UNDEFINED else bool(value)
        except Exception:  # noqa: BLE001  (it raises again where the render evaluates it)
            return None

    # Attributes and items

    def attribute_of(self, node: nodes.Getattr) -> ast.expr:
        """``a.b``: the attribute, else the item.

        A plain dict that has the key, and no attribute of that name, is asked directly.
        """
        loop = self.analysis.loops.get(id(node))
        if loop is not None and not loop.needs_object:
            return self.loop_attribute(loop, node.attr)
        attr = node.attr
        if not self.settings.fast_getattr:
            value = self.call(self.dotted("environment", "getattr"), [self.expr(node.node), self.constant(attr)])
            return self.waited(value)
        return self.looked_up(node.node, attr, "_getattr", dict_first=attr not in _DICT_HAS)

    def looked_up(self, node: nodes.Expr, key: str, otherwise: str, *, dict_first: bool) -> ast.expr:
        """Code that gets `key` of a dict or an attribute in line, and anything else by the function `otherwise`."""
        base = self.expr(node)
        if isinstance(base, ast.Name):
            local = base.id
            first: ast.expr = base
        else:
            local = "_t"
            first = ast.NamedExpr(self.store(local), base, lineno=self.line, col_offset=0)
        alias = self.state.dict_aliases.get(local)
        if local[:2] == "c_" and local[2:] not in self.state.function.hoisted:
            alias = None  # a local of the function around this macro
        last = self.call_name(otherwise, first if not dict_first else self.load(local), self.constant(key))
        if otherwise == "_getattr":
            subject = first if not dict_first else self.load(local)
            value = self.call_name("getattr", subject, self.constant(key), self.runtime("missing"))
            named = ast.NamedExpr(self.store("_v"), value, lineno=self.line, col_offset=0)
            absent = self.call_name(otherwise, self.load(local), self.constant(key))
            last = self.choose(self.compare(named, IS_NOT, self.runtime("missing")), self.load("_v"), absent)
        if not dict_first:
            return last
        if alias is not None:  # the dict itself, or an empty one
            test = self.compare(self.constant(key), IN, self.load(alias))
            return self.choose(test, self.subscript(self.load(alias), self.constant(key)), last)
        test = self.both(
            self.compare(self.call_name("type", first), IS, self.load("dict")),
            self.compare(self.constant(key), IN, self.load(local)),
        )
        return self.choose(test, self.subscript(self.load(local), self.constant(key)), last)

    def loop_attribute(self, loop: Loop, attr: str) -> ast.expr:
        """``loop.index`` and the like of a loop that was taken apart."""
        if attr == "depth":
            return self.constant(1)
        if attr == "depth0":
            return self.constant(0)
        counters = self.counters[id(loop)]
        index = self.load(counters.index)
        if attr == "index":
            return index
        if attr == "index0":
            return self.minus(index, self.constant(1))
        if attr == "first":
            return self.compare(index, EQ, self.constant(1))
        known = self.compare(self.load(counters.size), GE, self.constant(0))
        size = self.load(counters.size)
        items = self.load(counters.items)
        if attr == "last":
            return self.choose(known, self.compare(index, EQ, size), self.attribute(items, "last"))
        length = self.choose(known, size, self.attribute(items, "length"))
        if attr == "length":
            return length
        left = self.minus(length, index)
        return left if attr == "revindex0" else self.plus_one(left)

    def plus_one(self, value: ast.expr) -> ast.expr:
        """``value + 1``."""
        return ast.BinOp(value, ast.Add(), self.constant(1), lineno=self.line, col_offset=0)

    def minus(self, left: ast.expr, right: ast.expr) -> ast.expr:
        """``left - right``."""
        return ast.BinOp(left, ast.Sub(), right, lineno=self.line, col_offset=0)

    def item_of(self, node: nodes.Getitem) -> ast.expr:
        """``a[b]``: the item, else the attribute; slices go straight to the object."""
        if isinstance(node.arg, nodes.Slice):
            parts = (node.arg.start, node.arg.stop, node.arg.step)
            base = self.expr(node.node)
            if not isinstance(base, (ast.Name, ast.Call)):  # Python warns of a constant that can't be subscripted
                base = ast.NamedExpr(self.store("_t"), base, lineno=self.line, col_offset=0)
            start, stop, step = (None if part is None else self.expr(part) for part in parts)
            return self.subscript(base, ast.Slice(start, stop, step, lineno=self.line, col_offset=0))
        arg = node.arg
        if self.settings.fast_getitem and type(arg) is nodes.Const and type(arg.value) is str:
            return self.looked_up(node.node, arg.value, "_getitem", dict_first=True)
        base = self.expr(node.node)
        getitem = self.load("_getitem") if self.settings.fast_getitem else self.dotted("environment", "getitem")
        return self.waited(self.call(getitem, [base, self.expr(arg)]))

    # Filters, tests, calls

    def filter(self, node: nodes.Filter) -> ast.expr:
        """``value|filter``; without a value, of what the block around has put out."""
        known = self.environment.filters.get(node.name)
        return self.applied(node, known, self.filter_names[node.name], "filter")

    def test(self, node: nodes.Test) -> ast.expr:
        """``value is test``."""
        known = self.environment.tests.get(node.name)
        return self.applied(node, known, self.test_names[node.name], "test")

    def applied(self, node: nodes.Filter | nodes.Test, known: Any, local: str, what: str) -> ast.expr:
        """The call of a filter or test."""
        if known is None and not self.state.soft:
            self.fail(f"No {what} named {node.name!r}.", node.lineno)
        value = self.captured if node.node is None else self.expr(node.node)
        args = [value]
        wants = _PassArg.from_obj(known) if known is not None else None
        if wants is _PassArg.context:
            seen = self.load(self.context)
            args.insert(0, self.call_runtime("_seen", seen) if self.settings.fast_context else seen)
        elif wants is _PassArg.eval_context:
            args.insert(0, self.dotted(self.context, "eval_ctx"))
        elif wants is _PassArg.environment:
            args.insert(0, self.load("environment"))
        keywords = self.signature(node, args)
        return self.waited(self.call(self.load(local), args, keywords))

    def signature(
        self,
        node: nodes.Filter | nodes.Test | nodes.Call,
        args: list[ast.expr],
        extra: Sequence[tuple[str, ast.expr]] = (),
    ) -> list[ast.keyword]:
        """Add a call's positional arguments to `args`; return its keyword arguments."""
        args += [self.expr(arg) for arg in node.args]
        named: list[tuple[str, ast.expr]] = [(str(keyword.key), self.expr(keyword.value)) for keyword in node.kwargs]
        named += extra
        keywords = []
        if any(iskeyword(name) for name, _ in named):  # legal in a template, but not in Python's text
            keywords.append(self.keyword(None, self.dict_of(named)))
        else:
            keywords += [self.keyword(name, value) for name, value in named]
        if node.dyn_args is not None:
            args.append(self.starred(self.expr(node.dyn_args)))
        if node.dyn_kwargs is not None:
            keywords.append(self.keyword(None, self.expr(node.dyn_kwargs)))
        return keywords

    def called(self, node: nodes.Call, caller: ast.expr | None = None) -> ast.expr:
        """``f(x)``: a macro bound once is called directly, anything else through the context."""
        loop = self.analysis.loops.get(id(node))
        if loop is not None and not loop.needs_object:
            items = self.tuple_of([self.expr(arg) for arg in node.args])
            index = self.loop_attribute(loop, "index0")
            count = self.constant(len(node.args))
            return self.subscript(items, ast.BinOp(index, BINARY["%"], count, lineno=self.line, col_offset=0))
        direct = self.called_directly(node, caller)
        if direct is not None:
            return self.marked_result(direct)
        return self.called_by_context(node, caller)

    def called_by_context(self, node: nodes.Call, caller: ast.expr | None = None) -> ast.expr:
        """A call of something that is known only in the render."""
        extra = [] if caller is None else [("caller", caller)]
        in_loop = self.scope.loop and self.state.function.sets_in_loop
        in_block = self.scope.block and bool(self.scope.assigned)
        scoped = in_loop or in_block
        in_scope = [
            ("_loop_vars", self.load("_loop_vars") if in_loop else self.constant(None)),
            ("_block_vars", self.load("_block_vars") if in_block else self.constant(None)),
        ]
        target = self.expr(node.node)
        context = self.load(self.context)
        if self.settings.fast_call and scoped:
            scopes = [value for _, value in in_scope]
            function, args = self.runtime("_call_in_scope"), [context, *scopes, target]
        elif self.settings.fast_call:
            function, args = self.runtime("_call"), [context, target]
        else:
            extra += [(name, value) for name, value in in_scope if not isinstance(value, ast.Constant)]
            called = self.dotted("environment", "call") if self.settings.sandboxed else None
            function = called or self.dotted(self.context, "call")
            args = [context, target] if called else [target]
        keywords = self.signature(node, args, extra)
        return self.waited(self.call(function, args, keywords))

    def marked_result(self, value: ast.expr) -> ast.expr:
        """A macro's text, as markup where escaping is on."""
        return self.call_runtime("Markup", value) if self.eval_ctx.autoescape else value

    def called_directly(self, node: nodes.Call, caller: ast.expr | None) -> ast.expr | None:
        """The call of the Python function of a macro that the name is bound to for good; None where it isn't."""
        target = node.node
        if type(target) is not nodes.Name or not self.direct_macros or node.dyn_args or node.dyn_kwargs:
            return None
        owner = self.scope.owner(target.name)
        known = self.direct_macros.get((id(owner), target.name))
        if known is None:
            return None
        function, macro, facts = known
        names = [arg.name for arg in macro.args]
        given: dict[str, nodes.Expr] = {}
        if len(node.args) > len(names) or (caller is not None) != ("caller" in facts.special and "caller" not in names):
            return None
        if facts.special & {"kwargs", "varargs"} or "caller" in names:
            return None
        for keyword in node.kwargs:
            if keyword.key not in names[len(node.args) :] or keyword.key in given:
                return None
            given[keyword.key] = keyword.value
        args = [self.expr(arg) for arg in node.args]
        if len(given) > 1 and [name for name in names if name in given] != list(given):
            return None  # arguments are evaluated in the order in which they are written
        absent = names[len(args) :]
        args += [self.expr(given[name]) if name in given else self.runtime("missing") for name in absent]
        if caller is not None:
            args.append(caller)
        return self.call_name(function, *args)

    # What extensions use

    def environment_attribute(self, node: nodes.EnvironmentAttribute) -> ast.expr:
        """An attribute of the environment."""
        return self.dotted("environment", node.name)

    def extension_attribute(self, node: nodes.ExtensionAttribute) -> ast.expr:
        """An attribute of an extension."""
        extension = self.subscript(self.dotted("environment", "extensions"), self.constant(node.identifier))
        return self.attribute(extension, node.name)

    def imported_name(self, node: nodes.ImportedName) -> ast.expr:
        """Something imported when the code is loaded."""
        return self.load(self.import_names[node.importname])

    def internal_name(self, node: nodes.InternalName) -> ast.expr:
        """A Python local that an extension's parser asked for."""
        return self.load(node.name)

    def mark_safe(self, node: nodes.MarkSafe) -> ast.expr:
        """Text as markup."""
        return self.call_runtime("Markup", self.expr(node.expr))

    def mark_safe_if_autoescape(self, node: nodes.MarkSafeIfAutoescape) -> ast.expr:
        """Text as markup where escaping is on."""
        return self.marked(self.expr(node.expr))

    def context_reference(self, node: nodes.Node) -> ast.expr:  # noqa: ARG002  (the table's signature)
        """The context."""
        seen = self.load(self.context)
        return self.call_runtime("_seen", seen) if self.settings.fast_context else seen

    def derived_context_reference(self, node: nodes.Node) -> ast.expr:  # noqa: ARG002  (the table's signature)
        """The context with the locals."""
        return self.derived()

    def derived(self) -> ast.expr:
        """Code for a context that has this scope's names, too."""
        return self.call_runtime("_derived", self.load(self.reference), self.locals())

    def locals(self) -> ast.expr:
        """Code for a dict of the names set so far, here and around."""
        return self.dict_of([(name, self.load(local)) for name, local in self.scope.exports().items()])

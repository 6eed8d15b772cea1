# SPDX-License-Identifier: Apache-2.0
"""Code generation for expressions: from the nodes of ``jinja2.nodes`` to Python's."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.exceptions import TemplateAssertionError
from jinja2.utils import _PassArg

from cuda_progcache.templates.compiler.folding import Folding
from cuda_progcache.templates.compiler.scopes import GIVEN, READ, Loop, Scope
from cuda_progcache.templates.compiler.settings import JINJA2_UNDEFINED
from cuda_progcache.templates.compiler.tree import BINARY, BOOLEAN, COMPARE, STR, UNARY

_DICT_HAS = frozenset(dir(dict))

_COUNTED = {
    "depth": "1",
    "depth0": "0",
    "index": "$i",
    "index0": "$i - 1",
    "first": "$i == 1",
    "last": "$i == $n if $n >= 0 else $of.last",
    "length": "$n if $n >= 0 else $of.length",
    "revindex0": "($n if $n >= 0 else $of.length) - $i",
    "revindex": "($n if $n >= 0 else $of.length) - $i + 1",
}
"""Code for the attributes of ``loop``.

``$i`` is the counter, ``$n`` the number of items, or -1 if that is unknown, and ``$of`` the iterable, or a `LookAhead`
if ``$n`` is -1.
"""


class Expressions(Folding):
    """The code generator for expressions; methods for nodes take a node and return a Python expression."""

    def fail(self, message: str, line: int) -> NoReturn:
        """Raise the error of an invalid template."""
        raise TemplateAssertionError(message, line, self.template_name, self.filename)

    def position(self, node: nodes.Node) -> str:
        """Return the position of a node as text for display."""
        where = f"line {node.lineno}"
        return where if self.template_name is None else f"{where} in {self.template_name!r}"

    def expr(self, node: nodes.Node) -> ast.expr:
        """Return the code for an expression."""
        if id(node) in self.analysis.constant:
            known = self.folded(node)
            if known is not None:
                return known
        try:
            method = self.methods[type(node)]
        except KeyError:
            self.fail(f"no code for {type(node).__name__} nodes", node.lineno)
        outer = self.line
        self.line = node.lineno or outer
        made: ast.expr = method(node)
        self.line = outer
        return made

    def waited(self, value: ast.expr) -> ast.expr:
        """Return `value`; in an async environment, with code that awaits an awaitable."""
        return self.code("await $auto_await($value)", value=value) if self.asynchronous else value

    # Names and constants

    def name(self, node: nodes.Name) -> ast.expr:
        """Return the code for a variable, with a check that it has a value unless that is certain."""
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
        return self.code("$undefined if $local is $missing else $local", local=local, undefined=self.undefined(name))

    def early(self, name: str) -> bool:
        """Return whether the undefined object of a name may be created once, when the name is looked up."""
        return self.settings.undefined_early and name not in self.analysis.kept

    def local(self, name: str) -> str:
        """Return the local that holds a template variable."""
        local = self.scope.find(name)
        if local is None:
            raise AssertionError(f"the analysis has not seen {name!r}")
        self.use_hoisted(self.scope, name, local)
        return local

    def use_hoisted(self, scope: Scope | None, name: str, local: str | None) -> None:
        """Record that a name is needed, if its function looks up the name at its start."""
        owner = scope.owner(name) if scope is not None and local is not None and local[:2] == "c_" else None
        if owner is not None:
            owner.function.used.add(name)

    def undefined(self, name: str, hint: str | None = None) -> ast.expr:
        """Return the code that creates the undefined object of a name."""
        hints = [] if hint is None else [self.constant(hint)]
        return self.code("environment.undefined($hints, name='$name')", hints=hints, name=name)

    def const(self, node: nodes.Const) -> ast.expr:
        """Return the code for a literal."""
        return self.literal(node.value)

    def data(self, node: nodes.TemplateData) -> ast.expr:
        """Return the code for text of the template, which is safe by definition."""
        if self.eval_ctx.volatile:
            return self.marked(self.constant(node.data))
        return self.literal(node.as_const(self.eval_ctx))

    def marked(self, value: ast.expr) -> ast.expr:
        """Return code that makes `value` markup if escaping is on at that point of the render."""
        return self.code("($Markup if $ctx.eval_ctx.autoescape else $identity)($value)", value=value)

    def tuple_(self, node: nodes.Tuple) -> ast.expr:
        """Return the code for a tuple."""
        return self.tuple_of([self.expr(item) for item in node.items])

    def list_(self, node: nodes.List) -> ast.expr:
        """Return the code for a list."""
        return ast.List([self.expr(item) for item in node.items], ast.Load(), lineno=self.line, col_offset=0)

    def dict_(self, node: nodes.Dict) -> ast.expr:
        """Return the code for a dict."""
        return self.dict_of([(self.expr(item.key), self.expr(item.value)) for item in node.items])

    # Operators

    def binary(self, node: nodes.BinExpr) -> ast.expr:
        """Return the code for ``+ - * / // % **``, ``and`` and ``or``."""
        left, right = self.expr(node.left), self.expr(node.right)
        operator = node.operator
        if operator in self.settings.intercepted_binops:
            pattern = "environment.call_binop($ctx, '$operator', $left, $right)"
            return self.code(pattern, operator=operator, left=left, right=right)
        if operator in BINARY:
            return ast.BinOp(left, BINARY[operator], right, lineno=self.line, col_offset=0)
        return ast.BoolOp(BOOLEAN[operator], [left, right], lineno=self.line, col_offset=0)

    def unary(self, node: nodes.UnaryExpr) -> ast.expr:
        """Return the code for ``not``, ``-`` and ``+``."""
        operand = self.expr(node.node)
        operator = node.operator
        if operator in self.settings.intercepted_unops:
            return self.code("environment.call_unop($ctx, '$operator', $operand)", operator=operator, operand=operand)
        return ast.UnaryOp(UNARY[operator], operand, lineno=self.line, col_offset=0)

    def comparison(self, node: nodes.Compare) -> ast.expr:
        """Return the code for a chain of comparisons."""
        left = self.expr(node.expr)
        comparators = [self.expr(operand.expr) for operand in node.ops]
        ops = [COMPARE[operand.op] for operand in node.ops]
        return ast.Compare(left, ops, comparators, lineno=self.line, col_offset=0)

    def concat(self, node: nodes.Concat) -> ast.expr:
        """Return the code for ``a ~ b``."""
        parts = [self.expr(part) for part in node.nodes]
        if self.eval_ctx.volatile:
            join = self.code("$markup_join if $ctx.eval_ctx.volatile else $str_join")
        elif self.eval_ctx.autoescape:
            join = self.runtime("markup_join")
        elif self.settings.fuse and all(isinstance(part, (ast.Name, ast.Constant)) for part in parts[1:]):
            # Evaluate all parts before the first one is converted to text: the conversion could raise another error.
            return self.joined([self.formatted(part, STR) for part in parts])
        else:
            join = self.runtime("str_join")
        return self.call(join, [self.tuple_of(parts)])

    def conditional(self, node: nodes.CondExpr) -> ast.expr:
        """Return the code for ``a if test else b``; without the else, the default is a plain ``jinja2.Undefined``."""
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
                return self.code("$body if $test else $other", test=test, body=body, other=self.expr(node.expr2))
            where = self.position(node)
            hint = f"the inline if-expression on {where} evaluated to false and no else section was defined."
            return self.code("$body if $test else $Undefined('$hint')", test=test, body=body, hint=hint)
        finally:
            self.state.soft = soft

    def decided(self, test: nodes.Node) -> bool | None:
        """Return the result of a test; None if the result isn't known at compile time."""
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
        except Exception:  # noqa: BLE001  (the render evaluates it and raises the error)
            return None

    # Attributes and items

    def attribute_of(self, node: nodes.Getattr) -> ast.expr:
        """Return the code for ``a.b``: the attribute, or failing that, the item.

        The code reads the item directly if the object is a plain dict that has the key, and dicts have no attribute of
        that name.
        """
        loop = self.analysis.loops.get(id(node))
        if loop is not None and not loop.needs_object:
            return self.loop_attribute(loop, node.attr)
        attr = node.attr
        if not self.settings.fast_getattr:
            value = self.code("environment.getattr($base, '$attr')", base=self.expr(node.node), attr=attr)
            return self.waited(value)
        return self.looked_up(node.node, attr, attribute=True, dict_first=attr not in _DICT_HAS)

    def looked_up(self, node: nodes.Expr, key: str, *, attribute: bool, dict_first: bool) -> ast.expr:
        """Return code that gets an item of a dict, or an attribute, inline, and calls a function for other lookups."""
        base = self.expr(node)
        local, first = "_t", base
        if isinstance(base, ast.Name):
            local = base.id
        else:
            first = self.code("(_t := $base)", base=base)
        parts: dict[str, Any] = {"local": local, "first": first, "key": key}
        parts["subject"] = self.load(local) if dict_first else first
        if attribute:
            getter = "getattr($subject, '$key', $missing)"
            last = self.code(f"_v if (_v := {getter}) is not $missing else _getattr($local, '$key')", **parts)
        else:
            last = self.code("_getitem($subject, '$key')", **parts)
        if not dict_first:
            return last
        alias = self.state.dict_aliases.get(local)
        if local[:2] == "c_" and local[2:] not in self.state.function.hoisted:
            alias = None  # a local of the function around the macro
        if alias is not None:  # it is the dict itself, or an empty dict
            return self.code("$alias['$key'] if '$key' in $alias else $last", alias=alias, key=key, last=last)
        test = "type($first) is dict and '$key' in $local"
        return self.code(f"$local['$key'] if {test} else $last", last=last, **parts)

    def loop_attribute(self, loop: Loop, attr: str) -> ast.expr:
        """Return the code for an attribute such as ``loop.index`` of a loop without a loop object."""
        return self.code(_COUNTED[attr], **self.counted(loop))

    def counted(self, loop: Loop) -> dict[str, str]:
        """Return the locals that replace a loop object."""
        number = self.counters.get(id(loop))
        return {"i": f"_i{number}", "n": f"_n{number}", "of": f"_of{number}"}

    def item_of(self, node: nodes.Getitem) -> ast.expr:
        """Return the code for ``a[b]``: the item, or failing that, the attribute; slices are always items."""
        if isinstance(node.arg, nodes.Slice):
            parts = (node.arg.start, node.arg.stop, node.arg.step)
            base = self.expr(node.node)
            if not isinstance(base, (ast.Name, ast.Call)):  # Python warns about a constant that can't be subscripted
                base = self.code("(_t := $base)", base=base)
            start, stop, step = (None if part is None else self.expr(part) for part in parts)
            taken = ast.Slice(start, stop, step, lineno=self.line, col_offset=0)
            return self.code("$base[$taken]", base=base, taken=taken)
        arg = node.arg
        if self.settings.fast_getitem and type(arg) is nodes.Const and type(arg.value) is str:
            return self.looked_up(node.node, arg.value, attribute=False, dict_first=True)
        base = self.expr(node.node)
        getitem = self.load("_getitem") if self.settings.fast_getitem else self.dotted("environment", "getitem")
        return self.waited(self.call(getitem, [base, self.expr(arg)]))

    # Filters, tests, calls

    def filter(self, node: nodes.Filter) -> ast.expr:
        """Return the code for ``value|filter``; without a value, for the filter of the captured output of a block."""
        return self.applied(node, self.environment.filters, self.filter_names, "filter")

    def test(self, node: nodes.Test) -> ast.expr:
        """Return the code for ``value is test``."""
        return self.applied(node, self.environment.tests, self.test_names, "test")

    def applied(
        self, node: nodes.Filter | nodes.Test, functions: Mapping[str, Any], locals_: dict[str, str], kind: str
    ) -> ast.expr:
        """Return the call of a filter or test."""
        function = functions.get(node.name)
        if function is None and not self.state.soft:
            self.fail(f"No {kind} named {node.name!r}.", node.lineno)
        args = [self.captured if node.node is None else self.expr(node.node)]
        args[:0] = self.wanted(function)
        keywords = self.signature(node, args)
        return self.waited(self.call(self.load(locals_[node.name]), args, keywords))

    def wanted(self, function: Any) -> list[ast.expr]:
        """Return the arguments that a filter, a test or ``finalize`` gets before the value."""
        wants = None if function is None else _PassArg.from_obj(function)
        if wants is _PassArg.context:
            return [self.code("$_seen($ctx)" if self.settings.fast_context else "$ctx")]
        if wants is _PassArg.eval_context:
            return [self.dotted(self.context, "eval_ctx")]
        return [self.load("environment")] if wants is _PassArg.environment else []

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
        if any(iskeyword(name) for name, _ in named):  # valid in a template, but not in Python text
            keywords = [self.keyword(None, self.dict_of(named))]
        else:
            keywords = [self.keyword(name, value) for name, value in named]
        if node.dyn_args is not None:
            args.append(ast.Starred(self.expr(node.dyn_args), ast.Load(), lineno=self.line, col_offset=0))
        if node.dyn_kwargs is not None:
            keywords.append(self.keyword(None, self.expr(node.dyn_kwargs)))
        return keywords

    def keyword(self, name: str | None, value: ast.expr) -> ast.keyword:
        """Return a keyword argument; ``**value`` if `name` is None."""
        return ast.keyword(name, value, lineno=self.line, col_offset=0)

    def called(self, node: nodes.Call, caller: ast.expr | None = None) -> ast.expr:
        """Return the code for ``f(x)``: a macro whose name is set once is called directly, others by the context."""
        loop = self.analysis.loops.get(id(node))
        if loop is not None and not loop.needs_object:
            items = self.tuple_of([self.expr(arg) for arg in node.args])
            return self.code("$items[($i - 1) % '$count']", items=items, count=len(node.args), **self.counted(loop))
        direct = self.called_directly(node, caller)
        if direct is not None:
            return self.marked_result(direct)
        return self.called_by_context(node, caller)

    def called_by_context(self, node: nodes.Call, caller: ast.expr | None = None) -> ast.expr:
        """Return the call of an object that is known only in the render."""
        in_loop = self.scope.loop and self.state.function.sets_in_loop
        in_block = self.scope.block and bool(self.scope.assigned)
        names = {"_loop_vars": in_loop, "_block_vars": in_block}
        target, context = self.expr(node.node), self.load(self.context)
        extra = [] if caller is None else [("caller", caller)]
        if self.settings.fast_call:
            scopes = [self.load(name) if known else self.constant(None) for name, known in names.items()]
            if not in_loop and not in_block:
                scopes = []
            function = self.runtime("_call_in_scope" if scopes else "_call")
            args = [context, *scopes, target]
        else:
            extra += [(name, self.load(name)) for name, known in names.items() if known]
            sandboxed = self.settings.sandboxed
            function = self.dotted("environment" if sandboxed else self.context, "call")
            args = [context, target] if sandboxed else [target]
        keywords = self.signature(node, args, extra)
        return self.waited(self.call(function, args, keywords))

    def marked_result(self, value: ast.expr) -> ast.expr:
        """Return a macro's text, as markup if escaping is on."""
        return self.call_runtime("Markup", value) if self.eval_ctx.autoescape else value

    def called_directly(self, node: nodes.Call, caller: ast.expr | None) -> ast.expr | None:
        """Return a call of a macro's Python function; None if the macro or its arguments don't allow a direct call."""
        target = node.node
        if type(target) is not nodes.Name or not self.direct_macros or node.dyn_args or node.dyn_kwargs:
            return None
        owner = self.scope.owner(target.name)
        known = self.direct_macros.get((id(owner), target.name))
        if known is None:
            return None
        function, macro, analysed = known
        names = [arg.name for arg in macro.args]
        given: dict[str, nodes.Expr] = {}
        if len(node.args) > len(names) or (caller is not None) != (
            "caller" in analysed.special and "caller" not in names
        ):
            return None
        if analysed.special & {"kwargs", "varargs"} or "caller" in names:
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

    # Nodes that extensions use

    def environment_attribute(self, node: nodes.EnvironmentAttribute) -> ast.expr:
        """Return the code for an attribute of the environment."""
        return self.dotted("environment", node.name)

    def extension_attribute(self, node: nodes.ExtensionAttribute) -> ast.expr:
        """Return the code for an attribute of an extension."""
        return self.code("environment.extensions['$key'].$name", key=node.identifier, name=node.name)

    def imported_name(self, node: nodes.ImportedName) -> ast.expr:
        """Return the code for an object that is imported when the code is loaded."""
        return self.load(self.import_names[node.importname])

    def internal_name(self, node: nodes.InternalName) -> ast.expr:
        """Return the code for a Python local that an extension's parser requested."""
        return self.load(node.name)

    def mark_safe(self, node: nodes.MarkSafe) -> ast.expr:
        """Return the code that makes text markup."""
        return self.call_runtime("Markup", self.expr(node.expr))

    def mark_safe_if_autoescape(self, node: nodes.MarkSafeIfAutoescape) -> ast.expr:
        """Return the code that makes text markup if escaping is on."""
        return self.marked(self.expr(node.expr))

    def context_reference(self, node: nodes.Node) -> ast.expr:  # noqa: ARG002  (the table's signature)
        """Return the code for the context."""
        return self.code("$_seen($ctx)" if self.settings.fast_context else "$ctx")

    def derived(self, node: nodes.Node | None = None) -> ast.expr:  # noqa: ARG002  (the table's signature)
        """Return the code for a copy of the context with the names of the current scope added."""
        return self.call_runtime("_derived", self.load(self.reference), self.locals())

    def locals(self) -> ast.expr:
        """Return the code for a dict of the names that the current scope and the enclosing ones set."""
        return self.dict_of([(name, self.load(local)) for name, local in self.scope.exports().items()])

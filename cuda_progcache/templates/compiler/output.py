# SPDX-License-Identifier: Apache-2.0
"""Code generation for output: its destination, and the fusion of adjacent pieces to one string."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.compiler import has_safe_repr
from jinja2.utils import _PassArg
from markupsafe import escape

from cuda_progcache.templates.compiler.expressions import Expressions
from cuda_progcache.templates.compiler.folding import is_constant, is_plain
from cuda_progcache.templates.compiler.tree import PLAIN, STR

if TYPE_CHECKING:
    from cuda_progcache.templates.compiler.scopes import FunctionState

_LONGEST_RUN = 48
"""The maximum number of parts of an f-string; the interpreter's stack holds all parts until the last is computed."""


class Output(Expressions):
    """The code generator for output.

    `emit` adds statements and `put` adds output. Pending output is written before the next statement.
    """

    def emit(self, text: str, /, **parts: Any) -> None:
        """Add the statements of a pattern."""
        self.flush()
        self.out += self.lines(text, **parts)

    @contextmanager
    def block(self) -> Iterator[list[ast.stmt]]:
        """Collect statements in a list of their own."""
        self.flush()
        outer, self.out = self.out, []
        mark = len(self.state.trail)
        try:
            yield self.out
            self.flush()
        finally:
            self.out = outer
            while len(self.state.trail) > mark:
                self.state.defined.discard(self.state.trail.pop())

    @contextmanager
    def in_function(self, state: FunctionState) -> Iterator[None]:
        """Switch to the state of another Python function, and back to the present one at the end."""
        outer, self.state = self.state, state
        try:
            yield
        finally:
            self.state = outer

    def nested_state(self) -> FunctionState:
        """Return the initial state of a nested function that is part of the present one."""
        return replace(self.state, defined=set(), trail=[])

    def define(self, local: str) -> None:
        """Record that a local has a value from this point to the end of the block."""
        if local not in self.state.defined:
            self.state.defined.add(local)
            self.state.trail.append(local)

    # The destination of text

    @contextmanager
    def buffered(self) -> Iterator[None]:
        """Collect output in a list, a buffer; `contents` returns the code for the result."""
        self.flush()
        outer = self.buffer
        depth = len(self.appends)
        self.buffers += 1
        number = self.buffer = self.buffers
        self.emit("$list = []\n$append = $list.append", list=f"_b{number}", append=f"_a{number}")
        self.appends.append(0)
        try:
            yield
        finally:
            self.buffer = outer
            del self.appends[depth:]

    def return_contents(self, body: list[ast.stmt], start: int) -> None:
        """Emit the return of the buffer's contents from a function; the buffer was opened at `start` in the body.

        If all output is one string, put out at the end, the buffer is removed.
        """
        number = self.buffer
        self.flush()
        count = self.appends.pop()
        if count == 0 and self.settings.text:
            del body[start : start + 2]
            body += self.lines("return ''")
            return
        last = body[-1]
        if count == 1 and self.settings.fuse and isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
            called, value = last.value.func, last.value.args[0]
            one = isinstance(called, ast.Name) and called.id == f"_a{number}"
            if one and (isinstance(value, (ast.JoinedStr, ast.Constant)) or id(value) in self.strings):
                line, self.line = self.line, last.lineno
                (body[-1],) = self.lines("return $value", value=value)
                self.line = line
                del body[start : start + 2]
                return
        body += self.lines("return $text", text=self.contents(number))

    def contents(self, number: int | None) -> ast.expr:
        """Return the code for the joined contents of a buffer."""
        join = "''.join" if self.settings.text else "environment.concat"
        return self.code(f"{join}($list)", list=f"_b{number}")

    def captured_text(self) -> ast.expr:
        """Return the code for the contents of the innermost buffer, as markup if escaping is on."""
        self.flush()
        text = self.contents(self.buffer)
        if self.eval_ctx.volatile:
            again = self.contents(self.buffer)
            return self.code("$Markup($text) if $ctx.eval_ctx.autoescape else $again", text=text, again=again)
        return self.marked_result(text)

    def put(self, value: ast.expr) -> None:
        """Emit the output of a value, without conversion."""
        self.flush()
        self.out.append(self.put_now(value))

    def put_now(self, value: ast.expr) -> ast.stmt:
        """Return the statement that puts out a value."""
        if self.buffer is None:
            return self.statement(ast.Yield(value, lineno=self.line, col_offset=0))
        self.appends[-1] += 1
        return self.statement(self.call_name(f"_a{self.buffer}", value))

    def flush(self) -> None:
        """Emit the pending output: a single constant, or one f-string of all parts."""
        if not self.pending:
            return
        parts, self.pending = self.pending, []
        line = self.line
        self.line = parts[0].lineno
        alone = len(parts) == 1 and isinstance(parts[0], ast.Constant)
        value = parts[0] if alone else self.joined(parts)
        self.out.append(self.put_now(value))
        self.line = line

    def text(self, text: str) -> None:
        """Add constant text to the pending output; adjacent constants are merged."""
        if not text and self.settings.fuse:
            return
        if self.pending and isinstance(self.pending[-1], ast.Constant):
            before: Any = self.pending.pop()
            line, self.line = self.line, before.lineno
            self.pending.append(self.constant(f"{before.value}{text}"))
            self.line = line
        else:
            self.append(self.constant(text))

    def append(self, part: ast.expr) -> None:
        """Add a part to the pending output."""
        if len(self.pending) >= _LONGEST_RUN:
            self.flush()
        self.pending.append(part)

    def value(self, node: ast.expr, conversion: int) -> None:
        """Add a value to the pending output."""
        self.append(self.formatted(node, conversion))

    # Output statements

    def output(self, node: nodes.Output) -> None:
        """Emit text and ``{{ … }}``; in a child template, nothing outside of blocks is put out."""
        if not self.state.guard_output:
            self.children(node)
        elif not self.known_extends:
            self.line = node.lineno or self.line
            with self.block() as body:
                self.children(node)
            self.line = node.lineno or self.line
            self.emit("if parent_template is None: $body", body=body)

    def children(self, node: nodes.Output) -> None:
        """Emit the parts of an output statement."""
        for child in node.nodes:
            self.line = child.lineno or self.line
            known = self.known_text(child)
            if known is not None:
                self.text(known)
            elif self.settings.fuse:
                self.fused(child)
            else:
                self.put(self.piece(child))

    def fused(self, child: nodes.Expr) -> None:
        """Emit a child that the render evaluates, as part of an f-string."""
        if type(child) is nodes.Call and not self.eval_ctx.volatile and self.environment.finalize is None:
            direct = self.called_directly(child, None) if id(child) not in self.analysis.loops else None
            if direct is not None:  # a macro returns safe text
                self.value(direct, PLAIN)
                return
        constant = self.finalized_constant(child)
        if constant is not None:
            self.value(constant, STR)
            return
        value = self.expr(child)
        finalized = self.finalized(value)
        if finalized is value and isinstance(value, ast.Constant) and not self.eval_ctx.volatile:
            self.text(str(escape(value.value) if self.eval_ctx.autoescape else value.value))
            return
        if self.eval_ctx.volatile:
            how = "$_escape if $ctx.eval_ctx.autoescape else str"
            self.value(self.code(f"({how})($value)", value=finalized), STR)
            return
        if finalized is value and isinstance(value, ast.Name) and value.id in self.state.str_aliases:
            finalized = self.load(self.state.str_aliases[value.id])
        if self.eval_ctx.autoescape:
            self.value(self.call_runtime("_escape", finalized), PLAIN)
        else:
            self.value(finalized, STR)

    def finalized(self, value: ast.expr) -> ast.expr:
        """Return `value` passed to the environment's ``finalize``, if there is one."""
        finalize = self.environment.finalize
        if finalize is None:
            return value
        return self.code("environment.finalize($before, $value)", before=self.wanted(finalize), value=value)

    def known_text(self, child: nodes.Expr) -> str | None:
        """Return the text that a constant child puts out; None if the text is known only in the render."""
        kind = type(child)
        if kind is nodes.TemplateData:
            return None if self.eval_ctx.volatile else child.data  # type: ignore[attr-defined]
        static = kind is nodes.Const or (kind is nodes.Name and child.name in self.static)  # type: ignore[attr-defined]
        if self.environment.finalize is not None or not (static or id(child) in self.analysis.constant):
            return None
        try:
            value = self.escaped_constant(child)
            if self.settings.native and not has_safe_repr(value):
                return None
            return str(value)
        except Exception:  # noqa: BLE001  (the render raises the error again, with its location)
            return None

    def escaped_constant(self, child: nodes.Expr) -> Any:
        """Return the value of a constant child, escaped if escaping is on, as Jinja2 does.

        Raises
        ------
        Exception
            Any error of the evaluation; `jinja2.nodes.Impossible` if the child isn't constant.
        """
        value = self.fold(child)
        if not is_plain(value):
            raise nodes.Impossible
        return escape(value) if self.eval_ctx.autoescape and not self.settings.native else value

    def finalized_constant(self, child: nodes.Expr) -> ast.expr | None:
        """Return the code for a constant child if the environment has a ``finalize``, which gets the escaped value."""
        finalize = self.environment.finalize
        if finalize is None or _PassArg.from_obj(finalize) not in {None, _PassArg.environment}:
            return None
        try:
            value = self.escaped_constant(child)
        except Exception:  # noqa: BLE001  (as above)
            return None
        return self.finalized(self.literal(value)) if is_constant(value) else None

    def piece(self, child: nodes.Expr) -> ast.expr:
        """Return the code for one item of output."""
        constant = self.finalized_constant(child)
        if constant is not None:
            return constant if self.settings.native else self.call_name("str", constant)
        value = self.finalized(self.expr(child))
        if self.settings.native:
            return value
        if self.eval_ctx.volatile:
            return self.code("($escape if $ctx.eval_ctx.autoescape else str)($value)", value=value)
        return self.call_runtime("escape", value) if self.eval_ctx.autoescape else self.call_name("str", value)

# SPDX-License-Identifier: Apache-2.0
"""Rendering with marks, from which source maps are made.

Every piece of output in a template's syntax tree gets a mark that identifies its template line; marks consist of
Unicode noncharacters. Marks stay in the text when macros, includes, blocks and captured text are put together. Filters,
tests and functions get text without marks. If a filter keeps the lines of its text (``indent``) or only trims it, the
marks are restored in its result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from cuda_progcache.templates.plain_environment import STRING
from cuda_progcache.templates.source_map import Location, SourceMap

if TYPE_CHECKING:
    import jinja2

# "here": the text that follows comes from location n. "open"/"close": around the output of an expression or an include.
_HERE, _OPEN, _CLOSE, _END = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
_MARK = re.compile(f"([{_HERE}{_OPEN}{_CLOSE}])([0-9]+){_END}")
_MARKS = re.compile(f"[{_HERE}{_OPEN}{_CLOSE}][0-9]+{_END}")


def map_of(
    environment: Any, name: str, plain: str, render: Callable[[Any], str], own: Mapping[str, Any] | None = None
) -> SourceMap:
    """Return the source map of a template.

    Parameters
    ----------
    environment : Environment
        The template's environment.
    name : str
        The template's name in messages.
    plain : str
        The template's text without marks.
    render : callable
        A function that takes an environment whose templates put out marks, and renders the template in it.
    own : mapping, optional
        The template's own globals.
    """
    marked = environment.overlay()
    locations: list[tuple[str, int]] = []
    parse = marked._parse

    def with_marks(source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Marker(name or STRING, locations).visit(parse(source, name, filename))
        return tree

    marked._parse = with_marks
    marked.bytecode_cache = None
    marked.filters, marked.tests = dict(marked.filters), dict(marked.tests)
    marked.globals = {**marked.globals, **(own or {})}
    _keep_marks_from(marked)
    try:
        text = render(marked)
    except Exception as error:  # noqa: BLE001  (the marks broke a computation; the caller gets the reason)
        return SourceMap(plain, reason=f"{name} can't be rendered with marks: {error}")
    return unmark(text, locations, plain, name)


def _keep_marks_from(environment: jinja2.Environment) -> None:
    """Wrap an environment's filters, tests and functions so that they get text without marks."""
    filters: Any = environment.filters
    tests: Any = environment.tests
    filters.update({name: _unmarked(function, back=True) for name, function in filters.items()})
    tests.update({name: _unmarked(function) for name, function in tests.items()})
    functions = {n: f for n, f in environment.globals.items() if callable(f) and not isinstance(f, type)}
    environment.globals.update({name: _unmarked(function) for name, function in functions.items()})


class _Marker(NodeTransformer):
    def __init__(self, template: str, locations: list[tuple[str, int]]) -> None:
        self._template = template
        self._locations = locations

    def _number(self, line: int) -> int:
        self._locations.append((self._template, line))
        return len(self._locations) - 1

    def _data(self, node: nodes.TemplateData) -> nodes.TemplateData:
        lines = node.data.split("\n")
        for index, line in enumerate(lines):
            visible = line.lstrip()
            if visible:  # the mark goes after the indentation: stripping and indenting then work as on the plain text
                blank = line[: len(line) - len(visible)]
                lines[index] = f"{blank}{_HERE}{self._number(node.lineno + index)}{_END}{visible}"
        return nodes.TemplateData("\n".join(lines), lineno=node.lineno)

    def _around(self, line: int) -> tuple[nodes.TemplateData, nodes.TemplateData]:
        number = self._number(line)
        return (
            nodes.TemplateData(f"{_OPEN}{number}{_END}", lineno=line),
            nodes.TemplateData(f"{_CLOSE}{number}{_END}", lineno=line),
        )

    def visit_Output(self, node: nodes.Output) -> nodes.Output:  # noqa: N802  (Jinja2's visitor protocol)
        children: list[nodes.Expr] = []
        for child in node.nodes:
            if isinstance(child, nodes.TemplateData):
                children.append(self._data(child))
            else:
                children += self._placed(child)
        return nodes.Output(children, lineno=node.lineno)

    def _placed(self, node: nodes.Expr) -> list[nodes.Expr]:
        """Return an expression with marks around it, and around each operand of ``~`` and branch of ``if``."""
        # The line of an expression is that of its outermost operator, but its text starts at its first name.
        before, after = self._around(min(n.lineno for n in (node, *node.find_all(nodes.Expr)) if n.lineno))
        if isinstance(node, nodes.Concat):
            parts = [marked for part in node.nodes for marked in self._placed(part)]
            node = nodes.Concat(parts, lineno=node.lineno)
        elif isinstance(node, nodes.CondExpr) and node.expr2 is not None:
            chosen = [nodes.Concat(self._placed(one), lineno=one.lineno) for one in (node.expr1, node.expr2)]
            node = nodes.CondExpr(node.test, *chosen, lineno=node.lineno)
        return [before, node, after]

    def _call(self, node: nodes.Stmt) -> list[nodes.Stmt]:
        self.generic_visit(node)
        before, after = self._around(node.lineno)
        return [nodes.Output([before], lineno=node.lineno), node, nodes.Output([after], lineno=node.lineno)]

    visit_CallBlock = _call  # noqa: N815
    visit_Include = _call  # noqa: N815


def _unmarked(function: Callable[..., Any], *, back: bool = False) -> Callable[..., Any]:
    """Wrap `function` so that it gets text without marks; with `back`, restore the marks in its result if possible."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        plain = [_MARKS.sub("", a) if isinstance(a, str) else a for a in args]
        result = function(*plain, **{k: _MARKS.sub("", v) if isinstance(v, str) else v for k, v in kwargs.items()})
        if back and isinstance(result, str):
            marked = next((a for a in args if isinstance(a, str)), "")
            if _MARKS.search(marked):
                return _with_marks(marked, result)
        return result

    return call


def _with_marks(marked: str, result: str) -> str:
    """Return `result`, a filter's result for the text of `marked`, with the marks of the lines that the filter kept."""
    before = marked.split("\n")
    plain = _MARKS.sub("", marked)
    if plain.strip() == result.strip():  # trimmed or unchanged: leave out the removed lines
        skipped = _leading_lines(plain) - _leading_lines(result)
        trimmed = "".join(_MARKS.findall("\n".join(before[:skipped])))
        before = before[skipped : skipped + result.count("\n") + 1]
        before[0] = trimmed + before[0]
    after = result.split("\n")
    if len(before) != len(after):
        return result
    return "\n".join(_mark_line(old, new) for old, new in zip(before, after, strict=True))


def _leading_lines(text: str) -> int:
    return text[: len(text) - len(text.lstrip())].count("\n")


def _mark_line(marked: str, line: str) -> str:
    """Return `line` with the marks of the line `marked` that a filter made it from.

    If both have the same length without the blanks around them, each mark keeps its offset in the text. Otherwise all
    marks but those at the start go to the end of the line.
    """
    plain = _MARKS.sub("", marked)
    leading, indented = (len(text) - len(text.lstrip()) for text in (plain, line))
    alike = len(plain.strip()) == len(line.strip())
    written: list[str] = []
    at = skipped = 0
    for match in _MARKS.finditer(marked):
        offset = match.start() - skipped - leading
        skipped += len(match[0])
        to = indented if offset <= 0 else min(offset + indented, len(line)) if alike else len(line)
        written += [line[at:to], match[0]]
        at = to
    return "".join(written) + line[at:]


def unmark(text: str, locations: Sequence[tuple[str, int]], plain: str, name: str) -> SourceMap:
    """Return the source map of a marked text; the map is empty if `text` without its marks differs from `plain`.

    A line has the location of its first visible character.

    Parameters
    ----------
    text : str
        The text with marks.
    locations : sequence of (str, int)
        The template and line of mark number n.
    plain : str
        The text that the template renders without marks.
    name : str
        The template's name in the reason of an empty map.
    """
    if _MARKS.sub("", text) != plain:
        return SourceMap(plain, reason=f"{name} computes with its own text, which marks would change")
    lines: list[Location | None] = [None]
    pieces: list[list[tuple[int, Location]]] = [[]]
    column = 0
    # For each open expression: its number, its location, and the location of the text that it is putting out.
    stack: list[tuple[int, Location | None, Location | None]] = [(-1, None, None)]

    def take(piece: str) -> None:
        nonlocal column
        place = stack[-1][2]
        for index, part in enumerate(piece.split("\n")):
            if index:
                lines.append(None)
                pieces.append([])
                column = 0
            if place is not None and part.strip():
                lines[-1] = lines[-1] or place
                pieces[-1].append((column, place))
            column += len(part)

    position = 0
    for match in _MARK.finditer(text):
        take(text[position : match.start()])
        position = match.end()
        kind, number = match[1], int(match[2])
        if kind == _CLOSE:
            if any(number == opened for opened, _, _ in stack):
                while stack.pop()[0] != number:
                    pass
            continue
        opened, caller, _ = stack[-1]
        here = Location(*locations[number], caller)
        if kind == _OPEN:
            stack.append((number, here, here))
        else:
            stack[-1] = (opened, caller, here)
    take(text[position:])
    return SourceMap(plain, tuple(lines), "", tuple(map(tuple, pieces)))

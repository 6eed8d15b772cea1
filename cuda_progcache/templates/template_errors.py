# SPDX-License-Identifier: Apache-2.0
"""Template errors: they name the file and line, show the values involved, and suggest what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes

from cuda_progcache._util.suggest import did_you_mean, nearest
from cuda_progcache.errors import TemplateError
from cuda_progcache.templates.plain_environment import MARK, STRING

if TYPE_CHECKING:
    from cuda_progcache.templates.jinja_environment import JinjaEnvironment

_UNDEFINED = re.compile(r"'([^']+)' is undefined")
_NO_SUCH = re.compile(r"No (filter|test) named '([^']+)'")
_UNKNOWN_TAG = re.compile(r"unknown tag '([^']+)'")
_TAGS = (
    *("block", "call", "extends", "filter", "for", "from", "if", "import", "include", "macro", "raw", "require", "set"),
    *("unroll", "with", "elif", "else", "endblock", "endcall", "endfilter", "endfor", "endif", "endmacro", "endset"),
)


def template_error(
    error: Exception,
    environment: JinjaEnvironment,
    name: str,
    params: Mapping[str, Any],
    *,
    placed: bool = True,
    source: str | None = None,
) -> TemplateError:
    """Convert an error of Jinja2 or of a template's own code to a TemplateError.

    Parameters
    ----------
    error : Exception
        The error with its traceback.
    environment : JinjaEnvironment
        The environment of the template.
    name : str
        The requested template; the error may be in a template that it includes.
    params : mapping
        The parameters of the render, to show their values and to suggest a name.
    placed : bool
        Whether the message starts with the template and line.
    source : str, optional
        The text of a template made from a string.
    """
    if isinstance(error, TemplateError) and error.template:
        return error
    template, line = _place(error, environment, name)
    message = _message(error, environment, params, imported=template != name)
    if placed and line:
        expressions = _expressions(environment, template, source, line)
        line = _line_of_name(error, expressions) or line
        values = _values(error, expressions, line, params)
        message = f"{template}:{line}: {message}{values}"
    elif placed:
        message = f"{template}: {message}"
    return TemplateError(message, template=template, line=line)


def _message(error: Exception, environment: JinjaEnvironment, params: Mapping[str, Any], *, imported: bool) -> str:
    message = str(error) or type(error).__name__
    if isinstance(error, jinja2.TemplateNotFound):
        names = [str(name) for name in error.templates]
        if not names:
            return message
        hint = did_you_mean(names[0], environment.list_templates(), listing="there are")
        where = ", ".join(environment.digest_loader.files.roots) or "an empty search path"
        return f"no template {' or '.join(map(repr, names))} in {where}{hint}"
    if isinstance(error, jinja2.TemplateSyntaxError):
        message = error.message or message
    elif isinstance(error, jinja2.UndefinedError):
        match = _UNDEFINED.search(message)
        if match:
            if match[1] in environment.globals or match[1] in params:
                hint = 'an imported template sees the parameters only if it is imported "with context"'
                return f"{message} here; {hint}" if imported else message
            near = nearest(match[1], {*params, *environment.globals})
            if near:
                return f"{message}; did you mean {near!r}?"
            return message + did_you_mean(match[1], params, listing="parameters")
    elif not isinstance(error, (jinja2.TemplateError, ValueError)):
        message = f"{type(error).__name__}: {message}"
    match = _NO_SUCH.search(message)
    if match:
        known = environment.filters if match[1] == "filter" else environment.tests
        return message.rstrip(".") + did_you_mean(match[2], known)
    match = _UNKNOWN_TAG.search(message)
    if match:
        return message.rstrip(".") + did_you_mean(match[1], _TAGS)
    return message


def _place(error: Exception, environment: JinjaEnvironment, name: str) -> tuple[str, int | None]:
    """Return the template and line of an error: those of a syntax error, or of the innermost template on the stack."""
    names = environment.digest_loader.names
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.name or names.get(error.filename or "", name), error.lineno
    template: str = name
    line: int | None = None
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        if MARK in frame.f_globals:
            template = frame.f_globals[MARK] or STRING
            line = traceback.tb_lineno
        elif _JINJA2_MARK in frame.f_globals:
            template = names.get(frame.f_code.co_filename, STRING)
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return template, line


_JINJA2_MARK = "__jinja_exception__"  # a global of the frames that Jinja2 substitutes for a template's


def _expressions(environment: JinjaEnvironment, name: str, source: str | None, line: int) -> list[nodes.Expr]:
    """Return the outermost expressions of a template whose range of lines includes `line`."""
    try:
        tree = environment.parse(source) if name == STRING and source is not None else environment.tree(name)
    except jinja2.TemplateError:  # the template was edited in the meantime
        return []
    found = []
    for statement in tree.find_all(nodes.Stmt):
        for child in statement.iter_child_nodes():
            if isinstance(child, nodes.Expr) and not isinstance(child, nodes.TemplateData):
                lines = [child.lineno, *(n.lineno for n in child.find_all(nodes.Expr))]
                if not isinstance(statement, nodes.Output):  # errors may have the first line of the tag
                    lines.append(statement.lineno)
                if min(lines) <= line <= max(lines):
                    found.append(child)
    return found


def _names(expression: nodes.Expr) -> list[nodes.Name]:
    found = expression.find_all(nodes.Name)
    return [n for n in (expression, *found) if isinstance(n, nodes.Name) and n.ctx == "load"]


def _line_of_name(error: Exception, expressions: list[nodes.Expr]) -> int | None:
    """Return the line on which one of the expressions reads the name that an error reports as undefined."""
    match = _UNDEFINED.fullmatch(str(error)) if isinstance(error, jinja2.UndefinedError) else None
    named = [n.lineno for expression in expressions for n in _names(expression) if match and n.name == match[1]]
    return named[0] if named else None


def _values(error: Exception, expressions: list[nodes.Expr], line: int, params: Mapping[str, Any]) -> str:
    """Return the parameters that the line uses, with values, as text; empty if the error isn't about values."""
    told = (jinja2.TemplateSyntaxError, jinja2.UndefinedError, jinja2.TemplateNotFound)
    if isinstance(error, told):
        return ""
    used = {n.name for expression in expressions for n in _names(expression) if n.lineno == line}
    shown = [f"{name} = {params[name]!r}" for name in sorted(used) if name in params]
    return f" ({', '.join(shown)})" if shown else ""

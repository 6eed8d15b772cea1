# SPDX-License-Identifier: Apache-2.0
"""What compiled kernel templates run on: Jinja2's names and behaviour without Jinja2.

The counterpart of `cuda_progcache.templates.jinja_runtime` for one kind of environment: text that is never escaped,
strict undefined values, neither async nor sandboxed. Importing it takes a millisecond, Jinja2 fifty. Whatever a kernel
rarely needs takes Jinja2's own.
"""

from __future__ import annotations

from cuda_progcache.templates import runtime
from cuda_progcache.templates.builtins import Undefined
from cuda_progcache.templates.plain_objects import (
    BlockReference,
    LoopContext,
    Macro,
    Namespace,
    TemplateReference,
    above,
)
from cuda_progcache.templates.runtime import (
    STOPPED,
    Block,
    Source,
    attribute_getter,
    missing,
)

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from types import CodeType
    from typing import Any


class EvalContext:
    """How output is treated in a template: it is text, and stays so."""

    autoescape = False
    volatile = False

    def __init__(self, environment: Any) -> None:
        self.environment = environment


class Context:
    """The variables of a render; what Jinja2's ``pass_context`` functions get.

    Attributes
    ----------
    parent : dict
        What the template was given, globals among it.
    vars : dict
        What it has set.
    exported_vars : set of str
        Which of those importers see.
    escaped : bool
        Whether code that isn't a template's has seen the context.
    """

    __slots__ = ("_own", "blocks", "environment", "escaped", "eval_ctx", "exported_vars", "name", "parent", "vars")

    def __init__(self, environment: Any, parent: dict[str, Any], name: str | None, blocks: dict[str, Any]) -> None:
        self.environment = environment
        self.parent = parent
        self.vars: dict[str, Any] = {}
        self.exported_vars: set[str] = set()
        self.name = name
        self.blocks = {key: [block] for key, block in blocks.items()} if blocks else {}
        self.eval_ctx = environment.eval_ctx
        self.escaped = False

    def resolve_or_missing(self, key: str) -> Any:
        """Return a variable, or ``missing``."""
        if key in self.vars:
            return self.vars[key]
        return self.parent.get(key, missing)

    def resolve(self, key: str) -> Any:
        """Return a variable, or an undefined value."""
        found = self.resolve_or_missing(key)
        return self.environment.undefined(name=key) if found is missing else found

    def get_all(self) -> dict[str, Any]:
        """Return all variables in one dict, which isn't to be changed."""
        if not self.vars:
            return self.parent
        return {**self.parent, **self.vars} if self.parent else self.vars

    def get_exported(self) -> dict[str, Any]:
        """Return the variables that importers see."""
        return {key: self.vars[key] for key in self.exported_vars}

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function as a template does: with context, eval context or environment, if it asks for one."""
        self.escaped = True
        in_loop, in_block = kwargs.pop("_loop_vars", None), kwargs.pop("_block_vars", None)
        wants = getattr(function, "jinja_pass_arg", None) or getattr(type(function).__call__, "jinja_pass_arg", None)
        if wants is not None:
            seen = self
            if wants.name == "context" and (in_loop or in_block):
                seen = seen.derived({**(in_loop or {}), **(in_block or {})})
            args = ({"context": seen, "eval_context": seen.eval_ctx}.get(wants.name, seen.environment), *args)
        try:
            return function(*args, **kwargs)
        except StopIteration:
            return self.environment.undefined(STOPPED)

    def derived(self, locals: Mapping[str, Any] | None = None) -> Context:  # noqa: A002  (Jinja2's name for it)
        """Return a context that has `locals`, too."""
        made = Context(self.environment, _with(self.get_all(), locals), self.name, {})
        made.escaped = self.escaped
        made.blocks = {name: list(stack) for name, stack in self.blocks.items()}
        return made

    def super(self, name: str, current: Any) -> Any:
        """Return the block above `current`."""
        stack = self.blocks.get(name, [])
        return above(name, self, stack[stack.index(current) :] if current in stack else [])

    def __contains__(self, name: str) -> bool:
        return name in self.vars or name in self.parent

    def __getitem__(self, key: str) -> Any:
        found = self.resolve_or_missing(key)
        if found is missing:
            raise KeyError(key)
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """Return a variable, or `default`."""
        found = self.resolve_or_missing(key)
        return default if found is missing else found

    def keys(self) -> Iterable[str]:
        """Return the names of all variables."""
        return self.get_all().keys()

    def values(self) -> Iterable[Any]:
        """Return the values of all variables."""
        return self.get_all().values()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Return names and values of all variables."""
        return self.get_all().items()

    def __repr__(self) -> str:
        return f"<Context {self.get_all()!r} of {self.name!r}>"


def _with(names: dict[str, Any], more: Mapping[str, Any] | None) -> dict[str, Any]:
    given = {key: value for key, value in more.items() if value is not missing} if more else None
    return {**names, **given} if given else names


class TemplateNotFound(LookupError):  # noqa: N818  (what compiled code calls it)
    """No template has that name.

    Attributes
    ----------
    names : tuple of str
        What was looked for.
    """

    def __init__(self, *names: str) -> None:
        super().__init__(", ".join(names))
        self.names = names


class TemplateRuntimeError(Exception):
    """A template does what templates can't."""


def call(context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call what a template calls: like ``Context.call``, quick about plain functions."""
    if function is range and not kwargs:
        return range(*args)
    kind = type(function)
    if kind in _PLAIN_CALLABLES:
        if hasattr(function, "jinja_pass_arg"):
            return context.call(function, *args, **kwargs)
    elif not (kind is type and function in _PLAIN_CLASSES):
        return context.call(function, *args, **kwargs)
    try:
        return function(*args, **kwargs)
    except StopIteration:
        return context.environment.undefined(STOPPED)


_PLAIN_CALLABLES = frozenset({type(call), type(len), type(Context.super.__get__(0, int)), Macro, BlockReference})
_PLAIN_CLASSES = frozenset({range, dict, list, int, str, float, bool, tuple, Namespace})


def absent(kind: str, name: str) -> Callable[..., Any]:
    """Return what stands for a filter or test that the environment doesn't have: it raises when it is used."""

    def fail(*_args: Any, **_kwargs: Any) -> Any:
        raise TemplateRuntimeError(f"No {kind} named {name!r} found.")

    return fail


def include(template: Template, context: Context, locals_: Mapping[str, Any]) -> Source:
    """Return the text source of ``{% include %}``."""
    return Source(template, template.context(_with(context.get_all(), locals_)))


class Alone:
    """``{% include %}`` without context: the template's default module."""

    __slots__ = ("_template",)

    def __init__(self, template: Template) -> None:
        self._template = template

    def render(self) -> str:
        """Give the text."""
        return str(self._template._get_default_module())


def _markup(text: str) -> str:
    from markupsafe import Markup

    return Markup(text)  # noqa: S704  (what a template declares to be markup)


NAMES: dict[str, Any] = runtime.NAMES | {
    "LoopContext": LoopContext,
    "Macro": Macro,
    "Markup": _markup,
    "Namespace": Namespace,
    "TemplateNotFound": TemplateNotFound,
    "TemplateReference": TemplateReference,
    "TemplateRuntimeError": TemplateRuntimeError,
    "Undefined": Undefined,
    "_absent": absent,
    "_call": call,
    "_include": include,
    "_include_alone": Alone,
    "missing": missing,
}
"""The globals of compiled code."""


class Template:
    """A template whose code has been loaded.

    Parameters
    ----------
    environment : PlainEnvironment
    code : types.CodeType
        As the compiler made it.
    name : str or None
    precomputed : iterable, optional
        The values that the code expects as ``_pc_0``, ``_pc_1``, ....

    Attributes
    ----------
    blocks : dict of str to Block
    references : tuple of str
        The templates that it includes, imports or extends by a constant name.
    """

    __slots__ = ("_module", "_render", "blocks", "environment", "name", "references")

    def __init__(self, environment: Any, code: CodeType, name: str | None, precomputed: Iterable[Any] = ()) -> None:
        names = {**environment.names, MARK: name}
        for number, value in enumerate(precomputed):
            names[f"_pc_{number}"] = value
        exec(code, names)  # noqa: S102  (what this package's compiler made of a template)
        self.environment = environment
        self.name = name
        self._render: Callable[[Context, Any], str] = names["render"]
        self.blocks = {key: Block(key, function, _no_form) for key, function in names["blocks"].items()}
        names["_own"] = self.blocks
        self._module: Module | None = None
        self.references: tuple[str, ...] = (facts(code) or ((), True))[0]

    def context(self, names: dict[str, Any]) -> Context:
        """Return a context for these variables, which the globals must be among."""
        return Context(self.environment, names, self.name, self.blocks)

    def render(self, params: Mapping[str, Any]) -> str:
        """Return the text for `params`."""
        return self._render(self.context({**self.environment.globals, **params}), None)

    def make_module(
        self,
        vars: dict[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
        shared: bool = False,  # noqa: FBT001, FBT002  (compiled code passes it so)
        locals: Mapping[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
    ) -> Module:
        """Return what ``{% import %}`` binds: what the template exports, and its text."""
        names = dict(vars or {}) if shared else {**self.environment.globals, **(vars or {})}
        return Module(self, self.context(_with(names, locals)))

    def _get_default_module(self, ctx: Context | None = None) -> Module:  # noqa: ARG002  (one environment, one set of globals)
        if self._module is None:
            self._module = self.make_module()
        return self._module


_FACTS = "cuda_progcache"


def with_facts(code: CodeType, references: tuple[str, ...], *, plain: bool) -> CodeType:
    """Return a template's code with what has to be known of it without its source; `facts` reads it.

    It is the last of the code's constants, so that it lies in the cache with it.

    Parameters
    ----------
    code : types.CodeType
    references : tuple of str
        The templates that it names.
    plain : bool
        Whether this module is all that it needs.
    """
    return code.replace(co_consts=(*code.co_consts, (_FACTS, references, plain)))


def facts(code: CodeType) -> tuple[tuple[str, ...], bool] | None:
    """Return references and plainness of a template's code; None if it has none of that."""
    last = code.co_consts[-1] if code.co_consts else None
    return last[1:] if isinstance(last, tuple) and len(last) == 3 and last[0] == _FACTS else None


def _no_form(form: str) -> Any:
    raise TemplateRuntimeError(f"kernel templates are rendered at once, not in the form {form!r}")


MARK = "__progcache_template__"
"""The name, in the globals of a template's functions, that says which template they are of."""


class Module:
    """An imported template: its exported names are the attributes, its text is the string."""

    def __init__(self, template: Template, context: Context) -> None:
        text = template._render(context, None)
        vars(self).update(context.get_exported(), __name__=template.name, _text=text)

    def __str__(self) -> str:
        return str(vars(self)["_text"])

    def __repr__(self) -> str:
        return f"<Module {vars(self)['__name__']!r}>"


def names_for(environment: Any) -> dict[str, Any]:
    """Return the globals of the code of an environment's templates."""
    return {
        **NAMES,
        "__name__": "cuda_progcache.template",
        "environment": environment,
        "_getattr": attribute_getter(environment),
        "_getitem": environment.getitem,
    }

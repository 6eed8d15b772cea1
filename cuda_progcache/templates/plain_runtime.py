# SPDX-License-Identifier: Apache-2.0
"""What compiled kernel templates run on: Jinja2's names and behaviour without Jinja2.

The counterpart of `cuda_progcache.templates.jinja_runtime` for one kind of environment: text that is never escaped,
strict undefined values, neither async nor sandboxed. Importing it takes a millisecond, Jinja2 fifty. Whatever a kernel
rarely needs takes Jinja2's own.
"""

from __future__ import annotations

from cuda_progcache.templates.builtins import Undefined
from cuda_progcache.templates.runtime import (
    EMPTY,
    FIXED,
    SIZED,
    STOPPED,
    Ahead,
    Block,
    Source,
    attribute_getter,
    extend,
    foreign,
    missing,
    not_exported,
    texts,
)

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
        return _above(name, self, stack[stack.index(current) :] if current in stack else [])

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


class BlockReference:
    """``super``, or a block of ``self``: called, it gives the block's text."""

    __slots__ = ("_context", "_stack", "name")

    def __init__(self, name: str, context: Context, stack: Sequence[Any]) -> None:
        self.name = name
        self._context = context
        self._stack = stack

    @property
    def super(self) -> Any:
        """The block above."""
        return _above(self.name, self._context, self._stack)

    def __call__(self) -> Any:
        """Return the text."""
        return self._stack[0].render(self._context, self._context.blocks)


def _above(name: str, context: Context, stack: Sequence[Any]) -> Any:
    if len(stack) < 2:
        return context.environment.undefined(f"there is no parent block called {name!r}.", name="super")
    return BlockReference(name, context, stack[1:])


class TemplateReference:
    """``self`` in a template: its blocks by name."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __getitem__(self, name: str) -> BlockReference:
        return BlockReference(name, self._context, self._context.blocks[name])

    def __repr__(self) -> str:
        return f"<TemplateReference {self._context.name!r}>"


class Macro:
    """A macro as templates see it.

    Attributes
    ----------
    name : str or None
    arguments : tuple of str
    catch_kwargs, catch_varargs, caller, explicit_caller : bool
        Whether it takes any keyword or positional argument, or a ``caller``, and whether that is among `arguments`.
    """

    def __init__(
        self,
        environment: Any,
        func: Callable[..., Any],
        name: str | None,
        arguments: tuple[str, ...],
        catch_kwargs: bool,  # noqa: FBT001  (compiled code passes it so)
        catch_varargs: bool,  # noqa: FBT001
        caller: bool,  # noqa: FBT001
        default_autoescape: bool | None = None,  # noqa: ARG002, FBT001  (Jinja2's macros have it)
    ) -> None:
        self._environment = environment
        self._func = func
        self.name = name
        self.arguments = arguments
        self.catch_kwargs = catch_kwargs
        self.catch_varargs = catch_varargs
        self.caller = caller
        self.explicit_caller = "caller" in arguments

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the macro's text for these arguments."""
        names = self.arguments
        given = list(args[: len(names)])
        has_caller = self.explicit_caller
        if len(given) < len(names):
            has_caller = "caller" in names[len(given) :]
            given += [kwargs.pop(name, missing) for name in names[len(given) :]]
        if self.caller and not has_caller:
            caller = kwargs.pop("caller", None)
            given.append(self._environment.undefined("No caller defined", name="caller") if caller is None else caller)
        if self.catch_kwargs:
            given.append(kwargs)
        elif kwargs:
            if "caller" in kwargs:
                raise TypeError(
                    f"macro {self.name!r} was invoked with two values for the special caller argument. "
                    "This is most likely a bug."
                )
            raise TypeError(f"macro {self.name!r} takes no keyword argument {next(iter(kwargs))!r}")
        if self.catch_varargs:
            given.append(args[len(names) :])
        elif len(args) > len(names):
            raise TypeError(f"macro {self.name!r} takes not more than {len(names)} argument(s)")
        return self._func(*given)

    def __repr__(self) -> str:
        return f"<Macro {'anonymous' if self.name is None else repr(self.name)}>"


class LoopContext:
    """``loop`` in a template, where it is passed on as an object.

    Parameters
    ----------
    iterable : iterable
    undefined : type
        Of what isn't there: before the first item, after the last.
    recurse : callable, optional
        What ``loop(items)`` calls, in a recursive loop.
    depth0 : int
        How many recursions are around.
    """

    def __init__(
        self,
        iterable: Iterable[Any],
        undefined: type,
        recurse: Callable[..., Any] | None = None,
        depth0: int = 0,
    ) -> None:
        self._items = Ahead(iterable)
        self._undefined = undefined
        self._recurse = recurse
        self.depth0 = depth0
        self.index0 = -1
        self._before: Any = missing
        self._current: Any = missing
        self._last_changed: Any = missing

    @property
    def length(self) -> int:
        """The number of items."""
        return self._items.length

    def __len__(self) -> int:
        return self.length

    @property
    def depth(self) -> int:
        """1 for the outermost of recursive loops."""
        return self.depth0 + 1

    @property
    def index(self) -> int:
        """The present item's number, from 1."""
        return self.index0 + 1

    @property
    def revindex0(self) -> int:
        """The number of items that follow."""
        return self.length - self.index

    @property
    def revindex(self) -> int:
        """`revindex0` and the present one."""
        return self.length - self.index0

    @property
    def first(self) -> bool:
        """Whether this is the first item."""
        return self.index0 == 0

    @property
    def last(self) -> bool:
        """Whether this is the last item."""
        return self._items.last

    @property
    def previtem(self) -> Any:
        """The item before."""
        return self._undefined("there is no previous item") if self.first else self._before

    @property
    def nextitem(self) -> Any:
        """The item after."""
        return self._undefined("there is no next item") if self._items.last else self._items._after

    def cycle(self, *args: Any) -> Any:
        """Return the arguments in turn."""
        if not args:
            raise TypeError("no items for cycling given")
        return args[self.index0 % len(args)]

    def changed(self, *value: Any) -> bool:
        """Whether this isn't what it was called with in the iteration before."""
        same = self._last_changed == value
        self._last_changed = value
        return not same

    def __iter__(self) -> Iterator[tuple[Any, LoopContext]]:
        return self

    def __next__(self) -> tuple[Any, LoopContext]:
        item = next(self._items)
        self.index0 += 1
        self._before, self._current = self._current, item
        return item, self

    def __call__(self, iterable: Iterable[Any]) -> Any:
        """Return the loop's text for other items, in a recursive loop."""
        if self._recurse is None:
            raise TypeError("The loop must have the 'recursive' marker to be called recursively.")
        return self._recurse(iterable, self._recurse, depth=self.depth)

    def __repr__(self) -> str:
        return f"<LoopContext {self.index}/{self.length}>"


class Namespace:
    """An object whose attributes templates may set, across scopes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # any name may be a keyword
        vars(args[0]).update(dict(*args[1:], **kwargs))

    def __setitem__(self, name: str, value: Any) -> None:
        vars(self)[name] = value

    def __repr__(self) -> str:
        return f"<Namespace {vars(self)!r}>"


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


NAMES: dict[str, Any] = {
    "LoopContext": LoopContext,
    "Macro": Macro,
    "Markup": _markup,
    "Namespace": Namespace,
    "TemplateNotFound": TemplateNotFound,
    "TemplateReference": TemplateReference,
    "TemplateRuntimeError": TemplateRuntimeError,
    "Undefined": Undefined,
    "_absent": absent,
    "_ahead": Ahead,
    "_call": call,
    "_empty": EMPTY,
    "_extend": extend,
    "_fixed": FIXED,
    "_foreign": foreign,
    "_include": include,
    "_include_alone": Alone,
    "_not_exported": not_exported,
    "_parent": Source,
    "_sized": SIZED,
    "_texts": texts,
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

# SPDX-License-Identifier: Apache-2.0
"""The context of a render, and the objects that represent blocks, ``self`` and imported templates.

`Environment` and `KernelEnvironment` use the same classes. The module doesn't import Jinja2; once Jinja2 is loaded, an
instance passes for one of Jinja2's class of the same name, in ``isinstance`` and wherever else users can see it.
"""

from __future__ import annotations

import sys
from _collections_abc import Mapping as _Mapping  # loaded by every Python; collections.abc is another module

from cuda_progcache.templates.undefined import missing, passes_for, public_missing

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
    from typing import Any

_FUNCTION = type(passes_for)
STOPPED = "value was undefined because a callable raised a StopIteration exception"


class EvalContext:
    """The output settings of a template: whether output is escaped, and whether that may change during the render."""

    __class__ = passes_for("jinja2.nodes")

    def __init__(self, environment: Any, template_name: str | None = None) -> None:
        autoescape = environment.autoescape
        self.environment = environment
        self.autoescape = autoescape(template_name) if callable(autoescape) else autoescape
        self.volatile = False

    def save(self) -> dict[str, Any]:
        """Return the current state, for `revert`."""
        return self.__dict__.copy()

    def revert(self, old: Mapping[str, Any]) -> None:
        """Restore a state that `save` returned."""
        self.__dict__.clear()
        self.__dict__.update(old)


class Context:
    """The variables of a render; ``pass_context`` functions receive it.

    The rarely needed attributes ``blocks``, ``eval_ctx`` and ``globals_keys`` are created on first access.

    Attributes
    ----------
    parent : dict
        The variables that the template was given, including globals.
    vars : dict
        The variables that the template has set.
    exported_vars : set of str
        The names in `vars` that importing templates see.
    seen : bool
        Whether the context was passed to code outside of templates, which may have changed it.
    """

    __class__ = passes_for("jinja2.runtime", "Context")
    blocks: dict[str, list[Any]]
    eval_ctx: Any
    seen = False

    def __init__(
        self,
        environment: Any,
        parent: dict[str, Any],
        name: str | None,
        blocks: dict[str, Any],
        globals: MutableMapping[str, Any] | None = None,  # noqa: A002  (Jinja2's name for it)
    ) -> None:
        self.parent = parent
        self.vars: dict[str, Any] = {}
        self.environment = environment
        self.exported_vars: set[str] = set()
        self.name = name
        self._template_blocks = blocks
        self._globals = globals

    def __getattr__(self, name: str) -> Any:
        if name == "eval_ctx":
            value: Any = EvalContext(self.environment, self.name)
        elif name == "blocks":
            value = {key: [block] for key, block in self._template_blocks.items()}
        elif name == "globals_keys":
            value = set() if self._globals is None else set(self._globals)
        else:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        setattr(self, name, value)
        return value

    def resolve_or_missing(self, key: str) -> Any:
        """Return a variable, or ``missing``."""
        if key in self.vars:
            return self.vars[key]
        return self.parent[key] if key in self.parent else public_missing()

    def resolve(self, key: str) -> Any:
        """Return a variable, or an undefined value."""
        found = self.resolve_or_missing(key)
        return self.environment.undefined(name=key) if found is public_missing() else found

    def get_all(self) -> dict[str, Any]:
        """Return all variables in one dict; callers must not change the dict."""
        if not self.vars:
            return self.parent
        return {**self.parent, **self.vars} if self.parent else self.vars

    def get_exported(self) -> dict[str, Any]:
        """Return the variables that importing templates see."""
        return {key: self.vars[key] for key in self.exported_vars}

    def call(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call a function as a template does; pass it the context, eval context or environment if it is marked so."""
        self.seen = True
        scopes = (kwargs.pop("_loop_vars", None), kwargs.pop("_block_vars", None)) if kwargs else ()
        marked = getattr(function, "jinja_pass_arg", None)
        if type(function) is not _FUNCTION:  # an object: the mark may be on its class's __call__
            marked = getattr(getattr(type(function), "__call__", None), "jinja_pass_arg", marked)  # noqa: B004
        wants = getattr(marked, "name", None)
        if wants == "context":
            seen = self
            for names in scopes:
                seen = seen.derived(names) if names else seen
            args = (seen, *args)
        elif wants == "eval_context":
            args = (self.eval_ctx, *args)
        elif wants == "environment":
            args = (self.environment, *args)
        try:
            return function(*args, **kwargs)
        except StopIteration:
            return self.environment.undefined(STOPPED)

    def derived(self, locals: Mapping[str, Any] | None = None) -> Context:  # noqa: A002  (Jinja2's name for it)
        """Return a copy of the context with `locals` added."""
        made = type(self)(self.environment, with_names(self.get_all(), locals), self.name, {})
        made.eval_ctx = self.eval_ctx
        made.seen = self.seen
        made.blocks = {name: list(stack) for name, stack in self.blocks.items()}
        return made

    def super(self, name: str, current: Any) -> Any:
        """Return the parent block of `current`."""
        stack = self.blocks.get(name, ())
        if current not in stack:
            return _no_parent_block(self, name)
        return BlockReference(name, self, stack, stack.index(current)).super

    def __contains__(self, name: object) -> bool:
        return name in self.vars or name in self.parent

    def __getitem__(self, key: str) -> Any:
        found = self.resolve_or_missing(key)
        if found is public_missing():
            raise KeyError(key)
        return found

    def get(self, key: str, default: Any = None) -> Any:
        """Return a variable, or `default`."""
        try:
            return self[key]
        except KeyError:
            return default

    def keys(self) -> Iterable[str]:
        """Return the names of all variables."""
        return self.get_all().keys()

    def values(self) -> Iterable[Any]:
        """Return the values of all variables."""
        return self.get_all().values()

    def items(self) -> Iterable[tuple[str, Any]]:
        """Return the names and values of all variables."""
        return self.get_all().items()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.get_all()!r} of {self.name!r}>"


_Mapping.register(Context)


def with_names(names: dict[str, Any], more: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `names` updated with the names in `more` that have a value."""
    if not more:
        return names
    absent = public_missing()
    given = {key: value for key, value in more.items() if value is not missing and value is not absent}
    return {**names, **given} if given else names


def as_markup(environment: Any, text: Any) -> Any:
    """Return a template's own output as markup; an awaitable of the markup in an async environment."""
    from markupsafe import Markup

    if not environment.is_async:
        return Markup(text)  # noqa: S704  (a template's own output)

    async def wait(text: Awaitable[str]) -> str:
        return Markup(await text)  # noqa: S704  (as above)

    return wait(text)


# Blocks


def _no_parent_block(context: Any, name: str) -> Any:
    return context.environment.undefined(f"there is no parent block called {name!r}.", name="super")


class BlockReference:
    """``super`` or a block of ``self`` in a template; calling it renders the block."""

    __class__ = passes_for("jinja2.runtime", "BlockReference")

    def __init__(self, name: str, context: Any, stack: Sequence[Any], depth: int) -> None:
        self.name = name
        self._context = context
        self._stack = stack
        self._depth = depth

    @property
    def super(self) -> Any:
        """The parent block."""
        if self._depth + 1 >= len(self._stack):
            return _no_parent_block(self._context, self.name)
        return BlockReference(self.name, self._context, self._stack, self._depth + 1)

    def __call__(self) -> Any:
        """Return the block's text; an awaitable of the text in an async environment."""
        context = self._context
        text = self._stack[self._depth].render(context, context.blocks)
        return as_markup(context.environment, text) if context.eval_ctx.autoescape else text


class TemplateReference:
    """``self`` in a template: a mapping of the template's blocks by name."""

    __class__ = passes_for("jinja2.runtime", "TemplateReference")

    def __init__(self, context: Any) -> None:
        self.__context = context

    def __getitem__(self, name: str) -> BlockReference:
        return BlockReference(name, self.__context, self.__context.blocks[name], 0)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.__context.name!r}>"


class TemplateModule:
    """An imported template: the exported names are attributes, and `str` returns the text."""

    __class__ = passes_for("jinja2.environment", "TemplateModule")

    def __init__(self, template: Any, context: Any, body: Sequence[str]) -> None:
        self._body_stream = body
        vars(self).update(context.get_exported(), __name__=template.name)

    def __str__(self) -> str:
        return "".join(self._body_stream)

    def __html__(self) -> str:
        from markupsafe import Markup

        return Markup(str(self))  # noqa: S704  (a template's own output)

    def __repr__(self) -> str:
        name = vars(self)["__name__"]
        return f"<TemplateModule {f'memory:{id(self):x}' if name is None else repr(name)}>"


def is_eval_context(value: object) -> bool:
    """Whether a value is an eval context, ours or Jinja2's."""
    kind = type(value)
    return kind is EvalContext or kind is getattr(sys.modules.get("jinja2.nodes"), "EvalContext", EvalContext)

# SPDX-License-Identifier: Apache-2.0
"""The objects that kernel templates handle, without Jinja2: macros, loops, namespaces, references to blocks."""

from __future__ import annotations

from cuda_progcache.templates.runtime import Ahead, missing

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any


class BlockReference:
    """``super``, or a block of ``self``: called, it gives the block's text."""

    __slots__ = ("_context", "_stack", "name")

    def __init__(self, name: str, context: Any, stack: Sequence[Any]) -> None:
        self.name = name
        self._context = context
        self._stack = stack

    @property
    def super(self) -> Any:
        """The block above."""
        return above(self.name, self._context, self._stack)

    def __call__(self) -> Any:
        """Return the text."""
        return self._stack[0].render(self._context, self._context.blocks)


def above(name: str, context: Any, stack: Sequence[Any]) -> Any:
    """Return the block that stands second in a stack; an undefined value if there is none."""
    if len(stack) < 2:
        return context.environment.undefined(f"there is no parent block called {name!r}.", name="super")
    return BlockReference(name, context, stack[1:])


class TemplateReference:
    """``self`` in a template: its blocks by name."""

    def __init__(self, context: Any) -> None:
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

# SPDX-License-Identifier: Apache-2.0
"""The objects that templates create: macros, loops and namespaces.

The same classes are used with and without Jinja2. As in :mod:`cuda_progcache.templates.context`, an instance passes for
one of Jinja2's class once Jinja2 is loaded.
"""

from __future__ import annotations

from cuda_progcache.templates.context import EvalContext, as_markup, is_eval_context
from cuda_progcache.templates.undefined import missing, passes_for

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any


class Macro:
    """A macro as templates see it.

    Attributes
    ----------
    name : str or None
    arguments : tuple of str
    catch_kwargs, catch_varargs : bool
        Whether the macro accepts further keyword and positional arguments.
    caller, explicit_caller : bool
        Whether the macro reads ``caller``, and whether ``caller`` is in `arguments`.
    """

    __class__ = passes_for("jinja2.runtime", "Macro")

    def __init__(
        self,
        environment: Any,
        func: Callable[..., Any],
        name: str | None,
        arguments: tuple[str, ...],
        catch_kwargs: bool,  # noqa: FBT001  (compiled code passes it so)
        catch_varargs: bool,  # noqa: FBT001
        caller: bool,  # noqa: FBT001
        default_autoescape: bool | None = None,  # noqa: FBT001
    ) -> None:
        self._environment = environment
        self._func = func
        self._argument_count = len(arguments)
        self.name = name
        self.arguments = arguments
        self.catch_kwargs = catch_kwargs
        self.catch_varargs = catch_varargs
        self.caller = caller
        self.explicit_caller = "caller" in arguments
        if default_autoescape is None:
            default_autoescape = EvalContext(environment).autoescape
        self._default_autoescape = default_autoescape

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the macro's text for the arguments; Jinja2 passes an eval context before them."""
        if args and is_eval_context(args[0]):
            return self.called(args[1:], kwargs, args[0].autoescape)
        return self.called(args, kwargs, self._default_autoescape)

    def called(self, args: Sequence[Any], kwargs: dict[str, Any], autoescape: Any) -> Any:
        """Return the macro's text for `args` and `kwargs`; as markup if `autoescape` is true."""
        names = self.arguments
        count = self._argument_count
        given = list(args[:count])
        has_caller = self.explicit_caller
        if len(given) < count:
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
            given.append(args[count:])
        elif len(args) > count:
            raise TypeError(f"macro {self.name!r} takes not more than {count} argument(s)")
        return self._invoke(given, autoescape)

    def _invoke(self, arguments: Sequence[Any], autoescape: Any) -> Any:
        text = self._func(*arguments)
        return as_markup(self._environment, text) if autoescape else text

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {'anonymous' if self.name is None else repr(self.name)}>"


# Loops


class LookAhead:
    """An iterator that can tell whether the current item is the last; it fetches the next item only when asked.

    The length of a generator is found by taking all its items.

    Attributes
    ----------
    index : int
        The number of the current item, from 1.
    """

    def __init__(self, items: Iterable[Any]) -> None:
        self._items = items
        self._iterator = iter(items)
        self._after: Any = missing
        self._length: int | None = None
        self.index = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._after is missing:
            item = next(self._iterator)
        else:
            item, self._after = self._after, missing
        self.index += 1
        return item

    def _look(self) -> Any:
        """Return the item after the current one, or ``missing``."""
        if self._after is missing:
            self._after = next(self._iterator, missing)
        return self._after

    @property
    def last(self) -> bool:
        """Whether there is no item after the current one."""
        return self._look() is missing

    @property
    def length(self) -> int:
        """The number of items."""
        if self._length is None:
            try:
                self._length = len(self._items)  # type: ignore[arg-type]
            except TypeError:
                rest = list(self._iterator)
                self._iterator = iter(rest)
                self._length = len(rest) + self.index + (self._after is not missing)
        return self._length


class LoopContext(LookAhead):
    """``loop`` in a template that uses it as an object.

    Parameters
    ----------
    iterable : iterable
    undefined : type
        The type of the undefined value before the first and after the last item.
    recurse : callable, optional
        The function that ``loop(items)`` calls in a recursive loop.
    depth0 : int
        The depth of the recursion, from 0.
    """

    __class__ = passes_for("jinja2.runtime", "LoopContext")

    def __init__(
        self,
        iterable: Iterable[Any],
        undefined: type,
        recurse: Callable[..., Any] | None = None,
        depth0: int = 0,
    ) -> None:
        super().__init__(iterable)
        self._undefined = undefined
        self._recurse = recurse
        self.depth0 = depth0
        self._before: Any = missing
        self._current: Any = missing
        self._last_changed: Any = missing

    def __len__(self) -> int:
        return self.length

    @property
    def depth(self) -> int:
        """The depth of the recursion, from 1."""
        return self.depth0 + 1

    @property
    def index0(self) -> int:
        """The number of the current item, from 0."""
        return self.index - 1

    @property
    def revindex0(self) -> int:
        """The number of items after the current one."""
        return self.length - self.index

    @property
    def revindex(self) -> int:
        """The number of items from the current one on."""
        return self.length - self.index + 1

    @property
    def first(self) -> bool:
        """Whether this is the first item."""
        return self.index == 1

    @property
    def previtem(self) -> Any:
        """The item before the current one."""
        return self._undefined("there is no previous item") if self.first else self._before

    @property
    def nextitem(self) -> Any:
        """The item after the current one."""
        after = self._look()
        return self._undefined("there is no next item") if after is missing else after

    def cycle(self, *args: Any) -> Any:
        """Return the argument whose turn it is: a different one in each iteration, in a cycle."""
        if not args:
            raise TypeError("no items for cycling given")
        return args[(self.index - 1) % len(args)]

    def changed(self, *value: Any) -> bool:
        """Return whether `value` differs from that of the previous call."""
        if self._last_changed != value:
            self._last_changed = value
            return True
        return False

    def __iter__(self) -> Iterator[tuple[Any, LoopContext]]:
        return self

    def __next__(self) -> tuple[Any, LoopContext]:
        item = super().__next__()
        self._before, self._current = self._current, item
        return item, self

    def __call__(self, iterable: Iterable[Any]) -> Any:
        """Return the text of a recursive loop for other items."""
        if self._recurse is None:
            raise TypeError("The loop must have the 'recursive' marker to be called recursively.")
        return self._recurse(iterable, self._recurse, depth=self.depth)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.index}/{self.length}>"


class Namespace:
    """An object whose attributes templates can set from any scope."""

    __class__ = passes_for("jinja2.utils", "Namespace")

    def __init__(*args: Any, **kwargs: Any) -> None:  # any name may be a keyword, also "self"
        vars(args[0]).update(dict(*args[1:], **kwargs))

    def __setitem__(self, name: str, value: Any) -> None:
        vars(self)[name] = value

    def __repr__(self) -> str:
        return f"<Namespace {vars(self)!r}>"

# SPDX-License-Identifier: Apache-2.0
"""What is known of a function before it is called: its name, its code's digest, how its arguments bind.

``Ignored`` and ``Required`` mark parameters in annotations: ``verbose: Ignored[bool]`` never enters the key, and a
call that doesn't give ``seed: Required[int]`` itself isn't cached.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from cuda_progcache.memo.digest import Digest, Indigestible


class Ignored:
    """An annotation: the parameter has no part in the key (``Ignored`` or ``Ignored[int]``)."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Annotated[item, cls]


class Required:
    """An annotation: only calls that give the argument themselves are cached (``Required`` or ``Required[int]``)."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Annotated[item, cls]


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_ANYTHING = inspect.Signature(
    [
        inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)


@dataclass(frozen=True)
class FunctionProfile:
    """What is known of a function.

    Attributes
    ----------
    signature : inspect.Signature
        ``(*args, **kwargs)`` for built-in functions that tell none.
    qualname, module : str
    version : str, int or None
        ``function.__version__``, which a user sets to say that results differ from earlier ones.
    function : callable
        The function itself.
    ignored, required : frozenset of str
        Parameters marked so.
    """

    signature: inspect.Signature
    qualname: str
    module: str
    version: str | int | None
    ignored: frozenset[str]
    required: frozenset[str]
    function: Callable[..., Any]

    @property
    def code_digest(self) -> Digest | None:
        """See :func:`code_digest`; taken anew each time."""
        return code_digest(self.function)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> FunctionProfile:
        """Look at a function."""
        try:
            # A decorator may take other arguments than what it wraps, whatever functools.wraps makes it look like.
            inner = getattr(function, "profile", None) if hasattr(type(function), "__counts__") else None
            signature = inner.signature if inner is not None else inspect.signature(function, follow_wrapped=False)
        except (TypeError, ValueError):
            signature = _ANYTHING
        named = inspect.unwrap(function)
        if isinstance(named, functools.partial):
            named = named.func
        module = getattr(named, "__module__", None) or type(named).__module__
        hints = _hints(inspect.unwrap(function))
        return cls(
            signature,
            getattr(named, "__qualname__", None) or type(named).__qualname__,
            module,
            getattr(function, "__version__", None),
            frozenset(name for name, hint in hints.items() if _marked(hint, Ignored)),
            frozenset(name for name, hint in hints.items() if _marked(hint, Required)),
            function,
        )

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter, defaults filled in; TypeError where they don't fit."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def bind_partial(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by parameter, only those given; TypeError for unknown ones."""
        return dict(self.signature.bind_partial(*args, **kwargs).arguments)

    def binder(self, ignored: Iterable[str] = ()) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
        """:meth:`bind` without the parameters to ignore, as quick as can be.

        ``inspect.Signature.bind`` takes 5 µs; for plain positional calls of plain signatures a dict does the same.
        """
        left_out = frozenset(ignored)
        parameters = list(self.signature.parameters.values())
        plain = all(p.kind in _POSITIONAL or p.kind is p.KEYWORD_ONLY for p in parameters)
        positional = [p.name for p in parameters if p.kind in _POSITIONAL]
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
        exact = tuple(positional) if plain and len(positional) == len(parameters) and not left_out else None
        count = len(positional)
        needed = len(parameters) - len(defaults)
        order = [p.name for p in parameters if p.name not in left_out]
        by_name = frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
            given = len(args)
            if exact is not None and given == count and not kwargs:
                return dict(zip(exact, args, strict=True))
            if plain and given <= count:
                bound = defaults | dict(zip(positional, args, strict=False)) | kwargs
                taken = positional[:given]
                if (
                    kwargs.keys() <= by_name
                    and not any(name in kwargs for name in taken)
                    and len(bound) == len(parameters)
                    and given + len(kwargs) >= needed
                ):
                    return {name: bound[name] for name in order}
            return {name: value for name, value in self.bind(args, kwargs).items() if name not in left_out}

        return bind


def code_digest(function: Any) -> Digest | None:
    """Digest of a function's code, all that it refers to, and the versions of the packages it uses.

    None where it refers to data nested too deep to be digested.
    """
    from cuda_progcache.memo.code import closure

    try:
        return closure(function).with_packages
    except Indigestible:
        return None


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    if not getattr(function, "__annotations__", None):
        return {}
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:  # noqa: BLE001 - annotations may be any code; those that can't be evaluated mark nothing
        return {}


def _marked(hint: Any, marker: type) -> bool:
    return hint is marker or (typing.get_origin(hint) is Annotated and marker in typing.get_args(hint))

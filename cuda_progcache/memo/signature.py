# SPDX-License-Identifier: Apache-2.0
"""The profile of a function: its name, its signature, its marked parameters, and the digest of its code.

``Ignored`` and ``Required`` mark parameters in annotations: ``verbose: Ignored[bool]`` is never part of the key, and a
call that doesn't pass ``seed: Required[int]`` explicitly isn't cached.
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
    """The annotation of a parameter that has no part in the key (``Ignored`` or ``Ignored[int]``)."""

    def __class_getitem__(cls, item: Any) -> Any:
        return Annotated[item, cls]


class Required:
    """The annotation of a parameter that a call must pass to be cached (``Required`` or ``Required[int]``)."""

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
    """The properties of a function that its calls' keys need.

    Attributes
    ----------
    signature : inspect.Signature
        ``(*args, **kwargs)`` for a built-in function without a signature.
    qualname, module : str
    version : str, int or None
        ``function.__version__``; a user changes it when results differ from earlier ones.
    function : callable
        The function itself.
    ignored, required : frozenset of str
        The parameters annotated ``Ignored`` and ``Required``.
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
        """The result of :func:`code_digest`, computed at each access."""
        return code_digest(self.function)

    @classmethod
    def of(cls, function: Callable[..., Any]) -> FunctionProfile:
        """Return the profile of a function."""
        try:
            # A wrapper may take other arguments than the function it wraps, although functools.wraps hides that.
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
        """Return the arguments by parameter, defaults filled in; TypeError if they don't fit the signature."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def bind_partial(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the given arguments by parameter, without defaults; TypeError for unknown arguments."""
        return dict(self.signature.bind_partial(*args, **kwargs).arguments)

    def binder(self, ignored: Iterable[str] = ()) -> Callable[[tuple[Any, ...], dict[str, Any]], dict[str, Any]]:
        """Return a fast version of :meth:`bind` that leaves out the ``ignored`` parameters.

        ``inspect.Signature.bind`` takes 5 µs; for signatures without ``*args`` and ``**kwargs``, dicts do the same.
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
    """Return a digest of a function's code, everything that it refers to, and the versions of the packages it uses.

    None if it refers to data that can't be digested: data without content, or nested too deeply.
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
    except Exception:  # noqa: BLE001 - annotations may be any code; if they can't be evaluated, no parameter is marked
        return {}


def _marked(hint: Any, marker: type) -> bool:
    return hint is marker or (typing.get_origin(hint) is Annotated and marker in typing.get_args(hint))

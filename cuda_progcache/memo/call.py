# SPDX-License-Identifier: Apache-2.0
"""Calls: a function, its arguments and its result.

A call goes through several forms, all with the same key (:meth:`to_lookup_key`):

- :class:`Call` holds live values;
- :class:`PreparedCall` has its arguments sealed (digested and stored) and waits for the result, so a body that
  changes its arguments can't change the key;
- :class:`DigestedCall` holds digests in place of values; call storages keep this form;
- :class:`LazyCall` is a :class:`DigestedCall` with the cache it came from; its values are loaded on demand.

:class:`QueryCall` is a pattern for calls. The key is the digest of name, module, version, code digest and arguments.
``metadata`` is the rest of the record. It maps groups to mappings of JSON values: ``runtime`` (``status``,
``timestart``, ``timestop``, ``duration`` in seconds), ``parents``, ``files``, ``environment``, ``host``, ``tags``.
"""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, Self, TypeAlias, TypeVar

from cuda_progcache.memo import digest as _digest
from cuda_progcache.memo.digest import Digest, Indigestible, child_bytes, hash_tagged
from cuda_progcache.memo.signature import FunctionProfile, Ignored, Required
from cuda_progcache.memo.tagged_json import SaveError, decode_json

__all__ = [
    "NONE", "NO_RESULT", "Call", "DigestedCall", "FunctionProfile", "Ignored", "LazyArguments", "LazyCall",
    "PreparedCall", "QueryCall", "Required", "Unstored", "bind", "head_bytes", "key_from_head",
]  # fmt: skip

_logger = logging.getLogger(__name__)

Metadata: TypeAlias = dict[str, dict[str, Any]]
Form = TypeVar("Form")


class Home(Protocol):
    """The cache that a call came from: the part of ``BaseCache`` that calls, queries and explanations need."""

    def save(self, call: Any, /) -> Digest: ...
    def load(self, key: str, /) -> LazyCall: ...
    def load_value(self, key: str, /) -> Any: ...
    def evict(self, key: str, /) -> None: ...
    def expand(self, prefix: str, /) -> Digest: ...
    def query(self, template: QueryCall | None = None, /, **fields: Any) -> Iterable[LazyCall]: ...
    def _shrink(self, *keys: str) -> tuple[Digest, ...]: ...
    def _transfer_one(self, call: LazyCall, *, overwrite: bool = False) -> bool: ...


class _Sentinel:
    def __init__(self, name: str, stands_for: object) -> None:
        self._name = name
        self._stands_for = stands_for

    def __repr__(self) -> str:
        return self._name

    def __reduce__(self) -> str:
        return self._name

    def __digest__(self) -> Digest:
        return _digest.digest(self._stands_for)


#: In a query, the value None itself; a plain None means "anything".
NONE = _Sentinel("NONE", None)
#: The result of a call that has no result yet; ``result=None`` is a result.
NO_RESULT = _Sentinel("NO_RESULT", ("cuda_progcache", "NO_RESULT"))


#: The digests that a key uses for a missing result and for missing metadata.
_NOTHING_YET = (child_bytes(NO_RESULT), child_bytes(None))


class Unstored(Digest):
    """The digest of an argument that couldn't be stored, and so can't be loaded. It is returned as the argument."""

    __slots__ = ()


def head_bytes(name: str, module: str | None, version: str | int | None, code: str | None) -> bytes:
    """Return the function's part of a key, which is the same for all calls of the function."""
    return child_bytes((name, module, version, code if code is None else Digest(code)))


def key_from_head(
    head: bytes, arguments: Mapping[str, Any], otherwise: Callable[[Any], Digest] | None = None
) -> tuple[Digest, dict[str, bytes]]:
    """Return the key of a call, made from :func:`head_bytes` and the arguments, and the arguments' digests as ASCII.

    The key equals the digest of a :class:`Call` with these arguments (a dict) and no result or metadata. ``otherwise``
    digests arguments that :func:`~cuda_progcache.memo.digest.digest` can't; without it they raise
    :class:`Indigestible`.
    """
    digests = {}
    for name, value in arguments.items():
        try:
            digests[name] = child_bytes(value)
        except Indigestible:
            if otherwise is None:
                raise
            digests[name] = otherwise(value).encode("ascii")
    pairs = sorted([_name_bytes(name) + b"=" + found for name, found in digests.items()])
    made = _call_bytes(head, hash_tagged(b"dict:", b",".join(pairs)), *_NOTHING_YET)
    return Digest(made.decode("ascii")), digests


@functools.lru_cache(maxsize=10_000)
def _name_bytes(name: str) -> bytes:
    return child_bytes(name)


def _call_bytes(head: bytes, arguments: bytes, result: bytes, metadata: bytes) -> bytes:
    return hash_tagged(b"call:", b",".join((head, arguments, result, metadata)))


def bind(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, apply_defaults: bool = False,
    partial: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Return the arguments by parameter of ``function``; see :class:`FunctionProfile`."""
    known = FunctionProfile.of(function)
    if partial:
        return known.bind_partial(args, kwargs)
    return known.bind(args, kwargs) if apply_defaults else dict(known.signature.bind(*args, **kwargs).arguments)


class _Record:
    """The fields that every form of a call has; they make its key."""

    name: str
    module: str | None
    version: str | int | None
    code_digest: str | None
    key: Digest | None
    metadata: Metadata

    @abc.abstractmethod  # for the type checker: with ABCMeta, each isinstance(call, Call) would take longer
    def _parts(self) -> tuple[Mapping[str, Any], Any, Metadata]:
        """Return arguments, result (``NO_RESULT`` for none) and metadata; arguments and result may be digests."""

    def __digest__(self) -> Digest:
        arguments, result, metadata = self._parts()
        head = head_bytes(self.name, self.module, self.version, self.code_digest)
        found = _call_bytes(head, child_bytes(arguments), child_bytes(result), child_bytes(metadata))
        return Digest(found.decode("ascii"))

    def altered(self, **fields: Any) -> Self:
        """Return a copy with other fields; it takes a fifth of the time of ``dataclasses.replace``."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        made.__dict__.update(fields)
        return made

    def in_form(self, kind: type[Form], **fields: Any) -> Form:
        """Return the call in another form, with these fields and the rest copied from this one."""
        shared = ("name", "metadata", "module", "version", "code_digest", "key")
        return kind(**{name: getattr(self, name) for name in shared} | fields)

    @property
    def runtime(self) -> Mapping[str, Any]:
        """When the call ran and for how long; see the module's docstring."""
        return (self.metadata or {}).get("runtime") or {}

    def links(self, which: str) -> list[str]:
        """Return the keys of the call's ``parents`` or ``children``."""
        return list((self.metadata.get("links") or {}).get(which) or ())

    def to_lookup_key(self) -> Digest:
        """Return the key under which caches keep this call."""
        if self.key is not None:
            return self.key
        arguments, _, _ = self._parts()
        bare = Call(self.name, dict(arguments), None, self.module, self.version, self.code_digest)  # type: ignore[arg-type]
        return _digest.digest(bare)


@dataclass
class Call(_Record):
    """A call with live values.

    Attributes
    ----------
    name : str
        The function's qualified name.
    arguments : dict
        By parameter; a :class:`Digest` stands for the value with that digest.
    metadata : dict of dicts
        See the module's docstring.
    module, version, code_digest
        The function's; None if it doesn't distinguish calls.
    result : object
        ``NO_RESULT`` until there is one.
    key : Digest, optional
        Overrides the key derived from these fields: compiled programs have keys of their own.
    """

    name: str
    arguments: dict[str, Any]
    metadata: Metadata = field(default_factory=dict)
    module: str | None = None
    version: str | int | None = None
    code_digest: str | None = None
    result: Any = NO_RESULT
    key: Digest | None = None
    #: Digests of arguments, if already known, so that large arguments aren't hashed twice.
    digests: Mapping[str, bytes] = field(default_factory=dict, repr=False, compare=False)
    sealed: Digest | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_call(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        """Return the call ``function(*args, **kwargs)``, defaults filled in; TypeError if the arguments don't fit."""
        known = FunctionProfile.of(function)
        return cls(
            known.qualname, known.bind(args, kwargs), module=known.module, version=known.version,
            code_digest=known.code_digest,
        )  # fmt: skip

    def _parts(self) -> tuple[Mapping[str, Any], Any, Metadata]:
        return self.arguments, self.result, self.metadata

    def stash(self, values: Any) -> DigestedCall:
        """Store arguments and result in ``values`` and return the call with digests in their place.

        Raises
        ------
        SaveError
            The result can't be stored. An argument that can't be stored becomes an :class:`Unstored` digest.
        """
        return self._digested(values.save)

    def digest(self) -> DigestedCall:
        """Return the call with digests in place of its values; nothing is stored."""
        return self._digested(_digest.digest)

    def _digested(self, save: Callable[[Any], Digest]) -> DigestedCall:
        result = None
        if self.result is not NO_RESULT:
            result = self.result if isinstance(self.result, Digest) else save(self.result)
        arguments: dict[str, Digest] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Digest):
                arguments[name] = value
                continue
            try:
                arguments[name] = save(value)
            except SaveError as error:
                _logger.debug("only the digest of argument %s of %s is stored: %s", name, self.name, error)
                arguments[name] = Unstored(_digest.digest(value))
        return self.in_form(DigestedCall, arguments=arguments, result=result)


@dataclass(eq=False)
class DigestedCall(_Record):
    """A call with digests in place of its values; call storages keep this form.

    Attributes
    ----------
    result : Digest or None
        None while there is no result.
    inline : dict
        Values small enough to be kept in the record itself instead of a file of their own: tagged JSON by digest.
    """

    name: str
    arguments: dict[str, Digest]
    result: Digest | None = None
    metadata: Metadata = field(default_factory=dict)
    module: str | None = None
    version: str | int | None = None
    code_digest: str | None = None
    key: Digest | None = None
    inline: dict[Digest, bytes] = field(default_factory=dict, repr=False)
    #: The key, if it has already been computed; storages don't keep it.
    sealed: Digest | None = field(default=None, repr=False)

    def to_lookup_key(self) -> Digest:
        """Return the key under which caches keep this call."""
        return super().to_lookup_key() if self.sealed is None else self.sealed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (DigestedCall, Call)):
            return NotImplemented
        mine, theirs = (
            (c.name, c.arguments, c.metadata, c.module, c.version, c.code_digest) for c in (self, other)
        )  # fmt: skip
        result = None if other.result is NO_RESULT else other.result
        return mine == theirs and self.result == result

    __hash__ = None  # type: ignore[assignment]

    def _parts(self) -> tuple[Mapping[str, Any], Any, Metadata]:
        return self.arguments, NO_RESULT if self.result is None else self.result, self.metadata

    def fetch(self, cache: Home) -> LazyCall:
        """Return the call with values that are loaded from ``cache``."""
        return self.in_form(LazyCall, _arguments=self.arguments, _result=self.result, _cache=cache, _inline=self.inline)

    def recorded_arguments(self) -> dict[str, Any]:
        """Return the arguments that the record itself contains."""
        return {name: decode_json(self.inline[key]) for name, key in self.arguments.items() if key in self.inline}

    def recorded_result(self) -> Any:
        """Return the result if the record itself contains it, otherwise None."""
        text = None if self.result is None else self.inline.get(self.result)
        return None if text is None else decode_json(text)


@dataclass
class PreparedCall:
    """A call admitted to a cache: its arguments are stored, its key is sealed, its result isn't there yet.

    :meth:`commit` or :meth:`abandon` ends it, once. As a context manager, it is abandoned if the block is left without
    a commit.

    Attributes
    ----------
    digested : DigestedCall
    cache : Home
        A commit passes the call to ``cache.save``.
    """

    digested: DigestedCall
    cache: Home
    release: Callable[[], object] | None = field(default=None, repr=False)
    result: Any = field(default=NO_RESULT, init=False, repr=False)
    _finished: bool = field(default=False, init=False, repr=False)

    def to_lookup_key(self) -> Digest:
        """Return the key under which caches keep this call."""
        return self.digested.to_lookup_key()

    def commit(self, result: Any, metadata: Metadata | None = None) -> Digest:
        """Store the call with its result.

        Parameters
        ----------
        result : object
            The value that the body returned; it may be an argument that the body changed.
        metadata : dict of dicts, optional
            Replaces the call's metadata.

        Returns
        -------
        Digest
            The key.

        Raises
        ------
        Rejected
            The cache refuses the call.
        RuntimeError
            The call has already been committed or abandoned.
        """
        if self._finished:
            raise RuntimeError(f"the call of {self.digested.name} has already been committed or abandoned")
        self._finished = True
        self.result = result
        if metadata is not None:
            self.digested = self.digested.altered(metadata=metadata)
        try:
            return self.cache.save(self)
        finally:
            self._let_go()

    def resolve(self, values: Any) -> DigestedCall:
        """Store the result in ``values`` and return the call; the arguments keep the digests they were sealed with."""
        return self.digested.altered(result=values.save(self.result))

    def abandon(self) -> None:
        """Give up the call without recording it; may be called more than once."""
        self._finished = True
        self._let_go()

    def _let_go(self) -> None:
        release, self.release = self.release, None
        if release is not None:
            release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._finished:
            self.abandon()


class LazyArguments(Mapping[str, Any]):
    """Arguments that are loaded on demand.

    A value that is gone raises :class:`KeyError`; an argument that was never stored is its digest (:class:`Unstored`).
    """

    def __init__(self, cache: Home, digests: Mapping[str, Any], inline: Mapping[Digest, bytes] | None = None) -> None:
        self._cache = cache
        self._digests = digests
        self._inline = inline or {}

    def __getitem__(self, name: str) -> Any:
        value = self._digests[name]
        if not isinstance(value, Digest) or isinstance(value, Unstored):
            return value
        return _load(self._cache, value, self._inline)

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, name: object) -> bool:
        return name in self._digests

    def __repr__(self) -> str:
        return f"LazyArguments({dict(self._digests)!r})"

    def __digest__(self) -> Digest:
        return _digest.digest(dict(self._digests))


def _load(cache: Home, digest: Digest, inline: Mapping[Digest, bytes]) -> Any:
    text = inline.get(digest)
    if text is None:
        return cache.load_value(digest)
    return decode_json(text)


@dataclass(frozen=True)
class LazyCall(_Record):
    """A recorded call; its values are loaded from its cache on demand."""

    name: str
    _arguments: dict[str, Digest]
    _result: Digest | None
    _cache: Home = field(repr=False, compare=False)
    metadata: Metadata = field(default_factory=dict)
    module: str | None = None
    version: str | int | None = None
    code_digest: str | None = None
    key: Digest | None = None
    _inline: dict[Digest, bytes] = field(default_factory=dict, repr=False, compare=False)

    def __hash__(self) -> int:
        return hash(self.to_lookup_key())

    @property
    def arguments(self) -> LazyArguments:
        """The arguments, by parameter."""
        return LazyArguments(self._cache, self._arguments, self._inline)

    @property
    def result(self) -> Any:
        """The value that the call returned; KeyError if it is gone, None also if there is no result."""
        return None if self._result is None else _load(self._cache, self._result, self._inline)

    def _parts(self) -> tuple[Mapping[str, Any], Any, Metadata]:
        return self._arguments, NO_RESULT if self._result is None else self._result, self.metadata

    def fetch(self) -> Call:
        """Return the call with all its values loaded; KeyError if a value is gone."""
        result = NO_RESULT if self._result is None else self.result
        return self.in_form(Call, arguments=dict(self.arguments), result=result)

    def detach(self) -> DigestedCall:
        """Return the call without its cache, so that it can be pickled and sent."""
        return self.in_form(
            DigestedCall, arguments=dict(self._arguments), result=self._result, metadata=dict(self.metadata),
            inline=self._inline,
        )  # fmt: skip


@dataclass
class QueryCall:
    """A pattern for calls.

    None matches anything, :data:`NONE` matches the value None, any other value matches values with its digest.

    Attributes
    ----------
    name, module, version, code_digest, result
        The values that the call must have.
    arguments : dict, optional
        The values that these arguments must have; None: any value, but the argument must be there. The call may have
        other arguments too.
    metadata : dict of dicts, optional
        The values that these entries of these groups must have; None: any value, but the entry must be there.
    """

    name: str | None = None
    arguments: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    module: str | None = None
    version: str | int | None = None
    code_digest: str | None = None
    result: Any = None

    @classmethod
    def from_call(cls, function: Callable[..., Any], *args: Any, **kwargs: Any) -> QueryCall:
        """Return the pattern for calls of ``function`` with these arguments; arguments not given may be anything."""
        known = FunctionProfile.of(function)
        given = known.bind_partial(args, kwargs)
        return cls(
            known.qualname, {name: given.get(name) for name in known.signature.parameters}, module=known.module,
            version=known.version,
        )  # fmt: skip

    def matcher(self) -> Callable[[Call | LazyCall | DigestedCall], bool]:
        """Return a :meth:`matches` that digests the pattern only once; Indigestible if a value in it has no digest."""
        fields = {name: getattr(self, name) for name in ("name", "module", "version", "code_digest", "result")}
        wanted = {name: _digest.digest(value) for name, value in fields.items() if value is not None}
        # None: the argument must be there.
        arguments = {n: None if value is None else _digest.digest(value) for n, value in (self.arguments or {}).items()}
        metadata = self.metadata or {}

        def matches(call: Call | LazyCall | DigestedCall) -> bool:
            have, result, about = call._parts()
            for name, asked in wanted.items():
                value = result if name == "result" else getattr(call, name)
                if value is NO_RESULT or not _same(value, asked):
                    return False
            for name, digest in arguments.items():
                if name not in have or (digest is not None and not _same(have[name], digest)):
                    return False
            return _metadata_fits(metadata, about)

        return matches

    def matches(self, call: Call | LazyCall | DigestedCall) -> bool:
        """Return whether a call matches the pattern."""
        return self.matcher()(call)


def _same(value: Any, digest: Digest) -> bool:
    try:
        return _digest.digest(value) == digest
    except Indigestible:
        return False


def _metadata_fits(asked: Mapping[str, Any], have: Mapping[str, Mapping[str, Any]]) -> bool:
    for group, fields in asked.items():
        data = have.get(group)
        if data is None:
            return False
        for name, value in (fields or {}).items():
            if name not in data or (value is not None and data[name] != (None if value is NONE else value)):
                return False
    return True


def digests_of(call: DigestedCall) -> Iterable[Digest]:
    """Yield the digests of the values that a call refers to and its record doesn't contain."""
    for value in (*call.arguments.values(), call.result):
        if isinstance(value, Digest) and not isinstance(value, Unstored) and value not in call.inline:
            yield value

# SPDX-License-Identifier: Apache-2.0
"""The digest of what decides, besides a template's source and the compiler, what its code is.

The compiler asks an environment for its options, for what its class or its user has overridden, and for how filters and
tests are called; and it folds values of the static context into the code. All of that counts. What a user's filter does
doesn't: it is never called before the render. Where it can't be told what a value is, there is no digest, and nothing
that was compiled with it is kept on disk.
"""

from __future__ import annotations

import marshal
import os
import sys
from _operator import is_not
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType

from cuda_progcache._util.digest import sha256

TYPE_CHECKING = False  # importing typing would take longer than all else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import jinja2

#: Their functions and classes count by name: the compiler's ABI tag has the digest of their files.
_IN_TAG = ("cuda_progcache.templates.", "jinja2.")


class UnknownContentError(Exception):
    """An object of which it can't be told whether another process would have the same."""


def context_digest(*parts: object) -> str | None:
    """Return the digest of some values, functions and classes.

    Parameters
    ----------
    *parts : object
        Plain data, enumeration members, dataclasses, functions, classes and containers of such.

    Returns
    -------
    str or None
        64 hex digits; None where one of them can't be told from another.
    """
    try:
        return sha256(b"".join(_Described().of(part) for part in parts)).hexdigest()
    except (UnknownContentError, RecursionError):
        return None


def environment_context(environment: jinja2.Environment) -> str | None:
    """Return the digest of all that a Jinja2 environment does to the code of its templates.

    That is every option, the environment's class and compiler, what was set on the instance, its extensions, how its
    filters and tests are called, and its static context.

    Returns
    -------
    str or None
        As `context_digest`.
    """
    kind, own = type(environment), vars(environment)
    asked = signatures if "cuda_progcache" in str(getattr(kind.compile, "__module__", "")) else _itself
    methods = [getattr(kind, name, None) for name in _METHODS], [own.get(name) for name in _METHODS]
    options = [getattr(environment, name, None) for name in _OPTIONS]
    tables = [{"finalize": environment.finalize}, environment.filters, environment.tests]
    # All of these are compared by identity; what can change in place is described anew each time.
    listed = [part for table in tables for part in (*table, *table.values())]
    parts = (kind, *methods[0], *methods[1], *options, *listed)
    known = own.get(_KEPT)
    if known is None or len(known[0]) != len(parts) or any(map(is_not, known[0], parts)):
        known = own[_KEPT] = (parts, context_digest(kind, methods, options, *map(asked, tables)))
    if known[1] is None:
        return None
    extensions = environment.extensions.values()
    unknown = any(not type(one).__module__.startswith(_IN_TAG) for one in extensions)
    return context_digest(
        known[1],
        list(environment.extensions),
        list(extensions),
        environment.policies,
        getattr(environment, "static_context", None),
        # An extension of the user's may ask the environment for anything.
        {name: value for name, value in own.items() if unknown and name not in _NEVER_ASKED},
    )


_KEPT = "_progcache_context"
_OPTIONS = (
    *("block_start_string", "block_end_string", "variable_start_string", "variable_end_string"),
    *("comment_start_string", "comment_end_string", "line_statement_prefix", "line_comment_prefix"),
    *("trim_blocks", "lstrip_blocks", "newline_sequence", "keep_trailing_newline", "optimized", "undefined"),
    *("autoescape", "is_async", "sandboxed", "intercepted_binops", "intercepted_unops", "newstyle_gettext"),
    *("template_class", "context_class", "code_generator_class", "compiler_class", "concat"),
)
"""What the parser, the compiler and Jinja2's own extensions ask an environment."""
_METHODS = (
    *("getattr", "getitem", "call", "call_binop", "call_unop", "compile", "parse", "_parse", "lex", "_tokenize"),
    *("preprocess", "iter_extensions", "_generate", "_compile", "_filter_test_common", "call_filter", "call_test"),
)
_NEVER_ASKED = {
    *(*_OPTIONS, *_METHODS, _KEPT, "filters", "tests", "finalize", "extensions", "policies", "static_context"),
    *(
        "globals",
        "loader",
        "cache",
        "bytecode_cache",
        "_bytecode_cache",
        "auto_reload",
        "shared",
        "overlayed",
        "linked_to",
    ),
}


def _itself(functions: dict[str, Any]) -> Any:
    """Return the functions: Jinja2's own compiler calls what users have written, so their content counts."""
    return functions


def signatures(functions: Mapping[str, Any]) -> str:
    """Return the names and `signature` of some functions."""
    return "".join(sorted(f"{name!r}: {signature(function)!r}, " for name, function in functions.items()))


def signature(function: Any) -> tuple[str, ...] | None:
    """Return what the compiler knows of a filter, a test or ``finalize``: how it is called, and whether it is known.

    What a user's function does isn't part of any code: it is called when the template is rendered, never before.
    """
    if function is None:
        return None
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    variant = "async" if getattr(function, "jinja_async_variant", False) else ""
    return (wants, variant, _name(function).decode() if is_known(function) else "")


def is_known(function: Any) -> bool:
    """Whether a function is one of Jinja2's or ours, which give the same for the same arguments.

    Such a function may be called on constants when a template is compiled.
    """
    kind = type(function)
    if kind is BuiltinFunctionType:
        return function.__module__ == "_operator" or function in _KNOWN_BUILTINS
    if kind is not FunctionType:
        return False
    # Not by __module__, which functools.wraps copies to whatever a user puts around one.
    if not f"{function.__globals__.get('__name__')}.".startswith((*_IN_TAG, "markupsafe.")):
        return False
    closed = (cell.cell_contents for cell in function.__closure__ or ())
    return all(is_known(one) for one in closed if callable(one) and not isinstance(one, type))


_KNOWN_BUILTINS = frozenset({abs, len, callable})


def snapshot(values: Any) -> Any:
    """Return a copy of plain containers, all through; anything else stays the object that it is."""
    kind = type(values)
    if kind is dict:
        return {name: snapshot(value) for name, value in values.items()}
    if kind in {list, tuple, set, frozenset}:
        return kind(map(snapshot, values))
    return values


class CacheApart:
    """One of Jinja2's bytecode caches, whose entries for our code lie apart from Jinja2's own.

    They lie under everything that decides what the code is (`environment_context`, our compiler), so neither Jinja2's
    compiler nor another environment meets them.

    Parameters
    ----------
    cache : jinja2.BytecodeCache
    get, put : callable, optional
        Its ``get_bucket`` and ``set_bucket``, where those are replaced.
    """

    def __init__(self, cache: Any, get: Any = None, put: Any = None) -> None:
        self._cache = cache
        self._get = get or cache.get_bucket
        self._put = put or cache.set_bucket

    def get_bucket(self, environment: jinja2.Environment, name: str, filename: str | None, source: str) -> Any:
        """Return the bucket of a template; an empty one where nothing may be kept."""
        context = environment_context(environment)
        if context is None:
            from jinja2.bccache import Bucket

            empty = Bucket(environment, "", "")
            empty.unkept = True  # type: ignore[attr-defined]
            return empty
        from cuda_progcache.templates.abi import abi_tag

        apart = f"{abi_tag(None)}-{context}"
        return self._get(environment, f"cuda_progcache-{apart}-{name}", filename, f"{apart}\n{source}")

    def set_bucket(self, bucket: Any) -> None:
        """Keep the code of a bucket, unless nothing may be kept of its environment."""
        if not getattr(bucket, "unkept", False):
            self._put(bucket)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    @property  # type: ignore[misc]  # typeshed lets it be assigned to
    def __class__(self) -> type:
        return type(self._cache)

    def __repr__(self) -> str:
        return repr(self._cache)


def move(code: CodeType, path: str) -> None:
    """Have tracebacks name a template's file as it is called here, wherever its code was compiled."""
    if code.co_filename != path:
        from _imp import _fix_co_filename  # type: ignore[attr-defined]  # what importlib does for modules

        _fix_co_filename(code, path)


class _Described:
    """Writes each value so that two are written alike only if they are alike."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}  # what is being written, for what contains itself
        self._written: dict[int, tuple[object, bytes]] = {}  # functions, which refer to each other

    def of(self, value: Any) -> bytes:
        kind = type(value)
        if value is None or value is Ellipsis or value is NotImplemented or kind in _ATOMS:
            return _tagged(kind.__name__, repr(value).encode("utf-8", "surrogatepass"))
        if id(value) in self._open:
            return _tagged("again", b"%d" % self._open[id(value)])
        self._open[id(value)] = len(self._open)
        try:
            return _tagged(kind.__name__, self._content(kind, value))
        finally:
            del self._open[id(value)]

    def _content(self, kind: type, value: Any) -> bytes:
        if issubclass(kind, (tuple, list)):
            return self._type(kind) + b"".join(map(self.of, value))
        if issubclass(kind, dict):
            return self._type(kind) + b"".join(sorted(self.of(k) + self.of(v) for k, v in value.items()))
        if issubclass(kind, (set, frozenset)):
            return self._type(kind) + b"".join(sorted(map(self.of, value)))
        if kind is FunctionType:
            return self._function(value)
        if kind is MethodType:
            return self.of(value.__func__) + self.of(value.__self__)
        if kind is BuiltinFunctionType:
            if value.__self__ is None or isinstance(value.__self__, type(sys)):
                return _name(value)
            return _name(value) + self.of(value.__self__)
        if kind is CodeType:
            return self._code(value)
        if isinstance(value, (property, classmethod, staticmethod)):
            parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (value.__func__,)
            return b"".join(map(self.of, parts))
        if isinstance(value, type):
            return self._type(value)
        return self._object(kind, value)

    def _object(self, kind: type, value: Any) -> bytes:
        enum = sys.modules.get("enum")
        if enum is not None and issubclass(kind, enum.Enum):
            return self._type(kind) + str(value.name).encode()
        if kind.__module__ in _PLAIN:
            return _name(kind) + repr(value).encode()
        if kind.__module__.partition(".")[0] == "numpy" and getattr(value, "shape", None) == ():  # scalars and dtypes
            return _name(kind) + str(getattr(value, "dtype", value)).encode() + repr(value).encode()
        partial = getattr(sys.modules.get("functools"), "partial", None)
        if kind is partial:
            return self.of(value.func) + self.of(value.args) + self.of(value.keywords)
        if getattr(kind, "identifier", None) and kind.__module__.startswith(_IN_TAG):
            return _name(kind)  # an extension of Jinja2's or ours
        state = getattr(value, "__dict__", None)
        if "__dataclass_fields__" in vars(kind) or (state is not None and callable(value)) or _is_extension(kind):
            kept = {k: v for k, v in (state or {}).items() if k != "environment"}  # an extension's own
            return self._type(kind) + self.of(kept)
        raise UnknownContentError(f"a {kind.__qualname__}")

    def _type(self, kind: type) -> bytes:
        name = _name(kind)
        if kind.__module__ == "builtins" or name.startswith(tuple(room.encode() for room in _IN_TAG)):
            return name
        members = {k: v for k, v in vars(kind).items() if isinstance(v, _CODE_HOLDERS) and not k.startswith("__dict")}
        return name + _file(kind.__module__) + self.of(members) + b"".join(map(self.of, kind.__bases__))

    def _function(self, value: Any) -> bytes:
        name = _name(value)
        if name.startswith(tuple(room.encode() for room in _IN_TAG)):
            closed = [cell.cell_contents for cell in value.__closure__ or ()]
            return name + self.of(closed)
        if id(value) not in self._written:
            self._written[id(value)] = value, self._written_out(name, value)
        return self._written[id(value)][1]

    def _written_out(self, name: bytes, value: Any) -> bytes:
        closed = [cell.cell_contents for cell in value.__closure__ or ()]
        marks = {k: v for k, v in vars(value).items() if k != "__wrapped__"}
        return (
            name
            + _file(value.__module__)
            + self._code(value.__code__)
            + self._globals(value)
            + self.of(value.__defaults__)
            + self.of(value.__kwdefaults__)
            + self.of(closed)
            + self.of({key: getattr(mark, "name", mark) for key, mark in marks.items()})
        )

    def _globals(self, function: Any) -> bytes:
        """Write what a function reads of its module."""
        used: dict[str, Any] = {}
        codes = [function.__code__]
        while codes:
            code = codes.pop()
            used.update((name, function.__globals__[name]) for name in code.co_names if name in function.__globals__)
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        return b"".join(
            _tagged(name, _module(value) if isinstance(value, type(sys)) else self.of(value))
            for name, value in sorted(used.items())
        )

    def _code(self, code: CodeType) -> bytes:
        # Without file names and line numbers: moving a function doesn't change it.
        constants = b"".join(self._code(c) if isinstance(c, CodeType) else self.of(c) for c in code.co_consts)
        names = repr((code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_flags)).encode()
        return _tagged("code", code.co_code + constants + names + marshal.dumps(code.co_exceptiontable))


def _tagged(tag: str, content: bytes) -> bytes:
    return b"%b %d:%b" % (tag.encode(), len(content), content)


def _name(value: Any) -> bytes:
    return f"{value.__module__}.{value.__qualname__}".encode()


def _file(module: str) -> bytes:
    """Size and time of a module's file: what its functions call there counts, too."""
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        status = os.stat(path) if path else None
    except OSError:
        status = None
    return b"" if status is None else b"%d %d" % (status.st_size, status.st_mtime_ns)


def _module(module: Any) -> bytes:
    return f"{module.__name__} {getattr(module, '__version__', '')}".encode() + _file(module.__name__)


def _is_extension(kind: type) -> bool:
    ext = sys.modules.get("jinja2.ext")
    return ext is not None and issubclass(kind, ext.Extension)


_ATOMS = {bool, int, float, complex, str, bytes, range, slice}
#: Their repr says all there is to say.
_PLAIN = {"datetime", "decimal", "fractions", "pathlib", "uuid"}
_CODE_HOLDERS = (FunctionType, property, classmethod, staticmethod, *_ATOMS, tuple, frozenset)

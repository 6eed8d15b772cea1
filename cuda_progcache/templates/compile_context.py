# SPDX-License-Identifier: Apache-2.0
"""The digest of the environment settings that affect a template's compiled code.

The compiler reads an environment's options, the methods that its class or its user has overridden, and the calling
conventions of filters and tests; it also folds values of the static context into the code. The digest covers all of
these. It doesn't cover the body of a user's filter, because our compiler never calls such a filter. If the content of a
value can't be determined, there is no digest, and no code compiled with that value is stored on disk.
"""

from __future__ import annotations

import marshal
import os
import sys
from _operator import is_not
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType

from cuda_progcache._util.digest import sha256

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    import jinja2

#: Functions and classes of these packages are described by name alone: the ABI tag covers the content of their files.
_IN_TAG = ("cuda_progcache.templates.", "jinja2.")


class UnknownContentError(Exception):
    """An object whose content can't be determined, so that it can't be compared between processes."""


def context_digest(*parts: object) -> str | None:
    """Return a digest of values, functions and classes.

    Parameters
    ----------
    *parts : object
        Plain data, enumeration members, dataclasses, functions, classes, and containers of these.

    Returns
    -------
    str or None
        64 hex digits; None if the content of a part can't be determined.
    """
    try:
        return sha256(b"".join(_Described().of(part) for part in parts)).hexdigest()
    except (UnknownContentError, RecursionError):
        return None


def environment_context(environment: jinja2.Environment) -> str | None:
    """Return a digest of everything in a Jinja2 environment that affects the code of its templates.

    The digest covers all options, the environment's class and compiler, the methods set on the instance, the
    extensions, the calling conventions of filters and tests, and the static context.

    Returns
    -------
    str or None
        See `context_digest`.
    """
    kind, own = type(environment), vars(environment)
    asked = signatures if "cuda_progcache" in str(getattr(kind.compile, "__module__", "")) else _itself
    methods = [getattr(kind, name, None) for name in _METHODS], [own.get(name) for name in _METHODS]
    options = [getattr(environment, name, None) for name in _OPTIONS]
    tables = [{"finalize": environment.finalize}, environment.filters, environment.tests]
    # These parts are compared by identity. Parts that can change in place are digested anew on each call, below.
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
        # A user's extension may read any attribute of the environment.
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
"""The attributes of an environment that the parser, the compiler and Jinja2's own extensions read."""
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
    """Return the functions themselves: Jinja2's own compiler calls users' functions, so their content counts."""
    return functions


def signatures(functions: Mapping[str, Any]) -> str:
    """Return the names and signatures of functions as text; see `signature`."""
    return "".join(sorted(f"{name!r}: {signature(function)!r}, " for name, function in functions.items()))


def signature(function: Any) -> tuple[str, ...] | None:
    """Return what affects the code that calls a filter, a test or ``finalize``.

    The result has the function's calling convention, and its name if it is a function of Jinja2's or ours. It doesn't
    depend on the body of a user's function, which is called only when a template is rendered.
    """
    if function is None:
        return None
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")
    variant = "async" if getattr(function, "jinja_async_variant", False) else ""
    return (wants, variant, _name(function).decode() if is_known(function) else "")


def is_known(function: Any) -> bool:
    """Whether a function is one of Jinja2's or ours, whose result depends on the arguments alone.

    Such a function may be called with constants when a template is compiled.
    """
    kind = type(function)
    if kind is BuiltinFunctionType:
        return function.__module__ == "_operator" or function in _KNOWN_BUILTINS
    if kind is not FunctionType:
        return False
    # Don't use __module__: functools.wraps copies it to a user's wrapper.
    if not f"{function.__globals__.get('__name__')}.".startswith((*_IN_TAG, "markupsafe.")):
        return False
    closed = (cell.cell_contents for cell in function.__closure__ or ())
    return all(is_known(one) for one in closed if callable(one) and not isinstance(one, type))


_KNOWN_BUILTINS = frozenset({abs, len, callable})


def snapshot(values: Any) -> Any:
    """Return a deep copy of plain containers; objects of other types aren't copied."""
    kind = type(values)
    if kind is dict:
        return {name: snapshot(value) for name, value in values.items()}
    if kind in {list, tuple, set, frozenset}:
        return kind(map(snapshot, values))
    return values


class CacheApart:
    """A wrapper of a Jinja2 bytecode cache that keeps our code apart from the code of Jinja2's own compiler.

    The keys of our entries cover everything that affects the code (our compiler and `environment_context`), so neither
    Jinja2's compiler nor another environment finds these entries.

    Parameters
    ----------
    cache : jinja2.BytecodeCache
    get, put : callable, optional
        The original ``get_bucket`` and ``set_bucket`` of `cache`, if they have been replaced.
    """

    def __init__(self, cache: Any, get: Any = None, put: Any = None) -> None:
        self._cache = cache
        self._get = get or cache.get_bucket
        self._put = put or cache.set_bucket

    def get_bucket(self, environment: jinja2.Environment, name: str, filename: str | None, source: str) -> Any:
        """Return a template's bucket; an empty one if the environment's code may not be stored."""
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
        """Store a bucket's code, unless the environment's code may not be stored."""
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
    """Set the file name that tracebacks show for a template's code; it may have been compiled under another path."""
    if code.co_filename != path:
        from _imp import _fix_co_filename  # type: ignore[attr-defined]  # what importlib does for modules

        _fix_co_filename(code, path)


class _Described:
    """A serializer of values: two values have the same bytes only if they are alike."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}  # the values being written, for values that contain themselves
        self._written: dict[int, tuple[object, bytes]] = {}  # functions, which may refer to each other

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
            return _name(kind)  # one of Jinja2's extensions or ours
        state = getattr(value, "__dict__", None)
        if "__dataclass_fields__" in vars(kind) or (state is not None and callable(value)) or _is_extension(kind):
            # An extension refers to its environment, which is digested by itself.
            return self._type(kind) + self.of({k: v for k, v in (state or {}).items() if not _is_environment(v)})
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
        """Return the bytes of the module globals that a function reads."""
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
        # File names and line numbers are left out: moving a function doesn't change what it does.
        constants = b"".join(self._code(c) if isinstance(c, CodeType) else self.of(c) for c in code.co_consts)
        names = repr((code.co_names, code.co_varnames, code.co_freevars, code.co_argcount, code.co_flags)).encode()
        return _tagged("code", code.co_code + constants + names + marshal.dumps(code.co_exceptiontable))


def _tagged(tag: str, content: bytes) -> bytes:
    return b"%b %d:%b" % (tag.encode(), len(content), content)


def _name(value: Any) -> bytes:
    return f"{value.__module__}.{value.__qualname__}".encode()


def _file(module: str) -> bytes:
    """Return the size and time of a module's file, because a function may call others in the same module."""
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        status = os.stat(path) if path else None
    except OSError:
        status = None
    return b"" if status is None else b"%d %d" % (status.st_size, status.st_mtime_ns)


def _module(module: Any) -> bytes:
    return f"{module.__name__} {getattr(module, '__version__', '')}".encode() + _file(module.__name__)


def _is_environment(value: Any) -> bool:
    jinja2 = sys.modules.get("jinja2.environment")
    return jinja2 is not None and isinstance(value, jinja2.Environment)


def _is_extension(kind: type) -> bool:
    ext = sys.modules.get("jinja2.ext")
    return ext is not None and issubclass(kind, ext.Extension)


_ATOMS = {bool, int, float, complex, str, bytes, range, slice}
#: Modules whose objects are fully described by their repr.
_PLAIN = {"datetime", "decimal", "fractions", "pathlib", "uuid"}
_CODE_HOLDERS = (FunctionType, property, classmethod, staticmethod, *_ATOMS, tuple, frozenset)

# SPDX-License-Identifier: Apache-2.0
"""The digest of what decides, besides a template's source and the compiler, what its code is.

A filter may be applied to a constant when a template is compiled, and values of a static context are folded into the
code. So functions count with their code and what it refers to in its closure, and values with what they are. Where that
can't be told of an object, there is no digest, and nothing that was compiled with it is kept on disk.
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

    That is every option, the environment's class and compiler, its extensions, filters, tests and static context.

    Returns
    -------
    str or None
        As `context_digest`.
    """
    kind = type(environment)
    parts = (
        kind,
        kind.compile,  # another one where Jinja2 is patched
        *(getattr(environment, name) for name in _OPTIONS),
        *(part for name in _TABLES for part in (*getattr(environment, name), *getattr(environment, name).values())),
        *(getattr(environment, name, None) for name in _OWN),
    )
    known = _digests.get(id(environment))
    # Filters may be added at any time; objects that are the same ones have the same digest.
    if known is None or len(known[0]) != len(parts) or any(map(is_not, known[0], parts)):
        if len(_digests) >= _REMEMBERED:
            _digests.clear()
        known = _digests[id(environment)] = (
            parts,
            context_digest(*parts, [list(getattr(environment, name)) for name in _TABLES]),
        )
    return known[1]


_OPTIONS = (
    *("block_start_string", "block_end_string", "variable_start_string", "variable_end_string"),
    *("comment_start_string", "comment_end_string", "line_statement_prefix", "line_comment_prefix"),
    *("trim_blocks", "lstrip_blocks", "newline_sequence", "keep_trailing_newline", "optimized", "undefined"),
    *("finalize", "autoescape", "is_async", "sandboxed", "template_class"),
)
_TABLES = ("extensions", "filters", "tests", "policies")
_OWN = ("code_generator_class", "compiler_class", "static_context")
_REMEMBERED = 64
#: By the environment's id: what its digest was made of, which keeps those objects, and the digest.
_digests: dict[int, tuple[tuple[object, ...], str | None]] = {}


def move(code: CodeType, path: str) -> None:
    """Have tracebacks name a template's file as it is called here, wherever its code was compiled."""
    if code.co_filename != path:
        from _imp import _fix_co_filename  # type: ignore[attr-defined]  # what importlib does for modules

        _fix_co_filename(code, path)


class _Described:
    """Writes each value so that two are written alike only if they are alike."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}  # what is being written, for what contains itself

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
        closed = [cell.cell_contents for cell in value.__closure__ or ()]
        marks = {k: v for k, v in vars(value).items() if k != "__wrapped__"}
        return (
            name
            + _file(value.__module__)
            + self._code(value.__code__)
            + self.of(value.__defaults__)
            + self.of(value.__kwdefaults__)
            + self.of(closed)
            + self.of({key: getattr(mark, "name", mark) for key, mark in marks.items()})
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


def _is_extension(kind: type) -> bool:
    ext = sys.modules.get("jinja2.ext")
    return ext is not None and issubclass(kind, ext.Extension)


_ATOMS = {bool, int, float, complex, str, bytes, range, slice}
#: Their repr says all there is to say.
_PLAIN = {"datetime", "decimal", "fractions", "pathlib", "uuid"}
_CODE_HOLDERS = (FunctionType, property, classmethod, staticmethod, *_ATOMS, tuple, frozenset)

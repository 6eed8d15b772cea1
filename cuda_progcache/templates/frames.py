# SPDX-License-Identifier: Apache-2.0
"""The file format of a compiled template: a frame around code, syntax tree, precomputed values and warnings.

Numbers are 4 bytes, little-endian; lengths are in bytes.

========  =============  ====================================================================================
frame     magic          content
========  =============  ====================================================================================
legacy    (none)         marshalled code
v2        ``00 "KDA"``   code length, code; pickled AST, if any
v3        ``01 "KDA"``   code length, code; length, pickled list of precomputed values; pickled AST, if any
v4        ``02 "KDA"``   as v3, with length and warnings (JSON, a list of objects) before the AST
v5        ``05 "PGC"``   SHA-256 of the key and of the rest of the file; the four lengths; the four parts in v4's order
========  =============  ====================================================================================

The cache writes and reads v5 only. The checksum covers the key of the requested template, and it is verified before any
byte reaches marshal or pickle. `read_older` reads the older frames. Unpickling creates plain data only: it refuses
every name that could run code.
"""

from __future__ import annotations

import marshal
import sys
from types import CodeType

from cuda_progcache._util.digest import sha256

TYPE_CHECKING = False  # importing typing would take longer than everything else that a cached kernel needs
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from jinja2 import nodes

V2, V3, V4, V5 = b"\0KDA", b"\1KDA", b"\2KDA", b"\5PGC"
_SUM = slice(4, 36)
_LENGTHS = slice(36, 52)
_PARTS = 52
_CODE_ALONE = bytes(12)


class Compiled:
    """A compiled template.

    Parameters
    ----------
    code : types.CodeType
    ast : jinja2.nodes.Template, optional
        The syntax tree. A tree that was read from a frame has no environment: call its ``set_environment`` before use.
    precomputed : iterable, optional
        Values that the code expects as ``_pc_0``, ``_pc_1``, ....
    warnings : iterable of mapping
        The compiler's warnings, as JSON values.
    """

    __slots__ = ("ast", "code", "precomputed", "warnings")

    def __init__(
        self,
        code: CodeType,
        ast: nodes.Template | None = None,
        precomputed: Iterable[Any] | None = None,
        warnings: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        self.code = code
        self.ast = ast
        self.precomputed = None if precomputed is None else list(precomputed)
        self.warnings = tuple(dict(warning) for warning in warnings)


class FrameError(Exception):
    """The bytes aren't a valid frame or aren't for the requested key, or a template can't be written as a frame."""


def frame(compiled: Compiled, key: bytes) -> bytes:
    """Write a v5 frame.

    Parameters
    ----------
    compiled : Compiled
    key : bytes
        The key that a reader must pass to `unframe`.

    Raises
    ------
    FrameError
        If the template can't be written in such a way that it can be read again.
    """
    code = _marshal(compiled.code)
    precomputed = _pickle(compiled.precomputed) if compiled.precomputed else b""
    ast = b"" if compiled.ast is None else _pickle(compiled.ast)
    warnings = b""
    if compiled.warnings:
        import json

        try:
            warnings = json.dumps(compiled.warnings).encode()
        except (TypeError, ValueError) as error:
            raise FrameError(f"the warnings are not JSON: {error}") from error
    parts = (code, precomputed, warnings, ast)
    summed = b"".join((*(len(part).to_bytes(4, "little") for part in parts), *parts))
    return V5 + sha256(key + summed).digest() + summed


def unframe(data: bytes, key: bytes) -> Compiled:
    """Read a v5 frame.

    Raises
    ------
    FrameError
        If `data` isn't a v5 frame, is damaged or is for another key; if it has anything other than code and plain data;
        or if the syntax nodes have different fields in the installed Jinja2.
    """
    if data[:4] != V5:
        raise FrameError("not a frame of this version")
    if sha256(key + data[36:]).digest() != data[_SUM]:
        raise FrameError("the checksum is not this template's")
    lengths = data[_LENGTHS]
    if lengths[4:] == _CODE_ALONE and int.from_bytes(lengths[:4], "little") == len(data) - _PARTS:
        return Compiled(_unmarshal(data[_PARTS:]))
    return _compiled(*_split(data, _PARTS, [lengths[at : at + 4] for at in (0, 4, 8, 12)]))


def read_older(data: bytes) -> Compiled:
    """Read a frame of an older version.

    Such a frame has no checksum, so the caller must trust its source. The cache doesn't use this function: none of its
    files is of an older version.

    Raises
    ------
    FrameError
        See `unframe`.
    """
    counted = {V2: 1, V3: 2, V4: 3}.get(data[:4])
    return _compiled(data, b"", b"", b"") if counted is None else _compiled(*_older(data, counted))


def _compiled(code: bytes, precomputed: bytes, warnings: bytes, ast: bytes) -> Compiled:
    return Compiled(
        _unmarshal(code),
        _tree(ast) if ast else None,
        _values(precomputed) if precomputed else None,
        _warnings(warnings) if warnings else (),
    )


def _split(data: bytes, at: int, lengths: list[bytes]) -> list[bytes]:
    parts = []
    for length in lengths:
        end = at + int.from_bytes(length, "little")
        parts.append(data[at:end])
        at = end
    if at != len(data):
        raise FrameError("the lengths don't add up to the file's")
    return parts


def _older(data: bytes, counted: int) -> list[bytes]:
    """Split a frame of `counted` parts, each after its length, and an AST at the end."""
    parts = []
    at = 4
    for _ in range(counted):
        start, end = at + 4, at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise FrameError("the file ends early")
        parts.append(data[start:end])
        at = end
    return [*parts, *[b""] * (3 - counted), data[at:]]


def _marshal(code: CodeType) -> bytes:
    try:
        return marshal.dumps(code)
    except ValueError as error:
        raise FrameError(f"the code has constants that can't be marshalled: {error}") from error


def _unmarshal(data: bytes) -> CodeType:
    try:
        code = marshal.loads(data)  # noqa: S302  (checked above; the directory is ours)
    except (ValueError, EOFError, TypeError, MemoryError, UnicodeError) as error:
        raise FrameError(f"not marshalled code: {error}") from error
    if not isinstance(code, CodeType):
        raise FrameError(f"marshalled {type(code).__name__}, not code")
    return code


def _warnings(data: bytes) -> list[dict[str, Any]]:
    import json

    try:
        found = json.loads(data)
    except ValueError as error:
        raise FrameError(f"the warnings are not JSON: {error}") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise FrameError("the warnings are not a list of objects")
    return found


def _values(data: bytes) -> list[Any]:
    found = _unpickle(data)
    if not isinstance(found, list):
        raise FrameError(f"precomputed values are a {type(found).__name__}, not a list")
    return found


def _tree(data: bytes) -> nodes.Template:
    from jinja2 import nodes

    tree = _unpickle(data)
    if not isinstance(tree, nodes.Template):
        raise FrameError(f"the syntax tree is a {type(tree).__name__}")
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.Node):
            state = vars(node)
            if state.keys() != {*node.fields, *node.attributes}:
                raise FrameError(f"{type(node).__name__} nodes have different fields now")
            waiting += state.values()
        elif isinstance(node, (list, tuple)):
            waiting += node
    return tree


# The names that a pickle may use: constructors of plain data. None of them calls, imports or opens anything.
_DATA = {
    "builtins": {"set", "frozenset", "bytearray", "complex", "range", "slice"},
    "collections": {"OrderedDict", "deque", "Counter"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "fractions": {"Fraction"},
    "markupsafe": {"Markup"},
    "types": {"SimpleNamespace"},
    "uuid": {"UUID"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct", "scalar"},
    "numpy.core.multiarray": {"_reconstruct", "scalar"},
}
_ENVIRONMENT = "environment"


def _pickle(value: object) -> bytes:
    """Pickle plain data or syntax nodes, and check that they can be read again.

    Every node of a tree refers to its environment, which isn't data: readers get None in its place.
    """
    import io
    import pickle

    from jinja2 import Environment

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> str | None:
            return _ENVIRONMENT if isinstance(item, Environment) else None

    buffer = io.BytesIO()
    try:
        Pickler(buffer, protocol=5).dump(value)
    except Exception as error:  # an object's __reduce__ can raise any error
        raise FrameError(f"can't be pickled: {error}") from error
    _unpickle(buffer.getvalue())
    return buffer.getvalue()


def _unpickle(data: bytes) -> Any:
    import io
    import pickle

    class Unpickler(pickle.Unpickler):  # noqa: S301  (find_class lets data through, and nothing else)
        def find_class(self, module: str, name: str) -> Any:
            if not _is_data(module, name):
                raise pickle.UnpicklingError(f"{module}.{name} is not plain data")
            return super().find_class(module, name)

        def persistent_load(self, pid: object) -> None:
            if pid != _ENVIRONMENT:
                raise pickle.UnpicklingError(f"refers to {pid!r}")

    try:
        stream = io.BytesIO(data)
        value = Unpickler(stream).load()
    except Exception as error:  # damaged bytes, and the classes that they name, can raise any error
        raise FrameError(f"can't be unpickled: {error}") from error
    if stream.tell() != len(data):
        raise FrameError("trailing data after the pickle")
    return value


def _is_data(module: str, name: str) -> bool:
    if name in _DATA.get(module, ()):
        return True
    loaded = sys.modules.get(module)  # never import what a file asks for
    found = getattr(loaded, name, None)  # no dotted names: they lead to methods
    if not isinstance(found, type):
        return False
    if "__dataclass_fields__" in vars(found):
        return True
    enum, nodes = sys.modules.get("enum"), sys.modules.get("jinja2.nodes")
    return (enum is not None and issubclass(found, enum.Enum)) or (nodes is not None and issubclass(found, nodes.Node))
